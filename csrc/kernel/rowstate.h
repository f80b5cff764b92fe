// A row's softmax, from its first block of keys to its result: used for many rows and for few, for chunks that are
// merged, and by the backward pass.
#pragma once
#include "kernel/score.h"

namespace qkv {
namespace QKV_ISA {

template <class E>
inline constexpr E kLargest =
    sizeof(E) == 8 ? static_cast<E>(1.7976931348623157e308) : static_cast<E>(3.4028234663852886e38f);

// A weight's exponent of 2, where m is at least the score.
template <class V>
QKV_INLINE V exponent(V score, V m, V factor) {
    return (score - m) * factor;
}
// The weight. -inf gives 0, NaN and +inf NaN.
template <int Degree, class V>
QKV_INLINE V weight(V score, V m, V factor) {
    return exp2_poly<Degree>(exponent(score, m, factor));
}
// Exponents far below every dtype's least power of 2 count as this one: 0 times it is 0, which 0 times -inf is not.
inline constexpr float kGone = -2048;
template <class V>
QKV_INLINE V there(V x) {
    return maximum(V::set1(kGone), x);
}

// What a row's state is worth once a block's largest score is known.
template <class V>
struct Shift {
    V from;  // what the block's scores are taken from: the new maximum, but finite where nothing is seen
    V keep;  // what the sums so far count for: 2^by
    V by;
};

// What a row's state comes to once all keys are in: out = o times factor. Sinks join here.
template <class E>
struct Closing {
    E factor;
    E lse;
    E m, l;  // the row's state, its sink included: l = sum_j exp(s_ij - m); m is in the unit of held scores
};

QKV_INLINE float larger(float a, float b) { return a > b ? a : b; }  // as maximum() of vectors
QKV_INLINE double larger(double a, double b) { return a > b ? a : b; }
QKV_INLINE long double larger(long double a, long double b) { return a > b ? a : b; }
QKV_INLINE VF larger(VF a, VF b) { return maximum(a, b); }
QKV_INLINE VD larger(VD a, VD b) { return maximum(a, b); }
QKV_INLINE float scaled_sum(float a, float by, float b) { return a * by + b; }
QKV_INLINE double scaled_sum(double a, double by, double b) { return a * by + b; }
QKV_INLINE VF scaled_sum(VF a, VF by, VF b) { return fma(a, by, b); }
QKV_INLINE VD scaled_sum(VD a, VD by, VD b) { return fma(a, by, b); }
template <class V>
QKV_INLINE V spread(typename V::E x) {
    return V::set1(x);
}
template <class V>
QKV_INLINE V spread(V x) {
    return x;
}

// What the weights of a row come to.
template <class E>
struct Outcome {
    E score, weight;  // the largest of each, of keys
    E entropy;        // in nats; a sink is one more outcome
};

// The largest score m so far, and sums over the keys: l of weights exp(score - m), and with Sums = 2 also t of 2^x x
// with x the exponent of such a weight: the entropy is log l - log 2 t / l. N is a number, or a vector: then each lane
// is a row.
template <class N, int Sums = 1>
struct RowState {
    N m;
    N sums[Sums];

    // A block's largest score is `top`: its keys are to be weighed from the shift's `from`.
    template <int Degree, class V>
    QKV_INLINE Shift<V> raise(N top, V factor) {
        const V old = spread<V>(m);
        m = larger(m, top);
        const V from = maximum(V::set1(-kLargest<typename V::E>), spread<V>(m));
        const V by = exponent(old, from, factor);
        return {from, exp2_poly<Degree>(by), there(by)};
    }
    // Takes the block's sums in; keep, by: of its shift.
    QKV_INLINE void absorb(N keep, [[maybe_unused]] N by, const N (&block)[Sums]) {
        if constexpr (Sums == 2) sums[1] = scaled_sum(scaled_sum(sums[0], by, sums[1]), keep, block[1]);
        sums[0] = scaled_sum(sums[0], keep, block[0]);
    }

    // Whether no key was seen.
    bool empty() const { return m == -static_cast<N>(INFINITY) && !(sums[0] != sums[0]); }

    // Parts of a row, in two passes: `cover` of all, then `merge` of each that is not empty. merge returns what the
    // part counts for.
    void cover(const RowState& part) { m = m > part.m || m != m ? m : part.m; }
    N merge(const RowState& part, N factor) {
        const N x = (part.m - m) * factor;
        const N w = std::exp2(x);
        if constexpr (Sums == 2) sums[1] += w * (part.sums[1] + part.sums[0] * larger(N(kGone), x));
        sums[0] += w * part.sums[0];
        return w;
    }

    Closing<N> close(const Job& job, bool has_sink, N sink) const {
        using Wide = std::conditional_t<sizeof(N) == 8, long double, double>;
        const N infinity = static_cast<N>(INFINITY), l = sums[0];
        has_sink = has_sink && sink != -infinity;
        if (empty())
            return has_sink ? Closing<N>{N(0), sink, sink, N(1)} : Closing<N>{N(0), -infinity, -infinity, N(0)};
        Closing<N> end{N(1) / l, N(0), m, l};
        if (has_sink) {                         // scores are held as the definition has them
            const N top = m < sink ? sink : m;  // a NaN stays
            const Wide w = std::exp(static_cast<Wide>(m) - static_cast<Wide>(top));
            const Wide total = static_cast<Wide>(l) * w + std::exp(static_cast<Wide>(sink) - static_cast<Wide>(top));
            end.factor = static_cast<N>(w / total), end.l = static_cast<N>(total), end.m = top;
        }
        const Wide unit = static_cast<Wide>(job.unit);
        end.lse = static_cast<N>(static_cast<Wide>(end.m) * unit + std::log(static_cast<Wide>(end.l)));
        return end;
    }

    // Once all keys are in, beside `close`.
    Outcome<N> outcome(const Job& job, bool has_sink, N sink) const {
        using Wide = std::conditional_t<sizeof(N) == 8, long double, double>;
        const N infinity = static_cast<N>(INFINITY), l = sums[0];
        if (empty()) return {-infinity, N(0), N(0)};
        has_sink = has_sink && sink != -infinity;
        const Wide far = kGone;
        Wide total = l, moment = static_cast<Wide>(sums[1]) / static_cast<Wide>(kLog2e), w = 1;
        if (has_sink) {  // scores are held as the definition has them
            const Wide top = m < sink ? sink : m, down = larger(far, static_cast<Wide>(m) - top),
                       e_down = larger(far, static_cast<Wide>(sink) - top), e = std::exp(e_down);
            w = std::exp(down);
            moment = w * (moment + total * down) + e * e_down;
            total = total * w + e;
        }
        if (total != total) return {static_cast<N>(NAN), static_cast<N>(NAN), static_cast<N>(NAN)};
        const Wide entropy = larger(Wide(0), std::log(total) - moment / total);
        return {static_cast<N>(static_cast<Wide>(m) * static_cast<Wide>(job.unit)), static_cast<N>(w / total),
                static_cast<N>(entropy)};
    }

    static RowState none() {
        RowState state{};
        state.m = -static_cast<N>(INFINITY);
        return state;
    }
};

// The states of a tile's rows.
template <class E, int Rows, int Sums = 1>
struct RowStates {
    E m[Rows], sums[Sums][Rows];

    void clear() {
        for (int r = 0; r < Rows; ++r) set(r, RowState<E, Sums>::none());
    }
    RowState<E, Sums> row(int r) const {
        RowState<E, Sums> state{m[r], {}};
        for (int i = 0; i < Sums; ++i) state.sums[i] = sums[i][r];
        return state;
    }
    void set(int r, const RowState<E, Sums>& state) {
        m[r] = state.m;
        for (int i = 0; i < Sums; ++i) sums[i][r] = state.sums[i];
    }
    // Rows r, r + 1, ... in the lanes of V.
    template <class V>
    QKV_INLINE RowState<V, Sums> rows(int64_t r) const {
        RowState<V, Sums> state;
        state.m = V::load(m + r);
        for (int i = 0; i < Sums; ++i) state.sums[i] = V::load(sums[i] + r);
        return state;
    }
    template <class V>
    QKV_INLINE void set_rows(int64_t r, const RowState<V, Sums>& state) {
        state.m.store(m + r);
        for (int i = 0; i < Sums; ++i) state.sums[i].store(sums[i] + r);
    }
};

template <class E>
inline bool sink_of(const Attention& call, int64_t head, E& sink) {
    if (call.sinks != nullptr) sink = number_at<E>(call.sink_type, call.sinks, head * call.sink_stride);
    return call.sinks != nullptr;
}

// Writes row r of the tile: o (contiguous, unnormalised) times factor, its lse and its state.
template <class T, class E, class V>
inline void write_row(const Job& job, const Tile& tile, int r, const E* o, const RowState<E, 2>& held) {
    const Attention& call = *job.call;
    const Rows& rows = tile.rows;
    E sink = 0;
    const bool has_sink = sink_of(call, rows.head[r], sink);
    const Closing<E> end = held.close(job, has_sink, sink);
    const E factor = call.dropout_below > 0 ? static_cast<E>(end.factor * call.dropout_scale) : end.factor;
    const int64_t row = tile.sequence->q_first + rows.index[r];
    T* out = static_cast<T*>(call.out) + rows.batch * call.out_stride[0] + rows.head[r] * call.out_stride[1] +
             row * call.out_stride[2];
    const bool dead = held.empty();
    int64_t d = 0;
    if (call.out_stride[3] == 1 && !dead) {
        // Adding zero turns -0 into +0: the sign of a zero must not tell what hidden values were.
        for (; d + V::W <= call.Dv; d += V::W) fma(V::load(o + d), V::set1(factor), V::zero()).store(out + d);
    }
    for (; d < call.Dv; ++d) narrow(dead ? E(0) : o[d] * factor + E(0), out[d * call.out_stride[3]]);
    const int64_t at = rows.batch * call.lse_stride[0] + rows.head[r] * call.lse_stride[1] + row * call.lse_stride[2];
    if (call.lse != nullptr) static_cast<E*>(call.lse)[at] = end.lse;
    if (call.state != nullptr) {
        E* state = static_cast<E*>(call.state) + at;
        state[0] = end.m, state[call.state_step] = end.l;
    }
    if (call.observed != nullptr) {
        const Outcome<E> of = held.outcome(job, has_sink, sink);
        E* to = static_cast<E*>(call.observed) + at;
        to[0] = of.score, to[call.observed_step] = of.weight, to[2 * call.observed_step] = of.entropy;
    }
}

}  // namespace QKV_ISA
}  // namespace qkv
