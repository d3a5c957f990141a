"""Speed and memory of LoRA and QLoRA on one GPU, beside PEFT.

    python benchmarks/lora.py --preset qwen2-1.5b --json out.json

Random weights and tokens, every position supervised, adapters on every linear layer, bfloat16
products, fused AdamW. The base is bfloat16, or NF4 (``qlora``; bitsandbytes in PEFT's case). Each
contestant runs in a process of its own, and one that is cut off leaves what it has measured; every
step is one optimizer step on ``--rows`` rows.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from contest import announce, append, environment, run_alone, so_far

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "backends")]
WARMUP = 3
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def ours(arguments: argparse.Namespace, *, quantize: str) -> dict[str, Any]:
    """qwen2kit's torch backend through its public protocol."""
    import numpy as np

    from qwen2kit.backend.plan import ExecutionPlan, LoRAPlan, TrainPlan
    from qwen2kit.backend.protocol import TokenBatch
    from qwen2kit.spec.presets import preset
    from qwen2kit.spec.schema import schema
    from qwen2kit.weights.source import MemorySource
    from qwen2kit.weights.tensor import from_float32
    from qwen2kit_torch.backend import TorchBackend

    spec = preset(arguments.preset)
    adapter = LoRAPlan(rank=arguments.rank, alpha=32.0, targets=TARGETS, quantize=quantize)  # type: ignore[arg-type]
    plan = TrainPlan(micro_batch_rows=arguments.micro_rows, adapter=adapter)
    model: Any = TorchBackend().compile(spec, ExecutionPlan(dtype="bfloat16", train=plan))
    block = np.random.default_rng(0).standard_normal(1 << 20).astype(np.float32) * 0.02
    model.load(
        MemorySource(
            {p.name: from_float32(np.resize(block, p.shape), "bfloat16") for p in schema(spec)}
        )
    )
    shape = (arguments.rows, arguments.seq_len)
    tokens = np.random.default_rng(1).integers(0, spec.vocab_size, shape).astype(np.int32)
    positions = np.tile(np.arange(arguments.seq_len, dtype=np.int32), (arguments.rows, 1))
    batch = TokenBatch(tokens, np.roll(tokens, -1, 1), positions, np.zeros_like(positions))
    return measure(lambda: model.train_step(batch, 1e-4), arguments)


def theirs(
    arguments: argparse.Namespace, *, quantize: str, compiled: bool = False
) -> dict[str, Any]:
    """PEFT around transformers with SDPA; ``compiled`` layer by layer."""
    import peft
    import torch
    from transformers import BitsAndBytesConfig, Qwen2Config, Qwen2ForCausalLM

    from qwen2kit.spec.hf import to_hf_config
    from qwen2kit.spec.presets import preset

    spec = preset(arguments.preset)
    config = Qwen2Config(**to_hf_config(spec, dtype="bfloat16"))
    config._attn_implementation = "sdpa"
    with torch.device("cuda"):
        model = Qwen2ForCausalLM(config).to(torch.bfloat16)
    if quantize == "nf4":
        settings = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            del model
            model = Qwen2ForCausalLM.from_pretrained(
                folder, quantization_config=settings, device_map={"": 0}, dtype=torch.bfloat16
            )
    lora = peft.LoraConfig(
        r=arguments.rank, lora_alpha=32, target_modules=list(TARGETS), task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(model, lora)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    if compiled:
        for layer in model.get_base_model().model.layers:
            layer.compile()
    tokens = torch.randint(0, spec.vocab_size, (arguments.rows, arguments.seq_len), device="cuda")

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        for micro in tokens.split(arguments.micro_rows):
            with torch.autocast("cuda", torch.bfloat16):
                loss = model(input_ids=micro, labels=micro, use_cache=False).loss
            (loss * len(micro) / len(tokens)).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()

    return measure(step, arguments)


CONTESTANTS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "ours-lora": lambda arguments: ours(arguments, quantize="none"),
    "peft-lora": lambda arguments: theirs(arguments, quantize="none"),
    "peft-lora-compiled": lambda arguments: theirs(arguments, quantize="none", compiled=True),
    "ours-qlora": lambda arguments: ours(arguments, quantize="nf4"),
    "peft-qlora": lambda arguments: theirs(arguments, quantize="nf4"),
}


def measure(step: Callable[[], object], arguments: argparse.Namespace) -> dict[str, Any]:
    """Median step time after warm-up, and peak memory of the steps; told after each."""
    import torch

    for _ in range(WARMUP):
        step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    times: list[float] = []
    found: dict[str, Any] = {}
    while len(times) < arguments.steps:
        torch.cuda.synchronize()
        started = time.perf_counter()
        step()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
        median = statistics.median(times)
        found = {
            "tokens_per_second": round(arguments.rows * arguments.seq_len / median),
            "step_seconds": round(median, 4),
            "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2),
            "held_gb": round(held / 1e9, 2),
            "environment": environment(),
        }
        so_far(found)
    return found


def main() -> None:
    """Run every contestant in a fresh process and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="qwen2-1.5b")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--micro-rows", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--contestants", default=",".join(CONTESTANTS))
    parser.add_argument("--limit", type=float, default=180, help="seconds for a contestant")
    parser.add_argument("--json", type=Path, help="results are appended to it")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        announce(CONTESTANTS[arguments.one](arguments))
        return
    settings = {k: v for k, v in vars(arguments).items() if k not in ("json", "one")}
    for name in arguments.contestants.split(","):
        found = run_alone([*sys.argv[1:], "--one", name], arguments.limit)
        print(name, found, flush=True)
        append(arguments.json, {"contestant": name, "settings": settings, **found})


if __name__ == "__main__":
    main()
