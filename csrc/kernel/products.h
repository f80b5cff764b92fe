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
    // Sums side by side: 8 would just keep two units of 4 cycles busy, 12 and their operands still fit 16 registers.
    static constexpr int kVectors = kRegisters == 32 ? 4 : 2;
    static constexpr int kRows = kRegisters == 32 ? 4 : 6;

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
    // `Rows` rows of Z vectors, and on to the next rows.
    template <int Rows, int Z>
    static QKV_INLINE void block(Factors& p, bool add) {
        V acc[Rows][Z];
        QKV_FOR(i, Rows)
            QKV_FOR(k, Z) acc[i][k] = V::zero();
        const Single* a = p.a;
        const Lane* b = p.b;
        for (int64_t u = 0; u < p.count; ++u, a += p.a_step, b += p.b_step) {
            typename M::R x[Z];
            QKV_FOR(k, Z) x[k] = M::load(b + k * W);
            QKV_FOR(i, Rows) {
                const typename M::R y = M::broadcast(a + i * p.a_row);
                QKV_FOR(k, Z) acc[i][k] = M::multiply(acc[i][k], y, x[k]);
            }
        }
        QKV_FOR(i, Rows) {
            QKV_FOR(k, Z) (add ? V::load(p.c + k * W) + acc[i][k] : acc[i][k]).store(p.c + k * W);
            p.c += p.c_row;
        }
        p.a += Rows * p.a_row;
    }

    // Rows side by side for Z vectors: fewer vectors, more rows, or the sums would wait for one another.
    static constexpr int rows_of(int Z) {
        return Z == kVectors ? kRows : kRegisters == 32 ? (Z == 1 ? 16 : Z == 2 ? 8 : 4) : 8;
    }

    // All rows, Z vectors from z on. Apart: among its callers' numbers the inner loop's strides would not stay in
    // registers. One call for all rows: one for each kRows of them costs a twentieth of the time.
    template <int Z>
    static QKV_APART void columns(const Factors& f, int64_t z, bool add) {
        Factors p = f;
        p.b += z * W, p.c += z * W;
        int64_t left = f.rows;
        constexpr int kMost = rows_of(Z);
        if constexpr (kMost != 4)
            for (; left >= kMost && (kMost % 4 == 0 || left != 8); left -= kMost) block<kMost, Z>(p, add);
        for (; left > 0; left -= 4) block<4, Z>(p, add);
    }

    static void part(const Factors& f, bool add) {
        int64_t z = 0;
        for (; z + kVectors <= f.vectors; z += kVectors) columns<kVectors>(f, z, add);
        if constexpr (kVectors == 4) {
            if (f.vectors - z == 3) return columns<3>(f, z, add);
            if (f.vectors - z == 2) return columns<2>(f, z, add);
        }
        for (; z < f.vectors; ++z) columns<1>(f, z, add);
    }
};

}  // namespace QKV_ISA
}  // namespace qkv
