"""Rows and batches: no token lost, no boundary crossed, the order a function of the seed."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen2kit.backend.protocol import TokenBatch
from qwen2kit.data.corpus import Corpus, collect, hold_out, permutation
from qwen2kit.data.loader import Loader
from qwen2kit.data.packing import IGNORED, fill_rows, plan_rows
from qwen2kit.data.row_source import PlannedRows, RowLayout, TableSource
from qwen2kit.errors import ConfigError

PAD = 0
Pair = tuple[int, int]


def corpus_of(lengths: list[int], seed: int = 0) -> Corpus:
    """Examples whose tokens are all different, about half of them supervised."""
    rng = np.random.default_rng(seed)
    examples, token = [], 1
    for length in lengths:
        ids = list(range(token, token + length))
        examples.append((ids, [bool(x) for x in rng.random(length) < 0.5]))
        token += length
    return collect(examples)


def pairs_of(corpus: Corpus) -> set[Pair]:
    """Every (input, label) pair inside an example; label -100 where it is not supervised."""
    found = set()
    for start, end in zip(corpus.offsets[:-1], corpus.offsets[1:], strict=True):
        for i in range(start, end - 1):
            label = corpus.tokens[i + 1] if corpus.supervised[i + 1] else IGNORED
            found.add((int(corpus.tokens[i]), int(label)))
    return found


def check_rows(batch: TokenBatch) -> list[Pair]:
    """The pairs of a batch, after checking padding, positions and document numbers."""
    found = []
    for tokens, labels, positions, documents in zip(
        batch.tokens, batch.labels, batch.positions, batch.documents, strict=True
    ):
        used = int((documents >= 0).sum())
        assert (documents[used:] == -1).all()
        assert (labels[used:] == IGNORED).all()
        assert (tokens[used:] == PAD).all()
        for number in range(documents.max() + 1):
            inside = documents == number
            np.testing.assert_array_equal(positions[inside], np.arange(inside.sum()))
            np.testing.assert_array_equal(np.diff(tokens[inside]), 1)
        assert (np.diff(documents[:used]) >= 0).all()
        found += [(int(a), int(b)) for a, b in zip(tokens[:used], labels[:used], strict=True)]
    return found


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=30),
    seq_len=st.integers(2, 50),
    packing=st.booleans(),
    split=st.booleans(),
    seed=st.integers(0, 5),
)
@settings(max_examples=150, deadline=None)
def test_every_pair_occurs_exactly_once(
    lengths: list[int], seq_len: int, packing: bool, split: bool, seed: int
) -> None:
    if not split:
        lengths = [min(length, seq_len + 1) for length in lengths]
    corpus = corpus_of(lengths)
    order = permutation(len(corpus), seed, 0)
    plan = plan_rows(corpus.lengths, order, seq_len, packing=packing, split=split)
    found = check_rows(fill_rows(corpus, plan, seq_len, PAD))
    assert len(found) == sum(length - 1 for length in lengths)
    assert set(found) == pairs_of(corpus)
    if packing and split:
        assert len(plan) == -(-len(found) // seq_len)
    if not split:
        pieces = [piece for row in plan for piece in row]
        assert len(pieces) == sum(length > 1 for length in lengths)


def test_whole_examples_fill_rows_well() -> None:
    rng = np.random.default_rng(0)
    corpus = corpus_of(rng.integers(5, 60, 400).tolist())
    plan = plan_rows(corpus.lengths, permutation(400, 0, 0), 128, packing=True, split=False)
    used = sum(piece.length for row in plan for piece in row)
    assert used / (len(plan) * 128) > 0.9


def test_permutation_depends_on_its_arguments_only() -> None:
    one = permutation(50, 3, 1)
    np.random.seed(99)
    np.testing.assert_array_equal(one, permutation(50, 3, 1))
    assert sorted(one) == list(range(50))
    assert not np.array_equal(one, permutation(50, 3, 2))
    assert not np.array_equal(one, permutation(50, 4, 1))


def loader(corpus: Corpus, batch_rows: int = 4, rank: int = 0, world: int = 1) -> Loader:
    table = PlannedRows(corpus, RowLayout(seq_len=16, seed=5, pad_id=PAD))
    return Loader(TableSource(table), batch_rows=batch_rows, shard=(rank, world))


def same(a: TokenBatch, b: TokenBatch) -> bool:
    fields = ("tokens", "labels", "positions", "documents")
    return all(np.array_equal(getattr(a, f), getattr(b, f)) for f in fields)


def test_state_is_json_and_restores_the_exact_stream_across_epochs() -> None:
    corpus = corpus_of([7, 3, 12, 9, 5, 16, 2, 8, 11, 6])
    reference = loader(corpus)
    batches, states = [], []
    for _ in range(9):
        states.append(json.loads(json.dumps(reference.state())))
        batches.append(reference.next_batch())
    assert states[-1]["epoch"] >= 3
    for index, state in enumerate(states):
        again = loader(corpus)
        again.restore(state)
        assert same(again.next_batch(), batches[index])


def test_ranks_share_the_batch_of_one_process() -> None:
    corpus = corpus_of([7, 3, 12, 9, 5, 16, 2, 8, 11, 6])
    single = loader(corpus)
    ranks = [loader(corpus, rank=rank, world=2) for rank in range(2)]
    for _ in range(5):
        whole = single.next_batch()
        parts = [rank.next_batch() for rank in ranks]
        joined = TokenBatch(
            *(
                np.concatenate([getattr(part, f) for part in parts])
                for f in ("tokens", "labels", "positions", "documents")
            )
        )
        assert same(whole, joined)
        assert ranks[0].state() == ranks[1].state() == single.state()
    with pytest.raises(ConfigError, match="not a multiple of the 3 processes"):
        loader(corpus, world=3)


def test_an_epoch_covers_everything_once() -> None:
    corpus = corpus_of([7, 3, 12, 9, 5, 16, 2, 8, 11, 6])
    stream = loader(corpus, batch_rows=1)
    for epoch in range(3):
        found: list[Pair] = []
        for _ in range(stream.rows_in(epoch)):
            found += check_rows(stream.next_batch())
        assert stream.state() == {"epoch": epoch + 1, "row": 0}
        assert sorted(found) == sorted(pairs_of(corpus))


def test_first_rows_does_not_move_the_loader() -> None:
    corpus = corpus_of([7, 3, 12, 9, 5, 16, 2, 8, 11, 6])
    stream = loader(corpus)
    found = [pair for batch in stream.first_rows(100) for pair in check_rows(batch)]
    assert sorted(found) == sorted(pairs_of(corpus))
    (batch,) = stream.first_rows(3)
    assert batch.tokens.shape == (4, 16)
    assert (batch.documents.max(axis=1) >= 0).tolist() == [True, True, True, False]
    assert check_rows(batch)
    assert stream.state() == {"epoch": 0, "row": 0}


def test_hold_out_splits_and_fingerprints_tell_data_apart() -> None:
    corpus = corpus_of([7, 3, 12, 9, 5, 16, 2, 8, 11, 6])
    train, held = hold_out(corpus, 0.2, 0)
    assert len(train) == 8
    assert len(held) == 2
    assert pairs_of(train) | pairs_of(held) == pairs_of(corpus)
    assert not pairs_of(train) & pairs_of(held)
    assert corpus.fingerprint() == corpus_of([7, 3, 12, 9, 5, 16, 2, 8, 11, 6]).fingerprint()
    flipped = Corpus(corpus.tokens, ~corpus.supervised, corpus.offsets)
    assert len({c.fingerprint() for c in (corpus, train, held, flipped)}) == 4
