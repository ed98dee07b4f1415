// Forward of the selective scan, one direction or both in one launch. Contract:
// vim/ops/selective_scan.py.
//
// Floor: one exponential for each (token, channel, state); the special-function unit does 16 a
// clock an SM. All else is arranged to stay below it: a lane keeps NS states of CPT channels in
// registers and walks along L, five instructions a state and token. S lanes share the N = NS * S
// states of a channel where B * D alone gives the chip too few threads; their shares of y are summed
// for S tokens together.
//
// Each direction has a team of threads, for the same CH channels and the same tokens: both in a block,
// or, where long rows of tiles are worth more, each in a block of its own, which the other reaches as
// a cluster.
// The reverse team walks the tiles from the last to the first. Whichever team is first at a tile
// writes its share of y; the one that comes second adds its own, gates, and writes the result, so
// that both directions need one launch and no pass to merge them. Accumulation is in float32. y can
// lie where forward's u is, if reverse's shares go where reverse's u is: a team has read a tile of its
// own u before it writes there.
//
// With STEPS > 0 the step sizes before bias and softplus are the product of 8 * STEPS numbers a token
// and dt_proj, which the tensor cores work out tile by tile: dt never lies in memory, and where S > 1
// in registers only.

#include "selective_scan.cuh"

enum Mode {
    OUTPUT = 0,         // y
    STATES_ONLY = 1,    // no y: states before the tiles, or states after the chunks
    STATES_AND_DZ = 2,  // for the backward: states before the tiles, the gradient of z, y again
    OUTPUT_OVER_U = 3,  // y, where forward's u is
    OUTPUT_AND_STATES = 4,  // y, and for the backward y before its gate and states
};

// Tokens between the states that a mode leaves in `tile_states`: those of the backward's tiles. Its
// own first pass has the same tiles.
template <int T, int MODE>
constexpr int STATE_TOKENS = MODE == OUTPUT_AND_STATES ? 8 : T;

// Whether y is all that a launch leaves, so that step sizes need not be exact to float32: a single
// direction leaves its final state as well.
template <typename scalar_t, int DIRS, int MODE>
constexpr bool ONLY_ROUNDED =
    sizeof(scalar_t) == 2 && DIRS == 2 && (MODE == OUTPUT || MODE == OUTPUT_OVER_U);

template <typename scalar_t> constexpr bool IS_BF16 = false;
template <> constexpr bool IS_BF16<__nv_bfloat16> = true;

template <bool ROUNDED, typename scalar_t>
__device__ __forceinline__ float step_size(scalar_t, float x) {
    return softplus<ROUNDED>(x, softplus_exponential<scalar_t>(x));
}

// Which team comes to a tile.
enum Visit { FIRST, MIDDLE, SECOND };

template <typename scalar_t, int NS, int S, int CPT, int CH, int T, int U, int DIRS, int MODE,
          int STEPS>
struct TeamShared {
    // Tiles of activations; see TileItem for the order of a row's channels.
    alignas(16) scalar_t u[2][T][CH];
    // Step sizes before bias and softplus are GIVEN; a PRODUCT, which a warp leaves for its lanes where
    // S = 1; or made by who needs them, of FACTORS. Pitches such that a warp meets every bank once,
    // but for large ranks, which would leave room for fewer blocks.
    static constexpr bool GIVEN = STEPS == 0, PRODUCT = STEPS > 0 && S == 1;
    static constexpr bool FACTORS = STEPS > 0 && S > 1;
    alignas(16) scalar_t dt[GIVEN ? 2 : 1][GIVEN ? T : 1][GIVEN ? CH : 8];
    alignas(16) scalar_t low_rank[FACTORS ? T : 1][FACTORS ? 8 * (STEPS | 1) : 8];
    static constexpr int DT_PITCH = CH + 8, WEIGHT_PITCH = 4 * (STEPS > 4 ? STEPS : STEPS | 1);
    alignas(16) float product[PRODUCT ? T : 1][PRODUCT ? DT_PITCH : 4];
    alignas(16) unsigned dt_proj[PRODUCT ? CH : 1][WEIGHT_PITCH];
    __device__ __forceinline__ auto dt_at(int stage, int r, int c) const {
        if constexpr (PRODUCT) {
            return &product[r][c];
        } else {
            return &dt[stage][r][c];
        }
    }
    static constexpr int Y_ROWS = MODE == STATES_ONLY ? 1 : T;
    alignas(16) scalar_t z[Y_ROWS][CH];
    alignas(16) scalar_t dy[MODE == STATES_AND_DZ ? T : 1][CH];
    alignas(16) scalar_t other[DIRS == 2 ? Y_ROWS : 1][CH];  // the first team's share of y
    alignas(16) float BC[T][MatrixItem<T, NS, S, 2 * NS * S, scalar_t>::PITCH];
    // Pitches such that a warp that stores sums of S lanes, or step sizes, meets every bank once.
    static constexpr int WARP_CHANNELS = 32 / S * CPT;
    static constexpr int Y_PITCH = CH + (S == 1 ? 0 : S == 4 && U == S ? 8 : 4);
    static constexpr int DRIVE_PITCH = T + 2;
    alignas(16) float y[Y_ROWS][Y_PITCH];
    alignas(16) float2 drive[S > 1 ? CH * DRIVE_PITCH : 1];  // (delta, delta * u) for S > 1
};

// A warp's part in multiplying T tokens' low-rank rows by dt_proj where S = 1: for its 32 channels.
// `load` reads the rows as the tensor cores take them, `multiply` leaves dt in shared memory.
template <typename scalar_t, int T, int STEPS>
struct LowRankProducts {
    static_assert(T % 8 == 0, "eight rows at a time");
    int g, t;
    unsigned raw[(T + 15) / 16][2 * STEPS];

    __device__ __forceinline__ LowRankProducts() : g(threadIdx.x % 32 / 4), t(threadIdx.x % 4) {}
    // Where `load` starts.
    __device__ __forceinline__ int row() const { return g; }
    __device__ __forceinline__ int column() const { return 2 * t; }

    // `from` is where this thread's first row is; rows outside [low, high) are zero.
    __device__ __forceinline__ void load(const scalar_t *from, int stride, int low, int high) {
#pragma unroll
        for (int i = 0; i < 2 * ((T + 15) / 16); ++i) {
            const int r = 8 * i + g;
            const bool valid = 8 * i < T && r >= low && r < high;
            const scalar_t *at = from + static_cast<long long>(8 * i) * stride;
#pragma unroll
            for (int k = 0; k < STEPS; ++k)
                raw[i / 2][2 * k + i % 2] =
                    valid ? *reinterpret_cast<const unsigned *>(at + 8 * k) : 0;
        }
    }

    template <typename Shared> __device__ __forceinline__ void multiply(Shared &my, int c) const {
        unsigned weights[STEPS][4];  // of the warp's channels c and on, eight by eight
#pragma unroll
        for (int k = 0; k < STEPS; ++k)
            load_matrices<false>(weights[k], my.dt_proj[c + threadIdx.x % 32] + 4 * k);
#pragma unroll
        for (int m = 0; m < T; m += 16) {
            const unsigned(&a)[2 * STEPS] = raw[m / 16];
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                float d[4] = {};
#pragma unroll
                for (int k = 0; k + 1 < STEPS; k += 2)
                    multiply_add(scalar_t(), d, {a[2 * k], a[2 * k + 1], a[2 * k + 2], a[2 * k + 3]},
                                 weights[k][j], weights[k + 1][j]);
                if constexpr (STEPS % 2)
                    multiply_add(scalar_t(), d, {a[2 * STEPS - 2], a[2 * STEPS - 1]},
                                 weights[STEPS - 1][j]);
#pragma unroll
                for (int i = 0; i < 2 && m + 8 * i < T; ++i)
                    *reinterpret_cast<float2 *>(&my.product[m + 8 * i + g][c + 8 * j + 2 * t]) =
                        make_float2(d[2 * i], d[2 * i + 1]);
            }
        }
    }
};
template <typename scalar_t, int T>
struct LowRankProducts<scalar_t, T, 0> {
    __device__ __forceinline__ int row() const { return 0; }
    __device__ __forceinline__ int column() const { return 0; }
};

// A thread's part in bringing those rows to shared memory where S > 1: `load` starts reading them,
// 16 bytes at a time, `store` leaves them there.
template <int T, int TEAM, int STEPS>
struct LowRankRows {
    static constexpr int ALL = T * STEPS, COUNT = (ALL + TEAM - 1) / TEAM;
    uint4 raw[COUNT];

    // `from` is where row 0 is; rows outside [low, high) are zero.
    template <typename scalar_t>
    __device__ __forceinline__ void load(int thread, const scalar_t *from, int stride, int low,
                                         int high) {
#pragma unroll
        for (int k = 0; k < COUNT; ++k) {
            const int i = k * TEAM + thread, r = i / STEPS;
            raw[k] = uint4{};
            if (r >= low && r < high)
                raw[k] = *reinterpret_cast<const uint4 *>(
                    from + static_cast<long long>(r) * stride + i % STEPS * 8);
        }
    }
    template <typename scalar_t, int PITCH>
    __device__ __forceinline__ void store(int thread, scalar_t (&to)[T][PITCH]) const {
#pragma unroll
        for (int k = 0; k < COUNT; ++k) {
            const int i = k * TEAM + thread;
            if (ALL % TEAM == 0 || i < ALL)
                *reinterpret_cast<uint4 *>(&to[i / STEPS][i % STEPS * 8]) = raw[k];
        }
    }
};

// Where S > 1 a warp works out the step sizes of its CHANNELS channels, two a lane: those of channels
// `column` and the next, and the same of each further 8, in rows `row`, row + ROWS and so on. It is
// where products on the tensor cores leave results that have a row a token and a column a channel.
template <int CHANNELS>
struct StepItem {
    static constexpr int COLUMNS = CHANNELS < 8 ? CHANNELS : 8, ROWS = 64 / COLUMNS;
    static constexpr int GROUPS = CHANNELS / COLUMNS;
    int g, t, row, column;

    __device__ __forceinline__ StepItem()
        : g(threadIdx.x % 32 / 4), t(threadIdx.x % 4), row(t / (COLUMNS / 2) * 8 + g),
          column(t % (COLUMNS / 2) * 2) {}
};

// Those step sizes as products. A row's 8 * STEPS numbers wait in shared memory; what a warp needs of
// dt_proj stays in its registers.
template <typename scalar_t, int CHANNELS, int STEPS>
struct StepProducts {
    using Item = StepItem<CHANNELS>;
    unsigned weights[Item::GROUPS][STEPS];

    // `from` is where the rows of the warp's channels start, of which `channels` exist.
    __device__ __forceinline__ void load(const Item &item, const unsigned *from, int channels) {
#pragma unroll
        for (int j = 0; j < Item::GROUPS; ++j) {
            const int channel = 8 * j + item.g % Item::COLUMNS;
#pragma unroll
            for (int k = 0; k < STEPS; ++k)
                weights[j][k] =
                    channel < channels ? from[channel * (4 * STEPS) + 4 * k + item.t] : 0;
        }
    }
    // Wait for them, by an instruction that needs them and changes nothing: blocks have one row of
    // threads, which the compiler does not know.
    __device__ __forceinline__ void wait() {
#pragma unroll
        for (int j = 0; j < Item::GROUPS * STEPS; ++j) weights[j / STEPS][j % STEPS] |= threadIdx.y;
    }

    // The results of COUNT items, counted along a row's groups first, from row `first` of the tile on.
    template <int COUNT, int T, int PITCH>
    __device__ __forceinline__ void multiply(const Item &item, const scalar_t (&rows)[T][PITCH],
                                             int first, float (&result)[COUNT][2]) const {
        constexpr int COLUMNS = Item::COLUMNS, GROUPS = Item::GROUPS;
        constexpr int TILES = COUNT / GROUPS * Item::ROWS / 16;
        static_assert(TILES * 16 * GROUPS == COUNT * Item::ROWS, "whole tiles of 16 rows");
#pragma unroll
        for (int m = 0; m < TILES; ++m) {
            unsigned a[2 * STEPS];
#pragma unroll
            for (int k = 0; k < 2 * STEPS; ++k)
                a[k] = *reinterpret_cast<const unsigned *>(
                    &rows[first + 16 * m + k % 2 * 8 + item.g][k / 2 * 8 + 2 * item.t]);
#pragma unroll
            for (int j = 0; j < GROUPS; ++j) {
                float d[4] = {};
#pragma unroll
                for (int k = 0; k + 1 < STEPS; k += 2)
                    multiply_add(scalar_t(), d, {a[2 * k], a[2 * k + 1], a[2 * k + 2], a[2 * k + 3]},
                                 weights[j][k], weights[j][k + 1]);
                if constexpr (STEPS % 2)
                    multiply_add(scalar_t(), d, {a[2 * STEPS - 2], a[2 * STEPS - 1]},
                                 weights[j][STEPS - 1]);
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    if constexpr (COLUMNS == 8) {
                        result[2 * m * GROUPS + j][i] = d[i];
                        result[(2 * m + 1) * GROUPS + j][i] = d[2 + i];
                    } else if constexpr (COLUMNS == 4) {
                        result[m][i] = item.t / 2 ? d[2 + i] : d[i];
                    } else if (item.t / 2 == m % 2) {
                        result[m / 2][i] = item.t % 2 ? d[2 + i] : d[i];
                    }
                }
            }
        }
    }
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
                    const float a = decay_of(delta[j], A2[j][i + k]);
                    h[j][i + k] = fmaf(a, h[j][i + k], du[j] * b[k]);
                    if constexpr (HAS_Y) out[j] = fmaf(h[j][i + k], c[k], out[j]);
                }
            }
        }
    }
};

// U tokens for a thread that holds whole channels (S = 1). The step sizes come first, so that their
// long chains overlap.
template <int U, int MODE, bool SOFTPLUS, bool ROUNDED, typename scalar_t, int NS, int CPT,
          typename Shared>
__device__ __forceinline__ void scan_rows(Lane<NS, CPT> &lane, Shared &my, int stage, int r, int c0,
                                          float (&delta_sum)[CPT]) {
    float delta[U][CPT], du[U][CPT], out[U][CPT];
#pragma unroll
    for (int t = 0; t < U; ++t) {
        float u[CPT];
        load(&my.u[stage][r + t][c0], u);
        load(my.dt_at(stage, r + t, c0), delta[t]);
#pragma unroll
        for (int j = 0; j < CPT; ++j) {
            delta[t][j] += lane.bias[j];
            if constexpr (SOFTPLUS) delta[t][j] = step_size<ROUNDED>(scalar_t(), delta[t][j]);
            du[t][j] = delta[t][j] * u[j];
            out[t][j] = lane.skip[j] * u[j];
            if constexpr (MODE == STATES_ONLY) delta_sum[j] += delta[t][j];
        }
    }
#pragma unroll
    for (int t = 0; t < U; ++t) {
        lane.template advance<MODE != STATES_ONLY>(my.BC[r + t], delta[t], du[t], out[t]);
        if constexpr (MODE != STATES_ONLY) store(&my.y[r + t][c0], out[t]);
    }
}

// Sums of U tokens' shares over the S lanes of a channel, with the tensor cores, where a channel's
// lanes are s = 0, 1 at lane bit 1 and the rest of s at bits 2 and up, and bit 0 is the channel's.
// Products by ones add up the two lanes of a channel in each row of four, four tokens at a time, and
// leave half of the tokens in either of them; what is left goes from lane to lane. In tf32, which is
// finer than the 16 bits that the result is rounded to.
template <int S, int U>
struct PairSums {
    float pick[2][2];
    int s;

    __device__ __forceinline__ explicit PairSums(int s) : s(s) {
        const int lane = threadIdx.x % 32;
        const bool same_channel = (lane & 1) == (lane >> 3 & 1);
#pragma unroll
        for (int i = 0; i < 4; ++i)
            pick[i / 2][i % 2] =
                same_channel && lane >> 4 == i / 2 && (lane >> 2 & 1) == i % 2 ? 1.f : 0.f;
    }
    // The token of a lane's first sum if this is number `value` before they go from lane to lane; and
    // the distance of the sums after it.
    __device__ __forceinline__ int token(int value) const { return offset(value) + s % 2 * 4; }
    __device__ __forceinline__ static constexpr int offset(int i) { return i / 4 * 8 + i % 4; }

    __device__ __forceinline__ void add(const float (&shares)[U], float (&sums)[U / 2]) const {
#pragma unroll
        for (int t = 0; t < U; t += 8) {
            float d[4] = {};
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const float *four = shares + t + 4 * i;
                multiply_add_tf32(d, {four[0], four[1], four[2], four[3]}, pick[i], d);
            }
            sums[t / 2] = d[0], sums[t / 2 + 1] = d[2], sums[t / 2 + 2] = d[1], sums[t / 2 + 3] = d[3];
        }
        if constexpr (S > 2) reduce_transposed<S / 2, 4>(sums, s / 2);
    }
};

// Wait for the threads of one direction only: the teams share nothing but y.
template <int TEAM, int DIRS>
__device__ __forceinline__ void wait_for_team(int team) {
    if constexpr (TEAM == 32) {
        __syncwarp();
    } else if constexpr (DIRS == 1) {
        __syncthreads();
    } else {
        if (team == 0) {
            asm volatile("bar.sync 1, %0;" ::"n"(TEAM) : "memory");
        } else {
            asm volatile("bar.sync 2, %0;" ::"n"(TEAM) : "memory");
        }
    }
}

// Where a direction has a block of its own, the two of the same channels are a cluster: for sm_90 and
// newer.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#define CLUSTER_OF(blocks)
__device__ __forceinline__ void wait_for_cluster() { __trap(); }
template <typename T> __device__ __forceinline__ const T *in_block(unsigned, const T *mine) {
    return mine;
}
#else
#define CLUSTER_OF(blocks) __cluster_dims__(blocks, 1, 1)
__device__ __forceinline__ void wait_for_cluster() {
    asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::
                     : "memory");
}
// What stands in shared memory of block `rank` of the cluster where `mine` does in this block's.
template <typename T> __device__ __forceinline__ const T *in_block(unsigned rank, const T *mine) {
    unsigned long long theirs;
    asm("mapa.u64 %0, %1, %2;" : "=l"(theirs) : "l"(mine), "r"(rank));
    return reinterpret_cast<const T *>(theirs);
}
#endif

// Blocks that a multiprocessor need not hold. sm_80's code needs a few registers more to leave states.
template <int S, int MODE>
#if __CUDA_ARCH__ >= 900
constexpr int FEWER = FEWER_BLOCKS;
#else
constexpr int FEWER = S > 1 && MODE == OUTPUT_AND_STATES ? 1 : FEWER_BLOCKS;
#endif

// U tokens are scanned at a time. VECTOR: every access can be vectorised, and all N states exist.
// APART: each direction has a block of its own.
template <typename scalar_t, int NS, int S, int CPT, int CH, int T, int U, int DIRS, int MODE,
          int STEPS, bool SOFTPLUS, bool VECTOR, bool APART, int MIN_BLOCKS>
__global__ void CLUSTER_OF(APART ? 2 : 1)
    __launch_bounds__(CH / CPT * S * (APART ? 1 : DIRS),
                      MIN_BLOCKS > FEWER<S, MODE> ? MIN_BLOCKS - FEWER<S, MODE> : 1)
selective_scan_fwd_kernel(const ScanParams p) {
    constexpr int N = NS * S;
    constexpr int TEAM = CH / CPT * S;  // threads of a direction
    constexpr int TEAMS = APART ? 1 : DIRS;  // of a block
    constexpr int QUAD = N < 4 ? N : 4;
    constexpr bool HAS_Y = MODE != STATES_ONLY;
    constexpr bool ROUNDED = ONLY_ROUNDED<scalar_t, DIRS, MODE>;
    constexpr int SPACING = STATE_TOKENS<T, MODE>;
    static_assert(MODE != OUTPUT_AND_STATES ||
                      (T % SPACING == 0 && (S == 1 ? SPACING % U : U % SPACING) == 0),
                  "states are left where tokens that are scanned together begin");
    using Shared = TeamShared<scalar_t, NS, S, CPT, CH, T, U, DIRS, MODE, STEPS>;
    __shared__ Shared shared[TEAMS];

    float scale;  // converted here: the compiler would do it again, slowly, at each use
    asm volatile("cvt.rn.f32.f64 %0, %1;" : "=f"(scale) : "d"(p.scale));
    const bool vector_rows = VECTOR || p.vector_rows, vector_bc = VECTOR || p.vector_bc;
    const int states = VECTOR ? N : static_cast<int>(p.states);

    // Who this thread is.
    int team = APART ? blockIdx.x % 2 : DIRS == 2 ? threadIdx.x / TEAM : 0;
    // Tell the compiler that it is the same in all of a warp; where lanes that share a channel hold
    // 16 states each, its code would spill then.
    if constexpr (!APART && (S == 1 || NS < 16)) team = __shfl_sync(FULL_WARP, team, 0);
    const int thread = threadIdx.x % TEAM;
    // Its share of the states, and its first channel in the block's. Neighbours in the lowest bit
    // read the same B and C, those in the next bit the same step sizes: an access of 16 bytes takes
    // half as many passes through shared memory where either holds for a whole warp.
    constexpr int NEAR = 2;
    const int s = thread / NEAR % S;
    const int c0 = (thread / (NEAR * S) * NEAR + thread % NEAR) * CPT;
    const bool backwards = DIRS == 2 ? team == 1 : p.reverse != 0;
    Shared &my = shared[APART ? 0 : team];
    auto wait_for_both = [] {
        if constexpr (APART) {
            wait_for_cluster();
        } else {
            __syncthreads();
        }
    };

    // What this block does: channels [d0, d0 + channels) of one group, tokens of one chunk.
    const int group_channels = static_cast<int>(p.channels) / static_cast<int>(p.groups);
    const int group_blocks = (group_channels + CH - 1) / CH;
    unsigned index = APART ? blockIdx.x / 2 : blockIdx.x;
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
    constexpr bool SPREAD = S > 1 && NS < 16;  // more states leave no registers for it
    using Item = TileItem<T, CH, TEAM, scalar_t, SPREAD>;
    const Item item(thread, channels);
    using Matrices = MatrixItem<T, NS, S, TEAM, scalar_t>;
    Matrices matrices(thread, states);
    const long long item_token = first_token + walk.first(item.row);
    auto start_of = [&](const void *x, long long offset, long long stride) {
        return static_cast<const scalar_t *>(x) + offset + item_token * stride + d0 + item.column;
    };
    const int u_stride = sign * static_cast<int>(p.u_token);
    const int dt_stride = sign * static_cast<int>(p.dt_token);
    const int z_stride = sign * static_cast<int>(p.z_token);
    const int dy_stride = sign * static_cast<int>(p.dy_token);
    const int y_stride = sign * static_cast<int>(p.y_token);
    const scalar_t *u = start_of(p.u, team * p.u_dir + batch * p.u_batch, p.u_token);
    LowRankProducts<scalar_t, T, S == 1 ? STEPS : 0> low_rank;
    LowRankRows<T, TEAM, Shared::FACTORS ? STEPS : 1> low_rank_rows;
    const long long dt_offset = team * p.dt_dir + batch * p.dt_batch;
    const scalar_t *dt = start_of(p.dt, dt_offset, p.dt_token);
    if constexpr (STEPS > 0)
        dt = static_cast<const scalar_t *>(p.dt) + dt_offset +
             (first_token + walk.first(low_rank.row())) * p.dt_token + low_rank.column();
    const scalar_t *z = start_of(p.z, batch * p.z_batch, p.z_token);
    const scalar_t *dy = start_of(p.dy, batch * p.dy_batch, p.dy_token);
    scalar_t *y = const_cast<scalar_t *>(start_of(p.y, batch * p.y_batch, p.y_token));
    // From y to where this team leaves its share, and to where the other does.
    constexpr bool OVER_U = DIRS == 2 && MODE == OUTPUT_OVER_U;
    const long long own_share = OVER_U && team == 1 ? p.u_dir : 0;
    const long long other_share = OVER_U && team == 0 ? p.u_dir : 0;
    scalar_t *more =
        const_cast<scalar_t *>(start_of(p.more, batch * p.length * p.channels, p.channels));
    const int more_stride = sign * static_cast<int>(p.channels);
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
        item.read(my.u[stage], u, u_stride, low, high, vector_rows);
        if constexpr (Shared::GIVEN) {
            item.read(my.dt[stage], dt, dt_stride, low, high, vector_rows);
        } else if constexpr (Shared::PRODUCT) {
            low_rank.load(dt, dt_stride, low, high);
        } else {
            low_rank_rows.load(thread, dt, dt_stride, low, high);
        }
        matrices.load(BC, BC_step, low, high, vector_bc);
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
        if (NS % 4 == 0 && (VECTOR || p.vector_states)) {
#pragma unroll
            for (int i = 0; i < NS; i += 4) {
                const int n = s * NS + i;
                float4 A = {}, start = {};
                if (valid && n < states) {
                    A = *reinterpret_cast<const float4 *>(p.A + d * states + n);
                    if (p.start != nullptr)
                        start = *reinterpret_cast<const float4 *>(
                            p.start + (chunk_row + c0 + j) * states + n);
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
            const bool there = valid && n < states;
            lane.A2[j][i] = there ? LOG2_E * p.A[d * states + n] : 0.f;
            lane.h[j][i] = there && p.start != nullptr
                          ? p.start[(chunk_row + c0 + j) * states + n] : 0.f;
        }
    }

    prefetch(0);
    commit_copies();

    // For S > 1: the bias of the channels whose step sizes this thread works out, and D of the
    // channels that it writes out.
    constexpr int WARP_CHANNELS = S > 1 ? Shared::WARP_CHANNELS : 8;
    using Steps = StepItem<WARP_CHANNELS>;
    const Steps steps;
    const int warp_channel = thread / 32 * WARP_CHANNELS;
    StepProducts<scalar_t, WARP_CHANNELS, Shared::FACTORS ? STEPS : 1> products;
    float step_bias[Steps::GROUPS][2] = {}, skip[Item::VEC] = {};
    if constexpr (S > 1) {
        const long long d = team * p.channels + d0;
        if constexpr (Shared::FACTORS)
            products.load(steps,
                          static_cast<const unsigned *>(p.dt_proj) + (d + warp_channel) * 4 * STEPS,
                          channels - warp_channel);
#pragma unroll
        for (int j = 0; j < 2 * Steps::GROUPS; ++j) {
            const int c = warp_channel + steps.column + j / 2 * 8 + j % 2;
            if (c < channels && p.dt_bias != nullptr) step_bias[j / 2][j % 2] = p.dt_bias[d + c];
        }
#pragma unroll
        for (int j = 0; j < Item::VEC; ++j)
            if (HAS_Y && j < item.columns && p.D != nullptr) skip[j] = p.D[d + item.column + j];
        // Wait for all of them here: who waits in the loop waits for other loads in flight as well.
        if constexpr (Shared::FACTORS) products.wait();
#pragma unroll
        for (int j = 0; j < 2 * Steps::GROUPS; ++j) step_bias[j / 2][j % 2] += 0.f;
#pragma unroll
        for (int j = 0; j < Item::VEC; ++j) skip[j] += 0.f;
    }

    // Leave the states before the tokens to come, for the backward, which takes tiles of its own.
    constexpr int ROWS_AT_ONCE = S == 1 || SPACING == T ? SPACING : U;
    const int first_row = walk.low(0) / ROWS_AT_ONCE * ROWS_AT_ONCE;
    const int state_tiles = static_cast<int>((p.length + SPACING - 1) / SPACING);
    const int state_tile = static_cast<int>(first_token / SPACING) +
                           (sign > 0 ? 0 : (tiles * T - first_row) / SPACING - 1);
    const int quad_stride = static_cast<int>(p.channels) * QUAD;
    const int states_step = sign * (N / QUAD) * quad_stride;
    float *states_to =
        p.tile_states +
        (((team * p.batch + batch) * state_tiles + state_tile) * (N / QUAD) + s * NS / QUAD) *
            quad_stride + (d0 + c0) * QUAD + s * NS % QUAD;
    // How many follow along L: none is negative. Those of a thread without channels never exist.
    int following = p.tile_states != nullptr && c0 < channels ? state_tiles - 1 - state_tile
                                                              : -(1 << 30);
    auto leave_states = [&] {
#pragma unroll
        for (int j = 0; j < CPT; ++j) {
            constexpr int W = NS < QUAD ? NS : QUAD;
#pragma unroll
            for (int i = 0; i < NS; i += W) {
                Packet<float, W> packet;
#pragma unroll
                for (int k = 0; k < W; ++k) packet.at[k] = lane.h[j][i + k];
                if (following >= 0 && (CPT == 1 || c0 + j < channels))
                    *reinterpret_cast<Packet<float, W> *>(states_to + i / W * quad_stride +
                                                          j * QUAD) = packet;
            }
        }
        following -= sign;
        states_to += states_step;
    };

    if constexpr (Shared::PRODUCT) {
        const unsigned *weights = static_cast<const unsigned *>(p.dt_proj) +
                                  (team * p.channels + d0) * (4 * STEPS);
        for (int i = thread; i < CH * 4 * STEPS; i += TEAM)
            my.dt_proj[i / (4 * STEPS)][i % (4 * STEPS)] =
                i < channels * 4 * STEPS ? weights[i] : 0;
        wait_for_team<TEAM, TEAMS>(team);
    }
    auto store_loaded = [&] {
        matrices.store(my.BC);
        if constexpr (Shared::FACTORS) low_rank_rows.store(thread, my.low_rank);
    };
    store_loaded();

#pragma unroll 1
    for (int step = 0; step < tiles; ++step) {
        const int stage = step % 2;
        const int low = walk.low(step), high = walk.high(step);
        const Visit visit = visit_of(step);

        // Stage 1: this tile has arrived and the last one is written out; ask for the next. Before
        // the first tile to which a team comes second, the other must have written its share.
        if constexpr (Shared::PRODUCT) low_rank.multiply(my, thread / 32 * 32);
        wait_copies<0>();
        if (DIRS == 2 && HAS_Y && visit == SECOND && visit_of(step - 1) != SECOND) {
            wait_for_both();
        } else {
            wait_for_team<TEAM, TEAMS>(team);
        }
        if constexpr (HAS_Y) {
            if (visit != FIRST) {
                if (p.z != nullptr) item.read(my.z, z, z_stride, low, high, vector_rows);
                if constexpr (MODE == STATES_AND_DZ)
                    item.read(my.dy, dy, dy_stride, low, high, vector_rows);
                if constexpr (DIRS == 2) {
                    if (visit == SECOND)
                        item.read(my.other, y + other_share, y_stride, low, high, vector_rows);
                }
            }
            z += static_cast<long long>(T) * z_stride;
            if constexpr (MODE == STATES_AND_DZ) dy += static_cast<long long>(T) * dy_stride;
        }
        commit_copies();
        if (step + 1 < tiles) prefetch(step + 1);
        commit_copies();

        if (MODE == STATES_ONLY || MODE == STATES_AND_DZ) leave_states();

        // Stage 2: the recurrence.
        if constexpr (S == 1) {
            auto scan = [&](int &r, int end) {
#pragma unroll 1
                for (; r + U <= end; r += U)
                    scan_rows<U, MODE, SOFTPLUS, ROUNDED, scalar_t>(lane, my, stage, r, c0, delta_sum);
#pragma unroll 1
                for (; r < end; ++r)
                    scan_rows<1, MODE, SOFTPLUS, ROUNDED, scalar_t>(lane, my, stage, r, c0, delta_sum);
            };
            int r = low;
            if constexpr (MODE == OUTPUT_AND_STATES) {
#pragma unroll 1
                while (r < high) {
                    leave_states();
                    scan(r, min(r / SPACING * SPACING + SPACING, high));
                }
            } else {
                scan(r, high);
            }
        } else {
            // The warp's step sizes of the whole tile.
            constexpr int NEXT_ROW = CPT == 1 ? 1 : CH;  // in `drive`
            auto drive_at = [&](int r, int c) {
                return &my.drive[CPT == 1 ? c * Shared::DRIVE_PITCH + r : r * CH + c];
            };
            constexpr int ROWS = Steps::ROWS, GROUPS = Steps::GROUPS;
            const int row = steps.row, column = warp_channel + steps.column;
            const scalar_t *u_from[GROUPS], *dt_from[GROUPS];
            float2 *drive_to[GROUPS];
#pragma unroll
            for (int j = 0; j < GROUPS; ++j) {
                const int place = Item::place(row, column + 8 * j);
                u_from[j] = &my.u[stage][row][place];
                dt_from[j] = &my.dt[Shared::GIVEN ? stage : 0][Shared::GIVEN ? row : 0][place];
                drive_to[j] = drive_at(row, column + 8 * j);
            }
            constexpr int ALL = (T + ROWS - 1) / ROWS * GROUPS, BATCH = ALL % 4 ? ALL % 2 ? 1 : 2 : 4;
#pragma unroll
            for (int k = 0; k < ALL; k += BATCH) {
                if (ROWS > T && row >= T) break;
                float u_[BATCH][2], delta[BATCH][2];  // many at a time: the chains are long
                if constexpr (Shared::FACTORS)
                    products.multiply(steps, my.low_rank, k / GROUPS * ROWS, delta);
#pragma unroll
                for (int i = 0; i < BATCH; ++i) {
                    const int j = (k + i) % GROUPS, down = (k + i) / GROUPS * ROWS * CH;
                    load(u_from[j] + down, u_[i]);
                    if constexpr (Shared::GIVEN) load(dt_from[j] + down, delta[i]);
                }
#pragma unroll
                for (int i = 0; i < BATCH; ++i) {
#pragma unroll
                    for (int j = 0; j < 2; ++j) {
                        delta[i][j] += step_bias[(k + i) % GROUPS][j];
                        if constexpr (SOFTPLUS)
                            delta[i][j] = step_size<ROUNDED>(scalar_t(), delta[i][j]);
                    }
                }
#pragma unroll
                for (int i = 0; i < BATCH; ++i) {
                    const int down = (k + i) / GROUPS * ROWS * NEXT_ROW;
#pragma unroll
                    for (int j = 0; j < 2; ++j)
                        drive_to[(k + i) % GROUPS][down + j * (CPT == 1 ? Shared::DRIVE_PITCH : 1)] =
                            make_float2(delta[i][j], delta[i][j] * u_[i][j]);
                }
            }
            if (low > 0 || high < T) {
#pragma unroll 1
                for (int r = row; r < T; r += ROWS) {
                    if (r >= low && r < high) continue;
                    // No step leaves the state as it is.
#pragma unroll
                    for (int j = 0; j < 2 * GROUPS; ++j)
                        *drive_at(r, column + j / 2 * 8 + j % 2) = float2{};
                }
            }
            __syncwarp();

            constexpr int COUNT = U * CPT;
            constexpr int HOLDERS = COUNT < S ? S / COUNT : 1;  // lanes with the same sums of shares
            constexpr int HELD = COUNT < S ? 1 : COUNT / S;     // sums that a lane has
            // Where it was measured to be faster, or takes no registers that are not there.
            constexpr bool TENSOR = HAS_Y && MODE != OUTPUT_AND_STATES && STEPS > 0 && NS < 16 &&
                                    CPT == 1 && U % 8 == 0 && IS_BF16<scalar_t>;
            const PairSums<S, U> pair_sums(s);
            const int held = TENSOR ? pair_sums.token(s / 2 / HOLDERS * HELD) : s / HOLDERS * HELD;
            const bool holds = (TENSOR ? s / 2 : s) % HOLDERS == 0;
            const float2 *drive = drive_at(0, c0);
            const float *BC_row = my.BC[0] + s * Matrices::SEGMENT;
            float *y_to = HAS_Y ? &my.y[held / CPT][c0 + held % CPT] : nullptr;
            // U tokens from row r on: this lane's shares of their y, and the sums of all lanes' shares.
            auto advance = [&](int r, float (&shares)[COUNT]) {
                float delta[U][CPT], du[U][CPT];
                constexpr int VALUES = CPT == 1 ? 4 : 2 * CPT;  // two tokens of one channel, or one
#pragma unroll
                for (int t = 0; t < U; t += VALUES / 2 / CPT) {
                    float values[VALUES];
                    load(reinterpret_cast<const float *>(drive + (r + t) * NEXT_ROW), values);
#pragma unroll
                    for (int k = 0; k < VALUES / 2; ++k) {
                        delta[t + k / CPT][k % CPT] = values[2 * k];
                        du[t + k / CPT][k % CPT] = values[2 * k + 1];
                    }
                }
#pragma unroll
                for (int t = 0; t < U; ++t) {
                    if (MODE == OUTPUT_AND_STATES && t % SPACING == 0) leave_states();
                    float out[CPT];
#pragma unroll
                    for (int j = 0; j < CPT; ++j) {
                        out[j] = 0.f;
                        if constexpr (MODE == STATES_ONLY) delta_sum[j] += delta[t][j];
                    }
                    const float *BC = BC_row + (r + t) * Matrices::PITCH;
                    lane.template advance<HAS_Y>(BC, delta[t], du[t], out);
#pragma unroll
                    for (int j = 0; j < CPT; ++j) shares[t * CPT + j] = out[j];
                }
            };
            auto add_up = [&](int r, float (&shares)[COUNT]) {
                float *to = y_to + r * Shared::Y_PITCH;
                if constexpr (TENSOR) {
                    float sums[U / 2];
                    pair_sums.add(shares, sums);
                    if (holds) {
#pragma unroll
                        for (int i = 0; i < HELD; ++i)
                            to[PairSums<S, U>::offset(i) * Shared::Y_PITCH] = sums[i];
                    }
                } else if constexpr (HAS_Y) {
                    reduce_transposed<S, NEAR>(shares, s);
                    if (holds) {
#pragma unroll
                        for (int i = 0; i < HELD; ++i)
                            to[i / CPT * Shared::Y_PITCH + i % CPT] = shares[i];
                    }
                }
            };
            // The sums have long chains, whose gaps the next tokens' exponentials fill; where states are
            // left, or many are held, no registers are free for that.
            constexpr bool OVERLAPS = T > U && MODE != OUTPUT_AND_STATES && NS < 16;
            if (OVERLAPS && low == 0 && high == T) {
                float shares[2][COUNT];
#pragma unroll
                for (int r = 0; r <= T; r += U) {
                    if (r < T) advance(r, shares[r / U % 2]);
                    if (r > 0) add_up(r - U, shares[(r / U + 1) % 2]);
                }
            } else {
#pragma unroll 1
                for (int r = low / U * U; r < high; r += U) {
                    float shares[COUNT];
                    advance(r, shares);
                    add_up(r, shares);
                }
            }
        }

        // Stage 3: add the other direction, gate and write out, 16 bytes at a time.
        if constexpr (HAS_Y) wait_copies<1>();  // this tile's z and share; not the next tile
        if (DIRS == 2 && HAS_Y && visit == MIDDLE) {
            wait_for_both();
        } else {
            wait_for_team<TEAM, TEAMS>(team);
        }
        if (step + 1 < tiles) store_loaded();
        if constexpr (HAS_Y) {
            constexpr int VEC = Item::VEC;
#pragma unroll
            for (int k = 0; k < Item::COUNT; ++k) {
                const int r = item.row + k * Item::ROW_STEP, c = item.column;
                if (r < low || r >= high || item.columns <= 0) continue;
                if (visit == MIDDLE && team == 1) continue;
                float sum[VEC];
                load(&my.y[r][c], sum);
                if constexpr (S > 1) {
                    float u_[VEC];
                    load(&my.u[stage][r][item.placed], u_);
#pragma unroll
                    for (int j = 0; j < VEC; ++j) sum[j] = fmaf(skip[j], u_[j], sum[j]);
                }
                if (DIRS == 2 && visit != FIRST) {
                    float other[VEC];
                    if (visit == SECOND) {
                        load(&my.other[r][item.placed], other);
                    } else {
                        const Shared *theirs = &shared[TEAMS - 1];
                        if constexpr (APART) theirs = in_block(1, theirs);
                        load(&theirs->y[T - 1 - r][c], other);
                        if constexpr (S > 1) {
                            float u_[VEC];
                            load(&theirs->u[stage][T - 1 - r][Item::place(T - 1 - r, c)], u_);
#pragma unroll
                            for (int j = 0; j < VEC; ++j)
                                if (j < item.columns && p.D != nullptr)
                                    other[j] = fmaf(p.D[p.channels + d0 + c + j], u_[j], other[j]);
                        }
                    }
#pragma unroll
                    for (int j = 0; j < VEC; ++j) sum[j] = (sum[j] + other[j]) * scale;
                }
                const long long down = k * Item::ROW_STEP;
                auto write = [&](scalar_t *to, const float (&values)[VEC]) {
                    if (vector_rows) {
                        store(to, values);
                    } else {
#pragma unroll
                        for (int j = 0; j < VEC; ++j)
                            if (j < item.columns) to[j] = from_float<scalar_t>(values[j]);
                    }
                };
                if (visit != FIRST && p.z != nullptr) {
                    float z_[VEC];
                    load(&my.z[r][item.placed], z_);
                    if constexpr (MODE == STATES_AND_DZ) {
                        float dy_[VEC], out[VEC];
                        load(&my.dy[r][item.placed], dy_);
#pragma unroll
                        for (int j = 0; j < VEC; ++j) {
                            const float gate = fast_sigmoid(z_[j]);
                            out[j] = sum[j] * z_[j] * gate;
                            sum[j] *= dy_[j] * gate * fmaf(z_[j], 1.f - gate, 1.f);
                        }
                        if (p.more != nullptr) write(more + down * more_stride, out);
                    } else {
                        if constexpr (MODE == OUTPUT_AND_STATES) {
                            const scalar_t *ungated = static_cast<const scalar_t *>(p.more);
                            const scalar_t *start = static_cast<const scalar_t *>(p.y);
                            write(y + (ungated - start) + down * y_stride, sum);
                        }
#pragma unroll
                        for (int j = 0; j < VEC; ++j) sum[j] *= fast_silu(z_[j]);
                    }
                }
                write(y + down * y_stride + (visit == FIRST ? own_share : 0), sum);
            }
            if constexpr (MODE == STATES_AND_DZ) more += static_cast<long long>(T) * more_stride;
            y += static_cast<long long>(T) * y_stride;
        }
    }

    if constexpr (APART) wait_for_cluster();  // the other block may still read this one's memory
#pragma unroll
    for (int j = 0; j < CPT; ++j) {
        if (c0 + j >= channels) continue;
        if (MODE == STATES_ONLY && p.delta_sum != nullptr && s == 0)
            p.delta_sum[chunk_row + c0 + j] = delta_sum[j];
        if (p.end == nullptr) continue;
#pragma unroll
        for (int i = 0; i < NS; ++i) {
            const int n = s * NS + i;
            if (n < states) p.end[(chunk_row + c0 + j) * states + n] = lane.h[j][i];
        }
    }
}

// From the end states of chunks that started from zero to the state each chunk starts from: one
// thread a (direction, batch item, channel, state) walks along the chunks. `initial` is the state before
// the first chunk, if there is one, `final_state` that after the last. The adjoint is the same from the
// last chunk to the first.
__global__ void selective_scan_carry_kernel(const float *A, const float *initial, const float *end,
                                            const float *delta_sum, float *start,
                                            float *final_state, long long rows, long long batch,
                                            long long channels, long long states, long long chunks,
                                            long long first_reverse_row, long long adjoint) {
    const long long i = blockIdx.x * static_cast<long long>(blockDim.x) + threadIdx.x;
    const long long per_item = channels * states;  // i counts (row, d, n), rows (dirs, B)
    if (i >= rows * per_item) return;
    const long long row = i / per_item, d = i / states % channels, dn = i % per_item;
    const float A2 = LOG2_E * A[row / batch * per_item + dn];
    float h = initial == nullptr ? 0.f : initial[i];
    const bool backwards = (row >= first_reverse_row) != (adjoint != 0);
    const long long first = row * chunks + (backwards ? chunks - 1 : 0);
    const long long sign = backwards ? -1 : 1, step = sign * per_item;
    delta_sum += first * channels + d, end += first * per_item + dn, start += first * per_item + dn;
    constexpr int AHEAD = 8;  // chunks that are read together: one by one, each would be waited for
    for (int left = static_cast<int>(chunks); left > 0; left -= AHEAD) {
        float delta[AHEAD], own[AHEAD];
#pragma unroll
        for (int j = 0; j < AHEAD; ++j) {
            if (j >= left) continue;
            delta[j] = delta_sum[j * sign * channels];
            own[j] = end[j * step];
        }
#pragma unroll
        for (int j = 0; j < AHEAD; ++j) {
            if (j >= left) continue;
            start[j * step] = h;
            h = fmaf(decay_of(delta[j], A2), h, own[j]);
        }
        delta_sum += AHEAD * sign * channels, end += AHEAD * step, start += AHEAD * step;
    }
    if (final_state != nullptr) final_state[i] = h;
}
