// What the mixer's kernels with products on the tensor cores share: tiles of 16-bit activations in
// shared memory, 64 channels wide, and products of their 16x16 parts.

#pragma once

#include "causal_conv1d.cuh"

constexpr int CHANNELS = 64;
constexpr int THREADS = 256;
constexpr int WARPS = THREADS / 32;
constexpr int VECTOR = 8;               // elements of 16 bits in an access
constexpr int PITCH = CHANNELS + VECTOR;  // an odd multiple of 16 bytes spreads the banks

__device__ constexpr int padded(int size) { return (size + 15) / 16 * 16; }

// Ask for COLUMNS elements of each row of a tile, 16 bytes at a time, by all threads of the block;
// rows outside [low, high) become zero.
template <int COLUMNS, int ROWS_, int ROW_PITCH, typename T>
__device__ __forceinline__ void ask_for(
    T (&to)[ROWS_][ROW_PITCH], const T* from, int stride, int low, int high, int thread) {
  constexpr int WIDTH = 16 / sizeof(T), ITEMS = COLUMNS / WIDTH;
#pragma unroll
  for (int start = 0; start < ROWS_ * ITEMS; start += THREADS) {
    const int i = start + thread;
    if (ROWS_ * ITEMS % THREADS != 0 && i >= ROWS_ * ITEMS) break;
    const int row = i / ITEMS, column = i % ITEMS * WIDTH;
    copy_async<16>(&to[row][column], from + row * stride + column, within(row, low, high));
  }
}

// Four 8x8 matrices of 16-bit elements, of which lane i gives the address of row i % 8 of matrix
// i / 8, and gets elements (i / 4, 2 (i % 4)) and the one beside it of each; TRANSPOSED: elements
// (2 (i % 4), i / 4) and the one below it.
template <bool TRANSPOSED>
__device__ __forceinline__ void load_matrices(unsigned (&words)[4], const void* row) {
  const unsigned from = static_cast<unsigned>(__cvta_generic_to_shared(row));
  if constexpr (TRANSPOSED) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(from)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(from)
                 : "memory");
  }
}

// d += a b for a of 16x16, b of 16x8. With g = lane / 4 and t = 2 (lane % 4), a lane gives a[0] of
// (row g, k t and t + 1), a[1] of (g + 8, t), a[2] of (g, t + 8), a[3] of (g + 8, t + 8); b0 of (k t
// and t + 1, column g), b1 of (t + 8, g); d is (row g, columns t and t + 1), then row g + 8.
__device__ __forceinline__ void multiply_add(
    __nv_bfloat16, float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void multiply_add(
    __half, float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
