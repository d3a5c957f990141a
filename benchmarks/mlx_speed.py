"""MLX inference beside mlx-lm on one device, with random weights: load, prefill, decode, batches.

    python benchmarks/mlx_speed.py --shapes qwen2-0.5b,qwen2-7b --formats bf16,4bit --output F.json

Each implementation has a process of its own, and they take turns (ours, theirs, ours, ...); ratios
are medians over pairs. A run that takes longer than ``--limit`` seconds ends its process, is noted,
and leaves the other one's figures; the report is written after every batch size. The first run of
each kind is not counted: both compile kernels in it, and its time is reported as ``warm_up_s``.
Loading goes up to the first token. Both read the same directory in MLX's layout. Batches are
prompts of unequal length through our engine and mlx-lm's BatchGenerator; their rate counts tokens
after every prompt has its first. Memory is MLX's own peak. Token ids are compared: equal in fp32,
where 16-bit formats part at the first near tie of random weights. In fp32 both run with
MLX_ENABLE_TF32=0, as ours does anyway: MLX's CUDA build would round products to TF32.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
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
ENVIRONMENT = {"fp32": {"MLX_ENABLE_TF32": "0"}}  # MLX reads it at its first product
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
    """Seconds until every prompt has a token, the rate of tokens after that, and peak memory."""
    mx.clear_cache()
    mx.reset_peak_memory()
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
    peak = mx.get_peak_memory()
    return {"first_s": ready - start, "decode_tps": rate, "texts": texts, "peak_bytes": peak}


KINDS: dict[str, type] = {"ours": Ours, "mlx-lm": MlxLm}


def serve(name: str, folder: Path, form: str, pipe: Connection) -> None:
    """One implementation's process: loads and runs when told to."""
    os.environ.update(ENVIRONMENT.get(form, {}))
    model: Any = None
    while True:
        task = pipe.recv()
        try:
            if task == "load":
                model = None
                model, found = load(KINDS[name], folder, form)
                pipe.send(found)
            else:
                pipe.send(timed(model, *task))
        except Exception as error:
            pipe.send({"error": f"{type(error).__name__}: {error}"})


def load(kind: type, folder: Path, form: str) -> tuple[Any, dict[str, Any]]:
    gc.collect()
    mx.clear_cache()
    mx.synchronize()
    start = time.perf_counter()
    model = kind(folder, form)
    list(model.steps([[1]], 1))
    seconds = time.perf_counter() - start
    gc.collect()
    return model, {"load_s": seconds, "weights_bytes": mx.get_active_memory()}


class Side:
    """An implementation in its process.

    Args:
        name: a key of `KINDS`.
        folder, form: what it loads.
        limit: seconds a task may take.
    """

    def __init__(self, name: str, folder: Path, form: str, limit: float) -> None:
        self.name, self._given, self._limit = name, (name, folder, form), limit
        self._process: Any = None
        self.weights = 0

    def ask(self, task: Any) -> dict[str, Any] | None:
        """The task's result; None if it failed or took too long, which ends the process."""
        if self._process is None:
            context = multiprocessing.get_context("spawn")
            self._pipe, theirs = context.Pipe()
            self._process = context.Process(target=serve, args=(*self._given, theirs), daemon=True)
            self._process.start()
            theirs.close()
            if task != "load" and self.ask("load") is None:
                return None
        try:
            self._pipe.send(task)
            if self._pipe.poll(self._limit):
                found: dict[str, Any] = self._pipe.recv()
                self.weights = found.get("weights_bytes", self.weights)
                if "error" not in found:
                    return found
                print(f"  {self.name}: {found['error'][:300]}", flush=True)
        except (EOFError, OSError):
            print(f"  {self.name}: its process ended", flush=True)
        self._process.kill()
        self._process.join()
        self._process = None
        return None

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.join()


def take_turns(sides: list[Side], task: Any, turns: int, what: str) -> dict[str, list[Any]]:
    """Results of each side: a warm-up, then ``turns`` more, in turns; none of a side that
    failed."""
    runs: dict[str, list[Any]] = {side.name: [] for side in sides}
    going = list(sides)
    for turn in range(turns + 1):
        for side in list(going):
            start = time.perf_counter()
            found = side.ask(task)
            if found is None:
                going.remove(side)
                print(f"  {what}: {side.name} gave nothing", flush=True)
                continue
            if not turn:
                found["warm_up_s"] = time.perf_counter() - start
            runs[side.name].append(found)
    return runs


def measure(folder: Path, form: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The result so far: after loading, and after every batch size."""
    sides = [Side(name, folder, form, options.limit) for name in KINDS]
    loads = take_turns(sides, "load", options.loads, "load")
    result: dict[str, Any] = {
        "environment": ENVIRONMENT.get(form, {}),
        "load_s": {name: [run["load_s"] for run in runs[1:]] for name, runs in loads.items()},
        "weights_bytes": {side.name: side.weights for side in sides},
        "batches": {},
    }
    yield result
    vocab = min(50_000, open_checkpoint(folder).spec.vocab_size)
    for size in options.batches:
        prompts = [
            [(7919 * i + 31 * row + 13) % vocab for i in range(options.prompt - 5 * row)]
            for row in range(size)
        ]
        task = prompts, options.new
        result["batches"][size] = compare(take_turns(sides, task, options.repeats, f"batch {size}"))
        yield result
    for side in sides:
        side.close()


def compare(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    counted = {name: many[1:] for name, many in runs.items() if many}
    report: dict[str, Any] = {
        "warm_up_s": {name: many[0]["warm_up_s"] for name, many in runs.items() if many},
        "first_s": {name: [run["first_s"] for run in many] for name, many in counted.items()},
        "decode_tps": {name: [run["decode_tps"] for run in many] for name, many in counted.items()},
        "peak_bytes": {
            name: max(run["peak_bytes"] for run in many) for name, many in runs.items() if many
        },
    }
    pairs = list(zip(*(counted.get(name, []) for name in KINDS), strict=False))
    if pairs:
        same = sum(a == b for a, b in zip(*(run["texts"] for run in pairs[0]), strict=True))
        rates = [a["decode_tps"] / b["decode_tps"] for a, b in pairs if b["decode_tps"]]
        report["first_speedup"] = statistics.median(b["first_s"] / a["first_s"] for a, b in pairs)
        report["decode_speedup"] = statistics.median(rates) if rates else None
        report["same_texts"] = f"{same} of {len(pairs[0][0]['texts'])}"
    return report


def middle(figures: dict[str, list[float]], name: str) -> float:
    return statistics.median(figures.get(name) or [float("nan")])


def show(shape: str, form: str, result: dict[str, Any]) -> None:
    """The newest part of a result."""
    if not result["batches"]:
        ours, theirs = (middle(result["load_s"], name) for name in KINDS)
        sizes = " / ".join(f"{n / 1e9:.2f}" for n in result["weights_bytes"].values())
        print(f"\n{shape} {form}: load {ours:.2f} s, {theirs / ours:.2f}x of mlx-lm", end="")
        print(f"   weights {sizes} GB", flush=True)
        return
    size, r = list(result["batches"].items())[-1]
    first, rate = (middle(r[key], "ours") for key in ("first_s", "decode_tps"))
    line = f"  batch {size:3}: first tokens {1e3 * first:8.1f} ms"
    line += f" {r.get('first_speedup') or float('nan'):5.2f}x   decode {rate:8.1f} tok/s"
    line += f" {r.get('decode_speedup') or float('nan'):5.2f}x   peak "
    line += " / ".join(f"{r['peak_bytes'].get(name, 0) / 1e9:6.2f}" for name in KINDS)
    line += " GB   warm-up " + " / ".join(
        f"{r['warm_up_s'].get(name, float('nan')):.1f}" for name in KINDS
    )
    print(f"{line} s   same texts {r.get('same_texts', 'not compared')}", flush=True)


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
    parser.add_argument("--limit", type=float, default=120, help="seconds a run may take")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    report: dict[str, Any] = {"mlx": mx.__version__, "device": str(mx.device_info()), "models": {}}
    for shape in options.shapes.split(","):
        for form in options.formats.split(","):
            with tempfile.TemporaryDirectory() as scratch:
                folder = Path(scratch) / "model"
                write = multiprocessing.get_context("spawn").Process(
                    target=write_model, args=(shape, form, folder)
                )
                write.start()
                write.join()
                if write.exitcode:
                    print(f"{shape} {form}: its weights could not be written", flush=True)
                    continue
                for result in measure(folder, form, options):
                    show(shape, form, result)
                    report["models"][f"{shape} {form}"] = result
                    if options.output:
                        options.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
