"""Progress counts requests and complete tasks, and says how long each task still takes."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from qwen2kit_evals import progress as module
from qwen2kit_evals.progress import Progress


def terminal() -> tuple[Console, io.StringIO]:
    screen = io.StringIO()
    return Console(file=screen, force_terminal=True, width=120, color_system=None), screen


def test_a_task_is_complete_when_all_its_requests_are(capsys: pytest.CaptureFixture[str]) -> None:
    tasks = ["a", "b", "a", "c"]
    with Progress("scoring", tasks, known=[3], disable=False) as progress:
        assert progress.complete == 1
        progress.answered(0)
        assert progress.complete == 1
        progress.answered(2)
        assert progress.complete == 2
        progress.answered(1)
        assert progress.complete == 3
    assert capsys.readouterr().err == "scoring: 4/4, 3 of 3 tasks\n"


def test_a_single_task_needs_no_count(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("scoring", ["a", "a"], known=[], disable=False, every=0) as progress:
        progress.answered(0)
    first = capsys.readouterr().err.splitlines()[0]
    assert re.fullmatch(r"scoring: 1/2, 0:00:00 left", first)


def test_each_task_has_a_line_of_its_own_on_a_terminal() -> None:
    console, screen = terminal()
    with Progress(
        "scoring", ["mmlu", "mmlu", "bbh", "bbh"], [], disable=False, console=console
    ) as p:
        p.answered(0)
        p.answered(2)
        p._live.refresh()
        shown = screen.getvalue()
        rows = [row for row in shown.splitlines() if "1/2" in row]
        assert any("mmlu" in row for row in rows)
        assert any("bbh" in row and row.count(":") >= 2 for row in rows), "elapsed and left"
        assert "2/4" in shown
        p.answered(1)
        p.answered(3)
    lines = screen.getvalue().splitlines()
    assert any("4/4" in line and "2 of 2 tasks" in line for line in lines)


def test_many_tasks_do_not_fill_the_screen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_LINES", 3)
    console, _ = terminal()
    tasks = [f"t{i}" for i in range(20)] * 2
    with Progress("scoring", tasks, [], disable=False, console=console) as progress:
        for index in range(20):
            progress.answered(index)
        assert len(progress._live.tasks) == 4
        progress.answered(20)  # t0 is complete: its line makes room.
        assert len(progress._live.tasks) == 3


def test_nothing_is_shown_when_disabled(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("scoring", ["a"], [], disable=True, every=0) as progress:
        progress.answered(0)
    assert capsys.readouterr().err == ""
