// What the forward and the backward of the selective scan share. Contract: vim/ops/selective_scan.py.
//
// Size letters: B batch, L tokens, D channels, N states, G groups of B and C.
#pragma once

#include "common.cuh"
#include "tensor_cores.cuh"

// Arguments, each eight bytes, filled by vim/ops/cuda/selective_scan.py in this order. With two
// directions u, dt, B, C, A, D, dt_bias hold forward's and reverse's values, `*_dir` apart. Strides
// count elements; channels are contiguous in activations, states in B and C.
struct ScanParams {
    const void *u, *dt, *z, *dy, *B, *C;
    const float *A;          // (dirs, D, N)
    const float *D;          // (dirs, D) or null
    const float *dt_bias;    // (dirs, D) or null
    const void *dt_proj;     // (dirs, D, P): then dt is (dirs, B, L, P), to be multiplied; or null
    const float *start;      // (dirs, B, chunks, D, N) state before each chunk, or null for zero
    void *y;                 // (B, L, D); the gradient of z in STATES_AND_DZ and the backward
    // (B, L, D), contiguous, or null: y again in STATES_AND_DZ; y before its gate in
    // OUTPUT_AND_STATES, which leaves it in the strides of y, and in the backward.
    void *more;
    float *end;              // (dirs, B, chunks, D, N) state after each chunk, or null
    float *delta_sum;        // (dirs, B, chunks, D) sum of a chunk's step sizes, or null
    float *tile_states;      // (dirs, B, tiles, N / QUAD, D, QUAD) state before each tile, or null
    long long batch, length, channels, states, groups;
    long long chunk, chunks;  // tokens in a chunk, a multiple of the tile; chunks in L
    long long reverse;        // one direction only: scan from the last token
    long long vector_rows;    // activations can be read and written 16 bytes at a time
    long long vector_bc;      // B and C can be read four elements at a time
    long long vector_states;  // A and start too
    long long u_dir, u_batch, u_token, dt_dir, dt_batch, dt_token;
    long long z_batch, z_token, dy_batch, dy_token, y_batch, y_token;
    long long B_dir, B_batch, B_token, B_group, C_dir, C_batch, C_token, C_group;
    double scale;  // of the sum of both directions
};

// COUNT values that travel in one access.
template <typename scalar_t, int COUNT>
struct alignas(sizeof(scalar_t) * COUNT) Packet {
    scalar_t at[COUNT];
};

// log(1 + e^x) = max(x, 0) + log1p(e), e = e^-|x|. Step sizes are mostly small, where log(1 + e) by
// the special-function unit would lose its relative precision; a polynomial in e (minimax for the
// relative error on [0, 1]) keeps it, and leaves that unit, which bounds the scan, alone. Its error is
// 3e-8, or 8e-6 where all that comes of it is ROUNDED to 16 bits.
template <typename scalar_t>
__device__ __forceinline__ float softplus_exponential(float x) {
    return sizeof(scalar_t) == 4 ? expf(-fabsf(x)) : fast_exp2(-LOG2_E * fabsf(x));
}
template <bool ROUNDED = false>
__device__ __forceinline__ float softplus(float x, float e) {
    float q;
    if constexpr (ROUNDED) {
        q = -0.0238691512f;
        q = fmaf(q, e, 0.101222284f);
        q = fmaf(q, e, -0.21004869f);
        q = fmaf(q, e, 0.325206667f);
        q = fmaf(q, e, -0.499361366f);
        q = fmaf(q, e, 0.999991596f);
    } else {
        q = 0.00523242168f;
        q = fmaf(q, e, -0.0295041464f);
        q = fmaf(q, e, 0.0782241747f);
        q = fmaf(q, e, -0.136630952f);
        q = fmaf(q, e, 0.191059351f);
        q = fmaf(q, e, -0.248429641f);
        q = fmaf(q, e, 0.333190948f);
        q = fmaf(q, e, -0.499994934f);
        q = fmaf(q, e, 0.99999994f);
    }
    return fmaf(q, e, fmaxf(x, 0.f));
}

// Sum each of COUNT values over LANES lanes, STRIDE apart, of which this one is number s.
// Afterwards lane s holds, in the first max(1, COUNT / LANES) places, the sums of values
// s * COUNT / LANES onwards: every step halves both the values that a lane still looks after and the
// lanes that share them, which costs COUNT - 1 shuffles instead of COUNT * log2(LANES). Where
// LANES > COUNT, each sum is held by LANES / COUNT lanes.
template <int LANES, int STRIDE = 1, int COUNT>
__device__ __forceinline__ void reduce_transposed(float (&v)[COUNT], int s) {
    int count = COUNT;
#pragma unroll
    for (int mask = LANES / 2; mask >= 1; mask /= 2) {
        if (count > 1) {
            const int half = count / 2;
            const bool upper = s & mask;
#pragma unroll
            for (int i = 0; i < COUNT / 2; ++i) {
                if (i < half) {
                    const float keep = upper ? v[i + half] : v[i];
                    const float send = upper ? v[i] : v[i + half];
                    v[i] = keep + __shfl_xor_sync(FULL_WARP, send, mask * STRIDE);
                }
            }
            count = half;
        } else {
            v[0] += __shfl_xor_sync(FULL_WARP, v[0], mask * STRIDE);
        }
    }
}

// The tokens of one team's tiles in the order it scans them. Rows of a tile are in scan order, so
// that row r of the reverse team's tile is row T - 1 - r of the same tokens' tile forwards. Only
// rows from `low` to `high` exist: all but at the end of a chunk.
template <int T>
struct Walk {
    int tiles, tokens, sign;

    __device__ __forceinline__ Walk(int tokens, bool backwards)
        : tiles((tokens + T - 1) / T), tokens(tokens), sign(backwards ? -1 : 1) {}
    __device__ __forceinline__ int tile(int step) const { return sign > 0 ? step : tiles - 1 - step; }
    __device__ __forceinline__ int low(int step) const {
        return sign < 0 && step == 0 ? tiles * T - tokens : 0;
    }
    __device__ __forceinline__ int high(int step) const {
        return sign > 0 && step == tiles - 1 ? tokens - step * T : T;
    }
    // The chunk's token in row r of the first tile; it may lie past the end.
    __device__ __forceinline__ int first(int r) const { return sign > 0 ? r : tiles * T - 1 - r; }
};

// A thread's part in moving tiles of T x CH activations between global and shared memory: 16 bytes
// of every ROW_STEP-th row, at a fixed column. SPREAD: in shared memory those 16 bytes change places
// within a row, so that a warp that reads the same channels of eight rows meets more banks.
template <int T, int CH, int THREADS, typename scalar_t, bool SPREAD = false>
struct TileItem {
    static constexpr int VEC = 16 / sizeof(scalar_t);
    static constexpr int PLACES = SPREAD ? CH / VEC : 1;
    static constexpr int ROW_STEP = THREADS / (CH / VEC);
    static constexpr int COUNT = (T + ROW_STEP - 1) / ROW_STEP;
    static_assert(THREADS % (CH / VEC) == 0, "a thread stays in its column");
    static_assert(8 % PLACES == 0 && (PLACES == 1 || ROW_STEP % 8 == 0), "and in its place");
    int row, column, columns;  // columns: how many of the VEC exist
    int placed;                // where the column is in shared memory

    __device__ __forceinline__ TileItem(int thread, int channels)
        : row(thread / (CH / VEC)), column(thread % (CH / VEC) * VEC),
          columns(min(VEC, channels - column)), placed(place(row, column)) {}

    // Where column c of row r is; the same in every eighth row.
    __device__ __forceinline__ static int place(int r, int c) {
        return PLACES == 1 ? c : (c / VEC ^ r / (8 / PLACES) % PLACES) * VEC + c % VEC;
    }

    // Read rows [low, high), zeros elsewhere; `from` is where this thread's first row is.
    template <int PITCH>
    __device__ __forceinline__ void read(scalar_t (&to)[T][PITCH], const scalar_t *from, int stride,
                                         int low, int high, bool vector) const {
#pragma unroll
        for (int k = 0; k < COUNT; ++k) {
            const int r = row + k * ROW_STEP;
            if (T % ROW_STEP && r >= T) break;
            const bool valid = r >= low && r < high && columns > 0;
            const scalar_t *at = from + static_cast<long long>(k * ROW_STEP) * stride;
            if (vector) {
                copy_async<16>(&to[r][placed], at, valid);
            } else {
#pragma unroll 1
                for (int j = 0; j < VEC; ++j)
                    to[r][placed + j] = valid && j < columns ? at[j] : from_float<scalar_t>(0.f);
            }
        }
    }
};

// A thread's part in bringing B and C to shared memory: up to four elements of every ROW_STEP-th
// row. `load` starts reading them into registers, as the words that they are in memory, so that
// nothing waits for them before `store` converts them, once for all channels. In shared memory each
// of the S lanes of a channel finds the B of its NS states, then the C, in a SEGMENT of a row.
template <int T, int NS, int S, int THREADS, typename scalar_t>
struct MatrixItem {
    static constexpr int N = NS * S;
    // Four floats more where segments would lie at multiples of the 128 bytes of all banks, and
    // rows apart from each other for those who store them.
    static constexpr int SEGMENT = 2 * NS + (S > 1 && NS >= 8 ? 4 : 0);
    static constexpr int PITCH = S * SEGMENT + (NS == 1 ? 2 : NS == 2 ? 4 : 0);
    static constexpr int QUAD = N < 4 ? N : 4;
    static constexpr int ROW_ITEMS = 2 * N / QUAD;
    static constexpr int ROW_STEP = THREADS / ROW_ITEMS;
    static constexpr int COUNT = (T + ROW_STEP - 1) / ROW_STEP;
    static_assert(THREADS % ROW_ITEMS == 0, "a thread stays at its states");
    static constexpr int WORDS = (QUAD * sizeof(scalar_t) + 3) / 4;
    int row, n, states;
    bool is_C;
    unsigned raw[COUNT][WORDS];

    __device__ __forceinline__ MatrixItem(int thread, int states)
        : row(thread / ROW_ITEMS), n(thread % (N / QUAD) * QUAD), states(states - n),
          is_C(thread / (N / QUAD) % 2) {}

    // `from` is where this thread's first row is; rows outside [low, high) are zero.
    __device__ __forceinline__ void load(const scalar_t *from, int stride, int low, int high,
                                         bool vector) {
#pragma unroll
        for (int k = 0; k < COUNT; ++k) {
            const int r = row + k * ROW_STEP;
            const scalar_t *at = from + static_cast<long long>(k * ROW_STEP) * stride;
#pragma unroll
            for (int w = 0; w < WORDS; ++w) raw[k][w] = 0;
            if (r < low || r >= high) continue;
            if (QUAD == 4 && vector) {
                if (states <= 0) continue;
                if constexpr (WORDS == 4) {
                    const uint4 words = *reinterpret_cast<const uint4 *>(at);
                    raw[k][0] = words.x, raw[k][1] = words.y;
                    raw[k][2 % WORDS] = words.z, raw[k][3 % WORDS] = words.w;
                } else if constexpr (WORDS == 2) {
                    const uint2 words = *reinterpret_cast<const uint2 *>(at);
                    raw[k][0] = words.x, raw[k][1 % WORDS] = words.y;
                }
            } else {
#pragma unroll
                for (int j = 0; j < QUAD; ++j) {
                    if (j >= states) continue;
                    if constexpr (sizeof(scalar_t) == 4) {
                        raw[k][j] = reinterpret_cast<const unsigned *>(at)[j];
                    } else {
                        const unsigned bits = reinterpret_cast<const unsigned short *>(at)[j];
                        raw[k][j / 2] |= bits << 16 * (j % 2);
                    }
                }
            }
        }
    }

    __device__ __forceinline__ void store(float (&to)[T][PITCH]) const {
#pragma unroll
        for (int k = 0; k < COUNT; ++k) {
            const int r = row + k * ROW_STEP;
            if (T % ROW_STEP && r >= T) break;
            float value[QUAD];
#pragma unroll
            for (int j = 0; j < QUAD; ++j) {
                if constexpr (sizeof(scalar_t) == 4) {
                    value[j] = __uint_as_float(raw[k][j]);
                } else {
                    const float2 pair = unpack_pair(scalar_t(), raw[k][j / 2]);
                    value[j] = j % 2 ? pair.y : pair.x;
                }
            }
            constexpr int W = NS < QUAD ? NS : QUAD;  // side by side in shared memory
#pragma unroll
            for (int j = 0; j < QUAD; j += W) {
                Packet<float, W> packet;
#pragma unroll
                for (int i = 0; i < W; ++i) packet.at[i] = value[j + i];
                float *at = &to[r][(n + j) / NS * SEGMENT + is_C * NS + (n + j) % NS];
                *reinterpret_cast<Packet<float, W> *>(at) = packet;
            }
        }
    }
};
