// NEON of AArch64, and BF16 where the compiler may use it.
#pragma once
#include <arm_neon.h>

#include "simd.h"

namespace qkv {
namespace QKV_ISA {

inline constexpr int kRegisters = 32;
inline constexpr bool kPartLoads = false;

QKV_INLINE float widen(f16 x) { return vgetq_lane_f32(vcvt_f32_f16(vreinterpret_f16_u16(vdup_n_u16(x.bits))), 0); }
QKV_INLINE void narrow(float x, f16& to) {
    to.bits = vget_lane_u16(vreinterpret_u16_f16(vcvt_f16_f32(vdupq_n_f32(x))), 0);
}

// Four bytes, which is all that is read, in the low half.
QKV_INLINE uint8x8_t four_bytes(const void* p) {
    uint32_t word;
    std::memcpy(&word, p, sizeof word);
    return vreinterpret_u8_u32(vdup_n_u32(word));
}
// All bits of the lanes whose bit is set.
QKV_INLINE uint32x4_t lanes_of(uint32_t bits) {
    const uint32x4_t lane = {1, 2, 4, 8};
    return vtstq_u32(vdupq_n_u32(bits), lane);
}

struct VF {
    using E = float;
    static constexpr int W = 4;
    float32x4_t r;
    static QKV_INLINE VF zero() { return {vdupq_n_f32(0)}; }
    static QKV_INLINE VF set1(float x) { return {vdupq_n_f32(x)}; }
    static QKV_INLINE VF load(const float* p) { return {vld1q_f32(p)}; }
    static QKV_INLINE VF load(const bf16* p) {
        return {vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p)), 16))};
    }
    // The even numbers of the 8 at p, and the odd ones.
    static QKV_INLINE void split(const bf16* p, VF& even, VF& odd) {
        const uint32x4_t both = vreinterpretq_u32_u16(vld1q_u16(reinterpret_cast<const uint16_t*>(p)));
        even.r = vreinterpretq_f32_u32(vshlq_n_u32(both, 16));
        odd.r = vreinterpretq_f32_u32(vandq_u32(both, vdupq_n_u32(0xffff0000u)));
    }
    static QKV_INLINE VF load(const f16* p) {
        return {vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p))))};
    }
    static QKV_INLINE VF load(const int8_t* p) {
        const int16x8_t x = vmovl_s8(vreinterpret_s8_u8(four_bytes(p)));
        return {vcvtq_f32_s32(vmovl_s16(vget_low_s16(x)))};
    }
    static QKV_INLINE VF load(const f8* p) {  // as widen(f8)
        const uint32x4_t x = vmovl_u16(vget_low_u16(vmovl_u8(four_bytes(p))));
        const uint32x4_t rest = vandq_u32(x, vdupq_n_u32(0x7f)), up = vshlq_n_u32(rest, 20);
        const float32x4_t small =
            vsubq_f32(vreinterpretq_f32_u32(vorrq_u32(up, vdupq_n_u32(0x3c800000))), vdupq_n_f32(0.015625f));
        uint32x4_t bits = vaddq_u32(up, vdupq_n_u32(0x3c000000));
        bits = vbslq_u32(vcltq_u32(rest, vdupq_n_u32(8)), vreinterpretq_u32_f32(small), bits);
        bits = vbslq_u32(vceqq_u32(rest, vdupq_n_u32(0x7f)), vdupq_n_u32(0x7fc00000), bits);
        return {vreinterpretq_f32_u32(vorrq_u32(bits, vshlq_n_u32(vandq_u32(x, vdupq_n_u32(0x80)), 24)))};
    }
    QKV_INLINE void store(float* p) const { vst1q_f32(p, r); }
    QKV_INLINE void store(f16* p) const {
        vst1_u16(reinterpret_cast<uint16_t*>(p), vreinterpret_u16_f16(vcvt_f16_f32(r)));
    }
    QKV_INLINE void store(bf16* p) const {  // as narrow, with BF16 too: denormal numbers stay
        const uint32x4_t u = vreinterpretq_u32_f32(r), high = vshrq_n_u32(u, 16);
        const uint32x4_t odd = vandq_u32(high, vdupq_n_u32(1));
        const uint32x4_t rounded = vshrq_n_u32(vaddq_u32(u, vaddq_u32(odd, vdupq_n_u32(0x7fff))), 16);
        const uint32x4_t ordered = vceqq_f32(r, r), nan = vorrq_u32(high, vdupq_n_u32(0x40));
        vst1_u16(reinterpret_cast<uint16_t*>(p), vmovn_u32(vbslq_u32(ordered, rounded, nan)));
    }
    friend QKV_INLINE VF operator+(VF a, VF b) { return {vaddq_f32(a.r, b.r)}; }
    friend QKV_INLINE VF operator-(VF a, VF b) { return {vsubq_f32(a.r, b.r)}; }
    friend QKV_INLINE VF operator*(VF a, VF b) { return {vmulq_f32(a.r, b.r)}; }
    friend QKV_INLINE VF operator/(VF a, VF b) { return {vdivq_f32(a.r, b.r)}; }
};
QKV_INLINE VF fma(VF a, VF b, VF c) { return {vfmaq_f32(c.r, a.r, b.r)}; }
QKV_INLINE VF fused(VF a, VF b, VF c) { return fma(a, b, c); }
// FMAX and FMIN give NaN where either is, FMAXNM and FMINNM where both are: neither is the rule of simd.h.
QKV_INLINE VF maximum(VF a, VF b) { return {vbslq_f32(vcgtq_f32(a.r, b.r), a.r, b.r)}; }
QKV_INLINE VF minimum(VF a, VF b) { return {vbslq_f32(vcltq_f32(a.r, b.r), a.r, b.r)}; }
QKV_INLINE VF absolute(VF a) { return {vabsq_f32(a.r)}; }
QKV_INLINE VF copy_sign(VF a, VF sign) { return {vbslq_f32(vdupq_n_u32(0x80000000u), sign.r, a.r)}; }
QKV_INLINE VF choose(uint32_t bits, VF yes, VF no) { return {vbslq_f32(lanes_of(bits), yes.r, no.r)}; }
QKV_INLINE uint32_t above(VF a, VF b) {
    const uint32x4_t lane = {1, 2, 4, 8};
    return vaddvq_u32(vandq_u32(vcgtq_f32(a.r, b.r), lane));
}
QKV_INLINE VF less_then(VF a, VF b, VF yes, VF no) { return {vbslq_f32(vcltq_f32(a.r, b.r), yes.r, no.r)}; }
// Also right for NaN (stays: as an integer it is 0) and -inf (0). Results below 2^-126 are 0.
template <int Degree>
QKV_INLINE VF exp2_poly(VF x) {
    const VF t = maximum(VF::set1(-127.f), x);
    const float32x4_t n = vrndnq_f32(t.r), f = vsubq_f32(t.r, n);
    constexpr const float* c = Degree == 5 ? kExp2Degree5 : kExp2Degree6;
    float32x4_t p = vdupq_n_f32(c[Degree]);
    QKV_UNROLL for (int i = Degree - 1; i >= 0; --i)
        p = vfmaq_f32(vdupq_n_f32(c[i]), p, f);
    const int32x4_t power = vshlq_n_s32(vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127)), 23);
    return {vmulq_f32(p, vreinterpretq_f32_s32(power))};
}
// Sums each of 4 vectors; lane i of the result is the sum of t[i].
QKV_INLINE VF sums(VF* t) { return {vpaddq_f32(vpaddq_f32(t[0].r, t[1].r), vpaddq_f32(t[2].r, t[3].r))}; }
QKV_INLINE float sum(VF a) { return vaddvq_f32(a.r); }
QKV_INLINE float largest(VF a) {
    float x[4];
    vst1q_f32(x, a.r);
    float m = x[0];
    for (int i = 1; i < 4; ++i) m = x[i] > m ? x[i] : m;
    return m;
}
QKV_INLINE void transpose_tile(const uint32_t* from, int64_t from_stride, uint32_t* to, int64_t to_stride) {
    uint32x4_t r[4];
    QKV_FOR(i, 4) r[i] = vld1q_u32(from + i * from_stride);
    uint64x2_t even[2], odd[2];  // columns 0 and 2, 1 and 3 of two rows
    QKV_FOR(i, 2) {
        even[i] = vreinterpretq_u64_u32(vtrn1q_u32(r[2 * i], r[2 * i + 1]));
        odd[i] = vreinterpretq_u64_u32(vtrn2q_u32(r[2 * i], r[2 * i + 1]));
    }
    vst1q_u32(to, vreinterpretq_u32_u64(vtrn1q_u64(even[0], even[1])));
    vst1q_u32(to + to_stride, vreinterpretq_u32_u64(vtrn1q_u64(odd[0], odd[1])));
    vst1q_u32(to + 2 * to_stride, vreinterpretq_u32_u64(vtrn2q_u64(even[0], even[1])));
    vst1q_u32(to + 3 * to_stride, vreinterpretq_u32_u64(vtrn2q_u64(odd[0], odd[1])));
}
inline constexpr int kTransposeTile = 4;

struct VD {
    using E = double;
    static constexpr int W = 2;
    float64x2_t r;
    static QKV_INLINE VD zero() { return {vdupq_n_f64(0)}; }
    static QKV_INLINE VD set1(double x) { return {vdupq_n_f64(x)}; }
    static QKV_INLINE VD load(const double* p) { return {vld1q_f64(p)}; }
    QKV_INLINE void store(double* p) const { vst1q_f64(p, r); }
    friend QKV_INLINE VD operator+(VD a, VD b) { return {vaddq_f64(a.r, b.r)}; }
    friend QKV_INLINE VD operator-(VD a, VD b) { return {vsubq_f64(a.r, b.r)}; }
    friend QKV_INLINE VD operator*(VD a, VD b) { return {vmulq_f64(a.r, b.r)}; }
    friend QKV_INLINE VD operator/(VD a, VD b) { return {vdivq_f64(a.r, b.r)}; }
};
QKV_INLINE VD fma(VD a, VD b, VD c) { return {vfmaq_f64(c.r, a.r, b.r)}; }
QKV_INLINE VD fused(VD a, VD b, VD c) { return fma(a, b, c); }
QKV_INLINE VD maximum(VD a, VD b) { return {vbslq_f64(vcgtq_f64(a.r, b.r), a.r, b.r)}; }
QKV_INLINE VD minimum(VD a, VD b) { return {vbslq_f64(vcltq_f64(a.r, b.r), a.r, b.r)}; }
QKV_INLINE VD absolute(VD a) { return {vabsq_f64(a.r)}; }
QKV_INLINE uint32_t above(VD a, VD b) {
    const uint64x2_t lane = {1, 2};
    return static_cast<uint32_t>(vaddvq_u64(vandq_u64(vcgtq_f64(a.r, b.r), lane)));
}
QKV_INLINE VD choose(uint32_t bits, VD yes, VD no) {
    const uint64x2_t lane = {1, 2};
    return {vbslq_f64(vtstq_u64(vdupq_n_u64(bits), lane), yes.r, no.r)};
}
template <int>
QKV_INLINE VD exp2_poly(VD x) {
    const VD t = maximum(VD::set1(-1023.), x);
    const float64x2_t n = vrndnq_f64(t.r), f = vsubq_f64(t.r, n);
    float64x2_t p = vdupq_n_f64(kExp2Degree11[11]);
    QKV_UNROLL for (int i = 10; i >= 0; --i)
        p = vfmaq_f64(vdupq_n_f64(kExp2Degree11[i]), p, f);
    const int64x2_t power = vshlq_n_s64(vaddq_s64(vcvtq_s64_f64(n), vdupq_n_s64(1023)), 52);
    return {vmulq_f64(p, vreinterpretq_f64_s64(power))};
}
QKV_INLINE VD sums(VD* t) { return {vpaddq_f64(t[0].r, t[1].r)}; }
QKV_INLINE double sum(VD a) { return vaddvq_f64(a.r); }
QKV_INLINE double largest(VD a) {
    const double x = vgetq_lane_f64(a.r, 0), y = vgetq_lane_f64(a.r, 1);
    return y > x ? y : x;
}

// NEON multiplies no 64-bit numbers: two in general registers.
inline constexpr int kDrawLanes = 2;
QKV_INLINE uint32_t keep_bits(const uint64_t* draws, uint64_t key, uint64_t below) {
    return static_cast<uint32_t>(draw_mix(draws[0] + key) >> 11 >= below) |
           static_cast<uint32_t>(draw_mix(draws[1] + key) >> 11 >= below) << 1;
}

#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
inline constexpr bool kPairs = true;
// Products of bfloat16 in pairs, added in float (BFDOT). A register holds 4 pairs.
//
// BFDOT rounds unlike VDPBF16PS, which rounds each of its two fused products to nearest even. Products of bfloat16 are
// exact in float; the two are added, and then added to the sum, each time rounded to odd (an inexact result gets a last
// bit of 1): an error of less than one unit of the last place instead of half a unit, and like that one as often up as
// down, so sums of pairs lose at most twice as much. The bounds of the tests hold: they allow four of float's units of
// the sum of absolute products, and bfloat16's own rounding of results is far above both. Denormal numbers count as
// zeros on either side, an overflow is an infinity, every NaN is the default one. FPCR is ignored, but that a process
// may ask for fused products by its bit EBF, where the processor has FEAT_EBF16: these lose less.
//
// BFMMLA makes twice as many products, but its sums are blocks of 2 x 2: of queries in pairs of rows, four numbers
// deep, and of two keys side by side. Keys would have to be packed, which nothing here is, and sums unzipped into
// vectors of one key before each softmax.
struct Pairs {
    struct R {
        uint16x8_t r;
    };
    struct Half {  // 4 numbers
        uint16x4_t r;
    };
    static QKV_INLINE R load(const void* p) { return {vld1q_u16(static_cast<const uint16_t*>(p))}; }
    static QKV_INLINE Half load_half(const bf16* p) { return {vld1_u16(reinterpret_cast<const uint16_t*>(p))}; }
    static QKV_INLINE R zero() { return {vdupq_n_u16(0)}; }
    static QKV_INLINE R broadcast(uint32_t pair) { return {vreinterpretq_u16_u32(vdupq_n_u32(pair))}; }
    static QKV_INLINE void store(R a, void* p) { vst1q_u16(static_cast<uint16_t*>(p), a.r); }
    static QKV_INLINE void store(Half a, bf16* p) { vst1_u16(reinterpret_cast<uint16_t*>(p), a.r); }
    // acc + (a.low b.low + a.high b.high) in each lane.
    static QKV_INLINE VF dot(VF acc, R a, R b) {
        return {vbfdotq_f32(acc.r, vreinterpretq_bf16_u16(a.r), vreinterpretq_bf16_u16(b.r))};
    }
    // The pair in every lane, its halves as 0 in lanes whose bit is not set.
    static QKV_INLINE R hide(uint32_t pair, uint32_t low_bits, uint32_t high_bits) {
        const uint32x4_t seen =
            vbslq_u32(vdupq_n_u32(0xffffu), lanes_of(low_bits), lanes_of(high_bits));  // of each half its own
        return {vreinterpretq_u16_u32(vandq_u32(vdupq_n_u32(pair), seen))};
    }
    static QKV_INLINE Half narrow(VF a) { return {vreinterpret_u16_bf16(vcvt_bf16_f32(a.r))}; }
    // 8 numbers in order.
    static QKV_INLINE R narrow(VF low, VF high) {
        return {vreinterpretq_u16_bf16(vcvtq_high_bf16_f32(vcvtq_low_bf16_f32(low.r), high.r))};
    }
    // Lane l: the number of even[l] below the number of odd[l].
    static QKV_INLINE R pack(VF even, VF odd) { return zip(narrow(even), narrow(odd)); }
    static QKV_INLINE R zip(Half low, Half high) {
        const uint16x8_t x = vcombine_u16(low.r, low.r), y = vcombine_u16(high.r, high.r);
        return {vzip1q_u16(x, y)};
    }
    // Pairs of the 8 numbers of a and those of b, in order as they are.
    static QKV_INLINE R zip_low(R a, R b) { return {vzip1q_u16(a.r, b.r)}; }
    static QKV_INLINE R zip_high(R a, R b) { return {vzip2q_u16(a.r, b.r)}; }
    static QKV_INLINE void in_order(R&, R&) {}
};
#else
inline constexpr bool kPairs = false;
#endif

}  // namespace QKV_ISA
}  // namespace qkv
