"""From task names to lm-eval task objects with their data, before any model is loaded.

Everything that can be wrong about a task is found here and becomes one line: unknown names,
absent data, missing packages, tasks that would run model-written code.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_eval.tasks import TaskManager
from lm_eval.tasks._factory import GROUP_FIELD_NAMES, TaskFactory

from qwen2kit.errors import BackendError, ConfigError, DataError, MissingExtra, Qwen2KitError
from qwen2kit_evals.code_eval import CONSENT, active
from qwen2kit_evals.local_data import LocalData, local_datasets
from qwen2kit_evals.nltk_data import no_nltk_download
from qwen2kit_evals.quiet import quiet_lm_eval
from qwen2kit_evals.suites import OWN_TASKS
from qwen2kit_evals.task_fit import Notify, fit_task, local_name

_OUR_EXTRA = {"langdetect", "immutabledict", "pyarrow"}


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskSelection:
    """Tasks ready to run.

    Attributes:
        names: as asked for, globs expanded.
        objects: lm-eval tasks and groups, one per name (several for a tag).
        manager: the index they came from.
        data: where their data came from; None is the Hub.
        num_fewshot: shots asked for, None for each task's own number.
        notices: what was adapted to the data at hand, one line each.
    """

    names: tuple[str, ...]
    objects: tuple[Any, ...]
    manager: TaskManager
    data: LocalData | None
    num_fewshot: int | None
    notices: tuple[str, ...]


def select_tasks(
    names: Sequence[str],
    *,
    datasets: Path | str | None = None,
    num_fewshot: int | None = None,
    include_path: Path | str | None = None,
    defaults: bool = True,
    manager: TaskManager | None = None,
) -> TaskSelection:
    """Find the tasks called ``names`` and load their data.

    Args:
        names: tasks, groups, tags or globs (``mmlu_*``).
        datasets: directory in Hub layout; then nothing is fetched. None: the Hub.
        num_fewshot: shots in place of each task's own number.
        include_path: directory of further task YAML files.
        defaults: whether lm-eval's own tasks are known (reading them takes seconds, and is left
            out where ours and those of ``include_path`` are all that is asked for).
        manager: an index from `task_manager` to use again.

    Raises:
        ConfigError: an unknown or doubled name, or a task that runs model-written code.
        DataError: data is absent or does not fit; one line names every directory expected.
        BackendError: a package that a task needs is not installed.
    """
    data = None if datasets is None else LocalData(datasets)
    if include_path is not None and not Path(include_path).is_dir():
        raise ConfigError(f"--include-path {include_path}: no such directory")
    manager = manager or _index_for(names, include_path, defaults)
    notices: list[str] = []
    manager._factory = _FittingFactory(data, num_fewshot, notices.append)
    chosen = _expand(names, manager)
    _check_leaves(chosen, manager, data)
    with local_datasets(data), quiet_lm_eval():
        try:
            built = manager.load(list(chosen))
        except ValueError as error:
            if isinstance(error, Qwen2KitError):
                raise
            raise ConfigError(str(error)) from error
    for task in built["tasks"].values():
        if getattr(task, "MULTIMODAL", False):
            raise BackendError(f"task {task.task_name} needs images or audio; these models do not")
    known = built["tasks"] | built.get("groups", {})
    objects = [known[leaf] for name in chosen for leaf in _top(name, known, manager)]
    return TaskSelection(
        names=chosen,
        objects=tuple(objects),
        manager=manager,
        data=data,
        num_fewshot=num_fewshot,
        notices=tuple(dict.fromkeys(notices)),
    )


def task_manager(include_path: Path | str | None = None, *, defaults: bool = True) -> TaskManager:
    """lm-eval's task index: its own tasks, ours, and those under ``include_path``."""
    paths = [str(OWN_TASKS)] + ([] if include_path is None else [str(include_path)])
    return TaskManager(include_path=paths, include_defaults=defaults)


def _index_for(
    names: Sequence[str], include_path: Path | str | None, defaults: bool
) -> TaskManager:
    near = task_manager(include_path, defaults=False)
    if not defaults or all(_is_whole(name, near) for name in _split(names)):
        return near
    return task_manager(include_path)


def _is_whole(name: str, manager: TaskManager) -> bool:
    """Whether ``manager`` knows ``name`` and all that it stands for; a tag may be others', too."""
    entry = manager.task_index.get(name)
    if entry is None or entry.kind.name != "GROUP":
        return entry is not None and entry.kind.name in ("TASK", "PY_TASK")
    members = (entry.cfg or {}).get("task") or []
    return all(
        isinstance(member, str) and _is_whole(member, manager)
        for member in ([members] if isinstance(members, str) else members)
    )


def leaf_configs(
    name: str, manager: TaskManager, overrides: Mapping[str, Any] | None = None
) -> Iterator[dict[str, Any]]:
    """Configs (functions unresolved) of every task that ``name`` stands for."""
    entry = manager.task_index.get(name)
    given = dict(overrides or {})
    if entry is None:
        yield given | {"task": name}
        return
    config = dict(entry.cfg or {})
    if entry.kind.name == "TAG":
        for leaf in sorted(entry.tags):
            yield from leaf_configs(leaf, manager, given)
    elif entry.kind.name == "GROUP":
        shared = {k: v for k, v in config.items() if k not in GROUP_FIELD_NAMES}
        yield from _member_configs(config.get("task") or [], manager, shared | given)
    else:
        yield config | given | {"task": name}


def _member_configs(
    members: Any, manager: TaskManager, given: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    for member in [members] if isinstance(members, str) else members:
        if isinstance(member, str):
            yield from leaf_configs(member, manager, given)
        elif "group" in member and member["group"] not in manager.task_index:
            yield from _member_configs(member.get("task") or [], manager, given)
        else:
            child = str(member.get("group") or member.get("task"))
            own = {k: v for k, v in member.items() if k not in ("group", "task")}
            yield from leaf_configs(child, manager, given | own)


class _FittingFactory(TaskFactory):  # type: ignore[misc]
    """Builds tasks whose config fits the local data, and turns failures into one line."""

    def __init__(self, data: LocalData | None, num_fewshot: int | None, notify: Notify) -> None:
        super().__init__()
        self._data = data
        self._num_fewshot = num_fewshot
        self._notify = notify

    def _load_full_config(self, entry: Any, overrides: dict[str, Any] | None = None) -> Any:
        config = super()._load_full_config(entry, overrides)
        if self._data is None or "task" not in config or isinstance(config["task"], list):
            return config
        return fit_task(config, self._data, self._num_fewshot, self._notify)

    def _build_task(self, entry: Any, overrides: dict[str, Any] | None) -> Any:
        with self._explained(entry.name), no_nltk_download(entry, offline=self._data is not None):
            return super()._build_task(entry, overrides)

    def _build_group_members(self, members: Any, group: str, *args: Any) -> Any:
        with self._explained(group):  # also of tasks that are written inside their group
            return super()._build_group_members(members, group, *args)

    @contextmanager
    def _explained(self, name: str) -> Iterator[None]:
        try:
            yield
        except Qwen2KitError:
            raise
        except ImportError as error:
            raise _missing_package(name, error) from error
        except Exception as error:
            raise _unbuildable(name, error, offline=self._data is not None) from error


def _missing_package(task: str, error: ImportError) -> Qwen2KitError:
    if error.name in _OUR_EXTRA:
        return MissingExtra("eval", error.name)
    if error.name is None:
        return BackendError(f"task {task} needs a package that is missing: {_short(error)}")
    return BackendError(
        f"task {task} needs the Python package {error.name!r}, which is not installed; "
        f"install it with: pip install {error.name.split('.')[0].replace('_', '-')}"
    )


def _unbuildable(task: str, error: Exception, *, offline: bool) -> DataError:
    advice = "" if offline else "; without network use --datasets DIR"
    return DataError(
        f"task {task} cannot be built: {type(error).__name__}: {_short(error)}{advice}"
    )


def _short(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip(" *\t")]
    return " ".join(lines[:2])[:300] or "no message"


def _expand(names: Sequence[str], manager: TaskManager) -> tuple[str, ...]:
    chosen: list[str] = []
    for name in _split(names):
        found = manager.match_tasks([name])
        if not found:
            close = difflib.get_close_matches(name, manager.all_tasks, n=3)
            hint = f"; did you mean {', '.join(close)}?" if close else ""
            raise ConfigError(f"unknown task {name!r}{hint} (qwen2kit eval --list shows tasks)")
        chosen.extend(found)
    if not chosen:
        raise ConfigError("no task given; use --tasks, e.g. --tasks mmlu,gsm8k")
    return tuple(dict.fromkeys(chosen))


def _split(names: Sequence[str]) -> list[str]:
    parts = (part.strip() for given in names for part in given.split(","))
    return [part for part in parts if part]


def _check_leaves(names: Sequence[str], manager: TaskManager, data: LocalData | None) -> None:
    missing: dict[str, list[str]] = {}
    for name in names:
        for config in leaf_configs(name, manager):
            if config.get("unsafe_code") and active() is None:
                raise ConfigError(
                    f"task {config['task']} runs programs that the model wrote; allow it with "
                    f"{CONSENT} (they run in a sandbox)"
                )
            wanted = local_name(config)
            if data is None or wanted is None or Path(wanted).is_dir():
                continue
            if data.find(wanted) is None and name not in missing.setdefault(wanted, []):
                missing[wanted].append(name)
    absent = {wanted: tasks for wanted, tasks in missing.items() if tasks}
    if data is not None and absent:
        raise DataError(
            "; ".join(
                f"data set {wanted} (task {', '.join(tasks)}) is absent: expected "
                f"{data.expected(wanted)}"
                for wanted, tasks in absent.items()
            )
        )


def _top(name: str, known: Mapping[str, Any], manager: TaskManager) -> Sequence[str]:
    """The built objects that ``name`` stands for: itself, or a tag's tasks."""
    if name in known:
        return (name,)
    return [leaf for leaf in sorted(manager.task_index[name].tags) if leaf in known]
