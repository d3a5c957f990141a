"""Fused elementwise operators against transformers' own functions, and their Triton kernels, run
by Triton's interpreter, against the plain code."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest

from tests.unit.torch.interpreted import run_interpreted

torch = pytest.importorskip("torch")

HEADS, KV_HEADS, WIDTH = 4, 2, 8


def tables(rows: int, width: int, dtype: Any) -> tuple[Any, Any]:
    """Cosine and sign-folded sine of random angles, ``[rows, width]``."""
    angles = torch.randn(rows, width // 2)
    cos, sin = torch.cat([angles.cos()] * 2, -1), torch.cat([-angles.sin(), angles.sin()], -1)
    return cos.to(dtype), sin.to(dtype)


@pytest.mark.parametrize("per_row", [False, True])
def test_rotated_heads_are_transformers_rotation(per_row: bool) -> None:
    pytest.importorskip("transformers")
    from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb

    from qwen2kit_torch.fused.rotation import rotated_heads

    torch.manual_seed(0)
    batch, length = 3, 5
    cos, sin = tables(batch * length if per_row else length, WIDTH, torch.float32)
    shape = (batch, length, 1, WIDTH) if per_row else (length, 1, WIDTH)
    joint = torch.randn(batch, length, (HEADS + 2 * KV_HEADS) * WIDTH, requires_grad=True)
    copy = joint.detach().clone().requires_grad_()
    ours = rotated_heads(joint, cos.view(shape), sin.view(shape), HEADS, KV_HEADS)

    split = copy.view(batch, length, -1, WIDTH).transpose(1, 2)
    query, key, value = split.split((HEADS, KV_HEADS, KV_HEADS), 1)
    # transformers keeps the sine unsigned and negates the half that is swapped in.
    unsigned = torch.cat([sin[:, WIDTH // 2 :]] * 2, -1)
    rows = (batch if per_row else 1, length, WIDTH)
    theirs = (*apply_rotary_pos_emb(query, key, cos.view(rows), unsigned.view(rows)), value)
    slopes = [torch.randn_like(part) for part in ours]
    for part, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(part, expected.transpose(1, 2), rtol=1e-6, atol=1e-6)
    torch.autograd.backward(ours, slopes)
    torch.autograd.backward(theirs, [slope.transpose(1, 2) for slope in slopes])
    torch.testing.assert_close(joint.grad, copy.grad, rtol=1e-6, atol=1e-6)


def test_swiglu_is_torchs_silu_times_up_and_its_gradient() -> None:
    from qwen2kit_torch.fused.swiglu import swiglu

    torch.manual_seed(0)
    joint = (torch.randn(2, 3, 14, dtype=torch.float64) * 4).requires_grad_()
    gate, up = joint.chunk(2, -1)
    expected = torch.nn.functional.silu(gate) * up
    slope = torch.randn_like(expected)
    (by_joint,) = torch.autograd.grad(expected, joint, slope)
    narrow = joint.detach().float().requires_grad_()
    ours = swiglu(narrow)
    ours.backward(slope.float())
    torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(narrow.grad.double(), by_joint, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("added", [False, True])
def test_norms_are_torchs_with_the_residual_stream_beside_them(added: bool) -> None:
    from qwen2kit_torch.fused.norm import added_and_normed, normed

    torch.manual_seed(0)
    x, update, weight = torch.randn(2, 3, 12), torch.randn(2, 3, 12), torch.randn(12)
    slopes = torch.randn(2, 3, 12), torch.randn(2, 3, 12)

    def run(function: Any, dtype: Any) -> list[Any]:
        inputs = [t.to(dtype, copy=True).requires_grad_() for t in (x, update, weight)]
        outputs = function(*inputs)
        torch.autograd.backward(outputs, [slope.to(dtype) for slope in slopes])
        return [*outputs, *(t.grad for t in inputs if t.grad is not None)]

    def theirs(x: Any, update: Any, weight: Any) -> tuple[Any, Any]:
        total = x + update if added else x
        return total, torch.nn.functional.rms_norm(total, (12,), weight, 1e-6)

    def ours(x: Any, update: Any, weight: Any) -> tuple[Any, Any]:
        if added:
            return added_and_normed(x, update, weight, 1e-6)
        return normed(x, weight, 1e-6)

    expected, found = run(theirs, torch.float64), run(ours, torch.float32)
    assert len(expected) == len(found) == (5 if added else 4)
    for wide, narrow in zip(expected, found, strict=True):
        torch.testing.assert_close(narrow.double(), wide, rtol=1e-5, atol=1e-5)


def operators() -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Each operator with arguments."""
    from qwen2kit_torch.fused import norm, rotation, swiglu

    cos, sin = tables(5, WIDTH, torch.float32)
    joint = torch.randn(2, 5, (HEADS + 2 * KV_HEADS) * WIDTH, requires_grad=True)
    parts = tuple(torch.randn(2, 5, heads, WIDTH) for heads in (HEADS, KV_HEADS, KV_HEADS))
    pair = torch.randn(3, 10, requires_grad=True)
    rows = [torch.randn(2, 5, 8) for _ in range(3)]
    weight, scale = torch.randn(8), torch.rand(2, 5)
    return {
        "rms_norm": (norm._norm, (rows[0], weight, 1e-6)),
        "add_rms_norm": (norm._add_norm, (rows[0], rows[1], weight, 1e-6)),
        "rms_norm_backward": (norm._gradient, (*rows, weight, scale)),
        "rotated_heads": (rotation._divide, (joint, cos, sin, HEADS, KV_HEADS)),
        "rotated_heads_backward": (rotation._join, (*parts, cos, sin)),
        "swiglu": (swiglu._forward, (pair,)),
        "swiglu_backward": (swiglu._gradient, (torch.randn(3, 5), pair.detach())),
    }


NAMES = (
    "rms_norm", "add_rms_norm", "rms_norm_backward", "rotated_heads", "rotated_heads_backward",
    "swiglu", "swiglu_backward",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_operators_are_what_compilers_are_told(name: str) -> None:
    torch.manual_seed(0)
    torch.library.opcheck(*operators()[name])


def test_a_joint_layer_computes_what_a_plain_one_does() -> None:
    """Outputs and gradients of a whole decoder layer, with and without joint products."""
    from qwen2kit_torch.attention import Visibility
    from qwen2kit_torch.model import DecoderLayer
    from qwen2kit_torch.rope import Rotary
    from tests.conftest import small_spec

    spec = small_spec()
    torch.manual_seed(0)
    layer = DecoderLayer(spec, 0, torch.device("cpu"), torch.float32)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    cos, sin = Rotary(spec).tables(9, torch.device("cpu"), torch.float32)
    rope = (cos[:9, None], sin[:9, None])
    x = torch.randn(2, 9, spec.hidden_size)
    found = []
    for fused in (False, True):
        layer.fused = layer.self_attn.fused = layer.mlp.fused = fused
        layer.zero_grad()
        out = layer(x, rope, {None: Visibility(None, causal=True)}, None)
        out.square().sum().backward()
        found.append([out.detach(), *(p.grad.clone() for p in layer.parameters())])
    for plain, joint in zip(*found, strict=True):
        torch.testing.assert_close(plain, joint, rtol=1e-5, atol=1e-6)


INTERPRETED = """
import torch
from qwen2kit_torch.fused import norm, norm_kernel
from qwen2kit_torch.fused import rotation, rotation_kernel, swiglu, swiglu_kernel
from tests.unit.torch.test_torch_fused import tables

def same(one, other):
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)

torch.manual_seed(0)
for batch, length, heads, kv_heads, width, rows in [
    (2, 70, 3, 1, 16, 70), (2, 40, 4, 2, 64, 80), (1, 65, 2, 2, 24, 65),
]:
    cos, sin = tables(rows, width, torch.float32)
    joint = torch.randn(batch, length, (heads + 2 * kv_heads) * width)
    expected = rotation._divide(joint, cos, sin, heads, kv_heads)
    parts = tuple(torch.full_like(part, 9.0) for part in expected)
    rotation_kernel.divide(joint, parts, cos, sin)
    for part, other in zip(parts, expected):
        same(part, other)
    slopes = tuple(torch.randn_like(part) for part in parts)
    joined = torch.full_like(joint, 9.0)
    rotation_kernel.join(joined, slopes, cos, sin)
    same(joined, rotation._join(*slopes, cos, sin))
for width in (8, 1024, 1500):
    joint, slope = torch.randn(3, 2, 2 * width), torch.randn(3, 2, width)
    same(swiglu_kernel.forward(joint), swiglu._forward(joint))
    same(swiglu_kernel.backward(slope, joint), swiglu._gradient(slope, joint))
for width in (8, 96, 1024, 5000):
    x, update, slope, past = (torch.randn(3, 7, width) for _ in range(4))
    weight = torch.randn(width)
    pairs = [
        (norm_kernel.norm(x, weight, 1e-6), norm._norm(x, weight, 1e-6)),
        (norm_kernel.add_norm(x, update, weight, 1e-6), norm._add_norm(x, update, weight, 1e-6)),
    ]
    scale = norm._norm(x, weight, 1e-6)[1]
    arguments = (slope, past, x, weight, scale)
    pairs.append((norm_kernel.gradient(*arguments), norm._gradient(*arguments)))
    for ours, plain in pairs:
        for one, other in zip(ours, plain):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
def test_interpreted_kernels_are_the_plain_code() -> None:
    run_interpreted(INTERPRETED)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", NAMES)
def test_kernels_follow_the_plain_code_on_cuda(name: str) -> None:
    torch.manual_seed(0)
    operator, arguments = operators()[name]

    def run(device: str, dtype: Any) -> list[Any]:
        moved = [a.detach().to(device, dtype) if torch.is_tensor(a) else a for a in arguments]
        out = operator(*moved)
        return [part.float().cpu() for part in (out if isinstance(out, (tuple, list)) else [out])]

    expected = run("cpu", torch.float32)
    for dtype, error in ((torch.float32, 1e-5), (torch.bfloat16, 4e-2)):
        for ours, plain in zip(run("cuda", dtype), expected, strict=True):
            torch.testing.assert_close(ours, plain, rtol=error, atol=error)
