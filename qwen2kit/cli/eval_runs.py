"""``qwen2kit eval diff`` and ``qwen2kit eval report``: looking at finished runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qwen2kit.cli.output import console, emit_json

if TYPE_CHECKING:
    from qwen2kit_evals.diff import TaskDiff

_SHOWN_FLIPS = 8


def diff(
    first: Annotated[Path, typer.Argument(help="Directory of a finished run.")],
    second: Annotated[Path, typer.Argument(help="Directory of another.")],
    json: Annotated[bool, typer.Option("--json", help="All flips as JSON on stdout.")] = False,
) -> None:
    """Compare two runs sample by sample: flips, log-probabilities, p-values."""
    from dataclasses import asdict

    from qwen2kit_evals.diff import diff_runs
    from qwen2kit_evals.stored_run import read_run

    diffs = diff_runs(read_run(first), read_run(second))
    if json:
        emit_json(
            {"first": str(first), "second": str(second), "tasks": [asdict(diff) for diff in diffs]}
        )
    _print_scores(diffs, first, second)
    _print_answers(diffs)


def report(
    runs: Annotated[list[Path], typer.Argument(help="Directories of finished runs.")],
    output: Annotated[
        list[Path], typer.Option("--output", "-o", help="report.html or report.md; repeatable.")
    ],
    compare: Annotated[
        str | None, typer.Option(help="Show the published scores of this model: qwen2-7b, ...")
    ] = None,
    contamination: Annotated[
        Path | None, typer.Option(help="Result of eval contamination: scores of clean subsets.")
    ] = None,
    samples: Annotated[int, typer.Option(help="Samples per task and run in the browser.")] = 500,
) -> None:
    """Write one page: tables, bars against the paper and other runs, every sample."""
    from qwen2kit_evals.contamination import read_contamination
    from qwen2kit_evals.report import build_report, check_report_path, write_report
    from qwen2kit_evals.stored_run import read_run

    for path in output:
        check_report_path(path)
    found = build_report(
        [read_run(run) for run in runs],
        compare=compare,
        contamination=None if contamination is None else read_contamination(contamination),
        samples=samples,
    )
    for path in output:
        write_report(found, path)
        console().print(f"written to {path}", markup=False)


def _print_scores(diffs: tuple[TaskDiff, ...], first: Path, second: Path) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(f"A: {first}, B: {second}"), title_justify="left")
    table.add_column("task", overflow="fold")
    table.add_column("metric", overflow="fold")
    for name in ("n", "A", "B", "B - A (95 %)", "p", "flips"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in (row for diff in diffs for row in diff.metrics):
        gap = row.difference
        gained = sum(flip.gained for flip in row.flips)
        table.add_row(
            row.task,
            row.metric if row.filter == "none" else f"{row.metric} ({row.filter})",
            str(row.documents),
            f"{row.first:.3f}",
            f"{row.second:.3f}",
            f"{gap.delta:+.3f} ({gap.low:+.3f} {gap.high:+.3f})",
            f"{gap.p:.2g}" + ("" if gap.test == "mcnemar" else "*"),
            f"+{gained} -{len(row.flips) - gained}" if row.flips else "",
        )
    if any(row.difference.test != "mcnemar" for diff in diffs for row in diff.metrics):
        table.caption = "p: McNemar's exact test; * paired bootstrap"
    console().print(table)


def _print_answers(diffs: tuple[TaskDiff, ...]) -> None:
    out = console()
    for diff in diffs:
        parts = []
        if diff.logprobs:
            parts.append(
                f"{diff.logprobs} log-probabilities differ by {diff.mean_dlogp:.2e} on average, "
                f"{diff.max_dlogp:.2e} at most"
            )
        if diff.texts:
            parts.append(f"{diff.texts_differ} of {diff.texts} texts differ")
        if diff.prompts_differ:
            parts.append(f"{diff.prompts_differ} prompts differ")
        if diff.only_first or diff.only_second:
            parts.append(f"documents only in A: {diff.only_first}, only in B: {diff.only_second}")
        flips = dict.fromkeys((f.gained, f.doc_id) for row in diff.metrics for f in row.flips)
        if flips:
            shown = [f"{'+' if gained else '-'}{doc}" for gained, doc in list(flips)[:_SHOWN_FLIPS]]
            more = " ..." if len(flips) > _SHOWN_FLIPS else ""
            parts.append(f"flipped documents: {' '.join(shown)}{more}")
        out.print(f"{diff.task}: {'; '.join(parts)}", markup=False)
