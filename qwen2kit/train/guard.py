"""Loss spikes and losses that are not finite: which steps to leave out, when to go back, when to
give up.

Every process sees the same metrics and therefore comes to the same verdict. All state is in
`Guard.state`, so that a resumed run judges as the uninterrupted one would have.
"""

from __future__ import annotations

from collections import deque
from math import inf, isfinite
from statistics import median
from typing import Any

from qwen2kit.backend.values import StepMetrics
from qwen2kit.config.train_tree import KeepSpikes, RewindSpikes, TrainConfig
from qwen2kit.errors import TrainingError

MAD_TO_SIGMA = 1.4826
"""A normal distribution's standard deviation over its median absolute deviation."""


class Guard:
    """Judges every step of a run.

    Attributes:
        rewinds: how often the run has gone back so far.
    """

    def __init__(self, config: TrainConfig) -> None:
        self._config = config
        self._spike = config.spike
        window = 1 if isinstance(self._spike, KeepSpikes) else self._spike.window
        self._losses: deque[float] = deque(maxlen=window)
        self._in_a_row = 0
        self.rewinds = 0

    def limit(self) -> float:
        """The loss above which the next step must not be applied: ``median + factor * 1.4826 *
        MAD`` of the recent losses, or infinity while there are too few of them."""
        if isinstance(self._spike, KeepSpikes) or len(self._losses) < self._spike.window:
            return inf
        middle = median(self._losses)
        deviation = median(abs(loss - middle) for loss in self._losses)
        return middle + self._spike.factor * MAD_TO_SIGMA * deviation

    def must_rewind(self, metrics: StepMetrics) -> bool:
        """Take note of a step; whether the run has to go back to its newest checkpoint.

        Raises:
            TrainingError: the loss is not finite and nothing is to be done about it, or too many
                steps in a row were skipped, or the run has gone back too often.
        """
        finite = isfinite(metrics.loss) and isfinite(metrics.grad_norm)
        if not metrics.skipped:
            self._in_a_row = 0
        elif isinstance(self._spike, RewindSpikes):
            self._count_rewind(self._spike, metrics)
            return True
        else:
            self._count_skip(metrics, finite)
        if finite:
            self._losses.append(metrics.loss)
        return False

    def forget(self) -> None:
        """Start a new window: the next losses are of other data."""
        self._losses.clear()

    def state(self) -> dict[str, Any]:
        """Everything `limit` and `must_rewind` depend on, as JSON."""
        return {
            "losses": list(self._losses),
            "skipped_in_a_row": self._in_a_row,
            "rewinds": self.rewinds,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken."""
        self._losses.clear()
        self._losses.extend(state["losses"])
        self._in_a_row = state["skipped_in_a_row"]
        self.rewinds = state["rewinds"]

    def _count_rewind(self, policy: RewindSpikes, metrics: StepMetrics) -> None:
        self.rewinds += 1
        if self.rewinds > policy.max_rewinds:
            raise TrainingError(
                f"loss is {metrics.loss:.4f} and train.spike.max_rewinds={policy.max_rewinds} is "
                "used up; lower train.lr or raise it"
            )

    def _count_skip(self, metrics: StepMetrics, finite: bool) -> None:
        if not finite and self._config.non_finite == "raise":
            raise TrainingError(
                f"loss is {metrics.loss} and gradient norm {metrics.grad_norm}; lower train.lr, "
                "or set train.non_finite=skip to leave such steps out"
            )
        self._in_a_row += 1
        if self._in_a_row > self._config.max_skipped:
            raise TrainingError(
                f"{self._in_a_row} steps in a row were skipped (the last loss is "
                f"{metrics.loss:.4f}); lower train.lr or raise train.max_skipped"
            )
