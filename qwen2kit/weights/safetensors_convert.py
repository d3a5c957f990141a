"""Streaming a checkpoint's tensors into HF or MLX safetensors, dense or affine-quantised."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from qwen2kit.spec.model import ModelSpec
from qwen2kit.spec.schema import schema
from qwen2kit.weights.affine import quantize
from qwen2kit.weights.mlx_layout import StoredTensor, is_quantized_in_mlx, mlx_tensors
from qwen2kit.weights.quantization import Quantization
from qwen2kit.weights.safetensors_write import SafetensorsWriter
from qwen2kit.weights.source import AffineTensor, TensorInfo, WeightSource
from qwen2kit.weights.tensor import DType, HostTensor

Progress = Callable[[str], None]


class _Writer(Protocol):
    def write(self, name: str, tensor: HostTensor) -> None: ...


def write_hf_weights(
    spec: ModelSpec,
    weights: WeightSource,
    directory: Path,
    *,
    dtype: DType,
    max_shard_bytes: int,
    progress: Progress,
) -> dict[str, str]:
    """Write canonical tensors in ``dtype``; returns sha256 by name."""
    plan = [(param.name, TensorInfo(dtype, param.shape)) for param in schema(spec)]
    sums: dict[str, str] = {}
    with SafetensorsWriter(
        directory, plan, metadata={"format": "pt"}, max_shard_bytes=max_shard_bytes
    ) as writer:
        for name, _ in plan:
            progress(name)
            _put(writer, sums, name, weights.read(name).astype(dtype))
    return sums


def write_mlx_weights(
    spec: ModelSpec,
    weights: WeightSource,
    directory: Path,
    *,
    dtype: DType,
    quantization: Quantization | None,
    max_shard_bytes: int,
    progress: Progress,
) -> dict[str, str]:
    """Write MLX tensors, quantised where mlx-lm would; returns sha256 by stored name.

    A tensor that is already packed the same way keeps its codes; it is not quantised again.
    """
    tensors = list(mlx_tensors(spec))
    plan = [entry for tensor in tensors for entry in _planned(tensor, dtype, quantization)]
    sums: dict[str, str] = {}
    with SafetensorsWriter(
        directory, plan, metadata={"format": "mlx"}, max_shard_bytes=max_shard_bytes
    ) as writer:
        for tensor in tensors:
            progress(tensor.name)
            settings = _settings(tensor, quantization)
            if settings is None:
                dense = [weights.read(param.name).astype(dtype) for param in tensor.params]
                _put(writer, sums, tensor.name, _join(tensor, dense))
                continue
            packed = [_pack(weights, param.name, dtype, *settings) for param in tensor.params]
            for part, pieces in (
                ("weight", [piece.packed for piece in packed]),
                ("scales", [piece.scales for piece in packed]),
                ("biases", [piece.biases for piece in packed]),
            ):
                _put(writer, sums, f"{tensor.module}.{part}", _join(tensor, pieces))
    return sums


def _planned(
    tensor: StoredTensor, dtype: DType, quantization: Quantization | None
) -> list[tuple[str, TensorInfo]]:
    settings = _settings(tensor, quantization)
    if settings is None:
        return [(tensor.name, TensorInfo(dtype, tensor.shape))]
    bits, group_size = settings
    *lead, width = tensor.shape
    groups = (*lead, width // group_size)
    return [
        (tensor.name, TensorInfo("uint32", (*lead, width * bits // 32))),
        (f"{tensor.module}.scales", TensorInfo(dtype, groups)),
        (f"{tensor.module}.biases", TensorInfo(dtype, groups)),
    ]


def _settings(tensor: StoredTensor, quantization: Quantization | None) -> tuple[int, int] | None:
    """``(bits, group_size)`` of a tensor that is stored packed, or None."""
    if quantization is None or not is_quantized_in_mlx(tensor, quantization):
        return None
    return quantization.of(tensor.module)


def _pack(
    weights: WeightSource, name: str, dtype: DType, bits: int, group_size: int
) -> AffineTensor:
    packed = weights.affine(name)
    if packed is not None and (packed.bits, packed.group_size) == (bits, group_size):
        scales, biases = packed.scales.astype(dtype), packed.biases.astype(dtype)
        return replace(packed, scales=scales, biases=biases)
    return quantize(weights.read(name).astype(dtype), bits=bits, group_size=group_size)


def _join(tensor: StoredTensor, pieces: list[HostTensor]) -> HostTensor:
    """Stack the experts of a layer; a plain parameter is its only piece."""
    if not tensor.stacked:
        return pieces[0]
    shape = (len(pieces), *pieces[0].shape)
    return HostTensor(pieces[0].dtype, shape, memoryview(b"".join(piece.data for piece in pieces)))


def _put(writer: _Writer, sums: dict[str, str], name: str, tensor: HostTensor) -> None:
    writer.write(name, tensor)
    sums[name] = hashlib.sha256(tensor.data).hexdigest()
