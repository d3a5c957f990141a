"""SIGKILL in the middle of ``qwen2kit eval --nproc 2``: nothing is lost, nothing scored twice."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.eval_tasks import WORDS, write_tasks
from tests.run_cli import OFFLINE, run_cli
from tests.tiny_checkpoint import write_tiny_checkpoint

pytest.importorskip("lm_eval")
pytest.importorskip("torch")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes in /proc"),
]

QUESTIONS = 400
LOGS = ("requests.jsonl", "requests-1.jsonl")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("killed")
    write_tiny_checkpoint(home / "model")
    data = [
        {"text": f"{WORDS[i % 13]} {i} {WORDS[i % 7]} {i * i}", "gold": i % 4, "kind": "many"}
        for i in range(QUESTIONS)
    ]
    write_tasks(home / "tasks", tiny_choice={"data": data})
    return home


@pytest.fixture(scope="module")
def undisturbed(home: Path) -> dict[str, Any]:
    return document(home, "whole")


def arguments(home: Path, output: str) -> list[str]:
    return [
        "eval", str(home / "model"), "--tasks", "tiny_choice", "--backend", "torch",
        "--device", "cpu", "--include-path", str(home / "tasks"), "--output", output, "--json",
    ]  # fmt: skip


def keys(home: Path, run: str) -> list[str]:
    return [
        json.loads(line)["key"]
        for name in LOGS
        if (home / run / name).exists()
        for line in (home / run / name).read_bytes().splitlines(keepends=True)
        if line.endswith(b"\n")
    ]


def rank_of(process: Path) -> str | None:
    try:
        environment = (process / "environ").read_bytes().split(b"\0")
        inside = process.joinpath("cwd").readlink()
    except OSError:
        return None
    ranks = [entry for entry in environment if entry.startswith(b"RANK=")]
    return f"{ranks[0].decode()} {inside}" if ranks else None


def processes_of_rank(rank: int, home: Path) -> list[int]:
    found = (path for path in Path("/proc").iterdir() if path.name.isdigit())
    return [int(path.name) for path in found if rank_of(path) == f"RANK={rank} {home}"]


def interrupted(home: Path, run: str, kill: Callable[[int], None]) -> tuple[int, str]:
    """Begin a run or go on with it, ``kill(pid)`` once both processes have more answers; its code
    and error output. Nothing that was answered before is lost or answered again.

    Again from the start where it was over before this process got to look.
    """
    for _ in range(9):
        before = keys(home, run)
        code, errors = begun_and_killed(home, run, kill)
        if not (home / run / "results.json").exists():
            now = keys(home, run)
            assert len(set(now)) == len(now) < 4 * QUESTIONS
            assert set(now) > set(before)
            assert "Traceback" not in errors
            return code, errors
        shutil.rmtree(home / run)
    raise AssertionError("it was always over before")


def begun_and_killed(home: Path, run: str, kill: Callable[[int], None]) -> tuple[int, str]:
    logs = [home / run / name for name in LOGS]
    before = [size_of(log) for log in logs]
    child = subprocess.Popen(
        [sys.executable, "-m", "qwen2kit", *arguments(home, run), "--nproc", "2"],
        cwd=home,
        env={**os.environ, **OFFLINE, "HF_DATASETS_CACHE": str(home / "cache")},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while child.poll() is None:
        if all(size_of(log) > size + 500 for log, size in zip(logs, before, strict=True)):
            break
        time.sleep(0.002)
    with contextlib.suppress(ProcessLookupError, FileNotFoundError):  # over meanwhile
        kill(child.pid)
    _, errors = child.communicate(timeout=600)
    return child.returncode, errors


def size_of(log: Path) -> int:
    return log.stat().st_size if log.exists() else 0


def test_a_team_goes_on_however_it_was_killed(home: Path, undisturbed: dict[str, Any]) -> None:
    """All of it, the command, what it started, one of those that answer: in turn, of one run."""

    def kill_everything(pid: int) -> None:
        workers = processes_of_rank(0, home) + processes_of_rank(1, home)
        for victim in (*workers, pid):
            os.kill(victim, signal.SIGKILL)

    def kill_launcher(pid: int) -> None:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        assert len(children) <= 1
        for launcher in children:
            os.kill(int(launcher), signal.SIGKILL)

    def kill_one(pid: int) -> None:
        for worker in processes_of_rank(1, home):
            os.kill(worker, signal.SIGKILL)

    code, _ = interrupted(home, "run", kill_everything)
    assert code == -signal.SIGKILL
    ended(home)

    code, _ = interrupted(home, "run", lambda pid: os.kill(pid, signal.SIGKILL))
    assert code == -signal.SIGKILL
    ended(home)

    code, errors = interrupted(home, "run", kill_launcher)
    assert code > 0
    assert errors.splitlines()[-1].startswith("error: a process was killed")
    ended(home)

    code, errors = interrupted(home, "run", kill_one)
    assert code > 0
    lines = [line for line in errors.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, errors
    assert not processes_of_rank(0, home)

    before = len(keys(home, "run"))
    finished = document(home, "run", "--nproc", "2")
    after = keys(home, "run")
    assert len(after) == len(set(after)) == 4 * QUESTIONS
    asked = finished["provenance"]["evaluation"]["requests"]
    assert asked == {"answered": 4 * QUESTIONS - before, "from_log": before}
    assert finished["results"] == undisturbed["results"]


def ended(home: Path) -> None:
    """Wait until no process of a team is left."""
    deadline = time.monotonic() + 300
    while processes_of_rank(0, home) or processes_of_rank(1, home):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def document(home: Path, run: str, *options: str) -> dict[str, Any]:
    cache = {"HF_DATASETS_CACHE": str(home / "cache")}
    done = run_cli(*arguments(home, run), *options, cwd=home, env=cache)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found
