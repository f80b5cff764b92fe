// What the weights of random calls come to, against the definition.
#pragma once
#include <numeric>

#include "pages.h"

namespace stress {

// A call that is looked at: memory for all that is found of it.
struct Look {
    std::shared_ptr<Slab> observed, keys, weights, distance, mass, map;
    qkv::Observation o{};
};

inline void make_look(Random& random, Call& c, Look& x) {
    const int64_t rows = c.lse.extent, n = bytes_of(c.lse.type), heads = c.z.B * c.z.Hq;
    const auto slab = [&](int64_t bytes, int fill) {
        return std::make_shared<Slab>(bytes, random_guard(random), fill);
    };
    x.observed = slab(3 * rows * n, kOutputFill);
    c.a.observed = x.observed->data(), c.a.observed_step = rows;
    qkv::Observation& o = x.o;
    o.size = sizeof o;
    o.call = c.a;
    if (random.chance(0.3)) o.call.state = nullptr;  // they are found anew
    o.top = random.chance(0.2) ? 0 : random.pick<int64_t>({1, 2, 5, 8, 64});
    x.keys = slab(rows * o.top * 8, kOutputFill), x.weights = slab(rows * o.top * n, kOutputFill);
    o.top_keys = reinterpret_cast<int64_t*>(x.keys->data()), o.top_weights = x.weights->data();
    x.distance = slab(rows * n, kOutputFill), x.mass = slab(heads * c.z.Lk * 8, 0);
    if (random.chance(0.8)) o.distance = x.distance->data();
    if (random.chance(0.8)) o.mass = reinterpret_cast<double*>(x.mass->data());
    o.mass_stride[0] = c.z.Hq * c.z.Lk, o.mass_stride[1] = c.z.Lk;
    o.rows = random.in(1, 20), o.columns = random.in(1, 20);
    const int64_t bins = o.rows * o.columns;
    x.map = slab(heads * bins * 8, 0);
    if (random.chance(0.8)) o.map = reinterpret_cast<double*>(x.map->data());
    o.map_stride[0] = c.z.Hq * bins, o.map_stride[1] = bins, o.map_stride[2] = o.columns;
}

// All that was found, to be compared as bytes.
inline std::string bits_of(const Look& x) {
    std::string all;
    for (const auto& slab : {x.observed, x.keys, x.weights, x.distance, x.mass, x.map})
        all.append(slab->data(), slab->size());
    return all;
}

// The weights of a row, by the definition.
struct Weighed {
    std::vector<int64_t> at;
    std::vector<double> scores, weights;
    double sink = 0;   // its weight
    double error = 0;  // what a score may be off by
};

inline Weighed weigh(const Call& c, const qkv::Sequence& s, int64_t h, int64_t i, const std::vector<double>& keys) {
    Weighed row;
    const int64_t p = s.positions ? s.positions[i] : s.position + i;
    const double sink = c.sinks.slab ? c.sinks.get({h}) : -INFINITY;
    double top = sink, spread = 0, total = 0;
    for (int64_t j = 0; j < s.k_count; ++j) {
        const Where w{s.batch, h, i, p, j, s.k_count};
        if (c.has_mask && !visible(c.mask, w)) continue;
        double dot = 0, size = 0;
        for (int64_t d = 0; d < c.z.D; ++d) {
            const double x = c.q.get({s.batch, h, s.q_first + i, d}) * keys[static_cast<size_t>(j * c.z.D + d)];
            dot += x, size += std::fabs(x);
        }
        size *= std::fabs(c.a.scale);
        double x = dot * c.a.scale;
        if (c.a.softcap > 0) x = c.a.softcap * std::tanh(x / c.a.softcap);
        const double add = bias_of<double>(c, w, size);
        if (add == -INFINITY) continue;
        spread = std::max(spread, size);
        row.at.push_back(j), row.scores.push_back(x + add);
        top = std::max(top, x + add);
    }
    for (const double x : row.scores) row.weights.push_back(std::exp(x - top)), total += row.weights.back();
    row.sink = top == -INFINITY ? 0 : std::exp(sink - top);
    total += row.sink;
    for (double& x : row.weights) x /= total;
    if (total > 0) row.sink /= total;
    // As the rule has it, and a sum of so many weights.
    row.error = limits(c.type).eps_acc * (8 * (4 + spread) + std::sqrt(static_cast<double>(s.k_count)));
    return row;
}

// Compares what was found of each row, and adds up what is found of keys.
class LookJudge {
  public:
    LookJudge(const Call& call, const Look& look)
        : c_(call), x_(look), mass_(look.mass->size() / 8), map_(look.map->size() / 8) {}

    std::string fault() {
        for (const qkv::Sequence& s : c_.sequences)
            for (int64_t g = 0; g < c_.z.Hkv; ++g) {
                std::vector<double> keys;
                for (int64_t j = 0; j < s.k_count; ++j)
                    for (int64_t d = 0; d < c_.z.D; ++d) keys.push_back(c_.k.get({s.batch, g, j, d}));
                for (int64_t h = g * c_.z.group(); h < (g + 1) * c_.z.group(); ++h)
                    for (int64_t i = 0; i < s.q_count; ++i) row(s, h, i, weigh(c_, s, h, i, keys));
            }
        if (x_.o.mass != nullptr) sums("mass", mass_, x_.o.mass);
        if (x_.o.map != nullptr) sums("map", map_, x_.o.map);
        return fault_;
    }

  private:
    double number(const std::shared_ptr<Slab>& from, int64_t at) const {
        return decode(c_.lse.type, from->data() + at * bytes_of(c_.lse.type));
    }
    void expect(const char* name, int64_t at, double got, double want, double bound) {
        if (!fault_.empty() || got == want || std::fabs(got - want) <= bound) return;
        char text[200];
        std::snprintf(text, sizeof text, "%s at %ld is %.9g, wanted %.9g, allowed %.3g", name, long(at), got, want,
                      bound);
        fault_ = text;
    }

    void row(const qkv::Sequence& s, int64_t h, int64_t i, const Weighed& w) {
        const qkv::Observation& o = x_.o;
        const int64_t e = c_.lse.offset({s.batch, h, s.q_first + i}), step = c_.a.observed_step;
        const double tiny = 1e-30, off = std::expm1(std::min(2 * w.error, 50.0));
        const int64_t p = s.positions ? s.positions[i] : s.position + i;
        double best = -INFINITY, largest = 0, entropy = w.sink > 0 ? -w.sink * std::log(w.sink) : 0, away = 0, all = 0;
        const int64_t rows = std::min(o.rows, s.q_count), columns = std::min(o.columns, s.k_count);
        const int64_t head = s.batch * o.map_stride[0] + h * o.map_stride[1];
        for (size_t n = 0; n < w.at.size(); ++n) {
            const double x = w.weights[n];
            const int64_t j = w.at[n];
            best = std::max(best, w.scores[n]), largest = std::max(largest, x);
            if (x > 0) entropy -= x * std::log(x);
            away += x * static_cast<double>(std::abs(p - j)), all += x;
            mass_[static_cast<size_t>(s.batch * o.mass_stride[0] + h * o.mass_stride[1] + j)].add(x, x * off + tiny);
            const int64_t bin = head + i * rows / s.q_count * o.map_stride[2] + j * columns / s.k_count;
            map_[static_cast<size_t>(bin)].add(x, x * off + tiny);
        }
        expect("largest score", e, number(x_.observed, e), best, w.error * (1 + std::fabs(best)));
        expect("largest weight", e, number(x_.observed, e + step), largest, largest * off + tiny);
        expect("entropy", e, number(x_.observed, e + 2 * step), entropy, 2 * off * (1 + entropy));
        const double mean = all > 0 ? away / all : 0;
        // Weights that a small share of all is made of may have vanished.
        if (o.distance != nullptr && (all == 0 || all > 1e-20))
            expect("distance", e, number(x_.distance, e), mean, 2 * off * (1 + mean));
        if (o.top > 0) ranks(e, w, off, tiny);
    }

    // The best keys of a row: no score that was left out is larger, and equal ones go by key.
    void ranks(int64_t e, const Weighed& w, double off, double tiny) {
        std::vector<size_t> order(w.at.size());
        std::iota(order.begin(), order.end(), size_t(0));
        std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return w.scores[a] > w.scores[b]; });
        std::vector<bool> taken(w.at.size());
        for (int64_t n = 0; n < x_.o.top; ++n) {
            const int64_t key = x_.o.top_keys[e * x_.o.top + n];
            const auto found = std::lower_bound(w.at.begin(), w.at.end(), key);
            if (n >= static_cast<int64_t>(w.at.size())) {
                expect("no further key", e, static_cast<double>(key), -1, 0);
                expect("its weight", e, number(x_.weights, e * x_.o.top + n), 0, 0);
                continue;
            }
            const bool seen = found != w.at.end() && *found == key;
            const size_t at = static_cast<size_t>(found - w.at.begin());
            if (!seen || taken[at]) {
                expect("a key that is not seen, or is there twice", e, static_cast<double>(key), NAN, 0);
                return;
            }
            taken[at] = true;
            const double want = w.scores[order[static_cast<size_t>(n)]];
            expect("a best key's score", e, w.scores[at], want, 2 * w.error * (1 + std::fabs(want)));
            if (n > 0 && w.scores[at] == last_ && key < last_key_ && exact_)
                expect("of equal scores the lower key", e, static_cast<double>(last_key_), static_cast<double>(key), 0);
            last_ = w.scores[at], last_key_ = key;
            expect("its weight", e, number(x_.weights, e * x_.o.top + n), w.weights[at], w.weights[at] * off + tiny);
        }
    }

    struct Total {
        double value = 0, bound = 0;
        void add(double x, double by) { value += x, bound += by; }
    };
    void sums(const char* name, const std::vector<Total>& want, const double* got) {
        for (size_t n = 0; n < want.size(); ++n)
            expect(name, static_cast<int64_t>(n), got[n], want[n].value, 2 * want[n].bound);
    }

    const Call& c_;
    const Look& x_;
    const bool exact_ = c_.a.scale == 0 && c_.terms.empty();  // all scores are 0
    std::vector<Total> mass_, map_;
    double last_ = 0;
    int64_t last_key_ = 0;
    std::string fault_;
};

}  // namespace stress
