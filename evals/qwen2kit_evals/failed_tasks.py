"""Tasks that a model cannot be asked, such as those whose answers do not fit its context.

The others go on without them: lm-eval runs all tasks of a call together, so the call is made again
without what failed, and answers that are known already come from the log.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from qwen2kit.errors import ConfigError, DataError
from qwen2kit_evals.tasks import TaskSelection

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class FailedTask:
    """A task or group without scores.

    Attributes:
        task: as it was asked for.
        reason: why, one line.
    """

    task: str
    reason: str


class TasksFailed(DataError):
    """Tasks have requests that the model cannot answer.

    Attributes:
        reasons: the first one of each task, by lm-eval's name of it.
    """

    def __init__(self, reasons: Mapping[str, str]) -> None:
        (task, reason), *more = reasons.items()
        named = f"task {task}: {reason}" if task else reason
        super().__init__(f"{named} (and {len(more)} more tasks)" if more else named)
        self.reasons = dict(reasons)


def for_each(
    tasks: Sequence[str], items: Iterable[tuple[Any, ...]], make: Callable[..., T]
) -> list[T]:
    """``make(*item)`` of every item.

    Args:
        tasks: the task of each item.

    Raises:
        TasksFailed: some cannot be made; it names all their tasks.
    """
    made, reasons = [], dict[str, str]()
    for task, item in zip(tasks, items, strict=True):
        try:
            made.append(make(*item))
        except (ConfigError, DataError) as error:
            reasons.setdefault(task, str(error))
    if reasons:
        raise TasksFailed(reasons)
    return made


def run_the_rest(
    run: Callable[[TaskSelection], dict[str, Any]], selection: TaskSelection, *, whole: bool
) -> tuple[dict[str, Any] | None, tuple[FailedTask, ...]]:
    """lm-eval's report of the tasks that can be run (None if there are none), and the others.

    Args:
        run: makes the report of a selection.
        whole: one failing task makes all of them fail (parts of one benchmark).
    """
    failed: tuple[FailedTask, ...] = ()
    while True:
        try:
            return run(selection), failed
        except TasksFailed as error:
            objects = selection.objects
            left = tuple(o for o in objects if not whole and not _reason(o, error.reasons))
            lost = [o for o in objects if not any(o is other for other in left)]
            if not lost:
                raise
            if whole:
                names, reason = ", ".join(selection.names), str(error)
                return None, (FailedTask(names, reason),)
            failed += tuple(FailedTask(_name(o), _reason(o, error.reasons)) for o in lost)
            if not left:
                return None, failed
            selection = replace(selection, objects=left)


def _reason(task: Any, reasons: Mapping[str, str]) -> str:
    """Why ``task``, or a member of the group, fails; empty if it does not."""
    for leaf in _leaves(task):
        for name in (leaf.task_name, leaf.config.task):
            if name in reasons:
                return reasons[name] if leaf is task else f"{name}: {reasons[name]}"
    return ""


def _leaves(task: Any) -> Iterator[Any]:
    yield from task.get_all_tasks() if hasattr(task, "get_all_tasks") else (task,)


def _name(task: Any) -> str:
    return str(task.name if hasattr(task, "get_all_tasks") else task.task_name)
