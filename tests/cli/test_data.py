"""``qwen2kit data``: tokenise, verify, show, train on the result; every refusal is one line."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from qwen2kit.tokenizer.bpe import Tokenizer
from qwen2kit.tokenizer.train_bbpe import train_bbpe
from tests.run_cli import OFFLINE, run_cli, run_json

RECIPE = """
name = "r"
task = "pretrain"
seq_len = 32
dtype = "float32"
cpu_threads = 1
[model]
preset = "tiny"
tokenizer = "tok"
vocab_size = 300
[data]
kind = "text"
paths = ["text.txt"]
split = "line"
[train]
steps = 4
batch_rows = 4
micro_batch_rows = 4
lr = 1e-3
[checkpoint]
every = 2
[logging]
plot = false
"""
LINES = [f"{i} the cat sat on the mat and number {i * i} is the answer" for i in range(2_000)]
SIZE = ("--shard-size", "20KB")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with recipe, tokenizer, text, conversations and their shards."""
    root = tmp_path_factory.mktemp("place")
    train_bbpe([*LINES[:300], "system\nYou are a helpful assistant."], 300).save(root / "tok")
    (root / "r.toml").write_text(RECIPE)
    (root / "text.txt").write_text("\n".join(LINES) + "\n")
    chats = [{"prompt": line, "response": f"is {len(line)}"} for line in LINES[:40]]
    (root / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    done = run_cli("data", "tokenize", "r.toml", "--out", "shards", *SIZE, cwd=root)
    assert done.returncode == 0, done.stderr
    assert "2,000" in done.stderr
    return root


CHATS = (
    "task=sft", "seq_len=128", "data.kind=jsonl", 'data.paths=["chats.jsonl"]',
    'data.format={kind="prompt_response"}',
)  # fmt: skip
SHARDS = ("data.kind=shards", 'data.paths=["shards"]')


def test_tokenize_info_and_verify_agree(place: Path) -> None:
    again = run_json(
        "data", "tokenize", "r.toml", "--out", "shards", "--workers", "2", *SIZE, cwd=place
    )
    info = run_json("data", "info", "shards", cwd=place)
    verified = run_json("data", "verify", "shards", "--threads", "2", cwd=place)
    assert again == info
    assert verified == info | {"damaged": []}
    tokenizer = Tokenizer.from_dir(place / "tok")
    expected = sum(len(tokenizer.encode(line)) + 1 for line in LINES)
    assert (info["tokens"], info["documents"], info["dtype"]) == (expected, 2_000, "uint16")
    assert info["shards"] == -(-(place / "text.txt").stat().st_size // 20_000)
    assert info["made_from"]["data"]["paths"] == ["text.txt"]


def test_verify_names_the_damaged_shard(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "damaged"
    run_cli("data", "tokenize", "r.toml", "--out", out, *SIZE, cwd=place)
    for name in ("00002.tokens", "00001.offsets"):
        data = bytearray((out / name).read_bytes())
        data[40] ^= 1
        (out / name).write_bytes(data)
    done = run_cli("data", "verify", out, "--json")
    assert done.returncode == 5
    assert [d["file"] for d in json.loads(done.stdout)["damaged"]] == [
        "00001.offsets", "00002.tokens",
    ]  # fmt: skip
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "00001.offsets has another SHA-256" in errors[0]
    assert "(and 1 more)" in errors[0]
    assert "00002.tokens" in done.stderr


def test_show_tells_what_carries_loss(place: Path) -> None:
    shown = run_json("data", "show", "r.toml", *CHATS, "--count", "2", cwd=place)
    assert [example["place"] for example in shown] == ["chats.jsonl, row 1", "chats.jsonl, row 2"]
    tokenizer = Tokenizer.from_dir(place / "tok")
    for example, line in zip(shown, LINES, strict=False):
        pairs = zip(example["tokens"], example["supervised"], strict=True)
        chosen = [token for token, supervised in pairs if supervised]
        assert tokenizer.decode(chosen) == f"is {len(line)}<|im_end|>"
        assert f"<|im_start|>user\n{line}<|im_end|>" in example["text"]
    done = run_cli(
        "data", "show", "r.toml", *CHATS, "--count", "1", "--max-tokens", "5",
        cwd=place, env={"FORCE_COLOR": "1", "NO_COLOR": "", "TERM": "xterm-256color"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "more tokens" in done.stderr


@pytest.mark.parametrize(
    ("changes", "places"),
    [
        ((), ["text.txt, row 1"]),
        (SHARDS, ["shards/00000, document 0"]),
        (("data.stream=true",), ["text.txt, row 1"]),
        (
            (
                "data.kind=mixture",
                'data.sources=[{weight=1.0,data={kind="shards",paths=["shards"]}},'
                '{weight=2.0,data={kind="text",paths=["text.txt"]}}]',
            ),
            ["shards/00000, document 0", "text.txt, row 1"],
        ),
    ],
    ids=["text", "shards", "stream", "mixture"],
)
def test_show_takes_any_data(changes: tuple[str, ...], places: list[str], place: Path) -> None:
    shown = run_json("data", "show", "r.toml", *changes, "--count", "1", cwd=place)
    assert [example["place"] for example in shown] == places
    tokenizer = Tokenizer.from_dir(place / "tok")
    whole = tokenizer.encode("\n".join(LINES) + "\n")
    line = [*tokenizer.encode(LINES[0]), tokenizer.eot_id]
    for example in shown:
        text_file = changes and "mixture" in changes[0] and example["place"].startswith("text")
        assert example["tokens"] == ([*whole, tokenizer.eot_id] if text_file else line)
        assert all(example["supervised"])


def losses(run: Path) -> list[float]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if record["event"] == "step"]


@pytest.mark.parametrize(
    "changes",
    [
        (*SHARDS, "eval.fraction=0.05"),
        ("data.stream=true", "data.shuffle_rows=10"),
        (
            "data.kind=mixture",
            'data.sources=[{weight=1.0,data={kind="shards",paths=["shards"]}},'
            '{weight=2.0,data={kind="text",paths=["text.txt"],split="line",stream=true}}]',
            'eval.data={kind="shards",paths=["shards"]}',
        ),
        (*CHATS[:2], "data.kind=shards", 'data.paths=["chat-shards"]'),
    ],
    ids=["shards", "stream", "mixture", "chat shards"],
)
def test_training_resumes_exactly_on_any_data(
    changes: tuple[str, ...], place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch")
    from qwen2kit.config.load import load_recipe
    from qwen2kit.train import run

    monkeypatch.chdir(place)
    if "chat-shards" in changes[-1]:
        assert run_cli("data", "tokenize", "r.toml", *CHATS, "--out", "chat-shards").returncode == 0
    config = load_recipe("r.toml", changes)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert run.start(config, run_dir=whole).status == "finished"
    run.start(config, run_dir=cut)
    shutil.rmtree(cut / "checkpoints/step-00000004")
    state = json.loads((cut / "run.json").read_text()) | {"status": "stopped"}
    (cut / "run.json").write_text(json.dumps(state))
    assert run.resume(cut).status == "finished"
    assert losses(cut) == losses(whole)
    assert len(set(losses(whole))) == 4
    threads = [thread.name for thread in threading.enumerate()]
    assert not [name for name in threads if "_work" in name], "loaders were closed"


def test_training_refuses_shards_of_another_tokenizer(place: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    train_bbpe(["a quite different text with other words"] * 9, 280).save(tmp_path / "other")
    done = run_cli(
        "train", "r.toml", *SHARDS, f"model.tokenizer={tmp_path / 'other'}",
        "--run-dir", tmp_path / "run", cwd=place,
    )  # fmt: skip
    assert_one_line(done, "shards was made with another tokenizer than the model's", 5)


def assert_one_line(done: subprocess.CompletedProcess[str], says: str, code: int) -> None:
    """One error line, the last one, that holds ``says``; nothing on stdout."""
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    assert "Traceback" not in done.stderr
    assert len(errors) == 1, done.stderr
    assert lines[-1] == errors[0], done.stderr
    assert says in errors[0]
    assert (done.returncode, done.stdout) == (code, "")


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (["tokenize", "r.toml"], 2, "--out"),
        (["tokenize", "absent", "--out", "o"], 2, "no recipe 'absent'"),
        (["tokenize", "r.toml", "--out", "o", "--workers", "0"], 2, "--workers must be at least"),
        (["tokenize", "r.toml", "--out", "o", "--shard-size", "big"], 2, "--shard-size must look"),
        (["tokenize", "r.toml", 'data.paths=["no*"]', "--out", "o"], 5, "no file matches 'no*'"),
        (["tokenize", "r.toml", "model.tokenizer=absent", "--out", "o"], 3, "absent"),
        (["tokenize", "r.toml", *SHARDS, "--out", "o"], 2, "data.kind = shards has no files"),
        (["tokenize", "tiny", "--out", "o"], 2, "data.kind = embedded has no files"),
        (["tokenize", "r.toml", "--out", "shards"], 5, "begun with other inputs, shard_bytes"),
        (["tokenize", "r.toml", "--out", "tok"], 5, "tok is not empty and holds no token shards"),
        (["tokenize", "r.toml", "--out", "text.txt/o"], 10, "text.txt/o"),
        (["verify", "tok"], 5, "tok holds no token shards"),
        (["verify", "absent"], 5, "absent holds no token shards"),
        (["info", "tok"], 5, "tok holds no token shards"),
        (["show", "r.toml", "--count", "0"], 2, "--count"),
        (["show", "r.toml", "task=sft"], 2, "task sft needs conversations"),
        (["show", "r.toml", *CHATS, *SHARDS], 5, "tokenised for task pretrain"),
        (["frobnicate"], 2, "frobnicate"),
        ([], 2, "Missing command"),
    ],
)
def test_mistakes_get_one_line(args: list[str], code: int, says: str, place: Path) -> None:
    before = {path.name for path in place.iterdir()}
    done = run_cli("data", *args, cwd=place)
    assert_one_line(done, says, code)
    for made in {path.name for path in place.iterdir()} - before:
        assert made == "o"
        assert list((place / made).iterdir()) == [], "nothing was begun"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (("data.stream=true", "task=sft", *CHATS[2:]), "data.stream is for task pretrain"),
        (("data.stream=true", "train.epochs=1"), "set train.steps, not train.epochs"),
        (("data.stream=true", "eval.fraction=0.1"), "set eval.data, not eval.fraction"),
        (("data.shuffle_rows=0",), "shuffle_rows must be at least 1"),
        (("data.kind=shards", "data.paths=[]"), "paths must name at least one directory"),
        (("data.kind=mixture", "data.sources=[]"), "sources must hold at least one"),
        (
            ("data.kind=mixture", 'data.sources=[{weight=-1,data={kind="embedded"}}]'),
            "weight must be positive",
        ),
        (
            ("data.kind=mixture", 'data.sources=[{weight=1,data={kind="mixture",sources=[]}}]'),
            "kind must be one of embedded, text, jsonl, parquet, shards",
        ),
        (('eval.data={kind="text",paths=["t"],stream=true}',), "no mixture, no stream"),
    ],
)
def test_recipes_that_cannot_be_fed_are_refused(
    changes: tuple[str, ...], says: str, place: Path
) -> None:
    if "task=sft" in changes:
        changes = (*changes[1:], "data.stream=true")
    assert_one_line(run_cli("data", "show", "r.toml", *changes, cwd=place), says, 2)


_LIMITED = """
import resource, sys
from qwen2kit.cli.app import main
if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv.pop(1)),) * 2)
    main()
"""


def files(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*.*")}


def test_a_full_disk_loses_nothing(place: Path, tmp_path: Path) -> None:
    script, out = tmp_path / "limited.py", tmp_path / "out"
    script.write_text(_LIMITED)
    arguments = ["data", "tokenize", "r.toml", "--out", str(out), "--workers", "1"]

    def limited(limit: int, size: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, script, str(limit), *arguments, "--shard-size", size],
            capture_output=True, text=True, cwd=place, env={**os.environ, **OFFLINE}, check=False,
        )  # fmt: skip

    # Shards grow in input order: later lines have more digits, so a limit stops a later one.
    whole = tmp_path / "whole"
    run_cli("data", "tokenize", "r.toml", "--out", whole, *SIZE, cwd=place)
    sizes = sorted(path.stat().st_size for path in whole.glob("*.tokens"))
    assert sizes[0] < sizes[-1]
    assert max(path.stat().st_size for path in (whole / "tokenizer").iterdir()) < sizes[-1] - 1
    done = limited(sizes[-1] - 1, "20KB")
    assert_one_line(done, f"File too large in {out}; finished shards are kept", 5)
    kept = len(list(out.glob("[0-9]*.json")))
    assert 0 < kept < len(sizes)
    assert not [name for name in files(out) if "partial" in name]
    done = run_cli(*arguments, *SIZE, cwd=place)
    assert done.returncode == 0, done.stderr
    assert files(out) == files(whole)


def test_ctrl_c_stops_at_once_and_loses_nothing(place: Path, tmp_path: Path) -> None:
    for times in (40, 160, 640):  # more where it was over before this process looked
        if _interrupted(place, tmp_path / str(times), times):
            return
    raise AssertionError("it was always over before")


def _interrupted(place: Path, tmp_path: Path, times: int) -> bool:
    """Ctrl-C while the text, ``times`` over, is tokenised; False if it came too late."""
    tmp_path.mkdir()
    (tmp_path / "big.txt").write_text("\n".join(LINES * times))
    out = tmp_path / "out"
    command: list[Any] = [
        sys.executable, "-m", "qwen2kit", "data", "tokenize", "r.toml", "--out", out,
        f'data.paths=["{tmp_path / "big.txt"}"]', "--shard-size", "100KB", "--workers", "2",
    ]  # fmt: skip
    process = subprocess.Popen(
        command, cwd=place, env={**os.environ, **OFFLINE}, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    while not list(out.glob("[0-9]*.json")) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=300)
    if (out / "index.json").exists():
        return False
    assert process.returncode == 130, errors
    assert errors.rstrip().splitlines()[-1] == "error: interrupted"
    assert "Traceback" not in errors
    assert not (out / "index.json").exists()
    assert not [name for name in files(out) if "partial" in name]
    unfinished = run_cli("data", "info", out)
    assert_one_line(unfinished, "is unfinished; run the same `qwen2kit data tokenize` again", 5)
    done = run_cli(*command[3:], cwd=place)
    assert done.returncode == 0, done.stderr
    assert run_json("data", "verify", out)["documents"] == 2_000 * times
    return True
