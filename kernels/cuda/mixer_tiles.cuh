// What the mixer's kernels with products on the tensor cores share: tiles of 16-bit activations in
// shared memory, 64 channels wide.

#pragma once

#include "causal_conv1d.cuh"
#include "tensor_cores.cuh"

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
