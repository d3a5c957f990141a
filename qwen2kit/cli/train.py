"""``qwen2kit train``: pre-train or fine-tune as a recipe says."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from qwen2kit.train.run import RunResult

_STOPPED = {"SIGINT": 130, "SIGTERM": 143}


def train(
    recipe: Annotated[
        str | None,
        typer.Argument(
            help="A TOML file or the name of a shipped recipe (tiny, pretrain, sft, sft-small); "
            "default: tiny."
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Changes, e.g. train.lr=1e-4."),
    ] = None,
    run_dir: Annotated[
        Path | None,
        typer.Option(help="Directory of this run; default: a new one under the recipe's output."),
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(metavar="RUN_DIR", help="Continue a run after its newest checkpoint."),
    ] = None,
    allow_changes: Annotated[
        bool, typer.Option(help="With --resume: accept a recipe that differs from the run's.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Train a model.

    Without arguments: a tiny Qwen2 on the embedded corpus, in about two minutes on two CPU cores,
    scored on questions it has never seen.
    """
    from qwen2kit.cli.output import console, emit_json
    from qwen2kit.config.load import load_recipe
    from qwen2kit.errors import ConfigError
    from qwen2kit.train import run

    changes = overrides or []
    if recipe is not None and "=" in recipe:
        changes.insert(0, recipe)
        recipe = None
    screen = console()
    if resume is None:
        if allow_changes:
            raise ConfigError("--allow-changes needs --resume")
        result = run.start(load_recipe(recipe or "tiny", changes), run_dir=run_dir, console=screen)
    else:
        if run_dir is not None:
            raise ConfigError("give either --run-dir (a new run) or --resume, not both")
        config = run.changed_recipe(resume, recipe, changes)
        result = run.resume(resume, config=config, allow_changes=allow_changes, console=screen)
    _summarise(result, screen)
    if json:
        emit_json(result.to_json())
    if result.status == "stopped":
        raise typer.Exit(_STOPPED.get(result.signal or "", 1))


def _summarise(result: RunResult, screen: Console) -> None:
    from rich.table import Table

    from qwen2kit.train.live import clock, eval_cells

    if result.status == "stopped":
        screen.print(
            f"stopped by {result.signal} after step {result.step}; continue with: "
            f"qwen2kit train --resume {result.run_dir}",
            markup=False,
            soft_wrap=True,
        )
        return
    before, after = eval_cells(result.before), eval_cells(result.after)
    if after:
        table = Table(title="held-out figures")
        for heading in ("", "before training", "after training"):
            table.add_column(heading, justify="right")
        for name, value in after.items():
            table.add_row(name, before.get(name, ""), value)
        for kind, (correct, total) in result.after.get("by_kind", {}).items():
            first = result.before.get("by_kind", {}).get(kind, ("?", total))[0]
            table.add_row(f"  {kind}", f"{first}/{total}", f"{correct}/{total}")
        screen.print(table)
    skipped = f", {result.skipped} steps skipped" if result.skipped else ""
    screen.print(
        f"{result.step} steps, {result.tokens:,} tokens, {clock(result.seconds)} min{skipped}",
        markup=False,
        soft_wrap=True,
    )
    screen.print(f"model: {result.model_dir}", markup=False, soft_wrap=True)
