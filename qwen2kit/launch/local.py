"""Several processes on this machine: start them, pass signals on, say how it ended."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Sequence
from types import FrameType

from qwen2kit.backend.protocol import DistributedBackend
from qwen2kit.errors import TrainingError
from qwen2kit.launch.lifeline import parent_here
from qwen2kit.train.signals import SIGNALS


def run_here(
    backend: DistributedBackend, processes: int, max_restarts: int, arguments: Sequence[str]
) -> int:
    """``qwen2kit *arguments`` as ``processes`` processes of one run; their exit code.

    The processes report their own failures. They have a session of their own, so that Ctrl-C
    reaches them once, through this process. They get SIGTERM when this process is gone, however it
    went.

    Raises:
        TrainingError: one was killed from outside, and could not say so.
    """
    launcher = backend.launch_command(processes, max_restarts=max_restarts)
    child = subprocess.Popen(
        [*launcher, "-m", "qwen2kit", *arguments],
        env={**os.environ, "PYTHONSAFEPATH": "1", **parent_here()},
        start_new_session=True,
    )

    def forward(number: int, frame: FrameType | None) -> None:
        child.send_signal(number)

    before = {number: signal.signal(number, forward) for number in SIGNALS}
    try:
        code = child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    code = code if code >= 0 else 128 - code
    if code == 128 + signal.SIGKILL:
        raise TrainingError(
            "a process was killed (the machine may be out of memory); continue with "
            "--resume or --auto-resume"
        )
    return code
