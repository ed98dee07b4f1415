// Forward of the selective scan, one direction or both in one launch. Contract:
// vim/ops/selective_scan.py.
//
// Floor: one exponential for each (token, channel, state); the special-function unit does 16 a
// clock an SM. All else is arranged to stay below it: a lane keeps NS states of CPT channels in
// registers and walks along L, five instructions a state and token. S lanes share the N = NS * S
// states of a channel where B * D alone gives the chip too few threads; their shares of y are summed
// for S tokens together.
//
// A block has a team of threads for each direction, for the same CH channels and the same tokens.
// The reverse team walks the tiles from the last to the first. Whichever team is first at a tile
// writes its share of y; the one that comes second adds its own, gates, and writes the result, so
// that both directions need one launch and no pass to merge them. Accumulation is in float32.

#include "selective_scan.cuh"

enum Mode {
    OUTPUT = 0,         // y
    STATES_ONLY = 1,    // no y: states before the tiles, or states after the chunks
    STATES_AND_DZ = 2,  // for the backward: states before the tiles, and the gradient of z
};

// Which team comes to a tile.
enum Visit { FIRST, MIDDLE, SECOND };

template <typename scalar_t, int NS, int S, int CH, int T, int DIRS, int MODE>
struct TeamShared {
    alignas(16) scalar_t u[2][T][CH];
    alignas(16) scalar_t dt[2][T][CH];
    static constexpr int Y_ROWS = MODE == STATES_ONLY ? 1 : T;
    alignas(16) scalar_t z[Y_ROWS][CH];
    alignas(16) scalar_t dy[MODE == STATES_AND_DZ ? T : 1][CH];
    alignas(16) scalar_t other[DIRS == 2 ? Y_ROWS : 1][CH];  // the first team's share of y
    alignas(16) float BC[2][T][MatrixItem<T, NS, S, 2 * NS * S, scalar_t>::PITCH];
    alignas(16) float y[Y_ROWS][CH];
    alignas(16) float2 drive[S > 1 ? CH * (T + 2) : 1];  // (delta, delta * u) for S > 1
};

// What a lane knows of its CPT channels, and the recurrence for its NS states of each.
template <int NS, int CPT>
struct Lane {
    float h[CPT][NS], A2[CPT][NS];  // state; A * log2(e)
    float skip[CPT], bias[CPT];     // D, dt_bias

    // One token; `out` gets the lane's share of <C, h> added.
    template <bool HAS_Y>
    __device__ __forceinline__ void advance(const float *BC, const float (&delta)[CPT],
                                            const float (&du)[CPT], float (&out)[CPT]) {
        constexpr int W = NS < 4 ? NS : 4;
#pragma unroll
        for (int i = 0; i < NS; i += W) {
            float b[W], c[W];
            if constexpr (NS < 4) {
                float both[2 * NS];
                load(BC, both);
#pragma unroll
                for (int k = 0; k < W; ++k) b[k] = both[k], c[k] = both[NS + k];
            } else {
                load(BC + i, b);
                if constexpr (HAS_Y) load(BC + NS + i, c);
            }
#pragma unroll
            for (int j = 0; j < CPT; ++j) {
#pragma unroll
                for (int k = 0; k < W; ++k) {
                    const float a = fast_exp2(delta[j] * A2[j][i + k]);
                    h[j][i + k] = fmaf(a, h[j][i + k], du[j] * b[k]);
                    if constexpr (HAS_Y) out[j] = fmaf(h[j][i + k], c[k], out[j]);
                }
            }
        }
    }
};

// U tokens for a thread that holds whole channels (S = 1). The step sizes come first, so that their
// long chains overlap.
template <int U, int MODE, bool SOFTPLUS, int NS, int CPT, typename scalar_t, int CH, int T,
          int DIRS>
__device__ __forceinline__ void scan_rows(Lane<NS, CPT> &lane,
                                          TeamShared<scalar_t, NS, 1, CH, T, DIRS, MODE> &my,
                                          int stage, int r, int c0, float (&delta_sum)[CPT]) {
    float delta[U][CPT], du[U][CPT], out[U][CPT];
#pragma unroll
    for (int t = 0; t < U; ++t) {
        float u[CPT];
        load(&my.u[stage][r + t][c0], u);
        load(&my.dt[stage][r + t][c0], delta[t]);
#pragma unroll
        for (int j = 0; j < CPT; ++j) {
            delta[t][j] += lane.bias[j];
            if constexpr (SOFTPLUS) delta[t][j] = softplus<scalar_t>(delta[t][j]);
            du[t][j] = delta[t][j] * u[j];
            out[t][j] = lane.skip[j] * u[j];
            if constexpr (MODE == STATES_ONLY) delta_sum[j] += delta[t][j];
        }
    }
#pragma unroll
    for (int t = 0; t < U; ++t) {
        lane.template advance<MODE != STATES_ONLY>(my.BC[stage][r + t], delta[t], du[t], out[t]);
        if constexpr (MODE != STATES_ONLY) store(&my.y[r + t][c0], out[t]);
    }
}

template <typename scalar_t, int NS, int S, int CPT, int CH, int T, int DIRS, int MODE,
          bool SOFTPLUS, int MIN_BLOCKS>
__global__ void __launch_bounds__(CH / CPT * S * DIRS, MIN_BLOCKS)
selective_scan_fwd_kernel(const ScanParams p) {
    constexpr int N = NS * S;
    constexpr int TEAM = CH / CPT * S;  // threads of a direction
    constexpr int QUAD = N < 4 ? N : 4;
    constexpr bool HAS_Y = MODE != STATES_ONLY;
    using Shared = TeamShared<scalar_t, NS, S, CH, T, DIRS, MODE>;
    __shared__ Shared shared[DIRS];

    const float scale = p.scale;

    // Who this thread is.
    const int team = DIRS == 2 ? threadIdx.x / TEAM : 0;
    const int thread = threadIdx.x % TEAM;
    const int s = thread % S;             // its share of the states
    const int c0 = thread / S * CPT;      // its first channel in the block's
    const bool backwards = DIRS == 2 ? team == 1 : p.reverse != 0;
    Shared &my = shared[team];

    // What this block does: channels [d0, d0 + channels) of one group, tokens of one chunk.
    const int group_channels = static_cast<int>(p.channels) / static_cast<int>(p.groups);
    const int group_blocks = (group_channels + CH - 1) / CH;
    unsigned index = blockIdx.x;
    const int in_group = index % group_blocks * CH;
    index /= group_blocks;
    const int group = index % static_cast<unsigned>(p.groups);
    index /= static_cast<unsigned>(p.groups);
    const int chunk = index % static_cast<unsigned>(p.chunks);
    const long long batch = index / static_cast<unsigned>(p.chunks);
    const int channels = min(CH, group_channels - in_group);
    const int d0 = group * group_channels + in_group;
    const long long first_token = chunk * p.chunk;
    const Walk<T> walk(min(p.chunk, p.length - first_token), backwards);
    const int tiles = walk.tiles, sign = walk.sign;
    auto visit_of = [&](int step) {
        if (DIRS == 1 || 2 * step > tiles - 1) return SECOND;
        return 2 * step == tiles - 1 ? MIDDLE : FIRST;
    };

    // This thread's part in moving tiles, and its address in each tensor for the tile to come.
    using Item = TileItem<T, CH, TEAM, scalar_t>;
    const Item item(thread, channels);
    MatrixItem<T, NS, S, TEAM, scalar_t> matrices(thread, p.states);
    const long long item_token = first_token + walk.first(item.row);
    auto start_of = [&](const void *x, long long offset, long long stride) {
        return static_cast<const scalar_t *>(x) + offset + item_token * stride + d0 + item.column;
    };
    const int u_stride = sign * static_cast<int>(p.u_token);
    const int dt_stride = sign * static_cast<int>(p.dt_token);
    const int z_stride = sign * static_cast<int>(p.z_token);
    const int dy_stride = sign * static_cast<int>(p.dy_token);
    const int y_stride = sign * static_cast<int>(p.channels);
    const scalar_t *u = start_of(p.u, team * p.u_dir + batch * p.u_batch, p.u_token);
    const scalar_t *dt = start_of(p.dt, team * p.dt_dir + batch * p.dt_batch, p.dt_token);
    const scalar_t *z = start_of(p.z, batch * p.z_batch, p.z_token);
    const scalar_t *dy = start_of(p.dy, batch * p.dy_batch, p.dy_token);
    scalar_t *y = const_cast<scalar_t *>(
        start_of(p.y, batch * p.length * p.channels, p.channels));
    const long long B_offset = team * p.B_dir + batch * p.B_batch + group * p.B_group;
    const long long C_offset = team * p.C_dir + batch * p.C_batch + group * p.C_group;
    const long long BC_stride = matrices.is_C ? p.C_token : p.B_token;
    const scalar_t *BC = static_cast<const scalar_t *>(matrices.is_C ? p.C : p.B) +
                         (matrices.is_C ? C_offset : B_offset) + matrices.n +
                         (first_token + walk.first(matrices.row)) * BC_stride;
    const int BC_step = sign * static_cast<int>(BC_stride);

    // Ask for the tiles of a step, which follows the step asked for last.
    auto prefetch = [&](int step) {
        const int stage = step % 2, low = walk.low(step), high = walk.high(step);
        item.read(my.u[stage], u, u_stride, low, high, p.vector_rows);
        item.read(my.dt[stage], dt, dt_stride, low, high, p.vector_rows);
        matrices.load(BC, BC_step, low, high, p.vector_bc);
        u += static_cast<long long>(T) * u_stride;
        dt += static_cast<long long>(T) * dt_stride;
        BC += static_cast<long long>(T) * BC_step;
    };

    // Per channel constants and the state at the start.
    Lane<NS, CPT> lane;
    float delta_sum[CPT];
    const long long chunk_row = ((team * p.batch + batch) * p.chunks + chunk) * p.channels + d0;
#pragma unroll
    for (int j = 0; j < CPT; ++j) {
        const bool valid = c0 + j < channels;
        const long long d = team * p.channels + d0 + c0 + j;
        lane.skip[j] = valid && p.D != nullptr ? p.D[d] : 0.f;
        lane.bias[j] = valid && p.dt_bias != nullptr ? p.dt_bias[d] : 0.f;
        delta_sum[j] = 0.f;
        if (NS % 4 == 0 && p.vector_states) {
#pragma unroll
            for (int i = 0; i < NS; i += 4) {
                const int n = s * NS + i;
                float4 A = {}, start = {};
                if (valid && n < p.states) {
                    A = *reinterpret_cast<const float4 *>(p.A + d * p.states + n);
                    if (p.start != nullptr)
                        start = *reinterpret_cast<const float4 *>(
                            p.start + (chunk_row + c0 + j) * p.states + n);
                }
                const float as[4] = {A.x, A.y, A.z, A.w};
                const float starts[4] = {start.x, start.y, start.z, start.w};
#pragma unroll
                for (int k = 0; k < 4; ++k) {
                    lane.A2[j][(i + k) % NS] = LOG2_E * as[k];
                    lane.h[j][(i + k) % NS] = starts[k];
                }
            }
            continue;
        }
#pragma unroll
        for (int i = 0; i < NS; ++i) {
            const int n = s * NS + i;
            const bool there = valid && n < p.states;
            lane.A2[j][i] = there ? LOG2_E * p.A[d * p.states + n] : 0.f;
            lane.h[j][i] = there && p.start != nullptr
                          ? p.start[(chunk_row + c0 + j) * p.states + n] : 0.f;
        }
    }

    // The constants of the channel whose step sizes this thread works out, for S > 1.
    constexpr int WARP_CHANNELS = 32 / S * CPT;
    const int drive_channel = thread / 32 * WARP_CHANNELS + threadIdx.x % WARP_CHANNELS;
    float drive_bias = 0.f, drive_skip = 0.f;
    if (S > 1 && drive_channel < channels) {
        const long long d = team * p.channels + d0 + drive_channel;
        if (p.dt_bias != nullptr) drive_bias = p.dt_bias[d];
        if (p.D != nullptr) drive_skip = p.D[d];
    }

    prefetch(0);
    commit_copies();
    matrices.store(my.BC[0]);

#pragma unroll 1
    for (int step = 0; step < tiles; ++step) {
        const int stage = step % 2;
        const int low = walk.low(step), high = walk.high(step);
        const Visit visit = visit_of(step);

        // Stage 1: this tile has arrived and the last one is written out; ask for the next.
        wait_copies<0>();
        __syncthreads();
        if constexpr (HAS_Y) {
            if (visit != FIRST) {
                if (p.z != nullptr) item.read(my.z, z, z_stride, low, high, p.vector_rows);
                if constexpr (MODE == STATES_AND_DZ)
                    item.read(my.dy, dy, dy_stride, low, high, p.vector_rows);
                if constexpr (DIRS == 2) {
                    if (visit == SECOND)
                        item.read(my.other, y, y_stride, low, high, p.vector_rows);
                }
            }
            z += static_cast<long long>(T) * z_stride;
            if constexpr (MODE == STATES_AND_DZ) dy += static_cast<long long>(T) * dy_stride;
        }
        commit_copies();
        if (step + 1 < tiles) prefetch(step + 1);
        commit_copies();

        if (MODE != OUTPUT && p.tile_states != nullptr) {
            const long long all_tiles = (p.length + T - 1) / T;
            const long long row =
                (team * p.batch + batch) * all_tiles + first_token / T + walk.tile(step);
#pragma unroll
            for (int j = 0; j < CPT; ++j) {
                if (c0 + j >= channels) continue;
                constexpr int W = NS < QUAD ? NS : QUAD;
#pragma unroll
                for (int i = 0; i < NS; i += W) {
                    const int n = s * NS + i;
                    Packet<float, W> packet;
#pragma unroll
                    for (int k = 0; k < W; ++k) packet.at[k] = lane.h[j][i + k];
                    const long long at =
                        ((row * (N / QUAD) + n / QUAD) * p.channels + d0 + c0 + j) * QUAD + n % QUAD;
                    *reinterpret_cast<Packet<float, W> *>(p.tile_states + at) = packet;
                }
            }
        }

        // Stage 2: the recurrence.
        if constexpr (S == 1) {
            int r = low;
            constexpr int U = 4 / CPT;  // more would cost registers
#pragma unroll 1
            for (; r + U <= high; r += U)
                scan_rows<U, MODE, SOFTPLUS>(lane, my, stage, r, c0, delta_sum);
#pragma unroll 1
            for (; r < high; ++r)
                scan_rows<1, MODE, SOFTPLUS>(lane, my, stage, r, c0, delta_sum);
        } else {
            // A warp works out the step sizes of its channels for the whole tile, a value a lane.
            auto drive_at = [&](int r, int c) {
                return &my.drive[CPT == 1 ? c * (T + 2) + r : r * CH + c];
            };
            constexpr int ROWS = 32 / WARP_CHANNELS > T ? T : 32 / WARP_CHANNELS;
            const int drive_row = threadIdx.x % 32 / WARP_CHANNELS;
#pragma unroll
            for (int r = drive_row; r < T && drive_row < ROWS; r += ROWS) {
                const float u_ = to_float(my.u[stage][r][drive_channel]);
                float delta = to_float(my.dt[stage][r][drive_channel]) + drive_bias;
                if constexpr (SOFTPLUS) delta = softplus<scalar_t>(delta);
                if (r < low || r >= high) delta = 0.f;  // leaves the state as it is
                *drive_at(r, drive_channel) = make_float2(delta, delta * u_);
                if constexpr (HAS_Y) my.y[r][drive_channel] = drive_skip * u_;
            }
            __syncwarp();
            constexpr int U = S < T ? S : T;  // tokens whose y are summed together
#pragma unroll 1
            for (int r = low / U * U; r < high; r += U) {
                float shares[U * CPT];
                float delta[U][CPT], du[U][CPT];
                constexpr int VALUES = CPT == 1 ? 4 : 2 * CPT;  // two tokens of one channel, or one
#pragma unroll
                for (int t = 0; t < U; t += VALUES / 2 / CPT) {
                    float values[VALUES];
                    load(reinterpret_cast<const float *>(drive_at(r + t, c0)), values);
#pragma unroll
                    for (int k = 0; k < VALUES / 2; ++k) {
                        delta[t + k / CPT][k % CPT] = values[2 * k];
                        du[t + k / CPT][k % CPT] = values[2 * k + 1];
                    }
                }
#pragma unroll
                for (int t = 0; t < U; ++t) {
                    float out[CPT];
#pragma unroll
                    for (int j = 0; j < CPT; ++j) {
                        out[j] = 0.f;
                        if constexpr (MODE == STATES_ONLY) delta_sum[j] += delta[t][j];
                    }
                    lane.template advance<HAS_Y>(my.BC[stage][r + t] + s * 2 * NS, delta[t], du[t],
                                                 out);
#pragma unroll
                    for (int j = 0; j < CPT; ++j) shares[t * CPT + j] = out[j];
                }
                if constexpr (HAS_Y) {
                    reduce_transposed<S>(shares, s);
                    if (U == S || s % (S / U) == 0) {
#pragma unroll
                        for (int j = 0; j < CPT; ++j) my.y[r + s / (S / U)][c0 + j] += shares[j];
                    }
                }
            }
        }

        // Stage 3: add the other direction, gate and write out, 16 bytes at a time.
        if (step + 1 < tiles) matrices.store(my.BC[(step + 1) % 2]);
        if constexpr (HAS_Y) {
            wait_copies<1>();  // this tile's z and share; the next tile may be on its way
            __syncthreads();
            constexpr int VEC = Item::VEC;
#pragma unroll
            for (int k = 0; k < Item::COUNT; ++k) {
                const int r = item.row + k * Item::ROW_STEP, c = item.column;
                if (r < low || r >= high || item.columns <= 0) continue;
                if (visit == MIDDLE && team == 1) continue;
                float sum[VEC];
                load(&my.y[r][c], sum);
                if (DIRS == 2 && visit != FIRST) {
                    float other[VEC];
                    if (visit == SECOND) {
                        load(&my.other[r][c], other);
                    } else {
                        load(&shared[DIRS - 1].y[T - 1 - r][c], other);
                    }
#pragma unroll
                    for (int j = 0; j < VEC; ++j) sum[j] = (sum[j] + other[j]) * scale;
                }
                if (visit != FIRST && p.z != nullptr) {
                    float z_[VEC];
                    load(&my.z[r][c], z_);
                    if constexpr (MODE == STATES_AND_DZ) {
                        float dy_[VEC];
                        load(&my.dy[r][c], dy_);
#pragma unroll
                        for (int j = 0; j < VEC; ++j) {
                            const float gate = fast_sigmoid(z_[j]);
                            sum[j] *= dy_[j] * gate * fmaf(z_[j], 1.f - gate, 1.f);
                        }
                    } else {
#pragma unroll
                        for (int j = 0; j < VEC; ++j) sum[j] *= fast_silu(z_[j]);
                    }
                }
                scalar_t *to = y + static_cast<long long>(k * Item::ROW_STEP) * y_stride;
                if (p.vector_rows) {
                    store(to, sum);
                } else {
#pragma unroll
                    for (int j = 0; j < VEC; ++j)
                        if (j < item.columns) to[j] = from_float<scalar_t>(sum[j]);
                }
            }
            y += static_cast<long long>(T) * y_stride;
        }
    }

#pragma unroll
    for (int j = 0; j < CPT; ++j) {
        if (c0 + j >= channels) continue;
        if (MODE == STATES_ONLY && p.delta_sum != nullptr && s == 0)
            p.delta_sum[chunk_row + c0 + j] = delta_sum[j];
        if (p.end == nullptr) continue;
#pragma unroll
        for (int i = 0; i < NS; ++i) {
            const int n = s * NS + i;
            if (n < p.states) p.end[(chunk_row + c0 + j) * p.states + n] = lane.h[j][i];
        }
    }
}

// From the end states of chunks that started from zero to the state each chunk starts from: one
// thread a (direction, batch item, channel, state) walks along the chunks. `start` is read for the
// state before the first chunk, if there is one; `final_state` is the state after the last.
__global__ void selective_scan_carry_kernel(const float *A, const float *initial, const float *end,
                                            const float *delta_sum, float *start,
                                            float *final_state, long long rows, long long batch,
                                            long long channels, long long states, long long chunks,
                                            long long first_reverse_row) {
    const long long i = blockIdx.x * static_cast<long long>(blockDim.x) + threadIdx.x;
    const long long per_item = channels * states;  // i counts (row, d, n), rows (dirs, B)
    if (i >= rows * per_item) return;
    const long long row = i / per_item, d = i / states % channels, dn = i % per_item;
    const float A2 = LOG2_E * A[row / batch * per_item + dn];
    float h = initial == nullptr ? 0.f : initial[i];
    for (long long k = 0; k < chunks; ++k) {
        const long long chunk = row >= first_reverse_row ? chunks - 1 - k : k;
        const long long at = (row * chunks + chunk) * per_item + dn;
        start[at] = h;
        h = fmaf(fast_exp2(A2 * delta_sum[(row * chunks + chunk) * channels + d]), h, end[at]);
    }
    if (final_state != nullptr) final_state[i] = h;
}
