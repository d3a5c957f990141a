"""What Prometheus reads at ``/metrics``: counters, gauges and histograms of one server."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from qwen2kit.engine.stats import EngineStats
from qwen2kit.serve.histogram import CheapHistogram

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0)


_TOTALS: Final = {
    "prompt_tokens": "Prompt tokens taken in.",
    "cached_tokens": "Prompt tokens served from the prefix cache.",
    "generated_tokens": "Tokens generated.",
    "drafted": "Tokens proposed by the drafter.",
    "accepted": "Proposed tokens that were kept.",
}
"""Fields of `EngineStats` that are counters, and their descriptions."""


@dataclass(frozen=True, slots=True)
class EngineState:
    """The engine after a step: sequences in slots and waiting, and its counts so far."""

    running: int = 0
    waiting: int = 0
    stats: EngineStats = field(default_factory=EngineStats)


class Metrics:
    """One registry per server, so that several may live in one process.

    Attributes:
        state: the engine's last report.
    """

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.state = EngineState()
        self._requests = Counter(
            "qwen2kit_requests",
            "Requests answered.",
            ("endpoint", "status"),
            registry=self._registry,
        )
        self._running = self._gauge("running", "Sequences in the engine's slots.")
        self._waiting = self._gauge("waiting", "Sequences that wait for a slot.")
        self._totals = {
            name: Counter(f"qwen2kit_{name}", text, registry=self._registry)
            for name, text in _TOTALS.items()
        }
        self._first = self._histogram(
            "time_to_first_token", "From a request's arrival to its first token.", _SECONDS
        )
        self._between = CheapHistogram(
            "qwen2kit_inter_token_seconds", "Between a sequence's tokens.", _TOKEN_SECONDS
        )
        self._registry.register(self._between)
        self._whole = self._histogram("request", "From arrival to the last byte.", _SECONDS)

    def report(self, state: EngineState) -> None:
        """Take the engine's numbers over."""
        self._running.set(state.running)
        self._waiting.set(state.waiting)
        for name, counter in self._totals.items():
            counter.inc(max(0, getattr(state.stats, name) - getattr(self.state.stats, name)))
        self.state = state

    def tokens(self, count: int, seconds: float, *, first: bool) -> None:
        """``count`` tokens of a sequence came together, ``seconds`` after what preceded them."""
        if first:
            self._first.observe(seconds)
            count -= 1
            seconds = 0.0
        if count:
            self._between.observe(seconds / count, count)

    def request(self, endpoint: str, status: int, seconds: float) -> None:
        """A request was answered."""
        self._requests.labels(endpoint, str(status)).inc()
        self._whole.observe(seconds)

    def text(self) -> bytes:
        """The exposition format, version 0.0.4."""
        return generate_latest(self._registry)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"qwen2kit_{name}", text, registry=self._registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"qwen2kit_{name}_seconds", text, registry=self._registry, buckets=buckets)
