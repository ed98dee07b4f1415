// The forward of vim/ops/bidirectional_mixer.py: both convolutions, projections and scans.
//
// A chunk of tokens is convolved, projected (x_proj) and scanned before the next one, so that what
// lies between these steps never leaves the second-level cache; dt_proj is part of the scan. Only
// x and z are read, and only y is written.
//
// An item of work is a whole batch item, one direction after the other, as long as every thread
// gets one. Of the batch items left, half as many as threads are taken with an item of work for
// each direction, and their sums are merged afterwards. Those still left are shared by all threads
// one by one: first chunks of tokens, which are convolved and projected, then blocks of channels,
// which are scanned; that takes a sixth more time. Either way the sums are the same, so results do
// not depend on the number of threads.
#include "causal_conv1d.h"
#include "selective_scan.h"
#include "threads.h"

namespace vim {
namespace VIM_ISA {
namespace {

#ifdef VIM_AVX512
constexpr int PROJECT_TOKENS = 8, PROJECT_VECTORS = 3;  // 24 of 32 registers hold sums
#else
constexpr int PROJECT_TOKENS = 4, PROJECT_VECTORS = 3;  // 12 of 16
#endif

// out = u weight for VECTORS vectors of columns. u: (T, D), weight: (D, P), out: (T, P).
template <int TOKENS, int VECTORS>
void project_columns(int64_t t, Matrix u, const float* weight, float* out, int64_t tokens,
                     int64_t channels, int64_t columns) {
    for (; t + TOKENS <= tokens; t += TOKENS) {
        const float* at = u.data + t * u.token;
        F sum[TOKENS][VECTORS];
        VIM_UNROLL
        for (int i = 0; i < TOKENS; ++i) {
            VIM_UNROLL
            for (int v = 0; v < VECTORS; ++v) sum[i][v] = set1(0.0f);
        }
        for (int64_t d = 0; d < channels; ++d) {
            F w[VECTORS];
            VIM_UNROLL
            for (int v = 0; v < VECTORS; ++v) w[v] = load(weight + d * columns + v * W);
            VIM_UNROLL
            for (int i = 0; i < TOKENS; ++i) {
                const F x = set1(at[i * u.token + d]);
                VIM_UNROLL
                for (int v = 0; v < VECTORS; ++v) sum[i][v] = fma(x, w[v], sum[i][v]);
            }
        }
        VIM_UNROLL
        for (int i = 0; i < TOKENS; ++i) {
            VIM_UNROLL
            for (int v = 0; v < VECTORS; ++v) store(out + (t + i) * columns + v * W, sum[i][v]);
        }
    }
    if constexpr (TOKENS > 1) {
        project_columns<TOKENS / 2, VECTORS>(t, u, weight, out, tokens, channels, columns);
    }
}

// One direction of the mixer, in terms of its parts.
struct Direction {
    ConvForward conv{};
    ScanForward scan{};
    StepProjection steps;
    const MixerBranch& branch;
    int64_t columns;  // P
    // The packed weights: (K, D), (D, P), (R, D) and the Decay.
    float *conv_weight, *x_proj, *dt_proj, *A, *largest_A;

    Direction(const MixerForward& p, bool reverse) : branch(p.branches[reverse]) {
        const int64_t padded = ceil_div(p.channels, 16) * 16;
        columns = ceil_div(p.rank + 2 * p.state, 16) * 16;
        Arena arena{p.packed + reverse * padded * (p.width + columns + p.rank + p.state + 1)};
        conv_weight = arena.take(padded * p.width);
        x_proj = arena.take(padded * columns);
        dt_proj = arena.take(padded * p.rank);
        A = arena.take(padded * p.state);
        largest_A = arena.take(padded);
        steps = {dt_proj, p.rank, p.channels};
        conv.length = p.length;
        conv.channels = p.channels;
        conv.width = p.width;
        conv.silu = 1;
        conv.reverse = reverse;
        conv.x = p.x;
        conv.weight = conv_weight;
        conv.bias = branch.conv_bias;
        ScanInputs& in = scan.in;
        in.batch = p.batch;
        in.length = p.length;
        in.channels = p.channels;
        in.state = p.state;
        in.groups = 1;
        in.dt_softplus = 1;
        in.reverse = reverse;
        in.threads = p.threads;
        in.D = branch.D;
        in.dt_bias = branch.dt_bias;
        scan.y = p.y;
        scan.saved = branch.saved;
        scan.scale = 1.0;
        if (reverse) {  // The second direction adds the first one's output, and gates the sum.
            in.z = p.z;
            scan.addend = p.y;
            scan.scale = p.scale;
        }
    }

    // Packs the weights of W channels, from v * W on.
    void pack(int64_t v) const {
        const int64_t D = conv.channels, K = conv.width, R = steps.rank, N = scan.in.state;
        const int64_t channel = v * W;
        const int lanes = static_cast<int>(least(W, D - channel));
        for (int64_t k = 0; k < K; ++k) {
            const F weight = gather(branch.conv_weight + channel * K + k, K, lanes);
            store_some(conv_weight + k * D + channel, weight, lanes);
        }
        for (int64_t r = 0; r < R; ++r) {
            const F weight = gather(branch.dt_proj + channel * R + r, R, lanes);
            store_some(dt_proj + r * D + channel, weight, lanes);
        }
        for (int64_t d = channel; d < channel + lanes; ++d) {
            for (int64_t i = 0; i < columns; i += W) {
                const int n = static_cast<int>(least(W, R + 2 * N - i));
                store(x_proj + d * columns + i,
                      n > 0 ? gather(branch.x_proj + i * D + d, D, n) : set1(0.0f));
            }
        }
        pack_decay(A + channel * N, largest_A + channel, N, [&](int64_t n) {
            const F log = gather(branch.A_log + channel * N + n, N, lanes);
            return sub(set1(0.0f), exp2(mul(log, set1(LOG2_E))));
        });
    }

    // The Decay from a channel on, the first of a vector.
    Decay decay(int64_t channel) const {
        return {A + channel * scan.in.state, largest_A + channel};
    }

    // Convolves and projects the T tokens from t0 on. u: (T, D), projected: (T, P).
    void prepare(int64_t batch, int64_t t0, int64_t T, float* u, float* projected) const {
        const int64_t D = conv.channels, states = conv.width - 1;
        const Past past{rows(conv.x, batch, 0, conv.length, conv.reverse), {nullptr, 0, 4}, states};
        const Rows target{reinterpret_cast<char*>(u), D * 4, 4};
        forward_tokens(conv, past, target.from(-t0), t0, t0 + T);
        int64_t column = 0;
        for (; column + PROJECT_VECTORS * W <= columns; column += PROJECT_VECTORS * W) {
            project_columns<PROJECT_TOKENS, PROJECT_VECTORS>(
                0, {u, D}, x_proj + column, projected + column, T, D, columns);
        }
        for (; column < columns; column += W) {
            project_columns<PROJECT_TOKENS, 1>(0, {u, D}, x_proj + column,
                                               projected + column, T, D, columns);
        }
        const Rows kept = rows(branch.projected, batch, 0, conv.length, conv.reverse);
        if (!kept) return;
        const int64_t given = steps.rank + 2 * scan.in.state;
        for (int64_t t = 0; t < T; ++t) {
            for (int64_t i = 0; i < given; i += W) {
                const int n = static_cast<int>(least(W, given - i));
                kept.put(t0 + t, i, load(projected + t * columns + i), n);
            }
        }
    }

    // Scans the T tokens from t0 on. u begins there and at the scan's first channel.
    void scan_chunk(BlockScan& block, int64_t t0, int64_t T, const float* u,
                    const float* projected) const {
        const Rows source{reinterpret_cast<char*>(const_cast<float*>(u)), conv.channels * 4, 4};
        const float *B = projected + steps.rank, *C = B + scan.in.state;
        block.chunk(t0, T, source, {nullptr, 0, 4}, {B, columns}, {C, columns}, &steps,
                    {projected, columns});
    }
};

struct MixerTask {
    const MixerForward& p;
    Direction directions[2];
    Blocks blocks;
    int64_t batch;  // the first of the items in work

    const float* u(bool second) const {
        return p.intermediate + second * p.length * (p.channels + directions[0].columns);
    }
    const float* projected(bool second) const { return u(second) + p.length * p.channels; }
};

void pack_item(const void* context, int64_t item) {
    static_cast<const MixerTask*>(context)->directions[item % 2].pack(item / 2);
}

// One direction of a batch item, all of it.
void scan_direction(const Direction& direction, const ScanForward& scan, int64_t batch) {
    const int64_t D = scan.in.channels, L = scan.in.length, columns = direction.columns;
    Arena arena{scratch(BlockScan::floats(D, scan.in.state) + CHUNK * (D + columns) + 2 * 16)};
    float* u = arena.take(CHUNK * D);
    float* projected = arena.take(CHUNK * columns);
    const Block all{batch, 0, 0, 0, static_cast<int>(D)};
    BlockScan block(scan, all, direction.decay(0), arena);
    for (int64_t t0 = 0; t0 < L; t0 += CHUNK) {
        const int64_t T = least(CHUNK, L - t0);
        direction.prepare(batch, t0, T, u, projected);
        direction.scan_chunk(block, t0, T, u, projected);
    }
}

void whole_item(const void* context, int64_t batch) {
    const MixerTask& task = *static_cast<const MixerTask*>(context);
    for (const Direction& direction : task.directions) {
        scan_direction(direction, direction.scan, batch);
    }
}

// The second direction's sums of the batch items from task.batch on, in float32.
Sequence second_sums(const MixerTask& task) {
    const int64_t D = task.p.channels, item = task.p.length * D;
    return {task.p.intermediate - task.batch * item, item, D, 0, 0};
}

void direction_item(const void* context, int64_t item) {
    const MixerTask& task = *static_cast<const MixerTask*>(context);
    const Direction& direction = task.directions[item % 2];
    ScanForward scan = direction.scan;
    if (item % 2) {
        scan.y = second_sums(task);
        scan.addend.data = scan.in.z.data = nullptr;
        scan.scale = 1.0;
    }
    scan_direction(direction, scan, task.batch + item / 2);
}

// What the second direction's scan does last where the first one is done before.
void merge_item(const void* context, int64_t item) {
    const MixerTask& task = *static_cast<const MixerTask*>(context);
    const MixerForward& p = task.p;
    const int64_t chunks = ceil_div(p.length, CHUNK), batch = task.batch + item / chunks;
    const int64_t t0 = item % chunks * CHUNK, t1 = least(t0 + CHUNK, p.length);
    const Rows y = rows(p.y, batch, 0, p.length, false), z = rows(p.z, batch, 0, p.length, false);
    const Rows second = rows(second_sums(task), batch, 0, p.length, false);
    const F scale = set1(static_cast<float>(p.scale));
    for (int64_t t = t0; t < t1; ++t) {
        for (int64_t channel = 0; channel < p.channels; channel += W) {
            const int n = static_cast<int>(least(W, p.channels - channel));
            const F sum = add(second.at(t, channel, n), y.at(t, channel, n));
            y.put(t, channel, mul(mul(sum, silu(z.at(t, channel, n))), scale), n);
        }
    }
}

void prepare_item(const void* context, int64_t item) {
    const MixerTask& task = *static_cast<const MixerTask*>(context);
    const bool second = item % 2;
    const Direction& direction = task.directions[second];
    const int64_t t0 = item / 2 * CHUNK, T = least(CHUNK, task.p.length - t0);
    direction.prepare(task.batch, t0, T,
                      const_cast<float*>(task.u(second)) + t0 * task.p.channels,
                      const_cast<float*>(task.projected(second)) + t0 * direction.columns);
}

void scan_item(const void* context, int64_t item) {
    const MixerTask& task = *static_cast<const MixerTask*>(context);
    const MixerForward& p = task.p;
    Block block = task.blocks[item];
    block.batch = task.batch;
    float* memory = scratch(BlockScan::floats(block.channels, p.state));
    for (int second = 0; second < 2; ++second) {
        const Direction& direction = task.directions[second];
        Arena arena{memory};
        BlockScan scan(direction.scan, block, direction.decay(block.first), arena);
        for (int64_t t0 = 0; t0 < p.length; t0 += CHUNK) {
            direction.scan_chunk(scan, t0, least(CHUNK, p.length - t0),
                                 task.u(second) + t0 * p.channels + block.first,
                                 task.projected(second) + t0 * direction.columns);
        }
    }
}

}  // namespace

void bidirectional_mixer_fwd(const MixerForward& p) {
    MixerTask task{p, {{p, false}, {p, true}}, Blocks(p.channels, 1, 32), 0};
    parallel_for(p.threads, 2 * ceil_div(p.channels, W), pack_item, &task);
    const int64_t whole = p.batch / p.threads * p.threads, split = p.threads / 2;
    parallel_for(p.threads, whole, whole_item, &task);
    task.batch = whole;
    if (split > 0 && p.batch - whole >= split) {
        parallel_for(p.threads, 2 * split, direction_item, &task);
        parallel_for(p.threads, split * ceil_div(p.length, CHUNK), merge_item, &task);
        task.batch += split;
    }
    if (task.blocks.a_group < 4 * p.threads) task.blocks = Blocks(p.channels, 1, 16);
    for (; task.batch < p.batch; ++task.batch) {
        parallel_for(p.threads, 2 * ceil_div(p.length, CHUNK), prepare_item, &task);
        parallel_for(p.threads, task.blocks.a_group, scan_item, &task);
    }
}

}  // namespace VIM_ISA
}  // namespace vim
