// Backward of the selective scan, one direction or both in one launch. Derivation:
// docs/scan_backward.md; contract: vim/ops/selective_scan.py.
//
// The forward kernel has run once more and left the state before each tile of T tokens, and the
// gradient of z; or it left those states the first time, and y before its gate, of which that gradient
// is made here (DZ). A block takes the tiles of one direction and CH channels from the last in scan
// order to the first: it recomputes the states of the tile from the saved one, keeps them in
// registers, with the decays of the last KEPT tokens, and runs the adjoint recurrence over them in
// reverse. What a tile needs and no state is worked out while the tile after it is finished: both are
// long chains for each number, which fill each other's gaps.
//
// Where sequences are few and long, a block takes one chunk of the tokens: the kernel runs once with
// CARRY, for the gradient of the state before each chunk if nothing came from behind it, then a carry
// kernel, then once more for all the rest.
//
// Sums over channels (B, C) go through the warp, then the block, then one partial sum a block to
// memory; sums over tokens (A, D, dt_bias) leave one partial sum a batch item. The host adds those
// in a fixed order, so that results are deterministic. Accumulation is in float32; of 16-bit inputs
// the products that make dB and dC are in tf32.

#include "selective_scan.cuh"

// Arguments, each eight bytes, after ScanParams. P blocks share a group's channels.
struct ScanGradients {
    const float *dend;  // (dirs, B, chunks, D, N) gradient of the state after a chunk, or null
    float *dstart;      // (dirs, B, chunks, D, N) of the state before it, or null
    void *du, *ddt;     // (dirs, B, L, D)
    float *dBC;         // (P, dirs, B, L, G, 2 N) partial sums
    float *dparameters; // (dirs, B, chunks, D (N + 2)) partial sums: A (D, N), then D, then dt_bias
};

// Keep what was computed: the compiler would rather compute it again at every use.
__device__ __forceinline__ void keep(int &x) { asm("" : "+r"(x)); }
__device__ __forceinline__ void keep(float &x) { asm("" : "+f"(x)); }

// CARRY: only `dstart` and `delta_sum` are written. DZ: the gradient of z, too.
template <typename scalar_t, int NS, int S, int CPT, int CH, int T, int KEPT, bool SOFTPLUS,
          bool VECTOR, bool CARRY, bool DZ, int MIN_BLOCKS>
__global__ void __launch_bounds__(CH / CPT * S, MIN_BLOCKS)
selective_scan_bwd_kernel(const ScanParams p, const ScanGradients grad) {
    constexpr int N = NS * S;
    constexpr int THREADS = CH / CPT * S;
    constexpr int WARPS = THREADS / 32;
    constexpr int QUAD = N < 4 ? N : 4;
    constexpr int W = NS < 4 ? NS : 4;
    constexpr int LANES = 32 / S;  // lanes of a warp that hold the same states of other channels
    static_assert(CPT <= S, "sums over states are shared out by channels");
    // A team of threads owns channels and waits for nobody else where they fill a warp.
    constexpr int TEAM = LANES * CPT >= 16 ? 32 : THREADS;
    constexpr int TEAMS = THREADS / TEAM;
    constexpr int TEAM_CH = CH / TEAMS;
    static_assert(TEAM_CH % 2 == 0, "channels are prepared in pairs");
    // Products of 16-bit inputs are summed over channels in tf32, whose rounding is finer. A row of
    // the product belongs to some states and to the channels of four lanes, a column to channels of
    // four lanes: of use is where these agree. Two columns side by side do if lanes with
    // neighbouring states hold their channels in the same order (CPT < S).
    constexpr bool TENSOR =
        sizeof(scalar_t) == 2 && S <= 8 && CPT % 2 == 0 && CPT < S && NS % 2 == 0;
    constexpr int SUBSETS = TENSOR ? 8 / S : 1;
    constexpr int SHARES = WARPS * SUBSETS;  // partial sums over channels
    // Lanes with neighbouring states of the same channels are this far apart.
    constexpr int STRIDE = TENSOR ? 4 : LANES;
    // A thread brings parts of u, dt, dy and z; of only two of them where two sets of threads can
    // share the work.
    constexpr int U = 0, DT = 1, DY = 2, Z = 3, INPUTS = 4, UNGATED = 4;
    constexpr int SETS = THREADS * static_cast<int>(16 / sizeof(scalar_t)) >= 2 * T * CH ? 2 : 1;
    using Item = TileItem<T, CH, THREADS / SETS, scalar_t>;
    using Matrices = MatrixItem<T, NS, S, THREADS, scalar_t>;
    constexpr int PITCH = CH + 16 / sizeof(scalar_t);  // spreads the banks

    // Lanes that keep the same channel in their first register; if two, each leaves its own sum.
    constexpr int SPREAD = S / CPT, PARTS = SPREAD == 2 ? 2 : 1;
    constexpr int PAIRS = TEAM_CH / 2, OWN_STEP = TEAM / PAIRS;
    constexpr int OWN_ROWS = OWN_STEP < T / 2 ? OWN_STEP : T / 2;

    // What the recurrences need of two tokens and a channel comes in one access: step sizes delta
    // and du = delta * u; g, the gradient of <C, h> + D * u.
    struct Team {
        alignas(16) float4 steps[T / 2][TEAM_CH];      // delta, du; delta, du of the next token
        alignas(16) float2 g[T / 2][TEAM_CH];
        // For stage 4: two channels of a token, then of the next; slopes of delta by dt.
        alignas(16) float4 deltas[T / 2][TEAM_CH / 2], slopes[T / 2][TEAM_CH / 2];
        alignas(16) float2 sums[PARTS][T][TEAM_CH];     // <dh, B>, <A2, dh * a * h>
        // Registers are dear: of two channels dt_bias and D; a thread's sums of their gradients.
        alignas(16) float4 constants[PAIRS], totals[OWN_ROWS][PAIRS];
    };
    __shared__ Team teams[TEAMS];
    __shared__ struct {
        alignas(16) scalar_t inputs[2][INPUTS + DZ][T][PITCH];
        alignas(16) float BC[2][T][Matrices::PITCH];
        alignas(16) float2 dBC[T][SHARES][N];
        Packet<float, W> starts[CPT * NS / W][THREADS];  // read by the thread that asked for them
    } my;

    // Who this thread is: for the recurrences, and for what is done two channels and two tokens
    // at a time.
    const int thread = threadIdx.x;
    __builtin_assume(thread >= 0 && thread < THREADS);
    const int warp = thread / 32, lane = thread % 32;
    int s = lane / STRIDE % S;
    const int subset = lane / (STRIDE * S);
    const bool odd = lane / 4 % 2;
    // Register j is channel `channel_of(j)` of the team. The order differs between lanes that share
    // channels, so that in sums over states they find what to send in the same registers.
    int channel = (warp % (TEAM / 32)) * LANES * CPT + subset * STRIDE * CPT +
                  STRIDE * (s / SPREAD) + lane % STRIDE;
    auto channel_of = [&](int j) { return channel ^ STRIDE * j; };
    keep(s), keep(channel);
    Team &team = teams[thread / TEAM];
    const int own_pair = thread % PAIRS, own_channel = 2 * own_pair;
    int own_row = thread % TEAM / PAIRS;  // of T / 2 pairs of tokens
    if constexpr (!TENSOR) keep(own_row);  // spills otherwise (64 states in float32)
    const int staged_channel = thread / TEAM * TEAM_CH + own_channel;
    float scale = p.scale;
    keep(scale);
    auto wait_for_team = [] {
        if constexpr (TEAM == 32)
            __syncwarp();
        else
            __syncthreads();
    };

    // What this block does, and this team.
    const int group_channels = static_cast<int>(p.channels) / static_cast<int>(p.groups);
    const int group_blocks = (group_channels + CH - 1) / CH;
    unsigned index = blockIdx.x;
    const int group_block = index % group_blocks;
    index /= group_blocks;
    const int group = index % static_cast<unsigned>(p.groups);
    index /= static_cast<unsigned>(p.groups);
    const int chunk = index % static_cast<unsigned>(p.chunks);
    index /= static_cast<unsigned>(p.chunks);
    const long long batch = index % static_cast<unsigned>(p.batch);
    const int dir = index / static_cast<unsigned>(p.batch);
    const int block_channels = min(CH, group_channels - group_block * CH);
    const int block_d0 = group * group_channels + group_block * CH;
    const int channels = block_channels - thread / TEAM * TEAM_CH;  // of the team, and after it
    const int d0 = block_d0 + thread / TEAM * TEAM_CH;
    const long long item_row = dir * p.batch + batch, chunk_row = item_row * p.chunks + chunk;
    const long long first_token = chunk * p.chunk;
    const Walk<T> walk(min(p.chunk, p.length - first_token), dir == 1 || p.reverse);
    const int tiles = walk.tiles, sign = walk.sign;

    // Addresses of this thread's part of the tile to come, the last one first.
    const Item item(thread % (THREADS / SETS), block_channels);
    const int set = thread / (THREADS / SETS);
    Matrices matrices(thread, p.states);
    const long long last = first_token + static_cast<long long>(sign) * T * (tiles - 1);
    const long long item_token = last + walk.first(item.row);
    const scalar_t *inputs[INPUTS / SETS];
    int input_strides[INPUTS / SETS];  // of tokens in scan order, in elements
#pragma unroll
    for (int k = 0; k < INPUTS / SETS; ++k) {
        const int which = k * SETS + set;
        const void *x = p.z;
        long long offset = batch * p.z_batch, stride = p.z_token;
        if (which == U) x = p.u, offset = dir * p.u_dir + batch * p.u_batch, stride = p.u_token;
        if (which == DT) x = p.dt, offset = dir * p.dt_dir + batch * p.dt_batch, stride = p.dt_token;
        if (which == DY) x = p.dy, offset = batch * p.dy_batch, stride = p.dy_token;
        inputs[k] = static_cast<const scalar_t *>(x) + offset + item_token * stride + block_d0 +
                    item.column;
        input_strides[k] = sign * static_cast<int>(stride);
    }
    // Both directions have the same z: the first sees to its gradient.
    const bool has_dz = DZ && dir == 0;
    const scalar_t *ungated = static_cast<const scalar_t *>(p.more) +
                              (batch * p.length + item_token) * p.channels + block_d0 + item.column;
    const int channel_stride = sign * static_cast<int>(p.channels);  // of contiguous tokens
    const long long B_offset = dir * p.B_dir + batch * p.B_batch + group * p.B_group;
    const long long C_offset = dir * p.C_dir + batch * p.C_batch + group * p.C_group;
    const long long BC_stride = matrices.is_C ? p.C_token : p.B_token;
    const scalar_t *BC = static_cast<const scalar_t *>(matrices.is_C ? p.C : p.B) +
                         (matrices.is_C ? C_offset : B_offset) + matrices.n +
                         (last + walk.first(matrices.row)) * BC_stride;
    const int BC_step = sign * static_cast<int>(BC_stride);

    // Rows of a tile that exist.
    const int low_first = walk.low(0), high_last = walk.high(tiles - 1);
    auto low_of = [&](int step) { return step == 0 ? low_first : 0; };
    auto high_of = [&](int step) { return step == tiles - 1 ? high_last : T; };

    // Ask for the tile of a step; steps count in scan order and come from the last to the first.
    const bool has_z = p.z != nullptr;
    auto prefetch = [&](int step) {
        const int stage = step & 1, low = low_of(step), high = high_of(step);
#pragma unroll
        for (int k = 0; k < INPUTS / SETS; ++k) {
            const int which = k * SETS + set;
            if (which == Z && !has_z) continue;
            item.read(my.inputs[stage][which], inputs[k], input_strides[k], low, high, VECTOR);
            inputs[k] -= T * static_cast<long long>(input_strides[k]);
        }
        if constexpr (DZ) {
            if (has_dz && set == 0)
                item.read(my.inputs[stage][UNGATED], ungated, channel_stride, low, high, VECTOR);
            ungated -= T * static_cast<long long>(channel_stride);
        }
        matrices.load(BC, BC_step, low, high, VECTOR);
        BC -= T * static_cast<long long>(BC_step);
    };
    // The state before the tile to come.
    const long long quad_stride = p.channels * QUAD;
    const float *start = p.tile_states +
                         ((item_row * ((p.length + T - 1) / T) + first_token / T +
                           walk.tile(tiles - 1)) * (N / QUAD) + s * NS / QUAD) *
                             quad_stride + d0 * QUAD + s * NS % QUAD;
    const long long start_step = sign * (N / QUAD) * quad_stride;
    auto prefetch_start = [&] {
#pragma unroll
        for (int i = 0; i < NS; i += W) {
#pragma unroll
            for (int j = 0; j < CPT; ++j)
                copy_async<W * sizeof(float)>(
                    &my.starts[i / W * CPT + j][thread],
                    start + i / W * quad_stride + channel_of(j) * QUAD, channel_of(j) < channels);
        }
        start -= start_step;
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
            const bool there = channel_of(j) < channels && n < p.states;
            const long long d = d0 + channel_of(j);
            A2[j][i] = there ? LOG2_E * p.A[(dir * p.channels + d) * p.states + n] : 0.f;
            dh[j][i] = there && grad.dend != nullptr
                           ? grad.dend[(chunk_row * p.channels + d) * p.states + n] : 0.f;
            dA[j][i] = 0.f;
        }
    }
    if (own_row < OWN_ROWS) team.totals[own_row][own_pair] = {};
    if (own_row == 0) {
        float bias[2], skip[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const bool there = own_channel + i < channels;
            const long long d = dir * p.channels + d0 + own_channel + i;
            bias[i] = there && p.dt_bias != nullptr ? p.dt_bias[d] : 0.f;
            skip[i] = there && p.D != nullptr ? p.D[d] : 0.f;
        }
        team.constants[own_pair] = make_float4(bias[0], bias[1], skip[0], skip[1]);
    }

    // Where the gradients of row 0 of the first tile go, and the distance of rows.
    const int states = p.states;
    const long long own_first =
        (item_row * p.length + last + walk.first(2 * own_row)) * p.channels + d0 + own_channel;
    scalar_t *du_to = static_cast<scalar_t *>(grad.du) + own_first;
    scalar_t *ddt_to = static_cast<scalar_t *>(grad.ddt) + own_first;
    const int dz_stride = sign * static_cast<int>(p.y_token);
    scalar_t *dz_to = static_cast<scalar_t *>(p.y) + batch * p.y_batch +
                      (last + walk.first(2 * own_row)) * p.y_token + d0 + own_channel;
    const int dBC_stride = sign * static_cast<int>(p.groups) * 2 * states;
    const long long partial_rows =
        gridDim.x / static_cast<unsigned>(group_blocks * p.groups * p.chunks);
    const int dBC_row = thread / N, dBC_state = thread % N;
    constexpr int DBC_STEP = THREADS / N;
    float *dBC_to = grad.dBC +
                    (((group_block * partial_rows + item_row) * p.length + last +
                      walk.first(dBC_row)) * p.groups + group) * 2 * states + dBC_state;

    // The block's sums over channels, once every warp has left its own.
    auto write_dBC = [&](int step) {
        const int low = low_of(step), high = high_of(step);
#pragma unroll
        for (int k = 0; k < (T + DBC_STEP - 1) / DBC_STEP; ++k) {
            const int r = dBC_row + k * DBC_STEP;
            if (r < low || r >= high || dBC_state >= states) continue;
            float2 share[SHARES];
#pragma unroll
            for (int w = 0; w < SHARES; ++w) share[w] = my.dBC[r][w][dBC_state];
#pragma unroll
            for (int half = SHARES / 2; half >= 1; half /= 2) {
#pragma unroll
                for (int w = 0; w < half; ++w) {
                    share[w].x += share[w + half].x;
                    share[w].y += share[w + half].y;
                }
            }
            float *to = dBC_to + k * DBC_STEP * dBC_stride;
            to[0] = share[0].x;
            to[states] = share[0].y;
        }
        dBC_to -= T * static_cast<long long>(dBC_stride);
    };

    // Add this thread's sums of gradients of A, and the team's of D and dt_bias, to those in memory,
    // which the first call sets.
    auto add_parameters = [&](bool first) {
        float *to = grad.dparameters + chunk_row * p.channels * (p.states + 2);
#pragma unroll
        for (int j = 0; j < CPT; ++j) {
#pragma unroll
            for (int i = 0; i < NS; ++i) {
                const int n = s * NS + i;
                if (channel_of(j) >= channels || n >= p.states) continue;
                float &sum = to[(d0 + channel_of(j)) * p.states + n];
                sum = first ? dA[j][i] : sum + dA[j][i];
                dA[j][i] = 0.f;
            }
        }
        wait_for_team();  // for the threads that prepared tokens of the same channels
        if (own_row > 0) return;
        float4 total = {};
        for (int k = 0; k < OWN_ROWS; ++k) {
            const float4 more = team.totals[k][own_pair];
            total.x += more.x, total.y += more.y, total.z += more.z, total.w += more.w;
            team.totals[k][own_pair] = {};
        }
        to += p.channels * p.states + d0 + own_channel;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            if (own_channel + i >= channels) continue;
            const float dD = i ? total.y : total.x, dbias = i ? total.w : total.z;
            to[i] = first ? dD : to[i] + dD;
            to[p.channels + i] = first ? dbias : to[p.channels + i] + dbias;
        }
    };
    // Sums over tokens are taken in blocks of so many tiles: one running sum of 100,000 terms would
    // have lost two digits.
    constexpr int SUM_TILES = 64;

    // What the recurrences of a tile need and no state, two tokens and two channels a thread.
    auto prepare = [&](int step) {
        const int stage = step & 1, low = low_of(step), high = high_of(step);
#pragma unroll
        for (int pair = own_row; pair < T / 2; pair += OWN_STEP) {
            float delta[2][2], du[2][2], g[2][2], slope[2][2];  // by token and channel
            const float2 bias = *reinterpret_cast<const float2 *>(&team.constants[own_pair].x);
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const int r = 2 * pair + e;
                float u_[2], z_[2];
                load(&my.inputs[stage][DT][r][staged_channel], delta[e]);
                load(&my.inputs[stage][U][r][staged_channel], u_);
                load(&my.inputs[stage][DY][r][staged_channel], g[e]);
                if (has_z) load(&my.inputs[stage][Z][r][staged_channel], z_);
                const bool valid = r >= low && r < high;
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    // Where there is no token dt, u, dy and z are zero, and a step of zero leaves
                    // the state as it is: softplus(-inf), with a slope of zero.
                    const float x = !valid && SOFTPLUS ? __uint_as_float(0xff800000u)
                                                       : delta[e][i] + (i ? bias.y : bias.x);
                    if constexpr (SOFTPLUS) {
                        const float exponential = softplus_exponential<scalar_t>(x);
                        // 1 / (1 + e^-x), with e^-|x|.
                        slope[e][i] =
                            fast_reciprocal(1.f + exponential) * (x < 0.f ? exponential : 1.f);
                        delta[e][i] = softplus(x, exponential);
                    } else {
                        slope[e][i] = valid ? 1.f : 0.f;
                        delta[e][i] = valid ? x : 0.f;
                    }
                    g[e][i] *= scale;
                    if (has_z) g[e][i] *= fast_silu(z_[i]);
                    if constexpr (CARRY) {
                        float4 &total = team.totals[own_row][own_pair];
                        (i ? total.y : total.x) += delta[e][i];
                    }
                    du[e][i] = delta[e][i] * u_[i];
                }
            }
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                team.steps[pair][own_channel + i] =
                    make_float4(delta[0][i], du[0][i], delta[1][i], du[1][i]);
                team.g[pair][own_channel + i] = make_float2(g[0][i], g[1][i]);
            }
            team.deltas[pair][own_pair] =
                make_float4(delta[0][0], delta[0][1], delta[1][0], delta[1][1]);
            team.slopes[pair][own_pair] =
                make_float4(slope[0][0], slope[0][1], slope[1][0], slope[1][1]);
        }
    };

    // The gradient of z, two tokens and two channels a thread.
    auto write_dz = [&](int step) {
        const int stage = step & 1, low = low_of(step), high = high_of(step);
#pragma unroll
        for (int pair = own_row; pair < T / 2; pair += OWN_STEP) {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const int r = 2 * pair + e;
                float dz[2], z_[2], dy_[2];
                load(&my.inputs[stage][UNGATED][r][staged_channel], dz);
                load(&my.inputs[stage][Z][r][staged_channel], z_);
                load(&my.inputs[stage][DY][r][staged_channel], dy_);
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const float gate = fast_sigmoid(z_[i]);
                    dz[i] *= dy_[i] * gate * fmaf(z_[i], 1.f - gate, 1.f);
                }
                if (r < low || r >= high || own_channel >= channels) continue;
                scalar_t *to = dz_to + (r - 2 * own_row) * static_cast<long long>(dz_stride);
                if (VECTOR) {
                    store(to, dz);
                } else {
#pragma unroll
                    for (int i = 0; i < 2; ++i)
                        if (own_channel + i < channels) to[i] = from_float<scalar_t>(dz[i]);
                }
            }
        }
        dz_to -= T * static_cast<long long>(dz_stride);
    };

    prefetch(tiles - 1);
    if constexpr (!CARRY) prefetch_start();
    commit_copies();
    matrices.store(my.BC[(tiles - 1) & 1]);
    wait_copies<0>();
    __syncthreads();
    prepare(tiles - 1);
    __syncthreads();

#pragma unroll 1
    for (int step = tiles - 1; step >= 0; --step) {
        const int stage = step & 1, low = low_of(step), high = high_of(step);

        // Stage 1: ask for the tile before this one.
        if (step > 0) prefetch(step - 1);

        if constexpr (CARRY) {
            commit_copies();
#pragma unroll
            for (int t = T - 1; t >= 0; --t) {
                float b[NS], c[NS];
                load_row(&my.BC[stage][t][s * Matrices::SEGMENT], b, c);
#pragma unroll
                for (int j = 0; j < CPT; ++j) {
                    const float4 step_ = team.steps[t / 2][channel_of(j)];
                    const float2 g = team.g[t / 2][channel_of(j)];
                    const float delta = t % 2 ? step_.z : step_.x, g_ = t % 2 ? g.y : g.x;
#pragma unroll
                    for (int i = 0; i < NS; ++i)
                        dh[j][i] = fmaf(g_, c[i], dh[j][i]) * decay_of(delta, A2[j][i]);
                }
            }
            if (step > 0) matrices.store(my.BC[stage ^ 1]);
            wait_copies<0>();
            __syncthreads();
            if (step > 0) prepare(step - 1);
            __syncthreads();
            continue;
        }

        // Stage 2: the states once more.
        float h[T + 1][CPT][NS];  // h[t + 1] is the state after token t
#pragma unroll
        for (int j = 0; j < CPT; ++j) {
#pragma unroll
            for (int i = 0; i < NS; ++i) h[0][j][i] = my.starts[i / W * CPT + j][thread].at[i % W];
        }
        float kept[KEPT ? KEPT : 1][CPT][NS];
#pragma unroll
        for (int t = 0; t < T; t += 2) {
            float4 steps[CPT];
#pragma unroll
            for (int j = 0; j < CPT; ++j) steps[j] = team.steps[t / 2][channel_of(j)];
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                float b[NS], c[NS];
                load_row(&my.BC[stage][t + e][s * Matrices::SEGMENT], b, c);
#pragma unroll
                for (int j = 0; j < CPT; ++j) {
                    const float delta = e ? steps[j].z : steps[j].x;
                    const float du = e ? steps[j].w : steps[j].y;
#pragma unroll
                    for (int i = 0; i < NS; ++i) {
                        const float a = decay_of(delta, A2[j][i]);
                        if (t + e >= T - KEPT) kept[t + e - (T - KEPT)][j][i] = a;
                        h[t + e + 1][j][i] = fmaf(du, b[i], a * h[t + e][j][i]);
                    }
                }
            }
        }

        // Across this the compiler reads steps, B and C again, rather than keep them in registers
        // and with them the decays.
        __syncwarp();
        if (step > 0) prefetch_start();
        commit_copies();

        // Stage 3: the adjoint recurrence, from the last token to the first. The sums of a token are
        // stored while the next one is worked out, after the loads for the one to follow: shared
        // memory is read and written in the order that stands here, and nobody waits for a sum.
        float4 steps[CPT];
        float2 gs[CPT];
        float b[NS], c[NS];
        auto load_token = [&](int t) {
            load_row(&my.BC[stage][t][s * Matrices::SEGMENT], b, c);
            if (t % 2 == 0) return;
#pragma unroll
            for (int j = 0; j < CPT; ++j) {
                steps[j] = team.steps[t / 2][channel_of(j)];
                gs[j] = team.g[t / 2][channel_of(j)];
            }
        };
        constexpr int HELD = 2 * NS > LANES ? 2 * NS / LANES : 1;  // of dB and dC, without TENSOR
        float sums[2], sums_of_BC[TENSOR ? 2 * NS : HELD];
        auto store_sums = [&](int t) {
            if constexpr (SPREAD <= 2) {
                team.sums[s % SPREAD][t][channel_of(0)] = make_float2(sums[0], sums[1]);
            } else if (s % (SPREAD / 2) == 0) {
                reinterpret_cast<float *>(
                    &team.sums[0][t][channel_of(0)])[s % SPREAD / (SPREAD / 2)] = sums[0];
            }
            if constexpr (TENSOR) {
                if (lane % 4 == lane / 8)
                    store(&my.dBC[t][warp * SUBSETS + subset][s * NS].x, sums_of_BC);
            } else {
                constexpr int KEEPERS = 2 * NS / HELD;
                const int q = lane % LANES;
                if (q % (LANES / KEEPERS) == 0) {
#pragma unroll
                    for (int i = 0; i < HELD; ++i) {
                        const int value = q / (LANES / KEEPERS) * HELD + i;
                        float2 &to = my.dBC[t][warp][s * NS + value % NS];
                        (value < NS ? to.x : to.y) = sums_of_BC[i];
                    }
                }
            }
        };
        load_token(T - 1);
#pragma unroll
        for (int t = T - 1; t >= 0; --t) {
            float du[CPT], g[CPT], over_b[CPT], over_A[CPT], dBC[2 * NS];
            float before[CPT][NS];  // dh before the decay, for the products
#pragma unroll
            for (int j = 0; j < CPT; ++j) {
                const float delta = t % 2 ? steps[j].z : steps[j].x;
                du[j] = t % 2 ? steps[j].w : steps[j].y;
                g[j] = t % 2 ? gs[j].y : gs[j].x;
                over_b[j] = over_A[j] = 0.f;
#pragma unroll
                for (int i = 0; i < NS; ++i) {
                    before[j][i] = fmaf(g[j], c[i], dh[j][i]);
                    over_b[j] = fmaf(before[j][i], b[i], over_b[j]);
                    if constexpr (!TENSOR) {
                        dBC[i] = fmaf(du[j], before[j][i], j == 0 ? 0.f : dBC[i]);
                        dBC[NS + i] = fmaf(g[j], h[t + 1][j][i], j == 0 ? 0.f : dBC[NS + i]);
                    }
                    const float a = t >= T - KEPT ? kept[t - (T - KEPT)][j][i]
                                                  : decay_of(delta, A2[j][i]);
                    dh[j][i] = before[j][i] * a;
                    const float product = dh[j][i] * h[t][j][i];
                    over_A[j] = fmaf(A2[j][i], product, over_A[j]);
                    dA[j][i] = fmaf(delta, product, dA[j][i]);
                }
            }
            if (t > 0) load_token(t - 1);
            if (t < T - 1) store_sums(t + 1);
            // Over the states of a channel: the S lanes that share it.
#pragma unroll
            for (int half = CPT / 2; half >= 1; half /= 2) {
#pragma unroll
                for (int j = 0; j < half; ++j) {
                    const int mask = half * SPREAD * STRIDE;
                    over_b[j] += __shfl_xor_sync(FULL_WARP, over_b[j + half], mask);
                    over_A[j] += __shfl_xor_sync(FULL_WARP, over_A[j + half], mask);
                }
            }
            sums[0] = over_b[0], sums[1] = over_A[0];
            if constexpr (SPREAD > 2) reduce_transposed<SPREAD, STRIDE>(sums, s % SPREAD);
            // Over the channels of the warp: the lanes that hold the same states.
            if constexpr (TENSOR) {
                float products[NS / 2][4] = {};  // of two states: dB, dC, then the other's
                // Even columns are for dB, odd ones for dC.
#pragma unroll
                for (int j = 0; j < CPT; j += 2) {
                    const float to_B[2] = {odd ? 0.f : du[j], odd ? 0.f : du[j + 1]};
                    const float to_C[2] = {odd ? g[j] : 0.f, odd ? g[j + 1] : 0.f};
#pragma unroll
                    for (int i = 0; i < NS; i += 2) {
                        float(&sum)[4] = products[i / 2];
                        multiply_add_tf32(sum,
                                          {before[j][i], before[j][i + 1], before[j + 1][i],
                                           before[j + 1][i + 1]},
                                          to_B, sum);
                        multiply_add_tf32(sum,
                                          {h[t + 1][j][i], h[t + 1][j][i + 1],
                                           h[t + 1][j + 1][i], h[t + 1][j + 1][i + 1]},
                                          to_C, sum);
                    }
                }
#pragma unroll
                for (int i = 0; i < 2 * NS; ++i) sums_of_BC[i] = products[i / 4][i % 4];
            } else {
                reduce_transposed<LANES>(dBC, lane % LANES);
#pragma unroll
                for (int i = 0; i < HELD; ++i) sums_of_BC[i] = dBC[i];
            }
        }
        store_sums(0);
        if (step > 0) matrices.store(my.BC[stage ^ 1]);

        // Stage 4: the tile before has arrived, and this one's sums. Gradients of the inputs, two
        // tokens and two channels a thread.
        wait_copies<0>();
        __syncthreads();
        write_dBC(step);
#pragma unroll
        for (int k = 0; k < (T / 2 + OWN_STEP - 1) / OWN_STEP; ++k) {
            const int pair = own_row + k * OWN_STEP;
            if (pair >= T / 2) break;
            float g[4], deltas[4], slopes[4];  // by channel and token; by token and channel
            load(&team.g[pair][own_channel].x, g);
            const float4 constants = team.constants[own_pair];
            float4 &totals = team.totals[own_row][own_pair], total = totals;
            float *dD = &total.x, *dbias = &total.z;
            load(&team.deltas[pair][own_pair].x, deltas);
            load(&team.slopes[pair][own_pair].x, slopes);
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const int r = 2 * pair + e;
                float u_[2], sums[4], du[2], ddt[2];
                load(&my.inputs[stage][U][r][staged_channel], u_);
                load(&team.sums[0][r][own_channel].x, sums);
                if constexpr (PARTS == 2) {
                    float more[4];
                    load(&team.sums[PARTS - 1][r][own_channel].x, more);
#pragma unroll
                    for (int i = 0; i < 4; ++i) sums[i] += more[i];
                }
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const float skip = i ? constants.w : constants.z;
                    du[i] = fmaf(deltas[2 * e + i], sums[2 * i], skip * g[2 * i + e]);
                    ddt[i] = fmaf(sums[2 * i], u_[i], LN_2 * sums[2 * i + 1]) * slopes[2 * e + i];
                    dD[i] = fmaf(g[2 * i + e], u_[i], dD[i]);
                    dbias[i] += ddt[i];
                }
                if (r < low || r >= high || own_channel >= channels) continue;
                const long long at = (2 * k * OWN_STEP + e) * static_cast<long long>(channel_stride);
                if (VECTOR) {
                    store(du_to + at, du);
                    store(ddt_to + at, ddt);
                } else {
#pragma unroll
                    for (int i = 0; i < 2; ++i) {
                        if (own_channel + i >= channels) continue;
                        du_to[at + i] = from_float<scalar_t>(du[i]);
                        ddt_to[at + i] = from_float<scalar_t>(ddt[i]);
                    }
                }
            }
            totals = total;
        }
        du_to -= T * static_cast<long long>(channel_stride);
        ddt_to -= T * static_cast<long long>(channel_stride);
        if constexpr (DZ) {
            if (has_dz) write_dz(step);
        }
        prepare(step - 1);  // of nothing at the last step, but without a branch
        if (step % SUM_TILES == 0) add_parameters(step + SUM_TILES >= tiles);
        __syncthreads();
    }
    if constexpr (CARRY) {
        if (own_row == 0) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                if (own_channel + i >= channels) continue;
                float sum = 0.f;
                for (int k = 0; k < OWN_ROWS; ++k) {
                    const float4 &total = team.totals[k][own_pair];
                    sum += i ? total.y : total.x;
                }
                p.delta_sum[chunk_row * p.channels + d0 + own_channel + i] = sum;
            }
        }
    }

    if (grad.dstart != nullptr) {
#pragma unroll
        for (int j = 0; j < CPT; ++j) {
#pragma unroll
            for (int i = 0; i < NS; ++i) {
                const int n = s * NS + i;
                if (channel_of(j) >= channels || n >= p.states) continue;
                const long long row = chunk_row * p.channels + d0 + channel_of(j);
                grad.dstart[row * p.states + n] = dh[j][i];
            }
        }
    }
}

// The blocks' partial sums of dB and dC, added up in their order: (P, rows, width) to rows of `width`
// scalar_t, `stride` apart. A thread sees to two of them, `width` being even.
template <typename scalar_t>
__global__ void __launch_bounds__(256)
sum_dBC_kernel(const float *dBC, void *out, long long blocks, long long rows, long long width,
               long long stride) {
    const long long pairs = rows * (width / 2);
    const long long i = blockIdx.x * 256ll + threadIdx.x;
    if (i >= pairs) return;
    float2 sum = {};
    const float2 *from = reinterpret_cast<const float2 *>(dBC) + i;
#pragma unroll 4
    for (int block = 0; block < static_cast<int>(blocks); ++block, from += pairs) {
        const float2 more = *from;
        sum.x += more.x, sum.y += more.y;
    }
    const long long row = i / (width / 2);
    const float both[2] = {sum.x, sum.y};
    store(static_cast<scalar_t *>(out) + row * stride + (i - row * (width / 2)) * 2, both);
}
