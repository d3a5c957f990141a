"""Parameters in and out: HostTensor <-> torch.Tensor, one tensor at a time."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qwen2kit.backend.protocol import LoadReport
from qwen2kit.spec.schema import schema
from qwen2kit.weights.affine import unpack
from qwen2kit.weights.match import check_fits
from qwen2kit.weights.source import AffineTensor, WeightSource
from qwen2kit.weights.tensor import DType, HostTensor
from qwen2kit_torch.linear import Linear
from qwen2kit_torch.model import Qwen2
from qwen2kit_torch.quantized import (
    Quantized,
    QuantizedLinear,
    divides,
    quantize,
    to_words,
)

_TORCH: dict[DType, torch.dtype] = {
    "float64": torch.float64, "float32": torch.float32, "float16": torch.float16,
    "bfloat16": torch.bfloat16, "int64": torch.int64, "int32": torch.int32,
    "uint32": torch.uint32, "int8": torch.int8, "uint8": torch.uint8,
}  # fmt: skip
_HOST = {dtype: name for name, dtype in _TORCH.items()}


def load_weights(model: Qwen2, weights: WeightSource, *, device: torch.device) -> LoadReport:
    """Fill every parameter of ``model`` from ``weights``, in the parameters' own dtype.

    They will never be written, so that on the CPU they may be the source's own buffers (usually a
    memory-mapped file) where the dtype is the same.

    Args:
        model: parameters may still be on the meta device.
        weights: canonical tensors; quantised ones are dequantised, unless the layer is to hold them
            in so many bits.
        device: where parameters go.

    Raises:
        WeightError: names or shapes do not fit.
    """
    started = time.perf_counter()
    check_fits(model.spec, weights)
    total = 0
    model.discard_packed()
    for param in schema(model.spec):
        total += _fill(model, param.name, weights, device)
    return LoadReport(
        tensors=len(schema(model.spec)), bytes=total, seconds=time.perf_counter() - started
    )


def export_weights(model: Qwen2) -> Iterator[tuple[str, HostTensor]]:
    """All parameters in schema order and in their own dtype, one at a time."""
    for param in schema(model.spec):
        path, _, leaf = param.name.rpartition(".")
        module = model.get_submodule(path)
        if leaf == "weight" and isinstance(module, Linear):
            yield param.name, as_host(module.dense_weight())
        else:
            yield param.name, as_host(getattr(module, leaf).detach())


def as_tensor(host: HostTensor) -> Tensor:
    """A view of ``host``; writing to it is undefined when the buffer is read-only."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return torch.frombuffer(host.data, dtype=_TORCH[host.dtype]).view(host.shape)


def as_host(tensor: Tensor) -> HostTensor:
    """``tensor`` in host memory, sharing it if it is a contiguous CPU tensor."""
    flat = tensor.to("cpu").contiguous().view(-1)
    raw: NDArray[np.generic] = flat.view(torch.uint8).numpy()
    return HostTensor(_HOST[tensor.dtype], tuple(tensor.shape), raw.data)


def _fill(model: Qwen2, name: str, weights: WeightSource, device: torch.device) -> int:
    """Read one parameter into its module; returns the bytes read."""
    path, _, leaf = name.rpartition(".")
    module: nn.Module = model.get_submodule(path)
    if leaf == "weight" and isinstance(module, QuantizedLinear):
        stored = weights.affine(name)
        matrix = None if stored is None else _as_stored(stored, module.bits, device)
        if stored is not None and matrix is not None:
            module.fill(matrix)
            return stored.packed.nbytes + stored.scales.nbytes + stored.biases.nbytes
        host = weights.read(name)
        dense = as_tensor(host).to(device, module.dtype)
        module.fill(quantize(dense, bits=module.bits, group=module.group))
        return host.nbytes
    host = weights.read(name)
    current: nn.Parameter = getattr(module, leaf)
    value = as_tensor(host).to(device, current.dtype)
    setattr(module, leaf, nn.Parameter(value, requires_grad=False))
    return host.nbytes


def _as_stored(tensor: AffineTensor, bits: int, device: torch.device) -> Quantized | None:
    """A matrix as the checkpoint holds it; None if its codes are other ones than wanted."""
    group = tensor.group_size
    width = tensor.packed.shape[-1] * 32 // tensor.bits
    if tensor.bits != bits or not divides(width, group):
        return None
    codes = torch.from_numpy(unpack(np.asarray(tensor.packed.raw(), dtype=np.uint32), bits))
    steps = torch.stack([as_tensor(tensor.scales), as_tensor(tensor.biases)], -1).to(device)
    return Quantized(to_words(codes.to(device), bits), steps, bits, group)
