"""Every answer is on disk at once, is found again, and is never computed twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qwen2kit.backend.protocol import ScoreRequest
from qwen2kit.errors import ConfigError, DataError
from qwen2kit_evals.request_log import FILE, RequestLog
from qwen2kit_evals.results import EvalResult
from qwen2kit_evals.run import evaluate
from qwen2kit_evals.tasks import select_tasks
from tests.unit.evals.reference_lm import load_reference

ROOT = Path(__file__).parents[3]
TASKS = ["tiny_choice", "tiny_rolling", "tiny_generate"]


def test_answers_are_found_by_content(tmp_path: Path) -> None:
    requests = [ScoreRequest((1, 2), (3,)), ScoreRequest((1,), (2, 3)), ScoreRequest((1, 2), (3,))]
    with RequestLog(tmp_path / FILE, "model") as log:
        keys = log.score_keys(requests)
        assert len(set(keys)) == 3
        log.add(keys[0], [-1.5, True])
    with RequestLog(tmp_path / FILE, "model") as log:
        again = log.score_keys(reversed(requests))
        assert log.look_up(again) == ([[-1.5, True], None, None], [1, 2])
        assert (log.reused, log.computed) == (1, 0)
    with RequestLog(tmp_path / FILE, "other model") as log:
        assert log.look_up(log.score_keys(requests)) == ([None] * 3, [0, 1, 2])


def test_generation_keys_tell_settings_and_repeats_apart() -> None:
    log = RequestLog()
    asked = [("p", {"until": ["."]}), ("p", {"until": ["."]}), ("p", {"until": [","]})]
    keys = log.text_keys(asked, [1])
    assert len({*keys, *log.text_keys(asked, [2])}) == 6
    assert log.text_keys(asked, [1]) == keys


def test_a_torn_last_line_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / FILE
    whole = json.dumps({"key": "a", "answer": "é"}, ensure_ascii=False) + "\n"
    path.write_text(whole + '{"key": "b", "ans')
    with RequestLog(path) as log:
        assert log.look_up(["a", "b"]) == (["é", None], [1])
        log.add("b", "x")
    assert path.read_text() == whole + '{"key": "b", "answer": "x"}\n'


def test_damage_and_a_second_writer_are_refused(tmp_path: Path) -> None:
    path = tmp_path / FILE
    path.write_text("{}\n")
    with pytest.raises(DataError, match="line 1 is damaged"):
        RequestLog(path)
    path.write_text("")
    with RequestLog(path), pytest.raises(ConfigError, match="another evaluation is writing"):
        RequestLog(path)


def run(tiny: Path, tasks: Path, output: Path | None) -> EvalResult:
    selection = select_tasks(TASKS, include_path=tasks, defaults=False)
    return evaluate(load_reference(tiny), selection, output=output, batch_size=3)


def test_an_interrupted_run_goes_on(tiny: Path, task_files: Path, tmp_path: Path) -> None:
    whole = run(tiny, task_files, tmp_path / "whole")
    lines = (tmp_path / "whole" / FILE).read_bytes().splitlines(keepends=True)
    for kept in (1, len(lines) // 2, len(lines) - 1):
        output = tmp_path / f"half-{kept}"
        output.mkdir()
        (output / FILE).write_bytes(b"".join(lines[:kept]) + lines[kept][:20])
        resumed = run(tiny, task_files, output)
        counts = resumed.provenance["evaluation"]["requests"]
        assert counts == {"answered": len(lines) - kept, "from_log": kept}
        assert resumed.samples == whole.samples
        assert resumed.rows == whole.rows
        assert sorted((output / FILE).read_bytes().splitlines(keepends=True)) == sorted(lines)
        assert (output / "results.json").is_file()


# Killed from outside while it scores: the model never gives its tenth answer.
VICTIM = """
import sys, time
from pathlib import Path
from qwen2kit_evals.run import evaluate
from qwen2kit_evals.tasks import select_tasks
from tests.unit.evals.reference_lm import load_reference
tiny, tasks, output = map(Path, sys.argv[1:])
loaded = load_reference(tiny)
score, asked = loaded.model.score, []
def slow(requests):
    for answer in score(requests):
        yield answer
        asked.append(answer)
        if len(asked) == 9:
            time.sleep(900)
loaded.model.score = slow
evaluate(loaded, select_tasks(["tiny_choice"], include_path=tasks, defaults=False), output=output)
"""


def test_kill_9_loses_no_sample(tiny: Path, task_files: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    victim = subprocess.Popen(
        [sys.executable, "-c", VICTIM, str(tiny), str(task_files), str(output)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"},
        stderr=subprocess.DEVNULL,
    )
    log = output / FILE
    while victim.poll() is None:
        if log.is_file() and log.read_bytes().count(b"\n") >= 7:
            break
        time.sleep(0.01)
    victim.send_signal(signal.SIGKILL)
    assert victim.wait() == -signal.SIGKILL
    before = log.read_bytes().splitlines()
    assert 7 <= len(before) < 32
    assert not (output / "results.json").exists()
    selection = select_tasks(["tiny_choice"], include_path=task_files, defaults=False)
    resumed = evaluate(load_reference(tiny), selection, output=output)
    after = [json.loads(line)["key"] for line in log.read_bytes().splitlines()]
    assert len(after) == len(set(after)) == 32  # eight questions, four choices
    counts = resumed.provenance["evaluation"]["requests"]
    assert counts == {"answered": 32 - len(before), "from_log": len(before)}
    assert resumed.samples == evaluate(load_reference(tiny), selection).samples
