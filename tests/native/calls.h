// Random calls, the definition that they are compared with, and the comparison.
#pragma once
#include <string>
#include <thread>

#include "masks.h"
#include "runtime/pool.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace stress {

struct Paged;  // pages.h

struct Call {
    std::shared_ptr<Paged> paged;
    Sizes z{};
    Type type = Type::f32;
    std::string isa;
    Array q, k, v, out, lse, sinks;
    std::vector<Array> bias;
    std::vector<std::shared_ptr<Slab>> positions;
    std::shared_ptr<Slab> state;
    std::vector<qkv::Sequence> sequences;
    std::vector<qkv::Bias> terms;
    bool has_mask = false, poisoned = false, view = false;
    Mask mask;
    Lowered lowered;
    qkv::Attention a{};
};

inline int64_t random_size(Random& random, int64_t most) {
    if (random.chance(0.03)) return 0;
    if (random.chance(0.35)) return random.in(1, std::min<int64_t>(most, 12));
    int64_t n = random.pick<int64_t>({1,   15,  16,  17,  31,  32,  33,  47,  48,  49,  63,  64,  65,   95,   96,  97,
                                      143, 145, 191, 192, 193, 255, 257, 383, 385, 511, 512, 513, 1023, 1025, 1537});
    if (random.chance(0.2)) n = random.in(1, most);
    return std::min(n, most);
}

inline Sizes random_sizes(Random& random, double budget) {
    for (;;) {
        Sizes z{};
        z.B = random.chance(0.6) ? 1 : random.in(2, 4);
        z.Hkv = random.chance(0.02) ? 0 : random.in(1, 3);
        z.Hq = z.Hkv * random.pick<int64_t>({1, 1, 1, 2, 3, 4, 7, 8, 16});
        z.Lq = random.chance(0.4) ? random.in(1, 4) : random_size(random, 600);
        z.Lk = random_size(random, 4000);
        const auto width = [&] {
            return random.chance(0.5) ? random.pick<int64_t>({1,  2,  3,  8,  15, 16,  17,  31,  32,  33,  48,
                                                              63, 64, 65, 80, 96, 127, 128, 129, 192, 255, 256})
                                      : random.in(1, 160);
        };
        z.D = width();
        z.Dv = random.chance(0.5) ? z.D : width();
        if (random.chance(0.02)) z.Dv = 0;
        if (random.chance(0.03)) z.D = 576, z.Dv = 512;
        const double work =
            static_cast<double>(z.B * z.Hq) * static_cast<double>(z.Lq * z.Lk) * static_cast<double>(z.D + z.Dv);
        if (work <= budget && z.Lk * z.B * z.Hkv * (z.D + z.Dv) < 8000000) return z;
    }
}

inline void fill(Random& random, Array& x, double size) {
    for (int64_t b = 0; b < x.size[0]; ++b)
        for (int64_t h = 0; h < x.size[1]; ++h)
            for (int64_t i = 0; i < x.size[2]; ++i)
                for (int64_t d = 0; d < x.size[3]; ++d) x.set({b, h, i, d}, size * random.normal());
}

inline Guard random_guard(Random& random) {
    return random.pick({Guard::heap, Guard::heap, Guard::after, Guard::before});
}

inline void add_bias(Random& random, Call& c, bool packed) {
    const Sizes& z = c.z;
    const Type type = random.chance(0.5) ? c.type : static_cast<Type>(random.in(0, 3));
    qkv::Bias bias{
        static_cast<qkv::BiasKind>(packed ? random.in(1, 2) : random.in(0, 2)), type, nullptr, {0, 0, 0, 0}, 0};
    Array x;
    if (bias.kind == qkv::BiasKind::tensor) {
        const std::vector<int64_t> size{random.chance(0.6) ? z.B : 1, random.chance(0.6) ? z.Hq : 1,
                                        random.chance(0.8) ? z.Lq : 1, random.chance(0.8) ? z.Lk : 1};
        x = make_array(random, type, size, {true, true}, random_guard(random), kNaNFill);
        fill(random, x, 1.5);
        if (x.extent > 0 && random.chance(0.3))
            for (int64_t n = random.in(1, 200); n > 0; --n)
                x.set({random.in(0, size[0] - 1), random.in(0, size[1] - 1), random.in(0, size[2] - 1),
                       random.in(0, size[3] - 1)},
                      -INFINITY);
        for (size_t d = 0; d < 4; ++d) {
            if (size[d] == 1) x.stride[d] = 0;
            bias.stride[d] = x.stride[d];
        }
    } else {
        bias.reach = bias.kind == qkv::BiasKind::relative ? random.in(0, random.chance(0.5) ? 8 : z.Lk + 5) : 0;
        const int64_t entries = bias.kind == qkv::BiasKind::relative ? 2 * bias.reach + 1 : 1;
        x = make_array(random, type, {1, z.Hq, 1, entries}, {false, false}, random_guard(random), kNaNFill);
        fill(random, x, bias.kind == qkv::BiasKind::alibi ? 0.1 : 1.5);
        bias.stride[1] = x.stride[1];
        bias.stride[3] = bias.kind == qkv::BiasKind::relative ? x.stride[3] : 0;
    }
    bias.data = x.slab->data();
    c.bias.push_back(x);
    c.terms.push_back(bias);
}

inline void poison(Random& random, Array& x) {
    if (x.extent == 0 || x.size[3] == 0) return;
    for (int64_t n = random.in(1, 6); n > 0; --n)
        x.set({random.in(0, x.size[0] - 1), random.in(0, x.size[1] - 1), random.in(0, x.size[2] - 1),
               random.in(0, x.size[3] - 1)},
              random.pick<double>({NAN, INFINITY, -INFINITY}));
}

inline std::vector<std::string> sets() {
    std::vector<std::string> names;
    for (const char* at = qkv::instruction_sets(); *at != 0;) {
        const char* end = at + std::strcspn(at, ",");
        names.emplace_back(at, end);
        at = *end ? end + 1 : end;
    }
    return names;
}

inline void make_inputs(Random& random, Call& c, bool ragged, double size) {
    const Sizes& z = c.z;
    const Layout any{true, true};
    c.q = make_array(random, c.type, {z.B, z.Hq, z.Lq, z.D}, any, random_guard(random), kNaNFill);
    c.k = make_array(random, c.type, {z.B, z.Hkv, z.Lk, z.D}, any, random_guard(random), kNaNFill);
    fill(random, c.q, size);
    fill(random, c.k, size);
    c.view = z.Dv <= z.D && random.chance(z.D > 256 ? 0.8 : 0.1);
    if (c.view) {
        c.v = c.k;
        c.v.size[3] = z.Dv;
    } else {
        c.v = make_array(random, c.type, {z.B, z.Hkv, z.Lk, z.Dv}, any, random_guard(random), kNaNFill);
        fill(random, c.v, 1);
    }
    c.poisoned = random.chance(0.15);
    if (c.poisoned && random.chance(0.6)) poison(random, c.v);
    if (c.poisoned && random.chance(0.5)) poison(random, c.k);
    c.out = make_array(random, c.type, {z.B, z.Hq, z.Lq, z.Dv}, {false, true}, random_guard(random), kOutputFill);
    const Type type = c.type == Type::f64 ? Type::f64 : Type::f32;
    if (random.chance(0.6))
        c.lse = make_array(random, type, {z.B, z.Hq, z.Lq}, {false, true}, random_guard(random), kOutputFill);
    for (int64_t b = 0; b < z.B; ++b) {
        qkv::Sequence s{};
        s.q_count = ragged ? random.in(0, z.Lq) : z.Lq;
        s.q_first = ragged ? random.in(0, z.Lq - s.q_count) : 0;
        s.k_count = ragged ? random.in(0, z.Lk) : z.Lk;
        s.batch = b;
        s.position = random.chance(0.5) ? z.Lk - z.Lq : random.in(-5, z.Lk + 5);
        if (random.chance(0.2)) {
            auto slab = std::make_shared<Slab>(8 * s.q_count, random_guard(random), 0);
            for (int64_t i = 0; i < s.q_count; ++i) {
                const int64_t p = random.chance(0.7) ? i + s.position : random.in(-40, z.Lk + 40);
                std::memcpy(slab->data() + 8 * i, &p, 8);
            }
            s.positions = reinterpret_cast<const int64_t*>(slab->data());
            c.positions.push_back(slab);
        }
        // An empty tensor has no address.
        s.k = c.k.extent ? c.k.at(c.k.offset({b, 0, 0, 0})) : nullptr;
        s.v = c.v.extent ? c.v.at(c.v.offset({b, 0, 0, 0})) : nullptr;
        c.sequences.push_back(s);
    }
}

inline void lower_mask(Call& c, Guard guard, bool roomy = false) {
    c.lowered = {};
    c.lowered.roomy = roomy;
    lower(c.mask, c.lowered, guard);
    // The words too lie in memory of their exact size.
    auto slab = std::make_shared<Slab>(static_cast<int64_t>(c.lowered.words.size()) * 8, guard, 0);
    if (!c.lowered.words.empty()) std::memcpy(slab->data(), c.lowered.words.data(), slab->size());
    c.lowered.memory.push_back(slab);
    c.a.program = reinterpret_cast<const int64_t*>(slab->data());
    c.a.program_length = static_cast<int64_t>(c.lowered.words.size());
    c.a.operands = c.lowered.operands.data();
    c.a.operand_count = static_cast<int64_t>(c.lowered.operands.size());
}

inline void make_call(Random& random, Call& c, double budget, const std::string& isa) {
    c.z = random_sizes(random, budget);
    c.type = static_cast<Type>(random.in(0, 3));
    const auto names = sets();
    c.isa = isa.empty() ? names[static_cast<size_t>(random.in(0, static_cast<int64_t>(names.size()) - 1))] : isa;
    const bool ragged = random.chance(0.2);
    const double root = std::sqrt(std::sqrt(static_cast<double>(c.z.D)));
    make_inputs(random, c, ragged, random.pick<double>({1, 1, 2, 0.1}) / (random.chance(0.9) ? 1 : root));
    c.has_mask = random.chance(0.8);
    if (c.has_mask) {
        c.mask = random_mask(random, c.z, ragged, static_cast<int>(random.in(0, 3)));
        lower_mask(c, random_guard(random));
    }
    for (int64_t n = random.chance(0.6) ? 0 : random.in(1, 3); n > 0; --n) add_bias(random, c, ragged);
    if (random.chance(0.25)) {
        c.sinks = make_array(random, random.chance(0.5) ? c.type : static_cast<Type>(random.in(0, 3)), {c.z.Hq},
                             {false, false}, random_guard(random), kNaNFill);
        for (int64_t h = 0; h < c.z.Hq; ++h) c.sinks.set({h}, random.chance(0.1) ? -INFINITY : 2 * random.normal());
    }
    qkv::Attention& a = c.a;
    a.size = sizeof a;
    a.q_type = a.kv_type = c.type;
    a.Hq = c.z.Hq, a.Hkv = c.z.Hkv, a.D = c.z.D, a.Dv = c.z.Dv;
    a.q = c.q.extent ? c.q.slab->data() : nullptr;
    a.out = c.out.extent ? c.out.slab->data() : nullptr;
    for (size_t d = 0; d < 4; ++d) a.q_stride[d] = c.q.stride[d], a.out_stride[d] = c.out.stride[d];
    for (size_t d = 0; d < 3; ++d) a.k_stride[d] = c.k.stride[d + 1], a.v_stride[d] = c.v.stride[d + 1];
    if (c.lse.slab) {
        a.lse = c.lse.slab->data();
        for (size_t d = 0; d < 3; ++d) a.lse_stride[d] = c.lse.stride[d];
        if (random.chance(0.7)) {
            c.state =
                std::make_shared<Slab>(2 * c.lse.extent * bytes_of(c.lse.type), random_guard(random), kOutputFill);
            a.state = c.state->data();
            a.state_step = c.lse.extent;
        }
    }
    a.dropout_scale = 1;
    if (!c.poisoned && random.chance(0.15)) {
        const double p = random.pick<double>({0.1, 0.5, 0.9});
        a.dropout_below = static_cast<uint64_t>(std::nearbyint(p * 0x1p53)), a.dropout_scale = 1 / (1 - p);
        a.dropout_seed = static_cast<uint64_t>(random.in(-1000, 1000));
    }
    a.sequences = c.sequences.data();
    a.sequence_count = static_cast<int64_t>(c.sequences.size());
    a.scale = random.chance(0.8) ? 1 / std::sqrt(static_cast<double>(c.z.D))
                                 : random.pick<double>({1, -0.3, 0, 3, 1e-35, -1, 0.125});
    a.softcap = random.chance(0.2) ? random.pick<double>({0.5, 5, 30, 50}) : 0;
    if (c.sinks.slab) a.sinks = c.sinks.slab->data(), a.sink_type = c.sinks.type, a.sink_stride = c.sinks.stride[0];
    a.bias = c.terms.data();
    a.bias_count = static_cast<int64_t>(c.terms.size());
    a.threads = static_cast<int32_t>(random.in(1, 4));
}

// ---------------------------------------------------------------------------------------------------- the definition
template <class R>
struct Row {
    std::vector<R> out, weight, lost;  // out, P @ |V|, and the part of it that may vanish
    R lse, spread, largest;
    bool seen, nan, unspecified;
};

template <class R>
R bias_of(const Call& c, const Where& w, R& size) {
    R sum = 0;
    for (size_t n = 0; n < c.terms.size(); ++n) {
        const qkv::Bias& t = c.terms[n];
        const Array& x = c.bias[n];
        R value;
        if (t.kind == qkv::BiasKind::alibi) {
            value = -static_cast<R>(x.get({0, w.h, 0, 0})) * static_cast<R>(std::abs(w.p - w.j));
        } else if (t.kind == qkv::BiasKind::relative) {
            value = static_cast<R>(x.get({0, w.h, 0, std::clamp(w.j - w.p, -t.reach, t.reach) + t.reach}));
        } else {
            value = static_cast<R>(x.get({w.b, w.h, w.i, w.j}));
        }
        sum += value;
        size += std::fabs(value);
    }
    return sum;
}

// What dropout makes of the weight of a query and a key.
inline double kept(const Call& c, const Where& w) {
    if (c.a.dropout_below == 0) return 1;
    uint64_t x = c.a.dropout_seed;
    for (const int64_t index : {w.b, w.h, w.i, w.j}) {
        x += (static_cast<uint64_t>(index) + 1) * 0x9E3779B97F4A7C15u;
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
        x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
        x ^= x >> 31;
    }
    return (x >> 11) >= c.a.dropout_below ? c.a.dropout_scale : 0;
}

template <class R>
Row<R> define(const Call& c, const qkv::Sequence& s, int64_t h, int64_t i, const std::vector<R>& keys,
              const std::vector<R>& values) {
    const Sizes& z = c.z;
    const R infinity = INFINITY;
    const std::vector<R> none(static_cast<size_t>(z.Dv));
    Row<R> row{none, none, none, -infinity, 0, 0, false, false, false};
    std::vector<R> q(static_cast<size_t>(z.D)), scores;
    std::vector<int64_t> at;
    for (int64_t d = 0; d < z.D; ++d)
        q[static_cast<size_t>(d)] = static_cast<R>(c.q.get({s.batch, h, s.q_first + i, d}));
    const int64_t p = s.positions ? s.positions[i] : s.position + i;
    R top = c.sinks.slab ? static_cast<R>(c.sinks.get({h})) : -infinity;
    const R sink = top;
    for (int64_t j = 0; j < s.k_count; ++j) {
        const Where w{s.batch, h, i, p, j, s.k_count};
        if (c.has_mask && !visible(c.mask, w)) continue;
        R dot = 0, size = 0;
        for (int64_t d = 0; d < z.D; ++d) {
            const R x = q[static_cast<size_t>(d)] * keys[static_cast<size_t>(j * z.D + d)];
            dot += x;
            size += std::fabs(x);
        }
        size *= static_cast<R>(std::fabs(c.a.scale));
        R x = dot * static_cast<R>(c.a.scale);
        if (c.a.softcap > 0) x = static_cast<R>(c.a.softcap) * std::tanh(x / static_cast<R>(c.a.softcap));
        if (c.a.softcap > 0 && !std::isfinite(size)) size = static_cast<R>(c.a.softcap);  // an infinite score, capped
        const R add = bias_of<R>(c, w, size);
        if (add == -infinity) continue;
        x += add;
        row.seen = true;
        if (std::isfinite(size)) row.spread = std::max(row.spread, size);
        if (x != x || x == infinity) row.nan = true;
        if (x == -infinity) row.unspecified = c.poisoned;
        scores.push_back(x);
        at.push_back(j);
        top = std::max(top, x);
    }
    R total = 0;
    if (top == -infinity) return row;
    for (auto& x : scores) total += x = std::exp(x - top);
    total += std::exp(sink - top);
    row.lse = top + std::log(total);
    // A weight below the smallest normal number may count as 0 (the largest is 1 before all are divided by their sum).
    // Twice that number: whether an exponential is just above it is a matter of rounding.
    const R smallest = static_cast<R>(c.type == Type::f64 ? 0x1p-1022 : 0x1p-126);
    for (size_t n = 0; n < at.size(); ++n) {
        const bool may_vanish = scores[n] < 2 * smallest;
        const R weight = scores[n] / total * static_cast<R>(kept(c, {s.batch, h, i, p, at[n], s.k_count}));
        for (int64_t d = 0; d < z.Dv; ++d) {
            const R v = values[static_cast<size_t>(at[n] * z.Dv + d)];
            row.out[static_cast<size_t>(d)] += weight * v;
            row.weight[static_cast<size_t>(d)] += weight * std::fabs(v);
            if (may_vanish && std::isfinite(v)) row.lost[static_cast<size_t>(d)] += weight * std::fabs(v);
            if (std::isfinite(v)) row.largest = std::max(row.largest, std::fabs(v));
        }
    }
    return row;
}

// ---------------------------------------------------------------------------------------------------- the comparison
struct Limits {
    double eps, eps_acc, tiny;
};
inline Limits limits(Type type) {
    switch (type) {
        case Type::f32: return {0x1p-23, 0x1p-23, 0x1p-126};
        case Type::bf16: return {0x1p-7, 0x1p-23, 0x1p-126};
        case Type::f16: return {0x1p-10, 0x1p-23, 0x1p-24};
        default: return {0x1p-52, 0x1p-52, 0x1p-1022};
    }
}

// Whether every byte of `x` outside the elements in `used` still holds the fill.
inline std::string untouched(const Array& x, const std::vector<bool>& used, const char* name) {
    const int64_t n = bytes_of(x.type);
    for (int64_t e = 0; e < x.extent; ++e)
        for (int64_t byte = 0; byte < n && !used[static_cast<size_t>(e)]; ++byte)
            if (static_cast<unsigned char>(x.at(e)[byte]) != kOutputFill)
                return std::string(name) + " was written outside its rows, at element " + std::to_string(e);
    return "";
}

// The outputs of a row. `loose`: the largest error in proportion to the rule among those that a longer sum explains
// (the rule has no term for the number of keys, which shows when the weights are flat and the scores small).
template <class R>
std::string compare_out(const Call& c, const qkv::Sequence& s, int64_t h, int64_t i, const Row<R>& row,
                        std::vector<bool>& used, double& loose) {
    const Limits limit = limits(c.type);
    const R relative = 2 * limit.eps + 4 * limit.eps_acc * (1 + row.spread);
    for (int64_t d = 0; d < c.z.Dv; ++d) {
        const int64_t e = c.out.offset({s.batch, h, s.q_first + i, d});
        used[static_cast<size_t>(e)] = true;
        const R got = decode(c.type, c.out.at(e)), want = row.out[static_cast<size_t>(d)];
        const R weight = row.weight[static_cast<size_t>(d)];
        const R bound =
            row.seen ? relative * weight + limit.tiny * (1 + row.largest) + row.lost[static_cast<size_t>(d)] : 0;
        const R error = std::fabs(got - want), keys_seen = static_cast<R>(s.k_count);
        const R sums = std::min<R>(keys_seen, 192) / 8 + std::sqrt(keys_seen) / 2;
        const R longer = bound + limit.eps_acc * sums * weight;
        bool ok = error <= (row.seen ? longer : 0);
        if (ok && error > bound) loose = std::max(loose, static_cast<double>(error / bound));
        if (row.nan)
            ok = got != got;
        else if (!std::isfinite(want))
            ok = !std::isfinite(got);
        if (ok || row.unspecified) continue;
        char text[200];
        std::snprintf(text, sizeof text, "out[%ld, %ld, %ld, %ld] = %.9g, wanted %.9g: off by %.3g, allowed %.3g",
                      long(s.batch), long(h), long(i), long(d), double(got), double(want), double(error),
                      double(bound));
        return text;
    }
    return "";
}

template <class R>
std::string compare_lse(const Call& c, const qkv::Sequence& s, int64_t h, int64_t i, const Row<R>& row,
                        std::vector<bool>& used) {
    const int64_t e = c.lse.offset({s.batch, h, s.q_first + i});
    used[static_cast<size_t>(e)] = true;
    const R got = decode(c.lse.type, c.lse.at(e)), error = std::fabs(got - row.lse);
    const R bound = 4 * limits(c.type).eps_acc * (1 + row.spread + std::fabs(row.lse));
    bool ok = got == row.lse;
    if (row.nan)
        ok = got != got;
    else if (std::isfinite(row.lse))
        ok = error <= bound;
    if (ok) return "";
    char text[200];
    std::snprintf(text, sizeof text, "lse[%ld, %ld, %ld] = %.9g, wanted %.9g: off by %.3g, allowed %.3g", long(s.batch),
                  long(h), long(i), double(got), double(row.lse), double(error), double(bound));
    return text;
}

template <class R>
std::string compare(const Call& c, double& loose) {
    const Sizes& z = c.z;
    std::vector<bool> used(static_cast<size_t>(c.out.extent));
    std::vector<bool> used_lse(static_cast<size_t>(c.lse.slab ? c.lse.extent : 0));
    for (const qkv::Sequence& s : c.sequences)
        for (int64_t g = 0; g < z.Hkv; ++g) {
            std::vector<R> keys, values;
            for (int64_t j = 0; j < s.k_count; ++j) {
                for (int64_t d = 0; d < z.D; ++d) keys.push_back(static_cast<R>(c.k.get({s.batch, g, j, d})));
                for (int64_t d = 0; d < z.Dv; ++d) values.push_back(static_cast<R>(c.v.get({s.batch, g, j, d})));
            }
            for (int64_t h = g * z.group(); h < (g + 1) * z.group(); ++h)
                for (int64_t i = 0; i < s.q_count; ++i) {
                    const Row<R> row = define<R>(c, s, h, i, keys, values);
                    std::string fault = compare_out(c, s, h, i, row, used, loose);
                    if (fault.empty() && c.lse.slab) fault = compare_lse(c, s, h, i, row, used_lse);
                    if (!fault.empty()) return fault;
                }
        }
    std::string fault = untouched(c.out, used, "out");
    if (fault.empty() && c.lse.slab) fault = untouched(c.lse, used_lse, "lse");
    return fault;
}

inline std::string check(const Call& c, double& loose) {
    return c.type == Type::f64 ? compare<long double>(c, loose) : compare<double>(c, loose);
}

inline void* open_scratch(size_t bytes) {
    void* at = qkv::scratch_memory(bytes);
#if defined(__SANITIZE_ADDRESS__)
    ASAN_UNPOISON_MEMORY_REGION(at, bytes);  // gaps of the last call
#endif
    return at;
}

// Leaves NaN in the memory that the next call of this thread will take.
inline void soil_scratch() {
    constexpr size_t kBytes = 1 << 20;
    std::memset(open_scratch(kBytes), kNaNFill, kBytes);
}

inline qkv::Status run(const Call& c) {
#if defined(__SANITIZE_ADDRESS__)
    open_scratch(2048);
#endif
    return qkv::attention(c.a, c.isa.c_str());
}

inline std::string describe(const Call& c) {
    static const char* const kNames[] = {"f32", "bf16", "f16", "f64"};
    char text[400];
    std::snprintf(text, sizeof text,
                  "%s %s B=%ld Hq=%ld Hkv=%ld Lq=%ld Lk=%ld D=%ld Dv=%ld%s scale=%g softcap=%g bias=%zu%s%s%s "
                  "threads=%d strides q=%ld k=%ld v=%ld out=%ld program:",
                  c.isa.c_str(), kNames[static_cast<int>(c.type)], long(c.z.B), long(c.z.Hq), long(c.z.Hkv),
                  long(c.z.Lq), long(c.z.Lk), long(c.z.D), long(c.z.Dv), c.view ? " (v in k)" : "", c.a.scale,
                  c.a.softcap, c.bias.size(), c.sinks.slab ? " sinks" : "", c.lse.slab ? " lse" : "",
                  c.poisoned ? " poisoned" : "", c.a.threads, long(c.q.stride[3]), long(c.k.stride[3]),
                  long(c.v.stride[3]), long(c.out.stride[3]));
    std::string all = text;
    for (int64_t i = 0; i < c.a.program_length && i < 60; ++i) all += " " + std::to_string(c.a.program[i]);
    if (c.a.page_size > 0)
        all += "; pages of " + std::to_string(c.a.page_size) + " type " + std::to_string(static_cast<int>(c.a.kv_type));
    for (const qkv::Sequence& s : c.sequences)
        all += "; rows " + std::to_string(s.q_first) + "+" + std::to_string(s.q_count) + " keys " +
               std::to_string(s.k_count) + " at " + (s.positions ? "array" : std::to_string(s.position));
    return all;
}

}  // namespace stress
