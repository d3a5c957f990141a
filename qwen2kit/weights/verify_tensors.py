"""Tensor-by-tensor comparison of a conversion with its source."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from qwen2kit.spec.schema import schema
from qwen2kit.weights.checkpoint import Checkpoint
from qwen2kit.weights.source import AffineTensor, WeightSource
from qwen2kit.weights.tensor import HostTensor

Verdict = Literal["equal", "rounded", "quantised", "different"]
Progress = Callable[[str], None]

# Largest relative (Frobenius) error that quantising to so many bits explains.
QUANTISATION_ERROR = {2: 0.6, 3: 0.35, 4: 0.18, 6: 0.06, 8: 0.02}
_CHUNK_ELEMENTS = 1 << 22


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorCheck:
    """One parameter of source and target.

    Attributes:
        name: canonical name.
        verdict: ``equal`` values; ``rounded``: the target is the source rounded to its dtype;
            ``quantised``: within the error of the target's bits; else ``different``.
        max_abs: largest absolute difference.
        relative: Frobenius norm of the difference over that of the source.
    """

    name: str
    verdict: Verdict
    max_abs: float
    relative: float


def check_tensors(
    source: Checkpoint, target: Checkpoint, progress: Progress = lambda name: None
) -> list[TensorCheck]:
    """Compare every parameter of the schema; shapes were checked when both were opened."""
    checks = []
    for param in schema(source.spec):
        progress(param.name)
        checks.append(_check(param.name, source.weights, target.weights))
    return checks


def _check(name: str, source: WeightSource, target: WeightSource) -> TensorCheck:
    ours, theirs = source.read(name), target.read(name)
    equal, rounded, worst, error, norm = True, True, 0.0, 0.0, 0.0
    for left, right in _pieces(ours, theirs):
        piece = _compare(left, right)
        equal, rounded = equal and piece.equal, rounded and piece.rounded
        worst = max(worst, piece.max_abs)
        error, norm = error + piece.error, norm + piece.norm
    relative = (error / norm) ** 0.5 if norm else (0.0 if equal else float("inf"))
    verdict: Verdict = "different"
    if equal:
        verdict = "equal"
    elif rounded:
        verdict = "rounded"
    elif relative <= _allowed(target.affine(name), target, name):
        verdict = "quantised"
    return TensorCheck(name=name, verdict=verdict, max_abs=worst, relative=relative)


def _pieces(ours: HostTensor, theirs: HostTensor) -> list[tuple[HostTensor, HostTensor]]:
    rows = ours.shape[0]
    step = max(1, _CHUNK_ELEMENTS * rows // max(1, ours.raw().size))
    return [
        (ours.slice(start, start + step), theirs.slice(start, start + step))
        for start in range(0, rows, step)
    ]


@dataclass(frozen=True, slots=True)
class _Piece:
    equal: bool
    rounded: bool
    max_abs: float
    error: float
    norm: float


def _compare(left: HostTensor, right: HostTensor) -> _Piece:
    import numpy as np

    a, b = left.float32(), right.float32()
    norm = float(np.square(a, dtype=np.float64).sum())
    if np.array_equal(a, b):
        return _Piece(True, True, 0.0, 0.0, norm)
    with np.errstate(invalid="ignore"):
        difference = a.astype(np.float64) - b
    worst = float(np.abs(difference).max())
    return _Piece(
        equal=False,
        rounded=bool(np.array_equal(left.astype(right.dtype).float32(), b)),
        max_abs=worst if worst == worst else float("inf"),
        error=float(np.square(difference).sum()),
        norm=norm,
    )


def _allowed(packed: AffineTensor | None, target: WeightSource, name: str) -> float:
    if packed is not None:
        return QUANTISATION_ERROR[packed.bits]
    from qwen2kit.weights.gguf_read import GgufSource

    if isinstance(target, GgufSource) and target.block_type(name) == "Q8_0":
        return QUANTISATION_ERROR[8]
    return 0.0
