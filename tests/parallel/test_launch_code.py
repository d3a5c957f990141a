"""How a launcher of several processes ends: its exit code, and signals that come too late."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("torch")


@pytest.mark.parametrize(
    ("codes", "cause"),
    [
        ([6, 1], 6),  # one gave up, one noticed
        ([1, 6], 6),
        ([-15, 6], 6),  # ended by the launcher
        ([-9, 6], 6),  # ended by the launcher, the hard way
        ([1, -9], -9),  # one was killed, one noticed
        ([-15, -9], -9),
        ([-11, -9], -11),  # a crash
        ([1, 1], 1),
        ([-15, 1], 1),
    ],
)
def test_the_cause_is_told_from_its_consequences(codes: list[int], cause: int) -> None:
    from qwen2kit_torch.parallel.launch import root_cause

    assert root_cause(codes) == cause


def test_signals_after_the_end_change_nothing() -> None:
    code = """
import os, signal, weakref
from qwen2kit_torch.parallel.launch import SIGNALS, launch

class Late: pass
def late_signals():
    for name in SIGNALS.split(","):
        os.kill(os.getpid(), signal.Signals[name])
late = Late()
weakref.finalize(late, late_signals)
print(launch(1, 0, ["-c", "print('did it', flush=True)"]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "did it\n0\n", "")
