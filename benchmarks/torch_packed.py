"""Products with weights in 4 and 8 bits on CUDA: right, and how near to the memory's speed.

    python benchmarks/torch_packed.py [--presets qwen2-7b,qwen2-0.5b,qwen2-1.5b] [--json FILE.json]

For the matrices of each preset (random codes; copies enough to pass by the L2 cache): the kernels
of a single row and those of several with tiles worth trying, then the default tiles at 1 to 64 rows
beside the vendor's product in bfloat16. Microseconds of one product, GB/s of codes and steps (of
bfloat16 weights for the vendor's), and the largest difference from the expanded matrix's product
relative to its largest value. Kernels are compiled by several processes first.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "backends")]
GROUP = 64
FLUSHED = 150e6
SINGLE = ((2, 2048, 4), (4, 2048, 4), (8, 2048, 4), (2, 512, 1), (4, 512, 1), (8, 512, 1))
SEVERAL = {
    16: ((64, 256, 4, 3), (64, 128, 4, 3), (64, 128, 4, 4), (128, 256, 4, 3)),
    64: ((64, 128, 4, 3), (64, 256, 4, 2), (128, 128, 8, 3)),
}
PROGRAMS = (264, 528, 1056)
Item = tuple[str, str, int, int, tuple[int, ...]]


def shapes(name: str) -> dict[str, tuple[int, int]]:
    """Rows and columns of every product's matrix."""
    from qwen2kit.spec.presets import preset

    spec = preset(name)
    heads = (spec.num_attention_heads + 2 * spec.num_key_value_heads) * spec.head_dim
    return {
        "gate_up": (2 * spec.intermediate_size, spec.hidden_size),
        "down": (spec.hidden_size, spec.intermediate_size),
        "heads": (heads, spec.hidden_size),
        "out": (spec.hidden_size, spec.num_attention_heads * spec.head_dim),
    }


def candidates(name: str) -> Iterator[Item]:
    """Preset, product, bits, rows and numbers of a tile."""
    for product, (height, width) in shapes(name).items():
        for bits in (4, 8):
            if product != "heads":
                for tile in SINGLE:
                    yield name, product, bits, 1, tile
            for rows, tiles in SEVERAL.items():
                for block, span, warps, stages in tiles:
                    if width % span:
                        continue
                    blocks = -(-height // block)
                    wanted = {max(1, min(p // blocks, width // span // 2, 16)) for p in PROGRAMS}
                    for splits in sorted(wanted):
                        numbers = (rows, block, span, splits, warps, stages)
                        yield name, product, bits, rows, numbers


def matrix(height: int, width: int, bits: int) -> Any:
    """Random codes."""
    import torch

    from qwen2kit_torch.quantized import Quantized

    words = (height, width * bits // 32)
    codes = torch.randint(-(1 << 31), (1 << 31) - 1, words, dtype=torch.int32, device="cuda")
    top = (1 << bits) - 1
    steps = torch.rand(height, width // GROUP, 2, device="cuda") * 0.01 + 0.005
    steps[..., 1] *= -top / 2
    return Quantized(codes, steps.bfloat16(), bits, GROUP)


class Buffers:
    """Vectors for one shape."""

    def __init__(self, height: int, width: int) -> None:
        import torch

        self.x = torch.randn(64, width, device="cuda").bfloat16()
        self.norm = torch.ones(width, device="cuda").bfloat16()
        self.out = torch.zeros(64, height, device="cuda").bfloat16()


def launch(item: Item, weights: Any, buffers: Buffers) -> None:
    """One product."""
    import triton

    from qwen2kit_torch.engine import packed_products
    from qwen2kit_torch.engine.kernels import products
    from qwen2kit_torch.engine.tuning import RowsTile

    _, product, bits, rows, tile = item
    height, width = weights.shape
    if len(tile) != 3:
        chosen = RowsTile(*tile) if tile else None
        scratch = scratches(weights, rows, chosen)
        packed_products.packed_rows(
            buffers.x[:rows], weights, buffers.out[:rows], None, scratch, chosen
        )
        return
    taken, block, warps = tile
    options = {"PDL": True, "num_warps": warps, "launch_pdl": True}
    form = (taken, block, bits, GROUP)
    if product == "gate_up":
        products.gate_up[(triton.cdiv(height // 2, taken // 2),)](
            buffers.x, buffers.norm, weights.codes, weights.steps, buffers.out, 1e-6,
            height // 2, width, *form, **options,
        )  # fmt: skip
    else:
        products.add_product[(triton.cdiv(height, taken),)](
            buffers.x, weights.codes, weights.steps, buffers.out, height, width, *form, **options
        )


SCRATCH: dict[Any, Any] = {}


def scratches(weights: Any, rows: int, tile: Any) -> Any:
    """Room for parts, shared by all products of a shape."""
    from qwen2kit_torch.engine.packed_products import scratch_for

    key = (weights.shape, weights.bits, rows, tile)
    if key not in SCRATCH:
        SCRATCH[key] = scratch_for([weights], rows, 2, tile)
    return SCRATCH[key]


def compile_part(items: list[Item]) -> list[str]:
    """Fill Triton's cache, in a process of its own."""
    errors = []
    for item in items:
        height, width = shapes(item[0])[item[1]]
        try:
            launch(item, matrix(height, width, item[2]), Buffers(height, width))
        except Exception as error:
            errors.append(f"{item}: {type(error).__name__} {' '.join(str(error).split())[:160]}")
    return errors


def captured(work: Sequence[Callable[[], Any]]) -> Callable[[], None]:
    """All of ``work`` as a graph; `torch.cuda.graph` would collect garbage every time."""
    import torch

    work[0]()
    torch.cuda.synchronize()
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.stream(side):
        graph.capture_begin()
        for call in work:
            call()
        graph.capture_end()
    return graph.replay


def microseconds(work: Sequence[Callable[[], Any]]) -> float:
    """Of one call; the best of three rounds."""
    import torch

    run = captured(work)
    times = []
    for _ in range(3):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        run()
        begin.record()
        for _ in range(4):
            run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1000 / 4 / len(work))
    return min(times)


def difference(item: Item, weights: Any, dense: Any, buffers: Buffers) -> float:
    """Largest one from the expanded matrix's product, relative to its largest value."""
    import torch

    rows = item[3]
    buffers.out.zero_()
    launch(item, weights, buffers)
    expected = buffers.x[:rows].float() @ dense.float().t()
    found = buffers.out[:rows].float()
    if rows == 1 and item[1] == "gate_up":
        x = buffers.x[0].float()
        x = (x * torch.rsqrt(x.square().mean() + 1e-6)).bfloat16().float()
        gate, up = (dense.float() @ x).chunk(2)
        expected = (torch.nn.functional.silu(gate) * up)[None]
        found = buffers.out.view(-1)[: len(gate)].float()[None]
    return float((found - expected).abs().max() / expected.abs().max())


def copies(size: int) -> int:
    """How many matrices of ``size`` bytes do not fit into the L2 cache."""
    return max(2, min(64, int(FLUSHED / size) + 1))


def measure(name: str, seconds: float, keep: Callable[[str, Any], None]) -> None:
    """All candidates of a preset, then the default tiles beside bfloat16; what fails is told."""
    import torch

    for product, (height, width) in shapes(name).items():
        buffers = Buffers(height, width)
        work: dict[str, Callable[[], dict[str, Any]]] = {
            f"{bits} bits": partial(measure_packed, name, product, bits, buffers, seconds)
            for bits in (4, 8)
        }
        work["bfloat16"] = partial(vendor, height, width, buffers)
        for form, run in work.items():
            try:
                found = run()
            except Exception as error:
                found = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
            keep(f"{name} {product} {form}", found)
        SCRATCH.clear()
        torch.cuda.empty_cache()


def measure_packed(
    name: str, product: str, bits: int, buffers: Buffers, seconds: float
) -> dict[str, Any]:
    """One matrix in ``bits``."""
    import torch

    height, width = shapes(name)[product]
    one = matrix(height, width, bits)
    size = one.codes.nbytes + one.steps.nbytes
    many = [one] + [matrix(height, width, bits) for _ in range(copies(size) - 1)]
    dense = one.dense(torch.bfloat16)
    found: dict[str, Any] = {}

    def spent(item: Item) -> list[float]:
        taken = microseconds([partial(launch, item, weights, buffers) for weights in many])
        return [round(taken, 2), round(size / taken / 1e3)]

    for rows in (1, *SEVERAL):
        lines: list[Any] = []
        wrong, end = 0.0, time.monotonic() + seconds
        for item in candidates(name):
            if item[1:4] != (product, bits, rows) or time.monotonic() > end:
                continue
            try:
                wrong = max(wrong, difference(item, one, dense, buffers))
                lines.append([*spent(item), item[4]])
            except Exception as error:
                found[f"failed {item[4]}"] = " ".join(str(error).split())[:200]
        lines.sort(key=lambda line: line[0])
        found[f"{rows} rows, tiles"] = lines[:5]
        found[f"{rows} rows, worst difference"] = wrong
    found["1 row"] = spent(default_single(name, product, bits, height, width))
    for rows in (1, 2, 4, 8, 16, 32, 64):
        found[f"{rows} rows, tensor cores"] = spent((name, product, bits, rows, ()))
    return found


def default_single(name: str, product: str, bits: int, height: int, width: int) -> Item:
    """What a step of one row takes."""
    from qwen2kit_torch.engine.tuning import packed_tile

    tile = packed_tile(height, width, bits)
    return name, product, bits, 1, (tile.rows, tile.block, tile.warps)


def vendor(height: int, width: int, buffers: Buffers) -> dict[str, Any]:
    """cuBLAS in bfloat16."""
    import torch

    size = 2 * height * width
    many = [torch.randn(height, width, device="cuda").bfloat16() for _ in range(copies(size))]
    found = {}
    for rows in (1, 2, 4, 8, 16, 32, 64):
        x, out = buffers.x[:rows], buffers.out[:rows]
        taken = microseconds([partial(torch.mm, x, each.t(), out=out) for each in many])
        found[f"{rows} rows"] = [round(taken, 2), round(size / taken / 1e3)]
    return found


def main() -> None:
    """Compile, measure, report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--presets", default="qwen2-7b,qwen2-0.5b,qwen2-1.5b")
    parser.add_argument("--processes", type=int, default=14)
    parser.add_argument("--seconds", type=float, default=80, help="for the tiles of all matrices")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    names = options.presets.split(",")
    each = options.seconds / len(names) / 4 / 2 / (1 + len(SEVERAL))
    start = time.monotonic()
    items = [item for name in names for item in candidates(name)]
    parts = [items[index :: options.processes] for index in range(options.processes)]
    with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
        errors = [error for found in pool.map(compile_part, parts, chunksize=1) for error in found]
    import torch

    print(f"{torch.cuda.get_device_name()}: {len(items)} kernels, {len(errors)} failed,")
    print(f"compiled in {time.monotonic() - start:.0f} s", *errors[:5], sep="\n", flush=True)
    report: dict[str, Any] = {"device": torch.cuda.get_device_name(), "errors": errors}

    def keep(label: str, found: Any) -> None:
        report[label] = found
        print(f"{label}:", json.dumps(found), flush=True)
        if options.json:
            options.json.write_text(json.dumps(report, indent=1) + "\n")

    for name in names:
        measure(name, each, keep)


if __name__ == "__main__":
    main()
