"""Progress over the requests of many tasks, which are answered in any order.

On a terminal every task that is under way has a line with its own time left, above one for all of
them. Elsewhere a line is written now and then, and one at the end.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from typing import Self

from rich import progress as bars
from rich.console import Console

MOST_LINES = 12
"""Tasks shown at once; further ones get a line as others end."""


class Progress:
    """Requests answered, time left, and how many tasks are complete. Use as a context manager.

    Args:
        label: what is being done.
        tasks: the task of each request.
        known: indices of requests that were answered before.
        disable: show nothing.
        console: where to; default standard error.
        every: seconds between two lines where there is no terminal.
    """

    def __init__(
        self,
        label: str,
        tasks: Sequence[str],
        known: Sequence[int],
        *,
        disable: bool,
        console: Console | None = None,
        every: float = 30.0,
    ) -> None:
        self._label, self._tasks, self._every, self._disable = label, tasks, every, disable
        self._console = console or Console(stderr=True)
        self._sizes = Counter(tasks)
        self._open = Counter(tasks)
        self._answered = self._known = len(known)
        for index in known:
            self._finish(index)
        self._start = self._said = time.monotonic()
        self._lines: dict[str, bars.TaskID] = {}
        self._live = bars.Progress(
            bars.TextColumn("{task.description}"),
            bars.BarColumn(),
            bars.MofNCompleteColumn(),
            bars.TimeElapsedColumn(),
            bars.TimeRemainingColumn(),
            bars.TextColumn("{task.fields[note]}"),
            console=self._console,
            disable=disable or not self._console.is_terminal,
        )
        self._total = self._live.add_task(
            label, total=len(tasks), completed=len(known), note=self._note()
        )

    @property
    def complete(self) -> int:
        """Tasks of which every request is answered."""
        return len(self._sizes) - len(self._open)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()
        if not self._console.is_terminal:
            self._say()

    def answered(self, index: int) -> None:
        """Count a request."""
        self._finish(index)
        self._answered += 1
        if self._console.is_terminal:
            self._draw(self._tasks[index])
        elif time.monotonic() - self._said >= self._every:
            self._say()

    def _finish(self, index: int) -> None:
        task = self._tasks[index]
        self._open[task] -= 1
        if not self._open[task]:
            del self._open[task]

    def _draw(self, task: str) -> None:
        self._live.update(self._total, completed=self._answered, note=self._note())
        if len(self._sizes) == 1:
            return
        done = self._sizes[task] - self._open[task]
        if task in self._lines:
            self._live.update(self._lines[task], completed=done)
        elif len(self._lines) < MOST_LINES and self._open[task]:
            self._lines[task] = self._live.add_task(
                f"  {task}", total=self._sizes[task], completed=done, note=""
            )
        if not self._open[task] and task in self._lines:
            self._live.remove_task(self._lines.pop(task))

    def _note(self) -> str:
        several = len(self._sizes) > 1
        return f"{self.complete} of {len(self._sizes)} tasks" if several else ""

    def _say(self) -> None:
        if self._disable:
            return
        self._said = time.monotonic()
        spent, done = self._said - self._start, self._answered - self._known
        left = len(self._tasks) - self._answered
        parts = [f"{self._label}: {self._answered}/{len(self._tasks)}", self._note()]
        if left and done:
            parts.append(f"{timedelta(seconds=round(spent / done * left))} left")
        self._console.print(", ".join(filter(None, parts)), highlight=False, soft_wrap=True)
