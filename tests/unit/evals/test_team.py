"""Several processes answer one evaluation: nothing twice, nothing lost, the same answers."""

from __future__ import annotations

import json
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from qwen2kit.backend.protocol import ScoreRequest
from qwen2kit.generate.sampling import Sampling
from qwen2kit_evals.generation import Asked, Decoding
from qwen2kit_evals.request_log import FILE, RequestLog, read_new, worker_log
from qwen2kit_evals.results import EvalResult
from qwen2kit_evals.run import evaluate
from qwen2kit_evals.tasks import select_tasks
from qwen2kit_evals.team import Team, _read, _written, split, work_for_team
from tests.unit.evals.reference_lm import load_reference

TASKS = ["tiny_choice", "tiny_rolling", "tiny_generate"]


class Threads:
    """`Processes` that are threads of this one."""

    def __init__(self, world: int) -> None:
        self.world = world
        self._gate = threading.Barrier(world, timeout=300)
        self._value: Any = None

    def seat(self, rank: int) -> Any:
        outer = self

        class Seat:
            world = outer.world

            def any(self, flag: bool) -> bool:
                outer._gate.wait()
                return flag

            def share(self, value: Any) -> Any:
                if rank == 0:
                    outer._value = value
                outer._gate.wait()
                return outer._value

        seat: Any = Seat()
        seat.rank = rank
        return seat


def run_team(tiny: Path, tasks: Path, output: Path, world: int) -> EvalResult:
    threads = Threads(world)
    workers = [
        threading.Thread(
            target=work_for_team, args=(threads.seat(rank), lambda: load_reference(tiny), 2)
        )
        for rank in range(1, world)
    ]
    for worker in workers:
        worker.start()
    output.mkdir(exist_ok=True)
    with Team(output, threads.seat(0)) as team:
        result = run(tiny, tasks, output, team)
    for worker in workers:
        worker.join(60)
        assert not worker.is_alive()
    return result


def run(tiny: Path, tasks: Path, output: Path | None, team: Team | None = None) -> EvalResult:
    selection = select_tasks(TASKS, include_path=tasks, defaults=False)
    return evaluate(load_reference(tiny), selection, output=output, batch_size=2, team=team)


@pytest.mark.parametrize("world", [2, 3])
def test_a_team_answers_as_one_process_does(
    tiny: Path, task_files: Path, tmp_path: Path, world: int
) -> None:
    alone = run(tiny, task_files, None)
    result = run_team(tiny, task_files, tmp_path / "run", world)
    assert result.samples == alone.samples
    assert result.rows == alone.rows
    logs = [tmp_path / "run" / FILE] + [worker_log(tmp_path / "run", r) for r in range(1, world)]
    entries = [read_new(path, 0)[0] for path in logs]
    counts = Counter(key for log in entries for key, _ in log)
    assert set(counts.values()) == {1}
    total = len(counts)
    assert all(len(log) >= total // (2 * world) for log in entries)  # everyone did its share
    assert result.provenance["evaluation"]["requests"] == {"answered": total, "from_log": 0}
    assert not (tmp_path / "run" / "work").exists()


@pytest.mark.parametrize("world", [1, 2, 3])
def test_an_interrupted_team_is_continued_by_any_number(
    tiny: Path, task_files: Path, tmp_path: Path, world: int
) -> None:
    whole = run_team(tiny, task_files, tmp_path / "whole", 2)
    output = tmp_path / "half"
    (output / "work").mkdir(parents=True)
    (output / "work" / "0-1.json").write_text("left over")
    kept = 0
    for name in (FILE, worker_log(output, 1).name):
        lines = (tmp_path / "whole" / name).read_bytes().splitlines(keepends=True)
        half = len(lines) // 2
        (output / name).write_bytes(b"".join(lines[:half]) + lines[half][:20])
        kept += half
    if world == 1:
        resumed = run(tiny, task_files, output)
    else:
        resumed = run_team(tiny, task_files, output, world)
    assert resumed.samples == whole.samples
    asked = resumed.provenance["evaluation"]["requests"]
    assert asked["from_log"] == kept
    assert asked["answered"] == whole.provenance["evaluation"]["requests"]["answered"] - kept


def test_parts_cost_the_same_and_keep_prefixes_together() -> None:
    work = [ScoreRequest((*[header] * 50, n), (1,)) for n in range(20) for header in (7, 8, 9, 10)]
    parts = split(work, 4)
    assert sorted(index for part in parts for index in part) == list(range(80))
    assert [len(part) for part in parts] == [20] * 4
    assert [len({work[i].context[0] for i in part}) for part in parts] == [1] * 4
    how = Decoding(Sampling(max_new_tokens=10), ())
    asked = [Asked((1,) * n, how, n) for n in (90, 10, 30, 60)]
    assert sorted(map(sorted, split(asked, 2))) == [[0], [1, 2, 3]]
    assert split([], 3) == [[], [], []]


def test_requests_travel_unchanged() -> None:
    sampling = Sampling(stop_token_ids=(3, 4), temperature=0.5, logit_bias=((5, -1.5),), seed=9)
    for item in (
        ScoreRequest((1, 2), (3,)),
        Asked((1, 2), Decoding(sampling, ("\n\n", "é")), stream=7),
    ):
        assert _read(json.loads(json.dumps(_written(item)))) == item


def test_a_log_is_read_line_by_line(tmp_path: Path) -> None:
    path = worker_log(tmp_path, 1)
    assert read_new(path, 0) == ([], 0)
    with RequestLog(path) as log:
        log.add("a", [-1.0, True])
    entries, end = read_new(path, 0)
    assert entries == [("a", [-1.0, True])]
    with path.open("ab") as file:
        file.write(b'{"key": "b", "ans')
    assert read_new(path, end) == ([], end)
    with path.open("ab") as file:
        file.write(b'wer": "x"}\n')
    assert read_new(path, end)[0] == [("b", "x")]
