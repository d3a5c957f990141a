"""What is done for every token is as cheap as it may be, and says what the dear way would say."""

from __future__ import annotations

import asyncio
import gc
import json
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram, generate_latest

from qwen2kit.backend.protocol import TokenEvent
from qwen2kit.engine.text import TextEvent
from qwen2kit.generate.sampling import Sampling
from qwen2kit.serve import collecting, taking_turns
from qwen2kit.serve.errors import ApiError, engine_failed
from qwen2kit.serve.histogram import CheapHistogram
from qwen2kit.serve.sse import TextEvents, sse
from qwen2kit.serve.ticket import Job, Work

TEXTS = st.text(st.characters(exclude_categories=["Cs"])) | st.sampled_from(['"', "\\", "\u2028"])


@given(text=TEXTS, model=TEXTS)
def test_a_filled_pattern_is_the_encoded_document(text: str, model: str) -> None:
    def make(text: str) -> dict[str, Any]:
        return {"model": model, "choices": [{"text": text, "logprobs": None}]}

    event = TextEvents(make).around(text)
    assert event == sse(make(text))
    assert event.startswith("data: ")
    assert event.endswith("\n\n")
    assert json.loads(event[6:]) == make(text)


@given(st.lists(st.tuples(st.sampled_from([0.0, 0.001, 0.05, 0.1, 0.7, 9.0]), st.integers(1, 3))))
def test_a_cheap_histogram_shows_what_the_usual_one_does(found: list[tuple[float, int]]) -> None:
    bounds = (0.001, 0.1, 1.0)
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    cheap = CheapHistogram("between_seconds", "Text.", bounds)
    ours.register(cheap)
    usual = Histogram("between_seconds", "Text.", registry=theirs, buckets=bounds)
    for value, times in found:
        cheap.observe(value, times)
        for _ in range(times):
            usual.observe(value)
    kept = [
        [line for line in generate_latest(registry).decode().splitlines() if "_sum" not in line]
        for registry in (ours, theirs)
    ]
    assert kept[0] == [line for line in kept[1] if "_created" not in line]
    expected = sum(value * times for value, times in found)
    assert ours.get_sample_value("between_seconds_sum") == pytest.approx(expected)


def test_who_reads_late_gets_one_event_per_sequence() -> None:
    async def run() -> None:
        job = Job([Work(prompt=(1,), sampling=Sampling())] * 2, max_pending=8)
        first, second = job.tickets
        for ticket, text, reason in (
            (first, "a", None), (second, "x", None), (first, "b", None), (second, "y", "stop"),
        ):  # fmt: skip
            token = TokenEvent(ticket.index, ord(text), reason)
            assert job.push(ticket, TextEvent(ticket.index, text, (token,), reason))
        found = await job.take()
        assert [(index, event.text, len(event.tokens)) for index, event in found] == [
            (0, "ab", 2),
            (1, "xy", 2),
        ]
        assert [event.finish_reason for _, event in found] == [None, "stop"]
        assert job.unfinished == 1
        reading = asyncio.create_task(job.take())
        await asyncio.sleep(0)
        job.accepted.set_result(None)
        job.fail(engine_failed())
        with pytest.raises(ApiError, match="engine failed"):
            await reading

    asyncio.run(run())


def test_who_stops_waiting_hinders_nobody() -> None:
    async def run() -> None:
        job = Job([Work(prompt=(1,), sampling=Sampling())], max_pending=8)
        reading = asyncio.create_task(job.take())
        await asyncio.sleep(0)
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        assert job.push(job.tickets[0], TextEvent(0, "a", (), "stop"))
        assert [event.text for _, event in await job.take()] == ["a"]

    asyncio.run(run())


def test_the_collector_is_as_before_afterwards() -> None:
    before = gc.get_threshold(), gc.get_freeze_count()
    with collecting.seldom():
        assert gc.get_freeze_count() > before[1]
        assert gc.get_threshold()[0] > before[0][0]
    assert (gc.get_threshold(), gc.get_freeze_count()) == before


def test_threads_give_way_quickly_while_a_server_runs_and_no_longer() -> None:
    before = sys.getswitchinterval()
    with taking_turns.quickly():
        assert sys.getswitchinterval() < 1e-3 < before
    assert sys.getswitchinterval() == before
