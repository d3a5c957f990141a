"""Which logits penalties and biases change, and by how much, as a sequence grows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from qwen2kit.generate.sampling import Sampling

_LEAST_ROOM: Final = 64


class Changes:
    """The part of `Edit` that follows from what was said: ``ids``, ``scale``, ``shift``.

    Args:
        sampling: repetition, presence and frequency penalty, biases.
        prompt: ids the repetition penalty counts as said.

    Attributes:
        heard: those of the prompt, each once, if there is such a penalty.
    """

    def __init__(self, sampling: Sampling, prompt: Sequence[int]) -> None:
        import numpy as np

        limit = sampling.vocab_limit
        self._sampling = sampling
        self._bias = {t: b for t, b in sampling.logit_bias if limit is None or t < limit}
        self._said: dict[int, int] = {}
        seen = set(prompt) if sampling.repetition_penalty != 1 else set()
        self.heard = tuple(seen)
        touched = sorted({t for t in seen if limit is None or t < limit} | set(self._bias))
        self._place = {token: index for index, token in enumerate(touched)}
        scale = [sampling.repetition_penalty if token in seen else 1.0 for token in touched]
        shift = [self._bias.get(token, 0.0) for token in touched]
        self._ids = np.array(touched, dtype=np.int64)
        self._scale, self._shift = np.array(scale, np.float32), np.array(shift, np.float32)

    def copy(self) -> Changes:
        """The same state, on its own."""
        twin = object.__new__(Changes)
        twin._sampling, twin._bias = self._sampling, self._bias
        twin._said, twin._place = dict(self._said), dict(self._place)
        twin.heard = self.heard
        twin._ids = self._ids.copy()
        twin._scale, twin._shift = self._scale.copy(), self._shift.copy()
        return twin

    @property
    def said(self) -> Mapping[int, int]:
        """How often ids were generated."""
        return self._said

    def count(self, token: int) -> None:
        """``token`` was generated."""
        sampling = self._sampling
        times = self._said[token] = self._said.get(token, 0) + 1
        penalty = sampling.presence_penalty + times * sampling.frequency_penalty
        shift = self._bias.get(token, 0.0) - penalty
        place = self._place.get(token)
        if place is None:
            self._add(token, shift)
            return
        self._scale = _with(self._scale, place, sampling.repetition_penalty)
        self._shift = _with(self._shift, place, shift)

    def _add(self, token: int, shift: float) -> None:
        """Behind the others, where no array that was handed out reaches."""
        place = self._place[token] = len(self._place)
        if place >= len(self._ids):
            import numpy as np

            room = max(_LEAST_ROOM, place)
            self._ids, self._scale, self._shift = (
                np.concatenate([part, np.empty(room, part.dtype)])
                for part in (self._ids, self._scale, self._shift)
            )
        self._ids[place] = token
        self._scale[place] = self._sampling.repetition_penalty
        self._shift[place] = shift

    def arrays(self) -> dict[str, Any]:
        """Fields of `Edit`; later counts leave them as they are."""
        sampling, count = self._sampling, len(self._place)
        shifts = sampling.presence_penalty or sampling.frequency_penalty or self._bias
        return {
            "ids": self._ids[:count],
            "scale": self._scale[:count] if sampling.repetition_penalty != 1 else None,
            "shift": self._shift[:count] if shifts else None,
        }


def _with(values: NDArray[np.float32], place: int, value: float) -> NDArray[np.float32]:
    """``values`` with ``value`` at ``place``: a copy, unless it is there already."""
    if values[place] == value:
        return values
    changed = values.copy()
    changed[place] = value
    return changed
