"""Matrix products of training by the algorithm that measured fastest on this GPU.

Shapes: M rows (tokens), N outputs, K inputs. On other devices than CUDA, in float32, and for small
or rare products it is PyTorch's own product.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
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
    _compute(_Operands(a, b, total, turn_a=True, onto=total))
    return total


@torch.library.custom_op("qwen2kit::linear", mutates_args=())
def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, onto: Tensor | None) -> Tensor:
    out = x.new_empty(len(x), len(weight))
    _compute(_Operands(x, weight, out, turn_b=True, bias=bias, onto=onto))
    return out


@torch.library.custom_op("qwen2kit::multiply", mutates_args=())
def _multiply(a: Tensor, b: Tensor, turn_a: bool, turn_b: bool) -> Tensor:
    out = a.new_empty(a.shape[1 if turn_a else 0], b.shape[0 if turn_b else 1])
    _compute(_Operands(a, b, out, turn_a, turn_b))
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


@dataclass(frozen=True, slots=True)
class _Operands:
    """One product: ``out = a @ b + bias + onto``.

    Attributes:
        a, b: stored transposed where ``turn_a``, ``turn_b`` say so.
        out: ``[M, N]``.
        bias: ``[N]`` or None.
        onto: ``[M, N]`` in the dtype of ``out``, maybe ``out`` itself, or None.
    """

    a: Tensor
    b: Tensor
    out: Tensor
    turn_a: bool = False
    turn_b: bool = False
    bias: Tensor | None = None
    onto: Tensor | None = None

    @property
    def inner(self) -> int:
        """K."""
        return self.a.shape[0 if self.turn_a else 1]

    @property
    def problem(self) -> Problem:
        """What it is apart from the numbers."""
        rows, columns = self.out.shape
        added = self.bias is not None, self.onto is not None
        dtypes = self.a.dtype, self.out.dtype
        return Problem(rows, columns, self.inner, self.turn_a, self.turn_b, *dtypes, *added)

    @property
    def tunable(self) -> bool:
        """Whether its algorithm is worth choosing, and can be chosen."""
        return (
            self.a.is_cuda
            and self.a.dtype in (torch.bfloat16, torch.float16)
            and self.out.numel() * self.inner >= _WORTHWHILE
            and library() is not None
        )

    def contiguous(self) -> _Operands:
        """The same of operands that are contiguous."""
        a, b = self.a.contiguous(), self.b.contiguous()
        onto = None if self.onto is None else self.onto.contiguous()
        return _Operands(a, b, self.out, self.turn_a, self.turn_b, self.bias, onto)

    def elsewhere(self) -> _Operands:
        """The same into scratch memory, which it is added to if that was ``out``."""
        scratch = torch.empty_like(self.out)
        return replace(self, out=scratch, onto=scratch if self.onto is self.out else self.onto)

    def by(self, product: Product, algorithm: bytes) -> None:
        """Compute it by one of cuBLASLt's algorithms; operands are contiguous."""
        product.run(algorithm, self.a, self.b, self.out, self.bias, self.onto)

    def by_torch(self) -> None:
        """Compute it by PyTorch."""
        a = self.a.t() if self.turn_a else self.a
        b = self.b.t() if self.turn_b else self.b
        out, bias, onto = self.out, self.bias, self.onto
        if onto is out:
            if a.dtype == out.dtype:
                out.addmm_(a, b)
            elif a.is_cuda:
                torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
            else:
                out.add_((a @ b).to(out.dtype))
        elif bias is not None:
            torch.addmm(bias, a, b, out=out)
            if onto is not None:
                out.add_(onto)
        elif onto is not None:
            torch.addmm(onto, a, b, out=out)
        else:
            torch.mm(a, b, out=out)


@dataclass(slots=True)
class _Way:
    """How a problem is computed: by ``algorithm`` of ``product``, or by PyTorch without one."""

    product: Product | None = None
    algorithm: bytes = b""
    seen: int = 0
    settled: bool = False


_ways: dict[tuple[int, Problem], _Way] = {}


def _compute(given: _Operands) -> None:
    if not given.tunable:
        given.by_torch()
        return
    given = given.contiguous()
    problem = given.problem
    way = _ways.setdefault((given.out.device.index, problem), _Way())
    if not way.settled:
        _settle(way, problem, given)
    if way.product is None or not way.algorithm:
        given.by_torch()
    else:
        given.by(way.product, way.algorithm)


def _settle(way: _Way, problem: Problem, given: _Operands) -> None:
    """Find ``way``'s algorithm: remembered, or measured once the problem has come up often."""
    way.seen += 1
    known = _remembered(given.out.device.index)
    choice = known.get(problem)
    if choice is None and (way.seen < _OFTEN or torch.cuda.is_current_stream_capturing()):
        return
    way.settled = True
    try:
        way.product = Product(problem)
        if choice is None:
            choice = known.settle(problem, _measured(way.product, given))
        elif choice:
            # Once with somewhere else to write, so that a choice that no longer runs does no harm.
            given.elsewhere().by(way.product, choice)
        way.algorithm = choice
    except (CublasLtError, torch.OutOfMemoryError):
        way.product = None


def _measured(product: Product, given: _Operands) -> bytes:
    tried = given.elsewhere()
    ways: dict[bytes, Callable[[], None]] = {}
    for algorithm in product.proposals(tried.bias):
        try:
            tried.by(product, algorithm)
        except CublasLtError:
            continue
        ways[algorithm] = partial(tried.by, product, algorithm)
    # PyTorch would copy what a product is added to elsewhere.
    if tried.onto is None or tried.onto is tried.out or not ways:
        ways[b""] = tried.by_torch
    return fastest(ways)


@cache
def _remembered(device: int) -> Remembered:
    return remembered(device)
