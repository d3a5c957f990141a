"""Evaluate a loaded model on lm-eval tasks."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.api.model import LM
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

from qwen2kit.backend.loading import LoadedModel
from qwen2kit.errors import ConfigError, TokenizerError
from qwen2kit_evals.code_eval import active, execution_notice, run_ahead, with_outcomes
from qwen2kit_evals.failed_tasks import FailedTask, TasksFailed, run_the_rest
from qwen2kit_evals.harness import Qwen2KitLM
from qwen2kit_evals.local_data import local_datasets
from qwen2kit_evals.metric_rows import metric_rows
from qwen2kit_evals.prompt_templates import compiled_once
from qwen2kit_evals.provenance import answers_digest, model_provenance
from qwen2kit_evals.quiet import quiet_lm_eval
from qwen2kit_evals.request_log import FILE as LOG_FILE
from qwen2kit_evals.request_log import RequestLog
from qwen2kit_evals.results import EvalResult, check_output, plain, sample_rows, write_results
from qwen2kit_evals.suite_tasks import SuiteSelection
from qwen2kit_evals.tasks import TaskSelection, select_tasks
from qwen2kit_evals.team import Team

Outcome = tuple[dict[str, Any] | None, tuple[FailedTask, ...]]


def evaluate(
    loaded: LoadedModel,
    tasks: TaskSelection | SuiteSelection | Sequence[str],
    *,
    limit: float | None = None,
    num_fewshot: int | None = None,
    datasets: Path | str | None = None,
    batch_size: int | None = None,
    apply_chat_template: bool = False,
    seed: int | None = None,
    log_samples: bool = True,
    output: Path | None = None,
    team: Team | None = None,
) -> EvalResult:
    """Run ``tasks`` and, with ``output``, write results.json and samples_<task>.jsonl there.

    With ``output``, every answer is also logged there at once (`request_log`). If that directory
    holds the log of an interrupted run, the answers in it are not computed again.

    Args:
        loaded: the model.
        tasks: names, or what `select_tasks` or `select_suite` made of them (``num_fewshot`` and
            ``datasets`` are then the selection's own and must not be given again).
        limit: documents per task; below 1 a fraction.
        num_fewshot: examples in the prompt in place of each task's own number.
        datasets: directory of data in Hub layout; None is the Hub.
        batch_size: prompts generated together; None is what keeps the device busy.
        apply_chat_template: put prompts (shots as turns) into the model's chat template.
        seed: of shots and sampling; None takes lm-eval's defaults, for comparable scores.
        log_samples: keep every prompt and answer.
        output: a directory that does not exist yet, or holds an unfinished run.
        team: other processes that answer a part of the requests.

    A task with a request that the model cannot be asked (an answer longer than its context) has no
    scores, and the others go on; it is in the result's ``failed``.

    Raises:
        Qwen2KitError: an unknown task, absent data, a missing package, a bad value.
        TasksFailed: every task fails.
    """
    _check_arguments(loaded, limit, batch_size, apply_chat_template, output)
    if not isinstance(tasks, SuiteSelection):
        tasks = SuiteSelection.of(_selection(tasks, num_fewshot, datasets))
    model = Qwen2KitLM(
        loaded, batch_size=batch_size or "auto", seed=DEFAULT_OTHER_SEED if seed is None else seed
    )
    model.team = team
    about = model_provenance(loaded)
    started = time.perf_counter()
    path = None if output is None else output / LOG_FILE
    with RequestLog(path, answers_digest(about)) as model.log:
        outcomes = list(
            _outcomes(
                model,
                tasks,
                limit=limit,
                apply_chat_template=apply_chat_template,
                seed=seed,
                log_samples=log_samples,
            )
        )
    reports = [report for report, _ in outcomes if report is not None]
    failed = tuple(task for _, some in outcomes for task in some)
    if failed and not reports:
        raise TasksFailed({task.task: task.reason for task in failed})
    rows = [metric_rows(report) for report in reports]
    settings = _merged(reports) | {
        "tasks": [name for selection in tasks.selections for name in selection.names],
        "suite": tasks.suite,
        "num_fewshot": tasks.num_fewshot,
        "limit": limit,
        "batch_size": model.batch_size,
        "chat_template": apply_chat_template,
        "seeds": lm_eval_seeds(seed),
        "datasets": tasks.datasets,
        "max_length": model.max_length,
        "truncated_requests": model.truncated,
        "code_execution": None if (code := active()) is None else code.document(),
        "requests": {"answered": model.answered, "from_log": model.log.reused},
        "seconds": round(time.perf_counter() - started, 3),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    result = EvalResult(
        rows=tuple(row for some in rows for row in some),
        provenance=plain({"model": about, "evaluation": settings}),
        notices=(*tasks.notices, *_truncation_notice(model), *_execution_notice()),
        samples={
            task: with_outcomes(sample_rows(logged), active())
            for report in reports
            for task, logged in report.get("samples", {}).items()
        },
        failed=failed,
        benchmarks=tasks.scores(
            [some[0] if report is None else metric_rows(report) for report, some in outcomes]
        ),
        output=output,
    )
    if output is not None:
        write_results(result, output)
    return result


def _outcomes(model: Qwen2KitLM, tasks: SuiteSelection, **options: Any) -> Iterator[Outcome]:
    """Each selection's report and failed tasks; the progress bars say which one is running."""

    def run(selection: TaskSelection) -> dict[str, Any]:
        truncated = model.truncated
        try:
            return run_tasks(model, selection, **options)
        except TasksFailed:
            model.truncated = truncated  # they will be counted again
            raise

    count = len(tasks.selections)
    for number, selection in enumerate(tasks.selections, 1):
        if tasks.suite is not None:
            model.label = f"{', '.join(selection.names)} ({number} of {count}), "
        yield run_the_rest(run, selection, whole=tasks.suite is not None)


def _merged(reports: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Versions and shots of all tasks."""
    kept = {"task_versions": "versions", "shots": "n-shot"}
    return {
        ours: {task: value for report in reports for task, value in report[theirs].items()}
        for ours, theirs in kept.items()
    }


def run_tasks(
    model: LM,
    selection: TaskSelection,
    *,
    limit: float | None = None,
    apply_chat_template: bool = False,
    seed: int | None = None,
    log_samples: bool = True,
) -> dict[str, Any]:
    """lm-eval's own report of any lm-eval model (ours, or ``hf`` to compare with) on a selection.

    Arguments are those of `evaluate`.
    """
    for task in selection.objects:
        run_ahead(task)
    with local_datasets(selection.data), quiet_lm_eval(), compiled_once():
        report: dict[str, Any] = simple_evaluate(
            model,
            tasks=list(selection.objects),
            task_manager=selection.manager,
            num_fewshot=selection.num_fewshot,
            limit=limit,
            log_samples=log_samples,
            apply_chat_template=apply_chat_template,
            confirm_run_unsafe_code=active() is not None,
            **lm_eval_seeds(seed),
        )
    return report


def check_numbers(limit: float | None, batch_size: int | None) -> None:
    """Refuse values out of range.

    Raises:
        ConfigError: ``limit`` is not above 0 (from 1 on it counts documents, so must be whole),
            or ``batch_size`` is below 1.
    """
    if limit is not None and (not limit > 0 or (limit >= 1 and limit != int(limit))):
        raise ConfigError(f"limit must be a fraction below 1 or a whole number, got {limit}")
    if batch_size is not None and batch_size < 1:
        raise ConfigError(f"batch_size must be at least 1, got {batch_size}")


def _check_arguments(
    loaded: LoadedModel,
    limit: float | None,
    batch_size: int | None,
    apply_chat_template: bool,
    output: Path | None,
) -> None:
    check_numbers(limit, batch_size)
    if apply_chat_template and loaded.tokenizer.chat_template is None:
        raise TokenizerError("the model has no chat template; leave --chat-template out")
    if output is not None:
        check_output(output)


def _selection(
    tasks: TaskSelection | Sequence[str], num_fewshot: int | None, datasets: Path | str | None
) -> TaskSelection:
    if not isinstance(tasks, TaskSelection):
        names = [tasks] if isinstance(tasks, str) else tasks
        return select_tasks(names, datasets=datasets, num_fewshot=num_fewshot)
    if num_fewshot is not None or datasets is not None:
        raise ConfigError("num_fewshot and datasets belong to select_tasks when it was used")
    return tasks


def lm_eval_seeds(seed: int | None) -> dict[str, int]:
    """lm-eval's four seeds: all ``seed``, or its own defaults for None."""
    other = DEFAULT_OTHER_SEED if seed is None else seed
    return {
        "random_seed": DEFAULT_RANDOM_SEED if seed is None else seed,
        "numpy_random_seed": other,
        "torch_random_seed": other,
        "fewshot_random_seed": other,
    }


def _execution_notice() -> tuple[str, ...]:
    code = active()
    return () if code is None or not code.outcomes() else (execution_notice(code),)


def _truncation_notice(model: Qwen2KitLM) -> tuple[str, ...]:
    if not model.truncated:
        return ()
    return (
        f"{model.truncated} prompts were longer than the context of {model.max_length} tokens "
        "and lost their beginning",
    )
