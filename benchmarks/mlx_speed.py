"""MLX inference beside mlx-lm on one device, with random weights: load, prefill, decode, batches.

    python benchmarks/mlx_speed.py --shapes qwen2-0.5b,qwen2-7b --formats bf16,4bit --output F.json

Both implementations live in one process and take turns (ours, theirs, ours, ...); ratios are
medians over pairs. Loading goes up to the first token. Both read the same directory in MLX's
layout. Batches are prompts of unequal length through our engine and mlx-lm's BatchGenerator; their
rate counts tokens after every prompt has its first. Memory is MLX's own peak, without what the
other model holds. Token ids are compared: equal in fp32, where 16-bit formats part at the first
near tie of random weights.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx

from qwen2kit import ExecutionPlan, Sampling
from qwen2kit.backend.registry import get
from qwen2kit.engine.engine import Engine
from qwen2kit.engine.request import Request
from qwen2kit.spec.hf import to_hf_config
from qwen2kit.spec.presets import preset
from qwen2kit.spec.schema import schema
from qwen2kit.weights.checkpoint import open_checkpoint

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "4bit": "bfloat16"}
GROUP, BITS, SHARD = 64, 4, 4 << 30
Step = list[tuple[int, int]]  # (which prompt, token)


def write_model(shape: str, form: str, folder: Path) -> None:
    """A directory in MLX's layout with normally distributed weights."""
    spec, dtype = preset(shape), DTYPES[form]
    config = to_hf_config(spec, dtype=dtype)
    if form == "4bit":
        config["quantization"] = {"group_size": GROUP, "bits": BITS}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    shards: list[dict[str, mx.array]] = [{}]
    where: dict[str, int] = {}
    for param in schema(spec):
        value = mx.random.normal(param.shape, dtype=getattr(mx, dtype), scale=0.02)
        if "norm" in param.name:
            value = 1 + value
        parts = {param.name: value}
        if form == "4bit" and param.quantizable:
            names = (
                f"{param.name[: -len('weight')]}{end}" for end in ("weight", "scales", "biases")
            )
            parts = dict(zip(names, mx.quantize(value, GROUP, BITS), strict=True))
        mx.eval(list(parts.values()))
        if sum(a.nbytes for a in shards[-1].values()) > SHARD:
            shards.append({})
        shards[-1] |= parts
        where |= dict.fromkeys(parts, len(shards))
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        mx.save_safetensors(str(folder / name), shard, metadata={"format": "mlx"})
    index = {"metadata": {}, "weight_map": {k: names[i - 1] for k, i in where.items()}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


class Ours:
    def __init__(self, folder: Path, form: str) -> None:
        checkpoint = open_checkpoint(folder)
        self.model = get("mlx").compile(checkpoint.spec, ExecutionPlan(dtype=DTYPES[form]))
        self.model.load(checkpoint.weights)

    def steps(self, prompts: list[list[int]], count: int) -> Iterator[Step]:
        capacity = max(map(len, prompts)) + count
        with Engine(self.model, slots=len(prompts), capacity=capacity) as engine:
            for prompt in prompts:
                engine.submit(Request(tuple(prompt), Sampling(max_new_tokens=count)))
            while engine.busy:
                yield [(event.prompt, event.token) for event in engine.step()]


class MlxLm:
    def __init__(self, folder: Path, form: str) -> None:
        from mlx_lm.utils import load_model

        self.model, _ = load_model(folder)
        del form  # the directory's own

    def steps(self, prompts: list[list[int]], count: int) -> Iterator[Step]:
        from mlx_lm.generate import BatchGenerator, generate_step

        if len(prompts) == 1:
            for token, _ in generate_step(mx.array(prompts[0]), self.model, max_tokens=count):
                yield [(0, int(token))]
            return
        batch = BatchGenerator(self.model, max_tokens=count, completion_batch_size=len(prompts))
        first = batch.insert(prompts)[0]
        while responses := batch.next_generated():
            yield [(r.uid - first, int(r.token)) for r in responses]
        batch.close()


def timed(model: Any, prompts: list[list[int]], count: int) -> dict[str, Any]:
    """Seconds until every prompt has a token, and the rate of tokens after that."""
    texts: list[list[int]] = [[] for _ in prompts]
    start, ready, late = time.perf_counter(), 0.0, 0
    for step in model.steps(prompts, count):
        for prompt, token in step:
            texts[prompt].append(token)
        if ready:
            late += len(step)
        elif all(texts):
            ready = time.perf_counter()
    rate = late / (time.perf_counter() - ready) if late else 0.0
    return {"first_s": ready - start, "decode_tps": rate, "texts": texts}


def load(kind: type, folder: Path, form: str) -> tuple[Any, float]:
    gc.collect()
    mx.clear_cache()
    mx.synchronize()
    start = time.perf_counter()
    model = kind(folder, form)
    list(model.steps([[1]], 1))
    return model, time.perf_counter() - start


def measure(folder: Path, form: str, options: argparse.Namespace) -> dict[str, Any]:
    kinds = {"ours": Ours, "mlx-lm": MlxLm}
    loads: dict[str, list[float]] = {name: [] for name in kinds}
    models: dict[str, Any] = {}
    weights: dict[str, int] = {}
    for turn in range(options.loads + 1):  # the first one warms caches
        for name, kind in kinds.items():
            models.pop(name, None)
            gc.collect()  # or the old one counts as there before
            before = mx.get_active_memory()
            models[name], seconds = load(kind, folder, form)
            weights[name] = mx.get_active_memory() - before
            if turn:
                loads[name].append(seconds)
    result: dict[str, Any] = {"load_s": loads, "weights_bytes": weights, "batches": {}}
    for size in options.batches:
        prompts = [
            [(7919 * i + 31 * row + 13) % 50_000 for i in range(options.prompt - 5 * row)]
            for row in range(size)
        ]
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in kinds}
        peaks = dict.fromkeys(kinds, 0)
        for turn in range(options.repeats + 1):
            for name, model in models.items():
                mx.clear_cache()
                mx.reset_peak_memory()
                run = timed(model, prompts, options.new)
                others = sum(weights[other] for other in kinds if other != name)
                peaks[name] = max(peaks[name], mx.get_peak_memory() - others)
                if turn:
                    runs[name].append(run)
        result["batches"][size] = compare(runs, peaks)
    return result


def compare(runs: dict[str, list[dict[str, Any]]], peaks: dict[str, int]) -> dict[str, Any]:
    pairs = list(zip(runs["ours"], runs["mlx-lm"], strict=True))
    same = sum(a == b for a, b in zip(*(pairs[0][i]["texts"] for i in (0, 1)), strict=True))
    return {
        "first_s": {name: [run["first_s"] for run in many] for name, many in runs.items()},
        "decode_tps": {name: [run["decode_tps"] for run in many] for name, many in runs.items()},
        "first_speedup": statistics.median(b["first_s"] / a["first_s"] for a, b in pairs),
        "decode_speedup": statistics.median(a["decode_tps"] / b["decode_tps"] for a, b in pairs),
        "peak_bytes": peaks,
        "same_texts": f"{same} of {len(pairs[0][0]['texts'])}",
    }


def show(shape: str, form: str, result: dict[str, Any]) -> None:
    loads = {name: statistics.median(seconds) for name, seconds in result["load_s"].items()}
    ratio = loads["mlx-lm"] / loads["ours"]
    print(f"\n{shape} {form}: load {loads['ours']:.2f} s, {ratio:.2f}x of mlx-lm")
    for size, r in result["batches"].items():
        rates = {name: statistics.median(many) for name, many in r["decode_tps"].items()}
        firsts = {name: statistics.median(many) for name, many in r["first_s"].items()}
        peaks = {name: peak / 1e9 for name, peak in r["peak_bytes"].items()}
        print(
            f"  batch {size:3}: first tokens {1e3 * firsts['ours']:8.1f} ms"
            f" {r['first_speedup']:5.2f}x   decode {rates['ours']:8.1f} tok/s"
            f" {r['decode_speedup']:5.2f}x   peak {peaks['ours']:6.2f} / {peaks['mlx-lm']:6.2f} GB"
            f"   same texts {r['same_texts']}",
            flush=True,
        )


def sizes(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default="qwen2-0.5b")
    parser.add_argument("--formats", default="bf16,4bit")
    parser.add_argument(
        "--batches", type=lambda s: [int(n) for n in s.split(",")], default=[1, 8, 32]
    )
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--loads", type=int, default=2)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    report: dict[str, Any] = {"mlx": mx.__version__, "device": str(mx.device_info()), "models": {}}
    for shape in options.shapes.split(","):
        for form in options.formats.split(","):
            with tempfile.TemporaryDirectory() as scratch:
                folder = Path(scratch) / "model"
                write_model(shape, form, folder)
                result = measure(folder, form, options)
            show(shape, form, result)
            report["models"][f"{shape} {form}"] = result
            if options.output:
                options.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
