"""Training speed and memory of one GPU (or of a torchrun group), beside the peers.

    python benchmarks/training.py --presets qwen2-0.5b --rows 32 --micro-rows 8 --json out.json
    torchrun --nproc-per-node 2 benchmarks/training.py --peers ours --parallel dp_shard=2

Random weights, random tokens, every position supervised, AdamW, float32 master weights, bfloat16
products. Every step is one optimizer step of ``--rows`` rows; a contestant that runs out of memory
tries again with half the rows per micro-batch. Each runs in a process of its own; their results
are appended to the JSON file as they come, and one that is cut off leaves what it has measured.

    ours                        as users get it
    ours-rotation, ours-swiglu, ours-norm
                                without that fused operator (joined by +: without those)
    ours-flash                  with SDPA even where flash-attn-4 is installed
    ours-products               with cuBLAS's own choice of algorithm for every matrix product
    transformers                SDPA, nothing compiled
    transformers-regional       every decoder layer compiled by itself
    transformers-regional-liger the same, with liger-kernel's linear cross-entropy (no whole logits)
    transformers-whole          torch.compile of the whole model
    liger                       all of liger-kernel's fused kernels, nothing compiled

MFU = (6 x matmul parameters, head included, + 6 x layers x hidden x seq) x tokens/s / peak.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from contest import announce, append, environment, run_alone, so_far

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "backends")]
WARMUP = 3
PEERS = "ours,transformers-regional-liger,transformers-regional,liger,transformers-whole"


def ours(arguments: argparse.Namespace, preset_name: str, without: str) -> dict[str, Any]:
    """qwen2kit's torch backend through its public protocol."""
    from qwen2kit.backend.plan import ExecutionPlan, TrainPlan
    from qwen2kit.backend.protocol import TrainableModel
    from qwen2kit.plan.degrees import Degrees
    from qwen2kit.spec.presets import preset
    from qwen2kit_torch.backend import TorchBackend

    leave_out(without)
    spec = preset(preset_name)
    degrees = dict(item.split("=") for item in arguments.parallel.split(",") if item)
    plan = TrainPlan(
        micro_batch_rows=arguments.micro_rows,
        loss_chunk_tokens=arguments.loss_chunk,
        parallel=Degrees(**{key: int(value) for key, value in degrees.items()}),
        recompute=arguments.recompute,
        float8=arguments.float8,
        attention="sdpa" if "flash" in without.split("+") else "auto",
        tune_products="products" not in without.split("+"),
    )
    backend = TorchBackend()
    execution = ExecutionPlan(dtype="bfloat16", train=plan)
    processes = backend.processes(execution)
    model = backend.compile(spec, execution)
    assert isinstance(model, TrainableModel)
    model.init(0)
    batch = random_batch(arguments, spec.vocab_size, *model.data_shard)
    losses: list[float] = []

    def step() -> None:
        metrics = model.train_step(batch, 1e-4)
        losses.append(metrics.loss)

    flash = model._cut.flash  # type: ignore[attr-defined]
    known = {"processes": processes.world, "attention": "flash-attn-4" if flash else "sdpa"}
    found = measure(step, losses, arguments, known)
    if arguments.profile and processes.rank == 0:
        with model.profiler(Path(arguments.profile)):  # type: ignore[attr-defined]
            step()
    return found


def leave_out(operators: str) -> None:
    """Put plain PyTorch in the place of fused operators, for ``torch.compile`` to fuse."""
    import training_kernels

    import qwen2kit_torch.model as network

    plain = {
        "rotation": ("rotated_heads", training_kernels.plain_heads),
        "swiglu": ("swiglu", training_kernels.plain_swiglu),
        "norm": ("normed", training_kernels.plain_normed),
        "addnorm": ("added_and_normed", training_kernels.plain_added_and_normed),
    }
    named = operators.replace("norm", "norm+addnorm").split("+")
    for operator in plain.keys() & set(named):
        setattr(network, *plain[operator])


def random_batch(arguments: argparse.Namespace, vocab: int, rank: int, world: int) -> Any:
    """This process's rows; with ``--packed`` each is cut into so many documents."""
    import numpy as np

    from qwen2kit.backend.protocol import TokenBatch

    rows = arguments.rows // world
    rng = np.random.default_rng(rank)
    shape = (rows, arguments.seq_len)
    tokens = rng.integers(0, vocab, shape).astype(np.int32)
    positions = np.tile(np.arange(arguments.seq_len, dtype=np.int32), (rows, 1))
    documents = np.zeros(shape, dtype=np.int32)
    if arguments.packed:
        for row in range(rows):
            ends = np.sort(rng.choice(arguments.seq_len, arguments.packed - 1, replace=False))
            documents[row] = np.searchsorted(ends, positions[row], side="right")
            begins = np.concatenate([[0], ends])
            positions[row] -= begins[documents[row]].astype(np.int32)
    return TokenBatch(tokens, np.roll(tokens, -1, 1), positions, documents)


def transformers(arguments: argparse.Namespace, preset_name: str, variant: str) -> dict[str, Any]:
    """transformers with SDPA and fused AdamW, under bfloat16 autocast.

    Args:
        variant: parts joined by ``-``: ``whole`` or ``regional`` compilation; ``liger`` for its
            linear cross-entropy; ``kernels`` for all its kernels.
    """
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from qwen2kit.spec.hf import to_hf_config
    from qwen2kit.spec.presets import preset

    parts = variant.split("-")
    if "liger" in parts or "kernels" in parts:
        from liger_kernel.transformers import apply_liger_kernel_to_qwen2

        every = "kernels" in parts
        apply_liger_kernel_to_qwen2(
            rope=every, rms_norm=every, swiglu=every, fused_linear_cross_entropy=True
        )
    spec = preset(preset_name)
    config = Qwen2Config(**to_hf_config(spec, dtype="float32"))
    config._attn_implementation = "sdpa"
    pure = arguments.pure_bfloat16
    with torch.device("cuda"):
        torch.manual_seed(0)
        model: Any = Qwen2ForCausalLM(config).to(torch.bfloat16 if pure else torch.float32)
    model.train()
    if arguments.recompute == "full":
        model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    if "regional" in parts:
        for layer in model.model.layers:
            layer.compile()
    elif "whole" in parts:
        model = torch.compile(model)
    tokens = torch.randint(0, spec.vocab_size, (arguments.rows, arguments.seq_len), device="cuda")
    losses: list[float] = []

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        total: Any = 0.0
        for micro in tokens.split(arguments.micro_rows):
            with torch.autocast("cuda", torch.bfloat16, enabled=not pure):
                loss = model(input_ids=micro, labels=micro, use_cache=False).loss
            (loss * len(micro) / len(tokens)).backward()
            total += loss.detach() * len(micro) / len(tokens)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(total))

    return measure(step, losses, arguments, {})


def contestant(name: str) -> Callable[[argparse.Namespace, str], dict[str, Any]]:
    """What runs under ``name``; see the list at the top."""
    kind, _, variant = name.partition("-")
    if kind == "ours":
        return lambda arguments, preset_name: ours(arguments, preset_name, variant)
    if kind == "liger":
        variant = "kernels"
    return lambda arguments, preset_name: transformers(arguments, preset_name, variant)


def measure(
    step: Callable[[], None],
    losses: list[float],
    arguments: argparse.Namespace,
    known: dict[str, Any],
) -> dict[str, Any]:
    """Median seconds of ``--steps`` steps after the warm-up, and peak memory; told after each.

    Args:
        losses: to which every step adds one.
        known: what else belongs into the result.
    """
    import torch

    started = time.perf_counter()
    for _ in range(WARMUP):
        step()
    torch.cuda.synchronize()
    warm = time.perf_counter() - started
    torch.cuda.reset_peak_memory_stats()
    seconds: list[float] = []
    found: dict[str, Any] = {}
    while len(seconds) < arguments.steps:
        before = time.perf_counter()
        step()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - before)
        found = {
            "seconds": [round(value, 4) for value in seconds],
            "median": statistics.median(seconds),
            "warmup_seconds": round(warm, 1),
            "peak_gb": torch.cuda.max_memory_allocated() / 1e9,
            "reserved_gb": torch.cuda.max_memory_reserved() / 1e9,
            "losses": [round(loss, 4) for loss in losses],
            **known,
        }
        if os.environ.get("RANK", "0") == "0":
            so_far(finish(found, arguments, arguments.presets))
    if arguments.breakdown:
        try:
            found["breakdown"] = breakdown(step)
        except Exception as error:  # The speed is known by now.
            found["breakdown"] = {repr(error): 0.0}
    return found


def breakdown(step: Callable[[], None], most: int = 45) -> dict[str, float]:
    """Milliseconds of one step by kernel, the longest first, and those without any."""
    import torch
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as trace:
        step()
        torch.cuda.synchronize()
    kernels = [
        event
        for event in trace.events()
        if event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
    ]
    total: dict[str, float] = {}
    for event in kernels:
        duration = event.time_range.elapsed_us() / 1e3
        total[event.name[:90]] = total.get(event.name[:90], 0.0) + duration
    start = min(event.time_range.start for event in kernels)
    end = max(event.time_range.end for event in kernels)
    longest = sorted(total.items(), key=lambda item: -item[1])
    found = {name: round(value, 2) for name, value in longest[:most]}
    found["(other kernels)"] = round(sum(value for _, value in longest[most:]), 2)
    found["(idle)"] = round((end - start) / 1e3 - sum(total.values()), 2)
    return found


def main() -> None:
    """Run every contestant on every preset and print a table."""
    arguments = parse()
    if arguments.only or "WORLD_SIZE" in os.environ:
        report = contestant(arguments.only or "ours")(arguments, arguments.presets)
        if os.environ.get("RANK", "0") == "0":
            announce(finish(report, arguments, arguments.presets))
        return
    for name in arguments.presets.split(","):
        for peer in arguments.peers.split(","):
            row = {"command": " ".join(sys.argv), "preset": name, "contestant": peer}
            row |= run_until_it_fits(arguments, name, peer)
            show(row)
            append(arguments.json, row)


def run_until_it_fits(arguments: argparse.Namespace, name: str, peer: str) -> dict[str, Any]:
    """One contestant, with fewer rows per micro-batch as long as memory does not hold them."""
    limits = dict(item.split("=") for item in arguments.limits.split(",") if item)
    rows = arguments.micro_rows
    while True:
        again = [*sys.argv[1:], "--presets", name, "--only", peer, "--micro-rows", str(rows)]
        found = run_alone(again, float(limits.get(peer, arguments.limit)))
        if rows == 1 or "out of memory" not in found.get("error", ""):
            return {"rows": arguments.rows, "micro_rows": rows, **found}
        rows //= 2


def finish(report: dict[str, Any], arguments: argparse.Namespace, name: str) -> dict[str, Any]:
    """Add tokens per second, MFU and what ran this."""
    import torch

    from qwen2kit.plan.hardware import peak_flops
    from qwen2kit.spec.counts import train_flops_per_token
    from qwen2kit.spec.presets import preset

    rate = arguments.rows * arguments.seq_len / report["median"]
    peak = peak_flops(torch.cuda.get_device_name())
    flops = train_flops_per_token(preset(name), arguments.seq_len)
    found = {"tokens_per_second": round(rate, 1)}
    if peak:
        found["mfu"] = round(rate * flops / peak / report.get("processes", 1), 4)
    return found | report | {"environment": environment()}


def show(row: dict[str, Any]) -> None:
    """One line of the table, and the kernels where they were asked for."""
    head = f"{row['preset']:12} {row['contestant']:28} {row['rows']}/{row['micro_rows']} rows "
    if "error" in row:
        print(head + row["error"], flush=True)
        return
    print(
        f"{head}{row['tokens_per_second']:>9,.0f} tokens/s  MFU {100 * row.get('mfu', 0):5.1f} %  "
        f"peak {row['peak_gb']:5.1f} GB  step {row['median']:.3f} s  "
        f"warm-up {row['warmup_seconds']} s  loss {row['losses'][0]} -> {row['losses'][-1]}  "
        f"{row.get('cut_off', '')}",
        flush=True,
    )
    for kernel, milliseconds in row.get("breakdown", {}).items():
        print(f"{milliseconds:10.2f} ms  {kernel}", flush=True)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--presets", default="qwen2-0.5b,qwen2-1.5b")
    parser.add_argument("--peers", default=PEERS)
    parser.add_argument("--seq-len", type=int, default=4096)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--micro-rows", type=int, default=4)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--loss-chunk", type=int, default=8192)
    parser.add_argument("--recompute", default="none")
    parser.add_argument("--parallel", default="", help="e.g. dp_shard=2,tp=2")
    parser.add_argument("--packed", type=int, default=0, help="documents per row")
    parser.add_argument("--float8", action="store_true")
    parser.add_argument("--pure-bfloat16", action="store_true", help="peers without fp32 masters")
    parser.add_argument("--limit", type=float, default=240, help="seconds for a contestant")
    parser.add_argument("--limits", default="", help="others, e.g. transformers-whole=400")
    parser.add_argument("--breakdown", action="store_true", help="milliseconds by kernel")
    parser.add_argument("--profile", default="", help="folder for a trace of one step of ours")
    parser.add_argument("--json", type=Path, help="results are appended to it")
    parser.add_argument("--only", default="", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
