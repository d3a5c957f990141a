"""``qwen2kit train``: pre-train or fine-tune as a recipe says."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qwen2kit.cli.abandon import abandon
from qwen2kit.cli.train_signals import answered

if TYPE_CHECKING:
    from rich.console import Console

    from qwen2kit.config.tree import RunConfig
    from qwen2kit.train.run_dir import RunResult

_STOPPED = {"SIGINT": 130, "SIGUSR1": 138, "SIGTERM": 143}


def train(
    recipe: Annotated[
        str | None,
        typer.Argument(
            help="A TOML file or the name of a shipped recipe (tiny, pretrain, long-context, sft, "
            "sft-small, lora, qlora); default: tiny."
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
    nproc: Annotated[
        int | None,
        typer.Option(min=1, help="Processes to start on this machine (one per GPU)."),
    ] = None,
    max_restarts: Annotated[
        int, typer.Option(min=0, help="With --nproc: start all again when one is lost.")
    ] = 0,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Train a model.

    Without arguments: a tiny Qwen2 on the embedded corpus, in about two minutes on two CPU cores,
    scored on questions it has never seen.

    Under torchrun or another launcher every process runs this same command.
    """
    from qwen2kit.cli.output import console, emit_json
    from qwen2kit.errors import ConfigError

    changes = overrides or []
    if recipe is not None and "=" in recipe:
        changes.insert(0, recipe)
        recipe = None
    request = _Request(recipe, changes, run_dir, resume, auto_resume, allow_changes)
    request.check()
    if nproc is not None:
        raise typer.Exit(_launch(request, nproc, max_restarts, json))
    if max_restarts:
        raise ConfigError("--max-restarts needs --nproc")
    screen = console()
    try:
        with answered(resume or run_dir):
            result = request.run(screen)
    except BaseException as error:
        if os.environ.get("WORLD_SIZE", "1") != "1":
            abandon(error)
        raise
    if result.reports:
        _summarise(result, screen)
        if json:
            emit_json(result.to_json())
    if result.status == "stopped":
        raise typer.Exit(_STOPPED.get(result.signal or "", 1))


@dataclass(frozen=True, slots=True)
class _Request:
    """What was asked for, as typed."""

    recipe: str | None
    changes: list[str]
    run_dir: Path | None
    resume: Path | None
    auto_resume: bool
    allow_changes: bool

    def check(self) -> None:
        """Raise ConfigError if the options contradict each other."""
        from qwen2kit.errors import ConfigError

        if self.resume is None and self.allow_changes:
            raise ConfigError("--allow-changes needs --resume")
        if self.resume is not None and (self.run_dir is not None or self.auto_resume):
            raise ConfigError("give either --run-dir (a new run) or --resume, not both")
        if self.auto_resume and self.run_dir is None:
            raise ConfigError("--auto-resume needs --run-dir: the directory to look for a run in")

    def config(self) -> RunConfig:
        """The recipe of the run."""
        from qwen2kit.config.load import load_recipe
        from qwen2kit.train import run

        if self.resume is None:
            return load_recipe(self.recipe or "tiny", self.changes)
        return run.recipe_of(self.resume, self.recipe, self.changes)

    def run(self, screen: Console) -> RunResult:
        """Train in this process."""
        from qwen2kit.train import run

        config = self.config()
        if self.resume is not None:
            return run.resume(
                self.resume, config=config, allow_changes=self.allow_changes, console=screen
            )
        if self.auto_resume and self.run_dir is not None:
            return run.start_or_resume(config, self.run_dir, console=screen)
        return run.start(config, run_dir=self.run_dir, console=screen)

    def arguments(self) -> list[str]:
        """The same request as command-line arguments."""
        options = ["train", *([self.recipe] if self.recipe else []), *self.changes]
        if self.run_dir is not None:
            options += ["--run-dir", str(self.run_dir)]
        if self.resume is not None:
            options += ["--resume", str(self.resume)]
        flags = {"--auto-resume": self.auto_resume, "--allow-changes": self.allow_changes}
        return options + [flag for flag, given in flags.items() if given]


def _launch(request: _Request, nproc: int, max_restarts: int, json: bool) -> int:
    """Train in processes of their own; what can be refused is refused before they start."""
    from qwen2kit.launch.local import run_here
    from qwen2kit.train.run import check_new
    from qwen2kit.train.run_dir import fresh_directory
    from qwen2kit.train.setup import degrees, distributed_backend

    config = request.config()
    backend = distributed_backend(config)
    degrees(config, nproc)
    if request.resume is None and not request.auto_resume:
        run_dir = request.run_dir or fresh_directory(config)
        check_new(run_dir)
        # Processes that are started again must find the run they have begun.
        request = replace(request, run_dir=run_dir, auto_resume=max_restarts > 0)
    arguments = [*request.arguments(), *(["--json"] if json else [])]
    try:
        return run_here(backend, nproc, max_restarts, arguments)
    finally:
        if request.run_dir is not None:
            with suppress(OSError):  # unless something is in it
                request.run_dir.rmdir()


def _summarise(result: RunResult, screen: Console) -> None:
    from rich.table import Table

    from qwen2kit.train.live import clock, eval_cells

    if result.status == "stopped":
        rest = ", before its model was written" if result.step == result.total_steps else ""
        screen.print(
            f"stopped by {result.signal} after step {result.step}{rest}; continue with: "
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
