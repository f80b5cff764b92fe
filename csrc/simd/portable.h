// Numbers C++: fixed-length loops that a compiler turns into whatever vectors its target has.
#pragma once
#include "simd.h"

namespace qkv {
namespace QKV_ISA {

inline constexpr int kRegisters = 16;
inline constexpr bool kPartLoads = false;

QKV_INLINE float widen(f16 x) {
    const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
    const uint32_t rest = x.bits & 0x7fffu;
    if (rest >= 0x7c00u) return cast_bits<float>(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
    // Scaling by 2^112 moves the exponent into place for normal and subnormal numbers alike.
    const float magnitude = cast_bits<float>(rest << 13) * cast_bits<float>(0x77800000u);
    return cast_bits<float>(sign | cast_bits<uint32_t>(magnitude));
}
QKV_INLINE void narrow(float x, f16& to) {
    const uint32_t u = cast_bits<uint32_t>(x);
    const uint32_t sign = u >> 16 & 0x8000u;
    const uint32_t rest = u & 0x7fffffffu;
    uint32_t half;
    if (rest > 0x7f800000u) {
        half = 0x7e00u;
    } else if (rest >= 0x477ff000u) {  // rounds to infinity from 65520 on
        half = 0x7c00u;
    } else if (rest < 0x38800000u) {  // subnormal: let the addition of 0.5 round
        half = cast_bits<uint32_t>(cast_bits<float>(rest) + 0.5f) - 0x3f000000u;
    } else {
        half = (rest - 0x38000000u + 0xfffu + (rest >> 13 & 1u)) >> 13;
    }
    to.bits = static_cast<uint16_t>(sign | half);
}

template <class T, int N>
struct Numbers {
    using E = T;
    static constexpr int W = N;
    T r[N];
    static QKV_INLINE Numbers zero() { return set1(T(0)); }
    static QKV_INLINE Numbers set1(T x) {
        Numbers v;
        for (int i = 0; i < N; ++i) v.r[i] = x;
        return v;
    }
    template <class S>
    static QKV_INLINE Numbers load(const S* p) {
        Numbers v;
        for (int i = 0; i < N; ++i) v.r[i] = widen(p[i]);
        return v;
    }
    // The even numbers of the 2 N at p, and the odd ones.
    static QKV_INLINE void split(const bf16* p, Numbers& even, Numbers& odd) {
        for (int i = 0; i < N; ++i) even.r[i] = widen(p[2 * i]), odd.r[i] = widen(p[2 * i + 1]);
    }
    template <class S>
    QKV_INLINE void store(S* p) const {
        for (int i = 0; i < N; ++i) narrow(r[i], p[i]);
    }
    template <class F>
    static QKV_INLINE Numbers each(Numbers a, Numbers b, F f) {
        Numbers v;
        for (int i = 0; i < N; ++i) v.r[i] = f(a.r[i], b.r[i]);
        return v;
    }
    friend QKV_INLINE Numbers operator+(Numbers a, Numbers b) {
        return each(a, b, [](T x, T y) { return x + y; });
    }
    friend QKV_INLINE Numbers operator-(Numbers a, Numbers b) {
        return each(a, b, [](T x, T y) { return x - y; });
    }
    friend QKV_INLINE Numbers operator*(Numbers a, Numbers b) {
        return each(a, b, [](T x, T y) { return x * y; });
    }
    friend QKV_INLINE Numbers operator/(Numbers a, Numbers b) {
        return each(a, b, [](T x, T y) { return x / y; });
    }
    friend QKV_INLINE Numbers fma(Numbers a, Numbers b, Numbers c) {
        Numbers v;
        for (int i = 0; i < N; ++i) v.r[i] = a.r[i] * b.r[i] + c.r[i];
        return v;
    }
    // Rounded once, which fma here is not. A function call a lane: for what is done once a score.
    friend QKV_INLINE Numbers fused(Numbers a, Numbers b, Numbers c) {
        Numbers v;
        for (int i = 0; i < N; ++i) v.r[i] = std::fma(a.r[i], b.r[i], c.r[i]);
        return v;
    }
    friend QKV_INLINE Numbers maximum(Numbers a, Numbers b) {
        return each(a, b, [](T x, T y) { return x > y ? x : y; });
    }
    friend QKV_INLINE Numbers minimum(Numbers a, Numbers b) {
        return each(a, b, [](T x, T y) { return x < y ? x : y; });
    }
    friend QKV_INLINE Numbers absolute(Numbers a) {
        for (int i = 0; i < N; ++i) a.r[i] = std::fabs(a.r[i]);
        return a;
    }
    friend QKV_INLINE Numbers copy_sign(Numbers a, Numbers sign) {
        return each(a, sign, [](T x, T y) { return std::copysign(x, y); });
    }
    friend QKV_INLINE Numbers choose(uint32_t bits, Numbers yes, Numbers no) {
        for (int i = 0; i < N; ++i) no.r[i] = (bits >> i & 1u) ? yes.r[i] : no.r[i];
        return no;
    }
    friend QKV_INLINE uint32_t above(Numbers a, Numbers b) {
        uint32_t bits = 0;
        for (int i = 0; i < N; ++i) bits |= static_cast<uint32_t>(a.r[i] > b.r[i]) << i;
        return bits;
    }
    friend QKV_INLINE Numbers less_then(Numbers a, Numbers b, Numbers yes, Numbers no) {
        for (int i = 0; i < N; ++i) no.r[i] = a.r[i] < b.r[i] ? yes.r[i] : no.r[i];
        return no;
    }
    friend QKV_INLINE Numbers sums(Numbers* t) {
        Numbers v;
        for (int i = 0; i < N; ++i) v.r[i] = sum(t[i]);
        return v;
    }
    friend QKV_INLINE T sum(Numbers a) {
        T s = a.r[0];
        for (int i = 1; i < N; ++i) s += a.r[i];
        return s;
    }
    friend QKV_INLINE T largest(Numbers a) {
        T m = a.r[0];
        for (int i = 1; i < N; ++i) m = a.r[i] > m ? a.r[i] : m;
        return m;
    }
};

using VF = Numbers<float, 4>;
using VD = Numbers<double, 2>;

// Also right for NaN (stays) and -inf (0). Results below 2^-126 (2^-1022) are 0.
template <int Degree>
QKV_INLINE VF exp2_poly(VF x) {
    VF y;
    constexpr const float* c = Degree == 5 ? kExp2Degree5 : kExp2Degree6;
    for (int i = 0; i < VF::W; ++i) {
        const float t = x.r[i] < -127.f ? -127.f : x.r[i];
        // Adding and taking away 1.5 * 2^23 rounds to the nearest integer.
        const float shifted = t + 12582912.f;
        const float n = shifted - 12582912.f;
        const float f = t - n;
        float p = c[Degree];
        for (int d = Degree - 1; d >= 0; --d) p = p * f + c[d];
        const uint32_t power = (cast_bits<uint32_t>(shifted) + 127u) << 23;
        y.r[i] = x.r[i] == x.r[i] ? p * cast_bits<float>(power) : x.r[i];
    }
    return y;
}
template <int>
QKV_INLINE VD exp2_poly(VD x) {
    VD y;
    for (int i = 0; i < VD::W; ++i) {
        const double t = x.r[i] < -1023. ? -1023. : x.r[i];
        const double shifted = t + 6755399441055744.0;
        const double n = shifted - 6755399441055744.0;
        const double f = t - n;
        double p = kExp2Degree11[11];
        for (int d = 10; d >= 0; --d) p = p * f + kExp2Degree11[d];
        const uint64_t power = (cast_bits<uint64_t>(shifted) + 1023u) << 52;
        y.r[i] = x.r[i] == x.r[i] ? p * cast_bits<double>(power) : x.r[i];
    }
    return y;
}
QKV_INLINE void transpose_tile(const uint32_t* from, int64_t from_stride, uint32_t* to, int64_t to_stride) {
    for (int i = 0; i < 4; ++i)
        for (int j = 0; j < 4; ++j) to[j * to_stride + i] = from[i * from_stride + j];
}
inline constexpr int kTransposeTile = 4;

inline constexpr int kDrawLanes = 2;
QKV_INLINE uint32_t keep_bits(const uint64_t* draws, uint64_t key, uint64_t below) {
    return static_cast<uint32_t>(draw_mix(draws[0] + key) >> 11 >= below) |
           static_cast<uint32_t>(draw_mix(draws[1] + key) >> 11 >= below) << 1;
}

inline constexpr bool kPairs = false;

}  // namespace QKV_ISA
}  // namespace qkv
