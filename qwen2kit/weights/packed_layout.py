"""AWQ and GPTQ files as a WeightSource: dense on request, MLX affine where that is exact.

A packed linear layer ``<module>`` is stored as int32 ``qweight`` and ``qzeros`` and float
``scales [groups, out]``; input ``i`` of group ``g`` weighs ``(q - zero[g]) * scale[g]``. AWQ packs
``qweight [in, out/8]`` along the outputs in the nibble order 0 2 4 6 1 3 5 7. GPTQ packs
``qweight [in*bits/32, out]`` along the inputs, lowest bits first, which transposed is MLX's own
layout; ``g_idx [in]`` names each input's group.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from qwen2kit.errors import WeightError
from qwen2kit.spec.model import ModelSpec
from qwen2kit.spec.schema import schema
from qwen2kit.weights.affine import pack, unpack
from qwen2kit.weights.mlx_layout import mlx_name
from qwen2kit.weights.packing import Packing
from qwen2kit.weights.quantization import GROUP_SIZES, Quantization
from qwen2kit.weights.safetensors_read import SafetensorsSource
from qwen2kit.weights.source import AffineTensor, TensorInfo
from qwen2kit.weights.tensor import FLOAT_DTYPES, HostTensor, from_numpy

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_WEIGHT, _PACKED, _BIAS = ".weight", ".qweight", ".bias"
_PARTS = ("qweight", "qzeros", "scales")
_AWQ_POSITION = (0, 4, 1, 5, 2, 6, 3, 7)  # of each of eight consecutive outputs in its word
_CHUNK_ELEMENTS = 1 << 20


@dataclass(frozen=True, slots=True)
class _Layer:
    """One packed linear layer.

    Attributes:
        shape: ``(out, in)``.
        group: MLX group size in which it is exactly affine, or None.
    """

    shape: tuple[int, int]
    group: int | None


class PackedSource:
    """AWQ or GPTQ files as a WeightSource with canonical names.

    `read` dequantises to float32, which is exact for float16 and bfloat16 scales; `affine` gives
    the same weights in MLX affine quantisation, scales and biases in float32.

    Args:
        spec: the model.
        files: tensors by their names on disk.
        packing: what config.json says.

    Raises:
        WeightError: a layer lacks a part, or its parts contradict each other or ``packing``.
    """

    def __init__(self, spec: ModelSpec, files: SafetensorsSource, packing: Packing) -> None:
        self._files, self.packing = files, packing
        self._stored = frozenset(files.names())
        self._layers = {
            name.removesuffix(_PACKED): self._open_layer(name.removesuffix(_PACKED))
            for name in files.names()
            if name.endswith(_PACKED)
        }
        if not self._layers:
            raise WeightError(
                f"config.json announces {packing.method.upper()}, but the files hold no packed "
                "layer; download them again"
            )
        self._names = tuple(self._canonical(spec))

    def names(self) -> tuple[str, ...]:
        """Canonical names, in file order."""
        return self._names

    def info(self, name: str) -> TensorInfo:
        """Shape, and the dtype `read` gives: float32 for packed weights."""
        layer = self._layer(name)
        return self._files.info(name) if layer is None else TensorInfo("float32", layer.shape)

    def read(self, name: str) -> HostTensor:
        """The dense tensor ``[out, in]``."""
        import numpy as np

        layer = self._layer(name)
        if layer is None:
            return self._files.read(name)
        module = name.removesuffix(_WEIGHT)
        scales, zeros = self._scales(module), self._zeros(module)
        groups = self._groups(module, layer.shape[1])
        dense = np.empty(layer.shape, dtype=np.float32)
        for part, codes in self._rows(module, layer.shape):
            np.subtract(codes, zeros[part].take(groups, axis=1), out=dense[part])
            dense[part] *= scales[part].take(groups, axis=1)
        return from_numpy(dense)

    def affine(self, name: str) -> AffineTensor | None:
        """The packed form, or None for a dense tensor and where MLX has no exact encoding:
        the groups are not runs of 32, 64 or 128 inputs."""
        import numpy as np

        layer = self._layer(name)
        if layer is None or layer.group is None:
            return None
        module = name.removesuffix(_WEIGHT)
        out, width = layer.shape
        if self.packing.method == "gptq":
            packed = np.ascontiguousarray(self._integers(module, "qweight").T)
        else:
            packed = np.empty((out, width * self.packing.bits // 32), dtype=np.uint32)
            for part, codes in self._rows(module, layer.shape):
                packed[part] = pack(codes, self.packing.bits)
        groups = self._groups(module, width)[:: layer.group]
        scales = self._scales(module)[:, groups]
        return AffineTensor(
            packed=from_numpy(packed),
            scales=from_numpy(scales),
            biases=from_numpy(-self._zeros(module)[:, groups] * scales),
            bits=self.packing.bits,
            group_size=layer.group,
        )

    def quantization(self, spec: ModelSpec) -> Quantization | None:
        """MLX settings that keep every layer as it is packed, or None if one has no exact form."""
        sizes = [layer.group for layer in self._layers.values()]
        if None in sizes:
            return None
        bits = self.packing.bits
        usual = Counter(sizes).most_common(1)[0][0]
        assert usual is not None
        overrides: dict[str, tuple[int, int] | None] = {}
        for param in schema(spec):
            module = mlx_name(param).removesuffix(_WEIGHT)
            layer = self._layers.get(param.name.removesuffix(_WEIGHT))
            if layer is None and param.quantizable:
                overrides[module] = None
            elif layer is not None and layer.group is not None and layer.group != usual:
                overrides[module] = (bits, layer.group)
        return Quantization(bits, usual, overrides)

    def notes(self) -> tuple[str, ...]:
        """What a user should know: layers that MLX has to hold dense."""
        dense = sum(layer.group is None for layer in self._layers.values())
        if not dense:
            return ()
        return (
            f"{dense} of {len(self._layers)} packed layers have groups that are not runs of 32, 64 "
            "or 128 inputs (activation order, or another size): they are dequantised on every "
            "backend",
        )

    def _layer(self, name: str) -> _Layer | None:
        return self._layers.get(name.removesuffix(_WEIGHT)) if name.endswith(_WEIGHT) else None

    def _canonical(self, spec: ModelSpec) -> Iterator[str]:
        parts = {f"{module}.{part}" for module in self._layers for part in (*_PARTS, "g_idx")}
        known = {param.name for param in schema(spec)}
        for name in self._files.names():
            if name.endswith(_PACKED):
                yield name.removesuffix(_PACKED) + _WEIGHT
            elif name not in parts and not self._is_padding(name, known):
                yield name

    def _is_padding(self, name: str, known: set[str]) -> bool:
        """Whether this is one of the zero biases that GPTQ writers give every layer."""
        module = name.removesuffix(_BIAS)
        if not name.endswith(_BIAS) or name in known or module not in self._layers:
            return False
        return not self._files.read(name).float32().any()

    def _open_layer(self, module: str) -> _Layer:
        missing = [part for part in _PARTS if f"{module}.{part}" not in self._stored]
        if missing:
            raise WeightError(f"packed layer {module!r} lacks its {missing[0]}; download it again")
        if module + _WEIGHT in self._stored:
            raise WeightError(f"{module!r} is stored both packed and dense; remove one")
        bits = self.packing.bits
        packed, zeros, scales = (self._files.info(f"{module}.{part}") for part in _PARTS)
        if len(packed.shape) != 2 or len(scales.shape) != 2 or scales.dtype not in FLOAT_DTYPES:
            raise self._damaged(module)
        rows = packed.shape[0]
        out = scales.shape[1]
        per = 32 // bits
        awq = self.packing.method == "awq"
        width = rows if awq else rows * per
        groups = self.packing.groups(width)
        expected = (
            TensorInfo("int32", (width, out // per) if awq else (rows, out)),
            TensorInfo("int32", (groups, out // per)),
            TensorInfo(scales.dtype, (groups, out)),
        )
        if (packed, zeros, scales) != expected or out % per or (width * bits) % 32:
            raise self._damaged(module)
        return _Layer((out, width), self._affine_group(module, width, groups))

    def _affine_group(self, module: str, width: int, groups: int) -> int | None:
        name = f"{module}.g_idx"
        if name in self._stored:
            if self._files.info(name) != TensorInfo("int32", (width,)):
                raise self._damaged(module)
            index = self._files.read(name).raw()
            if width and (index.min() < 0 or index.max() >= groups):
                raise WeightError(
                    f"packed layer {module!r} has a g_idx outside its {groups} groups; download "
                    "it again"
                )
        index = self._groups(module, width)
        for size in sorted(GROUP_SIZES, reverse=True):
            if width % size == 0:
                runs = index.reshape(-1, size)
                if (runs == runs[:, :1]).all():
                    return size
        return None

    def _groups(self, module: str, width: int) -> NDArray[np.int32]:
        """The group of every input, int32 ``[in]``."""
        import numpy as np

        if f"{module}.g_idx" in self._stored:
            return np.asarray(self._files.read(f"{module}.g_idx").raw(), dtype=np.int32)
        size = width if self.packing.group_size == -1 else min(self.packing.group_size, width)
        return np.arange(width, dtype=np.int32) // np.int32(max(1, size))

    def _scales(self, module: str) -> NDArray[np.float32]:
        """Scales, float32 ``[out, groups]``."""
        import numpy as np

        return np.ascontiguousarray(self._files.read(f"{module}.scales").float32().T)

    def _zeros(self, module: str) -> NDArray[np.float32]:
        """Zero points, float32 ``[out, groups]``."""
        import numpy as np

        words = self._integers(module, "qzeros")
        if self.packing.version == "gptq":
            # stored minus one, subtracted from the whole word
            words = words + np.uint32(0xFFFFFFFF // ((1 << self.packing.bits) - 1))
        return np.ascontiguousarray(self._codes(words).T.astype(np.float32))

    def _rows(
        self, module: str, shape: tuple[int, int]
    ) -> Iterator[tuple[slice, NDArray[np.uint8]]]:
        """Codes ``[rows, in]`` of a slice of outputs at a time."""
        import numpy as np

        out, width = shape
        stored = self._integers(module, "qweight")
        step = max(1, _CHUNK_ELEMENTS // width // 32) * 32
        for start in range(0, out, step):
            part = slice(start, min(out, start + step))
            if self.packing.method == "gptq":
                yield part, unpack(np.ascontiguousarray(stored[:, part].T), self.packing.bits)
            else:
                codes = self._codes(stored[:, part.start // 8 : part.stop // 8])
                yield part, np.ascontiguousarray(codes.T)

    def _codes(self, words: NDArray[np.uint32]) -> NDArray[np.uint8]:
        """Codes of words that are packed along the outputs, uint8 ``[rows, out]``."""
        import numpy as np

        codes = unpack(np.ascontiguousarray(words), self.packing.bits)
        if self.packing.method == "gptq":
            return codes
        eights = codes.reshape(len(codes), -1, 8)
        return eights[..., _AWQ_POSITION].reshape(len(codes), -1)

    def _integers(self, module: str, part: Literal["qweight", "qzeros"]) -> NDArray[np.uint32]:
        import numpy as np

        return self._files.read(f"{module}.{part}").raw().view(np.uint32)

    def _damaged(self, module: str) -> WeightError:
        found = ", ".join(
            f"{part} {list(self._files.info(f'{module}.{part}').shape)}" for part in _PARTS
        )
        return WeightError(
            f"packed layer {module!r} is not {self.packing.describe()}: {found}; config.json and "
            "weights do not belong together, or the download is damaged"
        )
