"""``qwen2kit eval needle`` and ``qwen2kit eval perplexity``: what a model makes of long context."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qwen2kit.cli.eval_model import (
    BatchSize,
    ChatTemplate,
    Json,
    Output,
    lengths_of,
    load,
    numbers_of,
)
from qwen2kit.cli.model_options import Adapter, BackendName, DeviceName, DType, Model
from qwen2kit.cli.output import console, emit_json
from qwen2kit.errors import MissingExtra

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_HEAT_MAP = "heat-map.png"


def needle(
    model: Model,
    text: Annotated[
        Path,
        typer.Option(exists=True, help="Where to hide it: a text file or a directory of them."),
    ],
    lengths: Annotated[str, typer.Option(help="Prompt lengths in tokens.")] = "1k,2k,4k",
    depths: Annotated[
        str, typer.Option(help="Where the fact is, in per cent of the text.")
    ] = "0,25,50,75,100",
    repeats: Annotated[int, typer.Option(min=1, help="Questions per cell.")] = 1,
    backend: BackendName = "auto",
    dtype: DType = "auto",
    device: DeviceName = "auto",
    adapter: Adapter = None,
    batch_size: BatchSize = None,
    chat_template: ChatTemplate = False,
    seed: Annotated[int, typer.Option(help="Of the hidden numbers.")] = 0,
    output: Output = None,
    json_output: Json = False,
) -> None:
    """Hide a random number at each depth of prompts of each length, and ask for it.

    Writes results.json, samples.jsonl and a heat map.
    """
    cells_wanted = lengths_of(lengths), numbers_of(depths, "--depths")
    loaded = load(model, backend=backend, dtype=dtype, device=device, adapter=adapter)
    from dataclasses import asdict

    from qwen2kit_evals.needle import Haystack, accuracies, grid, run_needles
    from qwen2kit_evals.results import default_output
    from qwen2kit_evals.run_directory import RunDirectory, settings_of

    haystack = Haystack(text, loaded.tokenizer)
    cells = grid(*cells_wanted, repeats)
    settings = settings_of(
        "needle", loaded, text=str(text.resolve()), lengths=cells_wanted[0],
        depths=cells_wanted[1], repeats=repeats, chat_template=chat_template, seed=seed,
    )  # fmt: skip
    with RunDirectory(output or default_output(model, "needle"), settings) as run:
        rows = run_needles(
            loaded, haystack, cells, chat=chat_template, seed=seed, batch_size=batch_size,
            log=run.log,
        )  # fmt: skip
        means = accuracies(rows)
        overall = sum(row.correct for row in rows) / len(rows)
        document: dict[str, Any] = {
            "accuracy": overall,
            "cells": means,
            "heat_map": _draw(means, run.path, f"{Path(model).name}: {overall:.0%} found"),
            "settings": settings,
            "output": str(run.path),
        }
        run.finish(document, map(asdict, rows))
    _grid_table(means, overall)
    console().print(f"written to {run.path}", markup=False)
    if json_output:
        emit_json(document)


def perplexity(
    model: Model,
    text: Annotated[Path, typer.Option(exists=True, dir_okay=False, help="A text file.")],
    lengths: Annotated[str, typer.Option(help="Context lengths in tokens.")] = "256,1k,4k",
    stride: Annotated[
        int | None, typer.Option(help="Tokens per block; default half the shortest length.")
    ] = None,
    blocks: Annotated[int, typer.Option(help="At most so many blocks, spread evenly.")] = 32,
    backend: BackendName = "auto",
    dtype: DType = "auto",
    device: DeviceName = "auto",
    adapter: Adapter = None,
    output: Output = None,
    json_output: Json = False,
) -> None:
    """Perplexity of the same tokens of a text after less or more context."""
    wanted = lengths_of(lengths)
    loaded = load(model, backend=backend, dtype=dtype, device=device, adapter=adapter)
    from dataclasses import asdict

    from qwen2kit_evals.context_perplexity import context_perplexity
    from qwen2kit_evals.results import default_output
    from qwen2kit_evals.run_directory import RunDirectory, settings_of

    settings = settings_of(
        "perplexity", loaded, text=str(text.resolve()), lengths=wanted, stride=stride, blocks=blocks
    )
    with RunDirectory(output or default_output(model, "perplexity"), settings) as run:
        points = context_perplexity(
            loaded, text.read_text(encoding="utf-8", errors="replace"), wanted, stride=stride,
            blocks=blocks, answers=run.log,
        )  # fmt: skip
        document: dict[str, Any] = {
            "lengths": [asdict(point) for point in points],
            "settings": settings,
            "output": str(run.path),
        }
        run.finish(document, document["lengths"])
    _perplexity_table(document["lengths"])
    console().print(f"written to {run.path}", markup=False)
    if json_output:
        emit_json(document)


def _draw(cells: Sequence[Mapping[str, Any]], directory: Path, title: str) -> str | None:
    from qwen2kit_evals.heat_map import draw_heat_map

    try:
        draw_heat_map(cells, directory / _HEAT_MAP, title=title)
    except MissingExtra as error:
        sys.stderr.write(f"note: no heat map: {error}\n")
        return None
    return _HEAT_MAP


def _grid_table(cells: Sequence[Mapping[str, Any]], overall: float) -> None:
    from rich.table import Table

    lengths = sorted({cell["length"] for cell in cells})
    accuracy = {(cell["depth"], cell["length"]): cell["accuracy"] for cell in cells}
    table = Table(title=f"Needles found: {overall:.1%}", title_justify="left")
    table.add_column("depth", justify="right")
    for length in lengths:
        table.add_column(f"{length:,}", justify="right")
    for depth in sorted({cell["depth"] for cell in cells}):
        table.add_row(f"{depth:g} %", *(f"{accuracy[depth, length]:.0%}" for length in lengths))
    console().print(table)


def _perplexity_table(points: Sequence[Mapping[str, Any]]) -> None:
    from rich.table import Table

    table = Table(title="Perplexity by context length", title_justify="left")
    for name in ("length", "perplexity", "nll", "stderr", "bits/byte", "tokens"):
        table.add_column(name, justify="right")
    for point in points:
        error = point["stderr"]
        table.add_row(
            f"{point['length']:,}",
            f"{point['perplexity']:.3f}",
            f"{point['nll']:.4f}",
            "" if error is None else f"±{error:.4f}",
            f"{point['bits_per_byte']:.4f}",
            f"{point['tokens']:,}",
        )
    console().print(table)
