// Both convolutions of x and their products with x_proj, in one pass over the tokens. For each
// direction
//
//     u = silu(causal_conv1d(x))    projected = u x_proj^T
//
// A block owns TOKENS tokens, counted through all sequences, and takes CHANNELS channels at a time,
// staged in shared memory one step ahead. A warp has 16 tokens in one direction: it slides a window
// over them in the order of the scan, two channels a lane, leaves u in shared memory, and from there
// stores it and multiplies it by x_proj on the tensor cores. Contract:
// vim/ops/cuda/bidirectional_mixer.py.
//
// Other blocks see to the weights that the scans take, if these are given in T.
//
// Memory: T (activations, x_proj), W (weights of the convolutions). Sums are float.

#include "mixer_tiles.cuh"
#include "mixer_weights.cuh"

struct MixerProjection {
  const void* x;               // (B L, D), tokens x_token_stride apart
  const void* conv_weight[2];  // (D, K), by direction
  const void* conv_bias[2];    // (D,)
  const void* x_proj[2];       // (R + 2 N, D), by direction; rows R to P of `projected` are zero
  void* u;                     // (2, B L, D)
  void* projected;             // (2, B L, M), M = P + 2 N
  int64 tokens, length, channels, x_token_stride, rank, padded_rank;  // tokens: B L
  int64 weight_blocks;         // blocks, the last of the grid, that see to the weights
};

constexpr int TOKENS = 64;
constexpr int OWN = TOKENS / (WARPS / 2);  // tokens of a warp

template <typename T, typename W, int K, int M> struct ProjectionMemory {
  struct Step {
    alignas(16) T x[TOKENS + 2 * (K - 1)][PITCH];
    alignas(16) T x_proj[2][M][PITCH];
    alignas(16) W weight[2][1][CHANNELS * K];
    alignas(16) W bias[2][1][CHANNELS];
  };
  Step steps[2];
  alignas(16) T u[2][TOKENS][PITCH];
};

// Ask for CHANNELS columns of a matrix that lacks rows [rank, padded_rank), which become zero.
template <int M, typename T>
__device__ __forceinline__ void ask_for_weights(
    T (&to)[M][PITCH], const T* from, int stride, int rank, int padded_rank, int thread) {
  constexpr int ITEMS = CHANNELS / VECTOR;
#pragma unroll
  for (int start = 0; start < M * ITEMS; start += THREADS) {
    const int i = start + thread;
    if (M * ITEMS % THREADS != 0 && i >= M * ITEMS) break;
    const int row = i / ITEMS, column = i % ITEMS * VECTOR;
    const int given = row < rank ? row : row - (padded_rank - rank);
    copy_async<16>(
        &to[row][column], from + given * stride + column, row < rank || row >= padded_rank);
  }
}

// Convolve a warp's tokens, from `first_row` on in steps of `sign`; two channels a lane. SEVERAL: the
// first of them, which is at `position` of its sequence, or one after it may begin a sequence.
template <bool SEVERAL, typename T, typename W, int ROWS_, int SIZE>
__device__ __forceinline__ void convolve(
    T (&u)[TOKENS][PITCH], const T (&x_tile)[ROWS_][PITCH], const W (&weights)[SIZE],
    const W (&biases)[CHANNELS], int first_row, int sign, int pair, int position, int length) {
  constexpr int K = SIZE / CHANNELS, PAST = K - 1;
  float weight[2 * K], bias[2];
  load(weights + pair * K, weight);
  load(biases + pair, bias);
  auto load_x = [&](int row) {
    return unpack_pair(T(), *reinterpret_cast<const unsigned*>(&x_tile[PAST + row][pair]));
  };
  float2 x[K];
#pragma unroll
  for (int k = 0; k < PAST; ++k) {
    const bool there = !SEVERAL || position >= PAST - k;  // in the same sequence
    x[k + 1] = there ? load_x(first_row - sign * (PAST - k)) : float2{0.0f, 0.0f};
  }
#pragma unroll
  for (int r = 0; r < OWN; ++r, ++position) {
    if (SEVERAL && position == length) {  // the next sequence begins
      position = 0;
#pragma unroll
      for (int k = 1; k < K; ++k) x[k] = float2{0.0f, 0.0f};
    }
#pragma unroll
    for (int k = 0; k < PAST; ++k) x[k] = x[k + 1];
    x[PAST] = load_x(first_row + sign * r);
    float2 pre = {bias[0], bias[1]};
#pragma unroll
    for (int k = 0; k < K; ++k) {
      pre.x = fmaf(weight[k], x[k].x, pre.x);
      pre.y = fmaf(weight[K + k], x[k].y, pre.y);
    }
    *reinterpret_cast<unsigned*>(&u[first_row + sign * r][pair]) =
        pack_pair(T(), fast_silu(pre.x), fast_silu(pre.y));
  }
}

// SHARED: bytes of dynamic shared memory that the launch brings.
template <typename T, typename W, int K, int M, int SHARED>
__global__ void __launch_bounds__(THREADS, SHARED <= 75 * 1024 ? 3 : 2)
    mixer_projection_kernel(
        const __grid_constant__ MixerProjection p, const __grid_constant__ MixerWeights weights) {
  constexpr int PAST = K - 1;
  using Shared = ProjectionMemory<T, W, K, M>;
  static_assert(sizeof(Shared) <= SHARED, "the host's count of bytes");
  const int token_blocks = gridDim.x - static_cast<int>(p.weight_blocks);
  if (static_cast<int>(blockIdx.x) >= token_blocks) {
    const int block = blockIdx.x - token_blocks;
    prepare_weights<T, T>(
        weights, block * THREADS + threadIdx.x, static_cast<int>(p.weight_blocks) * THREADS);
    return;
  }
  extern __shared__ uint4 memory[];
  Shared& my = *reinterpret_cast<Shared*>(memory);

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, pair = 2 * lane;
  const int direction = warp / (WARPS / 2), row0 = warp % (WARPS / 2) * OWN;
  const int64 first = blockIdx.x * static_cast<int64>(TOKENS);
  const int tokens = min(static_cast<int64>(TOKENS), p.tokens - first);
  const int channels = p.channels, length = p.length;

  auto ask_for_step = [&](int channel, int stage) {
    auto& step = my.steps[stage];
    int thread = threadIdx.x;
    asm volatile("" : "+r"(thread));  // addresses of one step are not kept for the next
    // Beyond the last token there is nothing, before the first one neither.
    const int before = first < PAST ? static_cast<int>(first) : PAST;
    const int after = min(static_cast<int64>(TOKENS + PAST), p.tokens - first);
    const int stride = p.x_token_stride;
    ask_for<CHANNELS>(
        step.x, static_cast<const T*>(p.x) + (first - PAST) * stride + channel, stride,
        PAST - before, PAST + after, thread);
#pragma unroll
    for (int d = 0; d < 2; ++d) {
      ask_for_weights(
          step.x_proj[d], static_cast<const T*>(p.x_proj[d]) + channel, channels, p.rank,
          p.padded_rank, thread);
      ask_for<CHANNELS * K>(
          step.weight[d], static_cast<const W*>(p.conv_weight[d]) + channel * K, 0, 0, 1, thread);
      ask_for<CHANNELS>(
          step.bias[d], static_cast<const W*>(p.conv_bias[d]) + channel, 0, 0, 1, thread);
    }
    commit_copies();
  };

  // Where in its sequence this warp's first token is, in the order of the scan.
  const int first_row = direction == 0 ? row0 : row0 + OWN - 1, sign = direction == 0 ? 1 : -1;
  const int at = (first + first_row) % length;
  const int first_position = direction == 0 ? at : length - 1 - at;

  float sums[M / 8][4] = {};  // by tokens of the warp
  ask_for_step(0, 0);
  for (int channel = 0; channel < channels; channel += CHANNELS) {
    const int stage = channel / CHANNELS % 2;
    auto& step = my.steps[stage];
    wait_copies<0>();
    __syncthreads();
    if (channel + CHANNELS < channels) ask_for_step(channel + CHANNELS, stage ^ 1);

    if (first_position >= PAST && first_position + OWN <= length) {
      convolve<false>(
          my.u[direction], step.x, step.weight[direction][0], step.bias[direction][0], first_row,
          sign, pair, first_position, length);
    } else {
      convolve<true>(
          my.u[direction], step.x, step.weight[direction][0], step.bias[direction][0], first_row,
          sign, pair, first_position, length);
    }
    __syncwarp();

    // The warp's own tokens only: nobody else has to be waited for.
    const T* x_proj = step.x_proj[direction][0] + (lane / 16 * 8 + lane % 8) * PITCH +
                      lane / 8 % 2 * 8;
#pragma unroll
    for (int k = 0; k < CHANNELS; k += 16) {
      unsigned a[4];
      load_matrices<false>(a, &my.u[direction][row0 + lane % 16][k + lane / 16 * 8]);
#pragma unroll
      for (int m = 0; m < M; m += 16) {
        unsigned b[4];
        load_matrices<false>(b, x_proj + m * PITCH + k);  // of which the last half may be unused
        multiply_add(T(), sums[m / 8], a, b[0], b[1]);
        if (m + 8 < M) multiply_add(T(), sums[m / 8 + (m + 8 < M)], a, b[2], b[3]);
      }
    }
    T* to = static_cast<T*>(p.u) + (direction * p.tokens + first) * channels + channel;
#pragma unroll
    for (int i = lane; i < OWN * (CHANNELS / VECTOR); i += 32) {
      const int row = row0 + i / (CHANNELS / VECTOR), column = i % (CHANNELS / VECTOR) * VECTOR;
      if (row >= tokens) continue;
      *reinterpret_cast<uint4*>(to + static_cast<int64>(row) * channels + column) =
          *reinterpret_cast<const uint4*>(&my.u[direction][row][column]);
    }
    __syncwarp();
  }

  T* to = static_cast<T*>(p.projected) + (direction * p.tokens + first) * M;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = row0 + lane / 4 + 8 * half;
    if (row >= tokens) continue;
#pragma unroll
    for (int m = 0; m < M; m += 8) {
      *reinterpret_cast<unsigned*>(to + row * M + m + 2 * (lane % 4)) =
          pack_pair(T(), sums[m / 8][2 * half], sums[m / 8][2 * half + 1]);
    }
  }
}
