"""Scores as rows: one number of one task, flattened from lm-eval's nested report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricRow:
    """One number.

    Attributes:
        task: task or group name.
        group: whether it sums up other rows.
        depth: nesting below the name that was asked for, for display.
        metric, filter: lm-eval's metric and the answer filter it was computed through.
        value: the score; None if undefined.
        stderr: its standard error, where lm-eval gives one.
        samples: documents behind the number.
        shots: examples in each prompt, None for groups that mix.
    """

    task: str
    group: bool
    depth: int
    metric: str
    filter: str
    value: float | None
    stderr: float | None
    samples: int | None
    shots: int | None


def metric_rows(report: Mapping[str, Any]) -> tuple[MetricRow, ...]:
    """Rows of lm-eval's result dictionary, groups followed by their members."""
    members: Mapping[str, Sequence[str]] = report.get("group_subtasks", {})
    children = {child for names in members.values() for child in names}
    results = dict(report["results"]) | dict(report.get("groups") or {})
    rows: list[MetricRow] = []
    seen: set[str] = set()

    def add(name: str, depth: int) -> None:
        if name in seen:
            return
        seen.add(name)
        rows.extend(_rows_of(name, depth, results.get(name, {}), report))
        for child in members.get(name, ()):
            add(child, depth + 1)

    for name in (*(n for n in members if n not in children), *results):
        add(name, 0)
    return tuple(rows)


def _rows_of(
    name: str, depth: int, values: Mapping[str, Any], report: Mapping[str, Any]
) -> list[MetricRow]:
    count = report.get("n-samples", {}).get(name, {}).get("effective", values.get("sample_len"))
    found = []
    for key, value in values.items():
        metric, comma, chosen = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        found.append(
            MetricRow(
                task=name,
                group=bool(report.get("group_subtasks", {}).get(name)),
                depth=depth,
                metric=metric,
                filter=chosen,
                value=number(value),
                stderr=number(values.get(f"{metric}_stderr,{chosen}")),
                samples=None if count is None else int(count),
                shots=report.get("n-shot", {}).get(name),
            )
        )
    return found


def number(value: Any) -> float | None:
    """``value`` as a finite float; None for text, NaN and infinities."""
    if isinstance(value, bool) or not hasattr(value, "__float__"):
        return float(value) if isinstance(value, bool) else None
    number = float(value)
    return number if math.isfinite(number) else None
