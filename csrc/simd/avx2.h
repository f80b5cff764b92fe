// AVX2 with FMA and F16C.
#pragma once
#include <immintrin.h>

#include "simd.h"

namespace qkv {
namespace QKV_ISA {

inline constexpr int kRegisters = 16;
inline constexpr bool kPartLoads = false;

QKV_INLINE float widen(f16 x) { return _cvtsh_ss(x.bits); }
QKV_INLINE void narrow(float x, f16& to) {
    to.bits = static_cast<uint16_t>(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

struct VF {
    using E = float;
    static constexpr int W = 8;
    __m256 r;
    static QKV_INLINE VF zero() { return {_mm256_setzero_ps()}; }
    static QKV_INLINE VF set1(float x) { return {_mm256_set1_ps(x)}; }
    static QKV_INLINE VF load(const float* p) { return {_mm256_loadu_ps(p)}; }
    static QKV_INLINE VF load(const bf16* p) {
        const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
        return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16))};
    }
    // The even numbers of the 16 at p, and the odd ones.
    static QKV_INLINE void split(const bf16* p, VF& even, VF& odd) {
        const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
        even.r = _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));
        odd.r = _mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32(-65536)));
    }
    static QKV_INLINE VF load(const f16* p) {
        return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
    }
    static QKV_INLINE VF load(const int8_t* p) {
        return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))))};
    }
    // As widen(f8): by float16, whose exponents begin 8 lower. NaN, all ones but the sign, becomes all ones.
    static QKV_INLINE VF load(const f8* p) {
        const __m128i x = _mm_cvtepi8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
        const __m128i half = _mm_and_si128(_mm_slli_epi16(x, 7), _mm_set1_epi16(-0x4001));
        const __m128i nan = _mm_cmpeq_epi16(_mm_or_si128(x, _mm_set1_epi16(-0x80)), _mm_set1_epi16(-1));
        return {_mm256_mul_ps(_mm256_cvtph_ps(_mm_or_si128(half, nan)), _mm256_set1_ps(256.f))};
    }
    QKV_INLINE void store(float* p) const { _mm256_storeu_ps(p, r); }
    QKV_INLINE void store(f16* p) const {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                         _mm256_cvtps_ph(r, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    }
    QKV_INLINE void store(bf16* p) const {
        alignas(32) float x[8];
        _mm256_store_ps(x, r);
        for (int i = 0; i < 8; ++i) narrow(x[i], p[i]);
    }
    friend QKV_INLINE VF operator+(VF a, VF b) { return {_mm256_add_ps(a.r, b.r)}; }
    friend QKV_INLINE VF operator-(VF a, VF b) { return {_mm256_sub_ps(a.r, b.r)}; }
    friend QKV_INLINE VF operator*(VF a, VF b) { return {_mm256_mul_ps(a.r, b.r)}; }
    friend QKV_INLINE VF operator/(VF a, VF b) { return {_mm256_div_ps(a.r, b.r)}; }
};
QKV_INLINE VF fma(VF a, VF b, VF c) { return {_mm256_fmadd_ps(a.r, b.r, c.r)}; }
QKV_INLINE VF fused(VF a, VF b, VF c) { return fma(a, b, c); }
QKV_INLINE VF maximum(VF a, VF b) { return {_mm256_max_ps(a.r, b.r)}; }
QKV_INLINE VF minimum(VF a, VF b) { return {_mm256_min_ps(a.r, b.r)}; }
QKV_INLINE VF absolute(VF a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.f), a.r)}; }
QKV_INLINE VF copy_sign(VF a, VF sign) {
    const __m256 bit = _mm256_set1_ps(-0.f);
    return {_mm256_or_ps(_mm256_andnot_ps(bit, a.r), _mm256_and_ps(bit, sign.r))};
}
QKV_INLINE VF choose(uint32_t bits, VF yes, VF no) {
    const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i on = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), lane), lane);
    return {_mm256_blendv_ps(no.r, yes.r, _mm256_castsi256_ps(on))};
}
QKV_INLINE uint32_t above(VF a, VF b) {
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a.r, b.r, _CMP_GT_OQ)));
}
QKV_INLINE VF less_then(VF a, VF b, VF yes, VF no) {
    return {_mm256_blendv_ps(no.r, yes.r, _mm256_cmp_ps(a.r, b.r, _CMP_LT_OQ))};
}
// Also right for NaN (stays) and -inf (0). Results below 2^-126 are 0.
template <int Degree>
QKV_INLINE VF exp2_poly(VF x) {
    const __m256 t = _mm256_max_ps(_mm256_set1_ps(-127.f), x.r);
    const __m256 n = _mm256_round_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m256 f = _mm256_sub_ps(t, n);
    constexpr const float* c = Degree == 5 ? kExp2Degree5 : kExp2Degree6;
    __m256 p = _mm256_set1_ps(c[Degree]);
    QKV_UNROLL for (int i = Degree - 1; i >= 0; --i)
        p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(c[i]));
    const __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return {_mm256_mul_ps(p, _mm256_castsi256_ps(power))};
}
QKV_INLINE VF sums(VF* t) {
    QKV_FOR(i, 4) t[i].r = _mm256_hadd_ps(t[2 * i].r, t[2 * i + 1].r);
    QKV_FOR(i, 2) t[i].r = _mm256_hadd_ps(t[2 * i].r, t[2 * i + 1].r);
    return {_mm256_add_ps(_mm256_permute2f128_ps(t[0].r, t[1].r, 0x20), _mm256_permute2f128_ps(t[0].r, t[1].r, 0x31))};
}
QKV_INLINE float sum(VF a) {
    alignas(32) float x[8];
    _mm256_store_ps(x, a.r);
    return ((x[0] + x[4]) + (x[1] + x[5])) + ((x[2] + x[6]) + (x[3] + x[7]));
}
QKV_INLINE float largest(VF a) {
    alignas(32) float x[8];
    _mm256_store_ps(x, a.r);
    float m = x[0];
    for (int i = 1; i < 8; ++i) m = x[i] > m ? x[i] : m;
    return m;
}
QKV_INLINE void transpose_tile(const uint32_t* from, int64_t from_stride, uint32_t* to, int64_t to_stride) {
    __m256 r[8], t[8];
    QKV_FOR(i, 8) r[i] = _mm256_loadu_ps(reinterpret_cast<const float*>(from + i * from_stride));
    QKV_FOR(i, 4) {
        t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
    }
    QKV_FOR(i, 2) {
        r[4 * i + 0] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
        r[4 * i + 1] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
        r[4 * i + 2] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
        r[4 * i + 3] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
    }
    QKV_FOR(i, 4) {
        _mm256_storeu_ps(reinterpret_cast<float*>(to + i * to_stride), _mm256_permute2f128_ps(r[i], r[4 + i], 0x20));
        _mm256_storeu_ps(reinterpret_cast<float*>(to + (4 + i) * to_stride),
                         _mm256_permute2f128_ps(r[i], r[4 + i], 0x31));
    }
}
inline constexpr int kTransposeTile = 8;

struct VD {
    using E = double;
    static constexpr int W = 4;
    __m256d r;
    static QKV_INLINE VD zero() { return {_mm256_setzero_pd()}; }
    static QKV_INLINE VD set1(double x) { return {_mm256_set1_pd(x)}; }
    static QKV_INLINE VD load(const double* p) { return {_mm256_loadu_pd(p)}; }
    QKV_INLINE void store(double* p) const { _mm256_storeu_pd(p, r); }
    friend QKV_INLINE VD operator+(VD a, VD b) { return {_mm256_add_pd(a.r, b.r)}; }
    friend QKV_INLINE VD operator-(VD a, VD b) { return {_mm256_sub_pd(a.r, b.r)}; }
    friend QKV_INLINE VD operator*(VD a, VD b) { return {_mm256_mul_pd(a.r, b.r)}; }
    friend QKV_INLINE VD operator/(VD a, VD b) { return {_mm256_div_pd(a.r, b.r)}; }
};
QKV_INLINE VD fma(VD a, VD b, VD c) { return {_mm256_fmadd_pd(a.r, b.r, c.r)}; }
QKV_INLINE VD fused(VD a, VD b, VD c) { return fma(a, b, c); }
QKV_INLINE VD maximum(VD a, VD b) { return {_mm256_max_pd(a.r, b.r)}; }
QKV_INLINE VD minimum(VD a, VD b) { return {_mm256_min_pd(a.r, b.r)}; }
QKV_INLINE VD absolute(VD a) { return {_mm256_andnot_pd(_mm256_set1_pd(-0.), a.r)}; }
QKV_INLINE uint32_t above(VD a, VD b) {
    return static_cast<uint32_t>(_mm256_movemask_pd(_mm256_cmp_pd(a.r, b.r, _CMP_GT_OQ)));
}
QKV_INLINE VD choose(uint32_t bits, VD yes, VD no) {
    const __m256i lane = _mm256_setr_epi64x(1, 2, 4, 8);
    const __m256i on = _mm256_cmpeq_epi64(_mm256_and_si256(_mm256_set1_epi64x(static_cast<int64_t>(bits)), lane), lane);
    return {_mm256_blendv_pd(no.r, yes.r, _mm256_castsi256_pd(on))};
}
template <int>
QKV_INLINE VD exp2_poly(VD x) {
    const __m256d t = _mm256_max_pd(_mm256_set1_pd(-1023.), x.r);
    const __m256d n = _mm256_round_pd(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m256d f = _mm256_sub_pd(t, n);
    __m256d p = _mm256_set1_pd(kExp2Degree11[11]);
    QKV_UNROLL for (int i = 10; i >= 0; --i)
        p = _mm256_fmadd_pd(p, f, _mm256_set1_pd(kExp2Degree11[i]));
    // Adding 1.5 * 2^52 leaves the integer in the low bits of the sum.
    const __m256d shifted = _mm256_add_pd(n, _mm256_set1_pd(6755399441055744.0 + 1023.0));
    const __m256i power = _mm256_slli_epi64(_mm256_castpd_si256(shifted), 52);
    const __m256d nan = _mm256_cmp_pd(x.r, x.r, _CMP_UNORD_Q);
    return {_mm256_or_pd(_mm256_and_pd(nan, x.r), _mm256_andnot_pd(nan, _mm256_mul_pd(p, _mm256_castsi256_pd(power))))};
}
QKV_INLINE VD sums(VD* t) {
    const __m256d a = _mm256_hadd_pd(t[0].r, t[1].r), b = _mm256_hadd_pd(t[2].r, t[3].r);
    return {_mm256_add_pd(_mm256_permute2f128_pd(a, b, 0x20), _mm256_permute2f128_pd(a, b, 0x31))};
}
QKV_INLINE double sum(VD a) {
    alignas(32) double x[4];
    _mm256_store_pd(x, a.r);
    return (x[0] + x[2]) + (x[1] + x[3]);
}
QKV_INLINE double largest(VD a) {
    alignas(32) double x[4];
    _mm256_store_pd(x, a.r);
    double m = x[0];
    for (int i = 1; i < 4; ++i) m = x[i] > m ? x[i] : m;
    return m;
}

inline constexpr int kDrawLanes = 4;
QKV_INLINE __m256i multiply_words(__m256i a, uint64_t b) {  // 64-bit products by 32-bit ones
    const __m256i low = _mm256_set1_epi64x(static_cast<int64_t>(b)),
                  high = _mm256_set1_epi64x(static_cast<int64_t>(b >> 32));
    const __m256i cross = _mm256_add_epi64(_mm256_mul_epu32(_mm256_srli_epi64(a, 32), low), _mm256_mul_epu32(a, high));
    return _mm256_add_epi64(_mm256_mul_epu32(a, low), _mm256_slli_epi64(cross, 32));
}
QKV_INLINE uint32_t keep_bits(const uint64_t* draws, uint64_t key, uint64_t below) {
    __m256i x = _mm256_add_epi64(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(draws)),
                                 _mm256_set1_epi64x(static_cast<int64_t>(key)));
    x = multiply_words(_mm256_xor_si256(x, _mm256_srli_epi64(x, 30)), kMixFirst);
    x = multiply_words(_mm256_xor_si256(x, _mm256_srli_epi64(x, 27)), kMixSecond);
    x = _mm256_srli_epi64(_mm256_xor_si256(x, _mm256_srli_epi64(x, 31)), 11);  // 53 bits: signed comparison will do
    const __m256i drop = _mm256_cmpgt_epi64(_mm256_set1_epi64x(static_cast<int64_t>(below)), x);
    return static_cast<uint32_t>(_mm256_movemask_pd(_mm256_castsi256_pd(drop))) ^ 15u;
}

inline constexpr bool kPairs = false;

}  // namespace QKV_ISA
}  // namespace qkv
