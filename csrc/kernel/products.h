// Matrix products of the backward kernels: c[m][lanes] += sum_u a(m, u) b[u][lanes], with a broadcast and b in vectors.
//
// Every product of the backward pass has this form once its operands lie right, so there is one loop to make fast.
#pragma once
#include "kernel/score.h"

namespace qkv {
namespace QKV_ISA {

template <class M>
struct Product {
    using E = typename M::E;
    using V = typename M::V;
    using Single = typename M::Single;
    using Lane = typename M::Lane;
    static constexpr int W = V::W;
    static constexpr bool kWide = W * sizeof(E) == 64;  // 32 registers
    static constexpr int kRows = 4;
    static constexpr int kVectors = kWide ? 4 : 2;

    // Strides are in elements.
    struct Factors {
        int64_t rows;     // of c and a, a multiple of 4
        int64_t vectors;  // of a row of c and b
        int64_t count;    // steps of the sum
        const Single* a;
        int64_t a_row, a_step;
        const Lane* b;
        int64_t b_step;
        E* c;
        int64_t c_row;
        // Steps [u, u + n).
        Factors steps(int64_t u, int64_t n) const {
            Factors part = *this;
            part.count = n;
            part.a += u * a_step;
            part.b += u * b_step;
            return part;
        }
    };

    // c = or += a b.
    static void run(const Factors& f, bool add) {
        for (int64_t u = 0; u < f.count || (u == 0 && !add); u += M::kRun)
            part(f.steps(u, lower(M::kRun, f.count - u)), add || u > 0);
    }
    // c = a b for scores, in the order in which the forward kernel for many rows adds up.
    static void scores(const Factors& f) {
        for (int64_t u = 0, n; u < f.count; u += n) {
            n = score_run(f.count - u);
            part(f.steps(u, n), u > 0);
        }
    }
    // sum_u a[u] b[u] lane by lane, in the order of `run`: what it gives where one row of a broadcasts these numbers.
    static V dot(int64_t count, const Lane* a, const Lane* b, int64_t step) {
        V total = V::zero();
        for (int64_t u = 0; u < count; u += M::kRun) {
            V acc = V::zero();
            for (int64_t x = u, end = u + lower(M::kRun, count - u); x < end; ++x)
                acc = M::multiply(acc, M::load(a + x * step), M::load(b + x * step));
            total = u > 0 ? total + acc : acc;
        }
        return total;
    }

  private:
    // Rows [m, m + 4), Z vectors from z on. Apart: among its callers' numbers the loop's strides would not stay in
    // registers.
    template <int Z>
    static QKV_APART void tile(const Factors& f, int64_t m, int64_t z, bool add) {
        const Single* a = f.a + m * f.a_row;
        const Lane* b = f.b + z * W;
        const int64_t a_row = f.a_row, a_step = f.a_step, b_step = f.b_step, count = f.count;
        V acc[kRows][Z];
        QKV_FOR(i, kRows)
            QKV_FOR(k, Z) acc[i][k] = V::zero();
        for (int64_t u = 0; u < count; ++u, a += a_step, b += b_step) {
            typename M::R x[Z];
            QKV_FOR(k, Z) x[k] = M::load(b + k * W);
            QKV_FOR(i, kRows) {
                const typename M::R y = M::broadcast(a + i * a_row);
                QKV_FOR(k, Z) acc[i][k] = M::multiply(acc[i][k], y, x[k]);
            }
        }
        QKV_FOR(i, kRows)
            QKV_FOR(k, Z) {
                E* at = f.c + (m + i) * f.c_row + (z + k) * W;
                (add ? V::load(at) + acc[i][k] : acc[i][k]).store(at);
            }
    }

    static void part(const Factors& f, bool add) {
        const auto columns = [&]<int Z>(std::integral_constant<int, Z>, int64_t z) {
            for (int64_t m = 0; m < f.rows; m += kRows) tile<Z>(f, m, z, add);
        };
        int64_t z = 0;
        for (; z + kVectors <= f.vectors; z += kVectors) columns(std::integral_constant<int, kVectors>{}, z);
        for (; z < f.vectors; ++z) columns(std::integral_constant<int, 1>{}, z);
    }
};

}  // namespace QKV_ISA
}  // namespace qkv
