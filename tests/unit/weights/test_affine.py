"""Affine quantisation in NumPy against mlx.core, bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from qwen2kit.errors import WeightError
from qwen2kit.weights.affine import dequantize, pack, quantize, unpack
from qwen2kit.weights.quantization import BITS, GROUP_SIZES
from qwen2kit.weights.source import AffineTensor
from qwen2kit.weights.tensor import DType, from_float32, from_numpy


def _matrix(seed: int = 0) -> np.ndarray[Any, np.dtype[np.float32]]:
    rng = np.random.default_rng(seed)
    scale = rng.choice([1e-9, 1e-3, 0.02, 1.0, 10.0], (64, 1))
    values = (rng.standard_normal((64, 256)) * scale).astype(np.float32)
    values[0], values[1], values[2] = 0, 3, -3
    values[3], values[4] = np.abs(values[3]), -np.abs(values[4])
    return values


def _raw(mx: Any, array: Any) -> np.ndarray[Any, Any]:
    return np.array(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_equals_mlx_bit_for_bit(dtype: DType, bits: int, group_size: int) -> None:
    mx = pytest.importorskip("mlx.core")
    values = _matrix()
    with mx.stream(mx.cpu):
        theirs = mx.quantize(
            mx.array(values).astype(getattr(mx, dtype)), group_size=group_size, bits=bits
        )
        dense = mx.dequantize(*theirs, group_size=group_size, bits=bits)
        mx.eval(*theirs, dense)
    ours = quantize(from_float32(values, dtype), bits=bits, group_size=group_size)
    for part, other in zip((ours.packed, ours.scales, ours.biases), theirs, strict=True):
        assert np.array_equal(part.raw(), _raw(mx, other))
    assert np.array_equal(dequantize(ours, dtype).raw(), _raw(mx, dense))


@pytest.mark.parametrize("bits", BITS)
def test_packing_round_trips_every_code(bits: int) -> None:
    rng = np.random.default_rng(bits)
    codes = rng.integers(0, 1 << bits, (5, 192)).astype(np.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (5, 192 * bits // 32)
    assert np.array_equal(unpack(packed, bits), codes)


def test_float32_dequantisation_is_what_quantised_products_compute_with() -> None:
    mx = pytest.importorskip("mlx.core")
    values = _matrix(1)[5:]
    ours = quantize(from_float32(values, "bfloat16"), bits=4, group_size=64)
    x = np.random.default_rng(2).standard_normal((3, 256)).astype(np.float32)
    with mx.stream(mx.cpu):
        scales, biases = (mx.array(part.float32()) for part in (ours.scales, ours.biases))
        packed = mx.array(np.asarray(ours.packed.raw()))
        product = np.array(
            mx.quantized_matmul(mx.array(x), packed, scales, biases, group_size=64, bits=4)
        )
    expected = x @ dequantize(ours).float32().T
    assert np.allclose(product, expected, rtol=1e-5, atol=1e-4)


def test_chunked_rows_give_the_same_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = from_float32(_matrix(3), "float16")
    whole = quantize(tensor, bits=4, group_size=32)
    monkeypatch.setattr("qwen2kit.weights.affine._CHUNK_ELEMENTS", 700)
    parts = quantize(tensor, bits=4, group_size=32)
    assert bytes(whole.packed.data) == bytes(parts.packed.data)
    assert np.array_equal(dequantize(whole).raw(), dequantize(parts).raw())


def test_bad_input_is_named() -> None:
    good = from_float32(_matrix(), "float32")
    with pytest.raises(WeightError, match="do not divide into groups of 64"):
        quantize(from_float32(np.zeros((2, 96), np.float32), "float32"), bits=4, group_size=64)
    with pytest.raises(WeightError, match="bits must be one of"):
        quantize(good, bits=5, group_size=64)
    bad = _matrix()
    bad[1, 1] = np.nan
    with pytest.raises(WeightError, match="NaN or infinity"):
        quantize(from_float32(bad, "float32"), bits=4, group_size=64)
    packed = quantize(good, bits=4, group_size=64)
    wrong = AffineTensor(packed.packed, packed.scales, from_numpy(np.zeros(3, np.float32)), 4, 64)
    with pytest.raises(WeightError, match="inconsistent"):
        dequantize(wrong)
