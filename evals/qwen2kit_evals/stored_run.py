"""Reading back what an evaluation wrote."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from qwen2kit.errors import ConfigError, DataError

Sample = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class StoredRun:
    """A finished run.

    Attributes:
        directory: where it lies.
        document: the content of results.json.
    """

    directory: Path
    document: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The directory's name."""
        return self.directory.resolve().name

    @cached_property
    def samples(self) -> dict[str, list[Sample]]:
        """Per task, its samples (one per document and answer filter), in order.

        Raises:
            DataError: a line is damaged.
        """
        files = sorted(self.directory.glob("samples_*.jsonl"))
        return {file.stem.removeprefix("samples_"): _lines(file) for file in files}


def read_run(directory: Path) -> StoredRun:
    """The run in ``directory``.

    Raises:
        ConfigError: there is no finished run.
        DataError: results.json is damaged.
    """
    path = directory / "results.json"
    if not path.is_file():
        began = (directory / "run.json").is_file()
        advice = f"finish it with --resume {directory}" if began else "name a directory of results"
        raise ConfigError(f"{directory} holds no results.json; {advice}")
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is damaged: {error}") from error
    return StoredRun(directory=directory, document=document)


def file_name(task: str) -> str:
    """``task`` as it stands in the name of its samples file."""
    return task.replace("/", "__").replace("::", ".")


def numbers(sample: Sample) -> dict[str, float]:
    """The metrics of a sample that are numbers; booleans count as 0 and 1."""
    metrics = sample["metrics"].items()
    return {name: float(value) for name, value in metrics if isinstance(value, int | float)}


def _lines(file: Path) -> list[Sample]:
    found: list[Sample] = []
    for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), 1):
        try:
            if line:
                found.append(json.loads(line))
        except ValueError as error:
            raise DataError(f"{file}, line {number} is damaged: {error}") from error
    return found


def by_document(samples: Sequence[Sample]) -> dict[tuple[int, str], Sample]:
    """Samples by document and filter."""
    return {(sample["doc_id"], sample["filter"]): sample for sample in samples}
