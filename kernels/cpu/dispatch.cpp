// The entry points of the library, and the choice of the instruction set that serves them.
#include <atomic>

#include "export.h"
#include "vim_cpu.h"

#if defined(_MSC_VER) && defined(_M_X64)
#include <immintrin.h>
#include <intrin.h>
#endif

namespace vim {
namespace {

enum Isa { PLAIN, AVX2, AVX512 };

Isa best_isa() {
#if !defined(VIM_BUILD_X86)
    return PLAIN;
#elif defined(_MSC_VER)
    int leaf1[4], leaf7[4];
    __cpuidex(leaf1, 1, 0);
    __cpuidex(leaf7, 7, 0);
    const int osxsave = 1 << 27, fma = 1 << 12;
    if (!(leaf1[2] & osxsave) || !(leaf1[2] & fma) || !(leaf7[1] & (1 << 5))) return PLAIN;
    const unsigned long long enabled = _xgetbv(0);
    if ((enabled & 0x6) != 0x6) return PLAIN;
    const int avx512 = 1 << 16 | 1 << 17 | 1 << 30 | 1u << 31;  // F, DQ, BW, VL
    return (leaf7[1] & avx512) == avx512 && (enabled & 0xe6) == 0xe6 ? AVX512 : AVX2;
#else
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return PLAIN;
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
    return avx512 ? AVX512 : AVX2;
#endif
}

std::atomic<int>& isa() {
    static std::atomic<int> chosen{best_isa()};
    return chosen;
}

}  // namespace
}  // namespace vim

// Returns the instruction set in use: 0 plain, 1 AVX2 and FMA, 2 AVX-512.
VIM_EXPORT int vim_cpu_isa() { return vim::isa(); }

// Chooses an instruction set, and returns 1, or 0 where this processor lacks it.
VIM_EXPORT int vim_cpu_set_isa(int wanted) {
    if (wanted < vim::PLAIN || wanted > vim::best_isa()) return 0;
    vim::isa() = wanted;
    return 1;
}

// Each entry returns 0 where its caller's idea of Params has another size, which means that Python
// and library are not of one version.
#ifdef VIM_BUILD_X86
#define VIM_ENTRY(name, Params)                                             \
    namespace vim {                                                         \
    namespace plain { void name(const Params&); }                           \
    namespace avx2 { void name(const Params&); }                            \
    namespace avx512 { void name(const Params&); }                          \
    }                                                                       \
    VIM_EXPORT int vim_cpu_##name(const void* data, int64_t size) {         \
        if (size != sizeof(vim::Params)) return 0;                          \
        const vim::Params& params = *static_cast<const vim::Params*>(data); \
        switch (vim::isa()) {                                               \
            case vim::AVX512:                                               \
                vim::avx512::name(params);                                  \
                break;                                                      \
            case vim::AVX2:                                                 \
                vim::avx2::name(params);                                    \
                break;                                                      \
            default:                                                        \
                vim::plain::name(params);                                   \
        }                                                                   \
        return 1;                                                           \
    }
#else
#define VIM_ENTRY(name, Params)                                     \
    namespace vim {                                                 \
    namespace plain { void name(const Params&); }                   \
    }                                                               \
    VIM_EXPORT int vim_cpu_##name(const void* data, int64_t size) { \
        if (size != sizeof(vim::Params)) return 0;                  \
        vim::plain::name(*static_cast<const vim::Params*>(data));   \
        return 1;                                                   \
    }
#endif

VIM_ENTRY(selective_scan_fwd, ScanForward)
VIM_ENTRY(selective_scan_bwd, ScanBackward)
VIM_ENTRY(causal_conv1d_fwd, ConvForward)
VIM_ENTRY(causal_conv1d_bwd, ConvBackward)
VIM_ENTRY(add_norm_fwd, NormForward)
VIM_ENTRY(add_norm_bwd, NormBackward)
VIM_ENTRY(bidirectional_mixer_fwd, MixerForward)
