"""``qwen2kit train``: pre-train or fine-tune as a recipe says."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from qwen2kit.train.run_dir import RunResult

_STOPPED = {"SIGINT": 130, "SIGUSR1": 138, "SIGTERM": 143}


def train(
    recipe: Annotated[
        str | None,
        typer.Argument(
            help="A TOML file or the name of a shipped recipe (tiny, pretrain, long-context, sft, "
            "sft-small); default: tiny."
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
    auto_resume: Annotated[
        bool,
        typer.Option(
            "--auto-resume", help="With --run-dir: continue the run there if there is one."
        ),
    ] = False,
    allow_changes: Annotated[
        bool, typer.Option(help="With --resume: accept a recipe that differs from the run's.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Train a model.

    Without arguments: a tiny Qwen2 on the embedded corpus, in about two minutes on two CPU cores,
    scored on questions it has never seen.

    Under torchrun or another launcher every process runs this same command.
    """
    from qwen2kit.cli.output import console, emit_json
    from qwen2kit.errors import PeerError

    changes = overrides or []
    if recipe is not None and "=" in recipe:
        changes.insert(0, recipe)
        recipe = None
    screen = console()
    try:
        result = _run(recipe, changes, run_dir, resume, auto_resume, allow_changes, screen)
    except PeerError as error:
        raise typer.Exit(error.exit_code) from error
    if result.reports:
        _summarise(result, screen)
        if json:
            emit_json(result.to_json())
    if result.status == "stopped":
        raise typer.Exit(_STOPPED.get(result.signal or "", 1))


def _run(
    recipe: str | None,
    changes: list[str],
    run_dir: Path | None,
    resume: Path | None,
    auto_resume: bool,
    allow_changes: bool,
    screen: Console,
) -> RunResult:
    from qwen2kit.config.load import load_recipe
    from qwen2kit.errors import ConfigError
    from qwen2kit.train import run

    if resume is not None:
        if run_dir is not None or auto_resume:
            raise ConfigError("give either --run-dir (a new run) or --resume, not both")
        config = run.changed_recipe(resume, recipe, changes)
        return run.resume(resume, config=config, allow_changes=allow_changes, console=screen)
    if allow_changes:
        raise ConfigError("--allow-changes needs --resume")
    config = load_recipe(recipe or "tiny", changes)
    if not auto_resume:
        return run.start(config, run_dir=run_dir, console=screen)
    if run_dir is None:
        raise ConfigError("--auto-resume needs --run-dir: the directory to look for a run in")
    return run.start_or_resume(config, run_dir, console=screen)


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
    skipped += f", {result.rewinds} times gone back" if result.rewinds else ""
    screen.print(
        f"{result.step} steps, {result.tokens:,} tokens, {clock(result.seconds)} min{skipped}",
        markup=False,
        soft_wrap=True,
    )
    screen.print(f"model: {result.model_dir}", markup=False, soft_wrap=True)
