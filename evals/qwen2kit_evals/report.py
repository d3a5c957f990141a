"""One page about one or several runs: self-contained HTML, or Markdown."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen2kit.errors import ConfigError
from qwen2kit_evals.benchmarks import FAILED
from qwen2kit_evals.browser import browser_data
from qwen2kit_evals.contamination import CleanScore, TaskContamination, clean_scores
from qwen2kit_evals.metric_rows import MetricRow
from qwen2kit_evals.paper import PaperRow, paper_rows
from qwen2kit_evals.stored_run import StoredRun
from qwen2kit_evals.suites import PROVENANCE

_PERCENT = ("acc", "exact_match", "match", "pass", "accuracy", "qwen_last_number", "math_verify")


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """One bar of a chart, 0 to 100.

    Attributes:
        label: run or model.
        value: length; None where there is no score.
        stderr: half the width of the mark at its end, or None.
        note: beside the bar.
        kind: number of the run, or ``paper``.
    """

    label: str
    value: float | None
    stderr: float | None
    note: str
    kind: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricLine:
    """One metric of one task over all runs; None where a run lacks it."""

    task: str
    depth: int
    group: bool
    metric: str
    cells: tuple[MetricRow | None, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Everything the templates show.

    Attributes:
        names: of the runs, distinct.
        settings: per setting, its value in each run.
        paper: model whose published scores are shown, or None.
        comparison: per run, its rows beside the paper.
        charts: per benchmark, its bars.
        metrics: all scores.
        clean: per run, scores without contaminated questions.
        absent: per run, benchmarks that were not run, with the reason.
        failed: per run, tasks that were begun and have no scores, with the reason.
        notices: per run.
        browser: samples for the page's script.
    """

    names: tuple[str, ...]
    settings: Mapping[str, Sequence[str]]
    paper: str | None
    comparison: Sequence[Sequence[PaperRow]]
    charts: Mapping[str, Sequence[Bar]]
    metrics: Sequence[MetricLine]
    clean: Sequence[Sequence[CleanScore]]
    absent: Sequence[Sequence[tuple[str, str]]]
    failed: Sequence[Sequence[tuple[str, str]]]
    notices: Sequence[Sequence[str]]
    browser: Mapping[str, Any]


def build_report(
    runs: Sequence[StoredRun],
    *,
    compare: str | None,
    contamination: Sequence[TaskContamination] | None,
    samples: int,
) -> Report:
    """Collect what is known about ``runs``.

    Args:
        runs: shown side by side.
        compare: model whose published scores are shown beside them.
        contamination: for scores of clean questions.
        samples: most samples per task and run in the browser.

    Raises:
        ConfigError: nothing is published about ``compare``, or ``samples`` is negative.
    """
    if samples < 0:
        raise ConfigError(f"--samples must not be negative, got {samples}")
    names = _names(runs)
    rows = [tuple(MetricRow(**row) for row in run.document["results"]) for run in runs]
    comparison = [paper_rows(run.document, compare) for run in runs] if compare else []
    charts = _paper_charts(names, comparison, str(compare)) if compare else _charts(names, rows)
    return Report(
        names=names,
        settings=_settings(runs),
        paper=compare,
        comparison=comparison,
        charts=charts,
        metrics=_metric_lines(rows),
        clean=[clean_scores(run, contamination) for run in runs] if contamination else [],
        absent=[_absent(run) for run in runs],
        failed=[_failed(run) for run in runs],
        notices=[run.document["notices"] for run in runs],
        browser=browser_data(names, runs, samples),
    )


def check_report_path(path: Path) -> None:
    """Refuse what cannot be written.

    Raises:
        ConfigError: neither .html nor .md.
    """
    if path.suffix not in (".html", ".md"):
        raise ConfigError(f"-o {path}: a report is a .html or .md file")


def write_report(report: Report, path: Path) -> None:
    """Write ``report`` in the format that ``path`` ends with."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=path.suffix == ".html",
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["in_script"] = _in_script
    environment.filters["cell"] = lambda text: str(text).replace("|", "\\|").replace("\n", " ")
    template = environment.get_template(f"report{path.suffix}.jinja")
    path.parent.mkdir(parents=True, exist_ok=True)
    text = template.render(report=report, provenance=PROVENANCE)
    path.write_text(text, encoding="utf-8")


def _in_script(value: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


def _names(runs: Sequence[StoredRun]) -> tuple[str, ...]:
    names = [run.name for run in runs]
    if len(set(names)) == len(names):
        return tuple(names)
    return tuple(f"{number}: {name}" for number, name in enumerate(names, 1))


def _settings(runs: Sequence[StoredRun]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for run in runs:
        model, job = (run.document["provenance"][key] for key in ("model", "evaluation"))
        versions = " ".join(f"{name} {version}" for name, version in model["versions"].items())
        values = {
            "model": f"{Path(model['path']).name} ({model['format']})",
            "backend": f"{model['backend']}, {model['device']}, {model['dtype']}",
            "suite": job.get("suite") or "-",
            "tasks": ", ".join(job["tasks"]),
            "limit": "-" if job["limit"] is None else f"{job['limit']:g} documents per task",
            "chat template": "yes" if job["chat_template"] else "no",
            "duration": f"{job['seconds']:,.0f} s",
            "time": job["time"],
            "versions": versions,
        }
        for name, value in values.items():
            found.setdefault(name, []).append(value)
    return found


def _absent(run: StoredRun) -> list[tuple[str, str]]:
    entries = run.document.get("benchmarks", ())
    return [
        (f"{e['benchmark']}: {e['part']}" if e["part"] else e["benchmark"], e["absent"])
        for e in entries
        if e["absent"] and not e["absent"].startswith(FAILED)
    ]


def _failed(run: StoredRun) -> list[tuple[str, str]]:
    return [(entry["task"], entry["reason"]) for entry in run.document.get("failed", ())]


def _metric_lines(rows: Sequence[Sequence[MetricRow]]) -> list[MetricLine]:
    found: dict[tuple[str, str, str], list[MetricRow | None]] = {}
    for number, run in enumerate(rows):
        for row in run:
            key = (row.task, row.metric, row.filter)
            found.setdefault(key, [None] * len(rows))[number] = row
    lines = []
    for (task, metric, chosen), cells in found.items():
        first = next(cell for cell in cells if cell is not None)
        name = metric if chosen == "none" else f"{metric} ({chosen})"
        lines.append(
            MetricLine(
                task=task, depth=first.depth, group=first.group, metric=name, cells=tuple(cells)
            )
        )
    return lines


def _charts(names: Sequence[str], rows: Sequence[Sequence[MetricRow]]) -> dict[str, list[Bar]]:
    """Bars of the outermost tasks' shares of right answers."""
    charts: dict[str, list[Bar]] = {}
    for number, (name, run) in enumerate(zip(names, rows, strict=True)):
        for row in run:
            if row.depth or row.value is None or not any(p in row.metric for p in _PERCENT):
                continue
            note = "" if row.shots is None else f"{row.shots} shots"
            bar = Bar(
                label=name,
                value=100 * row.value,
                stderr=None if row.stderr is None else 100 * row.stderr,
                note=note,
                kind=str(number % 6),
            )
            chosen = "" if row.filter == "none" else f" ({row.filter})"
            charts.setdefault(f"{row.task}, {row.metric}{chosen}", []).append(bar)
    return charts


def _paper_charts(
    names: Sequence[str], comparison: Sequence[Sequence[PaperRow]], model: str
) -> dict[str, list[Bar]]:
    """Bars of every benchmark that a run has a score of, the published figure last."""
    charts: dict[str, list[Bar]] = {}
    figures = {}
    for number, (name, rows) in enumerate(zip(names, comparison, strict=True)):
        for row in rows:
            figures[row.benchmark] = row.published
            if row.value is not None:
                note = row.verdict if row.published is not None else ""
                bar = Bar(
                    label=name, value=row.value, stderr=row.stderr, note=note, kind=str(number % 6)
                )
                charts.setdefault(row.benchmark, []).append(bar)
    for benchmark, bars in charts.items():
        if figure := figures[benchmark]:
            shots = "" if figure.shots is None else f", {figure.shots} shots"
            note = PROVENANCE[figure.mark] + shots
            bars.append(Bar(label=model, value=figure.value, stderr=None, note=note, kind="paper"))
    return charts
