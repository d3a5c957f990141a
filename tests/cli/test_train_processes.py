"""``qwen2kit train --nproc`` and ``--auto-resume`` as a user or a scheduler types them."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cli.test_train import refusal, train
from tests.parallel.runs import TINY, checkpoints, losses, same
from tests.run_cli import OFFLINE

pytest.importorskip("torch")

ENV = {**os.environ, **OFFLINE}
STEPS = 120


def begin(run_dir: Path, *arguments: str) -> subprocess.Popen[str]:
    """Start it, or go on with it, and wait until it has done ten steps more."""
    before = len(losses(run_dir))
    process = subprocess.Popen(
        [sys.executable, "-m", "qwen2kit", "train", *arguments],
        stderr=subprocess.PIPE, text=True, env=ENV,
    )  # fmt: skip
    while len(losses(run_dir)) < before + 10 and process.poll() is None:
        time.sleep(0.02)
    return process


def fresh(run_dir: Path, *options: str) -> list[str]:
    return ["tiny", *TINY, "--run-dir", str(run_dir), *options]


def halted(run_dir: Path, *arguments: str) -> tuple[subprocess.Popen[str], list[int]]:
    """A run of two processes that goes on for ten steps, these then stopped; it and they.

    Again from where it was if it was over before this process got to look.
    """
    before = run_dir.with_name("before")
    shutil.rmtree(before, ignore_errors=True)
    if run_dir.exists():
        shutil.copytree(run_dir, before)
    for _ in range(9):
        process = begin(run_dir, *arguments, "--nproc", "2")
        found = workers(run_dir)
        with contextlib.suppress(ProcessLookupError):
            for worker in found:
                os.kill(worker, signal.SIGSTOP)
            if len(found) == 2 and len(losses(run_dir)) < STEPS:
                return process, found
        for worker in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker, signal.SIGCONT)
        process.communicate(timeout=600)
        shutil.rmtree(run_dir)
        if before.exists():
            shutil.copytree(before, run_dir)
    raise AssertionError("it was always over before")


def workers(run_dir: Path) -> list[int]:
    """Process ids of the training processes of a run, which are nobody's launcher."""
    ps = ["ps", "-ww", "-eo", "pid=,args="]
    listing = subprocess.run(ps, capture_output=True, text=True, check=True).stdout
    return [
        int(line.split()[0])
        for line in listing.splitlines()
        if str(run_dir) in line and "-m qwen2kit train" in line
        and "--nproc" not in line and ".parallel.launch" not in line
    ]  # fmt: skip


def parent_of(process: int) -> int:
    ps = ["ps", "-o", "ppid=", "-p", str(process)]
    return int(subprocess.run(ps, capture_output=True, text=True, check=True).stdout)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """The losses of an undisturbed run on two processes."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    done = train(*fresh(run_dir, f"train.steps={STEPS}", "--nproc", "2", "--json"))
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["status"], result["step"]) == ("finished", STEPS)
    assert (run_dir / "model" / "model.safetensors").is_file()
    assert done.stderr.count(f"{STEPS} steps, ") == 1
    return losses(run_dir)


def test_a_run_goes_on_whichever_of_its_processes_is_lost(
    whole: dict[int, float], tmp_path: Path
) -> None:
    """A signal to the command, then the command, what it started and one that trains killed: in
    turn, of one run."""
    run_dir = tmp_path / "run"
    arguments = fresh(run_dir, f"train.steps={STEPS}", "checkpoint.every=0", "--auto-resume")

    process, team = halted(run_dir, *arguments)
    process.send_signal(signal.SIGUSR1)
    resumed(team)
    _, stderr = process.communicate(timeout=600)
    assert process.returncode == 128 + signal.SIGUSR1, stderr
    assert stderr.count("stopped by SIGUSR1 after step") == 1
    assert workers(run_dir) == []
    assert checkpoints(run_dir) == [len(losses(run_dir))]

    for victim in ("command", "launcher"):
        before = checkpoints(run_dir)
        process, team = halted(run_dir, *arguments)
        launcher = parent_of(team[0])
        assert parent_of(launcher) == process.pid
        os.kill(process.pid if victim == "command" else launcher, signal.SIGKILL)
        resumed(team)
        process.communicate(timeout=600)
        deadline = time.monotonic() + 600
        while workers(run_dir):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        (saved,) = set(checkpoints(run_dir)) - set(before)
        assert saved == len(losses(run_dir))

    process, (survivor, lost) = halted(
        run_dir, "checkpoint.every=4", "--resume", str(run_dir), "--max-restarts", "1"
    )
    os.kill(lost, signal.SIGKILL)
    resumed([survivor])
    _, stderr = process.communicate(timeout=600)
    assert process.returncode == 0, stderr
    assert stderr.count("resuming after step") == 2
    assert stderr.count(f"resuming after step {saved}") == 1
    assert "Traceback" not in stderr
    same(losses(run_dir), whole, range(1, STEPS + 1))


def resumed(team: list[int]) -> None:
    for worker in team:
        os.kill(worker, signal.SIGCONT)


def test_a_lost_process_without_restarts_is_one_line(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    process = begin(
        run_dir, *fresh(run_dir, "train.steps=100000", "checkpoint.every=4", "--nproc", "2")
    )
    os.kill(workers(run_dir)[0], signal.SIGKILL)
    _, stderr = process.communicate(timeout=600)
    assert process.returncode == 6, stderr
    errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "a process was killed" in errors[0]
    assert "Traceback" not in stderr


def test_an_error_on_all_is_said_once(tmp_path: Path) -> None:
    done = train(
        "tiny", *TINY, "train.lr=1e30", "train.schedule.kind=constant", "train.steps=30",
        "train.optimizer.max_grad_norm=0.0", "--run-dir", tmp_path / "run", "--nproc", "2",
    )  # fmt: skip
    assert done.returncode == 6, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "loss is nan" in errors[0]
    assert "Traceback" not in done.stderr
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"


def test_auto_resume_starts_continues_and_leaves_alone(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    args = ("tiny", *TINY, "train.steps=6", "--run-dir", run_dir, "--auto-resume", "--json")
    process = begin(
        run_dir, *fresh(run_dir, "train.steps=100000", "checkpoint.every=2", "--auto-resume")
    )
    process.kill()
    process.communicate()
    assert "differs from that of" in refusal(*args[:-1])
    done = train("--resume", run_dir, "train.steps=100", "--allow-changes")
    assert done.returncode == 0, done.stderr
    again = ("tiny", *TINY, "train.steps=100", "checkpoint.every=2", *args[-4:])
    before = (run_dir / "run.json").read_bytes()
    done = train(*again)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["status"] == "finished"
    assert (run_dir / "run.json").read_bytes() == before
    # A start that got no further than its own folder counts as no start.
    half = tmp_path / "half"
    (half / "start").mkdir(parents=True)
    done = train(*args[:-4], "--run-dir", half, "--auto-resume")
    assert done.returncode == 0, done.stderr
    assert len(losses(half)) == 6


def test_refusals(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    cases = {
        "--auto-resume needs --run-dir": ("tiny", "--auto-resume"),
        "is not a run directory": (
            "tiny", *TINY, "--auto-resume", "--run-dir", tmp_path / "other",
        ),
        "--max-restarts needs --nproc": ("tiny", "--max-restarts", "2"),
        "2 processes cannot be divided by tp=3 = 3": (
            "tiny", *TINY, "parallel.tp=3", "--nproc", "2",
        ),
        "is not empty": ("tiny", *TINY, "--nproc", "2", "--run-dir", tmp_path / "other"),
    }  # fmt: skip
    for message, args in cases.items():
        assert message in refusal(*args)


def test_a_full_disk_stops_with_one_line_and_keeps_what_is_there(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    done = train("tiny", *TINY, "train.steps=4", "checkpoint.every=2", "--run-dir", run_dir)
    assert done.returncode == 0, done.stderr
    size = max(f.stat().st_size for f in (run_dir / "checkpoints").rglob("*.safetensors"))

    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2))

    done = subprocess.run(
        [sys.executable, "-m", "qwen2kit", "train", "--resume", run_dir, "train.steps=9",
         "--allow-changes"],
        preexec_fn=small_files, capture_output=True, text=True, env=ENV, check=False,
    )  # fmt: skip
    assert done.returncode == 6, done.stderr
    last = done.stderr.splitlines()[-1]
    assert "cannot save step 6 in" in last
    assert "no space left on the disk; step-00000004 is intact" in last
    assert "Traceback" not in done.stderr
    assert checkpoints(run_dir) == [2, 4]
    assert not list((run_dir / "checkpoints").glob(".*"))
