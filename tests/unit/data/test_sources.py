"""Rows of every kind of data: one order for any number of processes, exact resume, proportions."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen2kit.backend.protocol import TokenBatch
from qwen2kit.config.data_tree import AnyData, MixtureData, MixtureSource, TextData
from qwen2kit.data.loader import Loader
from qwen2kit.data.mixture import MixedRows
from qwen2kit.data.row_source import TableSource
from qwen2kit.errors import ConfigError, DataError
from tests.unit.data.make_data import (
    make_shards,
    opener,
    pairs,
    rows_of,
    sentences,
    shards_of,
    small_tokenizer,
    stack,
    write_chats,
    write_lines,
)

ROWS = 8
STEPS = 14


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[AnyData, str]]:
    """Data of every kind, small enough that ``STEPS`` batches reach a third epoch."""
    root = tmp_path_factory.mktemp("kinds")
    texts = [write_lines(root / f"{n}.txt", sentences(n, n, longest=20)) for n in (25, 1, 30)]
    paths = tuple(path for text in texts for path in text.paths)
    files = TextData(paths=paths, split="line")
    stream = TextData(paths=paths, split="line", stream=True, shuffle_rows=5)
    make_shards(files, root / "shards", shard_bytes=700)
    chats = write_chats(root / "chats.jsonl", 60)
    make_shards(chats, root / "chat-shards", "sft", shard_bytes=2_000)
    other = TextData(paths=texts[2].paths, split="line", stream=True, shuffle_rows=3)
    mixture = MixtureData(
        sources=(
            MixtureSource(weight=5.0, data=shards_of(root / "shards")),
            MixtureSource(weight=2.0, data=other),
            MixtureSource(weight=1.0, data=texts[0]),
        )
    )
    return {
        "memory": (files, "pretrain"),
        "stream": (stream, "pretrain"),
        "shards": (shards_of(root / "shards"), "pretrain"),
        "chats": (chats, "sft"),
        "chat shards": (shards_of(root / "chat-shards"), "sft"),
        "mixture": (mixture, "pretrain"),
    }


def loader(kind: tuple[AnyData, Any], rank: int = 0, world: int = 1) -> Loader:
    data, task = kind
    made = opener(task, seq_len=64 if task == "sft" else 16)
    return Loader(made.source(data), batch_rows=ROWS, shard=(rank, world))


KINDS = ("memory", "stream", "shards", "chats", "chat shards", "mixture")


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_is_that_of_one_process(kind: str, kinds: dict[str, tuple[AnyData, str]]) -> None:
    single = loader(kinds[kind])
    teams = {
        world: [loader(kinds[kind], rank, world) for rank in range(world)] for world in (2, 4, 8)
    }
    for _ in range(STEPS):
        whole = single.next_batch()
        assert len(whole.tokens) == ROWS
        for world, team in teams.items():
            parts = [member.next_batch() for member in team]
            assert all(len(part.tokens) == ROWS // world for part in parts)
            assert rows_of(stack(parts)) == rows_of(whole)
            assert all(member.state() == single.state() for member in team)
    for each in (single, *teams[2], *teams[4], *teams[8]):
        each.close()


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_goes_on_exactly_with_any_number_of_processes(
    kind: str, kinds: dict[str, tuple[AnyData, str]]
) -> None:
    reference = loader(kinds[kind])
    states, rows = [], []
    for _ in range(STEPS):
        states.append(json.dumps(reference.state()))
        rows.append(rows_of(reference.next_batch()))
    reference.close()
    assert all(len(state) < 400 for state in states)
    for step in range(STEPS - 1):
        world = (1, 2, 4)[step % 3]
        team = [loader(kinds[kind], rank, world) for rank in range(world)]
        for member in team:
            member.restore(json.loads(states[step]))
        for later in (step, step + 1):
            parts = [member.next_batch() for member in team]
            assert rows_of(stack(parts)) == rows[later], f"after step {step}"
        assert all(member.fingerprint() == reference.fingerprint() for member in team)
        for member in team:
            member.close()


@pytest.mark.parametrize("kind", ["stream", "mixture"])
def test_one_loader_can_be_set_back(kind: str, kinds: dict[str, tuple[AnyData, str]]) -> None:
    one = loader(kinds[kind])
    state = one.state()
    first = [rows_of(one.next_batch()) for _ in range(3)]
    middle = json.loads(json.dumps(one.state()))
    then = [rows_of(one.next_batch()) for _ in range(3)]
    one.restore(state)
    assert [rows_of(one.next_batch()) for _ in range(6)] == first + then
    one.restore(middle)
    assert rows_of(one.next_batch()) == then[0]
    one.close()


def test_the_seed_changes_the_order_and_not_the_content(
    kinds: dict[str, tuple[AnyData, str]],
) -> None:
    data, _ = kinds["shards"]
    tables = [opener(seed=seed).table(data) for seed in (1, 2)]
    rows = [rows_of(table.rows(0, range(table.rows_in(0)))) for table in tables]
    assert rows[0] != rows[1]
    assert sorted(rows[0]) == sorted(rows[1])


def test_streaming_holds_what_memory_holds(kinds: dict[str, tuple[AnyData, str]]) -> None:
    table = opener().table(kinds["memory"][0])
    expected = sorted(pairs(table.rows(0, range(table.rows_in(0)))))
    stream = opener().source(kinds["stream"][0])
    epochs = []
    for epoch in range(2):
        found: list[tuple[int, int]] = []
        for _ in range(table.rows_in(0)):
            found += pairs(stream.take(1, range(1)))
            assert stream.epoch in (epoch, epoch + 1)
        assert stream.epoch == epoch + 1
        assert sorted(found) == expected
        epochs.append(found)
    assert epochs[0] != epochs[1], "the second epoch has its own order"
    stream.close()


def test_a_stream_shuffles_within_blocks(tmp_path: Path) -> None:
    lines = write_lines(tmp_path / "t.txt", sentences(200))
    order: dict[int, list[bytes]] = {}
    for size in (1, 7):
        data = TextData(paths=lines.paths, split="line", stream=True, shuffle_rows=size)
        stream = opener().source(data)
        order[size] = rows_of(stream.take(70, range(70)))
        stream.close()
    plain, shuffled = order[1], order[7]
    assert plain != shuffled
    moved = 0
    for start in range(0, 70, 7):
        block = slice(start, start + 7)
        assert sorted(plain[block]) == sorted(shuffled[block])
        moved += plain[block] != shuffled[block]
    assert moved >= 9


def test_formats_and_compression_stream_alike(tmp_path: Path) -> None:
    import gzip

    from qwen2kit.config.data_tree import JsonlData, ParquetData

    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    values = [{"text": text, "n": 1} for text in sentences(90)]
    text = "".join(json.dumps(value) + "\n" for value in values)
    (tmp_path / "a.jsonl").write_text(text)
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write(text)
    packed = pyarrow.Codec("zstd").compress(text.encode(), asbytes=True)
    (tmp_path / "a.jsonl.zst").write_bytes(packed)
    (tmp_path / "a.json").write_text(json.dumps(values))
    table = pyarrow.Table.from_pylist(values)
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=20)
    rows = []
    for name in ("a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.json", "a.parquet"):
        kind = ParquetData if name.endswith("parquet") else JsonlData
        stream = opener().source(kind(paths=(str(tmp_path / name),), stream=True, shuffle_rows=4))
        batches = [stream.take(3, range(3)) for _ in range(4)]
        state = stream.state()
        batches.append(stream.take(3, range(3)))
        stream.restore(state)
        assert rows_of(stream.take(3, range(3))) == rows_of(batches[-1])
        rows.append(rows_of(stack(batches)))
        stream.close()
    assert all(found == rows[0] for found in rows)


def test_errors_of_a_stream_arrive_in_the_loop(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "the cat"}\n' * 40 + "{\n")
    from qwen2kit.config.data_tree import JsonlData

    stream = opener().source(JsonlData(paths=(str(path),), stream=True, shuffle_rows=2))
    with pytest.raises(DataError, match=r"a\.jsonl, row 41: not valid JSON"):
        stream.take(100, range(1))
    stream.close()
    path.write_text("\n\n")
    stream = opener().source(TextData(paths=(str(path),), split="line", stream=True))
    with pytest.raises(DataError, match="holds no document"):
        stream.take(1, range(1))
    stream.close()
    with pytest.raises(ConfigError, match=r"remove it or packing = false"):
        opener(packing=False).source(TextData(paths=(str(path),), stream=True))


class Numbers:
    """A table whose row ``r`` of epoch ``e`` is ``[name, e, r]``."""

    def __init__(self, name: int, count: int) -> None:
        self.name, self.count = name, count
        self.layout = opener(seq_len=3).layout

    def rows_in(self, epoch: int) -> int:
        return self.count

    def rows(self, epoch: int, numbers: range) -> TokenBatch:
        found = [[self.name, epoch, number] for number in numbers]
        array = np.array(found, dtype=np.int32).reshape(len(numbers), 3)
        return TokenBatch(array, array, array, array)

    def fingerprint(self) -> str:
        return str(self.name)

    def hold_out(self, fraction: float) -> Any:
        raise AssertionError


def mixed(weights: list[float], sizes: list[int], seed: int = 0) -> tuple[MixedRows, list[str]]:
    notes: list[str] = []
    sources = [TableSource(Numbers(name, size)) for name, size in enumerate(sizes)]
    return MixedRows(sources, weights, seed, notes.append), notes


@pytest.mark.parametrize("weights", [[0.7, 0.3], [5, 1, 1, 0.01], [1], [1, 1, 1]])
@pytest.mark.parametrize("seed", [0, 1, 99])
def test_a_mixture_keeps_its_proportions_everywhere(weights: list[float], seed: int) -> None:
    mixture, _ = mixed(weights, [10**9] * len(weights), seed)
    owners = mixture.owners(0, 100_000)
    for first, last in ((0, 100_000), (0, 100), (777, 1_777), (50_000, 50_064)):
        counts = np.bincount(owners[first:last], minlength=len(weights))
        exact = (last - first) * np.array(weights) / sum(weights)
        assert np.abs(counts - exact).max() < 5, "far less than chance would give"


def test_weights_of_any_size_make_a_mixture() -> None:
    mixture, _ = mixed([1.0, 1e-30], [10, 10])
    assert set(mixture.owners(0, 1000).tolist()) == {0}
    part = MixtureSource(weight=1e308, data=TextData(paths=("x",)))
    with pytest.raises(ConfigError, match="the weights add up to more than a number can hold"):
        MixtureData(sources=(part, part))


def test_the_source_of_a_row_depends_on_seed_and_number_only() -> None:
    one, _ = mixed([2, 1], [7, 9])
    two, _ = mixed([2, 1], [1_000, 3])
    np.testing.assert_array_equal(one.owners(0, 500)[123:], two.owners(123, 377))
    assert (mixed([2, 1], [7, 9], seed=1)[0].owners(0, 500) != one.owners(0, 500)).any()


def test_a_mixture_takes_every_source_in_its_own_order_and_counts_epochs() -> None:
    mixture, notes = mixed([3, 1], [10, 4])
    seen: dict[int, list[tuple[int, int]]] = {0: [], 1: []}
    for _ in range(10):
        for name, epoch, row in mixture.take(6, range(6)).tokens.tolist():
            seen[name].append((epoch, row))
    for name, size in ((0, 10), (1, 4)):
        assert seen[name] == [divmod(i, size) for i in range(len(seen[name]))]
    ended = {name: len(found) // size for (name, found), size in zip(
        seen.items(), (10, 4), strict=True)}  # fmt: skip
    told = Counter(note.split()[1] for note in notes)
    assert told == {"1": ended[0], "2": ended[1]}
    assert notes[0].endswith("of the mixture starts epoch 2")
    assert mixture.epoch == min(ended.values())
    with pytest.raises(DataError, match="with 2 sources in its mixture, the recipe now has 1"):
        mixed([1], [5])[0].restore(mixture.state())


def test_equal_sources_of_a_mixture_are_shuffled_differently(
    kinds: dict[str, tuple[AnyData, str]],
) -> None:
    shards, _ = kinds["shards"]
    twice = MixtureData(sources=(MixtureSource(weight=1, data=shards),) * 2)  # type: ignore[arg-type]
    source = opener().source(twice)
    assert isinstance(source, MixedRows)
    one, two = (part.take(20, range(20)) for part in source._sources)
    assert rows_of(one) != rows_of(two)


@pytest.mark.parametrize("kind", ["memory", "shards", "chats"])
@pytest.mark.parametrize("max_rows", [1, ROWS, ROWS + 3, 10_000])
def test_held_out_batches_are_alike_on_every_process(
    kind: str, max_rows: int, kinds: dict[str, tuple[AnyData, str]]
) -> None:
    table = loader(kinds[kind]).rows_in(0)
    wanted = min(max_rows, table)
    for world in (1, 2, 4):
        team = [loader(kinds[kind], rank, world) for rank in range(world)]
        parts = [list(member.first_rows(max_rows)) for member in team]
        assert {len(batches) for batches in parts} == {-(-wanted // ROWS)}
        shapes = {batch.tokens.shape for batches in parts for batch in batches}
        assert {shape[0] for shape in shapes} == {ROWS // world}
        rows = [row for step in zip(*parts, strict=True) for row in rows_of(stack(list(step)))]
        first = loader(kinds[kind])
        expected = [row for _ in range(0, wanted, ROWS) for row in rows_of(first.next_batch())]
        assert rows[:wanted] == expected[:wanted]
        padding = stack([batch for step in zip(*parts, strict=True) for batch in step])
        empty = (padding.documents == -1).all(axis=1)
        assert empty.sum() == len(rows) - wanted
        assert (padding.labels[empty] == -100).all()


@pytest.mark.parametrize("kind", ["stream", "mixture"])
def test_what_cannot_be_counted_says_so(kind: str, kinds: dict[str, tuple[AnyData, str]]) -> None:
    one = loader(kinds[kind])
    with pytest.raises(ConfigError, match=r"set train\.steps instead of train\.epochs"):
        one.rows_in(0)
    with pytest.raises(ConfigError, match=r"eval\.data"):
        list(one.first_rows(5))


def test_a_place_that_does_not_exist_is_refused(kinds: dict[str, tuple[AnyData, str]]) -> None:
    for kind in ("memory", "shards"):
        with pytest.raises(DataError, match="row 100000 of epoch 0, where the run stopped"):
            loader(kinds[kind]).restore({"epoch": 0, "row": 100_000})
    one = loader(kinds["stream"])
    with pytest.raises(DataError, match="the place where the run stopped does not exist"):
        one.restore({**one.state(), "taken": 77})
    one.close()


def test_fingerprints_tell_streams_apart(tmp_path: Path) -> None:
    data = write_lines(tmp_path / "t.txt", ["the cat", "the mat"])
    stream = TextData(paths=data.paths, split="line", stream=True)
    made = opener()
    before = made.source(stream).fingerprint()
    assert made.source(stream).fingerprint() == before
    write_lines(tmp_path / "t.txt", ["the cat", "the dog"])
    assert made.source(stream).fingerprint() != before
    assert small_tokenizer().eot_id == made.layout.pad_id
