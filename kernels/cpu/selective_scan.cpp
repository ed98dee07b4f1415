// The selective scan of vim/ops/selective_scan.py, forward and backward; everything is float32.
//
// A vector holds W channels, and the states of a tile of up to 16 n stay in registers over a chunk
// of tokens. Per state and token: the exponential (8 instructions on AVX-512), then
// h = h * e + (delta * u) * B and y += h * C. What has no n (softplus, gate) is done before and
// after, a chunk at a time, in arrays that fit the first-level cache.
//
// An item of work is a block of channels of one batch item. Blocks and the order of every sum
// depend on the shape only, so results do not depend on the number of threads.
#include "selective_scan.h"
#include "threads.h"

namespace vim {
namespace VIM_ISA {
namespace {

constexpr int BACKWARD_BLOCK = 64;  // channels whose dB and dC are summed at once
constexpr int BACKWARD_TILE = 4;

struct ForwardTask {
    const ScanForward& p;
    Blocks blocks;
};

void forward_item(const void* context, int64_t item) {
    const ForwardTask& task = *static_cast<const ForwardTask*>(context);
    const ScanForward& p = task.p;
    const ScanInputs& in = p.in;
    const Block block = task.blocks[item];
    const int64_t N = in.state, L = in.length;

    Arena arena{scratch(BlockScan::floats(block.channels, N) + block.vectors() * (N + 1) * W +
                        2 * CHUNK * N + 4 * 16)};
    float* B_space = arena.take(CHUNK * N);
    float* C_space = arena.take(CHUNK * N);
    BlockScan scan(p, block, load_decay(in, block, arena), arena);
    const Rows u = rows(in.u, block.batch, block.first, L, in.reverse);
    const Rows dt = rows(in.dt, block.batch, block.first, L, in.reverse);
    const Rows B_rows = rows(in.B, block.batch, block.group * in.B.group, L, in.reverse);
    const Rows C_rows = rows(in.C, block.batch, block.group * in.C.group, L, in.reverse);
    for (int64_t t0 = 0; t0 < L; t0 += CHUNK) {
        const int64_t T = least(CHUNK, L - t0);
        const Matrix B = load_matrix(B_rows, t0, T, N, B_space);
        const Matrix C = load_matrix(C_rows, t0, T, N, C_space);
        scan.chunk(t0, T, u.from(t0), dt.from(t0), B, C);
    }
    scan.store_final_state(p.final_state);
}

// What the backward of a chunk needs of each token of W channels, (T, W) each.
struct Tokens {
    float *delta, *slope;           // slope: d delta / d dt
    float* drive;                   // delta * u
    float *dout, *gate;             // gradient before the gate, and sigmoid(z)
    float *out, *ddrive, *decayed;  // sums over n: C h, g B, and g a h A
};

// Gradients of NT states over a chunk. The states are computed again and kept as a (the decay) and
// ah (the decayed state before the token), (T, NT, W) each. g carries the gradient of the state.
// Sums over many tokens go by chunks, and what rounding takes from a sum is added the next time.
inline void add_compensated(F& sum, F& lost, F x) {
    const F wanted = add(x, lost), total = add(sum, wanted);
    lost = sub(wanted, sub(total, sum));
    sum = total;
}

// dA, dA_lost: a compensated sum.
// dB, dC: (T, NT, W) sums over the vectors of a block, which the first of them begins.
template <int NT, bool WITHIN>
void backward_tile(const float* h, const float* A, float* g, float* dA, float* dA_lost,
                   const Tokens& k, Matrix B, Matrix C, float* dB, float* dC, float* kept,
                   int64_t tokens, bool gated, bool first) {
    F s[NT];
    VIM_UNROLL
    for (int n = 0; n < NT; ++n) s[n] = load(h + n * W);
    for (int64_t t = 0; t < tokens; ++t) {
        const F d = load(k.delta + t * W), x = load(k.drive + t * W);
        float* at = kept + t * 2 * NT * W;
        F out = set1(0.0f);
        VIM_UNROLL
        for (int n = 0; n < NT; ++n) {
            const F e = decay<WITHIN>(d, load(A + n * W));
            const F eh = mul(s[n], e);
            store(at + n * W, e);
            store(at + (NT + n) * W, eh);
            s[n] = fma(x, set1(B.data[t * B.token + n]), eh);
            if (gated) out = fma(s[n], set1(C.data[t * C.token + n]), out);
        }
        if (gated) store(k.out + t * W, add(load(k.out + t * W), out));
    }
    // The first vector adds to zeros in place of what the vector before it has left.
    static const float zeros[NT * W] = {};
    const float *dB_before = first ? zeros : dB, *dC_before = first ? zeros : dC;
    const int64_t step = first ? 0 : NT * W;
    F gradient[NT], sum[NT];
    VIM_UNROLL
    for (int n = 0; n < NT; ++n) {
        gradient[n] = load(g + n * W);
        sum[n] = set1(0.0f);
    }
    for (int64_t t = tokens - 1; t >= 0; --t) {
        const F d = load(k.delta + t * W), x = load(k.drive + t * W), dy = load(k.dout + t * W);
        const float* at = kept + t * 2 * NT * W;
        float *dB_t = dB + t * NT * W, *dC_t = dC + t * NT * W;
        F ddrive = set1(0.0f), decayed = set1(0.0f);
        VIM_UNROLL
        for (int n = 0; n < NT; ++n) {
            const F e = load(at + n * W), eh = load(at + (NT + n) * W);
            const F b = set1(B.data[t * B.token + n]);
            const F now = fma(dy, set1(C.data[t * C.token + n]), gradient[n]);
            store(dC_t + n * W, fma(dy, fma(x, b, eh), load(dC_before + t * step + n * W)));
            store(dB_t + n * W, fma(x, now, load(dB_before + t * step + n * W)));
            ddrive = fma(now, b, ddrive);
            const F w = mul(now, eh);
            decayed = fma(w, load(A + n * W), decayed);
            sum[n] = fma(w, d, sum[n]);
            gradient[n] = mul(now, e);
        }
        store(k.ddrive + t * W, add(load(k.ddrive + t * W), ddrive));
        store(k.decayed + t * W, add(load(k.decayed + t * W), decayed));
    }
    VIM_UNROLL
    for (int n = 0; n < NT; ++n) {
        store(g + n * W, gradient[n]);
        F total = load(dA + n * W), lost = load(dA_lost + n * W);
        add_compensated(total, lost, sum[n]);
        store(dA + n * W, total);
        store(dA_lost + n * W, lost);
    }
}

// The vectors of a block, over a chunk.
struct Chunk {
    int vectors;
    int64_t tokens, state;
    const float *h, *A;  // (vectors, N, W)
    float *g, *dA, *dA_lost;
    Tokens k[BACKWARD_BLOCK / W];
    bool within[BACKWARD_BLOCK / W];  // whether exponents are below EXP2_LIMIT
    bool gated;
    Matrix B, C;
    float *dB, *dC, *kept;   // workspace of a tile
    float *dB_out, *dC_out;  // of the first token, with `token` elements between tokens
    int64_t token;
};

// Tiles are outermost, so that what a tile keeps, dB and dC included, fits the first-level cache.
template <int NT>
void backward_tiles(int64_t n, const Chunk& c) {
    for (; n + NT <= c.state; n += NT) {
        const int64_t size = c.tokens * NT;
        const Matrix B{c.B.data + n, c.B.token}, C{c.C.data + n, c.C.token};
        for (int v = 0; v < c.vectors; ++v) {
            const int64_t at = (v * c.state + n) * W;
            (c.within[v] ? backward_tile<NT, true>
                         : backward_tile<NT, false>)(c.h + at, c.A + at, c.g + at, c.dA + at,
                                                     c.dA_lost + at, c.k[v], B, C, c.dB, c.dC,
                                                     c.kept, c.tokens, c.gated, v == 0);
        }
        float dB[CHUNK * NT], dC[CHUNK * NT];
        sum_rows(c.dB, dB, size);
        sum_rows(c.dC, dC, size);
        for (int64_t t = 0; t < c.tokens; ++t) {
            memcpy(c.dB_out + t * c.token + n, dB + t * NT, NT * sizeof(float));
            memcpy(c.dC_out + t * c.token + n, dC + t * NT, NT * sizeof(float));
        }
    }
    if constexpr (NT > 1) backward_tiles<NT / 2>(n, c);
}

struct BackwardTask {
    const ScanBackward& p;
    Blocks blocks;
};

void backward_item(const void* context, int64_t item) {
    const BackwardTask& task = *static_cast<const BackwardTask*>(context);
    const ScanBackward& p = task.p;
    const ScanInputs& in = p.in;
    const Block block = task.blocks[item];
    const int64_t N = in.state, L = in.length, chunks = ceil_div(L, CHUNK);
    const int vectors = block.vectors();

    const int64_t tile = CHUNK * BACKWARD_TILE * W;
    Arena arena{scratch((5 * N + 1) * vectors * W + 2 * CHUNK * N + 4 * tile +
                        8 * vectors * CHUNK * W + 16 * (11 + 8 * vectors))};
    const Decay decay = load_decay(in, block, arena);
    float* g = arena.take(vectors * N * W);
    float* dA = arena.take(vectors * N * W);
    float* dA_lost = arena.take(vectors * N * W);
    float* h = arena.take(vectors * N * W);
    float* B_space = arena.take(CHUNK * N);
    float* C_space = arena.take(CHUNK * N);
    Chunk c;
    c.vectors = vectors;
    c.state = N;
    c.h = h;
    c.A = decay.A;
    c.g = g;
    c.dA = dA;
    c.dA_lost = dA_lost;
    c.gated = in.z.data != nullptr;
    c.dB = arena.take(tile);
    c.dC = arena.take(tile);
    c.kept = arena.take(2 * tile);
    for (int v = 0; v < vectors; ++v) {
        Tokens& k = c.k[v];
        float** const arrays[] = {&k.delta, &k.slope, &k.drive,  &k.dout,
                                  &k.gate,  &k.out,   &k.ddrive, &k.decayed};
        for (float** array : arrays) *array = arena.take(CHUNK * W);
    }

    F dD[BACKWARD_BLOCK / W], ddt_bias[BACKWARD_BLOCK / W];
    F dD_lost[BACKWARD_BLOCK / W], ddt_bias_lost[BACKWARD_BLOCK / W];
    for (int v = 0; v < vectors; ++v) {
        const int64_t channel = block.first + v * W;
        dD[v] = ddt_bias[v] = dD_lost[v] = ddt_bias_lost[v] = set1(0.0f);
        const float* final_state = p.dfinal_state;
        if (final_state != nullptr) final_state += (block.batch * in.channels + channel) * N;
        for (int64_t n = 0; n < N; ++n) {
            store(g + (v * N + n) * W, final_state == nullptr
                                           ? set1(0.0f)
                                           : gather(final_state + n, N, block.lanes(v)));
            store(dA + (v * N + n) * W, set1(0.0f));
            store(dA_lost + (v * N + n) * W, set1(0.0f));
        }
    }

    const Rows u = rows(in.u, block.batch, block.first, L, in.reverse);
    const Rows dt = rows(in.dt, block.batch, block.first, L, in.reverse);
    const Rows z = rows(in.z, block.batch, block.first, L, in.reverse);
    const Rows dy = rows(p.dy, block.batch, block.first, L, in.reverse);
    const Rows du = rows(p.du, block.batch, block.first, L, in.reverse);
    const Rows ddt = rows(p.ddt, block.batch, block.first, L, in.reverse);
    const Rows dz = rows(p.dz, block.batch, block.first, L, in.reverse);
    const Rows B_rows = rows(in.B, block.batch, block.group * in.B.group, L, in.reverse);
    const Rows C_rows = rows(in.C, block.batch, block.group * in.C.group, L, in.reverse);

    const int64_t matrix = in.batch * L * in.groups * N;
    const bool softplus_given = in.dt_softplus, skipping = in.D != nullptr;
    const bool one_block = task.blocks.a_group == 1;
    float* dB_out = one_block ? p.dB : p.partial_matrices + block.index * matrix;
    float* dC_out =
        one_block ? p.dC : p.partial_matrices + (task.blocks.a_group + block.index) * matrix;

    for (int64_t chunk = chunks - 1; chunk >= 0; --chunk) {
        const int64_t t0 = chunk * CHUNK, T = least(CHUNK, L - t0);
        const Matrix B = load_matrix(B_rows, t0, T, N, B_space);
        const Matrix C = load_matrix(C_rows, t0, T, N, C_space);
        for (int v = 0; v < vectors; ++v) {
            const Tokens k = c.k[v];
            const int lanes = block.lanes(v);
            const int64_t channel = block.first + v * W;
            const float* saved = p.saved + (block.batch * chunks + chunk) * N * in.channels;
            for (int64_t n = 0; n < N; ++n) {
                store(h + (v * N + n) * W, load_some(saved + n * in.channels + channel, lanes));
            }
            const F bias =
                in.dt_bias == nullptr ? set1(0.0f) : load_some(in.dt_bias + channel, lanes);
            const F skip = in.D == nullptr ? set1(0.0f) : load_some(in.D + channel, lanes);
            F largest_delta = set1(0.0f);
            for (int64_t t = 0; t < T; ++t) {
                F d = add(dt.at(t0 + t, v * W, lanes), bias);
                if (softplus_given) {
                    F slope;
                    d = softplus(d, slope);
                    store(k.slope + t * W, slope);
                }
                const F x = u.at(t0 + t, v * W, lanes);
                F dout = dy.at(t0 + t, v * W, lanes);
                if (z) {
                    const F value = z.at(t0 + t, v * W, lanes), gate = sigmoid(value);
                    store(k.gate + t * W, gate);
                    dout = mul(dout, mul(silu_argument(value), gate));
                }
                largest_delta = max(largest_delta, abs(d));
                store(k.delta + t * W, d);
                store(k.drive + t * W, mul(d, x));
                store(k.dout + t * W, dout);
                store(k.out + t * W, skipping ? mul(skip, x) : skip);
                store(k.ddrive + t * W, set1(0.0f));
                store(k.decayed + t * W, set1(0.0f));
            }
            c.within[v] =
                !EXP2_LIMITED ||
                all_at_most(mul(largest_delta, load(decay.largest + v * W)), set1(EXP2_LIMIT));
        }

        const int64_t token = in.reverse ? L - 1 - t0 : t0;
        const int64_t at = ((block.batch * L + token) * in.groups + block.group) * N;
        c.tokens = T;
        c.B = B;
        c.C = C;
        c.dB_out = dB_out + at;
        c.dC_out = dC_out + at;
        c.token = in.reverse ? -in.groups * N : in.groups * N;
        backward_tiles<BACKWARD_TILE>(0, c);

        for (int v = 0; v < vectors; ++v) {
            const Tokens k = c.k[v];
            const int lanes = block.lanes(v);
            const F skip =
                in.D == nullptr ? set1(0.0f) : load_some(in.D + block.first + v * W, lanes);
            F dskip = set1(0.0f), dbias = set1(0.0f);
            for (int64_t t = 0; t < T; ++t) {
                const F x = u.at(t0 + t, v * W, lanes), dout = load(k.dout + t * W);
                const F ddrive = load(k.ddrive + t * W);
                F dx = mul(load(k.delta + t * W), ddrive);
                if (skipping) {
                    dx = fma(dout, skip, dx);
                    dskip = fma(dout, x, dskip);
                }
                du.put(t0 + t, v * W, dx, lanes);
                // A holds log2 e as a factor.
                F dd = fma(load(k.decayed + t * W), set1(LN_2), mul(x, ddrive));
                if (softplus_given) dd = mul(dd, load(k.slope + t * W));
                dbias = add(dbias, dd);
                ddt.put(t0 + t, v * W, dd, lanes);
                if (z) {
                    const F slope = silu_slope(z.at(t0 + t, v * W, lanes), load(k.gate + t * W));
                    const F gradient = mul(dy.at(t0 + t, v * W, lanes), load(k.out + t * W));
                    dz.put(t0 + t, v * W, mul(gradient, slope), lanes);
                }
            }
            add_compensated(dD[v], dD_lost[v], dskip);
            add_compensated(ddt_bias[v], ddt_bias_lost[v], dbias);
        }
    }

    float* parameters = p.partial_parameters + block.batch * (N + 2) * in.channels;
    for (int v = 0; v < vectors; ++v) {
        const int lanes = block.lanes(v);
        const int64_t channel = block.first + v * W;
        for (int64_t n = 0; n < N; ++n) {
            store_some(parameters + n * in.channels + channel, load(dA + (v * N + n) * W), lanes);
        }
        store_some(parameters + N * in.channels + channel, dD[v], lanes);
        store_some(parameters + (N + 1) * in.channels + channel, ddt_bias[v], lanes);
        if (p.dinitial_state != nullptr) {
            float* initial = p.dinitial_state + (block.batch * in.channels + channel) * N;
            for (int64_t n = 0; n < N; ++n) {
                store_column(initial, N, n, lanes, load(g + (v * N + n) * W));
            }
        }
    }
}

// Sums over the batch: one item a vector of channels.
void parameters_item(const void* context, int64_t item) {
    const ScanBackward& p = *static_cast<const ScanBackward*>(context);
    const ScanInputs& in = p.in;
    const int64_t channel = item * W, rows = in.state + 2;
    const int lanes = static_cast<int>(least(W, in.channels - channel));
    for (int64_t row = 0; row < rows; ++row) {
        F total = set1(0.0f);
        for (int64_t b = 0; b < in.batch; ++b) {
            const float* partial = p.partial_parameters + (b * rows + row) * in.channels;
            total = add(total, load_some(partial + channel, lanes));
        }
        if (row < in.state) {
            store_column(p.dA + channel * in.state, in.state, row, lanes, total);
        } else if (float* target = row == in.state ? p.dD : p.ddt_bias) {
            store_some(target + channel, total, lanes);
        }
    }
}

constexpr int64_t PIECE = 4096;

// Sums over the channel blocks: one item a piece of dB or dC.
void matrices_item(const void* context, int64_t item) {
    const BackwardTask& task = *static_cast<const BackwardTask*>(context);
    const ScanInputs& in = task.p.in;
    const int64_t size = in.batch * in.length * in.groups * in.state;
    const int64_t pieces = ceil_div(size, PIECE), blocks = task.blocks.a_group;
    const bool second = item >= pieces;
    const int64_t begin = item % pieces * PIECE, end = least(begin + PIECE, size);
    const float* partial = task.p.partial_matrices + (second ? blocks * size : 0);
    float* target = second ? task.p.dC : task.p.dB;
    for (int64_t i = begin; i < end; i += W) {
        const int lanes = static_cast<int>(least(W, end - i));
        F total = set1(0.0f);
        for (int64_t b = 0; b < blocks; ++b) {
            total = add(total, load_some(partial + b * size + i, lanes));
        }
        store_some(target + i, total, lanes);
    }
}

}  // namespace

void selective_scan_fwd(const ScanForward& p) {
    const ScanInputs& in = p.in;
    // Wide blocks use whole cache lines of bfloat16; narrow ones serve more threads.
    const Blocks wide(in, 32), narrow(in, 16);
    const ForwardTask task{p, wide.count(in) >= 4 * in.threads ? wide : narrow};
    parallel_for(in.threads, task.blocks.count(in), forward_item, &task);
}

void selective_scan_bwd(const ScanBackward& p) {
    const ScanInputs& in = p.in;
    const BackwardTask task{p, Blocks(in, BACKWARD_BLOCK)};
    parallel_for(in.threads, task.blocks.count(in), backward_item, &task);
    parallel_for(in.threads, ceil_div(in.channels, W), parameters_item, &p);
    if (task.blocks.a_group > 1) {
        const int64_t size = in.batch * in.length * in.groups * in.state;
        parallel_for(in.threads, 2 * ceil_div(size, PIECE), matrices_item, &task);
    }
}

}  // namespace VIM_ISA
}  // namespace vim
