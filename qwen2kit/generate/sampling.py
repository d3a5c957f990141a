"""Sampling settings and the one sampler both backends use.

Backends hand over logits as NumPy float32; filtering and drawing happen here, so equal logits and
equal seeds give equal text on every backend. Order of operations is transformers': repetition
penalty, temperature, top-k, top-p.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING, Literal

from qwen2kit.errors import BackendError, ConfigError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How to continue a prompt.

    Attributes:
        max_new_tokens: upper bound on generated tokens (the stop token counts).
        stop_token_ids: generation ends with any of these ids; the id is emitted last.
        temperature: 0 means greedy.
        top_k: keep the k most likely tokens (and ties with the k-th); 0 keeps all.
        top_p: keep the smallest set whose probability reaches p; 1 keeps all.
        repetition_penalty: divides positive and multiplies negative logits of every id seen in
            prompt or output (CTRL, arXiv 1909.05858); 1 is off.
        seed: the draw for output ``i`` of prompt ``j`` depends on (seed, j, i) only.
        vocab_limit: ids at or above it (untrained padding rows) are never produced.
        logprobs: report the log-probability of each emitted token (full softmax, before
            filtering).

    Raises:
        ConfigError: a value is outside its range.
    """

    max_new_tokens: int = 512
    stop_token_ids: tuple[int, ...] = ()
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0
    vocab_limit: int | None = None
    logprobs: bool = False

    def __post_init__(self) -> None:
        for name, (valid, rule) in self._rules().items():
            if not valid:
                raise ConfigError(f"{name} must {rule}, got {getattr(self, name)}")

    def _rules(self) -> dict[str, tuple[bool, str]]:
        return {
            "max_new_tokens": (self.max_new_tokens >= 1, "be at least 1"),
            "temperature": (0 <= self.temperature < inf, "not be negative"),
            "top_k": (self.top_k >= 0, "not be negative"),
            "top_p": (0 < self.top_p <= 1, "be in (0, 1]"),
            "repetition_penalty": (0 < self.repetition_penalty < inf, "be positive"),
            "seed": (0 <= self.seed < 1 << 64, "be between 0 and 2**64 - 1"),
            "vocab_limit": (self.vocab_limit is None or self.vocab_limit >= 1, "be at least 1"),
        }

    @property
    def is_plain_greedy(self) -> bool:
        """Whether the next token is a bare argmax, which a backend may take on its device."""
        return self.temperature == 0 and self.repetition_penalty == 1 and not self.logprobs

    def finish_reason(self, token: int, left: int) -> Literal["stop", "length"] | None:
        """Why a sequence ends with ``token``, ``left`` more being allowed; None if it goes on."""
        if token in self.stop_token_ids:
            return "stop"
        return "length" if left == 0 else None


class Sampler:
    """Draws tokens for one sequence.

    Args:
        sampling: the settings.
        prompt: prompt ids (needed by the repetition penalty).
        stream: index of the prompt in its batch; separates the random streams.
    """

    def __init__(self, sampling: Sampling, prompt: Sequence[int], stream: int = 0) -> None:
        import numpy as np

        self._sampling = sampling
        self._seen = set(prompt) if sampling.repetition_penalty != 1 else set()
        self._random = np.random.Generator(np.random.Philox(key=[sampling.seed, stream]))

    def draw(self, logits: NDArray[np.float32]) -> tuple[int, float | None]:
        """The next token and, if asked for, its log-probability.

        Args:
            logits: float32 ``[vocab]`` of the last position; not modified.

        Raises:
            BackendError: the logits hold NaN, or nothing finite to choose from.
        """
        import numpy as np

        sampling = self._sampling
        scores = logits[: sampling.vocab_limit].astype(np.float32)
        full = scores.copy() if sampling.logprobs else scores
        if self._seen:
            seen = np.fromiter((t for t in self._seen if t < len(scores)), dtype=np.int64)
            penalty = np.float32(sampling.repetition_penalty)
            value = scores[seen]
            scores[seen] = np.where(value < 0, value * penalty, value / penalty)
        token = self._choose(scores)
        if sampling.repetition_penalty != 1:
            self._seen.add(token)
        return token, _log_softmax_at(full, token) if sampling.logprobs else None

    def _choose(self, scores: NDArray[np.float32]) -> int:
        import numpy as np

        sampling = self._sampling
        best = int(np.argmax(scores))
        if not np.isfinite(scores[best]):
            raise BackendError(
                "the model produced NaN or infinite logits; use dtype bfloat16 or float32"
            )
        if sampling.temperature == 0:
            return best
        ids = np.arange(len(scores))
        if 0 < sampling.top_k < len(scores):
            ids = np.flatnonzero(scores >= np.partition(scores, -sampling.top_k)[-sampling.top_k])
        kept = (scores[ids].astype(np.float64) - scores[best]) / sampling.temperature
        order = np.argsort(-kept, kind="stable")
        ids, probs = ids[order], np.exp(kept[order])
        probs /= probs.sum()
        if sampling.top_p < 1:
            count = int(np.searchsorted(np.cumsum(probs), sampling.top_p)) + 1
            ids, probs = ids[:count], probs[:count]
        cumulative = np.cumsum(probs)
        point = self._random.random() * cumulative[-1]
        return int(ids[min(int(np.searchsorted(cumulative, point, side="right")), len(ids) - 1)])


def _log_softmax_at(scores: NDArray[np.float32], token: int) -> float:
    import numpy as np

    values = scores.astype(np.float64)
    peak = values.max()
    return float(values[token] - peak - np.log(np.exp(values - peak).sum()))
