"""From a suite to tasks with their data; what cannot run is kept, with the reason."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from lm_eval.tasks import TaskManager

from qwen2kit.errors import Qwen2KitError
from qwen2kit_evals.benchmarks import FAILED, BenchmarkScore, absent_score, benchmark_score
from qwen2kit_evals.failed_tasks import FailedTask
from qwen2kit_evals.local_data import LocalData
from qwen2kit_evals.metric_rows import MetricRow
from qwen2kit_evals.suites import SuiteTask, load_suite
from qwen2kit_evals.tasks import TaskSelection, select_tasks, task_manager


@dataclass(frozen=True, slots=True, kw_only=True)
class SuiteSelection:
    """Tasks to run one after the other, each with its own number of shots.

    Attributes:
        suite: name of the suite; None for tasks that were named one by one.
        tasks: the suite's benchmarks, each with its tasks or the reason why it cannot run.
        selections: the tasks to run.
        num_fewshot: shots asked for in place of the tasks' or the suite's own.
    """

    suite: str | None
    tasks: tuple[tuple[SuiteTask, TaskSelection | str], ...]
    selections: tuple[TaskSelection, ...]
    num_fewshot: int | None

    @classmethod
    def of(cls, selection: TaskSelection) -> Self:
        """Tasks without a suite."""
        return cls(suite=None, tasks=(), selections=(selection,), num_fewshot=selection.num_fewshot)

    @property
    def notices(self) -> tuple[str, ...]:
        """What was adapted to the data at hand, and what is left out."""
        adapted = [notice for selection in self.selections for notice in selection.notices]
        left_out = [
            f"{task.name} is not run: {found}"
            for task, found in self.tasks
            if isinstance(found, str)
        ]
        return tuple(dict.fromkeys([*adapted, *left_out]))

    @property
    def datasets(self) -> str | None:
        """The data directory; None is the Hub."""
        data = next((s.data for s in self.selections), None)
        return None if data is None else str(data.root)

    def scores(
        self, outcomes: Sequence[Sequence[MetricRow] | FailedTask]
    ) -> tuple[BenchmarkScore, ...]:
        """The suite's scores.

        Args:
            outcomes: rows of each of ``selections``, or why it has none.
        """
        left = iter(outcomes)
        return tuple(
            absent_score(task, found) if isinstance(found, str) else _score(task, next(left))
            for task, found in self.tasks
        )


def _score(task: SuiteTask, outcome: Sequence[MetricRow] | FailedTask) -> BenchmarkScore:
    if isinstance(outcome, FailedTask):
        return absent_score(task, FAILED + outcome.reason)
    return benchmark_score(task, outcome)


def select_suite(
    name: str,
    *,
    datasets: Path | str | None = None,
    num_fewshot: int | None = None,
    include_path: Path | str | None = None,
    manager: TaskManager | None = None,
) -> SuiteSelection:
    """Load the data of a suite's tasks; a task that cannot run is kept with the reason.

    Arguments are those of `select_tasks`.

    Raises:
        ConfigError: no such suite, or ``include_path`` is no directory.
        DataError: ``datasets`` is no directory.
    """
    suite = load_suite(name)
    if datasets is not None:
        LocalData(datasets)
    manager = manager or task_manager(include_path)
    tasks = tuple(
        (task, _select(task, datasets, num_fewshot, manager) if task.run else task.why)
        for task in suite.tasks
    )
    return SuiteSelection(
        suite=name,
        tasks=tasks,
        selections=tuple(found for _, found in tasks if not isinstance(found, str)),
        num_fewshot=num_fewshot,
    )


def _select(
    task: SuiteTask, datasets: Path | str | None, num_fewshot: int | None, manager: TaskManager
) -> TaskSelection | str:
    shots = task.shots if num_fewshot is None else num_fewshot
    try:
        return select_tasks([task.run], datasets=datasets, num_fewshot=shots, manager=manager)
    except Qwen2KitError as error:
        return str(error)
