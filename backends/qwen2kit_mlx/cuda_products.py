"""Products with packed weights on CUDA: our own kernel for few rows, a dense product for many.

MLX 0.32 has a matrix-vector kernel for fewer than 8 rows, which leaves most of an H100's memory
bandwidth unused (140 tokens/s of a 4-bit 7B model, where reading its weights takes a quarter of
that time), and for more rows kernels that it compiles with CUTLASS when they are first needed,
for every tile size, dtype and format. Here up to `MOST` rows go through `cuda_source`, which reads
the weights once for 32 rows; more are multiplied with the dequantised weight.

Shape suffixes as in `kernels`: N rows, in and out widths.
"""

from __future__ import annotations

import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

import mlx.core as mx

from qwen2kit_mlx.cuda_compile import CompileError, cubin
from qwen2kit_mlx.cuda_source import PRIMITIVES, PRODUCT

BITS: Final = (4, 8)
DTYPES: Final = (mx.bfloat16, mx.float16)
STEP: Final = 128
"""Inputs the kernel takes at a time; their number must be a multiple."""
MOST: Final = 128
"""Rows up to which reading packed weights again and again costs less than dequantising them."""
WIDE: Final = 8192
DEEP: Final = 4096
"""Outputs from which on dividing them up keeps a GPU busy; below which it does not by far."""
FEW: Final = 8
"""Rows below which MLX's own product with packed weights is the best it has."""
DENSE_BYTES: Final = 160 << 20
"""Most that is dequantised at a time."""

Packed = tuple[mx.array, mx.array, mx.array]


@dataclass(frozen=True, slots=True)
class Tiles:
    """How a kernel divides its work; see `cuda_source`.

    Attributes:
        tokens: rows of the input per thread block, in eights.
        outputs: outputs per thread block, in sixteens.
        warps: among which the inputs are shared out.
        ahead: chunks that are loaded before any is multiplied.
        blocks: thread blocks that fit a multiprocessor at least.
    """

    tokens: int
    outputs: int
    warps: int
    ahead: int = 1
    blocks: int = 2


def tiles(rows: int, out: int, width: int, bits: int) -> Tiles:
    """What serves a product, as measured on an H200.

    Rows are treated alike in each of four classes (up to 8, 16, 32, more), so that a row's result
    depends on their number through its class only.

    Args:
        rows: N.
        out, width: of the weight.
        bits: of a number.
    """
    deep = out < DEEP and width >= 16 * STEP  # few thread blocks, with much to do for each
    if rows <= 8 and deep:
        return Tiles(tokens=1, outputs=1, warps=16)
    if rows <= 8:
        return Tiles(tokens=1, outputs=1, warps=8, ahead=bits // 4, blocks=4 if bits == 4 else 3)
    if rows <= 16 and out >= WIDE:
        return Tiles(tokens=2, outputs=2, warps=4, ahead=2, blocks=3)
    if rows <= 16:
        return Tiles(tokens=2, outputs=2, warps=16 if deep else 8, blocks=1 if deep else 2)
    if rows <= 32 and out < WIDE:
        return Tiles(tokens=4, outputs=2, warps=8, blocks=1)
    return Tiles(tokens=4, outputs=3 if rows <= 32 else 4, warps=4, blocks=1)


def fits(width: int, bits: int, dtype: mx.Dtype) -> bool:
    """Whether the kernel takes weights of ``width`` inputs in this format."""
    return bits in BITS and dtype in DTYPES and width % STEP == 0


class PackedProduct:
    """The kernel, compiled in the background when it is first asked for.

    Args:
        architecture: of the GPU, such as ``sm_90``.
    """

    def __init__(self, architecture: str) -> None:
        self._architecture = architecture
        self._compiler = ThreadPoolExecutor(max_workers=4, thread_name_prefix="nvrtc")
        self._made: dict[str, Future[bytes]] = {}
        self._broken = False

    def prepare(self, weight: Packed, bits: int, group_size: int) -> None:
        """Have the kernels for one row and this weight ready soon."""
        out, dtype = weight[0].shape[0], weight[1].dtype
        how = tiles(1, out, weight[1].shape[1] * group_size, bits)
        self._code(bits, group_size, dtype, how, paired=False)
        if out >= WIDE:  # it may be that of SwiGLU
            self._code(bits, group_size, dtype, how, paired=True)

    def __call__(
        self,
        x: mx.array,
        weight: Packed,
        bits: int,
        group_size: int,
        bias: mx.array | None = None,
        onto: mx.array | None = None,
        *,
        paired: bool = False,
        how: Tiles | None = None,
    ) -> mx.array | None:
        """``x @ w.T + bias + onto``, rounded once; None if the kernel does not compile here.

        Args:
            x: ``[N, in]``; in is a multiple of `STEP`.
            weight: values, scales and biases; see `fits`.
            bias: ``[out]``.
            onto: ``[N, out]``.
            paired: give SwiGLU ``[N, out / 2]`` of the product's first and second half.
            how: tiles; those of `tiles` if None.
        """
        rows, width = x.shape
        out = weight[0].shape[0]
        how = how or tiles(rows, out, width, bits)
        name, code = self._code(bits, group_size, x.dtype, how, paired=paired)
        binary = self._wait(code)
        if binary is None:
            return None
        given = [weight[1] if part is None else part for part in (bias, onto)]
        tile, out = (8, out // 2) if paired else (16, out)
        threads = 32 * how.warps
        (found,) = mx.fast.precompiled_cuda_kernel(
            name=name,
            compiled_source=binary,
            inputs=[x, *weight, *given],
            output_shapes=[(rows, out)],
            output_dtypes=[x.dtype],
            scalars=[rows, out, width, int(bias is not None), int(onto is not None)],
            grid=(-(-out // (tile * how.outputs)) * threads, -(-rows // (8 * how.tokens)), 1),
            threadgroup=(threads, 1, 1),
            ensure_row_contiguous=True,
        )
        return found

    def _code(
        self, bits: int, group_size: int, dtype: mx.Dtype, how: Tiles, *, paired: bool
    ) -> tuple[str, Future[bytes]]:
        macros = {
            "BITS": bits,
            "GROUP": group_size,
            "BF16": int(dtype == mx.bfloat16),
            "PAIRED": int(paired),
            "TILES": how.tokens,
            "ROWS": how.outputs,
            "WARPS": how.warps,
            "AHEAD": how.ahead,
            "BLOCKS": how.blocks,
        }
        name = "packed_product_" + "_".join(map(str, macros.values()))
        if name not in self._made:
            given = {"NAME": name} | {key: str(value) for key, value in macros.items()}
            self._made[name] = self._compiler.submit(
                cubin, PRIMITIVES + PRODUCT, self._architecture, given
            )
        return name, self._made[name]

    def _wait(self, code: Future[bytes]) -> bytes | None:
        try:
            return code.result()
        except CompileError as error:
            if not self._broken:
                warnings.warn(f"packed weights are multiplied by MLX: {error}", stacklevel=2)
            self._broken = True
            return None


def dense_parts(out: int, width: int, size: int) -> list[slice]:
    """Output rows that are dequantised together, in about equal parts of `DENSE_BYTES` at most.

    Args:
        out, width: of the weight.
        size: bytes of a number.
    """
    count = -(-out * width * size // DENSE_BYTES)
    step = -(-out // (count * STEP)) * STEP
    return [slice(start, min(start + step, out)) for start in range(0, out, step)]
