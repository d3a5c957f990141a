"""Runs the CUDA product with packed weights on a CPU: its C++ as it is, one thread per lane, and
in place of `PRIMITIVES` code that does the same to the letter of the instructions' definitions."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qwen2kit_mlx.cuda_source import PRODUCT

COMPILER = shutil.which("g++") or shutil.which("clang++")
Halves = NDArray[np.uint16]

_BEFORE = r"""
#include <algorithm>
#include <barrier>
#include <cmath>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>
typedef unsigned int u32;
typedef unsigned short u16;
struct uint4 { u32 x, y, z, w; };
static uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
struct dim { int x, y; };
static thread_local dim threadIdx, blockIdx;
static std::unique_ptr<std::barrier<>> block_barrier, warp_barrier[32];
#define __device__ static
#define __global__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)
#define min std::min
static void __syncthreads() { block_barrier->arrive_and_wait(); }

static float as_float(u32 bits) { float f; std::memcpy(&f, &bits, 4); return f; }
static u32 as_bits(float f) { u32 b; std::memcpy(&b, &f, 4); return b; }
static uint4 load_once(const uint4* from) { return *from; }
static uint4 load_often(const uint4* from) { return *from; }
static u32 load_half(const u16* from) { return *from; }
static u32 kept(u32 value) { return value; }
static u32 and_or(u32 a, u32 b, u32 c) { return (a & b) | c; }
static u32 bytes(u32 a, u32 b, u32 which) {
  unsigned long long all = (unsigned long long)b << 32 | a;
  u32 out = 0;
  for (int i = 0; i < 4; ++i) out |= (u32)(all >> (8 * (which >> (4 * i) & 7)) & 255) << (8 * i);
  return out;
}
#if BF16
static float widen(u16 h) { return as_float((u32)h << 16); }
static u16 narrow(double d) {  // to nearest, ties to even, from the exact value
  float f = (float)d;
  u32 b = as_bits(f), low = b & 0xFFFF;
  double exact = d, down = as_float(b & 0xFFFF0000u), up = as_float((b & 0xFFFF0000u) + 0x10000u);
  if (low == 0 && (double)f == exact) return b >> 16;
  double to_down = std::fabs(exact - down), to_up = std::fabs(up - exact);
  bool odd = b >> 16 & 1;
  return (b >> 16) + (to_up < to_down || (to_up == to_down && odd));
}
static u32 pack2(float low, float high) { return (u32)narrow(high) << 16 | narrow(low); }
#else
static float widen(u16 h) { _Float16 f; std::memcpy(&f, &h, 2); return (float)f; }
static u16 narrow(double d) { _Float16 f = (_Float16)d; u16 h; std::memcpy(&h, &f, 2); return h; }
#endif
static u32 fma2(u32 a, u32 b, u32 c) {
  u32 out = 0;
  for (int s = 0; s < 32; s += 16)
    out |= (u32)narrow((double)widen(a >> s) * widen(b >> s) + widen(c >> s)) << s;
  return out;
}
static u32 lefts[32][32][4], rights[32][32][2];
static void multiply_add(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane / 4, t = lane % 4;
  std::memcpy(lefts[warp][lane], a, 16);
  rights[warp][lane][0] = b0, rights[warp][lane][1] = b1;
  warp_barrier[warp]->arrive_and_wait();
  for (int e = 0; e < 4; ++e) {
    int row = g + 8 * (e / 2), column = 2 * t + e % 2;
    double total = d[e];
    for (int k = 0; k < 16; ++k) {
      u32 left = lefts[warp][row % 8 * 4 + k % 8 / 2][row / 8 + 2 * (k / 8)];
      u32 right = rights[warp][column * 4 + k % 8 / 2][k / 8];
      int s = 16 * (k % 2);
      total += (double)widen(left >> s) * widen(right >> s);
    }
    d[e] = (float)total;
  }
  warp_barrier[warp]->arrive_and_wait();
}
#define NAME product
"""

_AFTER = r"""
#undef min
extern "C" void run(const u16* x, const u32* w, const u16* s, const u16* b, const u16* bias,
                    const u16* onto, u16* out, int M, int N, int K) {
  for (int by = 0; by < (M + TOKENS - 1) / TOKENS; ++by)
    for (int bx = 0; bx < (N + OUTPUTS - 1) / OUTPUTS; ++bx) {
      block_barrier = std::make_unique<std::barrier<>>(32 * WARPS);
      for (int i = 0; i < WARPS; ++i) warp_barrier[i] = std::make_unique<std::barrier<>>(32);
      std::vector<std::thread> lanes;
      for (int i = 0; i < 32 * WARPS; ++i)
        lanes.emplace_back([=] {
          threadIdx = {i, 0}, blockIdx = {bx, by};
          int has_bias = bias != nullptr, has_onto = onto != nullptr;
          product(x, w, s, b, bias, onto, out, M, N, K, has_bias, has_onto);
        });
      for (auto& lane : lanes) lane.join();
    }
}
"""


class OnCPU:
    """The product, compiled.

    Args:
        folder: where to compile.
        macros: see `qwen2kit_mlx.cuda_source`.
    """

    def __init__(self, folder: Path, macros: dict[str, int]) -> None:
        assert COMPILER is not None
        source, library = folder / "product.cpp", folder / "product.so"
        source.write_text(_BEFORE + PRODUCT + _AFTER)
        defines = [f"-D{name}={value}" for name, value in macros.items()]
        options = ["-O1", "-std=c++20", "-shared", "-fPIC", "-pthread", "-w"]
        subprocess.run([COMPILER, *options, *defines, source, "-o", library], check=True)
        self._run = ctypes.CDLL(str(library)).run
        self._parts = 1 + macros["PAIRED"]

    def __call__(
        self,
        x: Halves,
        weight: tuple[NDArray[np.uint32], Halves, Halves],
        bias: Halves | None = None,
        onto: Halves | None = None,
    ) -> Halves:
        """``[M, N]``; 16-bit floats as their bits."""
        out = np.zeros((len(x), len(weight[0]) // self._parts), dtype=np.uint16)
        arrays = [x, *weight, bias, onto, out]
        held = [None if array is None else np.ascontiguousarray(array) for array in arrays]
        held[-1] = out
        pointers = [None if a is None else ctypes.c_void_p(a.ctypes.data) for a in held]
        sizes = [ctypes.c_int(n) for n in (*out.shape, x.shape[1])]
        self._run(*pointers, *sizes)
        return out
