"""What happens to a row of logits before a token is drawn from it, in NumPy."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qwen2kit.backend.slots import Edit

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def apply_edit(row: NDArray[np.float32], edit: Edit) -> NDArray[np.float32]:
    """``row`` (float32 ``[V]``, not modified) after ``edit``: what is out has -inf."""
    import numpy as np

    scores = row.astype(np.float32)
    if edit.limit is not None:
        scores[edit.limit :] = -np.inf
    if edit.ids is not None:
        value = scores[edit.ids]
        if edit.scale is not None:
            value = np.where(value < 0, value * edit.scale, value / edit.scale)
        if edit.shift is not None:
            value = value + edit.shift
        scores[edit.ids] = value
    if edit.allowed is not None:
        scores[~unpack_mask(edit.allowed, len(scores))] = -np.inf
    return scores


def unpack_mask(allowed: NDArray[np.uint32], vocab: int) -> NDArray[np.bool_]:
    """Bool ``[vocab]`` of a packed mask (`Edit.allowed`)."""
    import numpy as np

    octets = np.ascontiguousarray(allowed, dtype="<u4").view(np.uint8)
    return np.unpackbits(octets, bitorder="little")[:vocab].astype(bool)


def pack_mask(allowed: NDArray[np.bool_]) -> NDArray[np.uint32]:
    """A bool ``[vocab]`` mask as `Edit.allowed` wants it."""
    import numpy as np

    padded = np.zeros(-(-len(allowed) // 32) * 32, dtype=bool)
    padded[: len(allowed)] = allowed
    return np.packbits(padded, bitorder="little").view("<u4").astype(np.uint32)


def only_allowed(allowed: NDArray[np.uint32]) -> int | None:
    """The one id that a packed mask allows; None if it allows another number of them."""
    import numpy as np

    (words,) = np.nonzero(allowed)
    if len(words) != 1:
        return None
    word = int(allowed[words[0]])
    return 32 * int(words[0]) + word.bit_length() - 1 if word & (word - 1) == 0 else None
