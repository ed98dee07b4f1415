// Vectors of W floats and the functions on them, for one instruction set.
//
// The kernels are compiled once an instruction set, in a namespace of its own, so everything here
// has internal linkage and nothing comes from the C++ library: a shared inline function could be
// kept in the copy that needs AVX-512.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "vim_cpu.h"

#if defined(VIM_AVX512) || defined(VIM_AVX2)
#include <immintrin.h>
#endif

#ifdef _MSC_VER
#define VIM_INLINE static __forceinline
#define VIM_UNROLL
#elif defined(__clang__)
#define VIM_INLINE static inline __attribute__((always_inline, unused))
#define VIM_UNROLL _Pragma("unroll")
#else
#define VIM_INLINE static inline __attribute__((always_inline, unused))
#define VIM_UNROLL _Pragma("GCC unroll 16")
#endif

namespace vim {
namespace VIM_ISA {

#if defined(VIM_AVX512)

constexpr int W = 16;
using F = __m512;

VIM_INLINE F set1(float x) { return _mm512_set1_ps(x); }
VIM_INLINE F load(const float* p) { return _mm512_loadu_ps(p); }
VIM_INLINE void store(float* p, F x) { _mm512_storeu_ps(p, x); }
VIM_INLINE F add(F a, F b) { return _mm512_add_ps(a, b); }
VIM_INLINE F sub(F a, F b) { return _mm512_sub_ps(a, b); }
VIM_INLINE F mul(F a, F b) { return _mm512_mul_ps(a, b); }
VIM_INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
VIM_INLINE F fms(F a, F b, F c) { return _mm512_fmsub_ps(a, b, c); }
VIM_INLINE F fnma(F a, F b, F c) { return _mm512_fnmadd_ps(a, b, c); }
VIM_INLINE F max(F a, F b) { return _mm512_max_ps(a, b); }
VIM_INLINE F min(F a, F b) { return _mm512_min_ps(a, b); }
VIM_INLINE F abs(F a) { return _mm512_abs_ps(a); }
VIM_INLINE bool all_at_most(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_LE_OQ) == 0xffff; }
// yes where x is below zero, else no
VIM_INLINE F where_negative(F x, F yes, F no) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ), no, yes);
}
VIM_INLINE F recip(F a) {
    const F guess = _mm512_rcp14_ps(a);
    return fma(guess, fnma(a, guess, set1(1.0f)), guess);
}
VIM_INLINE __mmask16 first(int n) { return static_cast<__mmask16>((1u << n) - 1); }
VIM_INLINE F load_some(const float* p, int n) { return _mm512_maskz_loadu_ps(first(n), p); }
VIM_INLINE void store_some(float* p, F x, int n) { _mm512_mask_storeu_ps(p, first(n), x); }
// p[0], p[stride], ... p[(n - 1) stride]
VIM_INLINE F gather(const float* p, int64_t stride, int n) {
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i at = _mm512_mullo_epi32(lane, _mm512_set1_epi32(static_cast<int>(stride)));
    return _mm512_mask_i32gather_ps(_mm512_setzero_ps(), first(n), at, p, 4);
}
VIM_INLINE F load_bf16(const uint16_t* p, int n) {
    const __m256i bits = _mm256_maskz_loadu_epi16(first(n), p);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
VIM_INLINE void store_bf16(uint16_t* p, F x, int n) {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __m512i high =
        _mm512_mask_blend_epi32(_mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), _mm512_srli_epi32(up, 16),
                                _mm512_set1_epi32(0x7fc0));
    _mm256_mask_storeu_epi16(p, first(n), _mm512_cvtepi32_epi16(high));
}

#elif defined(VIM_AVX2)

constexpr int W = 8;
using F = __m256;

VIM_INLINE F set1(float x) { return _mm256_set1_ps(x); }
VIM_INLINE F load(const float* p) { return _mm256_loadu_ps(p); }
VIM_INLINE void store(float* p, F x) { _mm256_storeu_ps(p, x); }
VIM_INLINE F add(F a, F b) { return _mm256_add_ps(a, b); }
VIM_INLINE F sub(F a, F b) { return _mm256_sub_ps(a, b); }
VIM_INLINE F mul(F a, F b) { return _mm256_mul_ps(a, b); }
VIM_INLINE F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
VIM_INLINE F fms(F a, F b, F c) { return _mm256_fmsub_ps(a, b, c); }
VIM_INLINE F fnma(F a, F b, F c) { return _mm256_fnmadd_ps(a, b, c); }
VIM_INLINE F max(F a, F b) { return _mm256_max_ps(a, b); }
VIM_INLINE F min(F a, F b) { return _mm256_min_ps(a, b); }
VIM_INLINE F abs(F a) { return _mm256_andnot_ps(set1(-0.0f), a); }
VIM_INLINE bool all_at_most(F a, F b) {
    return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_LE_OQ)) == 0xff;
}
VIM_INLINE F where_negative(F x, F yes, F no) {
    return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(x, _mm256_setzero_ps(), _CMP_LT_OQ));
}
VIM_INLINE F recip(F a) { return _mm256_div_ps(set1(1.0f), a); }
// p * 2^k, where the low bits of t are the integer k
VIM_INLINE F scale(F p, F t) {
    return _mm256_castsi256_ps(
        _mm256_add_epi32(_mm256_castps_si256(p), _mm256_slli_epi32(_mm256_castps_si256(t), 23)));
}
VIM_INLINE F load_bf16(const uint16_t* p) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
VIM_INLINE void store_bf16(uint16_t* p, F x) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    const __m256i high =
        _mm256_blendv_epi8(_mm256_srli_epi32(up, 16), _mm256_set1_epi32(0x7fc0), nan);
    _mm_storeu_si128(
        reinterpret_cast<__m128i*>(p),
        _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1)));
}

#else  // Any processor: the compiler's own vectors where it has them, else one float.

#ifdef __GNUC__
constexpr int W = 4;
typedef float F __attribute__((vector_size(16)));
typedef int32_t I __attribute__((vector_size(16)));
typedef uint32_t U __attribute__((vector_size(16)));
VIM_INLINE F set1(float x) { return F{x, x, x, x}; }
VIM_INLINE F select(I mask, F yes, F no) { return (F)((mask & (I)yes) | (~mask & (I)no)); }
VIM_INLINE bool all(I mask) { return mask[0] & mask[1] & mask[2] & mask[3]; }
VIM_INLINE F as_float(I a) { return (F)a; }
VIM_INLINE I as_int(F a) { return (I)a; }
#else
constexpr int W = 1;
typedef float F;
typedef int32_t I;
typedef uint32_t U;
VIM_INLINE F set1(float x) { return x; }
VIM_INLINE F select(bool mask, F yes, F no) { return mask ? yes : no; }
VIM_INLINE bool all(bool mask) { return mask; }
VIM_INLINE F as_float(I a) {
    F x;
    memcpy(&x, &a, 4);
    return x;
}
VIM_INLINE I as_int(F a) {
    I x;
    memcpy(&x, &a, 4);
    return x;
}
#endif

VIM_INLINE F load(const float* p) {
    F x;
    memcpy(&x, p, sizeof x);
    return x;
}
VIM_INLINE void store(float* p, F x) { memcpy(p, &x, sizeof x); }
VIM_INLINE F add(F a, F b) { return a + b; }
VIM_INLINE F sub(F a, F b) { return a - b; }
VIM_INLINE F mul(F a, F b) { return a * b; }
VIM_INLINE F fma(F a, F b, F c) { return a * b + c; }
VIM_INLINE F fms(F a, F b, F c) { return a * b - c; }
VIM_INLINE F fnma(F a, F b, F c) { return c - a * b; }
VIM_INLINE F max(F a, F b) { return select(a > b, a, b); }
VIM_INLINE F min(F a, F b) { return select(a < b, a, b); }
VIM_INLINE F abs(F a) { return as_float(as_int(a) & 0x7fffffff); }
VIM_INLINE bool all_at_most(F a, F b) { return all(a <= b); }
VIM_INLINE F where_negative(F x, F yes, F no) { return select(x < set1(0.0f), yes, no); }
VIM_INLINE F recip(F a) { return 1.0f / a; }
VIM_INLINE F scale(F p, F t) { return as_float((I)((U)as_int(p) + ((U)as_int(t) << 23))); }
VIM_INLINE F load_bf16(const uint16_t* p) {
    float x[W];
    for (int i = 0; i < W; ++i) {
        const uint32_t bits = static_cast<uint32_t>(p[i]) << 16;
        memcpy(x + i, &bits, 4);
    }
    return load(x);
}
VIM_INLINE void store_bf16(uint16_t* p, F x) {
    uint32_t bits[W];
    memcpy(bits, &x, sizeof x);
    for (int i = 0; i < W; ++i) {
        const bool nan = (bits[i] & 0x7fffffff) > 0x7f800000;
        p[i] = nan ? 0x7fc0 : static_cast<uint16_t>((bits[i] + 0x7fff + (bits[i] >> 16 & 1)) >> 16);
    }
}

#endif

// In max(limit, x) and min(limit, x) a NaN in x goes through, which the order above ensures.

#ifndef VIM_AVX512
// The first n elements; the others are zero.
VIM_INLINE F load_some(const float* p, int n) {
    if (n == W) return load(p);
    float x[W] = {};
    for (int i = 0; i < n; ++i) x[i] = p[i];
    return load(x);
}
VIM_INLINE void store_some(float* p, F value, int n) {
    if (n == W) return store(p, value);
    float x[W];
    store(x, value);
    for (int i = 0; i < n; ++i) p[i] = x[i];
}
VIM_INLINE F gather(const float* p, int64_t stride, int n) {
    float x[W] = {};
    for (int i = 0; i < n; ++i) x[i] = p[i * stride];
    return load(x);
}
VIM_INLINE F load_bf16(const uint16_t* p, int n) {
    if (n == W) return load_bf16(p);
    uint16_t x[W] = {};
    for (int i = 0; i < n; ++i) x[i] = p[i];
    return load_bf16(x);
}
VIM_INLINE void store_bf16(uint16_t* p, F value, int n) {
    if (n == W) return store_bf16(p, value);
    uint16_t x[W];
    store_bf16(x, value);
    for (int i = 0; i < n; ++i) p[i] = x[i];
}
#endif

constexpr float LOG2_E = 1.44269504088896341f;
constexpr float LN_2 = 0.693147180559945309f;

// exp2_product(a, b) is 2^(a b), within 2 or 3 ulp, where |a b| <= EXP2_LIMIT. A decay close to 1
// is applied many times: there the error is that of rounding, without a bias.
#ifdef VIM_AVX512

constexpr bool EXP2_LIMITED = false;

// 2^(floor(x) + r - 1/2) with x = a b + 1/2. The polynomial is exact at r = 1/2.
VIM_INLINE F exp2_product(F a, F b) {
    const F x = fma(a, b, set1(0.5f));
    const F r = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    F p = set1(1.34053442e-3f);
    p = fma(p, r, set1(6.31921273e-3f));
    p = fma(p, r, set1(3.95133980e-2f));
    p = fma(p, r, set1(1.69798061e-1f));
    p = fma(p, r, set1(4.90135521e-1f));
    p = fma(p, r, set1(7.07106709e-1f));
    return _mm512_scalef_ps(p, x);
}

VIM_INLINE F exp2(F x) { return exp2_product(x, set1(1.0f)); }

// exp(-x)
VIM_INLINE F exp_minus(F x) { return exp2_product(x, set1(-LOG2_E)); }

#else

constexpr bool EXP2_LIMITED = true;

constexpr float ROUND = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer

// 2^(k + r) for |r| <= 1/2, where the low bits of t are the integer k
VIM_INLINE F exp2_parts(F t, F r) {
    F p = set1(1.3400436e-3f);
    p = fma(p, r, set1(9.666373e-3f));
    p = fma(p, r, set1(5.550333e-2f));
    p = fma(p, r, set1(2.4022348e-1f));
    p = fma(p, r, set1(6.9314718e-1f));
    p = fma(p, r, set1(1.0f));
    return scale(p, t);
}

VIM_INLINE F exp2_product(F a, F b) {
    const F t = fma(a, b, set1(ROUND));
    return exp2_parts(t, fms(a, b, sub(t, set1(ROUND))));
}

// 2^x: zero below the normal numbers, infinity above them
VIM_INLINE F exp2(F x) {
    x = min(set1(128.0f), max(set1(-127.0f), x));
    const F t = add(x, set1(ROUND));
    return exp2_parts(t, sub(x, sub(t, set1(ROUND))));
}

// exp(-x)
VIM_INLINE F exp_minus(F x) { return exp2(mul(x, set1(-LOG2_E))); }

#endif

constexpr float EXP2_LIMIT = 125.0f;

// log(1 + exp(x)) = max(x, 0) + log(1 + e), where e = exp(-|x|); above 20 this is x, as in PyTorch
VIM_INLINE F softplus_of(F x, F e) {
    F p = set1(5.3840582e-3f);
    p = fma(p, e, set1(-3.0110953e-2f));
    p = fma(p, e, set1(7.9210728e-2f));
    p = fma(p, e, set1(-1.3746622e-1f));
    p = fma(p, e, set1(1.9145118e-1f));
    p = fma(p, e, set1(-2.4852946e-1f));
    p = fma(p, e, set1(3.3320343e-1f));
    p = fma(p, e, set1(-4.9999553e-1f));
    p = fma(p, e, set1(1.0f));
    return fma(p, e, max(set1(0.0f), x));
}

VIM_INLINE F softplus(F x) { return softplus_of(x, exp_minus(abs(x))); }

// The derivative of softplus is the sigmoid.
VIM_INLINE F softplus(F x, F& slope) {
    const F e = exp_minus(abs(x));
    slope = mul(where_negative(x, e, set1(1.0f)), recip(add(set1(1.0f), e)));
    return softplus_of(x, e);
}

// Below -87 the sigmoid is smaller than any normal number, and x may be too large to multiply it.
VIM_INLINE F silu_argument(F x) { return max(set1(-87.0f), x); }

VIM_INLINE F sigmoid(F x) {
    return recip(add(set1(1.0f), exp_minus(silu_argument(x))));
}

VIM_INLINE F silu(F x) { return mul(silu_argument(x), sigmoid(x)); }

// The derivative of silu at x, where gate = sigmoid(x)
VIM_INLINE F silu_slope(F x, F gate) {
    return mul(gate, fma(silu_argument(x), sub(set1(1.0f), gate), set1(1.0f)));
}

VIM_INLINE float sum(F x) {
    float parts[W];
    store(parts, x);
    for (int half = W / 2; half > 0; half /= 2) {
        for (int i = 0; i < half; ++i) parts[i] += parts[i + half];
    }
    return parts[0];
}

// out[i] = the sum of row i of the (count, W) array x
VIM_INLINE void sum_rows(const float* x, float* out, int64_t count) {
    int64_t i = 0;
#ifdef VIM_AVX512
    // The lane in which each row's sum ends
    const __m512i order = _mm512_setr_epi32(0, 2, 1, 3, 8, 10, 9, 11, 4, 6, 5, 7, 12, 14, 13, 15);
    for (; i + 16 <= count; i += 16) {
        F r[16];
        VIM_UNROLL
        for (int j = 0; j < 16; ++j) r[j] = load(x + (i + j) * W);
        // Each step adds two halves of two rows and leaves the results side by side.
        VIM_UNROLL
        for (int j = 0; j < 8; ++j) {
            const F a = r[j], b = r[j + 8];
            r[j] = add(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
        }
        VIM_UNROLL
        for (int j = 0; j < 4; ++j) {
            const F a = r[j], b = r[j + 4];
            r[j] = add(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
        }
        VIM_UNROLL
        for (int j = 0; j < 2; ++j) {
            const F a = r[j], b = r[j + 2];
            r[j] = add(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));
        }
        const F total =
            add(_mm512_shuffle_ps(r[0], r[1], 0x88), _mm512_shuffle_ps(r[0], r[1], 0xdd));
        store(out + i, _mm512_permutexvar_ps(order, total));
    }
#endif
    for (; i < count; ++i) out[i] = sum(load(x + i * W));
}

// The tokens of one batch item of a sequence, in scan order, from a channel on.
struct Rows {
    char* data;
    int64_t token, size;  // bytes between tokens, bytes of an element

    F at(int64_t t, int64_t channel, int n) const {
        const char* p = data + t * token + channel * size;
        return size == 4 ? load_some(reinterpret_cast<const float*>(p), n)
                         : load_bf16(reinterpret_cast<const uint16_t*>(p), n);
    }

    void put(int64_t t, int64_t channel, F value, int n) const {
        char* p = data + t * token + channel * size;
        size == 4 ? store_some(reinterpret_cast<float*>(p), value, n)
                  : store_bf16(reinterpret_cast<uint16_t*>(p), value, n);
    }

    // The tokens from t on.
    Rows from(int64_t t) const { return {data + t * token, token, size}; }

    explicit operator bool() const { return data != nullptr; }
};

// Of float32 tokens: element i of token t is data[t * token + i].
struct Matrix {
    const float* data;
    int64_t token;
};

// With `reverse`, token 0 is the last of the `length` in memory.
VIM_INLINE Rows rows(const Sequence& s, int64_t batch, int64_t offset, int64_t length,
                     bool reverse) {
    if (s.data == nullptr) return {nullptr, 0, 4};
    const int64_t size = s.bf16 ? 2 : 4;
    const int64_t first = batch * s.batch + offset + (reverse ? (length - 1) * s.token : 0);
    return {static_cast<char*>(s.data) + first * size, (reverse ? -s.token : s.token) * size, size};
}

VIM_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
VIM_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

}  // namespace VIM_ISA
}  // namespace vim
