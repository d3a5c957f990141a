"""The elementwise pieces of a training step, and attention, alone: milliseconds, bytes per second.

    python benchmarks/training_kernels.py --preset qwen2-0.5b --rows 8 --json out.json

Each of our kernels beside the same mathematics by torch.compile, at the shapes of one micro-batch
of one layer, bfloat16; norms and the loss kernel (on 8,192 positions) in several launches. Times
are those of the kernels on the device alone. Bytes are those that must pass at least: what is read
and written once. Attention is FlashAttention 4 where it is installed, beside torch's.
"""

from __future__ import annotations

import argparse
import json
import sys
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "backends")]
REPEATS = 10
Piece = tuple[str, Callable[[], Any], int]


def rotation(arguments: argparse.Namespace) -> Iterator[Piece]:
    """Rotated heads of the joint product, forward and backward."""
    import torch

    from qwen2kit.spec.presets import preset
    from qwen2kit_torch.fused.rotation import rotated_heads
    from qwen2kit_torch.rope import Rotary

    spec = preset(arguments.preset)
    heads, kv_heads = spec.num_attention_heads, spec.num_key_value_heads
    shape = (arguments.rows, arguments.seq_len, (heads + 2 * kv_heads) * spec.head_dim)
    joint = torch.randn(shape, device="cuda", dtype=torch.bfloat16).requires_grad_()
    device = torch.device("cuda")
    cos, sin = Rotary(spec).tables(arguments.seq_len, device, torch.bfloat16)
    rope = (cos[: arguments.seq_len, None], sin[: arguments.seq_len, None])
    for name, function in (
        ("ours", lambda x: rotated_heads(x, *rope, heads, kv_heads)),
        ("compiled", torch.compile(lambda x: plain_heads(x, *rope, heads, kv_heads))),
    ):
        yield from both_ways(f"rotation {name}", function, joint, 2 * joint.nbytes)


def plain_heads(joint: Any, cos: Any, sin: Any, heads: int, kv_heads: int) -> Any:
    """What `rotated_heads` computes, in plain PyTorch."""
    from qwen2kit_torch.rope import rotate

    parts = joint.view(*joint.shape[:2], heads + 2 * kv_heads, -1)
    query, key, value = parts.split((heads, kv_heads, kv_heads), dim=-2)
    return rotate(query, cos, sin), rotate(key, cos, sin), value


def swiglu(arguments: argparse.Namespace) -> Iterator[Piece]:
    """The activation of the joint gate and up product, forward and backward."""
    import torch

    from qwen2kit.spec.presets import preset
    from qwen2kit_torch.fused.swiglu import swiglu

    tokens = arguments.rows * arguments.seq_len
    width = 2 * preset(arguments.preset).intermediate_size
    joint = torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16).requires_grad_()
    for name, function in (("ours", swiglu), ("compiled", torch.compile(plain_swiglu))):
        yield from both_ways(f"swiglu {name}", function, joint, 3 * joint.nbytes // 2)


def plain_swiglu(joint: Any) -> Any:
    """What `swiglu` computes, in plain PyTorch."""
    import torch

    gate, up = joint.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


def norm(arguments: argparse.Namespace) -> Iterator[Piece]:
    """A residual sum and its norm, forward and backward."""
    import torch

    from qwen2kit.spec.presets import preset
    from qwen2kit_torch.fused import norm_kernel

    shape = (arguments.rows, arguments.seq_len, preset(arguments.preset).hidden_size)
    x, update, past, slope = (
        torch.randn(shape, device="cuda", dtype=torch.bfloat16).requires_grad_() for _ in range(4)
    )
    weight = torch.ones(shape[-1], device="cuda", requires_grad=True)
    compiled = torch.compile(plain_added_and_normed)
    total, out = compiled(x, update, weight, 1e-6)

    def backward() -> None:
        wanted = (x, update, weight)
        torch.autograd.grad((total, out), wanted, (past, slope), retain_graph=True)

    size = 4 * x.nbytes
    yield "norm compiled forward", lambda: compiled(x.detach(), update.detach(), weight, 1e-6), size
    yield "norm compiled backward", backward, size
    scale = torch.rand(shape[:-1], device="cuda")
    fixed = [tensor.detach() for tensor in (slope, past, x, weight)]
    for tile, programs in product((2048, 4096, 8192), (4, 8, 16)):
        norm_kernel._TILE, norm_kernel._PROGRAMS = tile, programs
        name = f"norm ours tile={tile}"
        if programs == 8:
            forward = partial(norm_kernel.add_norm, fixed[2], fixed[1], fixed[3], 1e-6)
            yield f"{name} forward", forward, size
        gradient = partial(norm_kernel.gradient, *fixed, scale)
        yield f"{name} programs={programs} backward", gradient, size


def plain_normed(x: Any, weight: Any, eps: float) -> Any:
    """What `normed` computes, in plain PyTorch."""
    import torch

    wide = x.float()
    unit = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return x, (weight * unit.to(x.dtype)).to(x.dtype)


def plain_added_and_normed(x: Any, update: Any, weight: Any, eps: float) -> Any:
    """What `added_and_normed` computes, in plain PyTorch."""
    return plain_normed(x + update, weight, eps)


def both_ways(name: str, function: Any, x: Any, forward_bytes: int) -> Iterator[Piece]:
    """The forward pass, and the backward pass of its result kept."""
    import torch

    out = function(x)
    parts = out if isinstance(out, tuple) else (out,)
    slopes = [torch.randn_like(part) for part in parts]
    written = sum(part.nbytes for part in parts)

    def forward() -> None:
        with torch.no_grad():
            function(x)

    def backward() -> None:
        torch.autograd.grad(parts, x, slopes, retain_graph=True)

    yield f"{name} forward", forward, forward_bytes
    # SwiGLU reads its input again; a rotation does not.
    again = x.nbytes if written < x.nbytes else 0
    yield f"{name} backward", backward, again + written + x.nbytes


def attention(arguments: argparse.Namespace) -> Iterator[Piece]:
    """Attention of whole rows and of eight documents a row, forward and backward."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from qwen2kit.spec.presets import preset
    from qwen2kit_torch.attention import Visibility
    from qwen2kit_torch.train.flash import FlashAttend, takes_flash

    spec = preset(arguments.preset)
    counts = (spec.num_attention_heads, *[spec.num_key_value_heads] * 2)
    inputs = [
        torch.randn(
            (arguments.rows, arguments.seq_len, count, spec.head_dim),
            device="cuda",
            dtype=torch.bfloat16,
            requires_grad=True,
        )
        for count in counts
    ]
    installed = takes_flash("auto", torch.device("cuda"), torch.bfloat16, spec.head_dim)
    if installed:
        yield from attended("whole rows flash-attn-4", FlashAttend(None), inputs)
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        yield from attended("whole rows cuDNN", Visibility(None, causal=True), inputs)
    if installed:
        yield from attended("packed flash-attn-4", packed(arguments, flash=True), inputs)
    yield from attended("packed torch", packed(arguments, flash=False), inputs)


def packed(arguments: argparse.Namespace, *, flash: bool) -> Any:
    """Attention within the documents of rows that hold eight each, of random lengths."""
    import numpy as np
    import torch

    from qwen2kit_torch.train.batch import Cutting

    rng = np.random.default_rng(0)
    ends = rng.integers(0, arguments.seq_len, (arguments.rows, 1, 7))
    documents = (np.arange(arguments.seq_len)[:, None] >= ends).sum(-1).astype(np.int32)
    device = torch.device("cuda")
    cut = Cutting(rows=arguments.rows, device=device, windows=(None,), varlen=True, flash=flash)
    return cut._segments(documents)[None]


def attended(name: str, attend: Any, inputs: list[Any]) -> Iterator[Piece]:
    """Attention to ``[B, T, heads, C]`` and its backward pass, as it is and deterministic."""
    import torch

    def forward() -> Any:
        return attend(*(x.transpose(1, 2) for x in inputs))

    def blindly() -> None:
        with torch.no_grad():
            forward()

    out = forward()
    slope = torch.randn_like(out)

    def backward() -> None:
        torch.autograd.grad(out, inputs, slope, retain_graph=True)

    def exactly() -> None:
        torch.utils.deterministic.fill_uninitialized_memory = False
        torch.use_deterministic_algorithms(True)
        try:
            backward()
        finally:
            torch.use_deterministic_algorithms(False)

    size = sum(x.nbytes for x in (*inputs, out))
    yield f"attention {name} forward", blindly, size
    yield f"attention {name} backward", backward, 2 * size
    yield f"attention {name} deterministic backward", exactly, 2 * size


def loss(arguments: argparse.Namespace) -> Iterator[Piece]:
    """Cross-entropy and its gradient, in several launches."""
    import torch

    from qwen2kit.spec.presets import preset
    from qwen2kit_torch.train.loss_kernel import DEFAULT, Launch, cross_entropy_

    rows, vocab = 8192, preset(arguments.preset).vocab_size
    logits = torch.randn(rows, vocab, device="cuda", dtype=torch.bfloat16)
    labels = torch.randint(0, vocab, (rows,), device="cuda")
    launches = {DEFAULT} | {
        Launch(lanes=lanes, strips=strips, warps=warps, rows_in_flight=flight)
        for (lanes, strips, warps), flight in product(
            ((8192, 4, 32), (16384, 2, 32), (8192, 4, 16), (8192, 8, 16), (4096, 8, 16)), (1, 2)
        )
    }
    for launch in sorted(launches, key=repr):

        def run(launch: Launch = launch) -> None:
            cross_entropy_(logits, labels, slope=True, launch=launch)

        yield f"loss {launch}", run, 2 * logits.nbytes


def measure(run: Callable[[], Any]) -> float:
    """Milliseconds that the kernels of one run take on the device, whatever the host does."""
    import torch
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    for _ in range(3):
        run()
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        for _ in range(REPEATS):
            run()
        torch.cuda.synchronize()
    kernels = [event for event in trace.events() if event.device_type == DeviceType.CUDA]
    return sum(event.time_range.elapsed_us() for event in kernels) / REPEATS / 1e3


SECTIONS = {
    "rotation": rotation,
    "swiglu": swiglu,
    "norm": norm,
    "attention": attention,
    "loss": loss,
}


def main() -> None:
    """Time every piece; a section that fails leaves the others alone."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="qwen2-0.5b")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=4096)
    parser.add_argument("--sections", default=",".join(SECTIONS))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    found: list[dict[str, Any]] = []
    for section in arguments.sections.split(","):
        try:
            for name, run, size in SECTIONS[section](arguments):
                milliseconds = measure(run)
                rate = size / milliseconds / 1e9
                print(f"{milliseconds:8.3f} ms {rate:6.2f} TB/s  {name}", flush=True)
                found.append({"piece": name, "ms": milliseconds, "bytes": size})
        except Exception:
            traceback.print_exc()
        if arguments.json:
            arguments.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
