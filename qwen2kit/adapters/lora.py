"""LoRA adapters in memory: low-rank updates of a model's matrices (arXiv 2106.09685).

An adapted matrix ``W [out, in]`` acts as ``W + scale * B @ A`` with ``A [r, in]`` and
``B [out, r]``. Names are those of the model: module paths are the schema's parameter names without
``.weight``; only matrices of the decoder layers can be adapted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import isfinite, sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from qwen2kit.errors import ConfigError, WeightError
from qwen2kit.spec.model import ModelSpec
from qwen2kit.spec.schema import schema
from qwen2kit.weights.tensor import FLOAT_DTYPES, DType, HostTensor

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

AdapterFormat = Literal["hf", "mlx"]
WEIGHT = ".weight"


@dataclass(frozen=True, slots=True)
class LowRank:
    """The update of one matrix.

    Attributes:
        a: ``[r, in]`` in a float dtype.
        b: ``[out, r]``.
        scale: what their product is multiplied by.
    """

    a: HostTensor
    b: HostTensor
    scale: float

    @property
    def rank(self) -> int:
        """r."""
        return self.a.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """``(out, in)`` of the matrix it belongs to."""
        return self.b.shape[0], self.a.shape[1]

    def delta(self) -> NDArray[np.float32]:
        """``scale * B @ A``, float32 ``[out, in]``."""
        import numpy as np

        update = self.b.float32() @ self.a.float32()
        update *= np.float32(self.scale)
        return update


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """All updates of one adapter, in module order.

    Attributes:
        path: directory it was read from.
        format: ``hf`` (PEFT) or ``mlx`` (mlx-lm).
        modules: updates by module path.
        base_model: the model it was trained on, as its config names it, or None.
        dropout: probability during training; no part of what the adapter computes.
        rslora: whether scales follow the rank-stabilised rule; for the config that is written.
        base_mark: a sample of the weights it was trained on (`base_mark.mark`), or None.
    """

    path: Path
    format: AdapterFormat
    modules: Mapping[str, LowRank] = field(repr=False)
    base_model: str | None = None
    dropout: float = 0.0
    rslora: bool = False
    base_mark: str | None = None

    @property
    def rank(self) -> int:
        """The largest r."""
        return max(update.rank for update in self.modules.values())

    @property
    def dtype(self) -> DType:
        """Float dtype of the first factor."""
        return next(iter(self.modules.values())).a.dtype

    def check_fits(self, spec: ModelSpec) -> None:
        """Compare modules and shapes with the matrices of ``spec``.

        Raises:
            WeightError: a module does not exist there, cannot be adapted, or has another shape.
        """
        matrices = dict(adaptable(spec))
        unknown = [path for path in self.modules if path not in matrices]
        misshapen = [
            f"{path} is for a matrix of {list(update.shape)}, the model has {list(matrices[path])}"
            for path, update in self.modules.items()
            if path in matrices and update.shape != matrices[path]
        ]
        made_for = f" (it was made for {self.base_model})" if self.base_model else ""
        if unknown:
            raise WeightError(
                f"{self.path}: adapts {_listed(unknown)}, which the model lacks or which cannot "
                f"be adapted here{made_for}"
            )
        if misshapen:
            raise WeightError(
                f"{self.path}: the adapter belongs to another model: {misshapen[0]}{made_for}"
            )


def lora_scale(rank: int, alpha: float, *, rslora: bool) -> float:
    """``alpha / rank``; rank-stabilised (arXiv 2312.03732) ``alpha / sqrt(rank)``."""
    return alpha / sqrt(rank) if rslora else alpha / rank


def factor_names(path: str) -> tuple[str, str]:
    """Names of A and B of the module ``path``, as parameters of the model."""
    return f"{path}.lora_A{WEIGHT}", f"{path}.lora_B{WEIGHT}"


def pair_up(
    path: Path, factors: Mapping[str, dict[str, HostTensor]], sides: tuple[str, str]
) -> Iterator[tuple[str, HostTensor, HostTensor]]:
    """Module path, A and B of every module, checked to belong together.

    Args:
        path: the file, for messages.
        factors: by module, then by side; ``[r, in]`` and ``[out, r]``.
        sides: what the two sides are called there.

    Raises:
        WeightError: a side is missing, no float matrix, or their ranks differ.
    """
    if not factors:
        raise WeightError(f"{path}: holds no low-rank updates")
    for module, found in factors.items():
        lacking = [side for side in sides if side not in found]
        if lacking:
            raise WeightError(f"{path}: {module} has no {lacking[0]}; the file is incomplete")
        a, b = (found[side] for side in sides)
        sound = all(len(t.shape) == 2 and t.dtype in FLOAT_DTYPES for t in (a, b))
        if not sound or a.shape[0] != b.shape[1] or not a.shape[0]:
            raise WeightError(
                f"{path}: the factors of {module} do not belong together: A is {a.dtype} "
                f"{list(a.shape)}, B is {b.dtype} {list(b.shape)} ([r, in] and [out, r] expected)"
            )
        yield module, a, b


def finite_number(path: Path, key: str, value: object) -> float:
    """``value`` of a config file, if it is a finite number. Raises ConfigError."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not isfinite(value):
        raise ConfigError(f"{path}: {key} must be a number, got {value!r}")
    return float(value)


def adaptable(spec: ModelSpec) -> Iterator[tuple[str, tuple[int, int]]]:
    """Path and shape ``(out, in)`` of every matrix that an adapter may update, in schema order."""
    for param in schema(spec):
        if param.kind == "linear" and param.expert is None:
            yield param.name.removesuffix(WEIGHT), (param.shape[0], param.shape[1])


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
