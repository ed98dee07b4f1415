// The forward of the selective scan for a block of channels, a chunk of tokens at a time; what
// selective_scan.cpp and bidirectional_mixer.cpp share.
#pragma once

#include "vec.h"

namespace vim {
namespace VIM_ISA {
namespace {

constexpr int CHUNK = 32;  // tokens between saved states; vim/ops/cpu/selective_scan.py
#ifdef VIM_AVX512
constexpr int FORWARD_TILE = 16;
#else
constexpr int FORWARD_TILE = 4;
#endif

// A block of channels within one group.
struct Block {
    int64_t batch, group, index, first;  // index within the group, first channel
    int channels;

    int vectors() const { return static_cast<int>(ceil_div(channels, W)); }
    int lanes(int v) const { return static_cast<int>(least(W, channels - v * W)); }
};

struct Blocks {
    int64_t size, a_group, groups, group_channels;

    Blocks(int64_t channels, int64_t a_groups, int64_t block)
        : size(block), groups(a_groups), group_channels(channels / a_groups) {
        a_group = ceil_div(group_channels, size);
    }

    Blocks(const ScanInputs& in, int64_t block) : Blocks(in.channels, in.groups, block) {}

    int64_t count(const ScanInputs& in) const { return in.batch * groups * a_group; }

    Block operator[](int64_t item) const {
        const int64_t index = item % a_group, group = item / a_group % groups;
        const int64_t first = index * size;
        return {item / a_group / groups, group, index, group * group_channels + first,
                static_cast<int>(least(size, group_channels - first))};
    }
};

VIM_INLINE void store_column(float* target, int64_t state, int64_t n, int lanes, F value) {
    float x[W];
    store(x, value);
    for (int i = 0; i < lanes; ++i) target[i * state + n] = x[i];
}

// Carves arrays out of scratch memory.
struct Arena {
    float* next;

    float* take(int64_t floats) {
        float* taken = next;
        next += ceil_div(floats, 16) * 16;
        return taken;
    }
};

// A times log2 e as (vectors, N, W), and its largest magnitude per channel, (vectors, W).
struct Decay {
    const float *A, *largest;
};

// The Decay of a vector of channels into A and largest, where column(n) is A[:, n].
template <class Column>
VIM_INLINE void pack_decay(float* A, float* largest, int64_t state, Column column) {
    F most = set1(0.0f);
    for (int64_t n = 0; n < state; ++n) {
        const F a = mul(column(n), set1(LOG2_E));
        most = max(abs(a), most);
        store(A + n * W, a);
    }
    store(largest, most);
}

// The Decay of a block of channels, in memory of the arena.
VIM_INLINE Decay load_decay(const ScanInputs& in, const Block& block, Arena& arena) {
    const int64_t N = in.state;
    float* A = arena.take(block.vectors() * N * W);
    float* largest = arena.take(block.vectors() * W);
    for (int v = 0; v < block.vectors(); ++v) {
        const float* first = in.A + (block.first + v * W) * N;
        const int lanes = block.lanes(v);
        pack_decay(A + v * N * W, largest + v * W, N,
                   [&](int64_t n) { return gather(first + n, N, lanes); });
    }
    return {A, largest};
}

// B or C of a chunk, (T, N): in place if float32, else converted into `space`.
VIM_INLINE Matrix load_matrix(const Rows& source, int64_t t0, int64_t tokens, int64_t state,
                              float* space) {
    if (source.size == 4) {
        return {reinterpret_cast<const float*>(source.data + t0 * source.token), source.token / 4};
    }
    for (int64_t t = 0; t < tokens; ++t) {
        for (int64_t n = 0; n < state; n += W) {
            const int lanes = static_cast<int>(least(W, state - n));
            store_some(space + t * state + n, source.at(t0 + t, n, lanes), lanes);
        }
    }
    return {space, state};
}

template <bool WITHIN>
VIM_INLINE F decay(F delta, F A) {
    return WITHIN ? exp2_product(delta, A) : exp2(mul(delta, A));
}

// The recurrence of NT states over a chunk. h, A: (NT, W); delta, drive, y: (T, W); B, C: (T, n
// on).
template <int NT, bool WITHIN>
void scan_tile(float* h, const float* A, const float* delta, const float* drive, float* y, Matrix B,
               Matrix C, int64_t tokens) {
    F s[NT];
    VIM_UNROLL
    for (int n = 0; n < NT; ++n) s[n] = load(h + n * W);
    for (int64_t t = 0; t < tokens; ++t) {
        const F d = load(delta + t * W), x = load(drive + t * W);
        F even = set1(0.0f), odd = set1(0.0f);
        VIM_UNROLL
        for (int n = 0; n < NT; ++n) {
            const F e = decay<WITHIN>(d, load(A + n * W));
            s[n] = fma(s[n], e, mul(x, set1(B.data[t * B.token + n])));
            F& sum = n % 2 ? odd : even;
            sum = fma(s[n], set1(C.data[t * C.token + n]), sum);
        }
        store(y + t * W, add(load(y + t * W), add(even, odd)));
    }
    VIM_UNROLL
    for (int n = 0; n < NT; ++n) store(h + n * W, s[n]);
}

template <int NT, bool WITHIN>
void scan_tiles(int64_t n, float* h, const float* A, const float* delta, const float* drive,
                float* y, Matrix B, Matrix C, int64_t tokens, int64_t state) {
    for (; n + NT <= state; n += NT) {
        scan_tile<NT, WITHIN>(h + n * W, A + n * W, delta, drive, y, {B.data + n, B.token},
                              {C.data + n, C.token}, tokens);
    }
    if constexpr (NT > 1) {
        scan_tiles<NT / 2, WITHIN>(n, h, A, delta, drive, y, B, C, tokens, state);
    }
}

// How the mixer makes the step sizes, inside the scan: dt_t = sum_r step_tr weight_r.
struct StepProjection {
    const float* weight;  // (R, D)
    int64_t rank, channels;
};

// dt of W channels, from `channel` on, of the tokens from t on, as (T, W).
template <int TOKENS>
void project_steps(int64_t t, const StepProjection& p, Matrix step, int64_t channel, int lanes,
                   int64_t tokens, float* dt) {
    for (; t + TOKENS <= tokens; t += TOKENS) {
        F sum[TOKENS];
        VIM_UNROLL
        for (int i = 0; i < TOKENS; ++i) sum[i] = set1(0.0f);
        for (int64_t r = 0; r < p.rank; ++r) {
            const F w = load_some(p.weight + r * p.channels + channel, lanes);
            VIM_UNROLL
            for (int i = 0; i < TOKENS; ++i) {
                sum[i] = fma(w, set1(step.data[(t + i) * step.token + r]), sum[i]);
            }
        }
        VIM_UNROLL
        for (int i = 0; i < TOKENS; ++i) store(dt + (t + i) * W, sum[i]);
    }
    if constexpr (TOKENS > 1) {
        project_steps<TOKENS / 2>(t, p, step, channel, lanes, tokens, dt);
    }
}

// The scan of a block of channels of one batch item, to be called for one chunk after the other.
class BlockScan {
  public:
    // Floats of the arena that a scan of `channels` channels takes.
    static int64_t floats(int64_t channels, int64_t state) {
        return ceil_div(channels, W) * state * W + 3 * CHUNK * W + 4 * 16;
    }

    BlockScan(const ScanForward& params, const Block& of, const Decay& block_decay, Arena& arena)
        : p(params), block(of), decay(block_decay) {
        const ScanInputs& in = p.in;
        const int64_t N = in.state;
        h = arena.take(block.vectors() * N * W);
        delta = arena.take(CHUNK * W);
        drive = arena.take(CHUNK * W);
        out = arena.take(CHUNK * W);
        for (int v = 0; v < block.vectors(); ++v) {
            const int64_t channel = block.first + v * W;
            const float* initial = p.initial_state;
            if (initial != nullptr) initial += (block.batch * in.channels + channel) * N;
            for (int64_t n = 0; n < N; ++n) {
                store(h + (v * N + n) * W,
                      initial == nullptr ? set1(0.0f) : gather(initial + n, N, block.lanes(v)));
            }
        }
        z = rows(in.z, block.batch, block.first, in.length, in.reverse);
        addend = rows(p.addend, block.batch, block.first, in.length, in.reverse);
        y = rows(p.y, block.batch, block.first, in.length, in.reverse);
    }

    // Scans the T tokens from t0 on. u and dt begin there and at the block's first channel, B and
    // C there. With a projection, dt is what `step` gives.
    void chunk(int64_t t0, int64_t T, const Rows& u, const Rows& dt, Matrix B, Matrix C,
               const StepProjection* projection = nullptr, Matrix step = {}) {
        const ScanInputs& in = p.in;
        const int64_t N = in.state;
        // Copies, which a store through a vector pointer cannot change.
        const Rows z = this->z, addend = this->addend, y = this->y;
        float *const delta = this->delta, *const drive = this->drive, *const out = this->out;
        const bool scaled = p.scale != 1.0, softplus_given = in.dt_softplus;
        const bool skipping = in.D != nullptr;
        const F scale = set1(static_cast<float>(p.scale));
        for (int v = 0; v < block.vectors(); ++v) {
            const int lanes = block.lanes(v);
            const int64_t channel = block.first + v * W;
            if (p.saved != nullptr) {
                const int64_t chunks = ceil_div(in.length, CHUNK);
                float* saved = p.saved + (block.batch * chunks + t0 / CHUNK) * N * in.channels;
                for (int64_t n = 0; n < N; ++n) {
                    store_some(saved + n * in.channels + channel, load(h + (v * N + n) * W), lanes);
                }
            }
            const F bias =
                in.dt_bias == nullptr ? set1(0.0f) : load_some(in.dt_bias + channel, lanes);
            const F skip = in.D == nullptr ? set1(0.0f) : load_some(in.D + channel, lanes);
            if (projection != nullptr) {
                project_steps<8>(0, *projection, step, channel, lanes, T, delta);
            }
            F largest_delta = set1(0.0f);
            for (int64_t t = 0; t < T; ++t) {
                F d = projection != nullptr ? load(delta + t * W) : dt.at(t, v * W, lanes);
                d = add(d, bias);
                if (softplus_given) d = softplus(d);
                const F x = u.at(t, v * W, lanes);
                largest_delta = max(largest_delta, abs(d));
                store(delta + t * W, d);
                store(drive + t * W, mul(d, x));
                store(out + t * W, skipping ? mul(skip, x) : skip);
            }
            const bool within =
                !EXP2_LIMITED ||
                all_at_most(mul(largest_delta, load(decay.largest + v * W)), set1(EXP2_LIMIT));
            (within ? scan_tiles<FORWARD_TILE, true>
                    : scan_tiles<FORWARD_TILE, false>)(0, h + v * N * W, decay.A + v * N * W, delta,
                                                       drive, out, B, C, T, N);
            for (int64_t t = 0; t < T; ++t) {
                F value = load(out + t * W);
                if (addend) value = add(value, addend.at(t0 + t, v * W, lanes));
                if (z) value = mul(value, silu(z.at(t0 + t, v * W, lanes)));
                if (scaled) value = mul(value, scale);
                y.put(t0 + t, v * W, value, lanes);
            }
        }
    }

    void store_final_state(float* final_state) const {
        const int64_t N = p.in.state;
        for (int v = 0; v < block.vectors(); ++v) {
            float* target = final_state + (block.batch * p.in.channels + block.first + v * W) * N;
            for (int64_t n = 0; n < N; ++n) {
                store_column(target, N, n, block.lanes(v), load(h + (v * N + n) * W));
            }
        }
    }

  private:
    const ScanForward& p;
    const Block block;
    const Decay decay;
    float* h;                    // (vectors, N, W)
    float *delta, *drive, *out;  // (CHUNK, W)
    Rows z, addend, y;
};

}  // namespace
}  // namespace VIM_ISA
}  // namespace vim
