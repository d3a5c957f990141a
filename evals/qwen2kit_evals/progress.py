"""A progress bar over the requests of many tasks, which are answered in any order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from tqdm import tqdm  # type: ignore[import-untyped]


class Progress:
    """Requests answered, time left, and how many tasks are complete. Use as a context manager.

    Args:
        label: what is being done.
        tasks: the task of each request.
        known: indices of requests that were answered before.
        disable: show nothing.
    """

    def __init__(
        self, label: str, tasks: Sequence[str], known: Sequence[int], *, disable: bool
    ) -> None:
        self._tasks = tasks
        self._open = Counter(tasks)
        self._count = len(self._open)
        for index in known:
            self._finish(index)
        self._bar = tqdm(total=len(tasks), initial=len(known), disable=disable, desc=label)
        self._show()

    @property
    def complete(self) -> int:
        """Tasks of which every request is answered."""
        return self._count - len(self._open)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.close()

    def answered(self, index: int) -> None:
        """Count a request."""
        before = self.complete
        self._finish(index)
        self._bar.update()
        if self.complete > before:
            self._show()

    def _finish(self, index: int) -> None:
        task = self._tasks[index]
        self._open[task] -= 1
        if not self._open[task]:
            del self._open[task]

    def _show(self) -> None:
        if self._count > 1:
            self._bar.set_postfix_str(f"{self.complete} of {self._count} tasks", refresh=False)
