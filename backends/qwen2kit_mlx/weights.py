"""Weight source -> `ModelParams`, and back to canonical tensors.

Which matrices are stacked is decided here alone: everything else in the package sees `Matrix`
objects, everything outside sees the canonical names of the schema.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from qwen2kit.adapters.lora import LowRank
from qwen2kit.adapters.merge import AdaptedSource
from qwen2kit.errors import WeightError
from qwen2kit.spec.model import ModelSpec
from qwen2kit.spec.schema import EMBED_TOKENS, FINAL_NORM, LM_HEAD, Param, schema
from qwen2kit.weights.match import check_fits
from qwen2kit.weights.source import AffineTensor, WeightSource
from qwen2kit.weights.tensor import HostTensor
from qwen2kit_mlx.host_tensor import to_device, to_host
from qwen2kit_mlx.kernels import Kernels
from qwen2kit_mlx.linear import Affine, Dense, Matrix, Single, Stacked
from qwen2kit_mlx.lora import adapt
from qwen2kit_mlx.model import LayerParams, ModelParams

BITS = (2, 3, 4, 6, 8)
GROUP_SIZES = (32, 64, 128)
DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}
READ_BYTES = 64 << 20
"""What is read together, while what was read before is stacked."""
HELD_BYTES = 512 << 20
"""On CUDA, what has been stacked is kept up to here: memory that the GPU has read would be the next
to be written, which makes it move back."""
_KEYS = "k_proj"
_QKV = ("q_proj", _KEYS, "v_proj")
_GATE_UP = ("gate_proj", "up_proj")


@dataclass(frozen=True, slots=True)
class _Home:
    """Where a canonical tensor lives: rows of a matrix or of a vector."""

    store: Matrix | mx.array
    start: int
    stop: int

    def dense(self) -> mx.array:
        if isinstance(self.store, mx.array):
            return self.store[self.start : self.stop]
        return self.store.dense_rows(self.start, self.stop)


class WeightLoader:
    """Reads a source once and remembers where every tensor went.

    Args:
        spec: the model.
        kernels: handed to the matrices.
        dtype: compute dtype; dense tensors are stored in it, packed ones keep their integers.
        anchored: hold the biases of keys apart, as `LayerParams.anchor`.

    Attributes:
        tensors, bytes: how much was taken from the source.
    """

    def __init__(
        self, spec: ModelSpec, kernels: Kernels, dtype: mx.Dtype, *, anchored: bool
    ) -> None:
        self._spec, self._kernels, self._dtype = spec, kernels, dtype
        self._anchored = anchored
        self._homes: dict[str, _Home] = {}
        self._unread: dict[Path, dict[str, mx.array]] = {}
        self._update: Callable[[str], LowRank | None] = lambda name: None
        self._taken: list[mx.array] = []
        self.tensors = self.bytes = 0

    def load(self, weights: WeightSource) -> ModelParams:
        """Build all parameters; some layers are read while those before them are stacked.

        An adapter is kept beside the matrices it updates, not merged into them.

        Raises:
            WeightError: names, shapes or the quantisation of ``weights`` do not fit.
        """
        check_fits(self._spec, weights)
        if isinstance(weights, AdaptedSource):
            self._update, weights = weights.update, weights.base
        self.tensors = len(schema(self._spec))
        by_layer: dict[int, dict[str, dict[str, Param]]] = {}
        for param in schema(self._spec):
            if param.layer is not None:
                *_, module, leaf = param.name.split(".")
                by_layer.setdefault(param.layer, {}).setdefault(module, {})[leaf] = param
        embed = self._single(weights, EMBED_TOKENS)
        head = embed if self._spec.tie_word_embeddings else self._single(weights, LM_HEAD)
        norm = self._vector(weights, FINAL_NORM)
        layers: list[LayerParams] = []
        held = HELD_BYTES if self._kernels.paces else 0
        portions = _Portions([*embed.arrays(), *head.arrays(), norm], held)
        for modules in by_layer.values():
            layers.append(self._layer(weights, modules))
            self._taken = portions.add(self._taken, _arrays(layers[-1]))
        portions.finish(self._taken)
        self._taken = []
        return ModelParams(embed=embed, layers=tuple(layers), norm=norm, head=head)

    def export(self, device: mx.Device) -> Iterator[tuple[str, HostTensor]]:
        """Canonical dense tensors in schema order, in the compute dtype."""
        for param in schema(self._spec):
            with mx.stream(device):
                tensor = to_host(self._homes[param.name].dense())
            yield param.name, tensor

    def _layer(self, weights: WeightSource, modules: dict[str, dict[str, Param]]) -> LayerParams:
        anchor = None
        if self._anchored:
            anchor = self._vector(weights, modules[_KEYS]["bias"].name)
            anchor = anchor.reshape(-1, self._spec.head_dim)
        return LayerParams(
            input_norm=self._vector(weights, modules["input_layernorm"]["weight"].name),
            qkv=self._stack(weights, [modules[name] for name in _QKV]),
            anchor=anchor,
            o=self._stack(weights, [modules["o_proj"]]),
            post_norm=self._vector(weights, modules["post_attention_layernorm"]["weight"].name),
            gate_up=self._stack(weights, [modules[name] for name in _GATE_UP]),
            down=self._stack(weights, [modules["down_proj"]]),
        )

    def _single(self, weights: WeightSource, name: str) -> Single:
        matrix = self._matrix(weights, name, None)
        self._homes[name] = _Home(matrix, 0, weights.info(name).shape[0])
        return matrix

    def _vector(self, weights: WeightSource, name: str) -> mx.array:
        vector = self._dense(weights.read(name))
        self._homes[name] = _Home(vector, 0, vector.shape[0])
        return vector

    def _stack(self, weights: WeightSource, modules: list[dict[str, Param]]) -> Matrix:
        parts = [self._part(weights, module) for module in modules]
        sizes = [module["weight"].shape[0] for module in modules]
        updates = [self._update(module["weight"].name) for module in modules]
        self.bytes += sum(u.a.nbytes + u.b.nbytes for u in updates if u is not None)
        stacked = adapt(self._kernels, _stacked(parts, sizes), sizes, updates, self._dtype)
        start = 0
        for module, part, size in zip(modules, parts, sizes, strict=True):
            self._homes[module["weight"].name] = _Home(stacked, start, start + size)
            if part.bias is not None and module["bias"].name not in self._homes:
                bias, first = (part.bias, 0) if stacked.bias is None else (stacked.bias, start)
                self._homes[module["bias"].name] = _Home(bias, first, first + size)
            start += size
        return stacked

    def _part(self, weights: WeightSource, module: dict[str, Param]) -> Single:
        bias = module.get("bias")
        if bias is None:
            return self._matrix(weights, module["weight"].name, None)
        if bias.name in self._homes:  # held apart
            vector = mx.zeros(bias.shape, dtype=self._dtype)
        else:
            vector = self._dense(weights.read(bias.name))
        return self._matrix(weights, module["weight"].name, vector)

    def _matrix(self, weights: WeightSource, name: str, bias: mx.array | None) -> Single:
        affine = weights.affine(name)
        if affine is None:
            return Dense(self._kernels, self._dense(weights.read(name)), bias)
        _check_affine(name, weights.info(name).shape, affine)
        packed = self._raw(affine.packed)
        scales, biases = self._dense(affine.scales), self._dense(affine.biases)
        parts = (packed, scales, biases)
        return Affine(self._kernels, parts, affine.bits, affine.group_size, bias)

    def _dense(self, tensor: HostTensor) -> mx.array:
        return self._raw(tensor).astype(self._dtype)

    def _raw(self, tensor: HostTensor) -> mx.array:
        self.bytes += tensor.nbytes
        if tensor.origin is None:
            return to_device(tensor)
        path, name = tensor.origin
        if name not in self._unread.get(path, {}):
            self._unread[path] = _opened(path)
        self._taken.append(self._unread[path].pop(name))  # dropped here: stacking frees it
        return self._taken[-1]


class _Portions:
    """Reads files portion by portion while a GPU stacks the portion before. It is handed only
    what has been read: waiting for every single array costs it more than copying.

    Args:
        arrays: parameters made of what has been taken from files so far.
        most: bytes of stacked arrays that are kept until the end.
    """

    def __init__(self, arrays: list[mx.array], most: int) -> None:
        self._arrays, self._most = arrays, most
        self._started: list[mx.array] = []
        self._before: list[mx.array] = []
        self._held: list[mx.array] = []

    def add(self, taken: list[mx.array], arrays: list[mx.array]) -> list[mx.array]:
        """More parameters, made of ``taken``; gives back what of it is yet to be read."""
        self._arrays += arrays
        if _size(taken) < READ_BYTES:
            return taken
        mx.async_eval(taken)  # type: ignore[no-untyped-call]
        self._stack()
        self._started, self._before, self._arrays = taken, self._arrays, []
        return []

    def finish(self, taken: list[mx.array]) -> None:
        """Read and stack the rest."""
        mx.async_eval(taken)  # type: ignore[no-untyped-call]
        self._stack()
        mx.eval(taken)
        mx.eval(self._arrays, self._before)

    def _stack(self) -> None:
        mx.eval(self._started)
        mx.async_eval(self._before)  # type: ignore[no-untyped-call]
        self._held += self._started
        if _size(self._held) > self._most:
            mx.eval(self._before)
            self._held = []


def _size(arrays: list[mx.array]) -> int:
    return sum(array.nbytes for array in arrays)


def _opened(path: Path) -> dict[str, mx.array]:
    """All tensors of a safetensors file; MLX reads each one when it is needed, in threads."""
    loaded = mx.load(str(path), stream=mx.cpu)
    assert isinstance(loaded, dict)
    return loaded


def _arrays(layer: LayerParams) -> list[mx.array]:
    matrices = (layer.qkv, layer.o, layer.gate_up, layer.down)
    stored = [array for matrix in matrices for array in matrix.arrays()]
    anchor = [] if layer.anchor is None else [layer.anchor]
    return [layer.input_norm, layer.post_norm, *anchor, *stored]


def _stacked(parts: list[Single], sizes: list[int]) -> Matrix:
    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    if not first.kernels.stacks:
        return Stacked(parts, sizes)
    biases = [part.bias for part in parts if part.bias is not None]
    bias = mx.concatenate(biases) if biases else None
    if all(isinstance(part, Dense) for part in parts):
        dense = [part.weight for part in parts if isinstance(part, Dense)]
        return Dense(first.kernels, mx.concatenate(dense), bias)
    affine = [part for part in parts if isinstance(part, Affine)]
    formats = {(part.bits, part.group_size) for part in affine}
    if len(affine) == len(parts) and len(formats) == 1:
        packed, scales, offsets = (
            mx.concatenate(list(column))
            for column in zip(*(part.weight for part in affine), strict=True)
        )
        (bits, group_size) = formats.pop()
        return Affine(first.kernels, (packed, scales, offsets), bits, group_size, bias)
    return Stacked(parts, sizes)


def _check_affine(name: str, shape: tuple[int, ...], affine: AffineTensor) -> None:
    if affine.bits not in BITS or affine.group_size not in GROUP_SIZES:
        raise WeightError(
            f"{name} is quantised to {affine.bits} bits in groups of {affine.group_size}; "
            f"MLX takes {BITS} bits in groups of {GROUP_SIZES}"
        )
    out, width = shape
    groups = (out, width // affine.group_size)
    fits = (
        affine.packed.dtype == "uint32"
        and affine.packed.shape == (out, width * affine.bits // 32)
        and affine.scales.shape == affine.biases.shape == groups
        and width % affine.group_size == 0
    )
    if not fits:
        raise WeightError(
            f"{name} is mislabelled: packed {list(affine.packed.shape)} with scales "
            f"{list(affine.scales.shape)} is not {affine.bits}-bit {list(shape)}; reconvert it"
        )
