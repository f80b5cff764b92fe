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

// Compares everything that was written, and that nothing else was.
inline std::string compare_gradients(const Call& c, const Adjoint& x) {
    const Sizes& z = c.z;
    const Limits limit = limits(c.type);
    std::vector<Sum> d_q(static_cast<size_t>(z.B * z.Hq * z.Lq * z.D)),
        d_k(static_cast<size_t>(z.B * z.Hkv * z.Lk * z.D)), d_v(static_cast<size_t>(z.B * z.Hkv * z.Lk * z.Dv)),
        d_sinks(static_cast<size_t>(z.Hq));
    std::vector<std::vector<Sum>> d_bias;
    for (const auto& d : x.d_bias) d_bias.emplace_back(d.size());
    double spread = 0;
    for (const qkv::Sequence& s : c.sequences)
        for (int64_t h = 0; h < z.Hq; ++h)
            for (int64_t i = 0; i < s.q_count; ++i) {
                const int64_t g = h / z.group(), row = s.q_first + i, p = s.positions ? s.positions[i] : s.position + i;
                double delta = x.d_lse.slab ? -x.d_lse.get({s.batch, h, row}) : 0, sizes = std::fabs(delta),
                       top = c.sinks.slab ? c.sinks.get({h}) : -INFINITY;
                const double sink = top;
                std::vector<double> scores, slopes, dots, dot_sizes;
                std::vector<int64_t> at;
                for (int64_t j = 0; j < s.k_count; ++j) {
                    const Where w{s.batch, h, i, p, j, s.k_count};
                    if (c.has_mask && !visible(c.mask, w)) continue;
                    double dot = 0, size = 0, slope = 1;
                    for (int64_t d = 0; d < z.D; ++d) {
                        const double y = c.q.get({s.batch, h, row, d}) * c.k.get({s.batch, g, j, d});
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
                    for (int64_t d = 0; d < z.Dv; ++d) {
                        const double y = x.d_out.get({s.batch, h, row, d}) * c.v.get({s.batch, g, j, d});
                        dp += y, dp_size += std::fabs(y);
                    }
                    scores.push_back(dot), slopes.push_back(slope), dots.push_back(dp), dot_sizes.push_back(dp_size),
                        at.push_back(j);
                    top = std::max(top, dot);
                }
                if (top == -INFINITY) continue;
                double total = std::exp(sink - top);
                for (double& score : scores) total += score = std::exp(score - top);
                std::vector<double> keeps;
                for (const int64_t j : at) keeps.push_back(kept(c, {s.batch, h, i, p, j, s.k_count}));
                for (size_t n = 0; n < at.size(); ++n) dots[n] *= keeps[n], dot_sizes[n] *= keeps[n];
                for (size_t n = 0; n < at.size(); ++n)
                    delta += scores[n] / total * dots[n], sizes += scores[n] / total * dot_sizes[n];
                if (c.sinks.slab)
                    d_sinks[static_cast<size_t>(h)].add(-std::exp(sink - top) / total * delta,
                                                        std::exp(sink - top) / total * sizes);
                for (size_t n = 0; n < at.size(); ++n) {
                    const int64_t j = at[n];
                    const double prob = scores[n] / total, ds = prob * (dots[n] - delta),
                                 ds_size = prob * (dot_sizes[n] + sizes);
                    for (int64_t d = 0; d < z.Dv; ++d) {
                        const double y = prob * keeps[n] * x.d_out.get({s.batch, h, row, d});
                        d_v[static_cast<size_t>(((s.batch * z.Hkv + g) * z.Lk + j) * z.Dv + d)].add(y, std::fabs(y));
                    }
                    for (size_t t = 0; t < d_bias.size(); ++t) {
                        const int64_t* stride = x.terms[t].stride;
                        const qkv::Bias& bias = c.terms[t];
                        double sign = 1;
                        int64_t to = h * stride[1];
                        if (bias.kind == qkv::BiasKind::alibi)
                            sign = -static_cast<double>(std::abs(p - j));
                        else if (bias.kind == qkv::BiasKind::relative)
                            to += (std::clamp(j - p, -bias.reach, bias.reach) + bias.reach) * stride[3];
                        else
                            to += s.batch * stride[0] + i * stride[2] + j * stride[3];
                        d_bias[t][static_cast<size_t>(to)].add(sign * ds, std::fabs(sign) * ds_size);
                    }
                    for (int64_t d = 0; d < z.D; ++d) {
                        const double a = c.a.scale * ds * slopes[n], size = std::fabs(c.a.scale) * ds_size;
                        const double k = c.k.get({s.batch, g, j, d}), q = c.q.get({s.batch, h, row, d});
                        d_q[static_cast<size_t>(((s.batch * z.Hq + h) * z.Lq + row) * z.D + d)].add(
                            a * k, size * std::fabs(k));
                        d_k[static_cast<size_t>(((s.batch * z.Hkv + g) * z.Lk + j) * z.D + d)].add(a * q,
                                                                                                   size * std::fabs(q));
                    }
                }
            }
    // Long sums in the accumulation type: the rule of the gate, and a term for their length.
    const double terms = static_cast<double>(std::max(z.Lk, z.Lq * z.group()));
    const double relative =
        2 * limit.eps + limit.eps_acc * (8 * (1 + spread) + std::sqrt(terms) + std::min(terms, 64.0) / 8);
    char text[160];
    const auto wrong = [&](const char* name, double got, const Sum& want) {
        // Weights below the smallest number count as 0, and are multiplied by what else is in the formula.
        const double bound = relative * want.size + limit.tiny * (1 + terms) * 16 * (1 + std::fabs(c.a.scale));
        if (std::fabs(got - want.value) <= bound) return false;
        std::snprintf(text, sizeof text, "%s = %.9g, wanted %.9g: off by %.3g, allowed %.3g", name, got, want.value,
                      std::fabs(got - want.value), bound);
        return true;
    };
    for (const auto& [array, sums, name] :
         {std::tuple{&x.d_q, &d_q, "d_q"}, std::tuple{&x.d_k, &d_k, "d_k"}, std::tuple{&x.d_v, &d_v, "d_v"}}) {
        std::vector<bool> used(static_cast<size_t>(array->extent));
        for (const qkv::Sequence& s : c.sequences)
            for (int64_t h = 0; h < array->size[1]; ++h)
                for (int64_t i = 0; i < (array == &x.d_q ? s.q_count : s.k_count); ++i)
                    for (int64_t d = 0; d < array->size[3]; ++d) {
                        const int64_t row = array == &x.d_q ? s.q_first + i : i;
                        used[static_cast<size_t>(array->offset({s.batch, h, row, d}))] = true;
                        const Sum& want = (*sums)[static_cast<size_t>(
                            ((s.batch * array->size[1] + h) * array->size[2] + row) * array->size[3] + d)];
                        if (wrong(name, array->get({s.batch, h, row, d}), want)) return text;
                    }
        const std::string fault = untouched(*array, used, name);
        if (!fault.empty()) return fault;
    }
    for (size_t t = 0; t < d_bias.size(); ++t)
        for (size_t n = 0; n < d_bias[t].size(); ++n)
            if (wrong("d_bias", x.d_bias[t][n], d_bias[t][n])) return text;
    for (size_t h = 0; h < d_sinks.size() && c.sinks.slab; ++h)
        if (wrong("d_sinks", x.d_sinks[h], d_sinks[h])) return text;
    return "";
}

}  // namespace stress
