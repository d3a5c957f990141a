"""Tokenising in parallel: the same bytes for any number of workers and any interruption."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen2kit.config.data_tree import FileData, JsonlData, ParquetData, TextData
from qwen2kit.data.rows import read_part, read_rows
from qwen2kit.data.shard_format import read_index
from qwen2kit.data.tokenize_job import TokenizeProgress
from qwen2kit.data.work_units import plan_units
from qwen2kit.errors import DataError
from tests.unit.data.make_data import (
    contents,
    make_shards,
    opener,
    rows_of,
    sentences,
    shards_of,
    small_tokenizer,
    write_chats,
    write_lines,
)

SHARD = 4_000
ROOT = Path(__file__).parents[3]


def values(data: FileData, unit_bytes: int) -> list[Any]:
    """All rows as the units give them."""
    return [
        dict(row.value)
        for unit in plan_units(data, unit_bytes)
        for part in unit.parts
        for row in read_part(data, part)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("units")


@given(
    lines=st.lists(st.text(st.sampled_from("aé你 \r\t"), max_size=12), max_size=40),
    ending=st.sampled_from(["", "\n", "\r\n", "\n\n"]),
    split=st.sampled_from(["line", "paragraph", "file"]),
    unit_bytes=st.integers(1, 60),
)
@settings(max_examples=200, deadline=None)
def test_units_of_text_lose_and_repeat_nothing(
    tmp_path_factory: pytest.TempPathFactory,
    lines: list[str],
    ending: str,
    split: Any,
    unit_bytes: int,
) -> None:
    path = tmp_path_factory.mktemp("units") / "t.txt"
    path.write_bytes(("\n".join(lines) + ending).encode())
    data = TextData(paths=(str(path),), split=split)
    expected = [dict(row.value) for row in read_rows(data)]
    if path.stat().st_size == 0:
        assert plan_units(data, unit_bytes) == []
    else:
        assert values(data, unit_bytes) == expected


def test_units_are_even_and_span_files(tmp_path: Path) -> None:
    paths = []
    for number, count in enumerate((500, 1, 1, 90)):
        paths += write_lines(tmp_path / f"{number}.txt", sentences(count, number)).paths
    data = TextData(paths=tuple(paths), split="line")
    units = plan_units(data, SHARD)
    sizes = [unit.size for unit in units]
    assert sum(sizes) == sum(Path(path).stat().st_size for path in paths)
    assert all(SHARD <= size < SHARD + 400 for size in sizes[:-1])
    assert any(len(unit.parts) > 1 for unit in units)
    assert values(data, SHARD) == [dict(row.value) for row in read_rows(data)]


def test_json_parquet_and_compressed_files_are_cut_where_possible(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    rows = [{"text": text} for text in sentences(200)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "a.jsonl").write_text(text)
    (tmp_path / "a.json").write_text(json.dumps(rows))
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write(text)
    table = pyarrow.Table.from_pylist(rows)
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=20)
    for name, kind, several in (
        ("a.jsonl", JsonlData, True),
        ("a.json", JsonlData, False),
        ("a.jsonl.gz", JsonlData, False),
        ("a.parquet", ParquetData, True),
    ):
        data = kind(paths=(str(tmp_path / name),))
        assert values(data, 2_000) == rows
        assert (len(plan_units(data, 2_000)) > 2) == several


@pytest.mark.parametrize("task", ["pretrain", "sft"])
def test_the_result_does_not_depend_on_the_workers(task: Any, tmp_path: Path) -> None:
    data = write_chats(tmp_path / "c.jsonl", 150)
    for workers in (1, 3):
        make_shards(data, tmp_path / f"{workers}", task, workers=workers)
    one, three = contents(tmp_path / "1"), contents(tmp_path / "3")
    assert one == three
    index = read_index(tmp_path / "1")
    names = {f"{shard.name}.{suffix}" for shard in index.shards for suffix in shard.sha256}
    assert len(index.shards) > 3
    assert set(one) == names | {
        "index.json", "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json",
    }  # fmt: skip
    assert (index.total("supervised") < index.total("tokens")) == (task == "sft")


def test_progress_adds_up_and_finished_work_is_not_repeated(tmp_path: Path) -> None:
    data = write_lines(tmp_path / "t.txt", sentences(300))
    seen: list[TokenizeProgress] = []
    index = make_shards(data, tmp_path / "s", progress=seen.append)
    last = seen[-1]
    assert (last.documents, last.tokens) == (300, index.total("tokens"))
    assert last.bytes == last.total_bytes == Path(data.paths[0]).stat().st_size
    assert last.shards == last.total_shards == len(index.shards)
    assert [p.bytes for p in seen] == sorted(p.bytes for p in seen)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "s").iterdir()}
    assert make_shards(data, tmp_path / "s", progress=seen.append) == index
    assert seen[-1] is last, "nothing was left to do"
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "s").iterdir()} == before


_JOB = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from tests.unit.data.make_data import make_shards
from qwen2kit.config.data_tree import TextData
from qwen2kit.tokenizer.bpe import Tokenizer
if __name__ == "__main__":
    tokenizer = Tokenizer.from_dir(Path(sys.argv[4]))
    data = TextData(paths=(sys.argv[2],), split="line")
    make_shards(data, Path(sys.argv[3]), workers=2, shard_bytes=60_000, tokenizer=tokenizer)
"""


def finished(directory: Path) -> int:
    return len(list(directory.glob("[0-9]*.json")))


def children(parent: int) -> set[int]:
    """Running processes that ``parent`` has started (empty where there is no /proc)."""
    found = set()
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            fields = dict(line.split(":\t", 1) for line in status.read_text().splitlines())
        except (OSError, ValueError):
            continue  # it ended meanwhile
        if fields["PPid"] == str(parent) and not fields["State"].startswith("Z"):
            found.add(int(fields["Pid"]))
    return found


def is_running(process: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except OSError:
        return False


def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    data = write_lines(tmp_path / "t.txt", sentences(9_000, longest=60))
    small_tokenizer().save(tmp_path / "tok")
    whole = tmp_path / "whole"
    make_shards(data, whole, workers=1, shard_bytes=60_000)
    total = len(read_index(whole).shards)
    assert total >= 16
    script = tmp_path / "job.py"
    script.write_text(_JOB)
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    for attempt in range(9):
        out = tmp_path / f"out{attempt}"
        command = [sys.executable, script, ROOT, data.paths[0], out, tmp_path / "tok"]
        orphans: set[int] = set()
        for wanted in (1, 4, 9):
            job = subprocess.Popen(command, env=environment)
            while finished(out) < wanted and job.poll() is None:
                time.sleep(0.005)
            workers = children(job.pid)
            job.send_signal(signal.SIGKILL)
            ended = job.wait()
            if finished(out) == total:
                break  # this process did not get to look in time
            assert ended == -signal.SIGKILL
            assert workers or sys.platform != "linux"
            assert wanted <= finished(out) < total
            assert not (out / "index.json").exists()
            orphans |= workers
        else:
            break
    assert finished(out) < total, "always killed too late to test anything"
    # Workers end when their parent is gone; the next call need not wait for that.
    done = subprocess.run(command, env=environment, check=False)
    assert done.returncode == 0
    assert contents(out) == contents(whole)
    assert not any(map(is_running, orphans)), "a worker of a killed parent lived on"


def test_a_bad_file_is_mended_and_only_its_shards_are_made_again(tmp_path: Path) -> None:
    data = write_lines(tmp_path / "a.txt", sentences(300))
    write_lines(tmp_path / "b.txt", sentences(100, 1))
    good = (tmp_path / "b.txt").read_bytes()
    (tmp_path / "b.txt").write_bytes(good[:-1] + b"\xff\n")
    both = TextData(paths=(*data.paths, str(tmp_path / "b.txt")), split="line")
    out = tmp_path / "out"
    with pytest.raises(DataError, match=r"b\.txt is not UTF-8 text.*finished shards are kept in"):
        make_shards(both, out)
    kept = {path: path.stat().st_mtime_ns for path in out.glob("[0-9]*.tokens")}
    assert len(kept) == finished(out) >= 3
    assert not [name for name in contents(out) if "partial" in name]
    (tmp_path / "b.txt").write_bytes(good)
    index = make_shards(both, out)
    assert sum(path.stat().st_mtime_ns == when for path, when in kept.items()) >= 3
    make_shards(both, tmp_path / "fresh")
    assert contents(out) == contents(tmp_path / "fresh")
    with pytest.raises(DataError, match="begun with other inputs, shard_bytes, tokenizer; undo"):
        make_shards(both, out, shard_bytes=100, tokenizer=small_tokenizer(280))
    (tmp_path / "b.txt").write_bytes(good + b"more\n")
    with pytest.raises(DataError, match="begun with other inputs; undo the change or choose"):
        make_shards(both, out)
    assert read_index(out) == index


def test_an_unfinished_directory_belongs_to_its_job(tmp_path: Path) -> None:
    data = write_lines(tmp_path / "t.txt", ["the cat"])
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.md").write_text("mine")
    with pytest.raises(DataError, match="is not empty and holds no token shards"):
        make_shards(data, out)
    (out / "notes.md").unlink()
    (out / ".job.json.partial").write_text("{")
    make_shards(data, out)
    assert ".job.json.partial" not in contents(out)
    (out / "index.json").rename(out / "job.json")
    (out / "job.json").write_text('{"task": "sft"}')
    with pytest.raises(DataError, match="begun with other data, shard_bytes, task, tokenizer"):
        make_shards(data, out)
    (out / "job.json").write_text("{")
    with pytest.raises(DataError, match=r"job\.json is damaged"):
        make_shards(data, out)


def test_two_jobs_do_not_share_a_directory(tmp_path: Path) -> None:
    import fcntl

    data = write_lines(tmp_path / "t.txt", ["the cat"])
    (tmp_path / "out").mkdir()
    descriptor = os.open(tmp_path / "out", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(DataError, match="is being written by another process"):
        make_shards(data, tmp_path / "out")
    os.close(descriptor)
    make_shards(data, tmp_path / "out")
    assert read_index(tmp_path / "out").total("documents") == 1


def test_bad_rows_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    data = JsonlData(paths=(str(path),))
    path.write_text('{"text": "the cat"}\n{"text": "\\ud800"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl, row 2: text is not valid Unicode"):
        make_shards(data, tmp_path / "one")
    path.write_text('{"text": "the cat"}\n' * 400 + "{\n")
    with pytest.raises(DataError, match=r"a\.jsonl, from byte \d+ on, row \d+: not valid JSON"):
        make_shards(data, tmp_path / "two")
    path.write_text('{"text": ""}\n')
    with pytest.raises(DataError, match="holds no document"):
        make_shards(data, tmp_path / "three")
    with pytest.raises(DataError, match="task sft needs conversations"):
        make_shards(data, tmp_path / "four", "sft")


def test_real_text_and_tokenizer(datasets_dir: Path, real_gguf: Path, tmp_path: Path) -> None:
    """Shards of C4 under the genuine vocabulary equal transformers-style encoding in memory."""
    from qwen2kit.weights.checkpoint import open_checkpoint

    tokenizers = pytest.importorskip("tokenizers")
    source = datasets_dir / "training/llamafactory-demo/c4_demo.jsonl"
    tokenizer = open_checkpoint(real_gguf).tokenizer()
    data = JsonlData(paths=(str(source),))
    index = make_shards(data, tmp_path / "s", workers=2, shard_bytes=150_000, tokenizer=tokenizer)
    assert index.dtype == "uint32"
    plain = tokenizers.Tokenizer.from_file(str(tmp_path / "s/tokenizer/tokenizer.json"))
    expected = [
        [*plain.encode(json.loads(line)["text"], add_special_tokens=False).ids, tokenizer.eot_id]
        for line in source.read_text(encoding="utf-8").splitlines()
    ]
    import numpy as np

    found = []
    for shard in index.shards:
        tokens = np.memmap(tmp_path / "s" / f"{shard.name}.tokens", dtype="<u4", mode="r")
        offsets = np.memmap(tmp_path / "s" / f"{shard.name}.offsets", dtype="<i8", mode="r")
        found += [part.tolist() for part in np.split(np.asarray(tokens), offsets[1:-1])]
    assert found == expected


def test_stream_and_shuffle_rows_are_no_part_of_the_job(tmp_path: Path) -> None:
    data = write_lines(tmp_path / "t.txt", sentences(20))
    index = make_shards(data, tmp_path / "s")
    streamed = TextData(paths=data.paths, split="line", stream=True, shuffle_rows=3)
    assert make_shards(streamed, tmp_path / "s") == index
    table = opener().table(shards_of(tmp_path / "s"))
    assert len(rows_of(table.rows(0, range(2)))) == 2
