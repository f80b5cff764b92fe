// What the kernels multiply, by element type: what is held of it, how it is loaded, and how two of them are multiplied
// and added up.
#pragma once
#include <type_traits>

#include "simd/simd.h"

namespace qkv {
namespace QKV_ISA {

template <class T>
struct Storage {  // the accumulation type of an element type
    using E = float;
};
template <>
struct Storage<double> {
    using E = double;
};

// Products in float or double. Elements of another type are widened: as they are loaded, or before. Stored: of keys and
// values, where they are another than queries.
template <class Element, class Stored = Element>
struct Plain {
    using T = Element;
    using S = Stored;
    using E = typename Storage<T>::E;
    using V = std::conditional_t<sizeof(E) == 8, VD, VF>;
    using Single = E;                  // what is broadcast
    using Lane = E;                    // what stands in vectors
    using R = V;                       // either, in a register
    static constexpr int kPair = 1;    // numbers of a Lane, and of what is broadcast at a time
    static constexpr int kDegree = 6;  // of the polynomial for weights
    static constexpr int kRun = 64;  // products of values summed before they are added up: rounding grows with the run
    static constexpr int kStep = V::W;                      // numbers that a register holds
    static constexpr bool kInPlace = std::is_same_v<T, E>;  // keys and values may be multiplied where they lie
    static constexpr bool kParts = false;                   // whether there is load_part
    template <class X>
    static QKV_INLINE R load(const X* p) {
        return V::load(p);
    }
    static QKV_INLINE R broadcast(const Single* p) { return V::set1(*p); }
    static QKV_INLINE R broadcast_lane(const Lane* p) { return V::set1(*p); }
    static QKV_INLINE V multiply(V acc, R a, R b) { return fma(a, b, acc); }
    // Broadcast, but 0 in the lanes whose bit of words[0] >> shift is not set.
    static QKV_INLINE R hide(const Lane* p, const uint64_t* words, int shift) {
        return choose(static_cast<uint32_t>(words[0] >> shift), V::set1(*p), V::zero());
    }
    // kStep numbers of a query, as they are multiplied.
    static QKV_INLINE void take(const T* from, bool negate, Single* to) {
        (V::load(from) * V::set1(negate ? E(-1) : E(1))).store(to);
    }
    static QKV_INLINE R none() { return V::zero(); }
    static QKV_INLINE void add(V* acc, R x, V weight) { *acc = fma(x, weight, *acc); }
};

// bfloat16 that is widened two registers at a time: the even numbers by a shift, the odd ones by a mask. F is VF, as a
// parameter since not every instruction set loads parts of registers.
template <class F>
struct Halves : Plain<bf16> {
    using V = F;
    struct R {
        V even, odd;
    };
    static constexpr int kStep = 2 * V::W;
    static constexpr bool kParts = kPartLoads;
    static QKV_INLINE R load(const bf16* p) {
        R x;
        V::split(p, x.even, x.odd);
        return x;
    }
    static QKV_INLINE R load_part(const bf16* p, int count) {
        R x;
        V::split_part(p, count, x.even, x.odd);
        return x;
    }
    static QKV_INLINE R load(const float* p) { return {V::load(p), V::load(p + V::W)}; }
    static QKV_INLINE V multiply(V acc, R a, R b) { return fma(a.odd, b.odd, fma(a.even, b.even, acc)); }
    static int64_t place(int64_t d) { return d / kStep * kStep + d % 2 * V::W + d % kStep / 2; }
    static QKV_INLINE void take(const bf16* from, bool negate, float* to) {
        const R x = load(from);
        const V sign = V::set1(negate ? -1.0f : 1.0f);
        (x.even * sign).store(to);
        (x.odd * sign).store(to + V::W);
    }
    static QKV_INLINE R none() { return {V::zero(), V::zero()}; }
    static QKV_INLINE void add(V* acc, R x, V weight) {
        acc[0] = fma(x.even, weight, acc[0]);
        acc[1] = fma(x.odd, weight, acc[1]);
    }
    // kStep sums, back in the order of columns.
    static QKV_INLINE void in_order(float* at) {
        float mended[kStep];
        for (int d = 0; d < kStep; ++d) mended[d] = at[place(d)];
        std::memcpy(at, mended, sizeof mended);
    }
};

// Products of bfloat16 pairs, added in float: P is Pairs, as a parameter since not every instruction set has them.
template <class P>
struct Paired {
    using T = bf16;
    using S = bf16;
    using E = float;
    using V = VF;
    using Single = bf16;
    using Lane = uint32_t;
    using R = typename P::R;
    static constexpr int kPair = 2;
    static constexpr int kDegree = 5;
    static constexpr int kRun = 1 << 20;  // float's rounding is far below bfloat16's
    static constexpr int kStep = 2 * V::W;
    static constexpr bool kInPlace = true;
    static constexpr bool kParts = kPartLoads;
    static QKV_INLINE R load(const void* p) { return P::load(p); }
    static QKV_INLINE R load_part(const T* p, int count) { return P::load_part(p, count); }
    static QKV_INLINE R broadcast(const Single* p) {
        uint32_t both;
        std::memcpy(&both, p, sizeof both);
        return P::broadcast(both);
    }
    static QKV_INLINE R broadcast_lane(const Lane* p) { return P::broadcast(*p); }
    static QKV_INLINE V multiply(V acc, R a, R b) { return P::dot(acc, a, b); }
    static QKV_INLINE R hide(const Lane* p, const uint64_t* words, int shift) {
        return P::hide(*p, static_cast<uint32_t>(words[0] >> shift), static_cast<uint32_t>(words[1] >> shift));
    }
    static QKV_INLINE void take(const T* from, bool negate, Single* to) {
        for (int d = 0; d < kStep; ++d) to[d].bits = static_cast<uint16_t>(from[d].bits ^ (negate ? 0x8000u : 0u));
    }
    // Pairs of n neighbours of x and y, which is n / kStep kSteps: to[i] holds x[i] below y[i]. Returns how many were
    // made.
    static QKV_INLINE int64_t zip(const T* x, const T* y, int64_t n, Lane* to) {
        int64_t d = 0;
        for (; d + kStep <= n; d += kStep) {
            const R a = P::load(x + d), b = P::load(y + d);
            R low = P::zip_low(a, b), high = P::zip_high(a, b);
            P::in_order(low, high);
            P::store(low, to + d);
            P::store(high, to + d + V::W);
        }
        return d;
    }
    // kStep sums of what zip_low and zip_high make, back in the order of columns.
    static QKV_INLINE void in_order(E* at) {
        R low = P::load(at), high = P::load(at + V::W);
        P::in_order(low, high);
        P::store(low, at);
        P::store(high, at + V::W);
    }
    using Pairs = P;
};

template <class T>
using Elements = std::conditional_t<kPairs && std::is_same_v<T, bf16>, Paired<Pairs>, Plain<T>>;

// The same for the kernel for few rows, which takes keys and values as they are stored.
template <class T, class S = T>
using FewElements = std::conditional_t<
    !std::is_same_v<T, S>, Plain<T, S>,
    std::conditional_t<std::is_same_v<T, bf16>, std::conditional_t<kPairs, Paired<Pairs>, Halves<VF>>, Plain<T>>>;

}  // namespace QKV_ISA
}  // namespace qkv
