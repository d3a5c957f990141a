"""A depth x length grid of accuracies as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen2kit.errors import MissingExtra

_MOST_LABELLED = 160
"""Cells; with more of them the numbers inside would not be readable."""
_DARK_FROM = 0.35
"""Distance from the middle of the colour scale."""


def draw_heat_map(cells: Sequence[Mapping[str, Any]], path: Path, *, title: str) -> None:
    """Write a PNG: length from left to right, depth from top to bottom, accuracy as colour.

    Args:
        cells: of `needle.accuracies`.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtra("eval", "matplotlib") from error
    lengths = sorted({cell["length"] for cell in cells})
    depths = sorted({cell["depth"] for cell in cells})
    values = [[float("nan")] * len(lengths) for _ in depths]
    for cell in cells:
        values[depths.index(cell["depth"])][lengths.index(cell["length"])] = cell["accuracy"]
    size = (max(4.5, 1.8 + 0.75 * len(lengths)), max(2.6, 1.5 + 0.5 * len(depths)))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    image = axes.pcolormesh(values, cmap="RdYlGn", vmin=0, vmax=1, edgecolors="white")
    axes.invert_yaxis()
    axes.set_xticks([n + 0.5 for n in range(len(lengths))], [short(length) for length in lengths])
    axes.set_yticks([n + 0.5 for n in range(len(depths))], [f"{depth:g} %" for depth in depths])
    axes.set_xlabel("prompt length (tokens)")
    axes.set_ylabel("depth of the fact")
    axes.set_title(title, fontsize=10)
    if len(lengths) * len(depths) <= _MOST_LABELLED:
        for row, accuracies in enumerate(values):
            for column, accuracy in enumerate(accuracies):
                ink = "white" if abs(accuracy - 0.5) > _DARK_FROM else "black"
                label = axes.text(column + 0.5, row + 0.5, f"{accuracy:.0%}", color=ink, fontsize=8)
                label.set(ha="center", va="center")
    figure.colorbar(image, ax=axes, label="correct answers")
    figure.savefig(path, dpi=150)


def short(length: int) -> str:
    """``4k`` for 4096, as a label."""
    return f"{length // 1024}k" if length % 1024 == 0 else f"{length:,}"
