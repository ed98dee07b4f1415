// The weights of both branches of a mixer as its products and scans take them: stacked, in their dtypes,
// with A = -exp(A_log), and with dt_rank rounded up to a multiple of eight by zeros, since products of
// rows that are not 16 bytes apart take twice as long.

#pragma once

#include "common.cuh"

struct MixerWeights {
  const void* x_proj[2];    // (R + 2 N, D), by direction
  const void* dt_proj[2];   // (D, R)
  const float* A_log[2];    // (D, N)
  const float* D[2];        // (D,)
  const float* dt_bias[2];  // (D,)
  void* x_proj_out;         // (2, P + 2 N, D), P the padded rank; rows R to P are zero
  void* dt_proj_out;        // (2, D, P); columns R to P are zero
  float *A, *D_out, *dt_bias_out;  // (2, D, N), (2, D), (2, D)
  int64 channels, states, rank, padded_rank;
  int64 block_rows;  // rows of blocks, the last of the grid, that see to the weights
};

template <typename T, typename W>
__device__ __forceinline__ void prepare_weights(const MixerWeights& p, int first, int step) {
  const int channels = p.channels, states = p.states, rank = p.rank, padded = p.padded_rank;
  const int x_proj = (padded + 2 * states) * channels, dt_proj = channels * padded;
  const int decays = channels * states, all = x_proj + dt_proj + decays + channels;
  for (int i = first; i < 2 * all; i += step) {
    const int direction = i >= all;
    int at = i - direction * all;
    if (at < x_proj) {
      const int row = at / channels, column = at % channels;
      const int from = row < rank ? row : row - (padded - rank);
      const bool given = row < rank || row >= padded;
      const W* weight = static_cast<const W*>(p.x_proj[direction]);
      static_cast<T*>(p.x_proj_out)[direction * x_proj + at] =
          from_float<T>(given ? to_float(weight[from * channels + column]) : 0.0f);
    } else if ((at -= x_proj) < dt_proj) {
      const int row = at / padded, column = at % padded;
      const W* weight = static_cast<const W*>(p.dt_proj[direction]);
      static_cast<T*>(p.dt_proj_out)[direction * dt_proj + at] =
          from_float<T>(column < rank ? to_float(weight[row * rank + column]) : 0.0f);
    } else if ((at -= dt_proj) < decays) {
      p.A[direction * decays + at] = -expf(p.A_log[direction][at]);
    } else {
      at -= decays;
      p.D_out[direction * channels + at] = p.D[direction][at];
      p.dt_bias_out[direction * channels + at] = p.dt_bias[direction][at];
    }
  }
}
