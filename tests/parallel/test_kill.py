"""Runs that are killed at any moment, resumed on any number of processes, and end the same."""

from __future__ import annotations

import json
import os
import random
import time
from pathlib import Path

import pytest

from qwen2kit.train.checkpoints import CheckpointStore
from tests.parallel.runs import Team, checkpoints, losses, records, run, same, tiny

pytest.importorskip("torch")

STEPS = 90
# By number of processes; QWEN2KIT_KILLS sets both.
KILLS = {1: 20, 2: 6} | {
    world: int(os.environ["QWEN2KIT_KILLS"]) for world in (1, 2) if "QWEN2KIT_KILLS" in os.environ
}


def settings(every: int) -> tuple[str, ...]:
    return (f"train.steps={STEPS}", f"checkpoint.every={every}", "checkpoint.keep=2")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[int, float]]:
    """Losses by step on one and on two processes."""
    folder = tmp_path_factory.mktemp("whole")
    for world in (1, 2):
        run(tiny(*settings(0)), folder / str(world), world)
    return {world: losses(folder / str(world)) for world in (1, 2)}


def kill_at_random(team: Team, chance: random.Random) -> bool:
    """Kill one process after a few more steps, half of the time while a checkpoint is being
    written; False if the run was over before."""
    target = len(losses(team.run_dir)) + chance.randint(1, 7)
    if not team.wait_for(min(target, STEPS)):
        return False
    if chance.random() < 0.5:
        folder = team.run_dir / "checkpoints"
        while team.alive() and not list(folder.glob(".step-*.partial")):
            pass
    time.sleep(chance.random() * 0.004)
    team.kill(chance.randrange(len(team.children)))
    return True


@pytest.mark.parametrize("world", [1, 2])
def test_every_resume_repeats_the_uninterrupted_run(
    world: int, uninterrupted: dict[int, dict[int, float]], tmp_path: Path
) -> None:
    run_dir, chance = tmp_path / "run", random.Random(world)
    kills = runs = 0
    while kills < KILLS[world]:
        if STEPS in losses(run_dir):  # it was over before this process got to look; another one
            finish(run_dir, uninterrupted[world], world)
            runs += 1
            assert runs < 30
            run_dir = tmp_path / f"run{runs}"
        team = Team(tiny(*settings(chance.randint(1, 3))), run_dir, world)
        killed = kill_at_random(team, chance)
        codes = team.wait()
        assert "Traceback" not in team.said()  # a lost process is nobody's mistake
        assert "error:" not in team.said()
        kills += killed
        assert 0 not in codes or losses(run_dir).get(STEPS) is not None
        saved = checkpoints(run_dir)
        if saved:
            restored = CheckpointStore(run_dir / "checkpoints", 2).restore(lambda p, s: None)
            assert restored is not None
            assert (restored.state["step"], restored.warnings) == (saved[-1], ())
            # What the newest checkpoint covers is on record and right.
            known = {step: loss for step, loss in losses(run_dir).items() if step <= saved[-1]}
            same(known, uninterrupted[world], range(1, saved[-1] + 1))
    finish(run_dir, uninterrupted[world], world)


def finish(run_dir: Path, expected: dict[int, float], world: int) -> None:
    """Let the run end, as if it had never been killed."""
    run(tiny(*settings(3)), run_dir, world)
    same(losses(run_dir), expected, range(1, STEPS + 1))
    assert checkpoints(run_dir)[-1] == STEPS
    assert not list((run_dir / "checkpoints").glob(".*"))


def test_two_then_one_then_four_processes(
    uninterrupted: dict[int, dict[int, float]], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    for world, until in ((2, 12), (1, 30), (4, None)):
        team = Team(tiny(*settings(5)), run_dir, world)
        if until is None:
            assert team.wait() == [0] * world, team.said()
        else:
            assert team.wait_for(until)
            team.kill(world - 1)
            team.wait()
    ours, theirs = losses(run_dir), uninterrupted[1]
    assert list(ours) == list(theirs)
    assert max(abs(ours[step] - theirs[step]) / theirs[step] for step in ours) < 1e-5


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_process_saves_and_stops_all(
    rank: int, uninterrupted: dict[int, dict[int, float]], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    team = Team(tiny(*settings(0)), run_dir, 2)
    assert team.wait_for(5)
    team.stop(rank)
    assert team.wait() == [0, 0]
    (step,) = checkpoints(run_dir)
    same(losses(run_dir), uninterrupted[2], range(1, step + 1))
    assert step < STEPS
    run(tiny(*settings(0)), run_dir, 2)
    same(losses(run_dir), uninterrupted[2], range(1, STEPS + 1))


def test_a_signal_to_one_process_ends_the_last_evaluation_on_all(tmp_path: Path) -> None:
    config = tiny(
        "train.steps=12", "checkpoint.every=0", "eval.every=4", "eval.max_rows=40",
        "eval.questions=40", "data.held_out=300",
    )  # fmt: skip
    run(config, tmp_path / "whole", 2)
    expected, chance = records(tmp_path / "whole"), random.Random(3)
    model = (tmp_path / "whole" / "model" / "model.safetensors").read_bytes()
    for attempt, rank in enumerate((0, 1)):
        run_dir = tmp_path / str(attempt)
        team = Team(config, run_dir, 2)
        assert team.wait_for(12)
        time.sleep(chance.random() * 0.1)
        team.stop(rank)
        codes, status = team.wait(), json.loads((run_dir / "run.json").read_text())["status"]
        assert codes == [0, 0] or status == "finished", team.said()
        assert checkpoints(run_dir) == [12]
        assert not team.said()
        assert (run_dir / "model").exists() == (status == "finished")
        run(config, run_dir, 2)
        assert [(r["event"], r["step"], r["loss"]) for r in records(run_dir)] == [
            (r["event"], r["step"], r["loss"]) for r in expected
        ]
        assert (run_dir / "model" / "model.safetensors").read_bytes() == model
