// The short causal depthwise convolution, channels-last: the forward, and what the backward shares
// with it. Contract: vim/ops/causal_conv1d.py.
//
//     y_t = act(bias + sum_k w_k x_{t - (K-1) + k})        forward in time
//     y_t = act(bias + sum_k w_k x_{t + (K-1) - k})        reverse
//
// A thread owns V neighbouring channels of a segment of tokens and slides a window of K tokens over
// it in registers, so x is read once (and K - 1 tokens of each neighbour's). The window that ends at
// token t serves the forward convolution at t and the reverse one at t - (K-1): DIRECTIONS is a mask
// of FORWARD and REVERSE, and both are computed for one reading of x. Loads run one batch of tokens
// ahead of the arithmetic. A block is LANES groups of channels by ROWS segments.
//
// Memory: T (x, y, states), W (weight, bias). Everything between is float.

#pragma once

#include "common.cuh"

constexpr int FORWARD = 1;
constexpr int REVERSE = 2;

constexpr int LANES = 16;  // neighbouring groups of channels in a block
constexpr int ROWS = 8;    // segments in a block

// Tokens loaded together: with a multiple of K, sliding the window moves no registers.
template <int K> __device__ constexpr int batch_of_tokens() {
  return K == 3 ? 3 : 4;
}

// Whether first <= t < stop, in one comparison; `stop` must not be below `first`.
__device__ __forceinline__ bool within(int t, int first, int stop) {
  return static_cast<unsigned>(t - first) < static_cast<unsigned>(stop - first);
}

// V values at `p`, or zeros, without reading.
template <int V, typename T> __device__ __forceinline__ Raw<T, V> load_if(bool there, const T* p) {
  Raw<T, V> raw = zero_raw<T, V>();
  if (there) raw = load_raw<V>(p);
  return raw;
}

// The inputs of one sequence at a thread's channels, and what lies beyond its ends: the initial
// state before the token scanned first, laid out in the order of the scan, and else zeros.
template <typename T, int K, int DIRECTIONS, bool STATES> struct Inputs {
  const T* x;
  const T* initial;
  int64 token_stride, channels;
  int length;

  __device__ __forceinline__ Inputs(
      const void* x, const void* initial, int64 item, int64 channel, int64 batch_stride,
      int64 token_stride, int64 channels, int length)
      : x(static_cast<const T*>(x) + item * batch_stride + channel),
        initial(static_cast<const T*>(initial)),
        token_stride(token_stride),
        channels(channels),
        length(length) {
    if (STATES && initial != nullptr) this->initial += item * (K - 1) * channels + channel;
  }

  __device__ __forceinline__ const T* at(int t) const { return x + t * token_stride; }

  // The input at token t, which lies at `p` if it is in the sequence; zeros from `last` on.
  template <int V> __device__ __forceinline__ Raw<T, V> load(const T* p, int t, int last) const {
    if constexpr (STATES) {
      if (initial != nullptr && t < last && !within(t, 0, length)) {
        const int index = DIRECTIONS == FORWARD ? K - 1 + t : K - 2 - (t - length);
        return load_if<V>(within(index, 0, K - 1), initial + index * channels);
      }
    }
    return load_if<V>(within(t, 0, min(last, length)), p);
  }
};

struct ConvForward {
  const void* x;
  const void* weight[2];      // (D, K) contiguous, by direction; one direction: the first
  const void* bias[2];        // (D,) or null
  const void* initial_state;  // (B, K-1, D) contiguous or null; one direction only
  void* y;                    // (directions, B, L, D) contiguous
  void* final_state;          // (B, K-1, D) contiguous or null; one direction only
  int64 batch, length, channels;
  int64 x_batch_stride, x_token_stride;
  int64 tokens, segments;  // tokens a thread, threads a sequence
};

// The weights and, behind them, the bias of a thread's channels, through shared memory: as they lie
// in memory, K values a channel, a warp would touch as many lines as it has threads.
template <typename W, int K, int V>
__device__ __forceinline__ void load_weights(
    const void* weight, const void* bias, int64 channels, float (&w)[K][V], float (&b)[V]) {
  constexpr int WIDTH = LANES * V;
  static_assert(WIDTH <= LANES * ROWS, "a thread has one channel's bias at most");
  __shared__ float shared[K + 1][WIDTH];
  const int64 first = blockIdx.x * static_cast<int64>(WIDTH);
  const int count = min(static_cast<int64>(WIDTH), channels - first);
  const int thread = threadIdx.y * LANES + threadIdx.x;
  __syncthreads();  // what an earlier call left here has been read
  const W* from = static_cast<const W*>(weight) + first * K;
#pragma unroll
  for (int start = 0; start < WIDTH * K; start += LANES * ROWS) {
    const int i = start + thread;
    if (i < count * K) shared[i % K][i / K] = to_float(from[i]);
  }
  if (thread < count) {
    shared[K][thread] =
        bias == nullptr ? 0.0f : to_float(static_cast<const W*>(bias)[first + thread]);
  }
  __syncthreads();
#pragma unroll
  for (int v = 0; v < V; ++v) {
#pragma unroll
    for (int k = 0; k < K; ++k) w[k][v] = shared[k][threadIdx.x * V + v];
    b[v] = shared[K][threadIdx.x * V + v];
  }
}

template <int K, int V>
__device__ __forceinline__ void slide(float (&window)[K][V], const float (&next)[V]) {
#pragma unroll
  for (int v = 0; v < V; ++v) {
#pragma unroll
    for (int k = 0; k + 1 < K; ++k) window[k][v] = window[k + 1][v];
    window[K - 1][v] = next[v];
  }
}

// sum + sum_k w_k window_k for channel v, or with the window read from its other end.
template <bool FLIPPED, int K, int V>
__device__ __forceinline__ float taps(
    const float (&w)[K][V], const float (&window)[K][V], int v, float sum) {
#pragma unroll
  for (int k = 0; k < K; ++k) sum += w[k][v] * window[FLIPPED ? K - 1 - k : k][v];
  return sum;
}

// Blocks that a multiprocessor should hold: as many as leave registers enough not to spill.
template <int K, int V, int DIRECTIONS> __device__ constexpr int fwd_residents() {
  if (V > 4 || K > 4) return 1;
  return DIRECTIONS == (FORWARD | REVERSE) ? 4 : 5;
}

// STATES: whether there is an initial state, which lies before the token scanned first.
// `block_rows` is how many rows of blocks there are.
template <typename T, typename W, int K, int V, int DIRECTIONS, bool SILU, bool STATES>
__device__ __forceinline__ void causal_conv1d_forward(const ConvForward& p, int64 block_rows) {
  constexpr int PAST = K - 1;
  constexpr bool BOTH = DIRECTIONS == (FORWARD | REVERSE);
  constexpr int BATCH = batch_of_tokens<K>();

  float w[BOTH ? 2 : 1][K][V], bias[BOTH ? 2 : 1][V];
  load_weights<W>(p.weight[0], p.bias[0], p.channels, w[0], bias[0]);
  if (BOTH) load_weights<W>(p.weight[1], p.bias[1], p.channels, w[BOTH], bias[BOTH]);

  const int64 channel = (blockIdx.x * static_cast<int64>(LANES) + threadIdx.x) * V;
  if (channel >= p.channels) return;
  const int length = p.length;
  const int64 items = p.batch * p.segments;
  int64 sequence = blockIdx.y * static_cast<int64>(ROWS) + threadIdx.y;
  for (; sequence < items; sequence += block_rows * ROWS) {
    const int64 item = sequence / p.segments;
    const int start = (sequence - item * p.segments) * p.tokens;
    const int stop = min(start + static_cast<int>(p.tokens), length);
    const int first = DIRECTIONS & FORWARD ? start - PAST : start;
    const int last = DIRECTIONS & REVERSE ? stop + PAST : stop;
    const Inputs<T, K, DIRECTIONS, STATES> inputs(
        p.x, p.initial_state, item, channel, p.x_batch_stride, p.x_token_stride, p.channels,
        length);

    T* y = static_cast<T*>(p.y) + (item * p.length + first) * p.channels + channel;
    T* y_reverse = y - PAST * p.channels + (BOTH ? p.batch * p.length * p.channels : 0);
    const T* x = inputs.at(first);
    float window[K][V] = {};
    Raw<T, V> raw[BATCH], ahead[BATCH];
    const auto load_ahead = [&](int t) {
#pragma unroll
      for (int i = 0; i < BATCH; ++i, x += p.x_token_stride) {
        ahead[i] = inputs.template load<V>(x, t + i, last);
      }
    };
    load_ahead(first);
    for (int t = first; t < last; t += BATCH) {
#pragma unroll
      for (int i = 0; i < BATCH; ++i) raw[i] = ahead[i];
      load_ahead(t + BATCH);
#pragma unroll
      for (int i = 0; i < BATCH; ++i) {
        float next[V], out[V];
        unpack(raw[i], next);
        slide(window, next);
        if (DIRECTIONS & FORWARD) {
#pragma unroll
          for (int v = 0; v < V; ++v) {
            const float pre = taps<false>(w[0], window, v, bias[0][v]);
            out[v] = SILU ? fast_silu(pre) : pre;
          }
          if (within(t + i, start, stop)) store<V>(y, out);
          y += p.channels;
        }
        if (DIRECTIONS & REVERSE) {
#pragma unroll
          for (int v = 0; v < V; ++v) {
            const float pre = taps<true>(w[BOTH], window, v, bias[BOTH][v]);
            out[v] = SILU ? fast_silu(pre) : pre;
          }
          if (within(t + i - PAST, start, stop)) store<V>(y_reverse, out);
          y_reverse += p.channels;
        }
      }
    }

    if (!BOTH && p.final_state != nullptr && start == 0) {
      T* final_state = static_cast<T*>(p.final_state) + item * PAST * p.channels + channel;
      for (int i = 0; i < PAST; ++i) {
        const int t = DIRECTIONS == FORWARD ? length - PAST + i : PAST - 1 - i;
        float state[V];
        unpack(inputs.template load<V>(inputs.at(t), t, length + PAST), state);
        store<V>(final_state + i * p.channels, state);
      }
    }
  }
}
