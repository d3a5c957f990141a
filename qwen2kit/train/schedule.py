"""Step -> learning rate: pure functions of the recipe."""

from __future__ import annotations

from math import cos, pi

from qwen2kit.config.train_tree import WSD, Constant, Cosine, Linear


def learning_rate(
    schedule: Cosine | Linear | WSD | Constant, peak: float, step: int, total: int
) -> float:
    """Learning rate of the ``step``-th of ``total`` steps (0-based).

    Warm-up rises linearly and reaches ``peak`` on its last step; the final step of a decay has
    ``min_ratio * peak`` exactly. Cosine: ``min + (peak - min)(1 + cos(pi t)) / 2`` with ``t``
    running from 0 to 1 after the warm-up (arXiv 1608.03983).
    """
    warmup = round(schedule.warmup * total)
    if step < warmup:
        return peak * (step + 1) / warmup
    if isinstance(schedule, Constant):
        return peak
    low = peak * schedule.min_ratio
    if isinstance(schedule, WSD):
        start = total - max(1, round(schedule.decay * total))
        return peak + (low - peak) * _progress(step, start, total)
    t = _progress(step, warmup, total)
    if isinstance(schedule, Linear):
        return peak + (low - peak) * t
    return low + (peak - low) * (1 + cos(pi * t)) / 2


def _progress(step: int, start: int, total: int) -> float:
    """0 up to ``start``, 1 at the last step."""
    if step <= start:
        return 0.0
    return (step - start) / max(1, total - 1 - start)
