// AVX-512 (F, BW, VL, DQ), and BF16 where the compiler may use it.
#pragma once
#include <immintrin.h>

#include "simd.h"

namespace qkv {
namespace QKV_ISA {

inline constexpr int kRegisters = 32;

QKV_INLINE float widen(f16 x) { return _cvtsh_ss(x.bits); }
QKV_INLINE void narrow(float x, f16& to) {
    to.bits = static_cast<uint16_t>(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

// The first `count` numbers at p, fewer than 32, then zeros. What is past them is not read.
inline constexpr bool kPartLoads = true;
QKV_INLINE __m512i part_of(const bf16* p, int count) {
    return _mm512_maskz_loadu_epi16(static_cast<__mmask32>((1u << count) - 1), p);
}

struct VF {
    using E = float;
    static constexpr int W = 16;
    __m512 r;
    static QKV_INLINE VF zero() { return {_mm512_setzero_ps()}; }
    static QKV_INLINE VF set1(float x) { return {_mm512_set1_ps(x)}; }
    static QKV_INLINE VF load(const float* p) { return {_mm512_loadu_ps(p)}; }
    static QKV_INLINE VF load(const bf16* p) {
        const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
        return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
    }
    // The even numbers of the 32 at p, and the odd ones.
    static QKV_INLINE void split(const bf16* p, VF& even, VF& odd) { split(_mm512_loadu_si512(p), even, odd); }
    static QKV_INLINE void split_part(const bf16* p, int count, VF& even, VF& odd) {
        split(part_of(p, count), even, odd);
    }
    static QKV_INLINE void split(__m512i both, VF& even, VF& odd) {
        even.r = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
        odd.r = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(-65536)));
    }
    static QKV_INLINE VF load(const f16* p) {
        return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
    }
    static QKV_INLINE VF load(const int8_t* p) {
        return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
    }
    // As widen(f8): by float16, whose exponents begin 8 lower. NaN, all ones but the sign, becomes all ones.
    static QKV_INLINE VF load(const f8* p) {
        const __m256i x = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
        const __m256i half = _mm256_and_si256(_mm256_slli_epi16(x, 7), _mm256_set1_epi16(-0x4001));
        const __m256i nan = _mm256_cmpeq_epi16(_mm256_or_si256(x, _mm256_set1_epi16(-0x80)), _mm256_set1_epi16(-1));
        return {_mm512_mul_ps(_mm512_cvtph_ps(_mm256_or_si256(half, nan)), _mm512_set1_ps(256.f))};
    }
    QKV_INLINE void store(float* p) const { _mm512_storeu_ps(p, r); }
    QKV_INLINE void store(f16* p) const {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                            _mm512_cvtps_ph(r, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    }
    QKV_INLINE void store(bf16* p) const {
        const __m512i u = _mm512_castps_si512(r);
        const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
        __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
        const __mmask16 nan = _mm512_cmp_ps_mask(r, r, _CMP_UNORD_Q);
        rounded = _mm512_mask_or_epi32(rounded, nan, _mm512_srli_epi32(u, 16), _mm512_set1_epi32(0x40));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(rounded));
    }
    friend QKV_INLINE VF operator+(VF a, VF b) { return {_mm512_add_ps(a.r, b.r)}; }
    friend QKV_INLINE VF operator-(VF a, VF b) { return {_mm512_sub_ps(a.r, b.r)}; }
    friend QKV_INLINE VF operator*(VF a, VF b) { return {_mm512_mul_ps(a.r, b.r)}; }
    friend QKV_INLINE VF operator/(VF a, VF b) { return {_mm512_div_ps(a.r, b.r)}; }
};
QKV_INLINE VF fma(VF a, VF b, VF c) { return {_mm512_fmadd_ps(a.r, b.r, c.r)}; }
QKV_INLINE VF fused(VF a, VF b, VF c) { return fma(a, b, c); }
QKV_INLINE VF maximum(VF a, VF b) { return {_mm512_max_ps(a.r, b.r)}; }
QKV_INLINE VF minimum(VF a, VF b) { return {_mm512_min_ps(a.r, b.r)}; }
QKV_INLINE VF absolute(VF a) { return {_mm512_abs_ps(a.r)}; }
QKV_INLINE VF copy_sign(VF a, VF sign) {
    return {_mm512_castsi512_ps(_mm512_ternarylogic_epi32(_mm512_castps_si512(a.r), _mm512_castps_si512(sign.r),
                                                          _mm512_set1_epi32(INT32_MIN), 0xD8))};
}
QKV_INLINE VF choose(uint32_t bits, VF yes, VF no) {
    return {_mm512_mask_mov_ps(no.r, static_cast<__mmask16>(bits), yes.r)};
}
QKV_INLINE uint32_t above(VF a, VF b) { return _mm512_cmp_ps_mask(a.r, b.r, _CMP_GT_OQ); }
QKV_INLINE VF less_then(VF a, VF b, VF yes, VF no) {
    return {_mm512_mask_mov_ps(no.r, _mm512_cmp_ps_mask(a.r, b.r, _CMP_LT_OQ), yes.r)};
}
// Also right for NaN (stays) and -inf (0). Results below 2^-126 are 0, and are not computed: on Intel's cores a result
// that underflows costs some 130 cycles, whatever the other lanes hold.
template <int Degree>
QKV_INLINE VF exp2_poly(VF x) {
    const __mmask16 counts = _mm512_cmp_ps_mask(x.r, _mm512_set1_ps(-126.f), _CMP_NLT_UQ);
    const __m512 n = _mm512_roundscale_ps(x.r, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 f = _mm512_sub_ps(x.r, n);
    constexpr const float* c = Degree == 5 ? kExp2Degree5 : kExp2Degree6;
    __m512 p = _mm512_set1_ps(c[Degree]);
    QKV_UNROLL for (int i = Degree - 1; i >= 0; --i)
        p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(c[i]));
    return {_mm512_maskz_scalef_ps(counts, p, n)};
}
// Sums each of 16 vectors; lane i of the result is the sum of t[i].
QKV_INLINE VF sums(VF* t) {
    QKV_FOR(i, 8) {
        const __m512 a = t[2 * i].r, b = t[2 * i + 1].r;
        t[i].r = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    }
    QKV_FOR(i, 4) {
        const __m512d a = _mm512_castps_pd(t[2 * i].r), b = _mm512_castps_pd(t[2 * i + 1].r);
        t[i].r = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    }
    QKV_FOR(i, 2) {
        const __m512 a = t[2 * i].r, b = t[2 * i + 1].r;
        t[i].r = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
    }
    return {_mm512_add_ps(_mm512_shuffle_f32x4(t[0].r, t[1].r, 0x88), _mm512_shuffle_f32x4(t[0].r, t[1].r, 0xdd))};
}
QKV_INLINE float sum(VF a) { return _mm512_reduce_add_ps(a.r); }
QKV_INLINE float largest(VF a) { return _mm512_reduce_max_ps(a.r); }

// Transposes 16 x 16 words in registers.
QKV_INLINE void transpose(__m512i* r) {
    __m512i t[16];
    QKV_FOR(i, 8) {
        t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    QKV_FOR(i, 4) {
        r[4 * i + 0] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
        r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
    }
    QKV_FOR(i, 4) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88);
        t[4 + i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
        t[8 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
        t[12 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
    }
    QKV_FOR(i, 4) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
        r[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
        r[4 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0x88);
        r[12 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0xdd);
    }
}
// to[j * to_stride + i] = from[i * from_stride + j] for 16 x 16 words.
QKV_INLINE void transpose_tile(const uint32_t* from, int64_t from_stride, uint32_t* to, int64_t to_stride) {
    __m512i r[16];
    QKV_FOR(i, 16) r[i] = _mm512_loadu_si512(from + i * from_stride);
    transpose(r);
    QKV_FOR(i, 16) _mm512_storeu_si512(to + i * to_stride, r[i]);
}
inline constexpr int kTransposeTile = 16;

struct VD {
    using E = double;
    static constexpr int W = 8;
    __m512d r;
    static QKV_INLINE VD zero() { return {_mm512_setzero_pd()}; }
    static QKV_INLINE VD set1(double x) { return {_mm512_set1_pd(x)}; }
    static QKV_INLINE VD load(const double* p) { return {_mm512_loadu_pd(p)}; }
    QKV_INLINE void store(double* p) const { _mm512_storeu_pd(p, r); }
    friend QKV_INLINE VD operator+(VD a, VD b) { return {_mm512_add_pd(a.r, b.r)}; }
    friend QKV_INLINE VD operator-(VD a, VD b) { return {_mm512_sub_pd(a.r, b.r)}; }
    friend QKV_INLINE VD operator*(VD a, VD b) { return {_mm512_mul_pd(a.r, b.r)}; }
    friend QKV_INLINE VD operator/(VD a, VD b) { return {_mm512_div_pd(a.r, b.r)}; }
};
QKV_INLINE VD fma(VD a, VD b, VD c) { return {_mm512_fmadd_pd(a.r, b.r, c.r)}; }
QKV_INLINE VD fused(VD a, VD b, VD c) { return fma(a, b, c); }
QKV_INLINE VD maximum(VD a, VD b) { return {_mm512_max_pd(a.r, b.r)}; }
QKV_INLINE VD minimum(VD a, VD b) { return {_mm512_min_pd(a.r, b.r)}; }
QKV_INLINE VD absolute(VD a) { return {_mm512_abs_pd(a.r)}; }
QKV_INLINE uint32_t above(VD a, VD b) { return _mm512_cmp_pd_mask(a.r, b.r, _CMP_GT_OQ); }
QKV_INLINE VD choose(uint32_t bits, VD yes, VD no) {
    return {_mm512_mask_mov_pd(no.r, static_cast<__mmask8>(bits), yes.r)};
}
template <int>
QKV_INLINE VD exp2_poly(VD x) {
    const __mmask8 counts = _mm512_cmp_pd_mask(x.r, _mm512_set1_pd(-1022.), _CMP_NLT_UQ);
    const __m512d n = _mm512_roundscale_pd(x.r, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512d f = _mm512_sub_pd(x.r, n);
    __m512d p = _mm512_set1_pd(kExp2Degree11[11]);
    QKV_UNROLL for (int i = 10; i >= 0; --i)
        p = _mm512_fmadd_pd(p, f, _mm512_set1_pd(kExp2Degree11[i]));
    return {_mm512_maskz_scalef_pd(counts, p, n)};
}
QKV_INLINE VD sums(VD* t) {
    QKV_FOR(i, 4) {
        const __m512d a = t[2 * i].r, b = t[2 * i + 1].r;
        t[i].r = _mm512_add_pd(_mm512_unpacklo_pd(a, b), _mm512_unpackhi_pd(a, b));
    }
    QKV_FOR(i, 2) {
        const __m512d a = t[2 * i].r, b = t[2 * i + 1].r;
        t[i].r = _mm512_add_pd(_mm512_shuffle_f64x2(a, b, 0x88), _mm512_shuffle_f64x2(a, b, 0xdd));
    }
    return {_mm512_add_pd(_mm512_shuffle_f64x2(t[0].r, t[1].r, 0x88), _mm512_shuffle_f64x2(t[0].r, t[1].r, 0xdd))};
}
QKV_INLINE double sum(VD a) { return _mm512_reduce_add_pd(a.r); }
QKV_INLINE double largest(VD a) { return _mm512_reduce_max_pd(a.r); }

inline constexpr int kDrawLanes = 8;
QKV_INLINE uint32_t keep_bits(const uint64_t* draws, uint64_t key, uint64_t below) {
    __m512i x = _mm512_add_epi64(_mm512_loadu_si512(draws), _mm512_set1_epi64(static_cast<int64_t>(key)));
    x = _mm512_mullo_epi64(_mm512_xor_si512(x, _mm512_srli_epi64(x, 30)),
                           _mm512_set1_epi64(static_cast<int64_t>(kMixFirst)));
    x = _mm512_mullo_epi64(_mm512_xor_si512(x, _mm512_srli_epi64(x, 27)),
                           _mm512_set1_epi64(static_cast<int64_t>(kMixSecond)));
    x = _mm512_srli_epi64(_mm512_xor_si512(x, _mm512_srli_epi64(x, 31)), 11);
    return _mm512_cmpge_epu64_mask(x, _mm512_set1_epi64(static_cast<int64_t>(below)));
}

#if defined(__AVX512BF16__)
inline constexpr bool kPairs = true;
// Products of bfloat16 in pairs, added in float (VDPBF16PS). A register holds 16 pairs. Narrowing here takes denormal
// numbers as zeros, which VF::store does not.
struct Pairs {
    struct R {
        __m512i r;
    };
    struct Half {  // 16 numbers
        __m256i r;
    };
    static QKV_INLINE R load(const void* p) { return {_mm512_loadu_si512(p)}; }
    static QKV_INLINE R load_part(const bf16* p, int count) { return {part_of(p, count)}; }
    static QKV_INLINE Half load_half(const bf16* p) {
        return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))};
    }
    static QKV_INLINE R zero() { return {_mm512_setzero_si512()}; }
    static QKV_INLINE R broadcast(uint32_t pair) { return {_mm512_set1_epi32(static_cast<int>(pair))}; }
    static QKV_INLINE void store(R a, void* p) { _mm512_storeu_si512(p, a.r); }
    static QKV_INLINE void store(Half a, bf16* p) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a.r); }
    // acc + a.low b.low + a.high b.high in each lane.
    static QKV_INLINE VF dot(VF acc, R a, R b) {
        return {_mm512_dpbf16_ps(acc.r, reinterpret_cast<__m512bh>(a.r), reinterpret_cast<__m512bh>(b.r))};
    }
    // The pair in every lane, its halves as 0 in lanes whose bit is not set.
    static QKV_INLINE R hide(uint32_t pair, uint32_t low_bits, uint32_t high_bits) {
        const __m512i low = _mm512_maskz_set1_epi32(static_cast<__mmask16>(low_bits), static_cast<int>(pair & 0xffffu));
        const __m512i high =
            _mm512_maskz_set1_epi32(static_cast<__mmask16>(high_bits), static_cast<int>(pair & 0xffff0000u));
        return {_mm512_or_si512(low, high)};
    }
    static QKV_INLINE Half narrow(VF a) { return {reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(a.r))}; }
    // 32 numbers in order.
    static QKV_INLINE R narrow(VF low, VF high) {
        return {reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high.r, low.r))};
    }
    // Lane l: the number of even[l] below the number of odd[l].
    static QKV_INLINE R pack(VF even, VF odd) {
        const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22,
                                               6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
        return {_mm512_permutexvar_epi16(order, narrow(even, odd).r)};
    }
    static QKV_INLINE R zip(Half low, Half high) {
        return {_mm512_or_si512(_mm512_cvtepu16_epi32(low.r), _mm512_slli_epi32(_mm512_cvtepu16_epi32(high.r), 16))};
    }
    // Pairs of the 32 numbers of a and those of b, in an order that is the set's own; in_order mends it, of pairs and
    // of floats.
    static QKV_INLINE R zip_low(R a, R b) { return {_mm512_unpacklo_epi16(a.r, b.r)}; }
    static QKV_INLINE R zip_high(R a, R b) { return {_mm512_unpackhi_epi16(a.r, b.r)}; }
    static QKV_INLINE void in_order(R& low, R& high) {
        const __m512i first = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11),
                      second = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
        const __m512i mended = _mm512_permutex2var_epi64(low.r, first, high.r);
        high.r = _mm512_permutex2var_epi64(low.r, second, high.r);
        low.r = mended;
    }
};
#else
inline constexpr bool kPairs = false;
#endif

}  // namespace QKV_ISA
}  // namespace qkv
