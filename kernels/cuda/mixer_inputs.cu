// What the products and scans of a mixer take, in one launch: both convolutions of x, and the weights of
// both branches. Contract: vim/ops/cuda/bidirectional_mixer.py.
//
// Memory: T (x, convolved x, weights as returned), CW (weights of the convolutions), W (x_proj and
// dt_proj as given).

#include "causal_conv1d.cuh"
#include "mixer_weights.cuh"

template <int K, int V> __device__ constexpr int mixer_inputs_residents() {
  constexpr int most = fwd_residents<K, V, FORWARD | REVERSE>();
  return most > FEWER_BLOCKS ? most - FEWER_BLOCKS : 1;
}

template <typename T, typename CW, typename W, int K, int V>
__global__ void __launch_bounds__(LANES * ROWS,
                  mixer_inputs_residents<K, V>())
    mixer_inputs_kernel(
        const __grid_constant__ ConvForward conv, const __grid_constant__ MixerWeights weights) {
  const int conv_rows = gridDim.y - static_cast<int>(weights.block_rows);
  const int row = static_cast<int>(blockIdx.y) - conv_rows;
  if (row < 0) {
    causal_conv1d_forward<T, CW, K, V, FORWARD | REVERSE, true, false>(conv, conv_rows);
  } else {
    constexpr int THREADS = LANES * ROWS;
    const int thread = threadIdx.y * LANES + threadIdx.x;
    const int block = row * gridDim.x + blockIdx.x;
    prepare_weights<T, W>(
        weights, block * THREADS + thread,
        static_cast<int>(weights.block_rows) * gridDim.x * THREADS);
  }
}
