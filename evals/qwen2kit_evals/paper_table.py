"""The comparison with the report, for people."""

from __future__ import annotations

from collections.abc import Sequence

from rich.markup import escape
from rich.table import Table

from qwen2kit_evals.paper import PaperRow
from qwen2kit_evals.suites import PROVENANCE, Figure


def paper_table(rows: Sequence[PaperRow], model: str) -> Table:
    """Scores in the report's scale (mostly percent); shots in parentheses."""
    table = Table(title=f"Beside the published scores of {model}", title_justify="left")
    table.add_column("benchmark")
    table.add_column("ours", justify="right", no_wrap=True)
    table.add_column("published", justify="right", no_wrap=True)
    table.add_column("known how")
    table.add_column("comparison", ratio=1)
    for row in rows:
        figure = row.published
        table.add_row(
            row.benchmark,
            _ours(row),
            "" if figure is None else _shots(f"{figure.value:g}", figure.shots),
            _known(figure),
            ("failed" if row.failed else "not run") if row.absent else escape(row.verdict),
        )
        for name, value in row.beside.items():
            table.add_row(f"  {name}", f"{value:.2f}", "", "", "same answers, other parser")
    return table


def _ours(row: PaperRow) -> str:
    if row.value is None:
        return "-"
    error = "" if row.stderr is None else f" ±{row.stderr:.2f}"
    return _shots(f"{row.value:.2f}{error}", row.shots)


def _shots(score: str, shots: int | None) -> str:
    return score if shots is None else f"{score} ({shots})"


def _known(figure: Figure | None) -> str:
    return "" if figure is None else PROVENANCE[figure.mark]
