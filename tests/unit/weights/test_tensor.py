"""HostTensor: rounding bit for bit as torch rounds, and refusal of wrong buffers."""

from __future__ import annotations

import numpy as np
import pytest

from qwen2kit.errors import WeightError
from qwen2kit.weights.tensor import HostTensor, from_bits, from_float32, from_numpy

SPECIAL = np.array(
    [
        0x00000000, 0x80000000, 0x7F800000, 0xFF800000, 0x7FC00000, 0xFFC00000, 0x7F800001,
        0xFFFFFFFF, 0x7FFFFFFF, 0x00000001, 0x80000001, 0x007FFFFF, 0x00008000, 0x00018000,
        0x3F808000, 0x3F818000, 0x3F807FFF, 0x3F808001, 0x7F7FFFFF, 0xFF7FFFFF, 0x7F7F7FFF,
    ],
    dtype=np.uint32,
)  # fmt: skip


def random_values(count: int = 200_000) -> np.ndarray:
    bits = np.random.default_rng(0).integers(0, 1 << 32, count, dtype=np.uint32)
    return np.concatenate([SPECIAL, bits]).view(np.float32)


def test_bfloat16_rounding_is_that_of_torch() -> None:
    torch = pytest.importorskip("torch")
    values = random_values()
    ours = from_float32(values, "bfloat16").raw()
    theirs = torch.from_numpy(values.copy()).bfloat16().view(torch.int16).numpy().view(np.uint16)
    nan = np.isnan(values)
    np.testing.assert_array_equal(ours[~nan], theirs[~nan])
    assert np.isnan(from_bits(ours[nan]).float32()).all()


def test_bfloat16_to_float32_is_exact() -> None:
    torch = pytest.importorskip("torch")
    bits = np.arange(1 << 16, dtype=np.uint16)
    theirs = torch.from_numpy(bits.view(np.int16).copy()).view(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(from_bits(bits).float32(), theirs)


def test_bfloat16_survives_a_round_trip() -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    tensor = from_bits(bits)
    again = from_float32(tensor.float32(), "bfloat16").raw()
    number = ~np.isnan(tensor.float32())
    np.testing.assert_array_equal(again[number], bits[number])


def test_float16_rounding_is_that_of_torch() -> None:
    torch = pytest.importorskip("torch")
    values = random_values()
    values = values[np.abs(values) < 65_000]
    ours = from_float32(values, "float16").raw()
    np.testing.assert_array_equal(ours, torch.from_numpy(values.copy()).half().numpy())


@pytest.mark.parametrize("others", [[1.0], [np.inf], [np.nan]])
def test_float16_overflow_is_an_error(others: list[float]) -> None:
    with pytest.raises(WeightError, match="overflow float16"):
        from_float32(np.array([70_000.0, *others], dtype=np.float32), "float16")


def test_infinity_itself_may_become_float16() -> None:
    tensor = from_float32(np.array([np.inf, -np.inf], dtype=np.float32), "float16")
    np.testing.assert_array_equal(tensor.float32(), [np.inf, -np.inf])


def test_rounding_to_an_integer_type_is_refused() -> None:
    with pytest.raises(WeightError, match="cannot round to int8"):
        from_float32(np.zeros(2, dtype=np.float32), "int8")


@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3), (2, 0, 4)])
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "int64", "int32", "uint8"])
def test_numpy_round_trip(shape: tuple[int, ...], dtype: str) -> None:
    array = np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(dtype)
    tensor = from_numpy(array)
    assert (tensor.shape, tensor.dtype, tensor.nbytes) == (shape, dtype, array.nbytes)
    np.testing.assert_array_equal(tensor.raw(), array)


def test_strided_and_big_endian_arrays_become_contiguous_little_endian() -> None:
    array = np.arange(12, dtype=">f4").reshape(3, 4).T
    np.testing.assert_array_equal(from_numpy(array).raw(), array)


def test_contiguous_arrays_are_not_copied() -> None:
    array = np.arange(4, dtype=np.float32)
    tensor = from_numpy(array)
    array[0] = 9
    assert tensor.raw()[0] == 9
    assert tensor.astype("float32") is tensor


def test_unknown_numpy_dtype_is_refused() -> None:
    with pytest.raises(WeightError, match="bool"):
        from_numpy(np.zeros(2, dtype=bool))


def test_buffer_of_the_wrong_length_is_refused() -> None:
    with pytest.raises(WeightError, match=r"float32 \[2, 3\] needs 24 bytes, got 20"):
        HostTensor("float32", (2, 3), memoryview(bytes(20)))
