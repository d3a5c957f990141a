"""Where the time of a decoding step goes on CUDA, and whether its kernels are right.

    python benchmarks/torch_decode.py --presets qwen2-0.5b,qwen2-1.5b,qwen2-7b --json out.json

Weights are random; nothing is downloaded. For every preset: the largest difference between the
captured step and the plain network (a model of two layers), each product kernel alone over several
layers with a few tiles (microseconds, GB/s of weights), attention alone at several lengths, passes
over prompts, whole steps, and whole decoding through `Slots`; with ``packed`` among the sections,
the same with weights in 4 and 8 bits. Sections that fail are reported and do not stop the others;
the JSON file is written with every figure.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "backends")]
PRODUCTS = ("heads", "out", "gate_up", "down", "head")
PROMPT_TILES = (
    (128, 64, 8, 2), (128, 64, 8, 3), (128, 128, 8, 2), (64, 64, 4, 2), (64, 64, 4, 3),
    (128, 64, 4, 2),
)  # fmt: skip
RESULTS: dict[str, Any] = {}
FILES: list[Path] = []


class Figures(dict[str, Any]):
    """What a section has found; the JSON file is written with every figure."""

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(name, value)
        for path in FILES:
            path.write_text(json.dumps(RESULTS, indent=1, default=str) + "\n")


def section(name: str, work: Callable[[Figures], None]) -> Figures | None:
    """Let ``work`` fill in figures; print and keep them, and its traceback if it fails."""
    start = time.perf_counter()
    found = RESULTS[name] = Figures()
    try:
        work(found)
    except Exception:
        found["error"] = traceback.format_exc()
        print(f"## {name} FAILED\n{found['error']}", flush=True)
    else:
        print(f"## {name} ({time.perf_counter() - start:.1f} s)", flush=True)
    print(json.dumps(found, indent=None, default=str), flush=True)
    return None if "error" in found else found


def copy_bandwidth(found: Figures) -> None:
    """GB/s of a device-to-device copy, reads and writes counted."""
    import torch

    source = torch.empty(1 << 32, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    seconds = timed(lambda: target.copy_(source), 5)
    found["copy_GB_s"] = 2 * source.nbytes / seconds / 1e9


def timed(work: Callable[[], Any], repeats: int) -> float:
    """Seconds of one call, on the device; the best of three rounds."""
    import torch

    best = float("inf")
    for _ in range(3):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        work()
        begin.record()
        for _ in range(repeats):
            work()
        end.record()
        end.synchronize()
        best = min(best, begin.elapsed_time(end) / 1000 / repeats)
    return best


def captured(work: Callable[[], Any]) -> Callable[[], None]:
    """``work`` as a graph, run once before."""
    import torch

    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def build(
    name: str, *, layers: int | None = None, dtype: str = "bfloat16", bits: int | None = None
) -> Any:
    """A `TorchModel` with random weights on the device, the layers' in ``bits`` if given."""
    import torch

    from qwen2kit.backend.plan import ExecutionPlan
    from qwen2kit.spec.presets import preset
    from qwen2kit_torch.compiled import TorchModel
    from qwen2kit_torch.model import Qwen2

    spec = preset(name)
    if layers is not None:
        window = replace(spec.window, max_window_layers=layers)
        spec = replace(spec, num_hidden_layers=layers, window=window)
    model = TorchModel(spec, ExecutionPlan(device="cuda", dtype=dtype))
    model.module = Qwen2(spec, device="cuda", dtype=getattr(torch, dtype)).requires_grad_(False)
    torch.manual_seed(0)
    for path, parameter in model.module.named_parameters():
        parameter.normal_(1.0 if "norm" in path else 0.0, 0.02)
    if bits is not None:
        pack(model.module, bits)
    return model


def pack(module: Any, bits: int) -> None:
    """Quantise the layers' matrices in place, one at a time."""
    from qwen2kit_torch.linear import Linear
    from qwen2kit_torch.quantized import QuantizedLinear, divides, quantize

    for owner in list(module.model.layers.modules()):
        for name, child in list(owner.named_children()):
            if isinstance(child, Linear) and divides(child.in_features, 64):
                layer = QuantizedLinear(child, bits=bits, group=64)
                layer.fill(quantize(child.weight, bits=bits, group=64))
                setattr(owner, name, layer)


def make_step(
    model: Any, rows: int, capacity: int, *, early: bool, tiling: Any = None, joined: Any = None
) -> Any:
    """A `Step` on one slot per row."""
    import torch

    from qwen2kit_torch.engine.joined import join
    from qwen2kit_torch.engine.step import Step
    from qwen2kit_torch.engine.storage import Storage

    dtype = model.module.model.norm.weight.dtype
    device = torch.device("cuda", 0)
    storage = Storage(model.spec, count=rows, capacity=capacity, device=device, dtype=dtype)
    for keys, values in storage.layers:
        keys.normal_()
        values.normal_()
    rope = model.module.rotary.tables(capacity, device, dtype)
    joined = joined or join(model.module)
    return Step(model.spec, joined, storage, rows, rope, early=early, tiling=tiling)


def place(step: Any, position: int) -> None:
    """Every row at ``position`` of its own slot."""
    import torch

    rows = step.rows.shape[1]
    step.rows[0] = 1
    step.rows[1] = torch.arange(rows, device="cuda", dtype=torch.int32)
    step.rows[2] = position
    step.limit.fill_(step.logits.shape[1])


def check(found: Figures, name: str) -> None:
    """Largest differences from the plain network, and whether two runs are equal."""
    import torch

    from qwen2kit.backend.slots import Feed

    tokens = torch.randint(0, 150_000, (400,), generator=torch.Generator().manual_seed(1)).tolist()
    for dtype in ("float32", "bfloat16"):
        model = build(name, layers=2, dtype=dtype)
        expected = torch.from_numpy(model.logits(tokens))
        slots = model.slots(3, 400)
        differences = []
        for rows in (1, 1, 3, 16, 77):
            slots.feed([Feed(1, 0, tuple(tokens[:300]))])
            feed = Feed(1, 300, tuple(tokens[300 : 300 + rows]), rows)
            actual = torch.from_numpy(slots.feed([feed]).rows(range(rows)))
            differences.append(float((actual - expected[300 : 300 + rows]).abs().max()))
        found[dtype] = {"largest": float(expected.abs().max()), "differences": differences}
        runs = []
        for _ in range(2):
            slots.feed([Feed(1, 0, tuple(tokens[:300]))])
            ahead = slots.run_greedy([Feed(1, 300, (tokens[300],))], None)
            runs.append([ids[0] for ids in ahead])
        plain = list(tokens[:301])
        slots.feed([Feed(1, 0, tuple(tokens[:300]))])
        for _ in range(len(runs[0])):
            plain.append(slots.feed([Feed(1, len(plain) - 1, (plain[-1],))]).greedy(None)[0])
        found[dtype] |= {"steps": len(runs[0]), "repeatable": runs[0] == runs[1]}
        found[dtype]["step_by_step_equal"] = plain[301:] == runs[0]
        uncached = [int(x) for x in model.logits(plain[:-1])[300:].argmax(-1)]
        found[dtype]["equal_to_uncached"] = sum(
            a == b for a, b in zip(uncached, runs[0], strict=True)
        )
        slots.close()
        del model, slots
        torch.cuda.empty_cache()


def candidates(product: str, width: int, rows_total: int) -> Iterator[Any]:
    """Tiles worth trying for a matrix of ``width`` columns."""
    from qwen2kit_torch.engine.tuning import Tile, power_of_two

    for rows in (2, 4, 8, 16):
        for block in (256, 512, 1024, 2048, 4096):
            for warps in (2, 4, 8):
                each = rows * block // (warps * 32)
                waste = -(-width // block) * block / width
                if not 32 <= each <= 64 or block > power_of_two(width) or waste > 1.34:
                    continue
                if block < 1024 and block < width and warps == 8:
                    continue
                if rows_total // rows < 100 or (product in ("heads", "head") and rows < 4):
                    continue
                for repeat in (2, 6) if product == "head" else (1,):
                    yield Tile(rows, block, warps, repeat)


def widths(spec: Any) -> dict[str, tuple[int, int]]:
    """Columns and rows of every product's matrix."""
    size = spec.head_dim
    heads = (spec.num_attention_heads + 2 * spec.num_key_value_heads) * size
    return {
        "heads": (spec.hidden_size, heads),
        "out": (spec.num_attention_heads * size, spec.hidden_size),
        "gate_up": (spec.hidden_size, 2 * spec.intermediate_size),
        "down": (spec.intermediate_size, spec.hidden_size),
        "head": (spec.hidden_size, spec.vocab_size),
    }


def launch(step: Any, product: str, index: int) -> None:
    """One product of layer ``index``."""
    layer = step._weights.layers[index]
    if product == "heads":
        step.project_heads(index)
    elif product == "out":
        step.add_out(layer)
    elif product == "gate_up":
        step.gate_up(layer)
    elif product == "attention":
        step.attend(index, step._queries, step._mixed)
    elif product == "down":
        step.add_down(layer)
    else:
        step.single_head()


def launch_all(step: Any, product: str, count: int) -> None:
    """One product of the first ``count`` layers."""
    for index in range(count):
        launch(step, product, index)


def default_tiles(spec: Any) -> Any:
    """The tiles that `Step` takes by itself."""
    from qwen2kit_torch.engine.tuning import tiles

    width = spec.num_attention_heads * spec.head_dim
    return tiles(spec.hidden_size, width, spec.intermediate_size, 2)


def with_keys(spec: Any, keys: int, warps: int, spread: int) -> Any:
    """The tiles that `Step` takes by itself, those of attention aside."""
    from qwen2kit_torch.engine.tuning import KeysTile

    return replace(default_tiles(spec), keys=KeysTile(keys, warps, spread))


def with_tile(model: Any, joined: Any, product: str, tile: Any) -> Any:
    """A step for one row whose ``product`` uses ``tile``."""
    tiling = replace(default_tiles(model.spec), **{product: tile})
    return make_step(model, 1, 1024, early=True, tiling=tiling, joined=joined)


@cache
def one_layer(name: str) -> tuple[Any, Any]:
    """A model of one layer and its joined weights, once per process."""
    from qwen2kit_torch.engine.joined import join

    model = build(name, layers=1)
    return model, join(model.module)


def compile_ahead(work: tuple[str, str, int, int, int, int]) -> None:
    """Compile one candidate into Triton's cache, in a process of its own."""
    name, product, *numbers = work
    try:
        from qwen2kit_torch.engine.tuning import Tile

        model, joined = one_layer(name)
        step = with_tile(model, joined, product, Tile(*numbers))
        place(step, 1)
        launch(step, product, 0)
    except Exception:
        print(f"{work}: {traceback.format_exc(limit=1)}", flush=True)


def compile_all(names: list[str], processes: int, found: Figures) -> None:
    """Fill Triton's cache from several processes."""
    from qwen2kit.spec.presets import preset

    work = [
        (name, product, tile.rows, tile.block, tile.warps, tile.repeat)
        for name in names
        for product, (width, rows) in widths(preset(name)).items()
        for tile in candidates(product, width, rows)
    ]
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        pool.map(compile_ahead, work, chunksize=1)
    found["kernels"] = len(work)


def tune(found: Figures, name: str) -> None:
    """Microseconds and GB/s of every candidate; the fastest of each product."""
    import torch

    from qwen2kit_torch.engine.joined import join

    model = build(name, layers={"qwen2-0.5b": 96, "qwen2-1.5b": 40}.get(name, 4))
    joined = join(model.module)
    for product, (width, rows) in widths(model.spec).items():
        count = 1 if product == "head" else len(joined.layers)
        lines = []
        for tile in candidates(product, width, rows):
            try:
                step = with_tile(model, joined, product, tile)
                place(step, 500)
                run = captured(partial(launch_all, step, product, count))
                seconds = timed(run, 3 if count > 1 else 5) / count
            except Exception as error:
                lines.append((1e9, str(error)[:80], tile))
                continue
            lines.append((round(seconds * 1e6, 2), round(2 * width * rows / seconds / 1e9), tile))
            del step, run
        lines.sort(key=lambda line: line[0])
        found[product] = [
            [us, rate, [t.rows, t.block, t.warps, t.repeat]] for us, rate, t in lines[:6]
        ]
    del model, joined
    torch.cuda.empty_cache()


def key_tiles() -> Iterator[tuple[int, int, int]]:
    """Keys at once, warps and spread worth trying in attention."""
    for keys, warps in ((32, 4), (64, 4), (64, 8), (128, 8)):
        for spread in (1, 2, 4, 8):
            yield keys, warps, spread


def compile_attention(work: tuple[str, int, int, int]) -> None:
    """As `compile_ahead`, for attention."""
    name, keys, warps, spread = work
    try:
        model, joined = one_layer(name)
        for rows in (1, 16):
            tiling = with_keys(model.spec, keys, warps, spread)
            step = make_step(model, rows, 16392, early=True, tiling=tiling, joined=joined)
            place(step, 1)
            launch(step, "attention", 0)
    except Exception:
        print(f"{work}: {traceback.format_exc(limit=1)}", flush=True)


def compile_prompt(work: tuple[str, int]) -> None:
    """As `compile_ahead`, for attention over prompts."""
    from qwen2kit_torch.engine.pieces import Piece
    from qwen2kit_torch.engine.tuning import PromptTile

    name, number = work
    try:
        model, joined = one_layer(name)
        storage = make_step(model, 1, 1024, early=False, joined=joined)._storage
        rope = model.module.rotary.tables(1024, joined.norm.device, joined.norm.dtype)
        tile = PromptTile(*PROMPT_TILES[number])
        prompt_pass(model.spec, joined, storage, rope, [Piece(0, 0, (1,) * 64, 1)], tile).run()
    except Exception:
        print(f"{work}: {traceback.format_exc(limit=1)}", flush=True)


def compile_more(names: list[str], processes: int, wanted: list[str], found: Figures) -> None:
    """Fill Triton's cache with attention's kernels from several processes."""
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        if "attention" in wanted:
            work = [(name, *tile) for name in names for tile in key_tiles()]
            pool.map(compile_attention, work, chunksize=1)
        if "prompts" in wanted:
            pool.map(
                compile_prompt,
                [(name, number) for name in names for number in range(len(PROMPT_TILES))],
                chunksize=1,
            )


def attention(found: Figures, name: str) -> None:
    """Microseconds of attention alone: keys at once, warps, spread by rows and length."""
    import torch

    from qwen2kit_torch.engine.joined import join

    model = build(name, layers=24 if name == "qwen2-0.5b" else 6)
    joined = join(model.module)
    for rows, lengths in ((1, (512, 4096, 16384)), (16, (512, 2048))):
        for keys, warps, spread in key_tiles():
            tiling = with_keys(model.spec, keys, warps, spread)
            step = make_step(model, rows, 16392, early=True, tiling=tiling, joined=joined)
            place(step, 0)
            run = captured(partial(launch_all, step, "attention", len(joined.layers)))
            times = []
            for length in lengths:
                place(step, length)
                times.append(round(timed(run, 3) / len(joined.layers) * 1e6, 2))
            found[f"{rows} rows, {keys} keys, {warps} warps, spread {spread}"] = times
            del step, run
            torch.cuda.empty_cache()


def prompts(found: Figures, name: str) -> None:
    """Milliseconds of whole passes over prompts, and microseconds of their attention alone."""
    import torch

    from qwen2kit_torch.engine.joined import join
    from qwen2kit_torch.engine.pieces import Piece
    from qwen2kit_torch.engine.storage import Storage
    from qwen2kit_torch.engine.tuning import PromptTile

    model = build(name)
    spec, joined = model.spec, join(model.module)
    storage = Storage(
        spec, count=8, capacity=10240, device=torch.device("cuda", 0), dtype=torch.bfloat16
    )
    for keys, values in storage.layers:
        keys.normal_()
        values.normal_()
    rope = model.module.rotary.tables(10240, torch.device("cuda", 0), torch.bfloat16)
    cases = {
        "128": [Piece(0, 0, (1,) * 128, 1)],
        "512": [Piece(0, 0, (1,) * 512, 1)],
        "2048": [Piece(0, 0, (1,) * 2048, 1)],
        "8 of 256": [Piece(slot, 0, (1,) * 256, 1) for slot in range(8)],
        "2048 after 8192": [Piece(0, 8192, (1,) * 2048, 1)],
    }
    for label, pieces in cases.items():
        run = partial(new_pass, spec, joined, storage, rope, pieces)
        run()
        torch.cuda.synchronize()
        times = []
        for _ in range(3):
            start = time.perf_counter()
            run()
            issued = time.perf_counter() - start
            torch.cuda.synchronize()
            times.append((time.perf_counter() - start, issued))
        found[label] = {"ms": round(min(times)[0] * 1e3, 2), "host": round(min(times)[1] * 1e3, 2)}
        work = prompt_pass(spec, joined, storage, rope, pieces)
        found[label]["captured"] = round(timed(captured(work.run), 5) * 1e3, 2)
    for tile in (PromptTile(*numbers) for numbers in PROMPT_TILES):
        times = []
        for pieces in (cases["2048"], cases["2048 after 8192"]):
            try:
                work = prompt_pass(spec, joined, storage, rope, pieces, tile)
                run = partial(work._attend, 0, work._queries, work._mixed)
                times.append(round(timed(run, 5) * 1e6, 1))
            except Exception as error:
                times.append(str(error)[:60])
        found[f"attention {tile}"] = times
    found["kernels, 2048"] = profile(partial(new_pass, spec, joined, storage, rope, cases["2048"]))


def prompt_pass(
    spec: Any, joined: Any, storage: Any, rope: Any, pieces: Any, tile: Any = None
) -> Any:
    """A pass over ``pieces``, ready to run."""
    import torch

    from qwen2kit_torch.engine.prompts import PassSize, PromptPass

    size = PassSize(sum(len(piece.tokens) for piece in pieces), len(pieces), 0, len(pieces))
    with torch.inference_mode():
        work = PromptPass(spec, joined, storage, rope, size, tile=tile)
        work.set(pieces)
    return work


def new_pass(*arguments: Any) -> None:
    """Make a pass and run it."""
    import torch

    with torch.inference_mode():
        prompt_pass(*arguments).run()


def whole(found: Figures, name: str, tuned: dict[str, Any] | None, bits: int | None = None) -> None:
    """Microseconds of whole steps by graph replay; where a step's time goes; tokens a second."""
    import torch

    from qwen2kit.backend.slots import Feed
    from qwen2kit_torch.engine.joined import join
    from qwen2kit_torch.engine.tuning import Tile

    model = build(name, bits=bits)
    spec, joined = model.spec, join(model.module)
    weights = sum(p.nbytes for p in model.module.parameters())
    weights -= 0 if spec.tie_word_embeddings else joined.embedding.nbytes
    found["weight_GB"], found["roof_us_at_3TB_s"] = weights / 1e9, weights / 3e6
    default = default_tiles(spec) if bits is None else None
    fastest = default
    if tuned:
        fastest = replace(default_tiles(spec), **{key: Tile(*tuned[key][0][2]) for key in PRODUCTS})
    cases = [("default", default, True), ("default, one after the other", default, False)]
    if tuned:
        cases.append(("fastest", fastest, True))
    for label, tiling, early in cases:
        step = make_step(model, 1, 1024, early=early, tiling=tiling, joined=joined)
        place(step, 0)
        run = captured(step.run)
        place(step, 512)
        found[f"1 row, {label}"] = round(timed(run, 20) * 1e6, 1)
        if label == "default":
            found["kernels"] = profile(run)
        del step, run
    for rows in (2, 4, 8, 16, 32, 64):
        step = make_step(model, rows, 1024, early=True, joined=joined)
        place(step, 0)
        run = captured(step.run)
        place(step, 512)
        found[f"{rows} rows"] = round(timed(run, 5) * 1e6, 1)
        if rows == 8:
            found["kernels, 8 rows"] = profile(run)
        del step, run
    model._joined = joined
    slots = model.slots(1, 1024)
    for repeat in range(2):
        torch.cuda.synchronize()
        start = time.perf_counter()
        first = slots.feed([Feed(0, 0, tuple(range(1, 513)))]).greedy(None)[0]
        found[f"prefill of 512, ms ({repeat})"] = round((time.perf_counter() - start) * 1e3, 2)
        ahead = slots.run_greedy([Feed(0, 512, (first,))], None)
        next(ahead)
        start = time.perf_counter()
        for _ in range(400):
            next(ahead)
        found[f"us a token through slots ({repeat})"] = round(
            (time.perf_counter() - start) / 400 * 1e6, 1
        )
        ahead.close()
    start = time.perf_counter()
    for position in range(512, 562):
        slots.feed([Feed(0, position, (5,))]).greedy(None)
    found["us a token, each fed alone"] = round((time.perf_counter() - start) / 50 * 1e6, 1)
    del model, joined, slots
    torch.cuda.empty_cache()


def profile(run: Callable[[], None]) -> dict[str, Any]:
    """Mean microseconds and launches of every kernel in one replay; not every machine lets look."""
    import torch

    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as recorded:
            for _ in range(3):
                run()
            torch.cuda.synchronize()
    except Exception as error:  # The times are known by now.
        return {"error": f"{type(error).__name__}: {error}"}
    rows = sorted(recorded.key_averages(), key=lambda row: -row.device_time_total)
    return {
        row.key[:60]: [round(row.device_time_total / row.count, 2), row.count // 3]
        for row in rows[:14]
    }


def measure(name: str, wanted: list[str]) -> None:
    """The sections of one preset."""
    work = {"check": check, "tune": tune, "attention": attention, "prompts": prompts}
    found = {
        key: section(f"{name} {key}", partial(run, name=name))
        for key, run in work.items()
        if key in wanted
    }
    if "whole" in wanted:
        section(f"{name} whole", partial(whole, name=name, tuned=found.get("tune")))
    for bits in (4, 8) if "packed" in wanted else ():
        section(f"{name} whole, {bits} bits", partial(whole, name=name, tuned=None, bits=bits))


def main() -> None:
    """Run the sections asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--presets", default="qwen2-0.5b,qwen2-1.5b,qwen2-7b")
    parser.add_argument("--sections", default="check,tune,attention,prompts,whole")
    parser.add_argument("--processes", type=int, default=12)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    names = arguments.presets.split(",")
    wanted = arguments.sections.split(",")
    FILES.extend([arguments.json] if arguments.json else [])
    import torch

    print(torch.__version__, torch.cuda.get_device_name(), flush=True)
    section("copy", copy_bandwidth)
    if "tune" in wanted:
        section("compile", partial(compile_all, names, arguments.processes))
    if "attention" in wanted or "prompts" in wanted:
        section("compile attention", partial(compile_more, names, arguments.processes, wanted))
    for name in names:
        measure(name, wanted)


if __name__ == "__main__":
    main()
