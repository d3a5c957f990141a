"""Significance of paired scores, against SciPy."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from qwen2kit_evals.paired import mcnemar, paired_difference


@pytest.mark.parametrize(
    ("gained", "lost"), [(0, 0), (1, 0), (5, 5), (12, 3), (40, 71), (900, 800)]
)
def test_mcnemar_is_the_exact_binomial_test(gained: int, lost: int) -> None:
    expected = stats.binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    assert mcnemar(gained, lost) == pytest.approx(expected)


@pytest.mark.parametrize("binary", [True, False])
def test_bootstrap_interval_is_scipys(binary: bool) -> None:
    rng = np.random.default_rng(1)
    a, b = rng.random(300), rng.random(300) + 0.1
    if binary:
        a, b = (a > 0.5).astype(float), (b > 0.5).astype(float)
    ours = paired_difference(a.tolist(), b.tolist())
    theirs = stats.bootstrap(
        (b - a,), np.mean, method="percentile", n_resamples=10_000, random_state=2
    ).confidence_interval
    assert ours.delta == pytest.approx((b - a).mean())
    assert ours.low == pytest.approx(theirs.low, abs=0.01)
    assert ours.high == pytest.approx(theirs.high, abs=0.01)
    assert ours.test == ("mcnemar" if binary else "bootstrap")


def test_bootstrap_p_falls_with_the_effect() -> None:
    noise = np.random.default_rng(3).normal(size=200)
    none, some, sure = (
        paired_difference([0.0] * 200, (noise - noise.mean() + shift).tolist()).p
        for shift in (0.0, 0.15, 1.0)
    )
    assert none > 0.9
    assert 0.001 < some < 0.2
    assert sure == 1e-4
    expected = stats.ttest_1samp(noise - noise.mean() + 0.15, 0).pvalue
    assert some == pytest.approx(expected, abs=0.02)


def test_only_pairs_compare() -> None:
    with pytest.raises(ValueError, match="cannot pair 1 with 2"):
        paired_difference([1.0], [1.0, 0.0])
    with pytest.raises(ValueError, match="cannot pair 0"):
        paired_difference([], [])
