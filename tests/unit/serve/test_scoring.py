"""Scoring prompts in the engine's own slots: waiting, memory, leaving."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import httpx
import numpy as np
from numpy.typing import NDArray

from qwen2kit.backend.loading import LoadedModel
from qwen2kit.backend.protocol import CompiledModel
from qwen2kit.backend.slots import Feed
from qwen2kit.engine.host_logits import HostLogits
from qwen2kit.engine.recompute import RecomputingSlots
from qwen2kit.engine.text import TextEngine
from qwen2kit.errors import BackendError
from qwen2kit.serve.limits import Limits
from qwen2kit.serve.score_memory import PromptScores, ScoreMemory, TokenScore
from qwen2kit.serve.scoring import PromptScorer, Scoring
from tests.unit.serve.in_process import CAPACITY, serving

PROMPT = [(7 * n) % 200 + 1 for n in range(30)]
SCORED = {"model": "tiny", "prompt": PROMPT, "echo": True, "logprobs": 2, "temperature": 0}


class FullDevice:
    """A model with room for ``slots`` sequences, and memory for many rows of logits only while
    ``free`` is set."""

    def __init__(self, inner: CompiledModel, slots: int) -> None:
        self.spec, self.limit, self._inner = inner.spec, inner.limit, inner
        self.room, self.free, self.given = slots, True, 0
        self.passes: list[int] = []  # rows of logits that each was asked for

    def logits(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        return self._inner.logits(tokens)

    def slots(self, count: int, capacity: int) -> RecomputingSlots:
        self.given += count
        if self.given > self.room:
            raise BackendError("no memory for another slot")
        return _Slots(self, count, capacity)


class _Slots(RecomputingSlots):
    def __init__(self, model: FullDevice, count: int, capacity: int) -> None:
        super().__init__(cast(CompiledModel, model), count, capacity)
        self._device = model

    def feed(self, feeds: Sequence[Feed]) -> HostLogits:
        if not self._device.free and any(feed.wanted > 1 for feed in feeds):
            raise BackendError("the device ran out of memory")
        self._device.passes.append(sum(feed.wanted for feed in feeds))
        return super().feed(feeds)


def _full(loaded: LoadedModel, slots: int) -> tuple[LoadedModel, FullDevice]:
    device = FullDevice(loaded.model, slots)
    return replace(loaded, model=cast(CompiledModel, device)), device


def _token_logprobs(answer: httpx.Response) -> Any:
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["logprobs"]["token_logprobs"]


def test_more_than_the_slots_wait_and_get_what_the_model_says(loaded: LoadedModel) -> None:
    bodies: list[dict[str, Any]] = [
        SCORED | {"max_tokens": 0},
        SCORED | {"max_tokens": 12},
        {"model": "tiny", "prompt": "abc", "max_tokens": 40, "temperature": 0},
    ] * 3

    async def run() -> list[httpx.Response]:
        full, _ = _full(loaded, 1)
        async with serving(full, limits=Limits(slots=1)) as (service, client):
            found = await asyncio.gather(
                *(client.post("/v1/completions", json=body) for body in bodies)
            )
            assert service.dispatcher.load == 0
            return found

    answers = asyncio.run(run())
    assert [answer.status_code for answer in answers] == [200] * 9
    rows = loaded.model.logits(PROMPT).astype(np.float64)
    rows -= np.log(np.exp(rows).sum(-1, keepdims=True))
    wanted = [rows[i, token] for i, token in enumerate(PROMPT[1:])]
    for answer in answers[0::3] + answers[1::3]:
        found = _token_logprobs(answer)
        assert found[0] is None
        np.testing.assert_allclose(found[1:30], wanted, atol=1e-4)
    assert len({answer.json()["choices"][0]["text"] for answer in answers[1::3]}) == 1


def _logprobs_of(loaded: LoadedModel, prompt: Sequence[int]) -> list[float]:
    rows = loaded.model.logits(prompt).astype(np.float64)
    rows -= np.log(np.exp(rows).sum(-1, keepdims=True))
    return [rows[i, token] for i, token in enumerate(prompt[1:])]


def test_prompts_are_scored_together_and_what_they_begin_with_once(loaded: LoadedModel) -> None:
    answers = [[*PROMPT, 9, tail] for tail in (3, 4, 5)]
    others = [[n, 2, n, 7] for n in (11, 12, 13)]
    body = SCORED | {"prompt": [*answers, *others], "max_tokens": 0}

    async def run() -> FullDevice:
        full, device = _full(loaded, 8)
        async with serving(full, limits=Limits(slots=8)) as (_, client):
            for top in (2, 1, 0):  # asked again, nothing is computed
                answer = await client.post("/v1/completions", json=body | {"logprobs": top})
                for choice, prompt in zip(
                    answer.json()["choices"], [*answers, *others], strict=True
                ):
                    found = choice["logprobs"]
                    wanted = _logprobs_of(loaded, prompt)
                    np.testing.assert_allclose(found["token_logprobs"][1:], wanted, atol=1e-4)
                    assert all(len(top_n) in (top, top + 1) for top_n in found["top_logprobs"][1:])
            more = body | {"prompt": [*PROMPT, 9, 6, 1, 2], "max_tokens": 2}
            await client.post("/v1/completions", json=more)
        return device

    device = asyncio.run(run())
    # One answer and the others, then the last tokens of the two other answers; then what is new,
    # and two tokens of text (whose prompt's last token is all that is read again).
    assert device.passes == [31 + 3 * 3, 1 + 1, 3, 1, 1]


def test_a_long_prompt_holds_up_neither_text_nor_for_ever_others(loaded: LoadedModel) -> None:
    async def run() -> None:
        full, device = _full(loaded, 3)
        async with serving(full, limits=Limits(slots=3)) as (service, client):
            piece = service.dispatcher._thread._scorer
            piece._piece = 8
            texts = {"model": "tiny", "prompt": "abc", "max_tokens": 30, "ignore_eos": True}
            bodies = [texts, *[SCORED | {"prompt": [n, *PROMPT], "max_tokens": 0} for n in (5, 6)]]
            found = await asyncio.gather(*(client.post("/v1/completions", json=b) for b in bodies))
            assert [answer.status_code for answer in found] == [200] * 3
            assert max(device.passes) <= 8
            for n, answer in zip((5, 6), found[1:], strict=True):
                wanted = _logprobs_of(loaded, [n, *PROMPT])
                np.testing.assert_allclose(_token_logprobs(answer)[1:], wanted, atol=1e-4)

    asyncio.run(run())


def test_old_scores_are_forgotten() -> None:
    memory = ScoreMemory()
    likeliest = tuple((n, -1.0) for n in range(20))
    scores = [TokenScore(2, -0.5, likeliest)] * 999
    for n in range(20):
        memory.keep((n, *[2] * 999), 20, scores)
    lengths = [len(memory.recall((n, *[2] * 999, 3), 20)) for n in range(20)]
    kept = sum(length == 999 for length in lengths)
    assert lengths == [0] * (20 - kept) + [999] * kept
    assert kept * 999 * 21 <= 1 << 17
    assert memory.recall((19, 2, 2, 7), 1) == [TokenScore(2, -0.5, likeliest[:1])] * 2
    assert memory.recall((19, 2, 2, 7), 21) == []
    for n in range(100):
        memory.keep((n, 1), 0, scores[:1])
    assert memory.recall((35, 1), 0) == []


def test_who_has_a_slot_goes_on_while_an_older_one_waits(loaded: LoadedModel) -> None:
    with TextEngine(loaded, slots=1, capacity=CAPACITY) as engine:
        future = cast("asyncio.Future[PromptScores]", None)
        older, newer = (Scoring((n, *PROMPT), 0, future) for n in (5, 6))
        place = engine.engine.lend(newer.prompt)
        assert place is not None
        newer.slot = place.slot
        scorer = PromptScorer(engine, piece=16)
        assert scorer.advance([older, newer]) == []
        ((first, _),) = scorer.advance([older, newer])
        assert first is newer
        assert scorer.advance([older]) == []
        ((second, scores),) = scorer.advance([older])
    assert second is older
    assert isinstance(scores, list)
    found = [score.logprob for score in scores]
    np.testing.assert_allclose(found, _logprobs_of(loaded, older.prompt), atol=1e-4)


def test_nan_is_the_failure_of_its_own_prompt(loaded: LoadedModel) -> None:
    class Broken(FullDevice):
        def logits(self, tokens: Sequence[int]) -> NDArray[np.float32]:
            return super().logits(tokens) * (np.nan if tokens[0] == 7 else 1)

    async def run() -> None:
        model = cast(CompiledModel, Broken(loaded.model, 4))
        async with serving(replace(loaded, model=model), limits=Limits(slots=4)) as (_, client):
            bodies = [SCORED | {"prompt": [n, *PROMPT], "max_tokens": 0} for n in (6, 7, 8, 7, 6)]
            found = await asyncio.gather(*(client.post("/v1/completions", json=b) for b in bodies))
            assert [answer.status_code for answer in found] == [200, 500, 200, 500, 200]
            assert found[1].json()["error"]["code"] == "non_finite_logits"

    asyncio.run(run())


def test_memory_that_is_short_for_the_moment_is_503_and_never_ends_the_server(
    loaded: LoadedModel,
) -> None:
    async def run() -> None:
        full, device = _full(loaded, 1)
        async with serving(full, limits=Limits(slots=1)) as (service, client):
            device.free = False
            refused = await client.post("/v1/completions", json=SCORED | {"max_tokens": 0})
            assert refused.status_code == 503
            assert int(refused.headers["retry-after"]) >= 1
            assert refused.json()["error"]["code"] == "out_of_memory"
            device.free = True
            _token_logprobs(await client.post("/v1/completions", json=SCORED))
            assert service.dispatcher.failure is None

    asyncio.run(run())


def test_what_never_fits_is_400(loaded: LoadedModel) -> None:
    async def run() -> None:
        async with serving(loaded) as (_, client):
            body = SCORED | {"prompt": [1] * (CAPACITY + 1), "max_tokens": 0}
            refused = await client.post("/v1/completions", json=body)
            assert refused.status_code == 400
            assert refused.json()["error"]["code"] == "context_length_exceeded"

    asyncio.run(run())


def test_who_leaves_gives_the_slot_back(loaded: LoadedModel) -> None:
    async def run() -> None:
        full, _ = _full(loaded, 1)
        async with serving(full, limits=Limits(slots=1)) as (service, client):
            for _ in range(20):
                task = asyncio.create_task(
                    client.post("/v1/completions", json=SCORED | {"max_tokens": 0})
                )
                await asyncio.sleep(0.001)
                task.cancel()
            _token_logprobs(await client.post("/v1/completions", json=SCORED))
            assert service.dispatcher.load == 0

    asyncio.run(run())
