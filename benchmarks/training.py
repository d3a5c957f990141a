"""Training speed and memory of one GPU (or of a torchrun group), beside the peers.

    python benchmarks/training.py --presets qwen2-0.5b,qwen2-1.5b --rows 4 --json out.json
    torchrun --nproc-per-node 2 benchmarks/training.py --peers ours --parallel dp_shard=2

Random weights, random tokens, every position supervised, AdamW, float32 master weights, bfloat16
products. Each contestant runs in a process of its own; every step is one optimizer step of
``--rows`` rows in micro-batches of ``--micro-rows``.
MFU = (6 x matmul parameters, head included, + 6 x layers x hidden x seq) x tokens/s / peak.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "backends")]
WARMUP = 3


def ours(arguments: argparse.Namespace, preset_name: str) -> dict[str, Any]:
    """qwen2kit's torch backend through its public protocol."""
    import numpy as np

    from qwen2kit.backend.plan import ExecutionPlan, TrainPlan
    from qwen2kit.backend.protocol import TokenBatch, TrainableModel
    from qwen2kit.plan.degrees import Degrees
    from qwen2kit.spec.presets import preset
    from qwen2kit_torch.backend import TorchBackend

    spec = preset(preset_name)
    degrees = dict(item.split("=") for item in arguments.parallel.split(",") if item)
    plan = TrainPlan(
        micro_batch_rows=arguments.micro_rows,
        loss_chunk_tokens=arguments.loss_chunk,
        parallel=Degrees(**{key: int(value) for key, value in degrees.items()}),
        recompute=arguments.recompute,
        float8=arguments.float8,
    )
    backend = TorchBackend()
    execution = ExecutionPlan(dtype="bfloat16", train=plan)
    processes = backend.processes(execution)
    model = backend.compile(spec, execution)
    assert isinstance(model, TrainableModel)
    model.init(0)
    rank, world = model.data_shard
    rows = arguments.rows // world
    rng = np.random.default_rng(rank)
    shape = (rows, arguments.seq_len)
    tokens = rng.integers(0, spec.vocab_size, shape).astype(np.int32)
    positions = np.tile(np.arange(arguments.seq_len, dtype=np.int32), (rows, 1))
    documents = np.zeros(shape, dtype=np.int32)
    if arguments.packed:
        for row in range(rows):
            ends = np.sort(rng.choice(arguments.seq_len, arguments.packed - 1, replace=False))
            documents[row] = np.searchsorted(ends, positions[row], side="right")
            begins = np.concatenate([[0], ends])
            positions[row] -= begins[documents[row]].astype(np.int32)
    batch = TokenBatch(tokens, np.roll(tokens, -1, 1), positions, documents)
    losses: list[float] = []

    def step() -> None:
        metrics = model.train_step(batch, 1e-4)
        losses.append(metrics.loss)

    found = measure(step, arguments)
    if arguments.profile and processes.rank == 0:
        with model.profiler(Path(arguments.profile)):  # type: ignore[attr-defined]
            step()
    found["losses"] = [round(loss, 4) for loss in losses]
    found["processes"] = processes.world
    return found


def transformers(arguments: argparse.Namespace, preset_name: str) -> dict[str, Any]:
    """transformers with SDPA, torch.compile and fused AdamW, under bfloat16 autocast."""
    return _transformers(arguments, preset_name, liger=False)


def liger(arguments: argparse.Namespace, preset_name: str) -> dict[str, Any]:
    """transformers with liger-kernel's fused kernels, its linear cross-entropy included."""
    return _transformers(arguments, preset_name, liger=True)


def _transformers(
    arguments: argparse.Namespace, preset_name: str, *, liger: bool
) -> dict[str, Any]:
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from qwen2kit.spec.hf import to_hf_config
    from qwen2kit.spec.presets import preset

    if liger:
        from liger_kernel.transformers import apply_liger_kernel_to_qwen2

        apply_liger_kernel_to_qwen2()
    spec = preset(preset_name)
    config = Qwen2Config(**to_hf_config(spec, dtype="float32"))
    config._attn_implementation = "sdpa"
    pure = arguments.pure_bfloat16
    torch.set_default_device("cuda")
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config).to(torch.bfloat16 if pure else torch.float32)
    torch.set_default_device("cpu")
    model.train()
    if arguments.recompute == "full":
        model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    if not liger or arguments.compile_liger:
        model = torch.compile(model)
    tokens = torch.randint(0, spec.vocab_size, (arguments.rows, arguments.seq_len), device="cuda")
    losses: list[float] = []

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for micro in tokens.split(arguments.micro_rows):
            with torch.autocast("cuda", torch.bfloat16, enabled=not pure):
                loss = model(input_ids=micro, labels=micro, use_cache=False).loss
            (loss * len(micro) / len(tokens)).backward()
            total += loss.detach() * len(micro) / len(tokens)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(total))

    found = measure(step, arguments)
    found["losses"] = [round(loss, 4) for loss in losses]
    return found


CONTESTANTS = {"ours": ours, "transformers": transformers, "liger": liger}


def measure(step: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    """Median seconds of ``--steps`` steps after the warm-up, and peak memory."""
    import torch

    started = time.perf_counter()
    for _ in range(WARMUP):
        step()
    torch.cuda.synchronize()
    warm = time.perf_counter() - started
    torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(arguments.steps):
        before = time.perf_counter()
        step()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - before)
    return {
        "seconds": [round(value, 4) for value in seconds],
        "median": statistics.median(seconds),
        "warmup_seconds": round(warm, 1),
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9,
        "reserved_gb": torch.cuda.max_memory_reserved() / 1e9,
    }


def main() -> None:
    """Run every contestant on every preset and print a table."""
    arguments = parse()
    if arguments.only or "WORLD_SIZE" in os.environ:
        report = CONTESTANTS[arguments.only or "ours"](arguments, arguments.presets)
        if os.environ.get("RANK", "0") == "0":
            print("RESULT " + json.dumps(finish(report, arguments, arguments.presets)))
        return
    document: dict[str, Any] = {
        "command": " ".join(sys.argv),
        "environment": environment(),
        "settings": {k: v for k, v in vars(arguments).items() if k != "only"},
        "rows": [],
    }
    for name in arguments.presets.split(","):
        for peer in arguments.peers.split(","):
            row = {"preset": name, "contestant": peer, **run_alone(name, peer)}
            show(row)
            document["rows"].append(row)
            if arguments.json:
                Path(arguments.json).write_text(json.dumps(document, indent=2) + "\n")


def run_alone(name: str, peer: str) -> dict[str, Any]:
    """One contestant in a fresh process."""
    command = [sys.executable, *sys.argv, "--presets", name, "--only", peer]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            found: dict[str, Any] = json.loads(line[7:])
            return found
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return {"error": next((x for x in reversed(lines) if "Error" in x), (lines or ["?"])[-1])[:300]}


def finish(report: dict[str, Any], arguments: argparse.Namespace, name: str) -> dict[str, Any]:
    """Add tokens per second and MFU."""
    import torch

    from qwen2kit.plan.hardware import peak_flops
    from qwen2kit.spec.counts import train_flops_per_token
    from qwen2kit.spec.presets import preset

    rate = arguments.rows * arguments.seq_len / report["median"]
    peak = peak_flops(torch.cuda.get_device_name())
    flops = train_flops_per_token(preset(name), arguments.seq_len)
    report["tokens_per_second"] = round(rate, 1)
    if peak:
        report["mfu"] = round(rate * flops / peak / report.get("processes", 1), 4)
    return report


def environment() -> dict[str, Any]:
    """What ran this."""
    import torch

    found = {"torch": torch.__version__, "cuda": torch.version.cuda}
    for package in ("transformers", "liger_kernel", "triton", "torchao"):
        try:
            found[package] = str(__import__(package).__version__)
        except (ImportError, AttributeError):
            continue
    found["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return found


def show(row: dict[str, Any]) -> None:
    """One line of the table."""
    if "error" in row:
        print(f"{row['preset']:14} {row['contestant']:14} {row['error']}", flush=True)
        return
    print(
        f"{row['preset']:14} {row['contestant']:14} {row['tokens_per_second']:>10,.0f} tokens/s  "
        f"MFU {100 * row.get('mfu', 0):5.1f} %  peak {row['peak_gb']:5.1f} GB  "
        f"step {row['median']:.3f} s  warm-up {row['warmup_seconds']} s  "
        f"loss {row['losses'][0]} -> {row['losses'][-1]}",
        flush=True,
    )


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--presets", default="qwen2-0.5b,qwen2-1.5b")
    parser.add_argument("--peers", default="ours,transformers,liger")
    parser.add_argument("--seq-len", type=int, default=4096)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--micro-rows", type=int, default=4)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--loss-chunk", type=int, default=8192)
    parser.add_argument("--recompute", default="none")
    parser.add_argument("--parallel", default="", help="e.g. dp_shard=2,tp=2")
    parser.add_argument("--packed", type=int, default=0, help="documents per row")
    parser.add_argument("--float8", action="store_true")
    parser.add_argument("--pure-bfloat16", action="store_true", help="peers without fp32 masters")
    parser.add_argument("--compile-liger", action="store_true")
    parser.add_argument("--profile", default="", help="folder for a trace of one step of ours")
    parser.add_argument("--json", default="")
    parser.add_argument("--only", default="", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
