"""The CUDA product with packed weights: its C++ on a CPU, and which product serves which rows."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core")

from qwen2kit.backend.slots import Feed  # noqa: E402
from qwen2kit_mlx.compiled import MLXModel  # noqa: E402
from qwen2kit_mlx.cuda_compile import CompileError, cubin  # noqa: E402
from qwen2kit_mlx.cuda_kernels import CUDAKernels  # noqa: E402
from qwen2kit_mlx.cuda_products import (  # noqa: E402
    DENSE_BYTES,
    MOST,
    STEP,
    PackedProduct,
    dense_parts,
    fits,
    tiles,
)
from qwen2kit_mlx.cuda_source import PRIMITIVES, PRODUCT  # noqa: E402
from qwen2kit_mlx.host_kernels import HostKernels  # noqa: E402
from qwen2kit_mlx.kernels import Kernels  # noqa: E402
from tests.conftest import random_weights, small_spec  # noqa: E402
from tests.unit.mlx.cuda_on_cpu import COMPILER, OnCPU  # noqa: E402
from tests.unit.mlx.setup_mlx import PackedSource  # noqa: E402

RNG = np.random.default_rng(5)
SHAPES = [(4608, 3584), (37888, 3584), (3584, 18944), (1152, 896), (896, 4864), (151936, 896)]


def normal(*shape: int) -> mx.array:
    return mx.array(RNG.standard_normal(shape).astype(np.float32))


def wide(array: mx.array) -> np.ndarray:
    return np.array(array.astype(mx.float32)).astype(np.float64)


def raw(array: mx.array) -> np.ndarray:
    return np.array(array.view(mx.uint16))


# bits, group, rows, outputs, inputs, tokens and outputs per block, warps, ahead, bfloat16
@pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
@pytest.mark.parametrize(
    ("bits", "group", "rows", "out", "width", "shape", "bf16"),
    [
        (4, 64, 1, 16, 128, (1, 1, 2, 2), 1),
        (4, 32, 3, 40, 384, (1, 1, 2, 2), 1),
        (4, 64, 9, 50, 640, (2, 2, 4, 1), 1),
        (4, 128, 3, 40, 384, (1, 2, 2, 2), 0),
        (4, 64, 33, 24, 256, (4, 2, 2, 1), 0),
        (8, 64, 3, 40, 384, (1, 2, 2, 2), 0),
        (8, 32, 11, 24, 256, (2, 1, 4, 2), 1),
        (8, 128, 5, 24, 256, (1, 1, 3, 4), 1),
    ],
)
def test_the_kernel_computes_what_dequantised_weights_give(
    bits: int,
    group: int,
    rows: int,
    out: int,
    width: int,
    shape: tuple[int, int, int, int],
    bf16: int,
    tmp_path: Path,
) -> None:
    dtype = mx.bfloat16 if bf16 else mx.float16
    x, bias, onto = (normal(*s).astype(dtype) for s in ((rows, width), (out,), (rows, out)))
    packed = mx.quantize((normal(out, width) * 0.1).astype(dtype), group, bits)
    given = np.array(packed[0]), raw(packed[1]), raw(packed[2])
    names = ("TILES", "ROWS", "WARPS", "AHEAD")
    macros = {"BITS": bits, "GROUP": group, "BF16": bf16, "PAIRED": 0}
    macros |= dict(zip(names, shape, strict=True))
    product = OnCPU(tmp_path, macros)

    got = product(raw(x), given, raw(bias), raw(onto))

    exact = packed[0], *(part.astype(mx.float32) for part in packed[1:])
    dense = wide(mx.dequantize(*exact, group_size=group, bits=bits))
    expected = wide(x) @ dense.T + wide(bias) + wide(onto)
    step = 2.0**-8 if bf16 else 2.0**-11
    allowed = step * (np.abs(expected) + np.sqrt(width) * np.abs(dense).max())
    assert (np.abs(wide(mx.array(got).view(dtype)) - expected) < allowed).all()
    alone = product(raw(x)[-1:], given, raw(bias), raw(onto)[-1:])
    assert np.array_equal(alone[0], got[-1]), "a row depends on the others"
    bare = wide(mx.array(product(raw(x)[:1], given)).view(dtype))
    assert (np.abs(bare - wide(x)[:1] @ dense.T) < allowed[:1]).all()


@pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
@pytest.mark.parametrize(
    ("bits", "rows", "out", "tokens", "outputs"), [(4, 1, 16, 1, 1), (8, 11, 36, 2, 3)]
)
def test_the_kernel_computes_swiglu(
    bits: int, rows: int, out: int, tokens: int, outputs: int, tmp_path: Path
) -> None:
    x = normal(rows, 384).astype(mx.bfloat16)
    packed = mx.quantize((normal(2 * out, 384) * 0.1).astype(mx.bfloat16), 64, bits)
    macros = {"BITS": bits, "GROUP": 64, "BF16": 1, "PAIRED": 1}
    macros |= {"TILES": tokens, "ROWS": outputs, "WARPS": 2, "AHEAD": 1}
    given = np.array(packed[0]), raw(packed[1]), raw(packed[2])
    got = wide(mx.array(OnCPU(tmp_path, macros)(raw(x), given)).view(mx.bfloat16))
    dense = wide(mx.dequantize(*packed, group_size=64, bits=bits))
    gate, up = np.split(wide(x) @ dense.T, 2, axis=-1)
    expected = gate / (1 + np.exp(-gate)) * up
    assert got.shape == (rows, out)
    np.testing.assert_allclose(got, expected, rtol=0, atol=2.0**-6 * np.abs(expected).max())


def test_formats_the_kernel_takes() -> None:
    assert fits(896, 4, mx.bfloat16)
    assert fits(18944, 8, mx.float16)
    assert not fits(896 + 64, 4, mx.bfloat16)
    assert not fits(896, 3, mx.bfloat16)
    assert not fits(896, 4, mx.float32), "tensor cores would round to TF32"


@pytest.mark.parametrize("bits", [4, 8])
def test_tiles(bits: int) -> None:
    """Shared memory suffices without asking for more, and classes of rows have one kernel each."""
    for out, width in SHAPES:
        chosen = [tiles(rows, out, width, bits) for rows in range(1, MOST + 1)]
        for first, last in ((1, 8), (9, 16), (17, 32), (33, MOST)):
            assert len(set(chosen[first - 1 : last])) == 1
        shared = [4 * how.warps * 8 * how.tokens * (16 * how.outputs + 5) for how in chosen]
        assert max(shared) <= 48 << 10


@pytest.mark.parametrize(("out", "width"), [(37888, 3584), (3584, 18944), (896, 4864), (199, 64)])
def test_dequantised_parts_cover_the_weight(out: int, width: int) -> None:
    parts = dense_parts(out, width, 2)
    assert [part.start for part in parts[1:]] == [part.stop for part in parts[:-1]]
    assert (parts[0].start, parts[-1].stop) == (0, out)
    largest = max(part.stop - part.start for part in parts)
    assert largest * width * 2 <= DENSE_BYTES + STEP * width * 2


@pytest.mark.parametrize("rows", [3, 20])
@pytest.mark.parametrize("bits", [3, 4])
def test_products_in_parts(rows: int, bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwen2kit_mlx.cuda_products.DENSE_BYTES", 130 * 128 * 4)
    packed = mx.quantize(normal(300, 128), 64, bits)
    x, bias, onto = normal(rows, 128), normal(300), normal(rows, 300)
    got = CUDAKernels(fuse=False).affine_linear(x, packed, bits, 64, bias, onto)
    dense = wide(mx.dequantize(*packed, group_size=64, bits=bits))
    expected = wide(x) @ dense.T + wide(bias) + wide(onto)
    np.testing.assert_allclose(wide(got), expected, rtol=0, atol=1e-4)


def test_without_the_compiler_mlx_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*given: object) -> bytes:
        raise CompileError("NVRTC: no such GPU")

    monkeypatch.setattr("qwen2kit_mlx.cuda_products.cubin", fails)
    kernels = CUDAKernels(fuse=False, architecture="sm_1")
    packed = mx.quantize(normal(32, 128).astype(mx.bfloat16), 64, 4)
    kernels.expect(packed, 4, 64)
    x = normal(2, 128).astype(mx.bfloat16)
    with pytest.warns(UserWarning, match="multiplied by MLX: NVRTC: no such GPU"):
        got = kernels.affine_linear(x, packed, 4, 64)
    assert mx.array_equal(got, mx.quantized_matmul(x, *packed, group_size=64, bits=4))


def test_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks cover all rows and outputs; each kernel is compiled once."""
    launched: list[dict[str, object]] = []
    compiled: list[object] = []

    def launch(**given: object) -> list[mx.array]:
        launched.append(given)
        return [mx.zeros(given["output_shapes"][0])]  # type: ignore[index]

    def compiles(source: str, architecture: str, macros: dict[str, str]) -> bytes:
        compiled.append(macros["NAME"])
        return architecture.encode()

    monkeypatch.setattr(mx.fast, "precompiled_cuda_kernel", launch)
    monkeypatch.setattr("qwen2kit_mlx.cuda_products.cubin", compiles)
    product = PackedProduct("sm_90")
    packed = mx.quantize(normal(40, 128).astype(mx.bfloat16), 64, 4)
    for rows in (1, 8, 30):
        product(normal(rows, 128).astype(mx.bfloat16), packed, 4, 64, None, packed[1])
    product(normal(1, 128).astype(mx.bfloat16), packed, 4, 64, paired=True)
    assert [given["grid"] for given in launched] == [
        (768, 1, 1),
        (768, 1, 1),
        (512, 1, 1),
        (768, 1, 1),
    ]
    assert launched[3]["output_shapes"] == [(1, 20)]
    assert [given["scalars"] for given in launched][2] == [30, 40, 128, 0, 1]
    assert launched[0]["name"] == launched[1]["name"] != launched[2]["name"]
    assert len(compiled) == 3
    assert launched[0]["compiled_source"] == b"sm_90"


@pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
def test_a_model_on_the_kernel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Everything but the GPU: launches run on the CPU, and the model's logits stay the same."""
    ready: dict[str, OnCPU] = {}

    def compiles(source: str, architecture: str, macros: dict[str, str]) -> bytes:
        name = macros.pop("NAME")
        folder = tmp_path / name
        folder.mkdir()
        ready[name] = OnCPU(folder, {key: int(value) for key, value in macros.items()})
        return b""

    def launch(**given: object) -> list[mx.array]:
        x, packed, scales, biases, bias, onto = given["inputs"]  # type: ignore[misc]
        assert all(isinstance(scalar, int) for scalar in given["scalars"])  # type: ignore[attr-defined]
        has_bias, has_onto = given["scalars"][3:]  # type: ignore[index]
        added = raw(bias) if has_bias else None, raw(onto) if has_onto else None
        found = ready[given["name"]](  # type: ignore[index]
            raw(x),
            (np.array(packed), raw(scales), raw(biases)),
            *added,
        )
        assert [found.shape] == given["output_shapes"]
        return [mx.array(found).view(x.dtype)]

    monkeypatch.setattr(mx.fast, "precompiled_cuda_kernel", launch)
    monkeypatch.setattr("qwen2kit_mlx.cuda_products.cubin", compiles)
    spec = small_spec(
        hidden_size=128, intermediate_size=256, head_dim=32, num_hidden_layers=2, tied=False
    )
    base = random_weights(spec)
    formats = {name: (4, 64) for name in base.names() if len(base.info(name).shape) == 2}
    source = PackedSource(base, formats)

    def logits(kernels: Kernels, dtype: mx.Dtype) -> np.ndarray:
        made = MLXModel(spec, mx.Device(mx.cpu), dtype, kernels, 64)
        made.load(source)
        slots = made.slots(1, 64)
        first = slots.feed([Feed(0, 0, (5, 6, 7))]).rows([0])
        return np.concatenate([first, slots.feed([Feed(0, 3, (8,))]).rows([0])])

    exact = logits(HostKernels(), mx.float32)
    host = logits(HostKernels(), mx.bfloat16)
    ours = logits(CUDAKernels(fuse=False, architecture="none"), mx.bfloat16)
    assert len(ready) == 2
    assert np.abs(ours - exact).mean() < 1.2 * np.abs(host - exact).mean()


@pytest.mark.parametrize("bf16", [0, 1])
@pytest.mark.parametrize("bits", [4, 8])
def test_nvrtc_takes_the_source_with_every_tile(bits: int, bf16: int) -> None:
    every = {tiles(rows, *shape, bits) for rows in (1, 16, 32, 128) for shape in SHAPES}
    for how, paired in itertools.product(every, (0, 1)):
        macros = {"NAME": "product", "BITS": bits, "BF16": bf16, "GROUP": 64, "PAIRED": paired}
        macros |= {"TILES": how.tokens, "ROWS": how.outputs, "WARPS": how.warps}
        macros |= {"AHEAD": how.ahead, "BLOCKS": how.blocks}
        given = {name: str(value) for name, value in macros.items()}
        try:
            code = cubin(PRIMITIVES + PRODUCT, "sm_90", given)
        except CompileError as error:
            if "can be loaded" in str(error):
                pytest.skip(str(error))
            raise
        assert code.startswith(b"\x7fELF")
