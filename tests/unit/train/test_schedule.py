"""Learning-rate schedules at their defined points, and against transformers where it has them."""

from __future__ import annotations

from itertools import pairwise
from math import cos, pi

import pytest

from qwen2kit.config.train_tree import WSD, Constant, Cosine, Linear
from qwen2kit.train.schedule import learning_rate

PEAK, TOTAL = 3e-4, 1000


@pytest.mark.parametrize(
    "schedule", [Cosine(warmup=0.1), Linear(warmup=0.1), WSD(warmup=0.1), Constant(warmup=0.1)]
)
def test_warmup_is_linear_and_reaches_the_peak(schedule: Cosine | Linear | WSD | Constant) -> None:
    for step in range(100):
        expected = PEAK * (step + 1) / 100
        assert learning_rate(schedule, PEAK, step, TOTAL) == pytest.approx(expected)
    rates = [learning_rate(schedule, PEAK, step, TOTAL) for step in range(100, TOTAL)]
    assert rates[0] == pytest.approx(PEAK)
    assert all(a >= b for a, b in pairwise(rates))


def test_ends_are_exact() -> None:
    assert learning_rate(Cosine(min_ratio=0.1), PEAK, TOTAL - 1, TOTAL) == pytest.approx(3e-5)
    assert learning_rate(Linear(min_ratio=0.1), 7e-6, 0, TOTAL) == pytest.approx(7e-6)
    assert learning_rate(Linear(min_ratio=0.1), 7e-6, TOTAL - 1, TOTAL) == pytest.approx(7e-7)
    assert learning_rate(WSD(min_ratio=0.0), PEAK, TOTAL - 1, TOTAL) == 0
    assert learning_rate(WSD(decay=0.2), PEAK, 800, TOTAL) == PEAK
    assert learning_rate(WSD(decay=0.2), PEAK, 801, TOTAL) < PEAK
    assert learning_rate(Constant(), PEAK, TOTAL - 1, TOTAL) == PEAK


def test_cosine_formula_of_the_report() -> None:
    schedule, warm = Cosine(warmup=0.1, min_ratio=0.1), 100
    low = 0.1 * PEAK
    for step in (100, 333, 700, 999):
        t = (step - warm) / (TOTAL - 1 - warm)
        expected = low + 0.5 * (PEAK - low) * (1 + cos(pi * t))
        assert learning_rate(schedule, PEAK, step, TOTAL) == pytest.approx(expected)


@pytest.mark.parametrize("total", [1, 2, 3])
@pytest.mark.parametrize("schedule", [Cosine(), Linear(warmup=0.5), WSD(), Constant()])
def test_very_short_runs_have_positive_finite_rates(
    schedule: Cosine | Linear | WSD | Constant, total: int
) -> None:
    rates = [learning_rate(schedule, PEAK, step, total) for step in range(total)]
    assert all(0 <= rate <= PEAK * (1 + 1e-9) for rate in rates)
    assert rates[0] > 0


def test_same_as_transformers_up_to_the_endpoint_convention() -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    # Theirs reaches the minimum one step after the last, ours on the last step.
    theirs = transformers.get_cosine_with_min_lr_schedule_with_warmup(
        optimizer, num_warmup_steps=100, num_training_steps=TOTAL - 1, min_lr_rate=0.1
    )
    schedule = Cosine(warmup=0.1, min_ratio=0.1)
    for step in range(TOTAL):
        if step >= 100:
            assert learning_rate(schedule, PEAK, step, TOTAL) == pytest.approx(
                theirs.get_last_lr()[0], rel=1e-6
            )
        optimizer.step()
        theirs.step()
