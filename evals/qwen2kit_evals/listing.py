"""Which tasks a local data directory can serve."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lm_eval.tasks import TaskManager

from qwen2kit.errors import DataError
from qwen2kit_evals.local_data import LocalData
from qwen2kit_evals.suites import SuiteTask, load_suite, suite_names
from qwen2kit_evals.task_fit import fit_task, local_name
from qwen2kit_evals.tasks import leaf_configs


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """A name to give to ``--tasks``.

    Attributes:
        name: group or task.
        tasks: how many tasks it stands for.
        data: data sets it reads.
    """

    name: str
    tasks: int
    data: tuple[str, ...]


def available_tasks(data: LocalData, manager: TaskManager) -> tuple[Offer, ...]:
    """Groups whose data is all present, and present tasks that are in no such group.

    Tasks that run model-written code or images are left in; `select_tasks` says what they need.
    """
    index = manager.task_index
    present = {
        name: local
        for name, entry in index.items()
        if entry.kind.name == "TASK" and (local := _present(entry.cfg or {}, data))
    }
    offers: list[Offer] = []
    grouped: set[str] = set()
    for name, entry in index.items():
        if entry.kind.name != "GROUP":
            continue
        leaves = list(leaf_configs(name, manager))
        found = [_present(leaf, data) for leaf in leaves]
        if leaves and all(found):
            names = {str(leaf["task"]) for leaf in leaves}
            grouped |= names
            read = tuple(sorted({local for local in found if local}))
            offers.append(Offer(name=name, tasks=len(names), data=read))
    offers += [
        Offer(name=name, tasks=1, data=(local,))
        for name, local in present.items()
        if name not in grouped
    ]
    return tuple(sorted(offers, key=lambda offer: (offer.data, offer.name)))


def _present(config: Mapping[str, Any], data: LocalData) -> str | None:
    """The data set of a task whose data and config are there, else None."""
    name = local_name(config)
    if name is None or data.find(name) is None:
        return None
    chosen = config.get("dataset_name")
    return name if chosen is None or chosen in data.configs(name) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class SuiteOffer:
    """One benchmark of a suite and its data.

    Attributes:
        suite, benchmark, shots, prompt, parser, metric: as in the suite.
        task: the lm-eval task; empty if there is none.
        data: Hub data sets that it reads.
        missing: those of them that are absent.
        why: why it cannot run although nothing is missing: no task, or a split is absent.
    """

    suite: str
    benchmark: str
    shots: int
    prompt: str
    parser: str
    metric: str
    task: str
    data: tuple[str, ...]
    missing: tuple[str, ...]
    why: str


def suite_offers(data: LocalData, manager: TaskManager) -> tuple[SuiteOffer, ...]:
    """Every benchmark of every suite, in order, with what ``data`` lacks for it.

    Of a benchmark with many parts, the splits of the first are looked at.
    """
    return tuple(
        _offer(name, task, data, manager)
        for name in suite_names()
        for task in load_suite(name).tasks
    )


def _offer(suite: str, task: SuiteTask, data: LocalData, manager: TaskManager) -> SuiteOffer:
    missing = tuple(wanted for wanted in task.data if data.find(wanted) is None)
    return SuiteOffer(
        suite=suite,
        benchmark=task.name,
        shots=task.shots,
        prompt=task.prompt,
        parser=task.parser,
        metric=task.metric,
        task=task.run,
        data=task.data,
        missing=missing,
        why=task.why if missing or not task.run else _misfit(task, data, manager),
    )


def _misfit(task: SuiteTask, data: LocalData, manager: TaskManager) -> str:
    try:
        fit_task(next(leaf_configs(task.run, manager)), data, task.shots, lambda notice: None)
    except DataError as error:
        return str(error)
    return ""
