"""How benchmark scripts run their contestants: results, failures, time limits."""

from __future__ import annotations

import fcntl
import importlib.util
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

SCRIPTS = Path(__file__).parents[3] / "benchmarks"
TELLS = "print('SO FAR {\"steps\": 2}', flush=True)"


@pytest.fixture(scope="module")
def contest() -> ModuleType:
    spec = importlib.util.spec_from_file_location("contest", SCRIPTS / "contest.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    before = signal.getsignal(signal.SIGTERM)
    spec.loader.exec_module(module)
    signal.signal(signal.SIGTERM, before)
    return module


def run(contest: ModuleType, program: str, limit: float = 60) -> object:
    return contest.run([sys.executable, "-c", program], limit)


def test_what_is_announced_counts(contest: ModuleType) -> None:
    program = f"{TELLS}; print('RESULT {{\"steps\": 3}}'); print('more')"
    assert run(contest, program) == [{"steps": 3}]


def test_a_failure_is_one_line_beside_what_was_told(contest: ModuleType) -> None:
    assert run(contest, "raise ValueError('no')") == [{"error": "ValueError: no"}]
    assert run(contest, "import os; os._exit(3)") == [{"error": "ended with 3"}]
    found = run(contest, f"{TELLS}; raise MemoryError('out of memory')")
    assert found == [{"steps": 2, "error": "MemoryError: out of memory"}]


def test_one_that_is_cut_off_leaves_what_it_told(
    contest: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(contest, "import time; time.sleep(99)", 0.5) == [{"error": "stopped after 0.5 s"}]
    found = run(contest, f"import time; {TELLS}; time.sleep(99)", 3)
    assert found == [{"steps": 2, "cut_off": "stopped after 3 s"}]
    assert "SO FAR" in capsys.readouterr().out


def test_a_script_takes_its_contestants_along(tmp_path: Path) -> None:
    begun, held = tmp_path / "begun", tmp_path / "held"
    sleeper = f"""
import fcntl, pathlib, time
lock = open({str(held)!r}, "w")
fcntl.flock(lock, fcntl.LOCK_EX)
pathlib.Path({str(begun)!r}).touch()
time.sleep(99)
"""
    program = f"import contest, sys; contest.run([sys.executable, '-c', {sleeper!r}], 99)"
    script = subprocess.Popen([sys.executable, "-c", program], cwd=SCRIPTS)
    while not begun.exists():
        assert script.poll() is None
        time.sleep(0.05)
    script.terminate()
    assert script.wait(30) == 128 + signal.SIGTERM
    with held.open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # free once the contestant is gone
