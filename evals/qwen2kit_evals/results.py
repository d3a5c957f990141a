"""What an evaluation leaves behind: metric rows, provenance, a log of every sample, a table."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen2kit.errors import ConfigError
from qwen2kit_evals.benchmarks import BenchmarkScore
from qwen2kit_evals.failed_tasks import FailedTask
from qwen2kit_evals.metric_rows import MetricRow
from qwen2kit_evals.request_log import FILE as LOG_FILE
from qwen2kit_evals.stored_run import file_name

if TYPE_CHECKING:
    from rich.table import Table

SCHEMA_VERSION = 1
RUN_FILE = "run.json"
UNFINISHED = frozenset({RUN_FILE, LOG_FILE, "work"})
"""What a run writes at its beginning; without results.json it is not finished."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalResult:
    """A finished evaluation.

    Attributes:
        rows: all metrics, groups before their members.
        provenance: everything needed to repeat it (JSON values only).
        notices: what was adapted or truncated, one line each.
        samples: per task, per document: prompt, answer, target and metrics.
        failed: tasks that were to run and could not, each with the reason.
        benchmarks: of a suite, each with its score or the reason why it has none.
        output: directory it was written to, or None.
    """

    rows: tuple[MetricRow, ...]
    provenance: Mapping[str, Any]
    notices: tuple[str, ...]
    samples: Mapping[str, Sequence[Mapping[str, Any]]]
    failed: tuple[FailedTask, ...] = ()
    benchmarks: tuple[BenchmarkScore, ...] = ()
    output: Path | None = None

    def value(self, task: str, metric: str) -> float | None:
        """The score of ``task`` under ``metric``, with the first filter if there are several.

        Raises:
            KeyError: no such row.
        """
        for row in self.rows:
            if row.task == task and row.metric == metric:
                return row.value
        raise KeyError(f"{task} has no metric {metric}")

    def document(self) -> dict[str, Any]:
        """The content of results.json."""
        return {
            "schema_version": SCHEMA_VERSION,
            "results": [asdict(row) for row in self.rows],
            "failed": [asdict(task) for task in self.failed],
            "benchmarks": [asdict(score) for score in self.benchmarks],
            "notices": list(self.notices),
            "provenance": dict(self.provenance),
            "output": None if self.output is None else str(self.output),
        }

    def table(self) -> Table:
        """The rows for people."""
        from rich.markup import escape
        from rich.table import Table

        table = Table(title="Evaluation", title_justify="left")
        table.add_column("task", no_wrap=True)
        table.add_column("metric")
        for name, width in (("value", 6), ("stderr", 7), ("n", 5), ("shots", 5)):
            table.add_column(name, justify="right", no_wrap=True, min_width=width)
        for row in self.rows:
            name = "  " * row.depth + row.task
            metric = row.metric if row.filter == "none" else f"{row.metric} ({row.filter})"
            table.add_row(
                f"[bold]{name}[/bold]" if row.group else name,
                metric,
                "-" if row.value is None else f"{row.value:.4f}",
                "" if row.stderr is None else f"±{row.stderr:.4f}",
                "" if row.samples is None else str(row.samples),
                "" if row.shots is None else str(row.shots),
            )
        for failed in self.failed:
            table.add_row(escape(failed.task), f"failed: {escape(failed.reason)}")
        return table


def sample_rows(logged: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """lm-eval's sample log without the data set's own row: what went in, what came out."""
    return [
        {
            "doc_id": sample["doc_id"],
            "filter": sample["filter"],
            "arguments": [list(arguments) for arguments in sample["arguments"]],
            "responses": [list(responses) for responses in sample["resps"]],
            "filtered": list(sample["filtered_resps"]),
            "target": sample["target"],
            "metrics": {name: sample[name] for name in sample["metrics"] if name in sample},
            "doc_hash": sample["doc_hash"],
            "prompt_hash": sample["prompt_hash"],
        }
        for sample in logged
    ]


def default_output(model: str, kind: str = "") -> Path:
    """``eval-results/<kind>-<model>-<time>``."""
    name = re.sub(r"[^\w.-]+", "-", Path(model).name or "model").strip("-.") or "model"
    named = f"{kind}-{name}" if kind else name
    return Path("eval-results") / f"{named}-{time.strftime('%Y%m%d-%H%M%S')}"


def check_output(directory: Path) -> None:
    """Refuse a directory that already holds something, before hours are spent.

    Raises:
        ConfigError: ``directory`` is a file, or holds anything but an unfinished run.
    """
    present = {path.name for path in directory.iterdir()} if directory.is_dir() else set()
    finished = "results.json" in present or not present & UNFINISHED
    if directory.is_file() or (present and finished):
        raise ConfigError(f"--output {directory} already exists; name a new directory")


def write_results(result: EvalResult, directory: Path) -> None:
    """Write samples_<task>.jsonl and results.json, which appears last; on failure, not at all."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        building.chmod(0o755)
        _write(building / "results.json", json.dumps(plain(result.document()), indent=2) + "\n")
        for task, samples in result.samples.items():
            lines = (json.dumps(plain(sample), ensure_ascii=False) + "\n" for sample in samples)
            _write(building / f"samples_{file_name(task)}.jsonl", "".join(lines))
        check_output(directory)
        directory.mkdir(exist_ok=True)
        for file in sorted(building.iterdir(), key=lambda file: file.name == "results.json"):
            file.rename(directory / file.name)
        building.rmdir()
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise


def plain(value: Any) -> Any:
    """``value`` in JSON types: NumPy scalars unwrapped, NaN and infinities None, the rest text."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if hasattr(value, "item") and not isinstance(value, str):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int | bool) else str(value)


def _write(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
