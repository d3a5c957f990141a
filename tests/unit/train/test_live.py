"""What a person sees: a table on a terminal, lines in a log."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from qwen2kit.train.live import LiveTable, clock, eval_cells


def step(number: int, loss: float | None = 2.0) -> dict[str, Any]:
    return {
        "event": "step", "step": number, "loss": loss, "lr": 3e-4, "grad_norm": 1.25,
        "tokens_per_second": 12345.6, "eta_seconds": 75.2,
    }  # fmt: skip


@pytest.mark.parametrize("terminal", [True, False])
def test_figures_are_shown(terminal: bool) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=terminal, width=120)
    with LiveTable(console, 10, "tiny") as table:
        table.write({"event": "eval", "step": 0, "loss": 5.5, "exact_match": 0.123})
        table.write(step(1))
        table.write(step(2, None))
        table.write(step(10, 1.0) | {"mfu": 0.417, "memory_bytes": 3 << 30})
    text = screen.getvalue()
    for part in (
        "10/10",
        "1.5000",
        "3.00e-04",
        "1.25",
        "12,346",
        "1:15",
        "5.5000",
        "12.3 %",
        "41.7 %",
        "3.0 GiB",
    ):
        assert part in text
    assert ("training tiny" in text) == terminal


def test_cells_and_clock() -> None:
    assert eval_cells({"loss": None}) == {"held-out loss": "not finite"}
    assert eval_cells({}) == {}
    assert [clock(s) for s in (0, 59.6, 3600, 3725)] == ["0:00", "1:00", "1:00:00", "1:02:05"]


def test_a_rewind_is_said_and_does_not_spoil_the_table() -> None:
    screen = io.StringIO()
    with LiveTable(Console(file=screen, width=120), 10, "tiny") as table:
        table.write(step(5))
        table.write({"event": "rewind", "step": 5, "from_step": 8, "loss": 9.5, "rewinds": 1})
        table.write({"event": "eval", "step": 5, "loss": 5.5})
    assert "step 8: loss 9.5000; back to step 4" in screen.getvalue()
    assert "loss 2.0000" in screen.getvalue().splitlines()[-1]


def test_a_loss_that_is_not_finite_rewinds_too() -> None:
    screen = io.StringIO()
    with LiveTable(Console(file=screen, width=120), 10, "tiny") as table:
        table.write({"event": "rewind", "step": 1, "from_step": 2, "loss": float("nan")})
    assert "step 2: loss nan; back to step 0" in screen.getvalue()
