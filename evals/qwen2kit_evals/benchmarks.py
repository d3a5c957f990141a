"""The score of a benchmark in the report's sense, taken from lm-eval's many rows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from qwen2kit_evals.metric_rows import MetricRow
from qwen2kit_evals.suites import Suite, SuiteTask

FAILED = "failed: "
"""Begins the reason why there is no score of a benchmark that was begun."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchmarkScore:
    """One benchmark (or part) of a suite: its score, or why there is none.

    Attributes:
        benchmark, part: names in the report.
        task: the lm-eval task, group or tag; empty if there is none.
        metric, filter: the score among the task's.
        shots: examples in the prompt; None if they differ between the task's members.
        value, stderr: in the report's scale (mostly percent); None without a score.
        samples: questions answered; 0 without a score.
        size: questions in the whole benchmark; 0 if not written down.
        differs: known differences from the report's protocol, besides shots and subset.
        beside: the same answers under other metrics.
        absent: why there is no score, one line; empty if there is one. Of a benchmark that was
            begun it starts with `FAILED`.
    """

    benchmark: str
    part: str = ""
    task: str = ""
    metric: str = ""
    filter: str = "none"
    shots: int | None = None
    value: float | None = None
    stderr: float | None = None
    samples: int = 0
    size: int = 0
    differs: Sequence[str] = ()
    beside: Mapping[str, float] = field(default_factory=dict)
    absent: str = ""

    @property
    def name(self) -> str:
        """``benchmark`` or ``benchmark: part``."""
        return f"{self.benchmark}: {self.part}" if self.part else self.benchmark


def absent_score(task: SuiteTask, reason: str) -> BenchmarkScore:
    """The entry of a benchmark that was not run."""
    return BenchmarkScore(
        benchmark=task.benchmark,
        part=task.part,
        task=task.run,
        metric=task.metric,
        filter=task.filter,
        shots=task.shots,
        size=task.size,
        differs=task.differs,
        absent=reason,
    )


def benchmark_score(task: SuiteTask, rows: Sequence[MetricRow]) -> BenchmarkScore:
    """The score of ``task`` from the ``rows`` that running it gave.

    A tag has no row of its own; its score is the mean over its members, of equal weight.
    """
    entry = absent_score(task, "")
    found = _rows(rows, task.run, task.metric, task.filter)
    values = [row.value for row in found if row.value is not None]
    if not values or len(values) < len(found):
        return replace(entry, absent=f"the run gave no {task.metric} ({task.filter})")
    shots = {row.shots for row in rows if not row.group}
    return replace(
        entry,
        shots=shots.pop() if len(shots) == 1 else None,
        value=_mean(values) * task.scale,
        stderr=_stderr([row.stderr for row in found], task.scale),
        samples=_samples(found, rows),
        beside={
            name: _mean(known) * task.scale
            for name in task.beside
            if (
                known := [
                    r.value for r in _rows(rows, task.run, name, task.filter) if r.value is not None
                ]
            )
        },
    )


def recognised(rows: Sequence[MetricRow], suite: Suite) -> tuple[BenchmarkScore, ...]:
    """The suite's benchmarks among rows of a run that named its tasks itself.

    Other tasks of the same benchmark count too, with what makes them differ.
    """
    names = {row.task for row in rows}
    found = []
    for task in suite.tasks:
        for name, notes in {task.run: task.differs, **task.near}.items():
            if name in names:
                own = name == task.run
                chosen = task if own else replace(task, run=name, differs=notes, beside=())
                metric = chosen if own else _own_metric(chosen, rows)
                found.append(benchmark_score(metric, _family(rows, name)))
    return tuple(found)


def _own_metric(task: SuiteTask, rows: Sequence[MetricRow]) -> SuiteTask:
    """``task`` with its metric, or the first of its rows where it has no such metric."""
    mine = [row for row in rows if row.task == task.run]
    if any((row.metric, row.filter) == (task.metric, task.filter) for row in mine):
        return task
    return replace(task, metric=mine[0].metric, filter=mine[0].filter)


def _family(rows: Sequence[MetricRow], name: str) -> list[MetricRow]:
    """The rows of ``name`` and, deeper below them, of its members."""
    found: list[MetricRow] = []
    for row in rows:
        if row.task == name or (found and row.depth > found[0].depth):
            found.append(row)
        elif found:
            break
    return found


def _rows(rows: Iterable[MetricRow], run: str, metric: str, filter: str) -> list[MetricRow]:
    kept = [row for row in rows if (row.metric, row.filter) == (metric, filter)]
    own = [row for row in kept if row.task == run]
    return own or [row for row in kept if row.depth == 0]


def _samples(found: Sequence[MetricRow], rows: Sequence[MetricRow]) -> int:
    """Documents behind ``found``; of a group, those of its tasks."""
    if all(row.samples is not None for row in found):
        return sum(row.samples or 0 for row in found)
    return sum({row.task: row.samples or 0 for row in rows if not row.group}.values())


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _stderr(errors: Sequence[float | None], scale: float) -> float | None:
    """Standard error of the mean of independent scores."""
    known = [error for error in errors if error is not None]
    if not known or len(known) < len(errors):
        return None
    return scale * math.sqrt(sum(error**2 for error in known)) / len(known)
