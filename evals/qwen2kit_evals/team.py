"""Several processes answer the requests of one evaluation.

Process 0 builds prompts and scores; it hands every process its part of the requests in a file and
collects what they log. The other processes load the model and answer. Files in the run's directory
are all they exchange, so nobody waits in a collective while others work, and whatever was answered
before an interruption is found again by any number of processes.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import Any

from qwen2kit.backend.loading import LoadedModel
from qwen2kit.backend.processes import Processes
from qwen2kit.backend.values import ScoreRequest
from qwen2kit.generate.prefix import plan_scores
from qwen2kit.generate.sampling import Sampling
from qwen2kit_evals.generation import Asked, Decoding, continue_all, together_by_default
from qwen2kit_evals.request_log import RequestLog, read_new, worker_log

WORK, _END = "work", "end"
_POLL_SECONDS = 0.05
Work = Sequence[ScoreRequest] | Sequence[Asked]
Answer = tuple[int, Any]


def compute(loaded: LoadedModel, work: Work, *, together: int) -> Iterator[Answer]:
    """(index, answer) of every request as it is known: ``(logprob, is_greedy)`` or a text."""
    scores = [item for item in work if isinstance(item, ScoreRequest)]
    if scores:
        for index, score in loaded.model.score(scores):
            yield index, (score.logprob, score.is_greedy)
    else:
        asked = [item for item in work if isinstance(item, Asked)]
        yield from continue_all(loaded, asked, together=together)


class Team:
    """Process 0's view of the others. Use as a context manager: leaving it sends them home.

    Args:
        directory: the run's.
        processes: all that answer, this one included.
    """

    def __init__(self, directory: Path, processes: Processes) -> None:
        self._directory = directory
        self._processes = processes
        self._world = processes.world
        self._files = directory / WORK
        self._rounds = 0
        self._read = [0] * self._world

    def __enter__(self) -> Team:
        shutil.rmtree(self._files, ignore_errors=True)  # of a run that was killed
        self._files.mkdir(parents=True)
        self._processes.share(str(self._directory))
        logs = [worker_log(self._directory, rank) for rank in range(self._world)]
        self._read = [read_new(path, 0)[1] for path in logs]
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is None:  # otherwise the launcher ends all
            (self._files / _END).touch()
            self._processes.any(False)  # all have seen it
            shutil.rmtree(self._files)

    def answers(
        self, keys: Sequence[str], work: Work, own: Callable[[Sequence[int]], Iterator[Answer]]
    ) -> Iterator[Answer]:
        """(index, answer) of every request.

        Args:
            keys: of the requests, under which the others log their answers.
            work: the requests.
            own: computes (and logs) those of this process; given their indices.
        """
        parts = split(work, self._world)
        for rank in range(1, self._world):
            self._hand_out(rank, [keys[i] for i in parts[rank]], [work[i] for i in parts[rank]])
        self._rounds += 1
        awaited = {keys[i]: i for part in parts[1:] for i in part}
        for index, answer in own(parts[0]):
            yield index, answer
            yield from self._arrived(awaited)
        while awaited:
            yield from self._arrived(awaited)
            time.sleep(_POLL_SECONDS)

    def _hand_out(self, rank: int, keys: Sequence[str], work: Sequence[Any]) -> None:
        path = self._files / f"{self._rounds}-{rank}.json"
        building = path.with_suffix(".part")
        building.write_text(json.dumps({"keys": keys, "work": [_written(item) for item in work]}))
        building.rename(path)

    def _arrived(self, awaited: dict[str, int]) -> Iterator[Answer]:
        for rank in range(1, self._world):
            entries, self._read[rank] = read_new(
                worker_log(self._directory, rank), self._read[rank]
            )
            for key, answer in entries:
                if key in awaited:
                    yield awaited.pop(key), tuple(answer) if isinstance(answer, list) else answer


def work_for_team(
    processes: Processes, load: Callable[[], LoadedModel], batch_size: int | None
) -> None:
    """Answer what process 0 hands out to this process, until it sends everybody home.

    Args:
        processes: all of them.
        load: the model; called when process 0 has found everything in order.
        batch_size: prompts generated together; None is what keeps the device busy.
    """
    directory = Path(processes.share(None))
    loaded = load()
    together = batch_size or together_by_default(loaded)
    with RequestLog(worker_log(directory, processes.rank)) as log:
        for part in _parts(directory / WORK, processes.rank):
            work = [_read(item) for item in part["work"]]
            for index, answer in compute(loaded, work, together=together):
                log.add(part["keys"][index], answer)
    processes.any(False)


def _parts(files: Path, rank: int) -> Iterator[dict[str, Any]]:
    for number in count():
        path = files / f"{number}-{rank}.json"
        while not path.exists():
            if (files / _END).exists():
                return
            time.sleep(_POLL_SECONDS)
        yield json.loads(path.read_text())
        path.unlink()


def split(work: Work, world: int) -> list[list[int]]:
    """Indices for every process: about equal costs, and what shares a prefix stays together."""
    costs = list(_costs(work))
    total = sum(cost for _, cost in costs)
    parts: list[list[int]] = [[] for _ in range(world)]
    done = 0
    for indices, cost in costs:
        parts[min(world - 1, (done + cost // 2) * world // max(1, total))] += indices
        done += cost
    return parts


def _costs(work: Work) -> Iterator[tuple[list[int], int]]:
    """Requests in the order of their prefixes, with the tokens to compute for them."""
    scores = [item for item in work if isinstance(item, ScoreRequest)]
    if scores:
        for step in plan_scores(scores):
            yield [target.request for target in step.targets], len(step.feed)
    else:
        asked = [item for item in work if isinstance(item, Asked)]
        for index in sorted(range(len(asked)), key=lambda index: asked[index].prompt):
            item = asked[index]
            yield [index], len(item.prompt) + item.how.sampling.max_new_tokens


def _written(item: ScoreRequest | Asked) -> list[Any]:
    if isinstance(item, ScoreRequest):
        return [item.context, item.continuation]
    return [item.prompt, asdict(item.how.sampling), item.how.stop, item.stream]


def _read(item: list[Any]) -> Any:
    if len(item) == 2:
        return ScoreRequest(tuple(item[0]), tuple(item[1]))
    prompt, sampling, stop, stream = item
    sampling["stop_token_ids"] = tuple(sampling["stop_token_ids"])
    sampling["logit_bias"] = tuple((token, bias) for token, bias in sampling["logit_bias"])
    return Asked(tuple(prompt), Decoding(Sampling(**sampling), tuple(stop)), stream)
