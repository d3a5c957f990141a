"""SIGINT, SIGTERM and SIGUSR1 (SLURM's warning) as a polite request: save after this step, stop.

Evaluations and exports, which change nothing that is trained, are left off and made by a resume.
"""

from __future__ import annotations

import signal
from time import monotonic
from types import FrameType
from typing import Any

_SAME_SECONDS = 1.0
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Stopped(Exception):
    """An evaluation or export was left off because some process of the run was asked to stop."""


class StopRequest:
    """While entered, the first of these signals sets `requested`; a later SIGINT interrupts.

    Both a terminal and a launcher may pass on one Ctrl-C, so what follows within a second counts
    as the same one.

    Outside the main thread, where handlers cannot be installed, it never triggers.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        self._since = 0.0
        self._previous: dict[signal.Signals, Any] = {}
        self.entered = False

    def __enter__(self) -> StopRequest:
        self.entered = True
        for number in SIGNALS:
            try:
                self._previous[number] = signal.signal(number, self._handle)
            except ValueError:
                break
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested is None:
            self.requested, self._since = signal.Signals(number).name, monotonic()
        elif number == signal.SIGINT and monotonic() - self._since > _SAME_SECONDS:
            raise KeyboardInterrupt
