// Random calls' gradients, and the formulas that they are compared with.
#pragma once
#include "calls.h"

namespace stress {

struct Adjoint {
    Array d_out, d_lse, d_q, d_k, d_v;
    std::vector<std::vector<double>> d_bias;
    std::vector<double> d_sinks;
    std::vector<qkv::BiasGradient> terms;
    qkv::Backward b{};
};

inline void make_adjoint(Random& random, const Call& c, Adjoint& x) {
    const Sizes& z = c.z;
    const Layout any{false, true};
    x.d_out = make_array(random, c.type, {z.B, z.Hq, z.Lq, z.Dv}, {true, true}, random_guard(random), kNaNFill);
    fill(random, x.d_out, 1);
    if (random.chance(0.5)) {
        x.d_lse = c.lse;
        x.d_lse.slab = std::make_shared<Slab>(c.lse.extent * bytes_of(c.lse.type), random_guard(random), kNaNFill);
        for (int64_t b = 0; b < z.B; ++b)
            for (int64_t h = 0; h < z.Hq; ++h)
                for (int64_t i = 0; i < z.Lq; ++i) x.d_lse.set({b, h, i}, random.normal());
    }
    x.d_q = make_array(random, c.type, {z.B, z.Hq, z.Lq, z.D}, any, random_guard(random), kOutputFill);
    x.d_k = make_array(random, c.type, {z.B, z.Hkv, z.Lk, z.D}, any, random_guard(random), kOutputFill);
    x.d_v = make_array(random, c.type, {z.B, z.Hkv, z.Lk, z.Dv}, any, random_guard(random), kOutputFill);
    for (size_t n = 0; n < c.terms.size(); ++n) {
        const Array& of = c.bias[n];
        int64_t count = 1, stride[4];
        for (size_t d = 4; d-- > 0;) {
            stride[d] = of.size[d] == 1 ? 0 : count;
            count *= of.size[d];
        }
        if (c.terms[n].kind != qkv::BiasKind::tensor) stride[1] = of.size[3], stride[3] = of.size[3] == 1 ? 0 : 1;
        x.d_bias.emplace_back(static_cast<size_t>(count), 0.0);
        x.terms.push_back({nullptr, {stride[0], stride[1], stride[2], stride[3]}, 1});
    }
    for (size_t n = 0; n < x.terms.size(); ++n) x.terms[n].data = x.d_bias[n].data();
    x.d_sinks.assign(static_cast<size_t>(z.Hq), 0.0);
    qkv::Backward& b = x.b;
    const auto address = [](const Array& a) { return a.extent ? a.slab->data() : nullptr; };
    b.size = sizeof b;
    b.call = c.a;
    b.d_out = address(x.d_out), b.d_lse = x.d_lse.slab ? address(x.d_lse) : nullptr;
    b.d_q = address(x.d_q), b.d_k = address(x.d_k), b.d_v = address(x.d_v);
    for (size_t d = 0; d < 4; ++d) {
        b.d_out_stride[d] = x.d_out.stride[d];
        b.d_q_stride[d] = x.d_q.stride[d], b.d_k_stride[d] = x.d_k.stride[d], b.d_v_stride[d] = x.d_v.stride[d];
    }
    b.d_bias = x.terms.empty() ? nullptr : x.terms.data();
    b.d_sinks = c.sinks.slab ? x.d_sinks.data() : nullptr;
}

// A gradient and the same formula with every factor by its absolute value.
struct Sum {
    double value = 0, size = 0;
    void add(double x, double y) { value += x, size += y; }
};

// The gradients of a call, by the formulas.
struct Sums {
    std::vector<Sum> d_q, d_k, d_v, d_sinks;
    std::vector<std::vector<Sum>> d_bias;
    double spread = 0;  // the largest sum of a score's terms, each by its absolute value

    Sums(const Call& c, const Adjoint& x)
        : d_q(static_cast<size_t>(c.z.B * c.z.Hq * c.z.Lq * c.z.D)),
          d_k(static_cast<size_t>(c.z.B * c.z.Hkv * c.z.Lk * c.z.D)),
          d_v(static_cast<size_t>(c.z.B * c.z.Hkv * c.z.Lk * c.z.Dv)),
          d_sinks(static_cast<size_t>(c.z.Hq)) {
        for (const auto& d : x.d_bias) d_bias.emplace_back(d.size());
    }
};

// A row of queries, and the keys that it sees: of each its number, score (then weight), the score's slope in q . k, and
// d_out . v, which is also taken with every factor by its absolute value.
struct SeenRow {
    int64_t b, h, g, i, row, p;
    double sink, top;
    std::vector<int64_t> at;
    std::vector<double> scores, slopes, dots, dot_sizes;

    SeenRow(const Call& c, const qkv::Sequence& s, int64_t head, int64_t query)
        : b(s.batch),
          h(head),
          g(head / c.z.group()),
          i(query),
          row(s.q_first + query),
          p(s.positions ? s.positions[query] : s.position + query),
          sink(c.sinks.slab ? c.sinks.get({head}) : -INFINITY),
          top(sink) {}
};

inline void see(const Call& c, const Adjoint& x, int64_t keys, SeenRow& r, double& spread) {
    for (int64_t j = 0; j < keys; ++j) {
        const Where w{r.b, r.h, r.i, r.p, j, keys};
        if (c.has_mask && !visible(c.mask, w)) continue;
        double dot = 0, size = 0, slope = 1;
        for (int64_t d = 0; d < c.z.D; ++d) {
            const double y = c.q.get({r.b, r.h, r.row, d}) * c.k.get({r.b, r.g, j, d});
            dot += y, size += std::fabs(y);
        }
        size *= std::fabs(c.a.scale), dot *= c.a.scale;
        if (c.a.softcap > 0) {
            const double t = std::tanh(dot / c.a.softcap);
            dot = c.a.softcap * t, slope = 1 - t * t;
        }
        const double add = bias_of<double>(c, w, size);
        if (add == -INFINITY) continue;
        dot += add;
        spread = std::max(spread, size);
        double dp = 0, dp_size = 0;
        for (int64_t d = 0; d < c.z.Dv; ++d) {
            const double y = x.d_out.get({r.b, r.h, r.row, d}) * c.v.get({r.b, r.g, j, d});
            dp += y, dp_size += std::fabs(y);
        }
        r.scores.push_back(dot), r.slopes.push_back(slope);
        r.dots.push_back(dp), r.dot_sizes.push_back(dp_size), r.at.push_back(j);
        r.top = std::max(r.top, dot);
    }
}

// What the score of the row and its n-th key adds to the gradients of biases.
inline void add_to_bias(const Call& c, const Adjoint& x, const SeenRow& r, size_t n, const Sum& ds, Sums& to) {
    const int64_t j = r.at[n];
    for (size_t t = 0; t < to.d_bias.size(); ++t) {
        const int64_t* stride = x.terms[t].stride;
        const qkv::Bias& bias = c.terms[t];
        double sign = 1;
        int64_t at = r.h * stride[1];
        if (bias.kind == qkv::BiasKind::alibi)
            sign = -static_cast<double>(std::abs(r.p - j));
        else if (bias.kind == qkv::BiasKind::relative)
            at += (std::clamp(j - r.p, -bias.reach, bias.reach) + bias.reach) * stride[3];
        else
            at += r.b * stride[0] + r.i * stride[2] + j * stride[3];
        to.d_bias[t][static_cast<size_t>(at)].add(sign * ds.value, std::fabs(sign) * ds.size);
    }
}

// What a row adds to all gradients.
inline void add_row(const Call& c, const Adjoint& x, const qkv::Sequence& s, int64_t h, int64_t i, Sums& to) {
    const Sizes& z = c.z;
    SeenRow r(c, s, h, i);
    see(c, x, s.k_count, r, to.spread);
    if (r.top == -INFINITY) return;
    double total = std::exp(r.sink - r.top);
    for (double& score : r.scores) total += score = std::exp(score - r.top);
    std::vector<double> keeps;
    for (const int64_t j : r.at) keeps.push_back(kept(c, {r.b, h, i, r.p, j, s.k_count}));
    double delta = x.d_lse.slab ? -x.d_lse.get({r.b, h, r.row}) : 0, sizes = std::fabs(delta);
    for (size_t n = 0; n < r.at.size(); ++n) {
        r.dots[n] *= keeps[n], r.dot_sizes[n] *= keeps[n];
        delta += r.scores[n] / total * r.dots[n], sizes += r.scores[n] / total * r.dot_sizes[n];
    }
    const double of_sink = std::exp(r.sink - r.top) / total;
    if (c.sinks.slab) to.d_sinks[static_cast<size_t>(h)].add(-of_sink * delta, of_sink * sizes);
    for (size_t n = 0; n < r.at.size(); ++n) {
        const int64_t key = (r.b * z.Hkv + r.g) * z.Lk + r.at[n], query = (r.b * z.Hq + h) * z.Lq + r.row;
        const double prob = r.scores[n] / total;
        const Sum ds{prob * (r.dots[n] - delta), prob * (r.dot_sizes[n] + sizes)};
        for (int64_t d = 0; d < z.Dv; ++d) {
            const double y = prob * keeps[n] * x.d_out.get({r.b, h, r.row, d});
            to.d_v[static_cast<size_t>(key * z.Dv + d)].add(y, std::fabs(y));
        }
        add_to_bias(c, x, r, n, ds, to);
        for (int64_t d = 0; d < z.D; ++d) {
            const double a = c.a.scale * ds.value * r.slopes[n], size = std::fabs(c.a.scale) * ds.size;
            const double k = c.k.get({r.b, r.g, r.at[n], d}), q = c.q.get({r.b, h, r.row, d});
            to.d_q[static_cast<size_t>(query * z.D + d)].add(a * k, size * std::fabs(k));
            to.d_k[static_cast<size_t>(key * z.D + d)].add(a * q, size * std::fabs(q));
        }
    }
}

// A bound on rounding, and the first number beyond it.
struct Judge {
    double relative, absolute;
    char text[160] = "";

    // Long sums in the accumulation type: the rule of the gate, and a term for their length. Weights below the smallest
    // number count as 0, and are multiplied by what else is in the formula.
    Judge(const Call& c, double spread) {
        const Limits limit = limits(c.type);
        const double terms = static_cast<double>(std::max(c.z.Lk, c.z.Lq * c.z.group()));
        relative = 2 * limit.eps + limit.eps_acc * (8 * (1 + spread) + std::sqrt(terms) + std::min(terms, 64.0) / 8);
        absolute = limit.tiny * (1 + terms) * 16 * (1 + std::fabs(c.a.scale));
    }

    bool wrong(const char* name, double got, const Sum& want) {
        const double off = std::fabs(got - want.value), bound = relative * want.size + absolute;
        if (off <= bound) return false;
        std::snprintf(text, sizeof text, "%s = %.9g, wanted %.9g: off by %.3g, allowed %.3g", name, got, want.value,
                      off, bound);
        return true;
    }
};

// The gradient of queries, or of keys or values.
inline std::string compare_array(const Call& c, const Array& array, const std::vector<Sum>& sums, bool queries,
                                 const char* name, Judge& judge) {
    std::vector<bool> used(static_cast<size_t>(array.extent));
    for (const qkv::Sequence& s : c.sequences)
        for (int64_t h = 0; h < array.size[1]; ++h)
            for (int64_t i = 0; i < (queries ? s.q_count : s.k_count); ++i)
                for (int64_t d = 0; d < array.size[3]; ++d) {
                    const int64_t row = queries ? s.q_first + i : i;
                    used[static_cast<size_t>(array.offset({s.batch, h, row, d}))] = true;
                    const int64_t at = ((s.batch * array.size[1] + h) * array.size[2] + row) * array.size[3] + d;
                    if (judge.wrong(name, array.get({s.batch, h, row, d}), sums[static_cast<size_t>(at)]))
                        return judge.text;
                }
    return untouched(array, used, name);
}

// Compares everything that was written, and that nothing else was.
inline std::string compare_gradients(const Call& c, const Adjoint& x) {
    Sums sums(c, x);
    for (const qkv::Sequence& s : c.sequences)
        for (int64_t h = 0; h < c.z.Hq; ++h)
            for (int64_t i = 0; i < s.q_count; ++i) add_row(c, x, s, h, i, sums);
    Judge judge(c, sums.spread);
    std::string fault = compare_array(c, x.d_q, sums.d_q, true, "d_q", judge);
    if (fault.empty()) fault = compare_array(c, x.d_k, sums.d_k, false, "d_k", judge);
    if (fault.empty()) fault = compare_array(c, x.d_v, sums.d_v, false, "d_v", judge);
    if (!fault.empty()) return fault;
    for (size_t t = 0; t < sums.d_bias.size(); ++t)
        for (size_t n = 0; n < sums.d_bias[t].size(); ++n)
            if (judge.wrong("d_bias", x.d_bias[t][n], sums.d_bias[t][n])) return judge.text;
    for (size_t h = 0; h < sums.d_sinks.size() && c.sinks.slab; ++h)
        if (judge.wrong("d_sinks", x.d_sinks[h], sums.d_sinks[h])) return judge.text;
    return "";
}

}  // namespace stress
