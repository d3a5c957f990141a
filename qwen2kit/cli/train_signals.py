"""What SIGTERM and SIGUSR1 do to ``qwen2kit train`` before a run listens to them, and after it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


@contextmanager
def answered(run_dir: Path | None) -> Iterator[None]:
    """While the block has no handlers of its own, these signals end the process at once, with one
    line and 128 plus their number: nothing is trained yet. After it they are ignored, since the
    exit code stands. One of several processes is ended by its launcher, who speaks for all.

    Args:
        run_dir: the run's, if it was named.
    """
    alone = os.environ.get("WORLD_SIZE", "1") == "1"

    def leave(number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        begun = run_dir is not None and (run_dir / "run.json").exists()
        advice = (
            f"went on; continue with: qwen2kit train --resume {run_dir}"
            if begun
            else "began; give the command again"
        )
        os.write(2, f"stopped by {name} before training {advice}\n".encode())
        os._exit(128 + number)

    with suppress(ValueError):  # not the main thread, which alone has handlers
        for number in _SIGNALS if alone else ():
            signal.signal(number, leave)
    try:
        yield
    finally:
        with suppress(ValueError):
            for number in _SIGNALS:
                signal.signal(number, signal.SIG_IGN)
