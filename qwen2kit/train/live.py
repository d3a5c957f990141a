"""What a person sees while training: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections import deque
from time import monotonic
from typing import TYPE_CHECKING

from qwen2kit.train.curve import sparkline
from qwen2kit.train.metrics import Record

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_SECONDS_BETWEEN_LINES = 10.0
_SMOOTHED_STEPS = 20


class LiveTable:
    """A `Sink` that shows progress. Use as a context manager.

    Args:
        console: where to draw (stderr).
        total: number of steps of the whole run.
        name: heading.
    """

    def __init__(self, console: Console, total: int, name: str) -> None:
        from rich.live import Live

        self._console = console
        self._total = total
        self._name = name
        self._losses: list[float] = []
        self._recent: deque[float] = deque(maxlen=_SMOOTHED_STEPS)
        self._last: Record = {}
        self._evals: dict[str, str] = {}
        self._printed = float("-inf")
        self._live = Live(console=console, auto_refresh=False) if console.is_terminal else None

    def write(self, record: Record) -> None:
        """Take one record and redraw."""
        if record["event"] == "rewind":
            self._say_rewind(record)
            return
        if record["event"] == "eval":
            self._evals = eval_cells(record)
        else:
            self._last = record
            if record["loss"] is not None:
                self._losses.append(record["loss"])
                self._recent.append(record["loss"])
        self._draw(force=record["event"] == "eval" or record["step"] == self._total)

    def __enter__(self) -> LiveTable:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            if self._last:
                self._live.update(self._table(), refresh=True)
            self._live.stop()

    def _say_rewind(self, record: Record) -> None:
        """One line above the table: steps that were counted are done anew."""
        text = f"step {record['from_step']}: loss {record['loss']:.4f}; back to step "
        self._console.print(f"{text}{record['step'] - 1}", markup=False, soft_wrap=True)

    def _draw(self, *, force: bool) -> None:
        now = monotonic()
        pause = 0.25 if self._live is not None else _SECONDS_BETWEEN_LINES
        if not self._last or (not force and now - self._printed < pause):
            return
        self._printed = now
        if self._live is not None:
            self._live.update(self._table(), refresh=True)
        else:
            cells = " ".join(f"{name} {value}" for name, value in self._cells().items())
            self._console.print(cells, markup=False, soft_wrap=True)

    def _cells(self) -> dict[str, str]:
        last = self._last
        loss = sum(self._recent) / len(self._recent) if self._recent else float("nan")
        return {
            "step": f"{last['step']}/{self._total}",
            "loss": f"{loss:.4f}",
            "lr": f"{last['lr']:.2e}",
            "grad norm": f"{last['grad_norm']:.2f}",
            "tokens/s": f"{last['tokens_per_second']:,.0f}",
            **_hardware_cells(last),
            "ETA": clock(last["eta_seconds"]),
            **self._evals,
        }

    def _table(self) -> Table:
        from rich.table import Table

        table = Table(title=f"training {self._name}", caption=sparkline(self._losses))
        cells = self._cells()
        for name in cells:
            table.add_column(name, justify="right")
        table.add_row(*cells.values())
        return table


def _hardware_cells(record: Record) -> dict[str, str]:
    cells = {}
    if record.get("mfu") is not None:
        cells["MFU"] = f"{100 * record['mfu']:.1f} %"
    if record.get("memory_bytes") is not None:
        cells["memory"] = f"{record['memory_bytes'] / 2**30:.1f} GiB"
    return cells


def eval_cells(record: Record) -> dict[str, str]:
    """The figures of an evaluation, formatted, by heading."""
    cells = {}
    if "loss" in record:
        loss = record["loss"]
        cells["held-out loss"] = "not finite" if loss is None else f"{loss:.4f}"
    if record.get("exact_match") is not None:
        cells["exact match"] = f"{100 * record['exact_match']:.1f} %"
    return cells


def clock(seconds: float) -> str:
    """``seconds`` as ``h:mm:ss`` or ``m:ss``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
