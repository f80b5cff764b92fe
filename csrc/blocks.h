// What both kernels share: the call as they see it, and the walk over the keys that a tile of rows may see.
#pragma once
#include <type_traits>

#include "mask_program.h"
#include "mutants.h"

namespace qkv {
namespace QKV_ISA {

inline constexpr int kGranule = 16;                        // keys that are visited or skipped together
inline constexpr int kGranules = kWindowKeys / kGranule;   // of a block
inline constexpr double kLog2e = 1.4426950408889634074;
template <class E>
inline constexpr E kLargest = sizeof(E) == 8 ? static_cast<E>(1.7976931348623157e308) : static_cast<E>(3.4028234663852886e38f);

template <class T>
struct Storage;  // the accumulation type of an element type
template <>
struct Storage<float> {
    using E = float;
};
template <>
struct Storage<bf16> {
    using E = float;
};
template <>
struct Storage<f16> {
    using E = float;
};
template <>
struct Storage<double> {
    using E = double;
};

// The keys of one step of the online softmax: up to 12 granules, which need not be neighbours.
struct Block {
    int granules;
    bool masked;                   // some bit of words is 0
    int64_t key[kGranules];        // first key of each granule
    uint64_t words[kWindowKeys];   // by key of the block: the rows that see it
    int keys() const { return granules * kGranule; }
};

// Calls visit(block) for the visible granules in [k0, k1), in order and up to Most at a time; k0 is a multiple of kGranule.
template <int Most = kGranules, class Visit>
inline void walk(const Program& program, const Rows& rows, int64_t k0, int64_t k1, Scratch& scratch, Block& block, Visit visit) {
    const uint64_t every = rows.count == 64 ? ~UINT64_C(0) : (UINT64_C(1) << rows.count) - 1;
    Bounds bounds;
    if (program.empty()) {
        bounds.seen.set(0, rows.key_count);
        bounds.full = bounds.seen;
    } else {
        program.bounds(rows, scratch, bounds);
    }
    block.granules = 0;
    block.masked = false;
    const auto push = [&](int64_t key, const uint64_t* words) {
        uint64_t* to = block.words + block.keys();
        for (int j = 0; j < kGranule; ++j) to[j] = words == nullptr ? every : words[j];
        block.masked |= words != nullptr && !QKV_MUTANT(mask_ignored);
        block.key[block.granules++] = key;
        if (block.granules == Most) {
            visit(block);
            block.granules = 0;
            block.masked = false;
        }
    };
    uint64_t words[kWindowKeys];
    int64_t done = k0;  // granules before this have been looked at
    int f = 0;
    for (int i = 0; i < bounds.seen.count; ++i) {
        int64_t at = upper(done, bounds.seen.first[i] / kGranule * kGranule);
        const int64_t stop = lower(bounds.seen.last[i], k1);
        while (at < stop) {
            while (f < bounds.full.count && bounds.full.last[f] < at + kGranule) ++f;
            const bool in = f < bounds.full.count;
            if (in && bounds.full.first[f] <= at && !(QKV_MUTANT(first_key) && at == 0) && !QKV_MUTANT(last_key)) {
                for (const int64_t end = lower(bounds.full.last[f], k1); at + kGranule <= end; at += kGranule) push(at, nullptr);
                if (at >= stop) break;
                if (bounds.full.last[f] >= at + kGranule) break;  // k1 cuts the granule: the last chunk's tail is below
                continue;
            }
            // Up to the next full range, bits decide.
            int64_t end = lower(stop, at + kWindowKeys);
            if (in && bounds.full.first[f] > at) end = lower(end, (bounds.full.first[f] + kGranule - 1) / kGranule * kGranule);
            const int n = static_cast<int>((end - at + kGranule - 1) / kGranule * kGranule);
            if (program.empty()) {
                for (int j = 0; j < n; ++j) words[j] = at + j < rows.key_count ? every : 0;
            } else {
                program.bits(rows, at, n, scratch, words);
            }
            if (QKV_MUTANT(first_key) && at == 0) words[0] = 0;
            if (QKV_MUTANT(last_key) && at + n >= rows.key_count) words[rows.key_count - 1 - at] = 0;
            for (int g = 0; g < n; g += kGranule) {
                uint64_t any = 0, all = every;
                for (int j = 0; j < kGranule; ++j) {
                    any |= words[g + j];
                    all &= words[g + j];
                }
                if (any != 0) push(at + g, all == every ? nullptr : words + g);
            }
            at += n;
        }
        done = upper(done, at);
    }
    if (block.granules > 0) visit(block);
    block.granules = 0;
}

// The keys (or values) of one sequence and one head, where they lie.
template <class S>
struct Source {
    const S* base;  // key 0; with pages: slot 0 of page 0
    int64_t stride, stride_d;
    const int32_t* pages;
    int64_t page_size, page;
    // The row of key j; null where its page has no memory.
    QKV_INLINE const S* row(int64_t j) const {
        if (pages == nullptr) return base + j * stride;
        const int64_t number = pages[j / page_size] + QKV_MUTANT(page_next);
        return number < 0 ? nullptr : base + number * page + (QKV_MUTANT(page_slot) ? 0 : j % page_size) * stride;
    }
    // Row i of the granule that begins at key j; `first` is its row 0. Looking a page up costs a division.
    QKV_INLINE const S* row_of(const S* first, bool straight_, int64_t j, int64_t i) const {
        return !straight_ ? row(j + i) : first == nullptr ? nullptr : first + i * stride;
    }
    // Whether the keys of every granule lie one stride apart.
    bool straight() const { return pages == nullptr || (page_size % kGranule == 0 || QKV_MUTANT(page_straight)); }
};
template <class S>
inline Source<S> keys_of(const Attention& a, const Sequence& s, int64_t kv_head) {
    return {static_cast<const S*>(s.k) + kv_head * a.k_stride[0], a.k_stride[1], a.k_stride[2], s.pages, a.page_size, a.k_page};
}
template <class S>
inline Source<S> values_of(const Attention& a, const Sequence& s, int64_t kv_head) {
    return {static_cast<const S*>(s.v) + kv_head * a.v_stride[0], a.v_stride[1], a.v_stride[2], s.pages, a.page_size, a.v_page};
}
inline bool is_scaled(const Attention& a) { return a.k_scale != nullptr; }

// One row as numbers of type To, in the vectors of V; null counts as zeros. i8 and f8 are exact in every To, before their scale.
template <class V, class S, class To>
inline void unpack_row(const S* from, int64_t stride, int64_t D, int64_t padded, To* to) {
    int64_t d = 0;
    if (from != nullptr) {
        if (stride == 1) {
#if defined(QKV_ISA_AVX512BF16)
            if constexpr (std::is_same_v<To, bf16>)
                for (; d + 32 <= D; d += 32) _mm512_storeu_si512(to + d, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(V::load(from + d + 16).r, V::load(from + d).r)));
#endif
            for (; d + V::W <= D; d += V::W) V::load(from + d).store(to + d);
        }
        for (; d < D; ++d) narrow(widen(from[d * stride]), to[d]);
    }
    if (d < padded) std::memset(static_cast<void*>(to + d), 0, sizeof(To) * static_cast<size_t>(padded - d));
}

// The scales of a granule's keys and values: those past the end, and on pages without memory, count as 0.
template <class E>
inline void gather_scales(const Attention& a, const Sequence& s, int64_t kv_head, int64_t j0, E* k_to, E* v_to) {
    const int64_t live = lower(kGranule, s.k_count - j0), step = a.scale_stride[2];
    int64_t i = 0;
    while (i < live) {  // a page at a time
        const int64_t slot = (j0 + i) % a.page_size, number = s.pages[(j0 + i) / a.page_size];
        const int64_t at = number * a.scale_stride[0] + kv_head * a.scale_stride[1] + slot * step;
        const int64_t end = lower(live, i + a.page_size - slot);
        if (number < 0) {
            for (; i < end; ++i) k_to[i] = v_to[i] = 0;
        } else if (step == 1) {
            for (int64_t x = at - i; i < end; ++i) k_to[i] = static_cast<E>(a.k_scale[x + i]), v_to[i] = static_cast<E>(a.v_scale[x + i]);
        } else {
            for (int64_t x = at; i < end; ++i, x += step) k_to[i] = static_cast<E>(a.k_scale[x]), v_to[i] = static_cast<E>(a.v_scale[x]);
        }
    }
    for (; i < kGranule; ++i) k_to[i] = v_to[i] = 0;
}

// Asks for the scales of the granule at j0 before they are needed.
inline void prefetch_scales(const Attention& a, const Sequence& s, int64_t kv_head, int64_t j0) {
#if defined(__GNUC__)
    const int64_t number = s.pages[j0 / a.page_size];
    const int64_t at = number < 0 ? 0 : number * a.scale_stride[0] + kv_head * a.scale_stride[1] + j0 % a.page_size * a.scale_stride[2];
    __builtin_prefetch(a.k_scale + at);
    __builtin_prefetch(a.v_scale + at);
#else
    (void)a, (void)s, (void)kv_head, (void)j0;
#endif
}

// What a call asks for, in the form the kernels use.
//
// Kernels hold scores as q . k (with q's sign flipped where the scale is negative), or with `transform` as the definition has
// them. A row's maximum m is in the same unit and is taken away before the factor is applied: the difference of two floats
// near each other is exact, so the weight of a row's best key is 1 at any magnitude.
struct Job {
    const Attention* call;
    Program program;
    bool transform;   // scores need more than a positive factor: softcap, bias, sinks, or a scale out of the ordinary
    double unit;      // the definition's score of a held score of 1
    double factor;    // from held scores to exponents of 2
    bool negate;      // q's sign is flipped: the scale is negative
    int64_t group;
    explicit Job(const Attention& a) : call(&a), program(a.program, a.program_length, a.operands), group(a.Hkv > 0 ? a.Hq / a.Hkv : 0) {
        const double scale = a.scale / (QKV_MUTANT(scale_by_d) ? std::sqrt(static_cast<double>(a.D)) : 1), size = std::fabs(scale);
        transform = a.softcap > 0 || a.bias_count > 0 || a.sinks != nullptr || is_scaled(a) || !(size > 1e-30 && size < 1e30);
        negate = !transform && scale < 0 && !QKV_MUTANT(negative_scale);
        unit = transform ? 1 : size;
        factor = unit * kLog2e;
    }
};

// Rows of a sequence and key/value head up to which dot products beat queries in lanes.
inline constexpr int64_t kDotRows = VF::W == 16 ? 10 : VF::W == 8 ? 6 : 3;

// q . k is summed in runs of this many products before they are added up: rounding grows with the run. Both directions sum in
// the same order: the backward pass finds the scores of the forward pass again, to the bit.
inline constexpr int64_t kScoreRun = 128;
QKV_INLINE int64_t score_run(int64_t left) { return left < 2 * kScoreRun ? left : kScoreRun; }

// exp2((score - m) factor), where m is at least the score. -inf gives 0, NaN and +inf NaN.
template <int Degree, class V>
QKV_INLINE V weight(V score, V m, V factor) {
    if (QKV_MUTANT(best_weight_lost)) return exp2_poly<Degree>(minimum(V::zero(), fused(score, factor, V::zero() - m * factor)));
    if (QKV_MUTANT(mean_of_values)) return exp2_poly<Degree>((score - m) * factor * V::set1(static_cast<typename V::E>(1e-30)));
    return exp2_poly<Degree>((score - m) * factor);
}

// Which rows a tile holds: heads and query indices of one sequence and one key/value head.
struct Tile {
    const Sequence* sequence;
    int64_t kv_head;
    Rows rows;
};

// Dropout draws a number for every weight: a hash of seed, batch row, query head, query and key (`dropout_keep` in numerics.py).
// draw_row has all but the key in it.
QKV_INLINE uint64_t draw_index(int64_t index) { return (static_cast<uint64_t>(index) + 1) * UINT64_C(0x9E3779B97F4A7C15); }
inline uint64_t draw_row(const Attention& a, const Rows& rows, int r) {
    uint64_t x = draw_mix(a.dropout_seed + draw_index(rows.batch));
    x = draw_mix(x + draw_index(rows.head[r]));
    return draw_mix(x + draw_index(rows.index[r]));
}

// Adds the score terms of row r for n keys from j0 to add[j * stride].
template <class E>
inline void gather_bias(const Attention& call, const Tile& tile, int r, int64_t j0, int n, E* add, int64_t stride) {
    const Rows& rows = tile.rows;
    const int64_t keys = rows.key_count, h = rows.head[r], p = rows.position[r];
    const int stop = static_cast<int>(lower(n, keys - j0));
    // One term of -inf hides its key, whatever the others are: -inf and NaN would be NaN.
    const bool several = call.bias_count > 1;
    const E hidden = -static_cast<E>(INFINITY);
    const auto plus = [&](E& to, E x) { to = several && (to == hidden || x == hidden) ? hidden : to + x; };
    for (int64_t t = 0; t < call.bias_count; ++t) {
        const Bias& bias = call.bias[t];
        const auto value = [&](int64_t offset) -> E {
            switch (bias.type) {
                case Type::f32: return static_cast<E>(static_cast<const float*>(bias.data)[offset]);
                case Type::f64: return static_cast<E>(static_cast<const double*>(bias.data)[offset]);
                case Type::bf16: return static_cast<E>(widen(static_cast<const bf16*>(bias.data)[offset]));
                default: return static_cast<E>(widen(static_cast<const f16*>(bias.data)[offset]));
            }
        };
        if (bias.kind == BiasKind::alibi) {
            const E slope = value(h * bias.stride[1]);
            for (int j = 0; j < stop; ++j) {
                const int64_t away = p - (j0 + j);
                plus(add[j * stride], -(slope * static_cast<E>(away < 0 && !QKV_MUTANT(alibi_signed) ? -away : away)));
            }
        } else if (bias.kind == BiasKind::relative) {
            const int64_t table = h * bias.stride[1];
            for (int j = 0; j < stop; ++j)
                plus(add[j * stride], value(table + (clamp(j0 + j - p + QKV_MUTANT(relative_shift), -bias.reach, bias.reach) + bias.reach) * bias.stride[3]));
        } else {
            const int64_t row = rows.batch * bias.stride[0] + h * bias.stride[1] + rows.index[r] * bias.stride[2] + j0 * bias.stride[3];
            if (bias.type == Type::f32 && bias.stride[3] == 1) {
                const float* from = static_cast<const float*>(bias.data) + row;
                for (int j = 0; j < stop; ++j) plus(add[j * stride], static_cast<E>(from[j]));
            } else {
                for (int j = 0; j < stop; ++j) plus(add[j * stride], value(row + j * bias.stride[3]));
            }
        }
    }
}

// tanh to about an ulp: a polynomial near 0, where 1 - 2 / (e^2x + 1) would lose all digits. Its slope, far from 0, is
// u (2 - u) with u = 1 - |tanh|: 1 - tanh^2 would cancel.
QKV_INLINE VF tanh_vector(VF x, VF* slope = nullptr) {
    const VF y = absolute(x), z = x * x;
    VF p = VF::set1(-5.70498872745e-3f);
    p = fma(p, z, VF::set1(2.06390887954e-2f));
    p = fma(p, z, VF::set1(-5.37397155531e-2f));
    p = fma(p, z, VF::set1(1.33314422036e-1f));
    p = fma(p, z, VF::set1(-3.33332819422e-1f));
    const VF near = fma(p * z, x, x);
    const VF limited = minimum(VF::set1(40.f), y);  // NaN second: it survives
    const VF e = exp2_poly<6>(limited * VF::set1(static_cast<float>(2 * kLog2e)));
    const VF one = VF::set1(1.f);
    const VF left = VF::set1(2.f) / (e + one);
    const VF far = copy_sign(one - left, x);
    if (slope != nullptr) *slope = less_then(y, VF::set1(0.625f), one - near * near, left * (VF::set1(2.f) - left));
    return less_then(y, VF::set1(0.625f), near, far);
}
QKV_INLINE VD tanh_vector(VD x, VD* slope = nullptr) {
    double lanes[VD::W], slopes[VD::W];
    x.store(lanes);
    for (int i = 0; i < VD::W; ++i) {
        const double left = 2 / (std::exp(2 * std::fabs(lanes[i])) + 1);
        slopes[i] = left * (2 - left);
        lanes[i] = std::tanh(lanes[i]);
    }
    if (slope != nullptr) *slope = VD::load(slopes);
    return VD::load(lanes);
}

// What a row's maximum m and sum l come to once all keys are in: out = o times factor. Sinks join here.
template <class E>
struct Closing {
    E factor;
    E lse;
    E m, l;  // the row's state, its sink included: l = sum_j exp(s_ij - m); m is in the unit of held scores
};
template <class E>
inline Closing<E> close_row(const Job& job, E m, E l, bool has_sink, E sink) {
    using Wide = std::conditional_t<sizeof(E) == 8, long double, double>;
    const E infinity = static_cast<E>(INFINITY);
    if (m == -infinity && !(l != l)) return has_sink && sink != -infinity ? Closing<E>{E(0), sink, sink, E(1)} : Closing<E>{E(0), -infinity, -infinity, E(0)};
    E scale = E(1) / l;
    if (has_sink && sink != -infinity) {  // scores are held as the definition has them
        const E top = m < sink ? sink : m;  // a NaN stays
        const Wide w = std::exp(static_cast<Wide>(m) - static_cast<Wide>(top));
        const Wide total = static_cast<Wide>(l) * w + std::exp(static_cast<Wide>(sink) - static_cast<Wide>(top)) * (QKV_MUTANT(sink_twice) ? 2 : 1);
        scale = static_cast<E>(w / total), l = static_cast<E>(total), m = top;
    }
    const Wide lse = static_cast<Wide>(m) * static_cast<Wide>(job.unit) + std::log(static_cast<Wide>(l));
    return {scale, static_cast<E>(QKV_MUTANT(lse_base_2) ? lse * kLog2e : lse), m, l};
}

template <class E>
inline bool sink_of(const Attention& call, int64_t head, E& sink) {
    if (call.sinks == nullptr) return false;
    const int64_t at = head * call.sink_stride;
    switch (call.sink_type) {
        case Type::f32: sink = static_cast<E>(static_cast<const float*>(call.sinks)[at]); break;
        case Type::f64: sink = static_cast<E>(static_cast<const double*>(call.sinks)[at]); break;
        case Type::bf16: sink = static_cast<E>(widen(static_cast<const bf16*>(call.sinks)[at])); break;
        default: sink = static_cast<E>(widen(static_cast<const f16*>(call.sinks)[at])); break;
    }
    return true;
}

// Writes row r of the tile: o (contiguous, unnormalised) times factor, its lse and its state.
template <class T, class E, class V>
inline void write_row(const Job& job, const Tile& tile, int r, const E* o, E m, E l) {
    const Attention& call = *job.call;
    const Rows& rows = tile.rows;
    E sink = 0;
    const bool has_sink = sink_of(call, rows.head[r], sink);
    const Closing<E> end = close_row<E>(job, m, l, has_sink, sink);
    const E factor = call.dropout_below > 0 ? static_cast<E>(end.factor * call.dropout_scale) : end.factor;
    const int64_t row = tile.sequence->q_first + rows.index[r];
    T* out = static_cast<T*>(call.out) + rows.batch * call.out_stride[0] + rows.head[r] * call.out_stride[1] + row * call.out_stride[2];
    const bool dead = m == -static_cast<E>(INFINITY) && !(l != l);
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
}

// A bias of -inf hides its key from its row, whatever the key and value hold.
template <class E>
inline void hide_by_bias(Block& block, int r, int j0, int n, const E* add, int64_t stride) {
    for (int j = 0; j < n; ++j)
        if (add[j * stride] == -static_cast<E>(INFINITY)) {
            block.words[j0 + j] &= ~(UINT64_C(1) << r);
            block.masked = true;
        }
}

QKV_INLINE bool finite(float x) { return (cast_bits<uint32_t>(x) & 0x7f800000u) != 0x7f800000u; }
QKV_INLINE bool finite(double x) { return (cast_bits<uint64_t>(x) >> 52 & 0x7ff) != 0x7ff; }

}  // namespace QKV_ISA
}  // namespace qkv
