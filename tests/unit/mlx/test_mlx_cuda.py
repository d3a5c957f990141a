"""On MLX's CUDA build: products with packed weights, and models that use them."""

from __future__ import annotations

import os

import numpy as np
import pytest

os.environ.setdefault("MLX_ENABLE_TF32", "0")  # as the backend does, before the first product
mx = pytest.importorskip("mlx.core")

from qwen2kit.backend.slots import Feed  # noqa: E402
from qwen2kit_mlx.compiled import MLXModel  # noqa: E402
from qwen2kit_mlx.cuda_kernels import CUDAKernels  # noqa: E402
from qwen2kit_mlx.cuda_products import BITS, MOST  # noqa: E402
from qwen2kit_mlx.host_kernels import HostKernels  # noqa: E402
from qwen2kit_mlx.kernels import Kernels, NativeKernels  # noqa: E402
from tests.conftest import random_weights, small_spec  # noqa: E402
from tests.unit.mlx.setup_mlx import PackedSource  # noqa: E402

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not mx.cuda.is_available(), reason="needs MLX's CUDA build and a GPU"),
]
WIDTHS = ((128, 40), (896, 1152), (4864, 896))


@pytest.fixture(scope="module")
def kernels() -> CUDAKernels:
    return CUDAKernels(fuse=True, architecture=mx.device_info()["architecture"])


def normal(*shape: int, dtype: mx.Dtype = mx.float32) -> mx.array:
    return mx.random.normal(shape).astype(dtype)


def wide(array: mx.array) -> np.ndarray:
    return np.array(array.astype(mx.float32)).astype(np.float64)


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("name", ["bfloat16", "float16", "float32"])
def test_packed_products(kernels: CUDAKernels, name: str, bits: int, group: int) -> None:
    dtype = getattr(mx, name)
    step = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 2.0**-19}[name]
    counts = (1, 2, 5, 8, 9, 16, 17, 40, MOST + 1)
    if dtype != mx.float32 and bits not in BITS:
        counts = counts[3:]  # fewer rows are MLX's, which adds up in 16 bits
    for width, out in WIDTHS:
        if dtype == mx.float32 and width == group:
            continue  # MLX's Hopper kernel takes rows of one group, and rounds to TF32
        packed = mx.quantize(normal(out, width, dtype=dtype) * 0.1, group, bits)
        exact = packed[0], *(part.astype(mx.float32) for part in packed[1:])
        dense = wide(mx.dequantize(*exact, group_size=group, bits=bits))
        bias = normal(out, dtype=dtype)
        for rows in counts:
            x, onto = normal(rows, width, dtype=dtype), normal(rows, out, dtype=dtype)
            got = kernels.affine_linear(x, packed, bits, group, bias, onto)
            expected = wide(x) @ dense.T + wide(bias) + wide(onto)
            gap = np.abs(wide(got) - expected)
            terms = np.abs(expected) + np.abs(wide(bias)) + np.abs(wide(onto))
            allowed = step * (terms + 2 * np.sqrt(width) * np.abs(dense).max())
            assert got.dtype == dtype
            assert (gap < allowed).all(), (width, out, rows, gap.max())


@pytest.mark.parametrize("rows", [1, 8, 12, 17, 33, MOST + 1])
@pytest.mark.parametrize("name", ["bfloat16", "float16"])
@pytest.mark.parametrize("bits", [4, 8])
def test_packed_swiglu(kernels: CUDAKernels, bits: int, name: str, rows: int) -> None:
    dtype = getattr(mx, name)
    packed = mx.quantize(normal(9728, 896, dtype=dtype) * 0.1, 64, bits)
    x = normal(rows, 896, dtype=dtype)
    both = wide(x) @ wide(mx.dequantize(*packed, group_size=64, bits=bits)).T
    got = wide(kernels.affine_linear(x, packed, bits, 64))
    np.testing.assert_allclose(got, both, rtol=0, atol=2.0**-6 * np.abs(both).max())
    gate, up = np.split(both, 2, axis=-1)
    expected = gate / (1 + np.exp(-gate)) * up
    got = wide(kernels.affine_swiglu(x, packed, bits, 64))
    np.testing.assert_allclose(got, expected, rtol=0, atol=2.0**-5 * np.abs(expected).max())


@pytest.mark.parametrize("bits", [4, 8])
def test_a_row_does_not_depend_on_the_others(kernels: CUDAKernels, bits: int) -> None:
    packed = mx.quantize(normal(896, 1024, dtype=mx.bfloat16), 64, bits)
    x = normal(MOST, 1024, dtype=mx.bfloat16)
    for rows, most in ((1, 8), (3, 8), (9, 16), (17, 32), (33, MOST)):
        every = kernels.affine_linear(x[:most], packed, bits, 64)
        assert mx.array_equal(kernels.affine_linear(x[:rows], packed, bits, 64), every[:rows])


class Opened(PackedSource):
    """The dequantised weights alone."""

    def affine(self, name: str) -> None:
        return None


def test_a_model_in_four_bits(kernels: CUDAKernels) -> None:
    """Logits are as near to float32's as those of the dequantised weights in bfloat16 are, if
    scales have the dtype of the model, as in MLX's own checkpoints."""
    spec = small_spec(hidden_size=128, intermediate_size=256, head_dim=32)
    base = random_weights(spec)
    formats = dict.fromkeys((n for n in base.names() if "proj.weight" in n), (4, 64))
    packed, opened = (kind(base, formats, mx.bfloat16) for kind in (PackedSource, Opened))

    def logits(source: PackedSource, chosen: Kernels, device: mx.Device) -> np.ndarray:
        dtype = mx.float32 if device.type == mx.cpu else mx.bfloat16
        made = MLXModel(spec, device, dtype, chosen, 256)
        made.load(source)
        slots = made.slots(2, 200)
        found = [slots.feed([Feed(0, 0, tuple(range(150)))]).rows([0])]
        slots.feed([Feed(1, 0, (3, 4, 5))])
        for at in range(3):
            feeds = [Feed(0, 150 + at, (at + 7,)), Feed(1, 3 + at, (at + 9,))]
            found.append(slots.feed(feeds).rows([0, 1]))
        slots.close()
        return np.concatenate(found)

    exact = logits(packed, HostKernels(), mx.Device(mx.cpu))
    dense = logits(opened, NativeKernels(fuse=True), mx.Device(mx.gpu))
    ours = logits(packed, kernels, mx.Device(mx.gpu))
    assert np.abs(ours - exact).mean() < 1.2 * np.abs(dense - exact).mean()
