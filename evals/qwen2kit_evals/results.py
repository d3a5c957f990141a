"""What an evaluation leaves behind: metric rows, provenance, a log of every sample, a table."""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen2kit.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

SCHEMA_VERSION = 1


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


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalResult:
    """A finished evaluation.

    Attributes:
        rows: all metrics, groups before their members.
        provenance: everything needed to repeat it (JSON values only).
        notices: what was adapted or truncated, one line each.
        samples: per task, per document: prompt, answer, target and metrics.
        output: directory it was written to, or None.
    """

    rows: tuple[MetricRow, ...]
    provenance: Mapping[str, Any]
    notices: tuple[str, ...]
    samples: Mapping[str, Sequence[Mapping[str, Any]]]
    output: Path | None = None

    def value(self, task: str, metric: str, filter: str | None = None) -> float | None:
        """The score of ``task`` under ``metric``.

        Raises:
            KeyError: no such row.
        """
        for row in self.rows:
            if row.task == task and row.metric == metric and filter in (None, row.filter):
                return row.value
        raise KeyError(f"{task} has no metric {metric}")

    def document(self) -> dict[str, Any]:
        """The content of results.json."""
        return {
            "schema_version": SCHEMA_VERSION,
            "results": [asdict(row) for row in self.rows],
            "notices": list(self.notices),
            "provenance": dict(self.provenance),
            "output": None if self.output is None else str(self.output),
        }

    def table(self) -> Table:
        """The rows for people."""
        from rich.table import Table

        table = Table(title="Evaluation", title_justify="left")
        table.add_column("task", no_wrap=True)
        table.add_column("metric")
        for name in ("value", "stderr", "n", "shots"):
            table.add_column(name, justify="right")
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
        return table


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
                value=_number(value),
                stderr=_number(values.get(f"{metric}_stderr,{chosen}")),
                samples=None if count is None else int(count),
                shots=report.get("n-shot", {}).get(name),
            )
        )
    return found


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


def check_output(directory: Path) -> None:
    """Refuse a directory that already holds something, before hours are spent.

    Raises:
        ConfigError: ``directory`` exists and is not empty, or is a file.
    """
    if directory.is_file() or (directory.is_dir() and any(directory.iterdir())):
        raise ConfigError(f"--output {directory} already exists; name a new directory")


def write_results(result: EvalResult, directory: Path) -> None:
    """Write results.json and samples_<task>.jsonl; all of it appears at once or not at all."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        building.chmod(0o755)
        _write(building / "results.json", json.dumps(plain(result.document()), indent=2) + "\n")
        for task, samples in result.samples.items():
            lines = (json.dumps(plain(sample), ensure_ascii=False) + "\n" for sample in samples)
            safe = task.replace("/", "__")
            _write(building / f"samples_{safe}.jsonl", "".join(lines))
        check_output(directory)
        if directory.is_dir():
            directory.rmdir()
        building.rename(directory)
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


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not hasattr(value, "__float__"):
        return float(value) if isinstance(value, bool) else None
    number = float(value)
    return number if math.isfinite(number) else None


def _write(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
