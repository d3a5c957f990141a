"""Which logits penalties and biases change, and by how much, as a sequence grows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qwen2kit.generate.sampling import Sampling


class Changes:
    """The part of `Edit` that follows from what was said: ``ids``, ``scale``, ``shift``.

    Args:
        sampling: repetition, presence and frequency penalty, biases.
        prompt: ids the repetition penalty counts as said.
    """

    def __init__(self, sampling: Sampling, prompt: Sequence[int]) -> None:
        import numpy as np

        limit = sampling.vocab_limit
        self._sampling = sampling
        self._bias = {t: b for t, b in sampling.logit_bias if limit is None or t < limit}
        self._said: dict[int, int] = {}
        seen = set(prompt) if sampling.repetition_penalty != 1 else set()
        touched = sorted({t for t in seen if limit is None or t < limit} | set(self._bias))
        self._place = {token: index for index, token in enumerate(touched)}
        self._ids = np.array(touched, dtype=np.int64)
        scale = [sampling.repetition_penalty if token in seen else 1.0 for token in touched]
        self._scale = np.array(scale, dtype=np.float32)
        self._shift = np.array([self._bias.get(token, 0.0) for token in touched], dtype=np.float32)

    def copy(self) -> Changes:
        """The same state, on its own."""
        twin = object.__new__(Changes)
        twin._sampling, twin._bias, twin._ids = self._sampling, self._bias, self._ids
        twin._said, twin._place = dict(self._said), dict(self._place)
        twin._scale, twin._shift = self._scale, self._shift
        return twin

    def count(self, token: int) -> None:
        """``token`` was generated."""
        import numpy as np

        sampling = self._sampling
        times = self._said[token] = self._said.get(token, 0) + 1
        place = self._place.setdefault(token, len(self._place))
        new = place == len(self._ids)
        self._ids = np.append(self._ids, token) if new else self._ids
        self._scale = np.append(self._scale, np.float32(1)) if new else self._scale.copy()
        self._shift = np.append(self._shift, np.float32(0)) if new else self._shift.copy()
        self._scale[place] = sampling.repetition_penalty
        penalty = sampling.presence_penalty + times * sampling.frequency_penalty
        self._shift[place] = self._bias.get(token, 0.0) - penalty

    def arrays(self) -> dict[str, Any]:
        """Fields of `Edit`; later counts leave them as they are."""
        sampling = self._sampling
        shifts = sampling.presence_penalty or sampling.frequency_penalty or self._bias
        return {
            "ids": self._ids,
            "scale": self._scale if sampling.repetition_penalty != 1 else None,
            "shift": self._shift if shifts else None,
        }
