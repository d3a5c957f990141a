"""How fast a run is: tokens per second, share of the hardware's peak, time left."""

from __future__ import annotations

from time import perf_counter

from qwen2kit.backend.processes import Processes

_MEMORY = 0.9


class Pace:
    """Running means over the steps of this call (a rewound step counts as time, not as tokens).

    Args:
        flops_per_token: of the model at the current row length, forward and backward.
        peak_flops: of all devices together, per second; None if unknown.
    """

    def __init__(self, flops_per_token: float = 0.0, peak_flops: float | None = None) -> None:
        self._flops_per_token = flops_per_token
        self._peak = peak_flops
        self._began: float | None = None
        self._steps = 0
        self._rate = 0.0
        self._reset()

    def step(self, tokens: int, seconds: float, data_seconds: float) -> None:
        """Take in one step: its tokens, its duration, and how much of that was waiting for data."""
        self._began = self._began if self._began is not None else perf_counter() - seconds
        self._steps += 1
        self._new_steps += 1
        self._tokens += tokens
        self._seconds += seconds
        self._data_seconds += data_seconds

    def figures(self, steps_left: int) -> dict[str, float | None]:
        """Means since the last call, and the time left at the mean speed since the start.

        ``mfu`` (model FLOPs utilisation, arXiv 2204.02311, appendix B) is from 0 to 1, or None
        where the hardware's peak is not known.
        """
        assert self._began is not None
        rate = self._tokens / self._seconds if self._seconds > 0 else 0.0
        # The first step compiles and allocates: its speed says nothing.
        first = self._steps == self._new_steps == 1
        if not first:
            self._rate = rate if self._rate == 0 else _MEMORY * self._rate + (1 - _MEMORY) * rate
        eta = (perf_counter() - self._began) / self._steps * steps_left
        figures = {
            "tokens_per_second": round(self._rate, 1),
            "mfu": self._utilisation(),
            "seconds": round(self._seconds / self._new_steps, 6),
            "data_seconds": round(self._data_seconds / self._new_steps, 6),
            "eta_seconds": round(eta, 1),
        }
        self._reset()
        return figures

    def _utilisation(self) -> float | None:
        if self._peak is None or self._rate == 0:
            return None
        return round(self._rate * self._flops_per_token / self._peak, 4)

    def _reset(self) -> None:
        self._new_steps = self._tokens = 0
        self._seconds = self._data_seconds = 0.0


class Timer:
    """Whether the time between two checkpoints is over, by the clock of any process.

    Args:
        minutes: 0 is never; then nobody is asked.
    """

    def __init__(self, minutes: float, processes: Processes) -> None:
        self._seconds = 60 * minutes
        self._processes = processes
        self.reset()

    def due(self) -> bool:
        """Collective, and the same on all processes."""
        if self._seconds == 0:
            return False
        return self._processes.any(perf_counter() - self._started >= self._seconds)

    def reset(self) -> None:
        """A checkpoint was begun."""
        self._started = perf_counter()
