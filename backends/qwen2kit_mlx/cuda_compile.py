"""CUDA C++ to machine code by NVRTC, which MLX's CUDA build brings along.

MLX compiles custom kernels itself (`mx.fast.cuda_kernel`), but puts headers in front of them that
take NVRTC more than a second in every process; code that includes nothing takes a few tenths.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from functools import cache
from typing import Any

NAMES = ("libnvrtc.so.13", "libnvrtc.so.12")  # of CUDA 13 and 12


class CompileError(Exception):
    """NVRTC is not there or does not take the code; the message is one line."""


def cubin(source: str, architecture: str, macros: Mapping[str, str]) -> bytes:
    """Machine code of ``source`` for one kind of GPU, such as ``sm_90``; compiled once a process.

    Raises:
        CompileError: see there.
    """
    return _compiled(source, architecture, tuple(macros.items()))


@cache
def _compiled(source: str, architecture: str, macros: tuple[tuple[str, str], ...]) -> bytes:
    nvrtc = _library()
    program = ctypes.c_void_p()
    code = source.encode()
    _check(nvrtc, nvrtc.nvrtcCreateProgram(ctypes.byref(program), code, b"k.cu", 0, None, None))
    try:
        options = [f"--gpu-architecture={architecture}"]
        options += [f"--define-macro={name}={value}" for name, value in macros]
        given = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        if nvrtc.nvrtcCompileProgram(program, len(options), given):
            lines = _read(nvrtc, "ProgramLog", program).decode(errors="replace").split("\n")
            wrong = next((line for line in lines if "error" in line), lines[0])
            raise CompileError(f"NVRTC: {wrong.strip(chr(0))}")
        return _read(nvrtc, "CUBIN", program)
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _read(nvrtc: ctypes.CDLL, what: str, program: ctypes.c_void_p) -> bytes:
    size = ctypes.c_size_t()
    _check(nvrtc, getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    _check(nvrtc, getattr(nvrtc, f"nvrtcGet{what}")(program, buffer))
    return buffer.raw


def _check(nvrtc: ctypes.CDLL, code: Any) -> None:
    if code:
        raise CompileError(f"NVRTC: {nvrtc.nvrtcGetErrorString(code).decode()}")


@cache
def _library() -> ctypes.CDLL:
    """The one that MLX has loaded, which is why the name alone finds it."""
    for name in NAMES:
        try:
            nvrtc = ctypes.CDLL(name)
        except OSError:
            continue
        nvrtc.nvrtcGetErrorString.restype = ctypes.c_char_p
        return nvrtc
    raise CompileError(f"none of {', '.join(NAMES)} can be loaded")
