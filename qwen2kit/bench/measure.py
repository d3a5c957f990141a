"""Timed generation: prefill, decoding, and many streams at once, all through the engine."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from time import perf_counter
from typing import TYPE_CHECKING

from qwen2kit.engine.engine import Engine
from qwen2kit.engine.request import Request
from qwen2kit.errors import NonFiniteLogits
from qwen2kit.generate.sampling import Sampling

if TYPE_CHECKING:
    from qwen2kit.backend.protocol import CompiledModel
    from qwen2kit.engine.drafting import Drafter

Prompts = Callable[[int], tuple[int, ...]]
"""A new prompt of so many tokens at every call."""
OpenDrafter = Callable[[int, int], "Drafter | None"]
"""A drafter for so many slots of so many tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefill:
    """Reading a prompt, up to its first token (median seconds)."""

    tokens: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Decode:
    """One stream after a prompt.

    Attributes:
        context: prompt tokens.
        new: generated tokens.
        tokens_per_second: median over repetitions, first token left out.
        drafted, accepted: tokens that a drafter guessed, and those of them that were right.
    """

    context: int
    new: int
    tokens_per_second: float
    drafted: int
    accepted: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Throughput:
    """Streams that start together (continuous batching).

    Attributes:
        streams: how many; ``slots`` of them run at a time.
        slots: fewer than ``streams`` where memory does not hold all.
        prompt, new: tokens of each.
        seconds: from the first submission to the last token.
        tokens_per_second: generated tokens over ``seconds``.
        decode_tokens_per_second: the same from the moment on when all streams have begun; None if
            some had to wait for others to end.
        first_token: seconds to the first token, percentiles 50, 90 and 99 over streams.
        between_tokens: seconds between two tokens of a stream, the same percentiles.
    """

    streams: int
    slots: int
    prompt: int
    new: int
    seconds: float
    tokens_per_second: float
    decode_tokens_per_second: float | None
    first_token: tuple[float, float, float]
    between_tokens: tuple[float, float, float]


def measure_prefill(
    model: CompiledModel, length: int, prompts: Prompts, repeats: int, limit: int | None
) -> Prefill:
    """Median time to the first token of ``repeats`` prompts, after one that warms up."""
    sampling = Sampling(max_new_tokens=1, vocab_limit=limit)
    seconds = []
    with Engine(model, slots=1, capacity=length + 1) as engine:
        for _ in range(repeats + 1):
            started = perf_counter()
            run = _run(engine, [prompts(length)], sampling)
            seconds.append(run.stamps[0][0] - started)
    return Prefill(tokens=length, seconds=statistics.median(seconds[1:]))


def measure_decode(
    model: CompiledModel,
    context: int,
    new: int,
    prompts: Prompts,
    repeats: int,
    limit: int | None,
    drafter: OpenDrafter | None = None,
) -> Decode:
    """Greedy decoding of one stream, ``repeats`` times after a warm-up, each a new prompt."""
    sampling = Sampling(max_new_tokens=new, vocab_limit=limit)
    guess = None if drafter is None else drafter(1, context + new)
    speeds = []
    with Engine(model, slots=1, capacity=context + new, drafter=guess) as engine:
        for _ in range(repeats + 1):
            (stamps,) = _run(engine, [prompts(context)], sampling).stamps
            speeds.append((len(stamps) - 1) / (stamps[-1] - stamps[0]))
        stats = engine.stats
        return Decode(
            context=context,
            new=new,
            tokens_per_second=statistics.median(speeds[1:]),
            drafted=stats.drafted,
            accepted=stats.accepted,
        )


def measure_throughput(
    model: CompiledModel,
    streams: int,
    prompt: int,
    new: int,
    prompts: Prompts,
    limit: int | None,
    drafter: OpenDrafter | None = None,
) -> Throughput:
    """``streams`` requests submitted at once, timed after one round that warms up."""
    capacity = prompt + new
    guess = None if drafter is None else drafter(streams, capacity)
    with Engine(model, slots=streams, capacity=capacity, drafter=guess) as engine:
        warm = Sampling(max_new_tokens=min(new, 8), vocab_limit=limit)
        _run(engine, [prompts(prompt) for _ in range(streams)], warm)
        sampling = Sampling(max_new_tokens=new, vocab_limit=limit)
        batch = [prompts(prompt) for _ in range(streams)]
        started = perf_counter()
        run = _run(engine, batch, sampling)
    stamps = run.stamps
    ended = max(stream[-1] for stream in stamps)
    gaps = [b - a for stream in stamps for a, b in pairwise(stream)]
    return Throughput(
        streams=streams,
        slots=run.running,
        prompt=prompt,
        new=new,
        seconds=ended - started,
        tokens_per_second=sum(map(len, stamps)) / (ended - started),
        decode_tokens_per_second=_together(stamps) if run.running == streams else None,
        first_token=_percentiles([stream[0] - started for stream in stamps]),
        between_tokens=_percentiles(gaps),
    )


@dataclass(frozen=True, slots=True)
class _Run:
    """When each token of each prompt came out, and how many prompts ran at a time at most."""

    stamps: list[list[float]]
    running: int


def _run(engine: Engine, prompts: Sequence[tuple[int, ...]], sampling: Sampling) -> _Run:
    keys = [engine.submit(Request(prompt, sampling)) for prompt in prompts]
    stamps: dict[int, list[float]] = {key: [] for key in keys}
    running = 0
    while engine.busy:
        events = engine.step()
        now = perf_counter()
        running = max(running, engine.running + sum(e.finish_reason is not None for e in events))
        for event in events:
            if event.finish_reason == "error":
                raise NonFiniteLogits
            stamps[event.prompt].append(now)
    return _Run([stamps[key] for key in keys], running)


def _together(stamps: Sequence[Sequence[float]]) -> float | None:
    """Tokens per second from when all streams have begun until the first one ends."""
    begin = max(stream[0] for stream in stamps)
    end = min(stream[-1] for stream in stamps)
    tokens = sum(begin < stamp <= end for stream in stamps for stamp in stream)
    return tokens / (end - begin) if end > begin else None


def _percentiles(values: Sequence[float]) -> tuple[float, float, float]:
    import numpy as np

    if not values:
        return (0.0, 0.0, 0.0)
    p50, p90, p99 = np.percentile(values, (50, 90, 99))
    return float(p50), float(p90), float(p99)
