"""Continuous batching while requests come and go: tokens per second of the engine alone.

    python benchmarks/churn.py [--models qwen2-0.5b,qwen2-7b] [--output FILE.json]

Random weights, no server. More requests than slots are there from the beginning; prompts and
answers are of random length, so that nearly every step of a busy engine ends one request and reads
the prompt of another. Besides the rate, medians of what a step takes where prompts are read and
where none are, and the share of the time that the host spends on passes, on draws (which wait for
the device) and on everything else. The first requests are a warm-up that is not counted.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import qwen2kit.engine.engine as engine_module
from qwen2kit import ExecutionPlan, Sampling
from qwen2kit.backend.registry import get
from qwen2kit.bench.prompts import random_prompts
from qwen2kit.bench.random_weights import RandomSource
from qwen2kit.engine.engine import Engine
from qwen2kit.engine.request import Request
from qwen2kit.spec.presets import preset

KINDS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "temperature 1": {"temperature": 1.0},
    "Qwen2's defaults": {
        "temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05,
    },
}  # fmt: skip


class Clock:
    """Seconds spent in the functions it wraps."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def around(self, work: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **named: Any) -> Any:
            start = time.perf_counter()
            try:
                return work(*arguments, **named)
            finally:
                self.seconds += time.perf_counter() - start

        return timed


def lengths(text: str) -> tuple[int, int]:
    least, _, most = text.partition(",")
    return int(least), int(most or least)


def run(engine: Engine, requests: list[Request]) -> dict[str, Any]:
    """Run them; figures from the first step after the warm-up on, until slots become empty."""
    feed, draw = Clock(), Clock()
    engine._slots.feed = feed.around(engine._slots.feed)  # type: ignore[method-assign]
    plain, engine_module.draw = engine_module.draw, draw.around(engine_module.draw)
    for request in requests:
        engine.submit(request)
    reading, speaking, tokens, start = [], [], 0, 0.0
    while engine.waiting:
        counted = engine.stats.prompt_tokens - engine.stats.cached_tokens
        before = time.perf_counter()
        events = engine.step()
        now = time.perf_counter()
        read = engine.stats.prompt_tokens - engine.stats.cached_tokens > counted
        if start:
            (reading if read else speaking).append(now - before)
            tokens += len(events)
        elif engine.waiting < len(requests) - 2 * engine.slots:
            start, feed.seconds, draw.seconds = now, 0.0, 0.0
    whole = time.perf_counter() - start
    engine_module.draw = plain
    del engine._slots.feed
    steps = reading + speaking
    return {
        "tokens_per_second": round(tokens / whole),
        "seconds": round(whole, 3),
        "steps": len(steps),
        "steps_that_read": len(reading),
        "ms_reading": _milliseconds(reading),
        "ms_speaking": _milliseconds(speaking),
        "share_feed": round(feed.seconds / whole, 3),
        "share_draw": round(draw.seconds / whole, 3),
    }


def _milliseconds(seconds: list[float]) -> float | None:
    return round(1e3 * statistics.median(seconds), 2) if seconds else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="qwen2-0.5b,qwen2-7b")
    parser.add_argument("--backend", default="torch")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--slots", type=int, default=128)
    parser.add_argument("--requests", type=int, default=1024)
    parser.add_argument("--prompt", type=lengths, default=(64, 160), help="LEAST,MOST tokens")
    parser.add_argument("--new", type=lengths, default=(64, 256), help="LEAST,MOST tokens")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    report: dict[str, Any] = {"command": " ".join(sys.argv), "models": {}}
    for name in options.models.split(","):
        spec, backend = preset(name), get(options.backend)
        model = backend.compile(spec, ExecutionPlan(device=options.device, dtype=options.dtype))
        model.load(RandomSource(spec, options.dtype))
        report["device"] = backend.devices()[0].kind
        report["versions"] = backend.versions()
        source = random.Random(0)
        for kind, how in KINDS.items():
            prompt = random_prompts(spec.vocab_size)
            requests = [
                Request(
                    tuple(prompt(source.randint(*options.prompt))),
                    Sampling(max_new_tokens=source.randint(*options.new), seed=seed, **how),
                )
                for seed in range(options.requests)
            ]
            capacity = options.prompt[1] + options.new[1]
            with Engine(model, slots=options.slots, capacity=capacity) as engine:
                before = time.perf_counter()
                engine.prepare()
                prepared = time.perf_counter() - before
                found = run(engine, requests) | {"prepare_s": round(prepared, 2)}
            report["models"].setdefault(name, {})[kind] = found
            print(f"{name}, {kind}: {json.dumps(found)}", flush=True)
            if options.output:
                options.output.write_text(json.dumps(report, indent=1) + "\n")
        del model


if __name__ == "__main__":
    main()
