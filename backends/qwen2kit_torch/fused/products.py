"""Matrix products of training by the algorithm that measured fastest on this GPU.

Shapes: M rows (tokens), N outputs, K inputs. On other devices than CUDA, in float32, and for small
or rare products it is PyTorch's own product.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from qwen2kit_torch.fused.algorithms import Remembered, fastest, remembered
from qwen2kit_torch.fused.cublaslt import CublasLtError, Problem, Product, library

# Below this many multiplications a launch is what counts.
_WORTHWHILE = 1 << 31
# Shapes that come up fewer times than this are not worth measuring (a batch's last rows).
_OFTEN = 3


def linear_onto(x: Tensor, weight: Tensor, bias: Tensor | None, onto: Tensor | None) -> Tensor:
    """``x @ weight.T + bias + onto``, in the dtype of ``x``.

    Args:
        x: ``[..., K]``.
        weight: ``[N, K]``, any float dtype; it is cast to that of ``x``.
        bias: ``[N]`` or None.
        onto: ``[..., N]`` in the dtype of ``x``, or None.
    """
    out: Tensor = _linear(
        x.reshape(-1, x.shape[-1]),
        weight.to(x.dtype),
        None if bias is None else bias.to(x.dtype),
        None if onto is None else onto.reshape(-1, onto.shape[-1]),
    )
    return out.view(*x.shape[:-1], len(weight))


def multiply(a: Tensor, b: Tensor, *, turn_a: bool = False, turn_b: bool = False) -> Tensor:
    """``a @ b`` with operands stored transposed where so said; not differentiable."""
    out: Tensor = _multiply(a, b, turn_a, turn_b)
    return out


def accumulate_(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``total += a.T @ b`` for float32 ``total [N, K]`` and ``a [M, N]``, ``b [M, K]``, on CUDA."""
    _compute(a, b, total, turn_a=True, turn_b=False, onto=total)
    return total


@torch.library.custom_op("qwen2kit::linear", mutates_args=())
def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, onto: Tensor | None) -> Tensor:
    out = x.new_empty(len(x), len(weight))
    _compute(x, weight, out, turn_a=False, turn_b=True, bias=bias, onto=onto)
    return out


@torch.library.custom_op("qwen2kit::multiply", mutates_args=())
def _multiply(a: Tensor, b: Tensor, turn_a: bool, turn_b: bool) -> Tensor:
    out = a.new_empty(a.shape[1 if turn_a else 0], b.shape[0 if turn_b else 1])
    _compute(a, b, out, turn_a=turn_a, turn_b=turn_b)
    return out


@_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, onto: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


@_multiply.register_fake
def _(a: Tensor, b: Tensor, turn_a: bool, turn_b: bool) -> Tensor:
    return a.new_empty(a.shape[1 if turn_a else 0], b.shape[0 if turn_b else 1])


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, onto = inputs
    wants_x, wants_weight = ctx.needs_input_grad[:2]
    ctx.added = bias is not None, onto is not None
    ctx.save_for_backward(x if wants_weight else None, weight if wants_x else None)


def _backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    has_bias, has_onto = ctx.added
    slope = slope.contiguous()
    return (
        None if weight is None else _multiply(slope, weight, False, False),
        None if x is None else _multiply(slope, x, True, False),
        slope.sum(0) if has_bias else None,
        slope if has_onto else None,
    )


_linear.register_autograd(_backward, setup_context=_remember)


@dataclass(slots=True)
class _Way:
    """How a problem is computed: by ``algorithm`` of ``product``, or by PyTorch without one."""

    product: Product | None = None
    algorithm: bytes = b""
    seen: int = 0
    settled: bool = False


_ways: dict[tuple[int, Problem], _Way] = {}


def _compute(
    a: Tensor,
    b: Tensor,
    out: Tensor,
    *,
    turn_a: bool,
    turn_b: bool,
    bias: Tensor | None = None,
    onto: Tensor | None = None,
) -> None:
    """``out = a @ b + bias + onto``; ``onto`` may be ``out``."""
    inner = a.shape[0 if turn_a else 1]
    if not _tunable(a, out, inner):
        _by_torch(a, b, out, turn_a, turn_b, bias, onto)
        return
    a, b = a.contiguous(), b.contiguous()
    onto = None if onto is None else onto.contiguous()
    rows, columns = out.shape
    added = bias is not None, onto is not None
    problem = Problem(rows, columns, inner, turn_a, turn_b, a.dtype, out.dtype, *added)
    way = _ways.setdefault((out.device.index, problem), _Way())
    if not way.settled:
        _settle(way, problem, a, b, out, bias, onto)
    if way.product is None or not way.algorithm:
        _by_torch(a, b, out, turn_a, turn_b, bias, onto)
    else:
        way.product.run(way.algorithm, a, b, out, bias, onto)


def _tunable(a: Tensor, out: Tensor, inner: int) -> bool:
    return (
        a.is_cuda
        and a.dtype in (torch.bfloat16, torch.float16)
        and out.numel() * inner >= _WORTHWHILE
        and library() is not None
    )


def _settle(
    way: _Way,
    problem: Problem,
    a: Tensor,
    b: Tensor,
    out: Tensor,
    bias: Tensor | None,
    onto: Tensor | None,
) -> None:
    """Find ``way``'s algorithm: remembered, or measured once the problem has come up often."""
    way.seen += 1
    known = _remembered(out.device.index)
    choice = known.get(problem)
    if choice is None and (way.seen < _OFTEN or torch.cuda.is_current_stream_capturing()):
        return
    way.settled = True
    try:
        way.product = Product(problem)
        if choice is None:
            choice = known.settle(problem, _measured(way.product, problem, a, b, out, bias, onto))
        elif choice:
            # Once with somewhere else to write, so that a choice that no longer runs does no harm.
            scratch = torch.empty_like(out)
            way.product.run(choice, a, b, scratch, bias, onto)
        way.algorithm = choice
    except (CublasLtError, torch.OutOfMemoryError):
        way.product = None


def _measured(
    product: Product,
    problem: Problem,
    a: Tensor,
    b: Tensor,
    out: Tensor,
    bias: Tensor | None,
    onto: Tensor | None,
) -> bytes:
    scratch = torch.empty_like(out)
    added = scratch if onto is out else onto

    def by(algorithm: bytes) -> Callable[[], None]:
        return lambda: product.run(algorithm, a, b, scratch, bias, added)

    ways: dict[bytes, Callable[[], None]] = {}
    for algorithm in product.proposals(bias):
        try:
            product.run(algorithm, a, b, scratch, bias, added)
        except CublasLtError:
            continue
        ways[algorithm] = by(algorithm)
    # PyTorch would copy what a product is added to elsewhere.
    if onto is None or onto is out or not ways:
        ways[b""] = lambda: _by_torch(a, b, scratch, problem.turn_a, problem.turn_b, bias, added)
    return fastest(ways)


@cache
def _remembered(device: int) -> Remembered:
    return remembered(device)


def _by_torch(
    a: Tensor,
    b: Tensor,
    out: Tensor,
    turn_a: bool,
    turn_b: bool,
    bias: Tensor | None,
    onto: Tensor | None,
) -> None:
    a, b = a.t() if turn_a else a, b.t() if turn_b else b
    if onto is out:
        if a.dtype == out.dtype:
            out.addmm_(a, b)
        elif a.is_cuda:
            torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
        else:
            out.add_((a @ b).to(out.dtype))
        return
    if bias is not None:
        torch.addmm(bias, a, b, out=out)
        if onto is not None:
            out.add_(onto)
    elif onto is not None:
        torch.addmm(onto, a, b, out=out)
    else:
        torch.mm(a, b, out=out)
