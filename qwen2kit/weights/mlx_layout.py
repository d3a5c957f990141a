"""A directory in MLX layout: dense or affine-quantised triplets, experts stacked per layer.

Dense names are the canonical ones. A quantised matrix is stored as ``<module>.weight`` (codes),
``<module>.scales`` and ``<module>.biases``. The experts of a layer share one tensor
``mlp.switch_mlp.<projection>`` with the expert as first dimension.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from qwen2kit.errors import WeightError
from qwen2kit.spec.model import ModelSpec
from qwen2kit.spec.schema import Param, schema
from qwen2kit.weights.affine import dequantize
from qwen2kit.weights.quantization import Quantization
from qwen2kit.weights.safetensors_read import SafetensorsSource
from qwen2kit.weights.source import AffineTensor, TensorInfo
from qwen2kit.weights.tensor import HostTensor

_WEIGHT = ".weight"


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of an MLX file and the canonical parameters it is made of.

    Attributes:
        name: name on disk.
        params: one parameter, or all experts' in order when ``stacked``.
        stacked: whether the first dimension is the expert.
    """

    name: str
    params: tuple[Param, ...]
    stacked: bool

    @property
    def module(self) -> str:
        """Module path: the name without ``.weight``."""
        return self.name.removesuffix(_WEIGHT)

    @property
    def shape(self) -> tuple[int, ...]:
        """Dense shape."""
        inner = self.params[0].shape
        return (len(self.params), *inner) if self.stacked else inner

    @property
    def quantizable(self) -> bool:
        """Whether weight quantisation applies."""
        return self.params[0].quantizable


def mlx_name(param: Param) -> str:
    """Name on disk of the MLX tensor that holds ``param``."""
    if param.expert is None:
        return param.name
    return param.name.replace(f".experts.{param.expert}.", ".switch_mlp.")


def mlx_tensors(spec: ModelSpec) -> Iterator[StoredTensor]:
    """All tensors of an MLX file of ``spec`` in file order (the rows of the name mapping)."""
    members: dict[str, list[Param]] = {}
    for param in schema(spec):
        members.setdefault(mlx_name(param), []).append(param)
    for name, params in members.items():
        yield StoredTensor(name, tuple(params), stacked=params[0].expert is not None)


class MlxSource:
    """MLX files as a WeightSource with canonical names.

    `read` dequantises to float32 (what MLX's quantised products compute with); `affine` gives
    the packed form.

    Args:
        spec: the model.
        files: tensors by their names on disk.
        quantization: the ``quantization`` entry of config.json, or None.

    Raises:
        WeightError: a quantised tensor lacks its scales or biases, or config.json does not say
            how it is packed.
    """

    def __init__(
        self, spec: ModelSpec, files: SafetensorsSource, quantization: Quantization | None
    ) -> None:
        self._files = files
        self._quantization = quantization
        stored = set(files.names())
        self._home = {
            param.name: (tensor, index if tensor.stacked else None)
            for tensor in mlx_tensors(spec)
            for index, param in enumerate(tensor.params)
        }
        self._packed = {name.removesuffix(".scales") for name in stored if name.endswith(".scales")}
        known = {tensor.name for tensor, _ in self._home.values()}
        extras = self._check_triplets(stored)
        present = [n for n, (tensor, _) in self._home.items() if tensor.name in stored]
        self._names = (*present, *sorted(stored - known - extras))

    def names(self) -> tuple[str, ...]:
        """Canonical names; tensors the spec does not know keep their name on disk."""
        return self._names

    def info(self, name: str) -> TensorInfo:
        """Shape, and the dtype `read` gives: float32 for quantised weights."""
        stored, expert = self._locate(name)
        info = self._files.info(stored)
        shape = info.shape if expert is None else info.shape[1:]
        settings = self._settings(stored)
        if settings is None:
            return TensorInfo(info.dtype, shape)
        return TensorInfo("float32", (*shape[:-1], shape[-1] * 32 // settings[0]))

    def read(self, name: str) -> HostTensor:
        """The dense tensor."""
        packed = self.affine(name)
        if packed is not None:
            return dequantize(packed)
        stored, expert = self._locate(name)
        return _slice(self._files.read(stored), expert)

    def affine(self, name: str) -> AffineTensor | None:
        """The packed form, or None for a dense tensor."""
        stored, expert = self._locate(name)
        settings = self._settings(stored)
        if settings is None:
            return None
        module = stored.removesuffix(_WEIGHT)
        packed, scales, biases = (
            _slice(self._files.read(f"{module}.{part}"), expert)
            for part in ("weight", "scales", "biases")
        )
        return AffineTensor(packed, scales, biases, *settings)

    def _locate(self, name: str) -> tuple[str, int | None]:
        if name in self._home:
            tensor, expert = self._home[name]
            return tensor.name, expert
        return name, None

    def _settings(self, stored: str) -> tuple[int, int] | None:
        module = stored.removesuffix(_WEIGHT)
        if self._quantization is None or module not in self._packed:
            return None
        return self._quantization.of(module)

    def _check_triplets(self, stored: set[str]) -> set[str]:
        extras: set[str] = set()
        for module in self._packed:
            parts = {f"{module}.scales", f"{module}.biases"}
            if not parts | {module + _WEIGHT} <= stored:
                raise WeightError(f"quantised {module!r} lacks its weight, scales or biases")
            if self._settings(module + _WEIGHT) is None:
                raise WeightError(
                    f"{module!r} is stored quantised, but config.json has no quantization for it"
                )
            extras |= parts
        return extras


def is_mlx(files: SafetensorsSource) -> bool:
    """Whether the files were written for MLX: by metadata, packed weights or stacked experts."""
    if any(file.metadata.get("format") == "mlx" for file in files.files):
        return True
    return any(name.endswith(".scales") or ".switch_mlp." in name for name in files.names())


def is_quantized_in_mlx(tensor: StoredTensor, quantization: Quantization) -> bool:
    """mlx-lm's rule: linear layers and embeddings whose rows divide into whole groups."""
    settings = quantization.of(tensor.module)
    return tensor.quantizable and settings is not None and tensor.shape[-1] % settings[1] == 0


def _slice(tensor: HostTensor, index: int | None) -> HostTensor:
    if index is None:
        return tensor
    part = tensor.slice(index, index + 1)
    return HostTensor(part.dtype, part.shape[1:], part.data)
