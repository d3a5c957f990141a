"""``python -m qwen2kit_torch.parallel.launch PROCESSES MAX_RESTARTS -m MODULE ARGUMENTS...``

What ``torchrun --standalone`` does, with four differences that people notice: the processes say
what went wrong and nothing is added to that, a signal leaves them time to save, the exit code is
that of the process that failed by itself, and no process outlives the one that started it.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from uuid import uuid4

from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from qwen2kit.errors import PeerError
from qwen2kit.launch.lifeline import follow_parent, parent_here

# Long enough for a large checkpoint; a scheduler that is less patient kills everything anyway.
SHUTDOWN_SECONDS = 3600
# How processes end when another one has failed: by noticing it, or ended by the launcher, which
# has to resort to SIGKILL where they wait for the lost one on a GPU. The likeliest cause is first.
_CONSEQUENCES = (-signal.SIGKILL, PeerError.exit_code, -signal.SIGTERM)
SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"


def launch_command(processes: int, *, max_restarts: int) -> list[str]:
    """The command line of this module; the program to run is appended to it."""
    module = "qwen2kit_torch.parallel.launch"
    return [sys.executable, "-m", module, str(processes), str(max_restarts)]


def launch(processes: int, max_restarts: int, program: list[str]) -> int:
    """Run ``python *program`` as ``processes`` processes; the exit code for this one."""
    threads = max(1, (os.cpu_count() or 1) // processes)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    os.environ.update(parent_here())
    logging.disable(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=str(uuid4()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=max_restarts,
        monitor_interval=0.2,
        signals_to_handle=SIGNALS,
        shutdown_timeout=SHUTDOWN_SECONDS,
    )
    try:
        elastic_launch(config, sys.executable)(*program)
    except ChildFailedError as error:
        code = root_cause([failure.exitcode for failure in error.failures.values()])
        return code if code > 0 else 128 - code
    except SignalException as error:
        return 128 + error.sigval
    finally:
        _deaf()
    return 0


def _deaf() -> None:
    """It is over: a signal has nobody to reach any more, and the exit code stands."""
    for name in SIGNALS.split(","):
        signal.signal(signal.Signals[name], signal.SIG_IGN)


def root_cause(codes: list[int]) -> int:
    """The exit code that explains the others (negative: the signal that ended a process)."""
    own = [code for code in codes if code not in _CONSEQUENCES]
    return own[0] if own else min(codes, key=_CONSEQUENCES.index)


if __name__ == "__main__":
    follow_parent()
    sys.exit(launch(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]))
