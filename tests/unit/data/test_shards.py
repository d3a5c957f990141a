"""Token shards: readable by NumPy alone, rows as the packing rules say, flat memory, refusals."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen2kit.config.data_tree import ShardData
from qwen2kit.data.corpus import collect
from qwen2kit.data.encode import encode_corpus, read_texts
from qwen2kit.data.packing import empty_rows, fill_rows, plan_rows
from qwen2kit.data.shard_format import read_index, token_dtype
from qwen2kit.data.shard_rows import ShardExamples, WindowRows
from qwen2kit.data.shard_verify import verify_shards
from qwen2kit.data.shards import ShardSet
from qwen2kit.data.windows import count_pairs, fill_window
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

TOKENIZER = small_tokenizer()


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A directory of at least four shards, and its documents."""
    root = tmp_path_factory.mktemp("documents")
    lines = sentences(300)
    index = make_shards(write_lines(root / "t.txt", [*lines, ""]), root / "shards")
    assert len(index.shards) >= 4
    return root / "shards", lines


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("chats")
    make_shards(write_chats(root / "c.jsonl", 120), root / "shards", "sft", shard_bytes=6_000)
    write_chats(root / "c.jsonl", 120)
    return root


def test_numpy_alone_reads_the_format(documents: tuple[Path, list[str]]) -> None:
    directory, lines = documents
    index = json.loads((directory / "index.json").read_text())
    texts = []
    for shard in index["shards"]:
        base = str(directory / shard["name"])
        tokens = np.memmap(base + ".tokens", dtype="<u2", mode="r")
        offsets = np.memmap(base + ".offsets", dtype="<i8", mode="r")
        assert (len(tokens), len(offsets)) == (shard["tokens"], shard["documents"] + 1)
        for start, stop in pairwise(offsets):
            assert tokens[stop - 1] == TOKENIZER.eot_id
            texts.append(TOKENIZER.decode(tokens[start : stop - 1].tolist()))
    assert texts == lines
    assert (index["dtype"], index["documents"], index["empty"]) == ("uint16", 300, 1)
    assert [token_dtype(n) for n in (1 << 16, (1 << 16) + 1)] == ["uint16", "uint32"]


def test_masks_of_conversations_are_bits(chats: Path) -> None:
    corpus, _ = encode_corpus(
        write_chats(chats / "c.jsonl", 120), TOKENIZER, task="sft", seq_len=10**6
    )
    tokens, masks = [], []
    for shard in read_index(chats / "shards").shards:
        base = chats / "shards" / shard.name
        tokens.append(np.fromfile(f"{base}.tokens", dtype="<u2"))
        bits = np.unpackbits(np.fromfile(f"{base}.supervised", np.uint8), bitorder="little")
        masks.append(bits[: shard.tokens].astype(bool))
        assert masks[-1].sum() == shard.supervised
    np.testing.assert_array_equal(np.concatenate(tokens), corpus.tokens)
    np.testing.assert_array_equal(np.concatenate(masks), corpus.supervised)


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=30),
    seq_len=st.integers(2, 50),
    masked=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_a_window_is_the_row_that_packing_makes(
    lengths: list[int], seq_len: int, masked: bool
) -> None:
    rng = np.random.default_rng(sum(lengths))
    corpus = collect(
        (rng.integers(1, 99, n).tolist(), (rng.random(n) < (0.5 if masked else 2)).tolist())
        for n in lengths
    )
    plan = plan_rows(corpus.lengths, np.arange(len(lengths)), seq_len, packing=True, split=True)
    expected = fill_rows(corpus, plan, seq_len, 0)
    total = count_pairs(corpus)
    batch = empty_rows(len(plan), seq_len, 0)
    for row in range(len(plan)):
        first = row * seq_len
        fill_window(batch, row, 0, corpus, first, min(first + seq_len, total))
    # Packing numbers documents of two tokens or more; a document of one token takes a number here.
    for row in range(len(plan)):
        _, batch.documents[row] = np.unique(batch.documents[row], return_inverse=True)
        batch.documents[row] -= int((expected.documents[row] < 0).any())
    assert rows_of(batch) == rows_of(expected)


def test_an_epoch_holds_every_pair_once_and_epochs_differ(
    documents: tuple[Path, list[str]],
) -> None:
    directory, _ = documents
    table = opener(seq_len=24).table(shards_of(directory))
    count = table.rows_in(0)
    epochs = [table.rows(epoch, range(count)) for epoch in range(2)]
    index = read_index(directory)
    assert count == -(-(index.total("tokens") - index.total("documents")) // 24)
    expected = []
    for line in documents[1]:
        ids = [*TOKENIZER.encode(line), TOKENIZER.eot_id]
        expected += list(pairwise(ids))
    for epoch in epochs:
        assert sorted(pairs(epoch)) == sorted(expected)
    assert rows_of(epochs[0]) != rows_of(epochs[1])
    assert sorted(rows_of(epochs[0])) == sorted(rows_of(epochs[1]))
    assert any(batch.documents.max() > 0 for batch in epochs)


def test_any_row_can_be_read_without_the_others(documents: tuple[Path, list[str]]) -> None:
    table = opener(seq_len=24).table(shards_of(documents[0]))
    whole = rows_of(table.rows(3, range(table.rows_in(3))))
    for number in (0, 5, len(whole) - 1):
        assert rows_of(table.rows(3, range(number, number + 1))) == [whole[number]]


def test_held_out_windows_share_no_pair_with_the_others(
    documents: tuple[Path, list[str]],
) -> None:
    table = opener(seq_len=24).table(shards_of(documents[0]))
    train, held = table.hold_out(0.1)
    assert held.rows_in(0) == round(0.1 * table.rows_in(0))
    assert train.rows_in(0) + held.rows_in(0) == table.rows_in(0)
    parts = [t.rows(0, range(t.rows_in(0))) for t in (train, held)]
    whole = table.rows(0, range(table.rows_in(0)))
    assert sorted(rows_of(stack(parts))) == sorted(rows_of(whole))
    assert len({t.fingerprint() for t in (table, train, held)}) == 3
    with pytest.raises(DataError, match="leaves no row to train on"):
        held.hold_out(0.99999)


def test_conversations_of_shards_are_packed_as_those_of_files(chats: Path) -> None:
    data = write_chats(chats / "c.jsonl", 120)
    for seq_len in (48, 400):
        made = opener("sft", seq_len=seq_len)
        files, shards = made.table(data), made.table(shards_of(chats / "shards"))
        assert shards.rows_in(0) == files.rows_in(0)
        numbers = range(files.rows_in(1))
        assert rows_of(shards.rows(1, numbers)) == rows_of(files.rows(1, numbers))
        notes = made.note.__self__  # type: ignore[attr-defined]
        assert notes[: len(notes) // 2] == notes[len(notes) // 2 :]
        assert bool(notes) == (seq_len == 48)
    with pytest.raises(DataError, match=r"shards/0000\d, document \d+: \d+ tokens do not fit"):
        opener("sft", seq_len=48, too_long="refuse").table(shards_of(chats / "shards"))


def test_unpacked_documents_of_shards(documents: tuple[Path, list[str]]) -> None:
    table = opener(seq_len=24, packing=False).table(shards_of(documents[0]))
    batch = table.rows(0, range(table.rows_in(0)))
    assert batch.documents.max() == 0
    assert len(batch.tokens) > 300


_SPARSE = """
import json, resource, sys
from pathlib import Path
import numpy as np
from qwen2kit.data.row_source import RowLayout
from qwen2kit.data.shard_format import ShardIndex, ShardInfo, write_index
from qwen2kit.data.shard_rows import WindowRows
from qwen2kit.data.shards import ShardSet

root, documents, each = Path(sys.argv[1]), 4_000_000, 1_024
tokens = documents * each
with open(root / "00000.tokens", "wb") as file:
    file.truncate(4 * tokens)
np.arange(0, tokens + 1, each, dtype="<i8").tofile(root / "00000.offsets")
info = ShardInfo(name="00000", documents=documents, tokens=tokens, supervised=tokens, empty=0,
                 sha256={"tokens": "", "offsets": ""})
index = ShardIndex(task="pretrain", dtype="uint32", tokenizer="", made_from={}, shards=(info,))
write_index(root, index)
table = WindowRows(ShardSet([root], None, None), RowLayout(seq_len=4096, seed=0, pad_id=0))
def resident():
    line = next(x for x in open("/proc/self/status") if x.startswith("VmRSS"))
    return int(line.split()[1]) / 1024
table.rows(0, range(10))
before = resident()
for start in range(0, 2_000, 50):
    batch = table.rows(1, range(start, start + 50))
assert (batch.documents[:, -1] == 4).all() or batch.documents.max() >= 4
print(json.dumps([table.rows_in(0), resident() - before]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_stays_flat_on_a_sixteen_gigabyte_shard(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _SPARSE, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    rows, growth = json.loads(done.stdout)
    assert rows == -(-4_000_000 * 1_023 // 4096)
    # 2,000 rows are 32 MB of tokens, the offsets alone 32 MB.
    assert growth < 16, f"resident memory grew by {growth:.0f} MB"


def test_shards_of_another_tokenizer_are_refused(
    documents: tuple[Path, list[str]], chats: Path
) -> None:
    other = small_tokenizer(280)
    with pytest.raises(DataError, match="made with another tokenizer than the model's"):
        ShardSet([documents[0]], "pretrain", other)
    template = small_tokenizer.__wrapped__(290)
    assert template.fingerprint == TOKENIZER.fingerprint
    template.chat_template = (template.chat_template or "") + " "
    ShardSet([documents[0]], "pretrain", template)
    with pytest.raises(DataError, match="another tokenizer or chat template"):
        ShardSet([chats / "shards"], "sft", template)
    with pytest.raises(DataError, match="tokenised for task pretrain, but the recipe's is sft"):
        ShardSet([documents[0]], "sft", TOKENIZER)
    with pytest.raises(ConfigError, match="cannot be trained on shards"):
        list(read_texts(shards_of(documents[0])))


def test_the_directory_brings_its_tokenizer(documents: tuple[Path, list[str]]) -> None:
    from qwen2kit.tokenizer.bpe import Tokenizer

    brought = Tokenizer.from_dir(documents[0] / "tokenizer")
    assert brought.fingerprint == TOKENIZER.fingerprint
    assert len(ShardSet([documents[0]], "pretrain", brought)) >= 4


def test_the_fingerprint_is_that_of_the_tokenizer_not_of_its_file(
    real_gguf: Path, tmp_path: Path
) -> None:
    from qwen2kit.tokenizer.bpe import Tokenizer
    from qwen2kit.weights.checkpoint import open_checkpoint

    real = open_checkpoint(real_gguf).tokenizer()
    for tokenizer in (real, TOKENIZER):
        tokenizer.save(tmp_path)
        assert Tokenizer.from_dir(tmp_path).fingerprint == tokenizer.fingerprint
    document = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    found = {TOKENIZER.fingerprint}
    changes = [
        lambda d: d["model"]["merges"].reverse(),
        lambda d: d["added_tokens"].append(
            d["added_tokens"][-1] | {"id": d["added_tokens"][-1]["id"] + 1, "content": "<other>"}
        ),
        lambda d: d.update(normalizer={"type": "NFKC"}),
        lambda d: d["pre_tokenizer"]["pretokenizers"][0].update(pattern={"Regex": "a"}),
    ]
    for change in changes:
        changed = json.loads(json.dumps(document))
        change(changed)
        (tmp_path / "tokenizer.json").write_text(json.dumps(changed), encoding="utf-8")
        found.add(Tokenizer.from_dir(tmp_path).fingerprint)
    assert len(found) == 1 + len(changes)


def test_damage_is_noticed_and_named(tmp_path: Path) -> None:
    directory = tmp_path / "s"
    make_shards(write_lines(tmp_path / "t.txt", sentences(300)), directory)

    def damaged() -> dict[str, str]:
        _, found = verify_shards(directory, threads=2, progress=lambda size: None)
        return {damage.file: damage.problem for damage in found}

    assert damaged() == {}
    tokens = directory / "00001.tokens"
    good = tokens.read_bytes()
    tokens.write_bytes(good[:50] + bytes([good[50] ^ 1]) + good[51:])
    assert list(damaged()) == ["00001.tokens"]
    assert "SHA-256" in damaged()["00001.tokens"]
    tokens.write_bytes(good[:-2])
    (directory / "00002.offsets").unlink()
    assert damaged().keys() == {"00001.tokens", "00002.offsets"}
    with pytest.raises(DataError, match=r"00001\.tokens has \d+ bytes instead of"):
        ShardSet([directory], "pretrain", TOKENIZER)
    tokens.write_bytes(good)
    with pytest.raises(DataError, match=r"00002\.offsets is missing"):
        ShardSet([directory], "pretrain", TOKENIZER)


def test_a_file_cut_off_while_training_is_an_error_not_a_crash(tmp_path: Path) -> None:
    make_shards(write_lines(tmp_path / "t.txt", sentences(40)), tmp_path / "s", shard_bytes=10**6)
    table = opener(seq_len=24).table(shards_of(tmp_path / "s"))
    with (tmp_path / "s/00000.tokens").open("rb+") as file:
        file.truncate(10)
    with pytest.raises(DataError, match=r"00000\.tokens ends too early; check it with"):
        table.rows(0, range(table.rows_in(0)))


def test_damage_met_while_training_is_named(tmp_path: Path) -> None:
    """Sizes are right, contents are not: a flipped bit, a lost block."""
    data = write_lines(tmp_path / "t.txt", sentences(40))
    make_shards(data, tmp_path / "s", shard_bytes=10**6)
    table = opener(seq_len=24).table(shards_of(tmp_path / "s"))
    tokens = np.memmap(tmp_path / "s/00000.tokens", dtype="<u2", mode="r+")
    good, tokens[30] = int(tokens[30]), TOKENIZER.vocab_size
    with pytest.raises(DataError, match=rf"tokens holds the id {TOKENIZER.vocab_size}, which no"):
        table.rows(0, range(table.rows_in(0)))
    tokens[30] = good
    table.rows(0, range(table.rows_in(0)))
    offsets = np.memmap(tmp_path / "s/00000.offsets", dtype="<i8", mode="r+")
    whole = offsets.copy()
    for wrong in (np.zeros_like(whole), whole * -1):
        offsets[20:] = wrong[20:]
        with pytest.raises(DataError, match=r"00000\.offsets holds places that do not follow"):
            table.rows(0, range(table.rows_in(0)))
        with pytest.raises(DataError, match=r"00000\.offsets holds places that do not follow"):
            opener(packing=False).table(shards_of(tmp_path / "s"))


def test_an_index_of_other_types_is_damaged(documents: tuple[Path, list[str]]) -> None:
    good = json.loads((documents[0] / "index.json").read_text(encoding="utf-8"))
    shards = [good["shards"][0] | {"tokens": "x"}]
    changes = (
        {"dtype": "int8"},
        {"task": 1},
        {"made_from": []},
        {"shards": shards},
    )
    for change in changes:
        (documents[0] / "index.json").write_text(json.dumps(good | change), encoding="utf-8")
        with pytest.raises(DataError, match=r"index\.json is damaged"):
            read_index(documents[0])
    (documents[0] / "index.json").write_text(json.dumps(good), encoding="utf-8")


def test_what_is_no_finished_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no token shards"):
        ShardSet([tmp_path], "pretrain", TOKENIZER)
    (tmp_path / "job.json").write_text("{}")
    with pytest.raises(DataError, match="is unfinished; run the same"):
        ShardSet([tmp_path], "pretrain", TOKENIZER)
    for text, part in (("{", "is damaged"), ('{"format": 1, "version": 2}', "this release reads")):
        (tmp_path / "index.json").write_text(text)
        with pytest.raises(DataError, match=part):
            read_index(tmp_path)
    with pytest.raises(DataError, match="no directory matches"):
        opener().table(ShardData(paths=(str(tmp_path / "no*"),)))


def test_many_shards_are_not_open_at_once(tmp_path: Path) -> None:
    make_shards(write_lines(tmp_path / "t.txt", sentences(400)), tmp_path / "s", shard_bytes=100)
    shards = ShardSet([tmp_path / "s"], "pretrain", TOKENIZER)
    assert len(shards) > 150
    table = WindowRows(shards, opener(seq_len=24).layout)
    first = rows_of(table.rows(0, range(table.rows_in(0))))
    assert len(shards._open) == 128
    assert rows_of(table.rows(0, range(table.rows_in(0)))) == first
    assert len(ShardExamples.of(shards)) == 400
