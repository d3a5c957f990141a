"""No process outlives the one that started it."""

from __future__ import annotations

import os
import select
import subprocess
import sys

import pytest

CHILD = """
import os, signal, sys, time
from qwen2kit.launch import lifeline
if {looks}:
    lifeline._ask_kernel = lambda: False
    lifeline._LOOK_SECONDS = 0.05
def leave(*_):
    print("left", flush=True)
    os._exit(0)
signal.signal(signal.SIGTERM, leave)
time.sleep({late})
lifeline.follow_parent()
assert lifeline.PARENT not in os.environ
print("following", flush=True)
time.sleep(60)
"""

PARENT = """
import os, subprocess, sys, time
from qwen2kit.launch.lifeline import parent_here
child = subprocess.Popen(
    [sys.executable, "-c", sys.argv[1]], env={**os.environ, **parent_here()},
    start_new_session=True,
)
print("started", child.pid, flush=True)
time.sleep(60)
"""


def said(process: subprocess.Popen[bytes]) -> str:
    """The next line; reads no further than that."""
    assert process.stdout is not None
    assert select.select([process.stdout], [], [], 300)[0], "nothing was said"
    return process.stdout.readline().decode()


@pytest.mark.parametrize("looks", [False, True])
@pytest.mark.parametrize("late", [0, 1])
def test_it_gets_sigterm(looks: bool, late: float) -> None:
    """``late``: the parent is gone before the child asks."""
    process = subprocess.Popen(
        [sys.executable, "-c", PARENT, CHILD.format(looks=looks, late=late)],
        stdout=subprocess.PIPE,
        bufsize=0,
    )
    assert said(process).startswith("started")
    if not late:
        assert said(process) == "following\n"
    process.kill()
    process.wait()
    assert said(process) == "left\n"


def test_nothing_happens_unasked() -> None:
    code = "from qwen2kit.launch.lifeline import follow_parent; follow_parent(); print('here')"
    environment = {name: value for name, value in os.environ.items() if name != "QWEN2KIT_PARENT"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True
    )
    assert done.stdout == "here\n"
