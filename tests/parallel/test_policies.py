"""Spikes and the long phase of whole runs: the same on two processes, and after any kill."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from qwen2kit.config.tree import RunConfig
from tests.parallel.runs import Team, losses, records, run, tiny
from tests.parallel.test_kill import kill_at_random

pytest.importorskip("torch")

STEPS = 48
# A limit that ordinary noise passes now and then.
NOISY = ("train.spike.factor=1.0", "train.spike.window=6", "train.max_skipped=60")
SKIP = ("train.spike.kind=skip", *NOISY)
REWIND = (
    "train.spike.kind=rewind", "train.spike.factor=2.0", "train.spike.window=6",
    "train.spike.max_rewinds=999",
)  # fmt: skip
LONG = (
    "task=pretrain", "seq_len=24", "train.batch_rows=8", "train.steps=20",
    "long.fraction=0.5", "long.seq_len=96", "long.rope_theta=1e6",
)  # fmt: skip


def settings(*changes: str) -> RunConfig:
    return tiny(f"train.steps={STEPS}", "checkpoint.every=4", *changes)


def without_times(run_dir: Path) -> list[dict[str, Any]]:
    timed = ("tokens_per_second", "seconds", "data_seconds", "eta_seconds", "memory_bytes", "mfu")
    return [{k: v for k, v in r.items() if k not in timed} for r in records(run_dir)]


def test_spikes_are_skipped(tmp_path: Path) -> None:
    run(settings(*SKIP), tmp_path / "run")
    steps = [r for r in records(tmp_path / "run") if r["event"] == "step"]
    skipped = [r for r in steps if r["skipped"]]
    assert 3 <= len(skipped) <= STEPS // 2
    assert not any(r["skipped"] for r in steps[:6])


def test_a_rewind_repeats_the_steps_on_other_data(tmp_path: Path) -> None:
    run(settings(*REWIND), tmp_path / "run")
    rewinds = [r for r in records(tmp_path / "run") if r["event"] == "rewind"]
    assert len(rewinds) >= 2
    assert rewinds[-1]["rewinds"] >= len(rewinds)
    for record in rewinds:
        assert (record["step"] - 1) % 4 == 0  # where a checkpoint was
        assert record["step"] <= record["from_step"] <= record["step"] + 4
    run(settings(), tmp_path / "plain")
    ours, plain = losses(tmp_path / "run"), losses(tmp_path / "plain")
    assert list(ours) == list(range(1, STEPS + 1))
    first = rewinds[0]["step"]
    assert all(ours[step] == plain[step] for step in range(1, first))
    assert ours[first] != plain[first]


@pytest.mark.parametrize("policy", [SKIP, REWIND], ids=["skip", "rewind"])
def test_a_killed_run_makes_the_same_decisions(policy: tuple[str, ...], tmp_path: Path) -> None:
    run(settings(*policy), tmp_path / "whole")
    run_dir, chance = tmp_path / "killed", random.Random(1)
    for _ in range(3):
        team = Team(settings(*policy), run_dir)
        kill_at_random(team, chance)
        team.wait()
    run(settings(*policy), run_dir)
    assert without_times(run_dir) == without_times(tmp_path / "whole")


def test_the_long_phase_may_use_another_mesh(tmp_path: Path) -> None:
    run(settings(*LONG), tmp_path / "one")
    run(settings(*LONG, "long.parallel.cp=2"), tmp_path / "two", 2)
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert list(one) == list(two) == list(range(1, 21))
    assert max(abs(one[step] - two[step]) / one[step] for step in one) < 1e-5
