"""The engine thread and its clients: failure, back-pressure, slow and leaving readers."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray

from qwen2kit.backend.loading import LoadedModel
from qwen2kit.backend.protocol import CompiledModel
from qwen2kit.engine.recompute import RecomputingSlots
from qwen2kit.errors import BackendError
from qwen2kit.generate.sampling import Sampling
from qwen2kit.serve.errors import ApiError
from qwen2kit.serve.limits import Limits
from qwen2kit.serve.ticket import Job, Work
from tests.unit.serve.in_process import ScriptedEngine, serving

BODY = {"model": "tiny", "prompt": "a", "max_tokens": 16}
WORK = Work(prompt=(1,), sampling=Sampling())


async def _until(condition: Any) -> None:
    end = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < end
        await asyncio.sleep(0.005)


async def _read(job: Job) -> int:
    read = 0
    while job.unfinished:
        read += len(await job.take())
    return read


def test_an_engine_that_breaks_answers_500_and_turns_unhealthy(loaded: LoadedModel) -> None:
    async def run() -> None:
        go, failures = threading.Event(), []
        engine = ScriptedEngine("abc", go)
        async with serving(loaded, engine=engine, failures=failures) as (service, client):
            running = [
                asyncio.create_task(client.post("/v1/completions", json=BODY)) for _ in range(3)
            ]
            await _until(lambda: service.dispatcher.load == 3)
            assert (await client.get("/health")).status_code == 200
            engine.error = RuntimeError("device lost: secret detail")
            go.set()
            for answer in await asyncio.gather(*running):
                assert answer.status_code == 500
                assert answer.json()["error"]["code"] == "engine_failed"
                assert "secret" not in answer.text
            for path in ("/health", "/health/ready", "/health/live"):
                assert (await client.get(path)).status_code == 503
            later = await client.post("/v1/completions", json=BODY)
            assert later.status_code == 500
            assert failures == [engine.error]
            await _until(lambda: engine.closed)

    asyncio.run(run())


class Poisoned:
    """A model whose logits are NaN from the token 7 of a text on."""

    def __init__(self, inner: CompiledModel) -> None:
        self.spec, self.limit, self._inner = inner.spec, inner.limit, inner

    def logits(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        rows = self._inner.logits(tokens)
        return np.full_like(rows, np.nan) if 7 in tokens else rows

    def slots(self, count: int, capacity: int) -> RecomputingSlots:
        return RecomputingSlots(cast(CompiledModel, self), count, capacity)


def test_nan_is_the_failure_of_its_own_request(loaded: LoadedModel) -> None:
    async def run() -> None:
        poisoned = replace(loaded, model=cast(CompiledModel, Poisoned(loaded.model)))
        failures: list[BaseException] = []
        bodies = [
            {**BODY, "prompt": prompt, "temperature": 0, "logit_bias": {"7": -100}, **changes}
            for prompt in ([1, 2], [1, 7])
            for changes in ({}, {"n": 2}, {"stream": True}, {"echo": True, "logprobs": 1})
        ]
        async with serving(poisoned, failures=failures) as (service, client):
            answers = await asyncio.gather(
                *(client.post("/v1/completions", json=body) for body in bodies)
            )
            assert [answer.status_code for answer in answers] == [200] * 4 + [500, 500, 200, 500]
            for answer in answers[4:]:
                error = json.loads(answer.text.removeprefix("data: "))["error"]
                assert (error["code"], error["type"]) == ("non_finite_logits", "server_error")
            texts = [answer.json()["choices"][0]["text"] for answer in answers[:2]]
            assert texts[0] == texts[1]
            assert answers[2].text.endswith("data: [DONE]\n\n")
            assert service.dispatcher.load == 0
            assert not failures

    asyncio.run(run())


def test_a_stream_of_a_broken_engine_ends_with_the_error(loaded: LoadedModel) -> None:
    async def run() -> None:
        go = threading.Event()
        engine = ScriptedEngine("abcdef", go)
        async with serving(loaded, engine=engine) as (service, client):
            body = BODY | {"stream": True}
            task = asyncio.create_task(client.post("/v1/completions", json=body))
            await _until(lambda: service.dispatcher.load == 1)
            await asyncio.sleep(0.05)
            engine.error = RuntimeError("x")
            go.set()
            text = (await task).text
            assert '"code":"engine_failed"' in text
            assert "[DONE]" not in text

    asyncio.run(run())


def test_the_queue_is_bounded_and_frees_up(loaded: LoadedModel) -> None:
    async def run() -> None:
        go = threading.Event()
        limits = Limits(slots=2, queue=1)
        async with serving(loaded, engine=ScriptedEngine("ab", go), limits=limits) as both:
            service, client = both
            running = [
                asyncio.create_task(client.post("/v1/completions", json=BODY)) for _ in range(3)
            ]
            await _until(lambda: service.dispatcher.load == 3)
            refused = await client.post("/v1/completions", json=BODY)
            assert refused.status_code == 429
            assert int(refused.headers["retry-after"]) >= 1
            never = await client.post("/v1/completions", json=BODY | {"n": 4})
            assert never.status_code == 400
            go.set()
            assert [answer.status_code for answer in await asyncio.gather(*running)] == [200] * 3
            assert (await client.post("/v1/completions", json=BODY)).status_code == 200
            assert service.dispatcher.load == 0

    asyncio.run(run())


def test_a_reader_that_never_reads_is_cut_off(loaded: LoadedModel) -> None:
    async def run() -> None:
        engine = ScriptedEngine("x" * 5000, pause=0.001)
        async with serving(loaded, engine=engine, limits=Limits(max_pending=10)) as (service, _):
            job = await service.dispatcher.submit([WORK])
            await _until(lambda: service.dispatcher.load == 0)
            await _until(lambda: engine.running == 0)
            with pytest.raises(ApiError, match="does not read"):
                await _read(job)
            assert engine.stats.generated_tokens < 5000

    asyncio.run(run())


def test_cancelling_frees_the_slot_and_tells_nobody(loaded: LoadedModel) -> None:
    async def run() -> None:
        go = threading.Event()
        engine = ScriptedEngine("x" * 1000, go)
        async with serving(loaded, engine=engine) as (service, client):
            job = await service.dispatcher.submit([WORK, WORK])
            assert service.dispatcher.load == 2
            service.dispatcher.cancel(job)
            assert service.dispatcher.load == 0
            go.set()
            await _until(lambda: engine.running == 0)
            task = asyncio.create_task(client.post("/v1/completions", json=BODY))
            await _until(lambda: service.dispatcher.load == 1)
            task.cancel()
            await _until(lambda: service.dispatcher.load == 0)
            await _until(lambda: engine.running == 0)

    asyncio.run(run())


def test_draining_refuses_new_work_and_finishes_the_old(loaded: LoadedModel) -> None:
    async def run() -> None:
        go = threading.Event()
        async with serving(loaded, engine=ScriptedEngine("ab", go)) as (service, client):
            old = asyncio.create_task(client.post("/v1/completions", json=BODY))
            await _until(lambda: service.dispatcher.load == 1)
            service.dispatcher.draining = True
            assert (await client.get("/health/ready")).status_code == 503
            assert (await client.get("/health/live")).status_code == 200
            assert (await client.post("/v1/completions", json=BODY)).status_code == 503
            go.set()
            assert (await old).json()["choices"][0]["text"] == "ab"

    asyncio.run(run())


def test_what_the_engine_refuses_is_a_400(loaded: LoadedModel) -> None:
    class Refusing(ScriptedEngine):
        def submit(self, *arguments: Any, **options: Any) -> int:
            raise BackendError("does not fit")

    async def run() -> httpx.Response:
        async with serving(loaded, engine=Refusing("a")) as (service, client):
            answer = await client.post("/v1/completions", json=BODY | {"n": 3})
            assert service.dispatcher.load == 0
            return answer

    answer = asyncio.run(run())
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == "does not fit"


def test_closing_lets_the_engine_go(loaded: LoadedModel) -> None:
    engine = ScriptedEngine("a" * 5000, pause=0.001)

    async def run() -> ApiError:
        async with serving(loaded, engine=engine) as (service, _):
            job = await service.dispatcher.submit([WORK])
        with pytest.raises(ApiError) as found:
            await _read(job)
        return found.value

    assert asyncio.run(run()).code == "shutting_down"
    assert engine.closed
