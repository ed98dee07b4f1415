// The last part of a mixer's backward, for both directions in one pass over the tokens: what follows
// from the gradients of the scans' inputs for x, x_proj, dt_proj and the convolutions. With u the
// convolved x, P = dt_rank rounded up, M = P + 2 N, and for each direction
//
//     du += dprojected x_proj      (through x_proj, whose result is `projected`)
//     dx_proj = dprojected^T u     ddt_proj = ddt^T projected[:, :P]
//     dx, dconv_weight, dconv_bias from du, by the backward of the convolution
//
// of which neither the sum du nor u passes through memory: u is worked out again with the sum before
// its activation, which is needed anyway. Contract: vim/ops/cuda/bidirectional_mixer.py.
//
// A block owns CHANNELS channels of some segments of tokens, and takes TOKENS tokens at a time, staged
// in shared memory one tile ahead. The reverse direction is PAST tokens behind the forward one, so
// that one window of x serves both, as in causal_conv1d.cuh. A tile has three stages: the products
// with x_proj, on the tensor cores; elements, two channels and some tokens a thread; dx, and the
// products that sum over tokens. These sums stay in registers, and leave as one partial sum a block,
// which are added in a fixed order: gradients are deterministic.
//
// Memory: T (activations, x_proj). Weights of the convolutions and sums are float.

#include "mixer_tiles.cuh"

struct MixerGradients {
  const void* x;               // (B, L, D)
  const void* du;              // (2, B, L, D): by the scans alone
  const void* ddt;             // (2, B, L, D): of what dt_proj returns
  const void* dprojected;      // (2, B, L, M)
  const void* projected;       // (2, B, L, M)
  const void* x_proj;          // (2, M, D)
  const float* conv_weight[2];  // (D, K)
  const float* conv_bias[2];    // (D,)
  void* dx;                    // (B, L, D)
  // (gridDim.y, 2, columns): conv_weight (D, K), conv_bias (D,), x_proj (R + 2 N, D), dt_proj (D, R)
  float* partials;
  int64 batch, length, channels, rank, columns;
  int64 x_batch_stride, x_token_stride, dx_batch_stride, dx_token_stride;
  int64 tokens, segments, block_segments;  // tokens a segment, segments a sequence and a block
};

template <typename T, int K, int M, int P, int TOKENS> struct SharedMemory {
  struct Tile {
    alignas(16) T du[2][TOKENS][PITCH];  // then the whole of du, then u
    alignas(16) T ddt[2][TOKENS][PITCH];
    alignas(16) T dprojected[2][TOKENS][padded(M) + VECTOR];
    alignas(16) T dt[2][TOKENS][padded(P) + VECTOR];
    alignas(16) T x[TOKENS + K - 1][PITCH];
  };
  Tile tiles[2];
  alignas(16) T x_proj[2][padded(M)][PITCH];
  alignas(16) float dpre[2][K - 1 + TOKENS][CHANNELS];  // first those of the last tile's end
  alignas(16) float conv[2][K + 1][CHANNELS];  // weights in the order of the window, then bias
};

// sums += right^T left, over the TOKENS rows of both: rows are a warp's 16 columns of `right` from
// `column` on, columns the SIZE of `left`, eight at a time.
template <int SIZE, int TOKENS, int LEFT_PITCH, typename T>
__device__ __forceinline__ void add_product(
    float (&sums)[SIZE / 8][4], const T (&left)[TOKENS][LEFT_PITCH], const T (&right)[TOKENS][PITCH],
    int column, int lane) {
#pragma unroll
  for (int t = 0; t < TOKENS; t += 16) {
    unsigned a[4];
    load_matrices<true>(a, &right[t + lane / 16 * 8 + lane % 8][column + lane / 8 % 2 * 8]);
#pragma unroll
    for (int m = 0; m < SIZE; m += 16) {
      unsigned b[4];
      load_matrices<true>(b, &left[t + lane % 16][m + lane / 16 * 8]);
      multiply_add(T(), sums[m / 8], a, b[0], b[1]);
      if (m + 8 < SIZE) multiply_add(T(), sums[m / 8 + (m + 8 < SIZE)], a, b[2], b[3]);
    }
  }
}

// SHARED: bytes of dynamic shared memory that the launch brings.
template <typename T, int K, int M, int P, int TOKENS, int SHARED>
__global__ void __launch_bounds__(THREADS, 2)
    mixer_gradients_kernel(const __grid_constant__ MixerGradients p) {
  constexpr int PAST = K - 1;
  constexpr int OWN = TOKENS / (WARPS / 2);  // tokens of a thread, by elements
  using Shared = SharedMemory<T, K, M, P, TOKENS>;
  static_assert(sizeof(Shared) <= SHARED, "the host's count of bytes");
  static_assert(sizeof(float) * WARPS * (K + 1) * CHANNELS <= SHARED, "room for the last sums");
  extern __shared__ uint4 memory[];
  Shared& my = *reinterpret_cast<Shared*>(memory);

  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int first_channel = blockIdx.x * CHANNELS;
  const int channels = p.channels;
  const int length = p.length;
  // For products a warp owns 16 channels of a direction; for elements two channels a lane.
  const int direction = warp / (WARPS / 2), column = warp % (WARPS / 2) * 16;
  const int pair = 2 * lane;

  // The place in the window of what weight k multiplies; the bias comes last.
  auto tap = [](int direction, int k) { return direction == 1 && k < K ? PAST - k : k; };

  // Columns that no tile fills, and the convolutions' weights.
  for (int i = thread; i < static_cast<int>(sizeof(my.tiles) / sizeof(uint4)); i += THREADS) {
    memory[i] = uint4{0, 0, 0, 0};
  }
  for (int i = thread; i < 2 * (K + 1) * CHANNELS; i += THREADS) {
    const int d = i / ((K + 1) * CHANNELS), k = i / CHANNELS % (K + 1), c = i % CHANNELS;
    const int64 channel = first_channel + c;
    my.conv[d][tap(d, k)][c] =
        k < K ? p.conv_weight[d][channel * K + k] : p.conv_bias[d][channel];
  }

#pragma unroll
  for (int d = 0; d < 2; ++d) {  // these come with the first tile
    ask_for<CHANNELS>(
        my.x_proj[d], static_cast<const T*>(p.x_proj) + d * M * channels + first_channel, channels, 0,
        M, thread);
  }

  float dx_proj[M / 8][4] = {}, ddt_proj[P / 8][4] = {};  // by channels of the warp
  float2 dconv[K + 1] = {};  // weights, then bias; of two channels

  const int segments = p.segments, block_segments = p.block_segments;
  const int from_segment = blockIdx.y * block_segments;
  const int to_segment = min(from_segment + block_segments, static_cast<int>(p.batch) * segments);
  for (int segment = from_segment; segment < to_segment; ++segment) {
    const int item = segment / segments;
    const int start = (segment - item * segments) * static_cast<int>(p.tokens);
    const int stop = min(start + static_cast<int>(p.tokens), length);
    const int tiles = (stop - start + PAST + TOKENS - 1) / TOKENS;

    // Ask for the tile whose first token is t0, or PAST less in reverse; one group of copies a call.
    auto ask_for_tile = [&](int t0, int stage) {
      auto& tile = my.tiles[stage];
      int thread = threadIdx.x;
      asm volatile("" : "+r"(thread));  // addresses of one tile are not kept for the next
#pragma unroll
      for (int d = 0; d < 2; ++d) {
        const int first = t0 - d * PAST;
        const int low = -first, high = length - first;
        const int64 row = (d * p.batch + item) * p.length + first;
        ask_for<CHANNELS>(
            tile.du[d], static_cast<const T*>(p.du) + row * channels + first_channel, channels, low,
            high, thread);
        // Of the tokens of another segment only du is of use.
        ask_for<CHANNELS>(
            tile.ddt[d], static_cast<const T*>(p.ddt) + row * channels + first_channel, channels,
            start - first, stop - first, thread);
        ask_for<M>(
            tile.dprojected[d], static_cast<const T*>(p.dprojected) + row * M, M, low, high, thread);
        ask_for<P>(tile.dt[d], static_cast<const T*>(p.projected) + row * M, M, low, high, thread);
      }
      const int first = t0 - PAST;
      ask_for<CHANNELS>(
          tile.x,
          static_cast<const T*>(p.x) + item * p.x_batch_stride + first * p.x_token_stride +
              first_channel,
          static_cast<int>(p.x_token_stride), -first, length - first, thread);
      commit_copies();
    };

    __syncthreads();  // before the first segment for what was prepared, then for its last tile
    ask_for_tile(start, 0);
    for (int i = 0; i < tiles; ++i) {
      const int t0 = start + i * TOKENS;
      auto& tile = my.tiles[i % 2];
      wait_copies<0>();
      __syncthreads();
      if (i + 1 < tiles) ask_for_tile(t0 + TOKENS, (i + 1) % 2);
      if (warp < 2 * PAST) {
        float(*rows)[CHANNELS] = my.dpre[warp / PAST] + warp % PAST;
        *reinterpret_cast<float2*>(rows[0] + pair) = *reinterpret_cast<float2*>(rows[TOKENS] + pair);
      }

      // The whole of du.
      {
        float sums[TOKENS / 16][2][4];
        auto words_at = [&](int t, int n, int half) {
          T& at = tile.du[direction][t + lane / 4 + 8 * half][column + 8 * n + 2 * (lane % 4)];
          return reinterpret_cast<unsigned*>(&at);
        };
#pragma unroll
        for (int i = 0; i < TOKENS / 4; ++i) {
          const float2 there = unpack_pair(T(), *words_at(i / 4 * 16, i / 2 % 2, i % 2));
          sums[i / 4][i / 2 % 2][i % 2 * 2] = there.x;
          sums[i / 4][i / 2 % 2][i % 2 * 2 + 1] = there.y;
        }
#pragma unroll
        for (int m = 0; m < padded(M); m += 16) {
          unsigned b[4];
          load_matrices<true>(b, &my.x_proj[direction][m + lane % 16][column + lane / 16 * 8]);
#pragma unroll
          for (int t = 0; t < TOKENS; t += 16) {
            unsigned a[4];
            load_matrices<false>(
                a, &tile.dprojected[direction][t + lane % 16][m + lane / 16 * 8]);
            multiply_add(T(), sums[t / 16][0], a, b[0], b[1]);
            multiply_add(T(), sums[t / 16][1], a, b[2], b[3]);
          }
        }
#pragma unroll
        for (int i = 0; i < TOKENS / 4; ++i) {
          const float* sum = sums[i / 4][i / 2 % 2] + i % 2 * 2;
          *words_at(i / 4 * 16, i / 2 % 2, i % 2) = pack_pair(T(), sum[0], sum[1]);
        }
      }
      __syncthreads();

      // Elements, of this warp's direction: u, and the gradient before the activation.
      {
        const int row0 = warp % (WARPS / 2) * OWN;
        float2 w[K + 1], x[K];
#pragma unroll
        for (int k = 0; k <= K; ++k) w[k] = *reinterpret_cast<float2*>(&my.conv[direction][k][pair]);
        auto load_x = [&](int row) {
          return unpack_pair(T(), *reinterpret_cast<const unsigned*>(&tile.x[row][pair]));
        };
#pragma unroll
        for (int k = 0; k < PAST; ++k) x[k + 1] = load_x(row0 + k);
#pragma unroll 4
        for (int r = 0; r < OWN; ++r) {
          const int row = row0 + r;
#pragma unroll
          for (int k = 0; k < PAST; ++k) x[k] = x[k + 1];
          x[PAST] = load_x(row + PAST);
          unsigned& word = *reinterpret_cast<unsigned*>(&tile.du[direction][row][pair]);
          const float2 du = unpack_pair(T(), word);
          float2 pre = w[K];
#pragma unroll
          for (int k = 0; k < K; ++k) {
            pre.x = fmaf(w[k].x, x[k].x, pre.x);
            pre.y = fmaf(w[k].y, x[k].y, pre.y);
          }
          const float2 gate = {fast_sigmoid(pre.x), fast_sigmoid(pre.y)};
          float2 dpre = {du.x * gate.x * (1.0f + pre.x * (1.0f - gate.x)),
                         du.y * gate.y * (1.0f + pre.y * (1.0f - gate.y))};
          *reinterpret_cast<float2*>(&my.dpre[direction][PAST + row][pair]) = dpre;
          const bool owned = within(t0 - direction * PAST + row, start, stop);
          word = owned ? pack_pair(T(), pre.x * gate.x, pre.y * gate.y) : 0;
          if (!owned) dpre = float2{0.0f, 0.0f};
#pragma unroll
          for (int k = 0; k < K; ++k) {
            dconv[k].x = fmaf(dpre.x, x[k].x, dconv[k].x);
            dconv[k].y = fmaf(dpre.y, x[k].y, dconv[k].y);
          }
          dconv[K].x += dpre.x;
          dconv[K].y += dpre.y;
        }
      }
      __syncthreads();

      // dx, of the PAST tokens before this tile and all but the last PAST of it.
      {
        constexpr int ROWS_HERE = TOKENS / WARPS;
        const int row0 = warp * ROWS_HERE;
        float2 dx[ROWS_HERE] = {};
#pragma unroll
        for (int d = 0; d < 2; ++d) {
          float2 w[K];
#pragma unroll
          for (int k = 0; k < K; ++k) w[k] = *reinterpret_cast<float2*>(&my.conv[d][k][pair]);
#pragma unroll
          for (int r = 0; r < ROWS_HERE + PAST; ++r) {
            const float2 dpre = *reinterpret_cast<float2*>(&my.dpre[d][row0 + r][pair]);
#pragma unroll
            for (int k = 0; k < K; ++k) {
              const int to = r - (PAST - k);
              if (to < 0 || to >= ROWS_HERE) continue;
              dx[to].x = fmaf(w[k].x, dpre.x, dx[to].x);
              dx[to].y = fmaf(w[k].y, dpre.y, dx[to].y);
            }
          }
        }
        const int first = t0 - PAST + row0;
        const int stride = p.dx_token_stride;
        T* to = static_cast<T*>(p.dx) + item * p.dx_batch_stride + first_channel + pair +
                static_cast<int64>(first) * stride;
#pragma unroll
        for (int r = 0; r < ROWS_HERE; ++r, to += stride) {
          if (within(first + r, start, stop)) {
            *reinterpret_cast<unsigned*>(to) = pack_pair(T(), dx[r].x, dx[r].y);
          }
        }
      }
      add_product<M>(dx_proj, tile.dprojected[direction], tile.du[direction], column, lane);
      add_product<P>(ddt_proj, tile.dt[direction], tile.ddt[direction], column, lane);
    }
  }

  // This block's sums.
  float* to = p.partials + (blockIdx.y * 2 + direction) * p.columns + channels * (K + 1);
  const int rank = p.rank;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int64 channel = first_channel + column + lane / 4 + i / 2 * 8;
#pragma unroll
    for (int m = 0; m < M; m += 8) {
      const int row = m + 2 * (lane % 4) + i % 2;
      if (row >= rank && row < P) continue;
      const int64 given = row < rank ? row : row - (P - rank);
      to[given * channels + channel] = dx_proj[m / 8][i];
    }
    float* dt_proj = to + (rank + M - P) * static_cast<int64>(channels) + channel * rank;
#pragma unroll
    for (int m = 0; m < P; m += 8) {
      const int row = m + 2 * (lane % 4) + i % 2;
      if (row < rank) dt_proj[row] = ddt_proj[m / 8][i];
    }
  }
  __syncthreads();
  float(&sums)[WARPS][K + 1][CHANNELS] =
      *reinterpret_cast<float(*)[WARPS][K + 1][CHANNELS]>(memory);
#pragma unroll
  for (int k = 0; k <= K; ++k) *reinterpret_cast<float2*>(&sums[warp][k][pair]) = dconv[k];
  __syncthreads();
  for (int i = thread; i < 2 * (K + 1) * CHANNELS; i += THREADS) {
    const int d = i / ((K + 1) * CHANNELS), k = i / CHANNELS % (K + 1), c = i % CHANNELS;
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < WARPS / 2; ++w) sum += sums[d * (WARPS / 2) + w][tap(d, k)][c];
    float* sums_to = p.partials + (blockIdx.y * 2 + d) * p.columns;
    const int64 channel = first_channel + c;
    sums_to[k < K ? channel * K + k : channels * K + channel] = sum;
  }
}
