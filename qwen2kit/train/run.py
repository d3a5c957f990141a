"""One training run from recipe to exported model: start it, resume it, or whichever applies.

Every process of a run calls the same function; process 0 prepares the run directory (see
`qwen2kit.train.run_dir`) and the others read it.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen2kit.backend.processes import Processes
from qwen2kit.config.freeze import differences, to_tree
from qwen2kit.config.load import load_recipe, override, parse
from qwen2kit.config.tree import RunConfig
from qwen2kit.directory_lock import locked
from qwen2kit.errors import ConfigError, TrainingError
from qwen2kit.train.agreement import on_first, together
from qwen2kit.train.phases import phases
from qwen2kit.train.run_dir import (
    RUN_FILE,
    RunResult,
    fresh_directory,
    is_fresh,
    read_origin,
    read_run,
    write_origin,
)
from qwen2kit.train.runner import Runner
from qwen2kit.train.setup import build_origin, join
from qwen2kit.train.trackers import check_trackers

if TYPE_CHECKING:
    from rich.console import Console

FREE_FIELDS = ("checkpoint.", "logging.", "parallel.", "output_dir", "eval.every")
"""What a resumed run may do differently: none of it changes what is learned."""

FIXED_FIELDS = ("model.", "adapter")
"""What no resumed run can do differently, `MOVABLE_FIELDS` apart: its weights and tokenizer are
there already."""

MOVABLE_FIELDS = ("model.checkpoint", "adapter.dropout")
"""Fields of the model that only the steps to come depend on: an adapter's base may have moved."""


def start(
    config: RunConfig, *, run_dir: Path | None = None, console: Console | None = None
) -> RunResult:
    """Train as ``config`` says in a new run directory.

    Args:
        run_dir: an absent or empty directory; None makes one under ``config.output_dir``.
        console: where progress is shown; None is silent.

    Raises:
        Qwen2KitError: of the kind that says what is wrong; ``run.json`` then says ``failed``.
        PeerError: another process failed, and says so itself.
    """
    processes = _join(config)
    with ExitStack() as held:
        directory = Path(on_first(processes, lambda: _new_run(config, run_dir, processes, held)))
        return _runner(config, directory, processes, console).run(resuming=False)


def resume(
    run_dir: Path,
    *,
    config: RunConfig | None = None,
    allow_changes: bool = False,
    console: Console | None = None,
) -> RunResult:
    """Continue a run after its newest intact checkpoint, on any number of processes.

    Args:
        config: the recipe to go on with; None takes the run's own.
        allow_changes: accept a recipe that differs from the run's in more than `FREE_FIELDS`, but
            not in `FIXED_FIELDS` (`MOVABLE_FIELDS` apart).

    Raises:
        ConfigError: not a run directory, or the recipe differs (the message lists the fields).
        TrainingError: the run is finished, or no checkpoint is intact.
        PeerError: another process failed, and says so itself.
    """
    stored = read_run(run_dir)
    config = config or recipe_of(run_dir)
    processes = _join(config)
    together(processes, lambda: _check_resumable(run_dir, stored, config, allow_changes))
    with ExitStack() as held:
        on_first(processes, lambda: _claim(run_dir, held))
        return _runner(config, run_dir, processes, console).run(resuming=True)


def start_or_resume(
    config: RunConfig, run_dir: Path, *, console: Console | None = None
) -> RunResult:
    """Start the run of ``run_dir`` or continue it: what a scheduler may call again and again.

    A finished run is left alone and its result returned.

    Raises:
        ConfigError: ``run_dir`` holds something else, or a run of another recipe.
        Qwen2KitError: as `start` and `resume`.
    """
    processes = _join(config)
    with ExitStack() as held:
        fresh = on_first(processes, lambda: is_fresh(run_dir))
        if fresh:
            on_first(processes, lambda: _new_run(config, run_dir, processes, held))
        else:
            on_first(processes, lambda: _claim(run_dir, held))
            stored = together(processes, lambda: read_run(run_dir))
            if stored["status"] == "finished":
                together(processes, lambda: _check_recipe(run_dir, stored, config))
                processes.close()
                return RunResult.of_finished(run_dir, stored, reports=processes.rank == 0)
            together(processes, lambda: _check_resumable(run_dir, stored, config, False))
        return _runner(config, run_dir, processes, console).run(resuming=not fresh)


def recipe_of(run_dir: Path, recipe: str | None = None, overrides: Sequence[str] = ()) -> RunConfig:
    """What a resume goes on with: ``recipe`` or else the run's own, with overrides.

    Raises:
        ConfigError: not a run directory, or as in `load_recipe`.
    """
    if recipe is not None:
        return load_recipe(recipe, overrides)
    tree = read_run(run_dir)["provenance"]["config"]
    return parse(override(tree, overrides), source=f"{run_dir}/{RUN_FILE}")


def check_new(run_dir: Path) -> None:
    """Raise ConfigError if a new run cannot begin in ``run_dir``."""
    if not is_fresh(run_dir):
        raise ConfigError(f"{run_dir} is not empty; choose another --run-dir or use --resume")


def _join(config: RunConfig) -> Processes:
    """The processes of the run; process 0 must have what it is to write with."""
    processes = join(config)
    on_first(processes, partial(check_trackers, config.logging))
    return processes


def _new_run(config: RunConfig, run_dir: Path | None, processes: Processes, held: ExitStack) -> str:
    """Everything that can be refused is refused before the directory appears."""
    if run_dir is not None:
        check_new(run_dir)
    origin = build_origin(config)
    phases(config, origin.spec, processes.world)
    if run_dir is None:
        run_dir = fresh_directory(config)
    run_dir.mkdir(parents=True, exist_ok=True)
    _claim(run_dir, held)
    check_new(run_dir)  # another process may have been faster
    write_origin(run_dir, origin)
    return str(run_dir)


def _claim(run_dir: Path, held: ExitStack) -> None:
    """Keep other processes from training in ``run_dir`` until ``held`` is closed."""
    taken = TrainingError(f"{run_dir} is being trained by another process; wait for it or end it")
    held.enter_context(locked(run_dir, taken))


def _check_resumable(
    run_dir: Path, stored: dict[str, Any], config: RunConfig, allow_changes: bool
) -> None:
    if allow_changes:
        _check_fixed(run_dir, stored, config)
        return
    if stored["status"] == "finished":
        raise TrainingError(f"{run_dir} is finished after {stored['step']} steps: nothing to do")
    _check_recipe(run_dir, stored, config)


def _check_fixed(run_dir: Path, stored: dict[str, Any], config: RunConfig) -> None:
    changed = [
        field
        for field in differences(stored["provenance"]["config"], to_tree(config))
        if field.startswith(FIXED_FIELDS) and field not in MOVABLE_FIELDS
    ]
    if changed:
        raise ConfigError(
            f"{run_dir} has its model already, which {', '.join(changed)} cannot change any more; "
            "undo that or start a new run"
        )


def _check_recipe(run_dir: Path, stored: dict[str, Any], config: RunConfig) -> None:
    changed = [
        field
        for field in differences(stored["provenance"]["config"], to_tree(config))
        if not field.startswith(FREE_FIELDS)
    ]
    if changed:
        raise ConfigError(
            f"the recipe differs from that of {run_dir} in {', '.join(changed)}; drop the changes "
            "or pass --allow-changes"
        )


def _runner(
    config: RunConfig, run_dir: Path, processes: Processes, console: Console | None
) -> Runner:
    origin = together(processes, lambda: read_origin(run_dir))
    return Runner(config, run_dir, origin, processes, console if processes.rank == 0 else None)
