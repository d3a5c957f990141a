"""Whole runs on one or several processes that a test may kill: forked with torch loaded once."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qwen2kit.config.load import load_recipe
from qwen2kit.config.tree import RunConfig
from tests.parallel.workers import LOADED

PATIENCE = 600.0  # for what hangs, however busy the machine is

TINY = (
    "model.hidden_size=32", "model.intermediate_size=48", "model.num_hidden_layers=2",
    "model.num_attention_heads=2", "model.num_key_value_heads=1", "model.vocab_size=320",
    "seq_len=64", "data.questions=300", "data.held_out=20", "train.batch_rows=4",
    "train.micro_batch_rows=1", "eval.questions=0", "eval.max_rows=4", "logging.plot=false",
    "checkpoint.initial=false",
)  # fmt: skip


def tiny(*changes: str) -> RunConfig:
    """The tiny recipe at its smallest."""
    return load_recipe("tiny", [*TINY, *changes])


class Team:
    """The processes of one call of a run.

    Args:
        run_dir: where it starts or goes on.
        log: gets what the processes say on stderr.
    """

    def __init__(self, config: RunConfig, run_dir: Path, world: int = 1) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(LOADED)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.run_dir = run_dir
        self.log = run_dir.with_suffix(".log")
        self.children = [
            context.Process(target=_work, args=(config, run_dir, rank, world, port, self.log))
            for rank in range(world)
        ]
        for child in self.children:
            child.start()

    def kill(self, rank: int = 0) -> None:
        """SIGKILL, at once."""
        self.children[rank].kill()

    def stop(self, rank: int = 0) -> None:
        """SIGTERM."""
        self.children[rank].terminate()

    def alive(self) -> bool:
        return any(child.is_alive() for child in self.children)

    def wait(self) -> list[int]:
        """Exit codes by rank; fails if a process hangs."""
        deadline = time.monotonic() + PATIENCE
        for child in self.children:
            child.join(max(0.0, deadline - time.monotonic()))
        hanging = [rank for rank, child in enumerate(self.children) if child.is_alive()]
        for child in self.children:
            child.kill()
            child.join()
        assert not hanging, f"processes {hanging} hang; {self.said()}"
        return [child.exitcode or 0 for child in self.children]

    def wait_for(self, steps: int) -> bool:
        """Wait until ``metrics.jsonl`` holds that many steps; False if the processes ended."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            if len(losses(self.run_dir)) >= steps:
                return True
            if not self.alive():
                return False
            time.sleep(0.003)
        raise AssertionError(f"no {steps} steps in time; {self.said()}")

    def said(self) -> str:
        """What the processes wrote to stderr."""
        return self.log.read_text() if self.log.exists() else ""


def run(config: RunConfig, run_dir: Path, world: int = 1) -> None:
    """Start or continue a run and let it finish."""
    team = Team(config, run_dir, world)
    assert team.wait() == [0] * world, team.said()


def records(run_dir: Path) -> list[dict[str, Any]]:
    """The records of a run, a line that is being written left out."""
    found = []
    with contextlib.suppress(FileNotFoundError):
        for line in (run_dir / "metrics.jsonl").read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                found.append(json.loads(line))
    return found


def losses(run_dir: Path) -> dict[int, float]:
    """Loss by step."""
    return {r["step"]: r["loss"] for r in records(run_dir) if r["event"] == "step"}


def checkpoints(run_dir: Path) -> list[int]:
    """Steps of the complete checkpoints, ascending."""
    return sorted(int(path.name[5:]) for path in (run_dir / "checkpoints").glob("step-*"))


def _work(config: RunConfig, run_dir: Path, rank: int, world: int, port: int, log: Path) -> None:
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    stderr = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(stderr, sys.stderr.fileno())
    os._exit(_train(config, run_dir))


def _train(config: RunConfig, run_dir: Path) -> int:
    import traceback

    import torch

    from qwen2kit.errors import PeerError, Qwen2KitError
    from qwen2kit.train.run import start_or_resume

    torch.set_num_threads(1)
    try:
        start_or_resume(config, run_dir)
    except PeerError as error:
        return error.exit_code
    except Qwen2KitError as error:
        os.write(2, f"error: {error}\n".encode())
        return error.exit_code
    except BaseException:
        os.write(2, traceback.format_exc().encode())
        return 1
    return 0


def same(ours: dict[int, float], theirs: dict[int, float], steps: Sequence[int]) -> None:
    """Every step is there and its loss the same bit for bit."""
    assert list(ours) == list(steps)
    different = {step for step in steps if ours[step] != theirs[step]}
    assert not different, f"steps {sorted(different)[:5]} differ"
