"""Memory and time that ``qwen2kit plan`` predicts, beside what training takes on this machine.

    python benchmarks/plan_accuracy.py [--output FILE.json] [--timing] [--processes N] [--list]

Every configuration is trained for a few steps on random tokens through the public training API
in a process of its own. Several run at a time where the predicted memory allows it; with
``--timing`` they run one by one and the later steps are timed. ``--processes N`` measures layouts
of N GPUs instead, ``--large`` configurations for one GPU of over 130 GiB. ``--list`` only predicts
and needs no GPU. Weights are constants: memory and time do not depend on them.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import contest

from qwen2kit.backend.plan import ExecutionPlan, LoRAPlan, TrainPlan
from qwen2kit.config.tree import AdapterConfig
from qwen2kit.plan.communication import Cluster
from qwen2kit.plan.degrees import Degrees
from qwen2kit.plan.hardware import find_hardware
from qwen2kit.plan.memory import CONTEXT, predict
from qwen2kit.plan.time import predict as predict_time
from qwen2kit.plan.workload import Workload
from qwen2kit.spec.presets import preset

GIB = 2**30
STEPS = 2
TIMED_STEPS = 5
LIMIT = 180.0  # seconds for one configuration
SPARE = 1.15  # predictions are what is being tested


@dataclass(frozen=True)
class Case:
    """One configuration; ``batch_rows`` are those of each data parallel process."""

    model: str
    seq_len: int
    rows: int
    recompute: str = "none"
    batch_rows: int | None = None
    adapter: str | None = None
    degrees: dict[str, int] = field(default_factory=dict)

    @property
    def name(self) -> str:
        parts = [self.model, f"{self.rows}x{self.seq_len}", self.recompute]
        if self.batch_rows is not None:
            parts.append(f"batch {self.batch_rows}")
        parts += [self.adapter] if self.adapter else []
        parts += [f"{axis}={size}" for axis, size in self.degrees.items() if size > 1]
        return " ".join(parts)

    def workload(self) -> Workload:
        degrees = Degrees(**self.degrees)
        adapter = None
        if self.adapter is not None:
            quantize: Any = "nf4" if self.adapter == "qlora" else "none"
            adapter = LoRAPlan(
                rank=16, alpha=32.0, targets=AdapterConfig().targets, quantize=quantize
            )
        plan = TrainPlan(
            micro_batch_rows=self.rows,
            recompute=self.recompute,  # type: ignore[arg-type]
            adapter=adapter,
            parallel=degrees,
        )
        return Workload(
            spec=preset(self.model),
            plan=plan,
            seq_len=self.seq_len,
            batch_rows=(self.batch_rows or self.rows) * degrees.data,
        )


SINGLE = (
    Case("qwen2-0.5b", 2048, 1),
    Case("qwen2-0.5b", 2048, 8),
    Case("qwen2-0.5b", 4096, 4, batch_rows=8),
    Case("qwen2-0.5b", 8192, 1),
    Case("qwen2-0.5b", 4096, 4, "selective"),
    Case("qwen2-0.5b", 4096, 8, "full"),
    Case("qwen2-0.5b", 8192, 4, "full", batch_rows=8),
    Case("qwen2-1.5b", 2048, 2),
    Case("qwen2-1.5b", 2048, 4, batch_rows=8),
    Case("qwen2-1.5b", 4096, 4, "selective"),
    Case("qwen2-1.5b", 8192, 2, "full"),
    Case("qwen2-1.5b", 2048, 4, adapter="lora"),
    Case("qwen2-1.5b", 4096, 4, "full", adapter="lora"),
    Case("qwen2-1.5b", 2048, 4, "full", adapter="qlora"),
)

LARGE = (
    Case("qwen2-0.5b", 4096, 16),
    Case("qwen2-1.5b", 4096, 8),
    Case("qwen2-7b", 4096, 4, adapter="lora"),
    Case("qwen2-7b", 4096, 4, "full", adapter="qlora"),
    Case("qwen2-7b", 4096, 2, "full"),
)
"""For one GPU of over 130 GiB."""


def layouts(processes: int) -> tuple[Case, ...]:
    """FSDP, HSDP, tensor, context and pipeline parallelism over all processes."""
    half = processes // 2
    meshes: list[tuple[int, str, dict[str, int]]] = [
        (4, "none", {"dp_shard": processes}),
        (4, "selective", {"dp_shard": processes}),
        (4, "full", {"dp_shard": processes}),
        (4, "none", {"dp_shard": half, "tp": 2}),
        (4, "selective", {"dp_shard": half, "tp": 2}),
        (4, "selective", {"dp_shard": half, "cp": 2}),
        (2, "selective", {"dp_shard": half, "pp": 2}),
    ]
    if half > 1:
        meshes.append((4, "selective", {"dp_replicate": 2, "dp_shard": half}))
    return tuple(
        Case("qwen2-1.5b", 4096, rows, recompute, batch_rows=8, degrees=degrees)
        for rows, recompute, degrees in meshes
    )


class ConstantWeights:
    """A checkpoint whose every value is 0.01."""

    def __init__(self, model: str) -> None:
        from qwen2kit.spec.schema import schema_by_name

        self.params = schema_by_name(preset(model))

    def names(self) -> tuple[str, ...]:
        return tuple(self.params)

    def info(self, name: str) -> Any:
        from qwen2kit.weights.source import TensorInfo

        return TensorInfo("float32", self.params[name].shape)

    def read(self, name: str) -> Any:
        import numpy as np

        from qwen2kit.weights.tensor import from_float32

        return from_float32(np.full(self.params[name].shape, 0.01, np.float32), "float32")

    def affine(self, name: str) -> None:
        return None


def train(case: Case, timing: bool) -> dict[str, Any]:
    """Train one configuration in this process (and its siblings, if a launcher started it)."""
    import torch

    from qwen2kit.backend.protocol import DistributedBackend, TrainableModel
    from qwen2kit.backend.registry import get

    step = case.workload()
    plan = ExecutionPlan(device="auto", dtype="bfloat16", train=step.plan)
    backend = get("torch")
    assert isinstance(backend, DistributedBackend)
    processes = backend.processes(plan)
    model = backend.compile(step.spec, plan)
    assert isinstance(model, TrainableModel)
    model.load(ConstantWeights(case.model))
    batch = random_rows(step, model.data_shard[1])
    torch.cuda.reset_peak_memory_stats()
    for _ in range(STEPS):
        metrics = model.train_step(batch, 1e-5)
    stats = torch.cuda.memory_stats()
    result: dict[str, Any] = {
        "rank": processes.rank,
        "peak_bytes": metrics.peak_memory_bytes,
        "reserved_bytes": stats["reserved_bytes.all.peak"],
    }
    if timing:
        contest.so_far(result)
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(TIMED_STEPS):
            model.train_step(batch, 1e-5)
        torch.cuda.synchronize()
        result["seconds"] = (time.perf_counter() - start) / TIMED_STEPS
    processes.close()
    return result


def random_rows(step: Workload, shards: int) -> Any:
    """This process's rows, one document each."""
    import numpy as np

    from qwen2kit.backend.protocol import TokenBatch

    shape = (step.batch_rows // shards, step.seq_len)
    tokens = np.random.default_rng(0).integers(0, step.spec.vocab_size, shape, dtype=np.int32)
    positions = np.tile(np.arange(step.seq_len, dtype=np.int32), (shape[0], 1))
    return TokenBatch(
        tokens=tokens,
        labels=np.roll(tokens, -1, 1),
        positions=positions,
        documents=np.zeros_like(tokens),
    )


def prediction(case: Case, gpu: str, per_node: int) -> dict[str, Any]:
    """What the planner says."""
    step = case.workload()
    hardware = find_hardware(gpu)
    fullest = max(predict(step), key=lambda memory: memory.allocated)
    seconds = None
    if hardware is not None:
        cluster = Cluster(hardware=hardware, gpus=step.degrees.world, gpus_per_node=per_node)
        seconds = predict_time(step, cluster).total
    return {
        "moment": fullest.moment,
        "parts": fullest.parts,
        "bytes": fullest.allocated,
        "on_device": fullest.on_device(step.degrees.world),
        "seconds": seconds,
    }


class Budget:
    """Device memory that concurrent runs share."""

    def __init__(self, total: float) -> None:
        self.free, self.total, self.changed = total, total, threading.Condition()

    def take(self, size: float) -> float:
        size = min(size, self.total)
        with self.changed:
            self.changed.wait_for(lambda: self.free >= size)
            self.free -= size
        return size

    def give(self, size: float) -> None:
        with self.changed:
            self.free += size
            self.changed.notify_all()


def measure(case: Case, launcher: list[str], timing: bool) -> list[dict[str, Any]]:
    """Results of every process of one run, or its last line of error."""
    worker = [__file__, "--worker", json.dumps(asdict(case))]
    command = [*launcher, *worker, *(["--timing"] if timing else [])]
    os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    return contest.run(command, LIMIT)


def run(cases: tuple[Case, ...], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure all cases; their order is kept."""
    import torch

    from qwen2kit.backend.protocol import DistributedBackend
    from qwen2kit.backend.registry import get

    if torch.cuda.device_count() < arguments.processes:
        sys.exit(f"needs {arguments.processes} CUDA GPUs (or --list)")
    gpu = torch.cuda.get_device_name(0)
    total = torch.cuda.get_device_properties(0).total_memory
    backend = get("torch")
    assert isinstance(backend, DistributedBackend)
    several = arguments.processes > 1
    launcher = backend.launch_command(arguments.processes) if several else [sys.executable]
    budget = Budget(total - GIB)
    alone = several or arguments.timing
    results: list[dict[str, Any]] = [{} for _ in cases]
    writing = threading.Lock()

    def one(index: int) -> None:
        predicted = prediction(cases[index], gpu, arguments.processes)
        share = SPARE * predicted["bytes"] + CONTEXT + GIB
        taken = budget.take(budget.total if alone else share)
        try:
            ranks = measure(cases[index], launcher, arguments.timing)
        finally:
            budget.give(taken)
        results[index] = {
            "case": cases[index].name,
            "gpu": gpu,
            "config": asdict(cases[index]),
            "predicted": predicted,
            "measured": ranks,
        }
        with writing:
            contest.append(arguments.output, results[index])
            print(line(results[index]), file=sys.stderr, flush=True)

    threads = [threading.Thread(target=one, args=(index,)) for index in range(len(cases))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def line(result: dict[str, Any]) -> str:
    """One row of the table."""
    predicted, ranks = result["predicted"], result["measured"]
    if "error" in ranks[0]:
        return f"{result['case']:55} {predicted['bytes'] / GIB:8.2f}  {ranks[0]['error'][:60]}"
    peak = max(rank["peak_bytes"] for rank in ranks)
    reserved = max(rank["reserved_bytes"] for rank in ranks)
    text = (
        f"{result['case']:55} {predicted['bytes'] / GIB:8.2f} {peak / GIB:8.2f} "
        f"{predicted['bytes'] / peak - 1:+7.1%} {reserved / GIB:8.2f}  {predicted['moment']}"
    )
    if "seconds" in ranks[0] and predicted["seconds"] is not None:
        seconds = max(rank["seconds"] for rank in ranks)
        text += f"  {predicted['seconds']:.3f} s {seconds:.3f} s"
        text += f" {predicted['seconds'] / seconds - 1:+.0%}"
    return text


def show(results: list[dict[str, Any]]) -> None:
    """Table and the largest error."""
    print(f"{'GiB':55} {'plan':>8} {'peak':>8} {'error':>7} {'reserved':>8}  fullest moment")
    for result in results:
        print(line(result))
    errors = [
        abs(result["predicted"]["bytes"] / max(r["peak_bytes"] for r in result["measured"]) - 1)
        for result in results
        if "error" not in result["measured"][0]
    ]
    if errors:
        print(f"largest error {max(errors):.1%}, mean {sum(errors) / len(errors):.1%}")


def predictions(cases: tuple[Case, ...], gpu: str, per_node: int) -> Iterator[str]:
    """Without measurements."""
    for case in cases:
        found = prediction(case, gpu, per_node)
        parts = ", ".join(f"{key} {size / GIB:.2f}" for key, size in found["parts"].items())
        yield f"{case.name:55} {found['bytes'] / GIB:8.2f} GiB at {found['moment']}: {parts}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--output", type=Path, help="results are appended to it")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--timing", action="store_true")
    parser.add_argument("--large", action="store_true", help="cases for one GPU of over 130 GiB")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--only", default="", help="run the cases whose name contains this")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        case = Case(**json.loads(arguments.worker))
        contest.announce(train(case, arguments.timing))
        return
    alone = LARGE if arguments.large else SINGLE
    chosen = alone if arguments.processes == 1 else layouts(arguments.processes)
    cases = tuple(case for case in chosen if arguments.only in case.name)
    if arguments.list:
        print("\n".join(predictions(cases, "h100", arguments.processes)))
        return
    started = time.perf_counter()
    results = run(cases, arguments)
    show(results)
    print(f"{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
