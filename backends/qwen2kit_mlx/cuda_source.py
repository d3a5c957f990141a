"""CUDA C++ of the product with packed weights (see `cuda_products`).

`PRIMITIVES` is what needs a GPU: loads, packed arithmetic and the tensor-core product. `PRODUCT`
is plain C++ on top of it, so that a test can run it on a CPU. Neither includes a header, which is
what makes compiling them a matter of a tenth of a second.

Defined from outside: ``NAME``; ``BITS`` 4 or 8; ``GROUP`` 32, 64 or 128; ``BF16`` 1 or 0 (float16);
``TILES`` blocks of 8 tokens; ``ROWS`` blocks of 16 outputs; ``WARPS`` that share the inputs of a
thread block; ``AHEAD`` chunks a warp loads before it multiplies; ``PAIRED`` 1 if the weight is a
gate above an up projection and SwiGLU of both is wanted, else 0; ``BLOCKS`` thread blocks that
registers must be left for on a multiprocessor.
"""

from __future__ import annotations

from typing import Final

PRIMITIVES: Final = r"""
typedef unsigned int u32;
typedef unsigned short u16;

__device__ __forceinline__ uint4 load_once(const uint4* from) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from));
  return v;
}
__device__ __forceinline__ uint4 load_often(const uint4* from) { return __ldg(from); }
__device__ __forceinline__ u32 load_half(const u16* from) { return __ldg(from); }

/* What the compiler must keep in a register: an instruction takes one constant only. */
__device__ __forceinline__ u32 kept(u32 value) {
  u32 v;
  asm("mov.b32 %0, %1;" : "=r"(v) : "r"(value));
  return v;
}
__device__ __forceinline__ u32 and_or(u32 a, u32 b, u32 c) {
  u32 d;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

__device__ __forceinline__ u32 bytes(u32 a, u32 b, u32 which) { return __byte_perm(a, b, which); }
__device__ __forceinline__ float as_float(u32 bits) { return __uint_as_float(bits); }

#if BF16
__device__ __forceinline__ u32 fma2(u32 a, u32 b, u32 c) {
  u32 d;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}
__device__ __forceinline__ u32 pack2(float low, float high) {
  u32 d;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}
__device__ __forceinline__ float widen(u16 h) { return __uint_as_float((u32)h << 16); }
__device__ __forceinline__ u16 narrow(float f) {
  u16 h;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(h) : "f"(f));
  return h;
}
#define MMA "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
#else
__device__ __forceinline__ u32 fma2(u32 a, u32 b, u32 c) {
  u32 d;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}
__device__ __forceinline__ float widen(u16 h) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
  return f;
}
__device__ __forceinline__ u16 narrow(float f) {
  u16 h;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f));
  return h;
}
#define MMA "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"
#endif

__device__ __forceinline__ void multiply_add(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm(MMA " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
"""

PRODUCT: Final = r"""
#if BF16
#define SMALL 0x43004300u  /* 128: a nibble in the lowest bits adds its value */
#define MINUS_SMALL 0xC300C300u
#define ONE 0x3F803F80u
#else
#define SMALL 0x64006400u  /* 1024: so does a byte */
#define MINUS_SMALL 0xE400E400u
#define ONE 0x3C003C00u
#endif
#define CHUNK (512 / BITS)    /* inputs that four threads read of a row with one load each */
#define PIECE (128 / BITS)    /* inputs of one thread among them: within one group */
#define STRIDE (WARPS * CHUNK / GROUP)  /* groups from one of a warp's chunks to its next */
#define TOKENS (8 * TILES)
#define SUMS (16 * ROWS)
#define OUTPUTS (PAIRED ? SUMS / 2 : SUMS)
#define PITCH (SUMS + 4)      /* without bank conflicts */

/* Eight weights, the j-th of a piece, in pairs: 4 bits (0,4) (1,5) (2,6) (3,7); 8 bits in order. */
__device__ __forceinline__ void unpack(const uint4& piece, int j, u32 small, u32 scale, u32 bias,
                                       u32 (&out)[4]) {
  const u32 words[4] = {piece.x, piece.y, piece.z, piece.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#if BITS == 4
    u32 whole = fma2(and_or(words[j] >> (4 * i), 0x000F000Fu, small), ONE, MINUS_SMALL);
#else
    u32 word = words[2 * j + i / 2];
#if BF16  /* 2**23 + byte in float32: bfloat16 is too narrow for the trick */
    float low = as_float(bytes(word, 0x4B000000u, 0x7440u + 2 * (i % 2))) - 8388608.0f;
    float high = as_float(bytes(word, 0x4B000000u, 0x7441u + 2 * (i % 2))) - 8388608.0f;
    u32 whole = pack2(low, high);
#else
    u32 whole = fma2(bytes(word, 0x64646464u, i % 2 ? 0x4342u : 0x4140u), ONE, MINUS_SMALL);
#endif
#endif
    out[i] = fma2(whole, scale, bias);
  }
}

/* out[M, N] = x[M, K] @ w[N, K].T (+ bias[N]) (+ onto[M, N]); if PAIRED, w is [2 N, K] and
   out = silu(x @ w[:N].T) * (x @ w[N:].T).

   A thread block computes OUTPUTS columns of TOKENS rows. Its warps take every WARPS-th chunk of
   the inputs each and add up through shared memory in a fixed order: a row's result depends
   neither on the other rows nor on TILES or ROWS. Weights are the left operand of the tensor cores
   (rows g, g + 8 of thread 4 g + t), tokens the right one (column g); which of the 16 inputs of
   one product stands where is free as long as both sides agree. */
extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS) NAME(
    const u16* x, const u32* w, const u16* scales, const u16* biases, const u16* bias,
    const u16* onto, u16* out, int M, int N, int K, int has_bias, int has_onto) {
  __shared__ float part[WARPS * TOKENS * PITCH];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
  const int first_n = blockIdx.x * OUTPUTS, first_m = blockIdx.y * TOKENS;
  const int chunks = K / CHUNK, groups = K / GROUP;

  const u32 small = kept(SMALL);
  const uint4* weights[ROWS][2];  /* of this warp's first chunk, moved on with it */
  const u16 *scale_of[ROWS][2], *shift_of[ROWS][2];
#pragma unroll
  for (int r = 0; r < ROWS; ++r)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#if PAIRED  /* the upper half of a tile is gate, the lower one up */
      int n = min(first_n + 8 * r + g, N - 1) + h * N;
#else
      int n = min(first_n + 16 * r + 8 * h + g, N - 1);
#endif
      int group = (warp * CHUNK + t * PIECE) / GROUP;
      weights[r][h] = (const uint4*)(w + (unsigned long long)n * (K * BITS / 32)) + warp * 4 + t;
      scale_of[r][h] = scales + (unsigned long long)n * groups + group;
      shift_of[r][h] = biases + (unsigned long long)n * groups + group;
    }
  const uint4* tokens[TILES];  /* beyond the last row that row again: nothing reads those sums */
#pragma unroll
  for (int i = 0; i < TILES; ++i) {
    unsigned long long m = min(first_m + 8 * i + g, M - 1);
    tokens[i] = (const uint4*)(x + m * K + warp * CHUNK + t * PIECE);
  }

  float sum[ROWS][TILES][4];
#pragma unroll
  for (int r = 0; r < ROWS; ++r)
#pragma unroll
    for (int i = 0; i < TILES; ++i)
#pragma unroll
      for (int e = 0; e < 4; ++e) sum[r][i][e] = 0.0f;

  for (int start = warp; start < chunks; start += WARPS * AHEAD) {
    uint4 packed[AHEAD][ROWS][2];
    u32 scale[AHEAD][ROWS][2], shift[AHEAD][ROWS][2];
#pragma unroll
    for (int a = 0; a < AHEAD; ++a) {
      int chunk = start + a * WARPS;
      if (chunk < chunks) {
#pragma unroll
        for (int r = 0; r < ROWS; ++r)
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            packed[a][r][h] = load_once(weights[r][h] + a * WARPS * 4);
            scale[a][r][h] = load_half(scale_of[r][h] + a * STRIDE);
            shift[a][r][h] = load_half(shift_of[r][h] + a * STRIDE);
          }
      }
    }
#pragma unroll
    for (int a = 0; a < AHEAD; ++a) {
      int chunk = start + a * WARPS;
      if (chunk >= chunks) break;
#pragma unroll
      for (int j = 0; j < PIECE / 8; ++j) {  /* eight inputs of this thread, of every token */
        u32 right[TILES][4];
#pragma unroll
        for (int i = 0; i < TILES; ++i) {
          uint4 v = load_often(tokens[i] + a * WARPS * (CHUNK / 8) + j);
#if BITS == 4
          right[i][0] = bytes(v.x, v.z, 0x5410), right[i][1] = bytes(v.x, v.z, 0x7632);
          right[i][2] = bytes(v.y, v.w, 0x5410), right[i][3] = bytes(v.y, v.w, 0x7632);
#else
          right[i][0] = v.x, right[i][1] = v.y, right[i][2] = v.z, right[i][3] = v.w;
#endif
        }
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
          u32 up[4], low[4];
          unpack(packed[a][r][0], j, small, bytes(scale[a][r][0], 0, 0x1010),
                 bytes(shift[a][r][0], 0, 0x1010), up);
          unpack(packed[a][r][1], j, small, bytes(scale[a][r][1], 0, 0x1010),
                 bytes(shift[a][r][1], 0, 0x1010), low);
#pragma unroll
          for (int p = 0; p < 4; p += 2) {
            const u32 left[4] = {up[p], low[p], up[p + 1], low[p + 1]};
#pragma unroll
            for (int i = 0; i < TILES; ++i)
              multiply_add(sum[r][i], left, right[i][p], right[i][p + 1]);
          }
        }
      }
    }
#pragma unroll
    for (int r = 0; r < ROWS; ++r)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        weights[r][h] += AHEAD * WARPS * 4;
        scale_of[r][h] += AHEAD * STRIDE, shift_of[r][h] += AHEAD * STRIDE;
      }
#pragma unroll
    for (int i = 0; i < TILES; ++i) tokens[i] += AHEAD * WARPS * (CHUNK / 8);
  }

#pragma unroll
  for (int r = 0; r < ROWS; ++r)
#pragma unroll
    for (int i = 0; i < TILES; ++i)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        int m = 8 * i + 2 * t + (e & 1), n = 16 * r + g + 8 * (e >> 1);
        part[(warp * TOKENS + m) * PITCH + n] = sum[r][i][e];
      }
  __syncthreads();
  const int count = min(TOKENS, M - first_m) * OUTPUTS;
  for (int i = threadIdx.x; i < count; i += 32 * WARPS) {
    int m = i / OUTPUTS, n = i % OUTPUTS;
    if (first_n + n >= N) continue;
    const float* own = part + m * PITCH + (PAIRED ? 16 * (n / 8) + n % 8 : n);
    float total = 0.0f;
#pragma unroll
    for (int k = 0; k < WARPS; ++k) total += own[k * TOKENS * PITCH];
#if PAIRED
    float up = 0.0f;
#pragma unroll
    for (int k = 0; k < WARPS; ++k) up += own[k * TOKENS * PITCH + 8];
    total = total / (1.0f + expf(-total)) * up;
#endif
    unsigned long long place = (unsigned long long)(first_m + m) * N + first_n + n;
    if (has_bias) total += widen(bias[first_n + n]);
    if (has_onto) total += widen(onto[place]);
    out[place] = narrow(total);
  }
}
"""
