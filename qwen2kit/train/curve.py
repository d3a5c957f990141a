"""The loss curve as a picture, and as one line of block characters."""

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


def plot_loss(path: Path, records: Sequence[Record], title: str) -> bool:
    """Write the loss curve as a PNG; False if matplotlib is not installed.

    Args:
        path: the ``.png`` to write.
        records: contents of ``metrics.jsonl``.
        title: shown above the curve.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    steps = [r for r in records if r["event"] == "step" and r["loss"] is not None]
    axes.plot([r["step"] for r in steps], [r["loss"] for r in steps], lw=0.8, label="training")
    evals = [r for r in records if r["event"] == "eval" and r.get("loss") is not None]
    if evals:
        axes.plot([r["step"] for r in evals], [r["loss"] for r in evals], "o-", label="held-out")
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=110)
    return True
