"""The shipped batch script on a real SLURM: two nodes, requeued, warned, killed, failing."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.parallel.runs import TINY, checkpoints, losses, run, same, tiny
from tests.run_cli import OFFLINE, run_cli
from tests.slurm.cluster import NODES, Cluster, missing

pytest.importorskip("torch")
pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(bool(missing()), reason=f"SLURM is not installed: no {missing()[:3]}"),
]

STEPS = 60
PATIENCE = 240
SLOW = ("train.steps=100000", "checkpoint.every=20")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    yield cluster
    cluster.close()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """Losses of the same run on two processes without SLURM."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    run(tiny(f"train.steps={STEPS}", "checkpoint.every=0"), run_dir, 2)
    return losses(run_dir)


def script(run_dir: Path, *changes: str, per_node: int = 1) -> str:
    """What ``qwen2kit launch slurm`` prints for two nodes without GPUs."""
    done = run_cli(
        "launch", "slurm", "tiny", *TINY, *changes, "--run-dir", run_dir, "--nodes", "2",
        "--processes-per-node", str(per_node), "--cpus-per-process", "1", "--time", "0:30:00",
        *(f"--setup=export {name}={value}" for name, value in OFFLINE.items()),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def wait_for_steps(run_dir: Path, steps: int) -> None:
    deadline = time.monotonic() + PATIENCE
    while len(losses(run_dir)) < steps:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def pids(run_dir: Path) -> list[int]:
    """The training processes of a run."""
    ps = ["ps", "-ww", "-eo", "pid=,args="]
    lines = subprocess.run(ps, capture_output=True, text=True, check=True).stdout.splitlines()
    mine = [line.split() for line in lines if str(run_dir) in line]
    return [int(words[0]) for words in mine if words[2:4] == ["-m", "qwen2kit"]]


def test_a_requeued_job_goes_on_where_it_was(
    cluster: Cluster, whole: dict[int, float], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    job = cluster.submit(script(run_dir, f"train.steps={STEPS}", "checkpoint.every=3"))
    wait_for_steps(run_dir, 8)
    cluster.run("scontrol", "requeue", job)
    cluster.wait_for(job, "PENDING", "REQUEUED", "REQUEUE_FED")
    done = cluster.wait_for(job, "COMPLETED", "FAILED")
    assert (done["JobState"], done["Restarts"]) == ("COMPLETED", "1"), cluster.log()
    assert done["NodeList"] == "127.0.0.[1-2]"
    same(losses(run_dir), whole, range(1, STEPS + 1))
    assert (run_dir / "model" / "model.safetensors").is_file()


def test_a_warning_saves_and_the_script_requeues_itself(cluster: Cluster, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    job = cluster.submit(script(run_dir, *SLOW))
    wait_for_steps(run_dir, 5)
    assert checkpoints(run_dir) == []
    cluster.run("scancel", "--signal=USR1", job)  # what --signal=USR1@seconds sends
    deadline = time.monotonic() + PATIENCE
    while not checkpoints(run_dir):
        assert time.monotonic() < deadline, cluster.log()
        time.sleep(0.1)
    saved = checkpoints(run_dir)[0]
    assert saved < 20
    wait_for_steps(run_dir, saved + 2)
    assert cluster.job(job)["Restarts"] == "1"
    assert f"stopped by SIGUSR1 after step {saved}" in cluster.log()
    assert f"resuming after step {saved} of 100000" in cluster.log()
    cluster.run("scancel", job)
    cluster.wait_for(job, "CANCELLED")


def test_a_killed_process_requeues_the_job(cluster: Cluster, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    job = cluster.submit(script(run_dir, *SLOW, per_node=2))
    wait_for_steps(run_dir, 25)
    processes = pids(run_dir)
    assert len(processes) == 2 * len(NODES)
    os.kill(processes[-1], signal.SIGKILL)
    deadline = time.monotonic() + PATIENCE
    while cluster.job(job)["Restarts"] != "1":
        assert time.monotonic() < deadline, cluster.log()
        time.sleep(0.2)
    reached = max(losses(run_dir))
    assert checkpoints(run_dir)[-1] >= reached // 20 * 20 - 20
    wait_for_steps(run_dir, reached + 2)
    cluster.run("scancel", job)
    cluster.wait_for(job, "CANCELLED")


def test_an_error_that_would_come_again_is_said_once_and_not_requeued(
    cluster: Cluster, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    changes = ("task=pretrain", "data.kind=text", "data.paths=['nothing/*.txt']")
    job = cluster.submit(script(run_dir, *changes, "train.steps=5"))
    done = cluster.wait_for(job, "COMPLETED", "FAILED")
    assert (done["JobState"], done["Restarts"]) == ("FAILED", "0")
    log = (cluster.folder / f"tiny-{job}.log").read_text()
    assert done["ExitCode"] == "5:0", log
    assert len([line for line in log.splitlines() if line.startswith("error: ")]) == 1
    assert "Traceback" not in log
