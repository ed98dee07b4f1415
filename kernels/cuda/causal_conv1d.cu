// The kernels of the short causal depthwise convolution; how they work: causal_conv1d.cuh.

#include "causal_conv1d.cuh"

template <typename T, typename W, int K, int V, int DIRECTIONS, bool SILU, bool STATES>
__global__ void __launch_bounds__(LANES * ROWS, fwd_residents<K, V, DIRECTIONS>())
    causal_conv1d_fwd_kernel(const __grid_constant__ ConvForward p) {
  causal_conv1d_forward<T, W, K, V, DIRECTIONS, SILU, STATES>(p, gridDim.y);
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
