"""``qwen2kit eval judge``: open answers, graded or compared by a language model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qwen2kit.cli.eval_model import BatchSize, Json, Output, load
from qwen2kit.cli.model_options import Adapter, BackendName, DeviceName, DType, Model
from qwen2kit.cli.output import console, emit_json

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


def judge(
    model: Model,
    questions: Annotated[
        Path, typer.Option(help="JSONL file: MT-Bench, Arena-Hard or AlignBench fields.")
    ],
    judge_url: Annotated[
        str, typer.Option(help="OpenAI-compatible server, e.g. http://localhost:8000/v1.")
    ],
    judge_model: Annotated[str, typer.Option(help="The judge's name on that server.")],
    baseline: Annotated[
        Path | None,
        typer.Option(help="Answers to compare with (samples.jsonl of a run); default: grades."),
    ] = None,
    judge_workers: Annotated[int, typer.Option(min=1, help="Requests at the same time.")] = 4,
    judge_max_tokens: Annotated[int, typer.Option(min=1, help="Of a judgment.")] = 1024,
    max_tokens: Annotated[int, typer.Option(min=1, help="Of an answer.")] = 1024,
    temperature: Annotated[float, typer.Option(help="Of the model's answers; 0 is greedy.")] = 0.0,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first questions.")] = None,
    backend: BackendName = "auto",
    dtype: DType = "auto",
    device: DeviceName = "auto",
    adapter: Adapter = None,
    batch_size: BatchSize = None,
    output: Output = None,
    json_output: Json = False,
) -> None:
    """Have the model answer open questions and another model judge the answers.

    The judge's key is read from the environment variable QWEN2KIT_JUDGE_KEY. Comparisons are made
    twice, with the answers swapped.
    """
    from qwen2kit_evals.judge.client import JudgeServer, key_from_environment
    from qwen2kit_evals.judge.questions import read_answers, read_questions

    server = JudgeServer(
        url=judge_url, model=judge_model, key=key_from_environment(), max_tokens=judge_max_tokens
    )
    asked = read_questions(questions)[:limit]
    other = None if baseline is None else read_answers(baseline)
    loaded = load(model, backend=backend, dtype=dtype, device=device, adapter=adapter)
    from qwen2kit_evals.judge.run import answer_questions, judge_answers, sample_rows, summary
    from qwen2kit_evals.results import default_output
    from qwen2kit_evals.run_directory import RunDirectory, settings_of

    gen_kwargs: dict[str, Any] = {"until": [], "max_gen_toks": max_tokens, "do_sample": False}
    if temperature > 0:
        gen_kwargs |= {"do_sample": True, "temperature": temperature}
    settings = settings_of(
        "judge", loaded, questions=str(questions.resolve()), limit=limit, answers=gen_kwargs,
        baseline=None if baseline is None else str(baseline.resolve()), judge_url=judge_url,
        judge_model=judge_model, judge_max_tokens=judge_max_tokens,
    )  # fmt: skip
    with RunDirectory(output or default_output(model, "judge"), settings) as run:
        answers = answer_questions(loaded, asked, gen_kwargs, log=run.log, batch_size=batch_size)
        judgments = judge_answers(
            server, asked, answers, baseline=other, log=run.log, workers=judge_workers
        )
        document: dict[str, Any] = {
            "scores": summary(judgments),
            "metric": "grade from 1 to 10" if other is None else "win rate",
            "settings": settings,
            "output": str(run.path),
        }
        run.finish(document, sample_rows(asked, answers, judgments))
    _print(document["scores"], document["metric"])
    console().print(f"written to {run.path}", markup=False)
    if json_output:
        emit_json(document)


def _print(scores: Sequence[Mapping[str, Any]], metric: str) -> None:
    from rich.table import Table

    table = Table(title=f"Judged answers: {metric}", title_justify="left")
    table.add_column("")
    for name in ("value", "stderr", "questions", "unreadable", "consistent"):
        table.add_column(name, justify="right")
    for score in scores:
        table.add_row(
            f"{score['kind']} {score['of']}".strip(),
            _number(score["value"]),
            _number(score["stderr"]),
            str(score["questions"]),
            str(score["unreadable"]),
            _number(score.get("consistent")),
        )
    console().print(table)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
