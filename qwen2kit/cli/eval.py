"""``qwen2kit eval``: benchmark a model through lm-eval, on either backend."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qwen2kit.cli.default_command import DEFAULT, DefaultCommandGroup
from qwen2kit.cli.eval_code import Consent, Weak, code, code_runner
from qwen2kit.cli.eval_data import contamination, fetch
from qwen2kit.cli.eval_judge import judge
from qwen2kit.cli.eval_list import list_offers
from qwen2kit.cli.eval_needle import needle, perplexity
from qwen2kit.cli.eval_runs import diff, report
from qwen2kit.cli.eval_team import answer_for, join, launch, one_voice, team_of
from qwen2kit.cli.model_options import Adapter, BackendName, DeviceName, DType, OptionalModel
from qwen2kit.cli.output import console, emit_json, show_notes
from qwen2kit.errors import ConfigError, DataError, MissingExtra

if TYPE_CHECKING:
    from qwen2kit.backend.loading import LoadedModel
    from qwen2kit_evals.job import Job
    from qwen2kit_evals.results import EvalResult

evaluation = typer.Typer(
    cls=DefaultCommandGroup,
    help="Evaluate a model on benchmark tasks; scores, settings and every sample are written.",
    rich_markup_mode=None,
)


@evaluation.command(DEFAULT)
def evaluate(
    model: OptionalModel = None,
    tasks: Annotated[str, typer.Option(help="Tasks, groups or globs: mmlu,gsm8k,'bbh_*'.")] = "",
    suite: Annotated[
        str | None, typer.Option(help="qwen2-base or qwen2-instruct: the report's benchmarks.")
    ] = None,
    compare: Annotated[
        str | None, typer.Option(help="Show the published scores of this model: qwen2-7b, ...")
    ] = None,
    backend: BackendName = "auto",
    dtype: DType = "auto",
    device: DeviceName = "auto",
    adapter: Adapter = None,
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
    batch_size: Annotated[
        int | None, typer.Option(help="Prompts generated together; default what suits the device.")
    ] = None,
    chat_template: Annotated[
        bool, typer.Option("--chat-template", help="Wrap prompts in the model's chat template.")
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(help="Directory, new or of an interrupted run; default eval-results/..."),
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(help="Go on with the interrupted run in this directory.")
    ] = None,
    nproc: Annotated[
        int | None, typer.Option(min=1, help="Processes of this machine (one per GPU).")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Of shots and sampling; default lm-eval's own seeds.")
    ] = None,
    list_tasks: Annotated[
        bool, typer.Option("--list", help="List suites and tasks: which data --datasets holds.")
    ] = False,
    allow_code_execution: Consent = False,
    weak_sandbox: Weak = False,
    json_output: Annotated[bool, typer.Option("--json", help="Results as JSON on stdout.")] = False,
) -> None:
    """Evaluate a model (the word run may be left out)."""
    _require_lm_eval()
    if list_tasks:
        list_offers(datasets, include_path, json_output)
        return
    if resume is not None:
        job, directory = _resumed(resume, model, tasks, suite)
    else:
        if model is None:
            raise ConfigError("name a model: qwen2kit eval MODEL --tasks mmlu,gsm8k")
        from qwen2kit_evals.job import Job, absolute
        from qwen2kit_evals.results import default_output

        directory = output or default_output(model)
        job = Job(
            model=str(absolute(model)) if Path(model).exists() else model,
            tasks=tasks,
            suite=suite,
            compare=compare,
            backend=backend,
            dtype=dtype,
            device=device,
            adapter=absolute(adapter) if adapter and Path(adapter).exists() else adapter,
            limit=limit,
            num_fewshot=num_fewshot,
            datasets=absolute(datasets),
            include_path=absolute(include_path),
            batch_size=batch_size,
            chat_template=chat_template,
            seed=seed,
        )
    if nproc is not None:
        options = {
            "--json": json_output,
            "--allow-code-execution": allow_code_execution,
            "--weak-sandbox": weak_sandbox,
        }
        flags = [flag for flag, given in options.items() if given]
        raise typer.Exit(launch(job, directory, nproc, flags))
    from qwen2kit_evals.code_eval import code_execution

    with one_voice(), code_execution(code_runner(allow_code_execution, weak_sandbox)):
        result = _run(job, directory)
    if result is not None:
        _report(job, result, json_output=json_output)


evaluation.command("diff")(diff)
evaluation.command("report")(report)
evaluation.command("fetch")(fetch)
evaluation.command("contamination")(contamination)
evaluation.command("code")(code)
evaluation.command("needle")(needle)
evaluation.command("perplexity")(perplexity)
evaluation.command("judge")(judge)


def _resumed(directory: Path, model: str | None, tasks: str, suite: str | None) -> tuple[Job, Path]:
    from qwen2kit_evals.job import read_job

    if model or tasks or suite:
        raise ConfigError("--resume repeats the run's own options; leave model and tasks out")
    job, results = read_job(directory), directory / "results.json"
    if results.exists():
        raise ConfigError(f"{directory} is finished, nothing to do; its scores are in {results}")
    return job, directory


def _run(job: Job, directory: Path) -> EvalResult | None:
    """Process 0's result; None on the others."""
    from qwen2kit.backend.loading import load_model
    from qwen2kit.backend.plan import ExecutionPlan
    from qwen2kit_evals.run import evaluate as run

    plan = ExecutionPlan(device=job.device, dtype=job.dtype)

    def load() -> LoadedModel:
        return load_model(job.model, backend=job.backend, plan=plan, adapter=job.adapter)

    processes = join(job)
    if processes.rank:
        answer_for(processes, load, job)
        processes.close()
        return None
    job.check(directory)
    with redirect_stdout(sys.stderr):  # task code may print; stdout is for the document
        selection = job.select()
        show_notes(selection.notices)
        loaded = load()
        show_notes(loaded.notes)
        job.begin(directory)
        with team_of(processes, directory) as team:
            result = run(
                loaded,
                selection,
                limit=job.limit,
                batch_size=job.batch_size,
                apply_chat_template=job.wraps_in_chat_template,
                seed=job.seed,
                output=directory,
                team=team,
            )
    processes.close()
    show_notes(result.notices[len(selection.notices) :])
    return result


def _report(job: Job, result: EvalResult, *, json_output: bool) -> None:
    from dataclasses import asdict

    from qwen2kit_evals.results import plain

    out = console()
    out.print(result.table())
    document = plain(result.document())
    if job.compare is not None:
        from qwen2kit_evals.paper import paper_rows
        from qwen2kit_evals.paper_table import paper_table

        rows = paper_rows(document, job.compare)
        out.print(paper_table(rows, job.compare))
        document["compared_with"] = job.compare
        document["comparison"] = [
            plain(asdict(row)) | {"comparable": row.comparable, "verdict": row.verdict}
            for row in rows
        ]
    out.print(f"written to {result.output}", markup=False)
    if json_output:
        emit_json(document)
    if result.failed:
        named = "; ".join(f"{task.task}: {task.reason}" for task in result.failed)
        raise DataError(f"no scores of {named} (the others are written)")


def _require_lm_eval() -> None:
    from importlib.util import find_spec

    if find_spec("lm_eval") is None:
        raise MissingExtra("eval", "lm-eval")
