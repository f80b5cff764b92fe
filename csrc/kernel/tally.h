// What is kept of a tile's weights while its keys go by, sixteen at a time: p[j * Z * W + r] of key j and row r.
#pragma once
#include <bit>

#include "kernel/rowstate.h"

namespace qkv {
namespace QKV_ISA {

template <class V, int Rows_>
struct Tally {
    using E = typename V::E;
    static constexpr int W = V::W;

    E m[Rows_], inverse[Rows_];  // of a row's state: m and 1 / l; a dead row's weights are 0, whatever its scores
    uint64_t live;               // rows that are there, and are not NaN
    E least[Rows_];              // the score that a key has to be above to be among a row's largest
    E* scores;                   // of those, largest first: [Rows_][width]
    int64_t* keys;
    int64_t width;
    double away[Rows_], received[Rows_];
    double* mass[Rows_];     // where a row adds to what keys receive, which is its head's own
    double* map_row[Rows_];  // the row of the map that it adds to
    int64_t bin, bin_end;    // the column of the map that `pooled` belongs to, and the first key past it
    E pooled[Rows_];

    template <class From>
    void lay_out(From& memory, int64_t top) {
        width = top + W;
        scores = memory.template take<E>(Rows_ * width);
        keys = memory.template take<int64_t>(Rows_ * width);
    }

    void begin(int count) {
        for (int r = 0; r < Rows_; ++r) {
            m[r] = kLargest<E>, inverse[r] = 0;
            least[r] = r < count ? -static_cast<E>(INFINITY) : static_cast<E>(INFINITY);
            away[r] = received[r] = 0;
            pooled[r] = 0;
        }
        bin = -1, bin_end = 0;
        for (int r = 0; r < count; ++r)
            for (int64_t i = 0; i < width; ++i)
                scores[r * width + i] = -static_cast<E>(INFINITY), keys[r * width + i] = -1;
    }

    // From (m, l) to what weights are made with.
    void turn_over(int count) {
        live = 0;
        for (int r = 0; r < count; ++r) {
            const bool dead = RowState<E>{m[r], {inverse[r]}}.empty();
            inverse[r] = dead ? E(0) : E(1) / inverse[r];
            if (dead) m[r] = kLargest<E>;
            if (inverse[r] == inverse[r]) live |= UINT64_C(1) << r;
        }
    }
    bool is_nan(int r) const { return !(live >> r & 1); }

    // Takes in those keys whose scores are among a row's largest.
    template <int Z>
    QKV_INLINE void rank(const E* s, int64_t key) {
        uint64_t better[kGranule], any = 0;
        V bound[Z];
        QKV_FOR(z, Z) bound[z] = V::load(least + z * W);
        for (int j = 0; j < kGranule; ++j) {
            uint64_t bits = 0;
            QKV_FOR(z, Z) bits |= static_cast<uint64_t>(above(V::load(s + (j * Z + z) * W), bound[z])) << (z * W);
            better[j] = bits;
            any |= bits;
        }
        if (any == 0) return;
        for (int j = 0; j < kGranule; ++j)
            for (uint64_t bits = better[j]; bits != 0; bits &= bits - 1) {
                const int r = std::countr_zero(bits);
                if (s[j * Z * W + r] > least[r]) insert(r, s[j * Z * W + r], key + j);
            }
    }
    void insert(int r, E score, int64_t key) {
        E* s = scores + r * width;
        int64_t* k = keys + r * width;
        int64_t i = width - W - 1;
        for (; i > 0 && s[i - 1] < score; --i) s[i] = s[i - 1], k[i] = k[i - 1];
        s[i] = score, k[i] = key;
        least[r] = s[width - W - 1];
    }

    // Weights from scores, in place.
    template <int Z, int Degree>
    QKV_INLINE void weigh(E* p, E factor) const {
        const V by = V::set1(factor);
        V from[Z], share[Z];
        QKV_FOR(z, Z) from[z] = V::load(m + z * W), share[z] = V::load(inverse + z * W);
        for (int j = 0; j < kGranule; ++j)
            QKV_FOR(z, Z) {
                E* at = p + (j * Z + z) * W;
                const V x = weight<Degree>(V::load(at), from[z], by) * share[z];
                choose(static_cast<uint32_t>(live >> (z * W)), x, V::zero()).store(at);
            }
    }

    template <int Z>
    QKV_INLINE void add_distance(const E* p, int64_t key, const Rows& rows) {
        E ahead[Rows_] = {}, sum[Rows_], all[Rows_];
        for (int r = 0; r < rows.count; ++r) ahead[r] = static_cast<E>(rows.position[r] - key);
        QKV_FOR(z, Z) {
            const V from = V::load(ahead + z * W);
            V distance = V::zero(), total = V::zero();
            for (int j = 0; j < kGranule; ++j) {
                const V x = V::load(p + (j * Z + z) * W);
                distance = fma(x, absolute(from - V::set1(static_cast<E>(j))), distance);
                total = total + x;
            }
            distance.store(sum + z * W), total.store(all + z * W);
        }
        for (int r = 0; r < Z * W; ++r)
            away[r] += static_cast<double>(sum[r]), received[r] += static_cast<double>(all[r]);
    }
    E distance(int r) const {
        if (is_nan(r)) return static_cast<E>(NAN);
        return static_cast<E>(received[r] > 0 ? away[r] / received[r] : 0);
    }

    // Of `there` keys from `key` on. Rows of one head are added up first.
    template <int Z>
    QKV_INLINE void add_mass(const E* p, int64_t key, int there, const Rows& rows) const {
        if (mass[0] != mass[rows.count - 1]) {
            for (int r = 0; r < rows.count; ++r)
                for (int j = 0; j < there; ++j) mass[r][key + j] += static_cast<double>(p[j * Z * W + r]);
            return;
        }
        E all[kGranule];
        for (int j = 0; j < kGranule; j += W) {
            V t[W];
            QKV_FOR(i, W) {
                const E* at = p + (j + i) * Z * W;
                t[i] = V::load(at);
                for (int z = 1; z < Z; ++z) t[i] = t[i] + V::load(at + z * W);
            }
            sums(t).store(all + j);
        }
        double* to = mass[0] + key;
        for (int j = 0; j < there; ++j) to[j] += static_cast<double>(all[j]);
    }

    // Of `bins` columns over `length` keys.
    template <int Z>
    QKV_INLINE void add_map(const E* p, int64_t key, int there, int64_t bins, int64_t length, int count) {
        for (int j = 0; j < there;) {
            if (key + j >= bin_end) {
                close_bin(count);
                bin = (key + j) * bins / length;
                bin_end = ((bin + 1) * length + bins - 1) / bins;
            }
            const int end = static_cast<int>(lower(there, bin_end - key));
            V sum[Z];
            QKV_FOR(z, Z) sum[z] = V::load(pooled + z * W);
            for (; j < end; ++j)
                QKV_FOR(z, Z) sum[z] = sum[z] + V::load(p + (j * Z + z) * W);
            QKV_FOR(z, Z) sum[z].store(pooled + z * W);
        }
    }
    void close_bin(int count) {
        for (int r = 0; r < count && bin >= 0; ++r) map_row[r][bin] += static_cast<double>(pooled[r]), pooled[r] = 0;
    }

    void write_top(int r, int64_t top, E factor, int64_t* to_keys, E* to_weights) {
        E* s = scores + r * width;
        for (int64_t i = 0; i < top; i += W) {
            const V x = weight<6>(V::load(s + i), V::set1(m[r]), V::set1(factor)) * V::set1(inverse[r]);
            x.store(s + i);
        }
        for (int64_t i = 0; i < top; ++i) {
            const bool seen = keys[r * width + i] >= 0;
            to_keys[i] = is_nan(r) ? -1 : keys[r * width + i];
            to_weights[i] = is_nan(r) ? static_cast<E>(NAN) : seen ? s[i] : E(0);
        }
    }
};

}  // namespace QKV_ISA
}  // namespace qkv
