"""Fit a task's config to the data that is present, and say what had to change.

Local copies often lack the training split, which lm-eval opens even when it draws no shots from
it. Such a split is dropped from the config with a notice; one that is needed is an error.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from qwen2kit.errors import DataError
from qwen2kit_evals.local_data import LocalData, is_file_format

Notify = Callable[[str], None]
_SHOT_SPLITS = ("fewshot_split", "training_split", "validation_split", "test_split")


def local_name(config: Mapping[str, Any]) -> str | None:
    """The Hub name of a task's data set; None if it reads plain files, or makes its own data."""
    path = config.get("dataset_path")
    if not isinstance(path, str) or config.get("custom_dataset") or is_file_format(path):
        return None
    return path


def shots(config: Mapping[str, Any], num_fewshot: int | None) -> int:
    """Examples in the prompt: as lm-eval, a task's own 0 is never overridden."""
    own = config.get("num_fewshot")
    if num_fewshot is None or own == 0:
        return int(own or 0)
    return num_fewshot


def fit_task(
    config: Mapping[str, Any], data: LocalData, num_fewshot: int | None, notify: Notify
) -> dict[str, Any]:
    """``config`` without the splits that ``data`` lacks and the task does not need.

    Raises:
        DataError: the data set, its config, the evaluated split or the shots' split is absent.
    """
    fitted = dict(config)
    name = local_name(config)
    if name is None or (data.find(name) is None and Path(name).is_dir()):
        return fitted
    task = config.get("task")
    if data.find(name) is None:
        raise DataError(f"no data set {name} (task {task}): expected {data.expected(name)}")
    chosen = config.get("dataset_name")
    _note_config(data, name, chosen, str(task), notify)
    try:
        present = data.splits(name, chosen)
    except DataError as error:
        raise DataError(f"{task}: {error}") from error
    evaluated = "test_split" if config.get("test_split") else "validation_split"
    source = next((key for key in _SHOT_SPLITS if config.get(key)), None)
    for key in _SHOT_SPLITS:
        split = config.get(key)
        if not split or _base(split) in present:
            continue
        where = f"{data.expected(name)} (config {chosen or data.configs(name)[0]})"
        if key == evaluated:
            raise DataError(f"{task} evaluates split {split!r}, which {where} lacks")
        if key == source and shots(config, num_fewshot) > 0:
            raise DataError(
                f"{task} draws its {shots(config, num_fewshot)} shots from split {split!r}, which "
                f"{where} lacks; add the split or use --num-fewshot 0"
            )
        fitted[key] = None
        notify(f"{task}: split {split!r} is absent from {where}; not needed for 0 shots, dropped")
    return fitted


def _note_config(data: LocalData, name: str, chosen: str | None, task: str, notify: Notify) -> None:
    known = data.configs(name)
    if chosen is None and known and known[0] != "default" and len(known) == 1:
        notify(f"{task}: reads config {known[0]!r}, the only one in {data.expected(name)}")


def _base(split: str) -> str:
    """``test`` of ``test[:10%]`` or ``test+train``."""
    return re.split(r"[\[+]", split)[0]
