// The causal depthwise convolution of vim/ops/causal_conv1d.py, forward and backward.
//
// Sums are float32. An item of work is a chunk of tokens of one batch item, all its channels; the
// past of a chunk is read again. Chunks depend on the shape only, so results do not depend on the
// number of threads.
#include "causal_conv1d.h"
#include "threads.h"

namespace vim {
namespace VIM_ISA {
namespace {

constexpr int64_t CHUNK = 64;  // tokens; vim/ops/cpu/causal_conv1d.py

void forward_item(const void* context, int64_t item) {
    const ConvForward& p = *static_cast<const ConvForward*>(context);
    const int64_t chunks = ceil_div(p.length, CHUNK), batch = item / chunks;
    const int64_t t0 = item % chunks * CHUNK, t1 = least(t0 + CHUNK, p.length);
    const int64_t states = p.width - 1;
    const Past past{rows(p.x, batch, 0, p.length, p.reverse),
                    rows(p.initial_state, batch, 0, states, false), states};
    const Rows y = rows(p.y, batch, 0, p.length, p.reverse);
    forward_tokens(p, past, y, t0, t1);
    if (t1 < p.length) return;
    const Rows final_state = rows(p.final_state, batch, 0, states, false);
    for (int64_t i = 0; i < states; ++i) {
        for (int64_t channel = 0; channel < p.channels; channel += W) {
            const int n = static_cast<int>(least(W, p.channels - channel));
            final_state.put(i, channel, past.at(p.length - states + i, channel, n), n);
        }
    }
}

// The gradient of the sum before the activation at tokens [t0, t1), channels [channel, + n).
template <int KW>
VIM_INLINE F presum_gradient(const ConvBackward& p, const Past& past, const Rows& dy, int64_t t,
                             int64_t channel, int n, F bias) {
    F gradient = dy.at(t, channel, n);
    if (p.silu) {
        const F total = convolve<KW>(past, p.weight, p.width, p.channels, t, channel, n, bias);
        gradient = mul(gradient, silu_slope(total, sigmoid(total)));
    }
    return gradient;
}

// dx_s = sum_k w_k g_{s + K - 1 - k}, where g is the gradient of the sum. A chunk owns its tokens'
// dx, for which it computes the K - 1 following g again; and its tokens' share of dweight.
template <int KW>
void backward_chunk(const ConvBackward& p, int64_t batch, int64_t chunk, int64_t chunks) {
    const int64_t K = p.width, states = K - 1, L = p.length;
    const int64_t t0 = chunk * CHUNK, t1 = least(t0 + CHUNK, L), ahead = least(t1 + states, L);
    const Past past{rows(p.x, batch, 0, L, p.reverse),
                    rows(p.initial_state, batch, 0, states, false), states};
    const Rows dy = rows(p.dy, batch, 0, L, p.reverse), dx = rows(p.dx, batch, 0, L, p.reverse);
    const Rows dfinal = rows(p.dfinal_state, batch, 0, states, false);
    const Rows dinitial = rows(p.dinitial_state, batch, 0, states, false);
    float* g = scratch((CHUNK + 2 * states + K) * W);
    float* dweight = g + (CHUNK + 2 * states) * W;
    // g_t is at place t - origin; the first chunk owns the initial state's gradient, too.
    const int64_t origin = chunk == 0 ? -states : t0;

    for (int64_t channel = 0; channel < p.channels; channel += W) {
        const int n = static_cast<int>(least(W, p.channels - channel));
        const F bias = p.bias == nullptr ? set1(0.0f) : load_some(p.bias + channel, n);
        F dbias = set1(0.0f);
        for (int64_t k = 0; k < K; ++k) store(dweight + k * W, set1(0.0f));
        for (int64_t t = origin; t < t1 + states; ++t) {
            F gradient = set1(0.0f);
            if (t >= 0 && t < ahead) {
                gradient = presum_gradient<KW>(p, past, dy, t, channel, n, bias);
            }
            store(g + (t - origin) * W, gradient);
            if (t < t0 || t >= t1) continue;
            dbias = add(dbias, gradient);
            for (int64_t k = 0; k < K; ++k) {
                const F x = past.at(t - states + k, channel, n);
                store(dweight + k * W, fma(gradient, x, load(dweight + k * W)));
            }
        }
        for (int64_t s = origin; s < t1; ++s) {
            F total = set1(0.0f);
            for (int64_t k = 0; k < K; ++k) {
                const F w = load_some(p.weight + k * p.channels + channel, n);
                total = fma(w, load(g + (s + states - k - origin) * W), total);
            }
            if (dfinal && s >= L - states) {
                total = add(total, dfinal.at(s - (L - states), channel, n));
            }
            if (s >= 0) {
                dx.put(s, channel, total, n);
            } else if (dinitial) {
                dinitial.put(states + s, channel, total, n);
            }
        }
        float* partial = p.partial + (batch * chunks + chunk) * (K + 1) * p.channels + channel;
        for (int64_t k = 0; k < K; ++k) {
            store_some(partial + k * p.channels, load(dweight + k * W), n);
        }
        store_some(partial + K * p.channels, dbias, n);
    }
}

void backward_item(const void* context, int64_t item) {
    const ConvBackward& p = *static_cast<const ConvBackward*>(context);
    const int64_t chunks = ceil_div(p.length, CHUNK), batch = item / chunks, chunk = item % chunks;
    switch (p.width) {
        case 2:
            return backward_chunk<2>(p, batch, chunk, chunks);
        case 3:
            return backward_chunk<3>(p, batch, chunk, chunks);
        case 4:
            return backward_chunk<4>(p, batch, chunk, chunks);
        default:
            return backward_chunk<0>(p, batch, chunk, chunks);
    }
}

// Sums dweight and dbias over the chunks: one item a vector of channels.
void parameters_item(const void* context, int64_t item) {
    const ConvBackward& p = *static_cast<const ConvBackward*>(context);
    const int64_t parts = p.batch * ceil_div(p.length, CHUNK), channel = item * W;
    const int n = static_cast<int>(least(W, p.channels - channel));
    for (int64_t k = 0; k <= p.width; ++k) {
        float* target = k < p.width ? p.dweight + k * p.channels : p.dbias;
        if (target == nullptr) continue;
        F total = set1(0.0f);
        for (int64_t i = 0; i < parts; ++i) {
            const float* partial = p.partial + (i * (p.width + 1) + k) * p.channels;
            total = add(total, load_some(partial + channel, n));
        }
        store_some(target + channel, total, n);
    }
}

}  // namespace

void causal_conv1d_fwd(const ConvForward& p) {
    parallel_for(p.threads, p.batch * ceil_div(p.length, CHUNK), forward_item, &p);
}

void causal_conv1d_bwd(const ConvBackward& p) {
    parallel_for(p.threads, p.batch * ceil_div(p.length, CHUNK), backward_item, &p);
    parallel_for(p.threads, ceil_div(p.channels, W), parameters_item, &p);
}

}  // namespace VIM_ISA
}  // namespace vim
