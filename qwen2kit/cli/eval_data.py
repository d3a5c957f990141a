"""``qwen2kit eval fetch`` and ``qwen2kit eval contamination``: the data behind the scores."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qwen2kit.cli.output import console, emit_json
from qwen2kit.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qwen2kit_evals.contamination import TaskContamination

Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]


def fetch(
    to: Annotated[Path, typer.Option(help="Directory for --datasets; what it holds is kept.")],
    suite: Annotated[str | None, typer.Option(help="qwen2-base or qwen2-instruct.")] = None,
    data: Annotated[
        list[str] | None, typer.Option("--data", help="A Hub data set, org/name; repeatable.")
    ] = None,
    json: Json = False,
) -> None:
    """Download evaluation data in Hub layout, for machines without network."""
    from dataclasses import asdict

    from qwen2kit_evals.fetch import fetch_data
    from qwen2kit_evals.suites import load_suite

    if (suite is None) == (not data):
        raise ConfigError("name --suite or --data, one of them")
    names = list(data or ())
    if suite is not None:
        names = [name for task in load_suite(suite).tasks if task.run for name in task.data]
    out = console()
    fetched = []
    for item in fetch_data(tuple(dict.fromkeys(names)), to):
        fetched.append(item)
        out.print(f"{item.name}: {item.problem or item.state}", markup=False)
    failed = [item for item in fetched if item.problem]
    if json:
        emit_json([asdict(item) for item in fetched])
    if failed:
        raise ConfigError(
            f"{len(failed)} of {len(fetched)} data sets could not be fetched: "
            f"{', '.join(item.name for item in failed)}; run it again to try these only"
        )
    out.print(f"evaluate with --datasets {to}", markup=False)


def contamination(
    train: Annotated[
        list[str],
        typer.Option(help="Training text: .txt, .jsonl, .json, .parquet or a directory of shards."),
    ],
    tasks: Annotated[str, typer.Option(help="Tasks, groups or globs: mmlu,gsm8k.")],
    datasets: Annotated[Path | None, typer.Option(help="Data in Hub layout.")] = None,
    include_path: Annotated[Path | None, typer.Option(help="Further lm-eval task files.")] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Model whose tokenizer reads token shards.")
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="For eval report --contamination.")
    ] = Path("contamination.json"),
    json: Json = False,
) -> None:
    """Look for test questions in training data: 13-grams, then longest common subsequence."""
    import sys
    from contextlib import redirect_stdout

    from qwen2kit_evals.contamination import check_contamination, write_contamination
    from qwen2kit_evals.question_texts import question_texts
    from qwen2kit_evals.tasks import select_tasks
    from qwen2kit_evals.train_texts import train_texts

    if output.exists():
        raise ConfigError(f"--output {output} already exists; name a new file")
    texts = train_texts(train, tokenizer)
    with redirect_stdout(sys.stderr):
        selection = select_tasks([tasks], datasets=datasets, include_path=include_path)
        found = check_contamination(texts, question_texts(selection))
    document = write_contamination(found, output, train=train)
    _print_contamination(found)
    console().print(f"written to {output}", markup=False)
    if json:
        emit_json(document)


def _print_contamination(found: Sequence[TaskContamination]) -> None:
    from rich.table import Table

    table = Table(title="Test questions found in the training data", title_justify="left")
    table.add_column("task", overflow="fold")
    for name in ("questions", "13-gram", "%", "LCS", "LCS nearby"):
        table.add_column(name, justify="right", no_wrap=True)
    for task in found:
        table.add_row(
            task.task,
            str(task.documents),
            str(len(task.ngram)),
            f"{100 * len(task.ngram) / task.documents:.1f}",
            str(len(task.lcs)),
            str(len(task.window)),
        )
    console().print(table)
