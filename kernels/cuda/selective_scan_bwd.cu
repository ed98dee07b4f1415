// Backward of the selective scan, one direction or both in one launch. Derivation:
// docs/scan_backward.md; contract: vim/ops/selective_scan.py.
//
// The forward kernel has run once more and left the state before each tile of T tokens, and the
// gradient of z. A block takes the tiles of one direction and CH channels from the last in scan order
// to the first: it recomputes the states of the tile from the saved one, keeps the decays and the
// decayed states of HELD tokens in registers, and runs the adjoint recurrence over them in reverse.
//
// Sums over channels (B, C) go through the warp, then the block, then one partial sum a block to
// memory; sums over tokens (A, D, dt_bias) leave one partial sum a batch item. The host adds those
// in a fixed order, so that results are deterministic. Accumulation is in float32.

#include "selective_scan.cuh"

// Arguments, each eight bytes, after ScanParams. P blocks share a group's channels.
struct ScanGradients {
    const float *dend;  // (dirs, B, D, N) gradient of the final state, or null
    float *dstart;      // (dirs, B, D, N), or null
    void *du, *ddt;     // (dirs, B, L, D)
    float *dBC;         // (P, dirs, B, L, G, 2 N) partial sums
    float *dA;          // (dirs, B, D, N) partial sums
    float *dD, *dbias;  // (dirs, B, D) partial sums
};

// What the recurrences need of a token and channel.
struct alignas(16) Drive {
    float delta;  // step size
    float du;     // delta * u
    float g;      // gradient of <C, h> + D * u
    float slope;  // derivative of delta by dt
};

// Code for sm_80 needs a few registers more than three blocks leave.
#if __CUDA_ARCH__ >= 900
constexpr int MOST_BLOCKS = 3;
#else
constexpr int MOST_BLOCKS = 2;
#endif

template <typename scalar_t, int NS, int S, int CPT, int CH, int T, int HELD, bool SOFTPLUS,
          int MIN_BLOCKS>
__global__ void __launch_bounds__(CH / CPT * S,
                                  MIN_BLOCKS < MOST_BLOCKS ? MIN_BLOCKS : MOST_BLOCKS)
selective_scan_bwd_kernel(const ScanParams p, const ScanGradients grad) {
    constexpr int N = NS * S;
    constexpr int THREADS = CH / CPT * S;
    constexpr int WARPS = THREADS / 32;
    constexpr int PARTS = T / HELD;
    constexpr int QUAD = N < 4 ? N : 4;
    constexpr int W = NS < 4 ? NS : 4;
    static_assert(S % CPT == 0, "a thread prepares tokens of one channel");
    using Item = TileItem<T, CH, THREADS, scalar_t>;
    using Matrices = MatrixItem<T, NS, S, THREADS, scalar_t>;

    __shared__ struct {
        alignas(16) scalar_t u[2][T][CH], dt[2][T][CH], dy[2][T][CH], z[2][T][CH];
        alignas(16) float BC[2][T][Matrices::PITCH];
        alignas(16) Drive drive[T][CH];
        alignas(16) float2 sums[T][CH];           // <dh, B>, <A2, dh * a * h>
        alignas(16) float dBC[T][WARPS][2 * N];   // partial sums of the warps
    } my;

    // Who this thread is: for the recurrences, and for what is done a channel and token at a time.
    const int thread = threadIdx.x, warp = thread / 32;
    const int s = thread % S, c0 = thread / S * CPT;
    const int own_channel = thread % CH, own_row = thread / CH;
    constexpr int OWN_STEP = THREADS / CH;
    const float scale = p.scale;

    // What this block does.
    const int group_channels = static_cast<int>(p.channels) / static_cast<int>(p.groups);
    const int group_blocks = (group_channels + CH - 1) / CH;
    unsigned index = blockIdx.x;
    const int group_block = index % group_blocks;
    index /= group_blocks;
    const int group = index % static_cast<unsigned>(p.groups);
    index /= static_cast<unsigned>(p.groups);
    const long long batch = index % static_cast<unsigned>(p.batch);
    const int dir = index / static_cast<unsigned>(p.batch);
    const int channels = min(CH, group_channels - group_block * CH);
    const int d0 = group * group_channels + group_block * CH;
    const long long item_row = dir * p.batch + batch;
    const Walk<T> walk(p.length, dir == 1 || p.reverse);
    const int tiles = walk.tiles, sign = walk.sign;

    // Addresses of this thread's part of the tile to come, the last one first.
    const Item item(thread, channels);
    Matrices matrices(thread, p.states);
    const long long last = static_cast<long long>(sign) * T * (tiles - 1);
    const long long item_token = last + walk.first(item.row);
    auto start_of = [&](const void *x, long long offset, long long stride) {
        return static_cast<const scalar_t *>(x) + offset + item_token * stride + d0 + item.column;
    };
    const int u_stride = sign * static_cast<int>(p.u_token);
    const int dt_stride = sign * static_cast<int>(p.dt_token);
    const int z_stride = sign * static_cast<int>(p.z_token);
    const int dy_stride = sign * static_cast<int>(p.dy_token);
    const scalar_t *u = start_of(p.u, dir * p.u_dir + batch * p.u_batch, p.u_token);
    const scalar_t *dt = start_of(p.dt, dir * p.dt_dir + batch * p.dt_batch, p.dt_token);
    const scalar_t *z = start_of(p.z, batch * p.z_batch, p.z_token);
    const scalar_t *dy = start_of(p.dy, batch * p.dy_batch, p.dy_token);
    const long long B_offset = dir * p.B_dir + batch * p.B_batch + group * p.B_group;
    const long long C_offset = dir * p.C_dir + batch * p.C_batch + group * p.C_group;
    const long long BC_stride = matrices.is_C ? p.C_token : p.B_token;
    const scalar_t *BC = static_cast<const scalar_t *>(matrices.is_C ? p.C : p.B) +
                         (matrices.is_C ? C_offset : B_offset) + matrices.n +
                         (last + walk.first(matrices.row)) * BC_stride;
    const int BC_step = sign * static_cast<int>(BC_stride);
    const bool lane_valid[2] = {c0 < channels, c0 + CPT - 1 < channels};
    static_assert(CPT <= 2, "lane_valid tells of the first and the last channel");

    // Ask for the tile of a step; steps count in scan order and come from the last to the first.
    auto prefetch = [&](int step) {
        const int stage = step % 2, low = walk.low(step), high = walk.high(step);
        item.read(my.u[stage], u, u_stride, low, high, p.vector_rows);
        item.read(my.dt[stage], dt, dt_stride, low, high, p.vector_rows);
        item.read(my.dy[stage], dy, dy_stride, low, high, p.vector_rows);
        if (p.z != nullptr) item.read(my.z[stage], z, z_stride, low, high, p.vector_rows);
        matrices.load(BC, BC_step, low, high, p.vector_bc);
        u -= static_cast<long long>(T) * u_stride;
        dt -= static_cast<long long>(T) * dt_stride;
        dy -= static_cast<long long>(T) * dy_stride;
        z -= static_cast<long long>(T) * z_stride;
        BC -= static_cast<long long>(T) * BC_step;
    };
    // The state before the tile of a step.
    auto load_start = [&](int step, float (&h)[CPT][NS]) {
        const long long row = item_row * tiles + walk.tile(step);
#pragma unroll
        for (int j = 0; j < CPT; ++j) {
#pragma unroll
            for (int i = 0; i < NS; i += W) {
                const int n = s * NS + i;
                Packet<float, W> packet = {};
                if (lane_valid[j])
                    packet = *reinterpret_cast<const Packet<float, W> *>(
                        p.tile_states +
                        ((row * (N / QUAD) + n / QUAD) * p.channels + d0 + c0 + j) * QUAD + n % QUAD);
#pragma unroll
                for (int k = 0; k < W; ++k) h[j][i + k] = packet.at[k];
            }
        }
    };
    auto load_row = [&](const float *at, float (&b)[NS], float (&c)[NS]) {
        if constexpr (NS < 4) {
            float both[2 * NS];
            load(at, both);
#pragma unroll
            for (int i = 0; i < NS; ++i) b[i] = both[i], c[i] = both[NS + i];
        } else {
            load(at, b);
            load(at + NS, c);
        }
    };

    // Constants and sums of channels, and the gradient of the state after the last token.
    float A2[CPT][NS], dh[CPT][NS], dA[CPT][NS];
#pragma unroll
    for (int j = 0; j < CPT; ++j) {
#pragma unroll
        for (int i = 0; i < NS; ++i) {
            const int n = s * NS + i;
            const bool there = lane_valid[j] && n < p.states;
            const long long d = d0 + c0 + j;
            A2[j][i] = there ? LOG2_E * p.A[(dir * p.channels + d) * p.states + n] : 0.f;
            dh[j][i] = there && grad.dend != nullptr
                           ? grad.dend[(item_row * p.channels + d) * p.states + n] : 0.f;
            dA[j][i] = 0.f;
        }
    }
    const bool own_valid = own_channel < channels;
    const int own_d = dir * static_cast<int>(p.channels) + d0 + own_channel;
    const float skip = own_valid && p.D != nullptr ? p.D[own_d] : 0.f;
    const float bias = own_valid && p.dt_bias != nullptr ? p.dt_bias[own_d] : 0.f;
    float dD = 0.f, dbias = 0.f;

    // Where the gradients of row 0 of the first tile go, and the distance of rows.
    const int states = p.states;
    const int own_stride = sign * static_cast<int>(p.channels);
    const long long own_first =
        (item_row * p.length + walk.first(0)) * p.channels + d0 + own_channel;
    const int dBC_stride = sign * static_cast<int>(p.groups) * 2 * states;
    const long long partial_rows = gridDim.x / static_cast<unsigned>(group_blocks * p.groups);
    float *dBC_first =
        grad.dBC + (((group_block * partial_rows + item_row) * p.length + walk.first(0)) * p.groups +
                    group) * 2 * states;

    prefetch(tiles - 1);
    commit_copies();
    matrices.store(my.BC[(tiles - 1) % 2]);

#pragma unroll 1
    for (int step = tiles - 1; step >= 0; --step) {
        const int stage = step % 2;
        const int low = walk.low(step), high = walk.high(step);

        // Stage 1: this tile has arrived; ask for the one before it.
        wait_copies<0>();
        __syncthreads();
        float h_start[CPT][NS];
        load_start(step, h_start);
        if (step > 0) prefetch(step - 1);
        commit_copies();

        // Stage 2: what needs no state, a token and channel a thread.
#pragma unroll
        for (int r = own_row; r < T; r += OWN_STEP) {
            Drive drive;
            const float x = to_float(my.dt[stage][r][own_channel]) + bias;
            drive.delta = SOFTPLUS ? softplus<scalar_t>(x) : x;
            drive.slope = SOFTPLUS ? fast_sigmoid(x) : 1.f;
            drive.g = scale * to_float(my.dy[stage][r][own_channel]);
            if (p.z != nullptr) drive.g *= fast_silu(to_float(my.z[stage][r][own_channel]));
            if (r < low || r >= high) drive.delta = 0.f, drive.g = 0.f;  // leaves states as they are
            drive.du = drive.delta * to_float(my.u[stage][r][own_channel]);
            my.drive[r][own_channel] = drive;
        }
        __syncthreads();

        // Stages 3 and 4 take the tile in PARTS, the last one first, since the registers hold the
        // decays of HELD tokens only: the states before a part are found from the tile's start.
#pragma unroll 1
        for (int part = PARTS - 1; part >= 0; --part) {
            float h[CPT][NS];
#pragma unroll
            for (int j = 0; j < CPT; ++j)
#pragma unroll
                for (int i = 0; i < NS; ++i) h[j][i] = h_start[j][i];
#pragma unroll 1
            for (int t = 0; t < part * HELD; ++t) {
                float b[NS], c[NS];
                load_row(&my.BC[stage][t][s * 2 * NS], b, c);
#pragma unroll
                for (int j = 0; j < CPT; ++j) {
                    const float2 drive = *reinterpret_cast<const float2 *>(&my.drive[t][c0 + j]);
#pragma unroll
                    for (int i = 0; i < NS; ++i)
                        h[j][i] = fmaf(drive.y, b[i], fast_exp2(drive.x * A2[j][i]) * h[j][i]);
                }
            }

            // Stage 3: the states once more. `decayed` is a * h before the token.
            float a[HELD][CPT][NS], decayed[HELD][CPT][NS];
#pragma unroll
            for (int k = 0; k < HELD; ++k) {
                const int t = part * HELD + k;
                float b[NS], c[NS];
                load_row(&my.BC[stage][t][s * 2 * NS], b, c);
#pragma unroll
                for (int j = 0; j < CPT; ++j) {
                    const float2 drive = *reinterpret_cast<const float2 *>(&my.drive[t][c0 + j]);
#pragma unroll
                    for (int i = 0; i < NS; ++i) {
                        a[k][j][i] = fast_exp2(drive.x * A2[j][i]);
                        decayed[k][j][i] = a[k][j][i] * h[j][i];
                        h[j][i] = fmaf(drive.y, b[i], decayed[k][j][i]);
                    }
                }
            }

            // Stage 4: the adjoint recurrence, from the last token of the part to the first.
#pragma unroll
            for (int k = HELD - 1; k >= 0; --k) {
                const int t = part * HELD + k;
                float b[NS], c[NS], dBC[2 * NS], sums[2 * CPT];
                load_row(&my.BC[stage][t][s * 2 * NS], b, c);
#pragma unroll
                for (int j = 0; j < CPT; ++j) {
                    const Drive drive = my.drive[t][c0 + j];
                    sums[2 * j] = sums[2 * j + 1] = 0.f;
#pragma unroll
                    for (int i = 0; i < NS; ++i) {
                        const float state = fmaf(drive.du, b[i], decayed[k][j][i]);
                        dh[j][i] = fmaf(drive.g, c[i], dh[j][i]);
                        dBC[i] = fmaf(drive.du, dh[j][i], j == 0 ? 0.f : dBC[i]);
                        dBC[NS + i] = fmaf(drive.g, state, j == 0 ? 0.f : dBC[NS + i]);
                        sums[2 * j] = fmaf(dh[j][i], b[i], sums[2 * j]);
                        const float product = dh[j][i] * decayed[k][j][i];
                        sums[2 * j + 1] = fmaf(A2[j][i], product, sums[2 * j + 1]);
                        dA[j][i] = fmaf(drive.delta, product, dA[j][i]);
                        dh[j][i] *= a[k][j][i];
                    }
                }
                // Over the states of a channel: the S lanes that share it.
                reduce_transposed<S>(sums, s);
                constexpr int SUMS = 2 * CPT > S ? 2 * CPT / S : 1, SUM_LANES = 2 * CPT / SUMS;
                if (s % (S / SUM_LANES) == 0) {
#pragma unroll
                    for (int i = 0; i < SUMS; ++i)
                        reinterpret_cast<float *>(&my.sums[t][c0])[s / (S / SUM_LANES) * SUMS + i] =
                            sums[i];
                }
                // Over the channels of the warp: the lanes that hold the same states.
                constexpr int CHANNEL_LANES = 32 / S;
                const int q = threadIdx.x % 32 / S;
                reduce_transposed<CHANNEL_LANES, S>(dBC, q);
                constexpr int KEPT = 2 * NS > CHANNEL_LANES ? 2 * NS / CHANNEL_LANES : 1;
                constexpr int KEEPERS = 2 * NS / KEPT;
                if (q % (CHANNEL_LANES / KEEPERS) == 0) {
#pragma unroll
                    for (int i = 0; i < KEPT; ++i)
                        my.dBC[t][warp][s * 2 * NS + q / (CHANNEL_LANES / KEEPERS) * KEPT + i] = dBC[i];
                }
            }
        }
        if (step > 0) matrices.store(my.BC[(step - 1) % 2]);
        __syncthreads();

        // Stage 5: gradients of the inputs, a token and channel a thread, and the block's sums.
        const long long tile_token = static_cast<long long>(sign) * T * step;
        const long long own_tile = own_first + tile_token * p.channels;
#pragma unroll
        for (int r = own_row; r < T; r += OWN_STEP) {
            if (r < low || r >= high || !own_valid) continue;
            const Drive drive = my.drive[r][own_channel];
            const float2 sums = my.sums[r][own_channel];
            const float u_ = to_float(my.u[stage][r][own_channel]);
            const float ddt = fmaf(sums.x, u_, LN_2 * sums.y) * drive.slope;
            dD = fmaf(drive.g, u_, dD);
            dbias += ddt;
            const long long at = own_tile + static_cast<long long>(r) * own_stride;
            static_cast<scalar_t *>(grad.du)[at] =
                from_float<scalar_t>(fmaf(drive.delta, sums.x, skip * drive.g));
            static_cast<scalar_t *>(grad.ddt)[at] = from_float<scalar_t>(ddt);
        }
        float *dBC_tile = dBC_first + tile_token * p.groups * 2 * p.states;
#pragma unroll
        for (int i = thread; i < T * 2 * N; i += THREADS) {
            const int r = i / (2 * N), k = i % (2 * N);
            const int n = k / (2 * NS) * NS + k % NS, is_C = k / NS % 2;
            if (r < low || r >= high || n >= states) continue;
            float sum = 0.f;
#pragma unroll
            for (int w = 0; w < WARPS; ++w) sum += my.dBC[r][w][k];
            dBC_tile[static_cast<long long>(r) * dBC_stride + is_C * states + n] = sum;
        }
    }

#pragma unroll
    for (int j = 0; j < CPT; ++j) {
#pragma unroll
        for (int i = 0; i < NS; ++i) {
            const int n = s * NS + i;
            if (!lane_valid[j] || n >= p.states) continue;
            const long long at = (item_row * p.channels + d0 + c0 + j) * p.states + n;
            grad.dA[at] = dA[j][i];
            if (grad.dstart != nullptr) grad.dstart[at] = dh[j][i];
        }
    }
    // The threads that prepared tokens of the same channel.
    __syncthreads();
    float2 *totals = reinterpret_cast<float2 *>(&my.drive[0][0]);
    totals[thread] = make_float2(dD, dbias);
    __syncthreads();
    if (own_row == 0 && own_valid) {
        for (int k = 1; k < OWN_STEP; ++k) {
            dD += totals[k * CH + own_channel].x;
            dbias += totals[k * CH + own_channel].y;
        }
        const long long at = item_row * p.channels + d0 + own_channel;
        grad.dD[at] = dD;
        grad.dbias[at] = dbias;
    }
}
