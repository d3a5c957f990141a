"""A benchmark as a picture: speeds beside what the device could do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def plot_bench(path: Path, document: dict[str, Any]) -> bool:
    """Write a PNG with tokens/s over prompt length and over streams; False without matplotlib.

    Args:
        path: the ``.png`` to write.
        document: made by `qwen2kit.bench.run.bench`.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    prefill = document["prefill"]
    _curve(left, [e["tokens"] for e in prefill], [e["tokens_per_second"] for e in prefill])
    _limit(left, prefill, "tokens")
    left.set(title="prefill", xlabel="prompt tokens", ylabel="tokens / s")
    streams = [e for e in document["throughput"] if e["decode_tokens_per_second"] is not None]
    rates = [e["decode_tokens_per_second"] for e in streams]
    _curve(right, [e["streams"] for e in streams], rates)
    _limit(right, streams, "streams")
    right.set(title="decoding", xlabel="streams", ylabel="tokens / s of all")
    for axes in (left, right):
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend()
    name = f"{document['model']}, {document['backend']} {document['dtype'] or ''}"
    figure.suptitle(f"{name}, {document['device']['kind']}")
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=110)
    return True


def _curve(axes: Any, x: Sequence[int], y: Sequence[float]) -> None:
    axes.plot(x, y, "o-", label="measured")
    axes.set_xscale("log")
    axes.set_xticks(x, [f"{value:,}" for value in x])
    axes.minorticks_off()


def _limit(axes: Any, entries: Sequence[dict[str, Any]], count: str) -> None:
    """The roof: so many tokens in the least possible time."""
    limited = [entry for entry in entries if entry["roof_seconds"] is not None]
    if limited:
        x = [entry[count] for entry in limited]
        axes.plot(x, [e[count] / e["roof_seconds"] for e in limited], "--", label="roof")
