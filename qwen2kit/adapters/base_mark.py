"""Telling an adapter's base from another model of equal shapes, as far as that can be told.

What stays the same when a model is converted or quantised is its final norm: every format keeps
it in 16 or 32 bits, and no method of quantisation scales it. A sample of its weights therefore goes
with the adapters written here, in the metadata of their safetensors file, which other readers
ignore. Models whose final norms agree (a base and what was merged into it, or a fine-tune that left
the norm alone) are not told apart, and nothing is said of adapters without a sample.
"""

from __future__ import annotations

import base64
import binascii

import numpy as np
from numpy.typing import NDArray

from qwen2kit.spec.schema import FINAL_NORM
from qwen2kit.weights.source import WeightSource

KEY = "qwen2kit.base_norm"
"""Name of the sample in a file's metadata."""

_SAMPLES = 256
# Half a unit of bfloat16's last place, and of float16's, through which it may have gone.
_ROUNDING, _SMALLEST = 2.0**-8 + 2.0**-11, 1e-6
_MOST_DIFFERENT = 1 / 64  # of the samples, of one model


def mark(weights: WeightSource) -> str:
    """The sample of ``weights``: up to 256 float32 values of the final norm, base64."""
    return base64.b64encode(_sample(weights).tobytes()).decode()


def is_other_model(made_on: str | None, weights: WeightSource) -> bool:
    """Whether ``weights`` are certainly not those that ``made_on`` was taken from, in whatever
    format; false if that cannot be told.

    Args:
        made_on: what `mark` gave, or None.
    """
    theirs, ours = _values(made_on or ""), _sample(weights)
    if theirs is None or theirs.shape != ours.shape or min(np.ptp(theirs), np.ptp(ours)) == 0:
        return False  # a norm of equal weights was never trained, or moved into the head
    bound = np.maximum(_ROUNDING * np.maximum(np.abs(theirs), np.abs(ours)), _SMALLEST)
    return bool(np.mean(np.abs(theirs - ours) > bound) > _MOST_DIFFERENT)


def stored(made_on: str | None, form: str) -> dict[str, str]:
    """Metadata of an adapter's safetensors file: its ``format``, and the sample if there is one."""
    return {"format": form} | ({} if made_on is None else {KEY: made_on})


def _sample(weights: WeightSource) -> NDArray[np.float32]:
    norm = weights.read(FINAL_NORM).float32()
    places = np.linspace(0, norm.size - 1, min(norm.size, _SAMPLES)).round().astype(int)
    return np.asarray(norm[places], "<f4")


def _values(text: str) -> NDArray[np.float32] | None:
    try:
        values = np.frombuffer(base64.b64decode(text, validate=True), "<f4")
    except (ValueError, binascii.Error):
        return None
    return values if np.isfinite(values).all() and values.size else None
