"""MLX affine quantisation in NumPy: pack, unpack, quantise and dequantise, bit for bit as MLX.

Per group of ``group_size`` values along the last dimension a weight is ``scale * q + bias`` with
``0 <= q < 2**bits``. The scale is fitted so that the end of the range farther from zero is hit
exactly and zero itself stays representable. The codes of a row form one little-endian bit stream.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qwen2kit.errors import WeightError
from qwen2kit.weights.quantization import BITS, GROUP_SIZES
from qwen2kit.weights.source import AffineTensor
from qwen2kit.weights.tensor import FLOAT_DTYPES, DType, HostTensor, from_float32, from_numpy

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_EPSILON = 1e-7  # smallest scale MLX produces
_CHUNK_ELEMENTS = 1 << 22


def quantize(tensor: HostTensor, *, bits: int, group_size: int) -> AffineTensor:
    """Quantise a float matrix ``[..., out, in]``; scales and biases keep its dtype.

    Equal to ``mlx.core.quantize`` on the CPU. Works on a few rows at a time.

    Raises:
        WeightError: not a float tensor, no such bits or group size, ``in`` is not a multiple of
            the group size, or a value is not finite.
    """
    import numpy as np

    _check(tensor, bits, group_size)
    *lead, width = tensor.shape
    rows = tensor.raw().reshape(-1, width)
    groups = width // group_size
    packed = np.empty((len(rows), width * bits // 32), dtype=np.uint32)
    scales = np.empty((len(rows), groups), dtype=np.float32)
    biases = np.empty_like(scales)
    step = max(1, _CHUNK_ELEMENTS // width)
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        values = _widen(rows[part], tensor.dtype).reshape(-1, group_size)
        if not np.isfinite(values).all():
            raise WeightError("cannot quantise: the weights contain NaN or infinity")
        codes, scale, bias = _quantize_groups(values, bits)
        packed[part] = pack(codes.reshape(-1, width), bits)
        scales[part] = scale.reshape(-1, groups)
        biases[part] = bias.reshape(-1, groups)
    return AffineTensor(
        packed=from_numpy(packed.reshape(*lead, -1)),
        scales=from_float32(scales.reshape(*lead, groups), tensor.dtype),
        biases=from_float32(biases.reshape(*lead, groups), tensor.dtype),
        bits=bits,
        group_size=group_size,
    )


def dequantize(tensor: AffineTensor, dtype: DType = "float32") -> HostTensor:
    """The dense matrix ``scale * q + bias``.

    In float32 (default) this is what quantised matrix products compute with. In the dtype of the
    scales, product and sum are each rounded to it, as ``mlx.core.dequantize`` does.

    Raises:
        WeightError: shapes of codes, scales and biases contradict each other.
    """
    import numpy as np

    width = _check_triplet(tensor)
    *lead, words = tensor.packed.shape
    packed = np.asarray(tensor.packed.raw(), dtype=np.uint32).reshape(-1, words)
    groups = width // tensor.group_size
    scales = tensor.scales.float32().reshape(-1, groups, 1)
    biases = tensor.biases.float32().reshape(-1, groups, 1)
    rounded = dtype == tensor.scales.dtype and dtype != "float32"
    out = np.empty((len(packed), width), dtype=np.float32)
    step = max(1, _CHUNK_ELEMENTS // width)
    for start in range(0, len(packed), step):
        part = slice(start, start + step)
        codes = unpack(packed[part], tensor.bits).reshape(-1, groups, tensor.group_size)
        product = codes.astype(np.float32) * scales[part]
        if rounded:
            product = from_float32(product, dtype).float32()
        out[part] = (product + biases[part]).reshape(-1, width)
    return from_float32(out.reshape(*lead, width), dtype)


def pack(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint32]:
    """Codes ``[rows, n]`` (uint8, each below ``2**bits``) to words ``[rows, n * bits / 32]``."""
    import numpy as np

    rows = len(codes)
    if bits in (3, 6):
        per = 24 // bits
        cells = codes.reshape(rows, -1, per).astype(np.uint32)
        words = _join(cells, bits)
        stream = words.astype("<u4").view(np.uint8).reshape(rows, -1, 4)[..., :3]
        return np.ascontiguousarray(stream).reshape(rows, -1).view("<u4").astype(np.uint32)
    return _join(codes.reshape(rows, -1, 32 // bits).astype(np.uint32), bits)


def unpack(packed: NDArray[np.uint32], bits: int) -> NDArray[np.uint8]:
    """Inverse of `pack`."""
    import numpy as np

    rows = len(packed)
    words = packed
    if bits in (3, 6):
        stream = np.ascontiguousarray(packed, dtype="<u4").view(np.uint8).reshape(rows, -1, 3)
        wide = np.zeros((*stream.shape[:2], 4), dtype=np.uint8)
        wide[..., :3] = stream
        words = wide.reshape(rows, -1).view("<u4")
    per = (24 if bits in (3, 6) else 32) // bits
    codes = np.empty((rows, words.shape[1], per), dtype=np.uint8)
    for position in range(per):
        codes[..., position] = (words >> np.uint32(position * bits)) & ((1 << bits) - 1)
    return codes.reshape(rows, -1)


def _join(cells: NDArray[np.uint32], bits: int) -> NDArray[np.uint32]:
    import numpy as np

    words = cells[..., 0].copy()
    for position in range(1, cells.shape[-1]):
        words |= cells[..., position] << np.uint32(position * bits)
    return words


def _quantize_groups(
    values: NDArray[np.float32], bits: int
) -> tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.float32]]:
    import numpy as np

    top = np.float32((1 << bits) - 1)
    high, low = values.max(axis=-1, keepdims=True), values.min(axis=-1, keepdims=True)
    below = np.abs(low) > np.abs(high)
    scale = np.maximum((high - low) / top, np.float32(_EPSILON))
    scale = np.where(below, scale, -scale)
    edge = np.where(below, low, high)
    zero_code = np.rint(edge / scale)
    hit = zero_code != 0
    scale = np.where(hit, edge / np.where(hit, zero_code, 1), scale).astype(np.float32)
    bias = np.where(hit, edge, np.float32(0)).astype(np.float32)
    codes = np.clip(np.rint((values - bias) / scale), 0, top).astype(np.uint8)
    return codes, scale, bias


def _widen(rows: NDArray[np.generic], dtype: DType) -> NDArray[np.float32]:
    import numpy as np

    if dtype == "bfloat16":
        return (rows.astype(np.uint32) << 16).view(np.float32)
    return np.asarray(rows, dtype=np.float32)


def _check(tensor: HostTensor, bits: int, group_size: int) -> None:
    if tensor.dtype not in FLOAT_DTYPES or len(tensor.shape) < 2:
        raise WeightError(f"cannot quantise {tensor.dtype} {list(tensor.shape)}: no float matrix")
    if bits not in BITS or group_size not in GROUP_SIZES:
        raise WeightError(f"bits must be one of {BITS} and group size one of {GROUP_SIZES}")
    if tensor.shape[-1] % group_size:
        raise WeightError(
            f"rows of {tensor.shape[-1]} values do not divide into groups of {group_size}"
        )


def _check_triplet(tensor: AffineTensor) -> int:
    width = tensor.packed.shape[-1] * 32 // tensor.bits
    expected = (*tensor.packed.shape[:-1], width // tensor.group_size)
    if (
        tensor.packed.dtype != "uint32"
        or width % tensor.group_size
        or tensor.scales.shape != expected
        or tensor.biases.shape != expected
    ):
        raise WeightError(
            f"quantised tensor is inconsistent: codes {list(tensor.packed.shape)}, scales "
            f"{list(tensor.scales.shape)}, {tensor.bits} bits, groups of {tensor.group_size}"
        )
    return width
