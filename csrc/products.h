// Matrix products of the backward kernels: c[m][lanes] += sum_u a(m, u) b[u][lanes], with a broadcast and b in vectors.
//
// Every product of the backward pass has this form once its operands lie right, so there is one loop to make fast.
#pragma once
#include <type_traits>

#include "blocks.h"

namespace qkv {
namespace QKV_ISA {

// Products in float or double; narrow elements are widened when they are packed.
template <class Element>
struct WideProducts {
    using T = Element;
    using E = typename Storage<T>::E;
    using V = std::conditional_t<sizeof(E) == 8, VD, VF>;
    using A = E;  // element that is broadcast
    using B = E;  // lane of the other factor
    using R = V;
    static constexpr int kPair = 1;
    static constexpr int kDegree = 6;
    static constexpr int64_t kRun = 64;  // products summed before they are added up: rounding grows with the run
    static QKV_INLINE R broadcast(const A* p) { return V::set1(*p); }
    static QKV_INLINE R load(const B* p) { return V::load(p); }
    static QKV_INLINE V multiply(V acc, R a, R b) { return fma(a, b, acc); }
};

#if defined(QKV_ISA_AVX512BF16)
// Products of bfloat16 pairs, added in float: a and b hold two neighbours of the summed dimension in 32 bits.
struct BFloatProducts {
    using T = bf16;
    using E = float;
    using V = VF;
    using A = bf16;
    using B = uint32_t;
    struct R {
        __m512i r;
    };
    static constexpr int kPair = 2;
    static constexpr int kDegree = 5;
    static constexpr int64_t kRun = 1 << 20;  // float's rounding is far below bfloat16's
    static QKV_INLINE R broadcast(const A* p) {
        int both;
        std::memcpy(&both, p, sizeof both);
        return {_mm512_set1_epi32(both)};
    }
    static QKV_INLINE R load(const B* p) { return {_mm512_loadu_si512(p)}; }
    static QKV_INLINE V multiply(V acc, R a, R b) {
        return {_mm512_dpbf16_ps(acc.r, reinterpret_cast<__m512bh>(a.r), reinterpret_cast<__m512bh>(b.r))};
    }
};
#endif

template <class M>
struct Product {
    using E = typename M::E;
    using V = typename M::V;
    using A = typename M::A;
    using B = typename M::B;
    static constexpr int W = V::W;
    static constexpr bool kWide = W * sizeof(E) == 64;  // 32 registers
    static constexpr int kRows = 4;
    static constexpr int kVectors = kWide ? 4 : 2;

    template <int Z>
    static QKV_INLINE void tile(const A* a, int64_t am, int64_t au, const B* b, int64_t bu, int64_t count, E* c, int64_t cm, bool add) {
        V acc[kRows][Z];
        QKV_UNROLL for (int m = 0; m < kRows; ++m) QKV_UNROLL for (int z = 0; z < Z; ++z) acc[m][z] = V::zero();
        for (int64_t u = 0; u < count; ++u, a += au, b += bu) {
            typename M::R x[Z];
            QKV_UNROLL for (int z = 0; z < Z; ++z) x[z] = M::load(b + z * W);
            QKV_UNROLL for (int m = 0; m < kRows; ++m) {
                const typename M::R y = M::broadcast(a + m * am);
                QKV_UNROLL for (int z = 0; z < Z; ++z) acc[m][z] = M::multiply(acc[m][z], y, x[z]);
            }
        }
        QKV_UNROLL for (int m = 0; m < kRows; ++m) QKV_UNROLL for (int z = 0; z < Z; ++z) {
            E* at = c + m * cm + z * W;
            (add ? V::load(at) + acc[m][z] : acc[m][z]).store(at);
        }
    }

    // c (rows x vectors of lanes) = or += a b; rows is a multiple of 4, strides are in elements, `count` in steps of the sum.
    static void run(int64_t rows, int64_t vectors, int64_t count, const A* a, int64_t am, int64_t au, const B* b, int64_t bu, E* c, int64_t cm, bool add) {
        for (int64_t u = 0; u < count || (u == 0 && !add); u += M::kRun)
            part(rows, vectors, lower(M::kRun, count - u), a + u * au, am, au, b + u * bu, bu, c, cm, add || u > 0);
    }
    // c = a b for scores, in the order in which the forward kernel for many rows adds up.
    static void scores(int64_t rows, int64_t vectors, int64_t count, const A* a, int64_t am, int64_t au, const B* b, int64_t bu, E* c, int64_t cm) {
        for (int64_t u = 0, n; u < count; u += n) {
            n = QKV_MUTANT(back_score_order) ? lower(2, count - u) : score_run(count - u);
            part(rows, vectors, n, a + u * au, am, au, b + u * bu, bu, c, cm, u > 0);
        }
    }
    // sum_u a[u] b[u] lane by lane, in the order of `run`: what it gives where one row of a broadcasts these numbers.
    static V dot(int64_t count, const B* a, const B* b, int64_t step) {
        V total = V::zero();
        for (int64_t u = 0; u < count; u += M::kRun) {
            V acc = V::zero();
            for (int64_t x = u, end = u + lower(M::kRun, count - u); x < end; ++x) acc = M::multiply(acc, M::load(a + x * step), M::load(b + x * step));
            total = u > 0 ? total + acc : acc;
        }
        return total;
    }

  private:
    static void part(int64_t rows, int64_t vectors, int64_t count, const A* a, int64_t am, int64_t au, const B* b, int64_t bu, E* c, int64_t cm, bool add) {
        const auto columns = [&]<int Z>(std::integral_constant<int, Z>, int64_t z) {
            for (int64_t m = 0; m < rows; m += kRows) tile<Z>(a + m * am, am, au, b + z * W, bu, count, c + m * cm + z * W, cm, add);
        };
        int64_t z = 0;
        for (; z + kVectors <= vectors; z += kVectors) columns(std::integral_constant<int, kVectors>{}, z);
        for (; z < vectors; ++z) columns(std::integral_constant<int, 1>{}, z);
    }
};

}  // namespace QKV_ISA
}  // namespace qkv
