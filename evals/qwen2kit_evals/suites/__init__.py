"""The benchmarks of the Qwen2 report as data: suites (TOML), published scores, tasks of our own.

A suite lists every benchmark, also those that cannot run here, so that nothing is left out
silently. ``published.toml`` holds the report's figures with a mark that says how they are known.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any, Literal

from qwen2kit.errors import ConfigError

OWN_TASKS = Path(__file__).parent / "tasks"
"""Directory of lm-eval task files for what lm-eval lacks."""

Mark = Literal["read", "card", "recalled"]
PROVENANCE: Mapping[Mark, str] = {
    "read": "read in the report",
    "card": "read in the model card",
    "recalled": "unverified",
}
"""What a mark says to people."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SuiteTask:
    """One benchmark, or one part of a benchmark that is published as a mean.

    Attributes:
        benchmark: its name in the report.
        shots: examples in the prompt.
        metric, filter: the score among lm-eval's.
        prompt, parser: in words.
        data: Hub data sets that it reads.
        size: questions in it; 0 if not written down.
        run: lm-eval task, group or tag; empty if there is none.
        part: name of the part.
        scale: published score / ours; 100 for percentages.
        differs: what is known to be unlike the report's protocol, besides shots and subset.
        beside: further metrics of the same answers, shown with the score.
        near: other tasks that measure the benchmark, with how they differ.
        why: why there is no task.
    """

    benchmark: str
    shots: int
    metric: str
    prompt: str
    parser: str
    data: tuple[str, ...]
    size: int = 0
    filter: str = "none"
    run: str = ""
    part: str = ""
    scale: float = 100
    differs: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    near: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    why: str = ""

    @property
    def name(self) -> str:
        """``benchmark`` or ``benchmark: part``."""
        return f"{self.benchmark}: {self.part}" if self.part else self.benchmark


@dataclass(frozen=True, slots=True, kw_only=True)
class Suite:
    """All benchmarks of one table of the report.

    Attributes:
        name: what ``--suite`` takes.
        kind: ``base`` or ``instruct``.
        title: for people.
        chat_template: whether prompts go into the model's chat template.
        tasks: in the report's order.
    """

    name: str
    kind: str
    title: str
    chat_template: bool
    tasks: tuple[SuiteTask, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A published score.

    Attributes:
        value: in the report's own scale.
        shots: as published; None if the publication states none.
        mark: how the figure is known.
    """

    value: float
    shots: int | None
    mark: Mark


def suite_names() -> tuple[str, ...]:
    """The suites that ship."""
    return tuple(sorted(path.stem for path in Path(__file__).parent.glob("qwen2-*.toml")))


@cache
def load_suite(name: str) -> Suite:
    """The suite called ``name``.

    Raises:
        ConfigError: no such suite.
    """
    if name not in suite_names():
        raise ConfigError(f"unknown suite {name!r}; choose from {', '.join(suite_names())}")
    document = _read(f"{name}.toml")
    return Suite(
        name=name,
        kind=name.removeprefix("qwen2-"),
        title=document["title"],
        chat_template=document["chat_template"],
        tasks=tuple(_task(entry) for entry in document["task"]),
    )


def published_models() -> tuple[str, ...]:
    """Models with published scores: ``qwen2-7b``, ``qwen2-7b-instruct``, ..."""
    return tuple(_figures())


def published(model: str) -> Mapping[str, Figure]:
    """Published scores of ``model`` per benchmark.

    Raises:
        ConfigError: nothing is published about ``model``.
    """
    name = model.lower().removeprefix("qwen/")
    if name not in _figures():
        close = difflib.get_close_matches(name, _figures(), n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ConfigError(f"no published scores of {model!r}{hint} ({', '.join(_figures())})")
    return _figures()[name]


@cache
def _figures() -> dict[str, dict[str, Figure]]:
    found: dict[str, dict[str, Figure]] = {}
    for kind, benchmarks in _read("published.toml").items():
        suffix = "" if kind == "base" else f"-{kind}"
        for benchmark, entry in benchmarks.items():
            for mark in PROVENANCE:
                for size, value in entry.get(mark, {}).items():
                    figure = Figure(value=value, shots=entry.get("shots"), mark=mark)
                    found.setdefault(f"qwen2-{size}{suffix}", {})[benchmark] = figure
    return found


def _read(name: str) -> dict[str, Any]:
    with (Path(__file__).parent / name).open("rb") as file:
        return tomllib.load(file)


def _task(entry: Mapping[str, Any]) -> SuiteTask:
    known = {item.name for item in fields(SuiteTask)}
    if unknown := set(entry) - known:
        raise ValueError(f"{entry.get('benchmark')}: unknown fields {sorted(unknown)}")
    frozen = {k: tuple(v) if isinstance(v, list) else v for k, v in entry.items()}
    near = {name: tuple(notes) for name, notes in entry.get("near", {}).items()}
    return SuiteTask(**(frozen | {"near": near}))
