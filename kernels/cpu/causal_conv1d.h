// The forward of the causal convolution over a chunk of tokens; what causal_conv1d.cpp and
// bidirectional_mixer.cpp share.
#pragma once

#include "vec.h"

namespace vim {
namespace VIM_ISA {
namespace {

// The inputs of one batch item in scan order, with what came before them at negative places.
struct Past {
    Rows x, initial;
    int64_t states;  // K - 1

    F at(int64_t t, int64_t channel, int n) const {
        if (t >= 0) return x.at(t, channel, n);
        return initial ? initial.at(states + t, channel, n) : set1(0.0f);
    }
};

// The sum before the activation. KW is K where it is known at compile time, else 0.
template <int KW>
VIM_INLINE F convolve(const Past& past, const float* weight, int64_t width, int64_t channels,
                      int64_t t, int64_t channel, int n, F bias) {
    const int64_t K = KW > 0 ? KW : width;
    F total = bias;
    VIM_UNROLL
    for (int64_t k = 0; k < K; ++k) {
        const F w = load_some(weight + k * channels + channel, n);
        total = fma(w, past.at(t - (K - 1) + k, channel, n), total);
    }
    return total;
}

// One vector of channels over a chunk of full vectors: the last K inputs stay in registers.
template <int KW>
VIM_INLINE void forward_channels(const ConvForward& p, const Past& past, const Rows& y, int64_t t0,
                                 int64_t t1, int64_t channel, int n) {
    F window[KW], weight[KW];
    VIM_UNROLL
    for (int k = 0; k < KW; ++k) {
        weight[k] = load_some(p.weight + k * p.channels + channel, n);
        if (k > 0) window[k] = past.at(t0 - KW + k, channel, n);
    }
    const F bias = p.bias == nullptr ? set1(0.0f) : load_some(p.bias + channel, n);
    for (int64_t t = t0; t < t1; ++t) {
        F total = bias;
        VIM_UNROLL
        for (int k = 0; k < KW; ++k) {
            window[k] = k + 1 < KW ? window[k + 1] : past.x.at(t, channel, n);
            total = fma(weight[k], window[k], total);
        }
        y.put(t, channel, p.silu ? silu(total) : total, n);
    }
}

template <int KW>
void forward_chunk(const ConvForward& p, const Past& past, const Rows& y, int64_t t0, int64_t t1) {
    for (int64_t channel = 0; channel < p.channels; channel += W) {
        const int n = static_cast<int>(least(W, p.channels - channel));
        if constexpr (KW > 0) {
            forward_channels<KW>(p, past, y, t0, t1, channel, n);
        } else {
            const F bias = p.bias == nullptr ? set1(0.0f) : load_some(p.bias + channel, n);
            for (int64_t t = t0; t < t1; ++t) {
                const F total =
                    convolve<0>(past, p.weight, p.width, p.channels, t, channel, n, bias);
                y.put(t, channel, p.silu ? silu(total) : total, n);
            }
        }
    }
}

void forward_tokens(const ConvForward& p, const Past& past, const Rows& y, int64_t t0, int64_t t1) {
    switch (p.width) {
        case 2:
            return forward_chunk<2>(p, past, y, t0, t1);
        case 3:
            return forward_chunk<3>(p, past, y, t0, t1);
        case 4:
            return forward_chunk<4>(p, past, y, t0, t1);
        default:
            return forward_chunk<0>(p, past, y, t0, t1);
    }
}

}  // namespace
}  // namespace VIM_ISA
}  // namespace vim
