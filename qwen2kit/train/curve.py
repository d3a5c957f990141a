"""The curves of a run as a picture, and as one line of block characters."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from qwen2kit.train.metrics import Record

_BLOCKS = "▁▂▃▄▅▆▇█"


def sparkline(values: Sequence[float], width: int = 48) -> str:
    """``values`` averaged into at most ``width`` block characters, lowest to highest."""
    if not values:
        return ""
    count = min(width, len(values))
    edges = [len(values) * i // count for i in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    scale = (len(_BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BLOCKS[round((mean - low) * scale)] for mean in means)


def plot_run(path: Path, records: Sequence[Record], title: str) -> bool:
    """Write the curves of a run as a PNG; False if matplotlib is not installed.

    Three panels over the steps: loss (training and held-out, nats per token), gradient norm with
    learning rate, tokens per second.

    Args:
        path: the ``.png`` to write.
        records: contents of ``metrics.jsonl``.
        title: shown above the curves.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(8, 8), layout="constrained")
    loss, norm, speed = figure.subplots(3, 1, sharex=True, height_ratios=[3, 2, 1])
    loss.plot(*_points(records, "step", "loss"), lw=0.8, label="training")
    if any(record["event"] == "eval" for record in records):
        loss.plot(*_points(records, "eval", "loss"), "o-", label="held-out")
    loss.set(ylabel="loss (nats per token)", title=title)
    loss.legend()
    norm.plot(*_points(records, "step", "grad_norm"), lw=0.8)
    norm.set(ylabel="gradient norm")
    rate = norm.twinx()
    rate.plot(*_points(records, "step", "lr"), color="tab:orange", lw=0.8)
    rate.set_ylabel("learning rate", color="tab:orange")
    speed.plot(*_points(records, "step", "tokens_per_second"), lw=0.8)
    speed.set(xlabel="step", ylabel="tokens / s")
    for axes in (loss, norm, speed):
        axes.grid(alpha=0.3)
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=110)
    return True


def _points(records: Sequence[Record], event: str, field: str) -> tuple[list[int], list[float]]:
    found = [r for r in records if r["event"] == event and r.get(field) is not None]
    return [r["step"] for r in found], [r[field] for r in found]
