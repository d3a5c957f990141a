"""The spike guard: its limit by the formula, its memory across a resume."""

from __future__ import annotations

import json
from math import inf, nan

import numpy as np
import pytest

from qwen2kit.backend.protocol import StepMetrics
from qwen2kit.config.train_tree import KeepSpikes, RewindSpikes, SkipSpikes, TrainConfig
from qwen2kit.errors import TrainingError
from qwen2kit.train.guard import Guard


def metrics(loss: float, skipped: bool = False) -> StepMetrics:
    return StepMetrics(loss=loss, grad_norm=1.0, tokens=1, supervised_tokens=1, skipped=skipped)


def guard_after(losses: list[float], **settings: object) -> Guard:
    guard = Guard(TrainConfig(steps=9, **settings))  # type: ignore[arg-type]
    for loss in losses:
        guard.must_rewind(metrics(loss))
    return guard


def test_the_limit_is_median_and_mad_of_the_window() -> None:
    losses = [float(x) for x in np.random.default_rng(0).normal(3.0, 0.1, 200)]
    guard = guard_after(losses, spike=SkipSpikes(window=50, factor=6.0))
    recent = np.array(losses[-50:])
    mad = np.median(np.abs(recent - np.median(recent)))
    assert guard.limit() == pytest.approx(np.median(recent) + 6.0 * 1.4826 * mad)
    assert 3.4 < guard.limit() < 3.9  # six sigma of what was drawn, roughly


def test_there_is_no_limit_before_the_window_is_full_or_without_a_policy() -> None:
    assert guard_after([1.0] * 7, spike=SkipSpikes(window=8)).limit() == inf
    assert guard_after([1.0] * 8, spike=SkipSpikes(window=8)).limit() == 1.0
    assert guard_after([1.0] * 99, spike=KeepSpikes()).limit() == inf
    guard = guard_after([1.0] * 8, spike=SkipSpikes(window=8))
    guard.forget()
    assert guard.limit() == inf


def test_one_spike_hardly_moves_the_limit() -> None:
    quiet = [3.0 + 0.01 * (i % 5) for i in range(16)]
    calm = guard_after(quiet, spike=SkipSpikes(window=16))
    guard = guard_after(quiet, spike=SkipSpikes(window=16))
    guard.must_rewind(metrics(50.0, skipped=True))
    assert guard.limit() == pytest.approx(calm.limit(), rel=0.05)


def test_a_resumed_guard_judges_like_the_first() -> None:
    settings = {"spike": SkipSpikes(window=4), "max_skipped": 2, "non_finite": "skip"}
    guard = guard_after([3.0, 3.2, 3.1, 3.15], **settings)
    guard.must_rewind(metrics(nan, skipped=True))
    again = Guard(TrainConfig(steps=9, **settings))  # type: ignore[arg-type]
    again.restore(json.loads(json.dumps(guard.state(), allow_nan=False)))
    assert again.limit() == guard.limit()
    for one in (guard, again):
        one.must_rewind(metrics(9.0, skipped=True))
        with pytest.raises(TrainingError, match="3 steps in a row"):
            one.must_rewind(metrics(9.0, skipped=True))


def test_rewinds_are_counted_over_the_whole_run() -> None:
    guard = guard_after([3.0] * 4, spike=RewindSpikes(window=4, max_rewinds=1))
    assert guard.must_rewind(metrics(nan, skipped=True))
    assert not guard.must_rewind(metrics(3.0))
    with pytest.raises(TrainingError, match="max_rewinds=1 is used up"):
        guard.must_rewind(metrics(9.0, skipped=True))
