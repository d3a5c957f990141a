"""cuBLASLt's matrix product with an algorithm of the caller's choice, by ctypes.

PyTorch takes the first algorithm that cuBLAS proposes. Its other proposals are up to 20 % faster
for some of a decoder's shapes, and only cuBLASLt's own interface names them. The library is the
one that PyTorch has loaded. Constants are those of ``cublasLt.h`` (CUDA 12 and 13).
"""

from __future__ import annotations

import ctypes
from ctypes import byref, c_float, c_int, c_int32, c_int64, c_size_t, c_uint32, c_uint64, c_void_p
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

import torch
from torch import Tensor

_COMPUTE_32F: Final = 68
_TYPES: Final = {torch.float32: 0, torch.float16: 2, torch.bfloat16: 14}
_TURN_A, _TURN_B, _EPILOGUE, _BIAS_POINTER = 3, 4, 7, 8
_EPILOGUE_BIAS: Final = 4
_MAX_WORKSPACE, _REDUCTIONS = 1, 3
_REDUCE_IN_FLOAT32: Final = 2
_WORKSPACE_BYTES: Final = 64 << 20
_MOST_PROPOSALS: Final = 64


@dataclass(frozen=True, slots=True)
class Problem:
    """``A [rows, inner] @ B [inner, columns]``, all of them contiguous in memory.

    Attributes:
        rows, columns, inner: sizes of the product.
        turn_a, turn_b: whether the operand is stored transposed.
        dtype: of A, B and the bias.
        out_dtype: of the result.
        bias: whether a vector ``[columns]`` is added.
        onto: whether a matrix ``[rows, columns]`` is added, in the result's dtype.
    """

    rows: int
    columns: int
    inner: int
    turn_a: bool
    turn_b: bool
    dtype: torch.dtype
    out_dtype: torch.dtype
    bias: bool
    onto: bool


class _Algorithm(ctypes.Structure):
    _fields_ = (("data", c_uint64 * 8),)


class _Proposal(ctypes.Structure):
    _fields_ = (
        ("algorithm", _Algorithm),
        ("workspace", c_size_t),
        ("status", c_int),
        ("waves", c_float),
        ("reserved", c_int * 4),
    )


class CublasLtError(RuntimeError):
    """A call of cuBLASLt did not succeed; the message has its status."""


@cache
def library() -> ctypes.CDLL | None:
    """The library that PyTorch uses, or None where there is none (no CUDA build)."""
    if torch.version.cuda is None:
        return None
    try:
        return ctypes.CDLL(f"libcublasLt.so.{torch.version.cuda.split('.')[0]}")
    except OSError:
        return None


@cache
def version() -> int:
    """Of the library: algorithms are valid for one version only."""
    found = library()
    if found is None:
        return 0
    found.cublasLtGetVersion.restype = c_size_t
    return int(found.cublasLtGetVersion())


class Product:
    """One problem on the current device, ready to be computed again and again.

    cuBLASLt is column-major: it computes the transposed result from the operands in exchanged
    roles, so that nothing is moved.

    Raises:
        CublasLtError: the library does not take the problem.
    """

    def __init__(self, problem: Problem) -> None:
        found = library()
        if found is None:
            raise CublasLtError("there is no cuBLASLt")
        self._lib = found
        self._handle = _handle(torch.cuda.current_device())
        self._desc = self._made("cublasLtMatmulDescCreate", c_int(_COMPUTE_32F), c_int(0))
        self._set(_TURN_A, c_int32(problem.turn_b))
        self._set(_TURN_B, c_int32(problem.turn_a))
        if problem.bias:
            self._set(_EPILOGUE, c_int32(_EPILOGUE_BIAS))
        rows, columns, inner = problem.rows, problem.columns, problem.inner
        first = (inner, columns) if problem.turn_b else (columns, inner)
        second = (rows, inner) if problem.turn_a else (inner, rows)
        self._first = self._layout(problem.dtype, *first)
        self._second = self._layout(problem.dtype, *second)
        self._out = self._layout(problem.out_dtype, columns, rows)
        self._one, self._share = c_float(1.0), c_float(float(problem.onto))

    def proposals(self, bias: Tensor | None) -> list[bytes]:
        """Algorithms, cuBLASLt's favourite first, which `run` takes; sums are kept in float32."""
        if bias is not None:
            self._set(_BIAS_POINTER, c_void_p(bias.data_ptr()))
        wishes = self._made("cublasLtMatmulPreferenceCreate")
        for attribute, value in (
            (_MAX_WORKSPACE, c_uint64(_WORKSPACE_BYTES)),
            (_REDUCTIONS, c_uint32(_REDUCE_IN_FLOAT32)),
        ):
            self._call(
                "cublasLtMatmulPreferenceSetAttribute",
                wishes,
                c_int(attribute),
                byref(value),
                c_size_t(ctypes.sizeof(value)),
            )
        found, count = (_Proposal * _MOST_PROPOSALS)(), c_int()
        layouts = (self._first, self._second, self._out, self._out)
        try:
            self._call(
                "cublasLtMatmulAlgoGetHeuristic",
                *(self._handle, self._desc, *layouts, wishes, c_int(_MOST_PROPOSALS)),
                *(found, byref(count)),
            )
        finally:
            self._lib.cublasLtMatmulPreferenceDestroy(wishes)
        return [bytes(p.algorithm) for p in found[: count.value] if p.status == 0]

    def run(
        self,
        algorithm: bytes,
        a: Tensor,
        b: Tensor,
        out: Tensor,
        bias: Tensor | None = None,
        onto: Tensor | None = None,
    ) -> None:
        """Compute into ``out`` on the current stream; ``onto`` may be ``out`` itself."""
        if bias is not None:
            self._set(_BIAS_POINTER, c_void_p(bias.data_ptr()))
        stream = torch.cuda.current_stream(out.device).cuda_stream
        result = c_void_p(out.data_ptr())
        self._call(
            "cublasLtMatmul",
            *(self._handle, self._desc, byref(self._one)),
            *(c_void_p(b.data_ptr()), self._first, c_void_p(a.data_ptr()), self._second),
            byref(self._share),
            *(result if onto is None else c_void_p(onto.data_ptr()), self._out),
            *(result, self._out, byref(_Algorithm.from_buffer_copy(algorithm))),
            *(_workspace(out.device, stream), c_size_t(_WORKSPACE_BYTES), c_void_p(stream)),
        )

    def _layout(self, dtype: torch.dtype, rows: int, columns: int) -> c_void_p:
        return self._made(
            "cublasLtMatrixLayoutCreate",
            *(c_int(_TYPES[dtype]), c_uint64(rows), c_uint64(columns), c_int64(rows)),
        )

    def _set(self, attribute: int, value: Any) -> None:
        self._call(
            "cublasLtMatmulDescSetAttribute",
            *(self._desc, c_int(attribute), byref(value), c_size_t(ctypes.sizeof(value))),
        )

    def _made(self, name: str, *arguments: Any) -> c_void_p:
        thing = c_void_p()
        self._call(name, byref(thing), *arguments)
        return thing

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._lib, name)(*arguments)
        if status:
            raise CublasLtError(f"{name} gave status {status}")


@cache
def _handle(device: int) -> c_void_p:
    found = library()
    assert found is not None
    handle = c_void_p()
    with torch.cuda.device(device):
        status = found.cublasLtCreate(byref(handle))
    if status:
        raise CublasLtError(f"cublasLtCreate gave status {status}")
    return handle


_workspaces: dict[tuple[torch.device, int], Tensor] = {}


def _workspace(device: torch.device, stream: int) -> c_void_p:
    """Scratch memory; products of one stream come after each other and share it."""
    found = _workspaces.get((device, stream))
    if found is None:
        found = torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        _workspaces[device, stream] = found
    return c_void_p(found.data_ptr())
