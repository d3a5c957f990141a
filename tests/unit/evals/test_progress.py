"""The bar counts requests and complete tasks."""

from __future__ import annotations

import pytest

from qwen2kit_evals.progress import Progress


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
    shown = capsys.readouterr().err
    assert "scoring" in shown
    assert "4/4" in shown
    assert "3 of 3 tasks" in shown


def test_a_single_task_needs_no_count(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("scoring", ["a", "a"], known=[], disable=False) as progress:
        progress.answered(0)
    assert "of 1" not in capsys.readouterr().err
