"""``qwen2kit eval``: benchmark a model through lm-eval, on either backend."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qwen2kit.cli.output import console, emit_json
from qwen2kit.errors import ConfigError, MissingExtra

if TYPE_CHECKING:
    from qwen2kit.backend.plan import ExecutionPlan
    from qwen2kit_evals.results import EvalResult
    from qwen2kit_evals.tasks import TaskSelection


def evaluate(
    model: Annotated[
        str | None, typer.Argument(help="Directory, GGUF file, run directory or hub id.")
    ] = None,
    tasks: Annotated[str, typer.Option(help="Tasks, groups or globs: mmlu,gsm8k,'bbh_*'.")] = "",
    backend: Annotated[str, typer.Option(help="torch, mlx or auto.")] = "auto",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto.")] = "auto",
    device: Annotated[str, typer.Option(help="A device of the backend; see doctor.")] = "auto",
    adapter: Annotated[
        str | None, typer.Option(help="LoRA adapter of the model: directory, run or hub id.")
    ] = None,
    limit: Annotated[
        float | None, typer.Option(help="Documents per task; below 1 a fraction.")
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(help="Examples per prompt; default each task's own.")
    ] = None,
    datasets: Annotated[
        Path | None, typer.Option(help="Data in Hub layout (DIR/org/name); nothing is fetched.")
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option(help="Directory of further lm-eval task files.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Prompts generated together.")] = 8,
    chat_template: Annotated[
        bool, typer.Option("--chat-template", help="Wrap prompts in the model's chat template.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option(help="New directory; default eval-results/<model>-<time>.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Of shots and sampling; default lm-eval's own seeds.")
    ] = None,
    list_tasks: Annotated[
        bool, typer.Option("--list", help="List the tasks whose data --datasets holds.")
    ] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Results as JSON on stdout.")] = False,
) -> None:
    """Evaluate a model on benchmark tasks; scores, settings and every sample are written."""
    _require_lm_eval()
    if list_tasks:
        _list(datasets, include_path, json_output)
        return
    if model is None:
        raise ConfigError("name a model: qwen2kit eval MODEL --tasks mmlu,gsm8k")
    if num_fewshot is not None and num_fewshot < 0:
        raise ConfigError(f"--num-fewshot must not be negative, got {num_fewshot}")
    from qwen2kit.backend.plan import ExecutionPlan
    from qwen2kit_evals.results import check_output
    from qwen2kit_evals.run import check_numbers, default_output
    from qwen2kit_evals.tasks import select_tasks

    plan = ExecutionPlan(device=device, dtype=dtype)
    check_numbers(limit, batch_size)
    directory = output or default_output(model)
    check_output(directory)
    with redirect_stdout(sys.stderr):  # task code may print; stdout is for the document
        selection = select_tasks(
            [tasks], datasets=datasets, num_fewshot=num_fewshot, include_path=include_path
        )
        for notice in selection.notices:
            console().print(f"note: {notice}", markup=False)
        result = _run(
            model,
            adapter,
            backend,
            plan,
            selection,
            limit=limit,
            batch_size=batch_size,
            apply_chat_template=chat_template,
            seed=seed,
            output=directory,
        )
    _report(result, already=len(selection.notices), json_output=json_output)


def _run(
    model: str,
    adapter: str | None,
    backend: str,
    plan: ExecutionPlan,
    selection: TaskSelection,
    **options: Any,
) -> EvalResult:
    from qwen2kit.backend.loading import load_model
    from qwen2kit_evals.run import evaluate as run

    loaded = load_model(model, backend=backend, plan=plan, adapter=adapter)
    return run(loaded, selection, **options)


def _report(result: EvalResult, *, already: int, json_output: bool) -> None:
    out = console()
    for notice in result.notices[already:]:
        out.print(f"note: {notice}", markup=False)
    out.print(result.table())
    out.print(f"written to {result.output}", markup=False)
    if json_output:
        from qwen2kit_evals.results import plain

        emit_json(plain(result.document()))


def _list(datasets: Path | None, include_path: Path | None, json_output: bool) -> None:
    from dataclasses import asdict

    from rich.table import Table

    from qwen2kit_evals.listing import available_tasks
    from qwen2kit_evals.local_data import LocalData
    from qwen2kit_evals.tasks import task_manager

    if datasets is None:
        raise ConfigError("--list shows what a data directory can serve; add --datasets DIR")
    offers = available_tasks(LocalData(datasets), task_manager(include_path))
    if json_output:
        emit_json([asdict(offer) for offer in offers])
        return
    table = Table(title=f"Tasks with data in {datasets}", title_justify="left")
    table.add_column("--tasks", no_wrap=True)
    table.add_column("tasks", justify="right")
    table.add_column("data")
    for offer in offers:
        table.add_row(offer.name, str(offer.tasks), ", ".join(offer.data))
    console().print(table)


def _require_lm_eval() -> None:
    from importlib.util import find_spec

    if find_spec("lm_eval") is None:
        raise MissingExtra("eval", "lm-eval")
