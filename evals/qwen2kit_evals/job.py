"""What an evaluation was asked to do, kept beside its answers so that it can go on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from qwen2kit.errors import ConfigError, DataError
from qwen2kit_evals.results import RUN_FILE, check_output
from qwen2kit_evals.run import check_numbers
from qwen2kit_evals.suite_tasks import SuiteSelection, select_suite
from qwen2kit_evals.suites import load_suite, published
from qwen2kit_evals.tasks import select_tasks


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """The options of ``qwen2kit eval``; paths are absolute.

    Raises:
        ConfigError: neither or both of tasks and suite, or a value out of range.
    """

    model: str
    tasks: str = ""
    suite: str | None = None
    backend: str = "auto"
    dtype: str = "auto"
    device: str = "auto"
    adapter: str | None = None
    limit: float | None = None
    num_fewshot: int | None = None
    datasets: str | None = None
    include_path: str | None = None
    batch_size: int | None = None
    chat_template: bool = False
    compare: str | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.tasks and self.suite:
            raise ConfigError("--tasks and --suite exclude each other")
        if self.suite is not None:
            load_suite(self.suite)
        if self.compare is not None:
            published(self.compare)
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise ConfigError(f"--num-fewshot must not be negative, got {self.num_fewshot}")
        check_numbers(self.limit, self.batch_size)

    @property
    def wraps_in_chat_template(self) -> bool:
        """Asked for, or the suite's own habit."""
        return self.chat_template or (
            self.suite is not None and load_suite(self.suite).chat_template
        )

    def select(self) -> SuiteSelection:
        """The tasks with their data.

        Raises:
            Qwen2KitError: as `select_tasks` and `select_suite`.
        """
        where: dict[str, Any] = {
            "datasets": self.datasets,
            "num_fewshot": self.num_fewshot,
            "include_path": self.include_path,
        }
        if self.suite is not None:
            return select_suite(self.suite, **where)
        return SuiteSelection.of(select_tasks([self.tasks], **where))

    def check(self, directory: Path) -> None:
        """Refuse a directory that this job can neither begin nor go on in.

        Raises:
            ConfigError: the directory holds a finished run, another job or other files.
        """
        check_output(directory)
        if not (directory / RUN_FILE).exists():
            return
        before, now = asdict(read_job(directory)), asdict(self)
        for name in sorted(now):
            if now[name] != before[name] and name not in ("batch_size", "compare"):
                raise ConfigError(
                    f"{directory} holds an unfinished run with {name} {before[name]!r}, not "
                    f"{now[name]!r}; continue it with --resume {directory}, or name a new --output"
                )

    def begin(self, directory: Path) -> None:
        """Write run.json into ``directory``.

        Raises:
            ConfigError: as `check`.
        """
        self.check(directory)
        directory.mkdir(parents=True, exist_ok=True)
        text = json.dumps(asdict(self), indent=2) + "\n"
        (directory / RUN_FILE).write_text(text, encoding="utf-8")


def absolute(path: Path | str | None) -> str | None:
    """``path`` from the root, so that a job can go on in another working directory."""
    return None if path is None else str(Path(path).expanduser().resolve())


def read_job(directory: Path) -> Job:
    """The job of an unfinished (or finished) run.

    Raises:
        ConfigError: there is no run in ``directory``.
        DataError: run.json is damaged.
    """
    path = directory / RUN_FILE
    if not path.is_file():
        raise ConfigError(f"--resume {directory}: no {RUN_FILE} there; name the run's directory")
    try:
        document: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        unknown = set(document) - {field.name for field in fields(Job)}
        if unknown:
            raise ValueError(f"unknown options {', '.join(sorted(unknown))}")
        return Job(**document)
    except (ValueError, TypeError) as error:
        raise DataError(f"{path} is damaged: {error}") from error
