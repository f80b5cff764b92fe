// From products q . k to scores: one formula for all kernels.
#pragma once
#include "kernel/keys.h"
#include "mask/pattern.h"

namespace qkv {
namespace QKV_ISA {

inline constexpr double kLog2e = 1.4426950408889634074;

// What a call asks for, in the form the kernels use.
//
// Kernels hold scores as q . k (with q's sign flipped where the scale is negative), or with `transform` as the
// definition has them. A row's maximum m is in the same unit and is taken away before the factor is applied: the
// difference of two floats near each other is exact, so the weight of a row's best key is 1 at any magnitude.
struct Job {
    const Attention* call;
    Program program;
    bool transform;  // scores need more than a positive factor: softcap, bias, sinks, or a scale out of the ordinary
    double unit;     // the definition's score of a held score of 1
    double factor;   // from held scores to exponents of 2
    bool negate;     // q's sign is flipped: the scale is negative
    int64_t group;
    Pattern pattern;
    explicit Job(const Attention& a)
        : call(&a),
          program(a.program, a.program_length, a.operands, a.Hq),
          group(a.Hkv > 0 ? a.Hq / a.Hkv : 0),
          pattern(PatternReader::of(a.program, a.program_length)) {
        const double scale = a.scale, size = std::fabs(scale);
        transform =
            a.softcap > 0 || a.bias_count > 0 || a.sinks != nullptr || is_scaled(a) || !(size > 1e-30 && size < 1e30);
        negate = !transform && scale < 0;
        unit = transform ? 1 : size;
        factor = unit * kLog2e;
    }
};

// q . k is summed in runs of this many products before they are added up: rounding grows with the run. Both directions
// sum in the same order: the backward pass finds the scores of the forward pass again, to the bit.
inline constexpr int64_t kScoreRun = 128;
QKV_INLINE int64_t score_run(int64_t left) { return left < 2 * kScoreRun ? left : kScoreRun; }

// Which rows a tile holds: heads and query indices of one sequence and one key/value head.
struct Tile {
    const Sequence* sequence;
    int64_t kv_head;
    Sieve sieve;  // the keys that its rows can see at all
    Rows rows;
};

template <class E>
QKV_INLINE E number_at(Type type, const void* data, int64_t at) {
    switch (type) {
        case Type::f32: return static_cast<E>(static_cast<const float*>(data)[at]);
        case Type::f64: return static_cast<E>(static_cast<const double*>(data)[at]);
        case Type::bf16: return static_cast<E>(widen(static_cast<const bf16*>(data)[at]));
        default: return static_cast<E>(widen(static_cast<const f16*>(data)[at]));
    }
}

// Adds the score terms of row r for `stop` keys to add[j * stride]: those from j0 on, or picked[j].
template <class E, bool Picked>
inline void gather_terms(const Attention& call, const Tile& tile, int r, int64_t j0,
                         [[maybe_unused]] const int64_t* picked, int stop, E* add, int64_t stride) {
    const Rows& rows = tile.rows;
    const int64_t h = rows.head[r], p = rows.position[r];
    const auto key = [&](int j) { return Picked ? picked[j] : j0 + j; };
    // One term of -inf hides its key, whatever the others are: -inf and NaN would be NaN.
    const bool several = call.bias_count > 1;
    const E hidden = -static_cast<E>(INFINITY);
    const auto plus = [&](E& to, E x) { to = several && (to == hidden || x == hidden) ? hidden : to + x; };
    for (int64_t t = 0; t < call.bias_count; ++t) {
        const Bias& bias = call.bias[t];
        const auto value = [&](int64_t offset) -> E { return number_at<E>(bias.type, bias.data, offset); };
        if (bias.kind == BiasKind::alibi) {
            const E slope = value(h * bias.stride[1]);
            for (int j = 0; j < stop; ++j) {
                const int64_t away = p - key(j);
                plus(add[j * stride], -(slope * static_cast<E>(away < 0 ? -away : away)));
            }
        } else if (bias.kind == BiasKind::relative) {
            const int64_t table = h * bias.stride[1];
            for (int j = 0; j < stop; ++j)
                plus(add[j * stride],
                     value(table + (clamp(key(j) - p, -bias.reach, bias.reach) + bias.reach) * bias.stride[3]));
        } else {
            const int64_t row = rows.batch * bias.stride[0] + h * bias.stride[1] + rows.index[r] * bias.stride[2];
            if (!Picked && bias.type == Type::f32 && bias.stride[3] == 1) {
                const float* from = static_cast<const float*>(bias.data) + row + j0;
                for (int j = 0; j < stop; ++j) plus(add[j * stride], static_cast<E>(from[j]));
            } else {
                for (int j = 0; j < stop; ++j) plus(add[j * stride], value(row + key(j) * bias.stride[3]));
            }
        }
    }
}

template <class E>
inline void gather_bias(const Attention& call, const Tile& tile, int r, int64_t j0, int n, E* add, int64_t stride) {
    const int stop = static_cast<int>(lower(n, tile.rows.key_count - j0));
    gather_terms<E, false>(call, tile, r, j0, nullptr, stop, add, stride);
}
// Those of the keys of granule g.
template <class E>
inline void gather_bias(const Attention& call, const Tile& tile, int r, const Block& block, int g, E* add,
                        int64_t stride) {
    if (block.straight(g))
        gather_terms<E, false>(call, tile, r, block.key[g], nullptr, block.live[g], add, stride);
    else
        gather_terms<E, true>(call, tile, r, 0, block.picked + g * kGranule, block.live[g], add, stride);
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

// The score as the definition has it: scale, the key's own scale, softcap, bias; the mask is `shown`.
template <class M>
class Score {
  public:
    using E = typename M::E;
    using V = typename M::V;

    explicit Score(const Job& job)
        : scale_(V::set1(static_cast<E>(job.call->scale))),
          cap_(V::set1(static_cast<E>(job.call->softcap))),
          shrink_(V::set1(static_cast<E>(job.call->softcap > 0 ? 1 / job.call->softcap : 0))),
          sign_(V::set1(job.negate ? E(-1) : E(1))),
          capped_(job.call->softcap > 0),
          biased_(job.call->bias_count > 0) {}

    // key_scale: of stored keys that have one (Scaled). slope: of the softcap, left as it is where there is none.
    template <bool Scaled>
    QKV_INLINE V of(V product, [[maybe_unused]] V key_scale, const E* bias, V* slope = nullptr) const {
        V x = product * scale_;
        if constexpr (Scaled) x = x * key_scale;
        if (capped_) x = cap_ * tanh_vector(x * shrink_, slope);
        return biased_ ? x + V::load(bias) : x;
    }

    // As the forward kernels hold it, from a product whose query's sign was not flipped.
    template <bool Transform>
    QKV_INLINE V held(V product, const E* bias, V& slope) const {
        if constexpr (Transform) return of<false>(product, product, bias, &slope);
        return product * sign_;
    }

  private:
    V scale_, cap_, shrink_, sign_;
    bool capped_, biased_;
};

// A score in the lanes whose bit is set, -inf in those that do not see the key.
template <class V>
QKV_INLINE V shown(uint64_t bits, V score) {
    return choose(static_cast<uint32_t>(bits), score, V::set1(-static_cast<typename V::E>(INFINITY)));
}

// The same for one product, in the arithmetic of the definition.
template <class E>
struct OneScore {
    E score, slope;
};
template <class E>
inline OneScore<E> one_score(const Job& job, E product, E bias) {
    const Attention& a = *job.call;
    E x = product * (job.transform ? static_cast<E>(a.scale) : job.negate ? E(-1) : E(1)), slope = 1;
    if (a.softcap > 0) {
        const E t = std::tanh(x / static_cast<E>(a.softcap));
        slope = 1 - t * t;
        x = static_cast<E>(a.softcap) * t;
    }
    return {x + bias, slope};
}

}  // namespace QKV_ISA
}  // namespace qkv
