// The short causal depthwise convolution, channels-last; contract: vim/ops/causal_conv1d.py.
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
template <typename T, typename W, int K, int V, int DIRECTIONS, bool SILU, bool STATES>
__global__ void __launch_bounds__(LANES * ROWS, fwd_residents<K, V, DIRECTIONS>())
    causal_conv1d_fwd_kernel(const __grid_constant__ ConvForward p) {
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
  for (; sequence < items; sequence += gridDim.y * static_cast<int64>(ROWS)) {
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

struct ConvBackward {
  const void* x;
  const void* weight[2];
  const void* bias[2];
  const void* dy[2];          // (B, L, D) by direction
  const void* initial_state;  // (B, K-1, D) contiguous or null
  const void* dfinal_state;   // the same
  void* dx;                   // (B, L, D)
  void* dinitial_state;       // (B, K-1, D) contiguous or null
  float* partials;            // (gridDim.y, directions, D * K + D): sums for dweight, then dbias
  int64 batch, length, channels;
  int64 x_batch_stride, x_token_stride;
  int64 dy_batch_stride, dy_token_stride;
  int64 dx_batch_stride, dx_token_stride;
  int64 tokens, segments;
  int64 accumulate;  // whether dx is added to what is there
};

// d(pre) of one direction, from dy and the sum before the activation.
template <bool SILU> __device__ __forceinline__ float activation_gradient(float dy, float pre) {
  if (!SILU) return dy;
  const float gate = fast_sigmoid(pre);
  return dy * gate * (1.0f + pre * (1.0f - gate));
}

// One step at token t has in its window x[t-PAST .. t]. It computes the forward convolution's dpre
// at t and the reverse one's at t - PAST, where windows of K such values give dx:
//
//     dx_s = sum_k w_k dpre_{s + (K-1) - k}  (forward)  +  sum_k w_k dpre_{s - (K-1) + k}  (reverse)
//
// STATES adds the gradients of the initial and the final state, which one direction has.
template <typename T, typename W, int K, int V, int DIRECTIONS, bool SILU, bool STATES>
__global__ void __launch_bounds__(LANES * ROWS)
    causal_conv1d_bwd_kernel(const __grid_constant__ ConvBackward p) {
  constexpr int PAST = K - 1;
  constexpr bool BOTH = DIRECTIONS == (FORWARD | REVERSE);
  constexpr int COUNT = BOTH ? 2 : 1;
  constexpr int BATCH = batch_of_tokens<K>();
  constexpr int SUMS = COUNT * (K + 1) * V;  // a thread's sums for dweight and dbias

  const int64 group = blockIdx.x * static_cast<int64>(LANES) + threadIdx.x;
  const int64 channel = group * V;
  const bool active = channel < p.channels;
  const int length = p.length;

  float w[COUNT][K][V], bias[COUNT][V];
  float dw[COUNT][K][V] = {}, dbias[COUNT][V] = {};
  load_weights<W>(p.weight[0], p.bias[0], p.channels, w[0], bias[0]);
  if (BOTH) load_weights<W>(p.weight[1], p.bias[1], p.channels, w[BOTH], bias[BOTH]);

  const int64 items = p.batch * p.segments;
  int64 sequence = blockIdx.y * static_cast<int64>(ROWS) + threadIdx.y;
  for (; active && sequence < items; sequence += gridDim.y * static_cast<int64>(ROWS)) {
    const int64 item = sequence / p.segments;
    const int start = (sequence - item * p.segments) * p.tokens;
    const int stop = min(start + static_cast<int>(p.tokens), length);

    const Inputs<T, K, DIRECTIONS, STATES> inputs(
        p.x, p.initial_state, item, channel, p.x_batch_stride, p.x_token_stride, p.channels,
        length);
    const T* dy[COUNT];
#pragma unroll
    for (int c = 0; c < COUNT; ++c) {
      const bool reverse = DIRECTIONS == REVERSE || c == 1;
      dy[c] = static_cast<const T*>(p.dy[c]) + item * p.dy_batch_stride + channel +
              (start - (reverse ? PAST : 0)) * p.dy_token_stride;
    }
    T* dx = static_cast<T*>(p.dx) + item * p.dx_batch_stride + channel +
            (start - PAST) * p.dx_token_stride;
    const int64 state_offset = item * PAST * p.channels + channel;

    // The reverse scan's initial state lies behind the last token, and has its gradient there.
    const bool beyond = STATES && DIRECTIONS == REVERSE && stop == length;
    const int last = stop + PAST + (beyond ? PAST : 0);
    const T* x = inputs.at(start - PAST);
    float window[K][V] = {};
    float dpre[COUNT][K][V] = {};
    Raw<T, V> past[K];
#pragma unroll
    for (int i = 0; i < PAST; ++i, x += p.x_token_stride) {
      past[i] = inputs.template load<V>(x, start - PAST + i, last);
    }
    Raw<T, V> raw[BATCH], ahead[BATCH], raw_dy[COUNT][BATCH], ahead_dy[COUNT][BATCH];
    const auto load_ahead = [&](int t) {
#pragma unroll
      for (int i = 0; i < BATCH; ++i, x += p.x_token_stride) {
        ahead[i] = inputs.template load<V>(x, t + i, last);
#pragma unroll
        for (int c = 0; c < COUNT; ++c) {
          const int at = t + i - (DIRECTIONS == REVERSE || c == 1 ? PAST : 0);
          ahead_dy[c][i] = load_if<V>(within(at, 0, min(last, length)), dy[c]);
          dy[c] += p.dy_token_stride;
        }
      }
    };
    load_ahead(start);
#pragma unroll
    for (int i = 0; i < PAST; ++i) {
      float next[V];
      unpack(past[i], next);
      slide(window, next);
    }
    for (int t = start; t < last; t += BATCH) {
#pragma unroll
      for (int i = 0; i < BATCH; ++i) {
        raw[i] = ahead[i];
#pragma unroll
        for (int c = 0; c < COUNT; ++c) raw_dy[c][i] = ahead_dy[c][i];
      }
      load_ahead(t + BATCH);
#pragma unroll
      for (int i = 0; i < BATCH; ++i) {
        const int at = t + i;
        const int before = at - PAST;
        float next[V], dout[V], dinput[V] = {};
        unpack(raw[i], next);
        slide(window, next);
        if (DIRECTIONS & FORWARD) {
          unpack(raw_dy[0][i], dout);
          const float owned = within(at, start, stop) ? 1.0f : 0.0f;
#pragma unroll
          for (int v = 0; v < V; ++v) {
            const float pre = taps<false>(w[0], window, v, bias[0][v]);
            dout[v] = activation_gradient<SILU>(dout[v], pre);
            const float mine = owned * dout[v];
            dbias[0][v] += mine;
#pragma unroll
            for (int k = 0; k < K; ++k) dw[0][k][v] += mine * window[k][v];
          }
          slide(dpre[0], dout);
#pragma unroll
          for (int v = 0; v < V; ++v) dinput[v] = taps<true>(w[0], dpre[0], v, dinput[v]);
        }
        if (DIRECTIONS & REVERSE) {
          unpack(raw_dy[BOTH][i], dout);
          const float owned = within(before, start, stop) ? 1.0f : 0.0f;
#pragma unroll
          for (int v = 0; v < V; ++v) {
            const float pre = taps<true>(w[BOTH], window, v, bias[BOTH][v]);
            dout[v] = activation_gradient<SILU>(dout[v], pre);
            const float mine = owned * dout[v];
            dbias[BOTH][v] += mine;
#pragma unroll
            for (int k = 0; k < K; ++k) dw[BOTH][k][v] += mine * window[K - 1 - k][v];
          }
          slide(dpre[BOTH], dout);
#pragma unroll
          for (int v = 0; v < V; ++v) dinput[v] = taps<false>(w[BOTH], dpre[BOTH], v, dinput[v]);
        }
        if (STATES && p.dfinal_state != nullptr) {
          const int index = DIRECTIONS == FORWARD ? before - (length - PAST) : PAST - 1 - before;
          if (index >= 0 && index < PAST) {
            float dstate[V];
            load<V>(static_cast<const T*>(p.dfinal_state) + state_offset + index * p.channels,
                    dstate);
#pragma unroll
            for (int v = 0; v < V; ++v) dinput[v] += dstate[v];
          }
        }
        if (within(before, start, stop)) {
          if (p.accumulate) {
            float there[V];
            load<V>(dx, there);
#pragma unroll
            for (int v = 0; v < V; ++v) dinput[v] += there[v];
          }
          store<V>(dx, dinput);
        }
        dx += p.dx_token_stride;
        if (STATES && p.dinitial_state != nullptr) {
          const int index = DIRECTIONS == FORWARD ? PAST + before : PAST - 1 - (before - length);
          const bool mine = DIRECTIONS == FORWARD ? start == 0 : beyond;
          if (mine && index >= 0 && index < PAST) {
            store<V>(static_cast<T*>(p.dinitial_state) + state_offset + index * p.channels, dinput);
          }
        }
      }
    }
  }

  // Sum over the segments of this block, in a fixed order: first the two halves of each warp, which
  // hold the same channels, then the warps.
  __shared__ float sums[ROWS / 2][SUMS][LANES];
  float flat[SUMS];
#pragma unroll
  for (int c = 0; c < COUNT; ++c) {
#pragma unroll
    for (int v = 0; v < V; ++v) {
#pragma unroll
      for (int k = 0; k < K; ++k) flat[(c * (K + 1) * V) + v * K + k] = dw[c][k][v];
      flat[(c * (K + 1) * V) + V * K + v] = dbias[c][v];
    }
  }
#pragma unroll
  for (int i = 0; i < SUMS; ++i) {
    flat[i] += __shfl_xor_sync(FULL_WARP, flat[i], LANES);
    if (threadIdx.y % 2 == 0) sums[threadIdx.y / 2][i][threadIdx.x] = flat[i];
  }
  __syncthreads();
  if (!active) return;
  const int64 columns = p.channels * (K + 1);
  for (int i = threadIdx.y; i < SUMS; i += ROWS) {
    float sum = 0.0f;
#pragma unroll
    for (int row = 0; row < ROWS / 2; ++row) sum += sums[row][i][threadIdx.x];
    const int c = i / ((K + 1) * V);
    const int rest = i - c * (K + 1) * V;
    float* to = p.partials + (blockIdx.y * static_cast<int64>(COUNT) + c) * columns;
    if (rest < V * K) {
      to[channel * K + rest] = sum;
    } else {
      to[p.channels * K + channel + rest - V * K] = sum;
    }
  }
}
