"""Running tokens through the model in bounded slices.

Shapes: T tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from qwen2kit_torch.model import Qwen2

TOKENS_PER_PASS = 2048
_LOGITS_PER_SLICE = 1 << 25


def logits_in_slices(model: Qwen2, hidden_TD: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Float32 logits ``[t, V]`` of consecutive positions, with the index of the first one."""
    step = max(1, _LOGITS_PER_SLICE // model.spec.vocab_size)
    for start in range(0, len(hidden_TD), step):
        yield start, model.head(hidden_TD[start : start + step]).float()
