// Random masks: as a tree, with its own evaluation, and as the words and operands that the kernels take.
#pragma once
#include <algorithm>
#include <cstdlib>

#include "memory.h"

namespace stress {

struct Sizes {
    int64_t B, Hq, Hkv, Lq, Lk, D, Dv;
    int64_t group() const { return Hkv > 0 ? Hq / Hkv : 0; }
};

struct Where {
    int64_t b, h, i, p, j, keys;  // keys: of this sequence
};

inline int64_t floored(int64_t a, int64_t b) { return (a - ((a % b) + b) % b) / b; }
inline int64_t modulo(int64_t a, int64_t b) { return ((a % b) + b) % b; }

struct Mask {
    int64_t op = 0;
    std::vector<int64_t> args;                 // the instruction's words after the opcode
    std::vector<std::vector<int64_t>> tables;  // what it reads, in the order of the operands
    std::vector<Mask> parts;                   // of AND, OR, NOT, PER_HEAD, PORTION
    int64_t shared = 1;                        // query heads that read one list, of SELECTED
};

inline int64_t batch_entry(const std::vector<int64_t>& table, int64_t b) {
    return table[table.size() > 1 ? static_cast<size_t>(b) : 0];
}

inline bool in_documents(const Mask& m, const Where& w) {
    const int64_t rows = m.args[4], length = m.args[5], x = m.args[0] ? w.i : w.p;
    if (x < 0 || x >= length) return false;
    const size_t at = static_cast<size_t>((rows > 1 ? w.b : 0) * length + x);
    if (w.j < m.tables[0][at] || w.j >= m.tables[1][at]) return false;
    if (m.args[1]) return true;
    const int64_t id = m.tables[2][at];
    return id >= 0 && m.tables[3][static_cast<size_t>((m.args[8] > 1 ? w.b : 0) * w.keys + w.j)] == id;
}

inline bool in_random_blocks(const Mask& m, const Where& w) {
    const int64_t block = m.args[1], blocks = (w.keys + block - 1) / block, draws = std::min(m.args[0], blocks);
    std::vector<int64_t> drawn;
    for (int64_t t = blocks - draws; t < blocks; ++t) {
        uint64_t x = static_cast<uint64_t>(m.args[2]) * 0x9E3779B97F4A7C15u +
                     static_cast<uint64_t>(floored(w.p, block)) * 0xBF58476D1CE4E5B9u +
                     static_cast<uint64_t>(t) * 0x94D049BB133111EBu;
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;
        x = (x ^ x >> 27) * 0x94D049BB133111EBu;
        x ^= x >> 31;
        const int64_t pick = static_cast<int64_t>(x % static_cast<uint64_t>(t + 1));
        drawn.push_back(std::find(drawn.begin(), drawn.end(), pick) == drawn.end() ? pick : t);
    }
    return std::find(drawn.begin(), drawn.end(), w.j / block) != drawn.end();
}

inline bool visible(const Mask& m, const Where& w) {
    const auto& a = m.args;
    switch (m.op) {
        case qkv::kMaskAll: return true;
        case qkv::kMaskWindow: return (a[0] < 0 || w.j >= w.p - a[0]) && (a[1] < 0 || w.j <= w.p + a[1]);
        case qkv::kMaskPrefix: return w.j < (a[1] < 0 ? a[0] : batch_entry(m.tables[0], w.b));
        case qkv::kMaskPadding: {
            const int64_t n = batch_entry(m.tables[0], w.b);
            return a[1] ? w.j >= w.keys - n : w.j < n;
        }
        case qkv::kMaskDocuments: return in_documents(m, w);
        case qkv::kMaskChunked: return floored(w.p, a[0]) == floored(w.j, a[0]);
        case qkv::kMaskStrided: return modulo(w.p - w.j - a[1], a[0]) == 0;
        case qkv::kMaskDilated: return std::abs(w.p - w.j) <= a[0] * a[1] && modulo(w.p - w.j, a[1]) == 0;
        case qkv::kMaskGlobal: {
            const auto has = [&](int64_t x) {
                return std::find(m.tables[0].begin(), m.tables[0].end(), x) != m.tables[0].end();
            };
            return has(w.p) || has(w.j);
        }
        case qkv::kMaskRandom: return in_random_blocks(m, w);
        case qkv::kMaskBlocks: {
            const int64_t row = floored(w.p, a[5]), column = w.j / a[5];
            if (row < 0 || row >= a[3] || column >= a[4]) return false;
            const int64_t b = a[1] > 1 ? w.b : 0, h = a[2] > 1 ? w.h : 0;
            return m.tables[0][static_cast<size_t>(((b * a[2] + h) * a[3] + row) * a[4] + column)] != 0;
        }
        case qkv::kMaskPerHead: return visible(m.parts[static_cast<size_t>(w.h)], w);
        case qkv::kMaskPortion: return visible(m.parts[0], {w.b, w.h, w.i + a[1], w.p + a[0], w.j + a[0], a[3]});
        case qkv::kMaskDense:
            return m.tables[0][static_cast<size_t>(w.b * a[1] + w.h * a[2] + w.i * a[3] + w.j * a[4])] != 0;
        case qkv::kMaskSelected: {
            const int64_t line = ((a[2] > 1 ? w.b : 0) * a[3] + w.h / m.shared) * a[4] + w.i / a[7];
            const auto from = m.tables[0].begin() + line * a[5];
            return std::find(from, from + a[5], w.j / a[6]) != from + a[5];
        }
        case qkv::kMaskAnd: return visible(m.parts[0], w) && visible(m.parts[1], w);
        case qkv::kMaskOr: return visible(m.parts[0], w) || visible(m.parts[1], w);
        case qkv::kMaskNot: return !visible(m.parts[0], w);
        default: std::abort();  // a kind that is only half here
    }
}

// What a call takes: words, and operands in memory of their exact size.
struct Lowered {
    std::vector<int64_t> words;
    std::vector<qkv::Operand> operands;
    std::vector<std::shared_ptr<Slab>> memory;
    bool roomy =
        false;  // flags lie in as many bytes as integers would: a changed program may take one operand for another
};

inline int64_t add_operand(Lowered& to, const std::vector<int64_t>& table, int64_t bytes, Guard guard) {
    auto slab = std::make_shared<Slab>(static_cast<int64_t>(table.size()) * (to.roomy ? 8 : bytes),
                                       to.roomy ? Guard::heap : guard, 0);
    for (size_t i = 0; i < table.size(); ++i) {
        if (bytes == 1)
            slab->data()[i] = static_cast<char>(table[i]);
        else  // the low bytes stand first
            std::memcpy(slab->data() + static_cast<size_t>(bytes) * i, &table[i], static_cast<size_t>(bytes));
    }
    to.operands.push_back({slab->data(), static_cast<int64_t>(table.size())});
    to.memory.push_back(slab);
    return static_cast<int64_t>(to.operands.size()) - 1;
}

inline void lower(const Mask& m, Lowered& to, Guard guard) {
    if (m.op == qkv::kMaskPerHead) {
        to.words.push_back(m.op);
        to.words.push_back(static_cast<int64_t>(m.parts.size()));
        for (const Mask& part : m.parts) {
            const size_t at = to.words.size();
            to.words.push_back(0);
            lower(part, to, guard);
            to.words[at] = static_cast<int64_t>(to.words.size() - at - 1);
        }
        return;
    }
    if (m.op == qkv::kMaskPortion) {
        to.words.push_back(m.op);
        to.words.insert(to.words.end(), m.args.begin(), m.args.end());
        const size_t at = to.words.size();
        to.words.push_back(0);
        lower(m.parts[0], to, guard);
        to.words[at] = static_cast<int64_t>(to.words.size() - at - 1);
        return;
    }
    for (const Mask& part : m.parts) lower(part, to, guard);
    std::vector<int64_t> args = m.args;
    const bool flags = m.op == qkv::kMaskBlocks || m.op == qkv::kMaskDense;
    const int64_t bytes = flags ? 1 : m.op == qkv::kMaskSelected && args[1] == 0 ? 4 : 8;
    std::vector<int64_t> index;
    for (const auto& table : m.tables) index.push_back(add_operand(to, table, bytes, guard));
    switch (m.op) {
        case qkv::kMaskPrefix:
            if (!index.empty()) args[1] = index[0];
            break;
        case qkv::kMaskDocuments:
            args[2] = index[0], args[3] = index[1];
            args[6] = index.size() > 2 ? index[2] : -1, args[7] = index.size() > 2 ? index[3] : -1;
            break;
        default:
            if (!index.empty()) args[0] = index[0];
    }
    to.words.push_back(m.op);
    to.words.insert(to.words.end(), args.begin(), args.end());
}

inline std::vector<int64_t> table_of(Random& random, int64_t n, int64_t lo, int64_t hi) {
    std::vector<int64_t> table(static_cast<size_t>(n));
    for (auto& x : table) x = random.in(lo, hi);
    return table;
}

inline Mask random_documents(Random& random, const Sizes& z, bool ragged) {
    Mask m{qkv::kMaskDocuments, {}, {}, {}};
    const bool by_index = random.chance(0.4), contiguous = random.chance(0.5);
    const int64_t rows = random.chance(0.4) ? z.B : 1, length = by_index ? z.Lq : random.in(0, z.Lk + 20);
    const int64_t k_rows = !ragged && random.chance(0.4) ? z.B : 1, documents = random.in(1, 6);
    auto& t = m.tables;
    t.assign(contiguous ? 2 : 4, std::vector<int64_t>(static_cast<size_t>(rows * length)));
    if (contiguous) {
        std::vector<int64_t> cuts = table_of(random, documents + 1, 0, z.Lk);
        std::sort(cuts.begin(), cuts.end());
        for (size_t x = 0; x < t[0].size(); ++x) {
            const size_t d = static_cast<size_t>(random.chance(0.7) ? static_cast<int64_t>(x) * documents /
                                                                          std::max<int64_t>(1, rows * length)
                                                                    : random.in(0, documents - 1));
            const bool none = random.chance(0.05);
            t[0][x] = none ? 0 : cuts[d], t[1][x] = none ? 0 : cuts[d + 1];
        }
    } else {
        t[3] = table_of(random, k_rows * z.Lk, -1, documents);
        for (size_t x = 0; x < t[2].size(); ++x) {
            t[2][x] = random.in(-1, documents);
            int64_t lo = z.Lk, hi = 0;
            for (size_t y = 0; y < t[3].size(); ++y)
                if (t[3][y] == t[2][x]) {
                    lo = std::min(lo, static_cast<int64_t>(y) % z.Lk);
                    hi = std::max(hi, static_cast<int64_t>(y) % z.Lk + 1);
                }
            t[0][x] = lo < hi ? lo : 0, t[1][x] = lo < hi ? hi : 0;
        }
    }
    m.args = {by_index, contiguous, 0, 0, rows, length, -1, -1, k_rows};
    return m;
}

// The opcodes of masks that are no composition of & | ~.
inline int64_t random_leaf_opcode(Random& random) {
    static const std::vector<int64_t> leaves = [] {
#define QKV_OPCODE(name, opcode, ...) opcode,
        std::vector<int64_t> all{QKV_MASK_KINDS(QKV_OPCODE)};
#undef QKV_OPCODE
        std::erase_if(all, [](int64_t op) { return op >= qkv::kMaskAnd && op <= qkv::kMaskNot; });
        return all;
    }();
    return leaves[static_cast<size_t>(random.in(0, static_cast<int64_t>(leaves.size()) - 1))];
}

inline Mask random_global(Random& random, const Sizes& z) {
    Mask m{qkv::kMaskGlobal, {}, {}, {}};
    std::vector<int64_t> table = table_of(random, random.in(0, random.chance(0.8) ? 6 : 2 * z.Lk), -5, z.Lk + 10);
    std::sort(table.begin(), table.end());
    table.erase(std::unique(table.begin(), table.end()), table.end());
    m.tables = {table};
    m.args = {0};
    return m;
}

inline Mask random_block_map(Random& random, const Sizes& z) {
    Mask m{qkv::kMaskBlocks, {}, {}, {}};
    const int64_t block = random.pick<int64_t>({1, 2, 3, 16, 17, 32, 64});
    const int64_t rows_b = random.chance(0.5) ? z.B : 1, rows_h = random.chance(0.5) ? z.Hq : 1;
    const int64_t nq = random.in(0, (z.Lq + 20) / block + 2), nk = (z.Lk + block - 1) / block;
    m.tables = {table_of(random, rows_b * rows_h * nq * nk, 0, 1)};
    m.args = {0, rows_b, rows_h, nq, nk, block};
    return m;
}

inline Mask random_dense(Random& random, const Sizes& z) {
    Mask m{qkv::kMaskDense, {}, {}, {}};
    const std::vector<int64_t> size{random.chance(0.5) ? z.B : 1, random.chance(0.5) ? z.Hq : 1,
                                    random.chance(0.8) ? z.Lq : 1, z.Lk};
    std::vector<int64_t> stride = random_strides(random, size, {false, true});
    int64_t last = 0;
    bool empty = false;
    for (size_t d = 0; d < 4; ++d) {
        last += (size[d] - 1) * stride[d];
        empty |= size[d] == 0;
        if (size[d] == 1) stride[d] = 0;
    }
    m.tables = {table_of(random, empty ? 0 : last + 1, 0, random.chance(0.5) ? 1 : 3)};
    m.args = {0, stride[0], stride[1], stride[2], stride[3]};
    return m;
}

inline Mask random_selected(Random& random, const Sizes& z) {
    Mask m{qkv::kMaskSelected, {}, {}, {}};
    const int64_t block = random.pick<int64_t>({1, 2, 3, 16, 17, 64}), blocks = (z.Lk + block - 1) / block;
    const int64_t queries = random.pick<int64_t>({1, 1, 2, 7, 100}), rows = (z.Lq + queries - 1) / queries;
    const int64_t heads = random.chance(0.4) ? 1 : random.chance(0.5) ? z.Hq : z.Hkv;
    const int64_t rows_b = random.chance(0.5) ? z.B : 1, n = random.in(0, random.chance(0.8) ? 6 : 2 * blocks);
    m.shared = heads > 0 ? z.Hq / heads : 1;
    const int64_t more = random.chance(0.2), all = rows_b * std::max<int64_t>(heads, 1) * (rows + more);
    m.tables = {table_of(random, all * n, random.chance(0.5) ? 0 : -3, blocks + 2)};
    for (int64_t line = 0; line < all; ++line)
        std::sort(m.tables[0].begin() + line * n, m.tables[0].begin() + (line + 1) * n);
    m.args = {0, random.in(0, 1), rows_b, std::max<int64_t>(heads, 1), rows + more, n, block, queries};
    return m;
}

Mask random_leaf(Random& random, const Sizes& z, bool ragged, int nested = 0);

// All sequences are parts of one call, and count their keys from the same one.
inline Mask random_portion(Random& random, const Sizes& z, int nested) {
    Mask m{qkv::kMaskPortion, {}, {}, {}};
    const int64_t key = random.chance(0.3) ? 0 : random.in(1, 100), query = random.chance(0.3) ? 0 : random.in(1, 100);
    Sizes whole = z;
    whole.Lq += query + random.in(0, 9), whole.Lk += key + random.in(0, 40);
    m.args = {key, query, whole.Lq, whole.Lk};
    Mask part = random_leaf(random, whole, false, nested + 1);
    if (random.chance(0.4)) {
        Mask both{random.in(qkv::kMaskAnd, qkv::kMaskOr), {}, {}, {}};
        both.parts = {part, random_leaf(random, whole, false, nested + 1)};
        part = both;
    }
    m.parts = {part};
    return m;
}

// `nested` counts the per-head masks and portions around it: at most two.
inline Mask random_leaf(Random& random, const Sizes& z, bool ragged, int nested) {
    const int64_t n = z.Lk;
    Mask m{random_leaf_opcode(random), {}, {}, {}};
    while ((m.op == qkv::kMaskPerHead || m.op == qkv::kMaskPortion) && random.chance(nested == 0   ? 0
                                                                                     : nested == 1 ? 0.9
                                                                                                   : 1))
        m.op = random_leaf_opcode(random);
    const auto per_batch = [&](int64_t lo, int64_t hi) {
        m.tables.push_back(table_of(random, random.chance(0.5) ? z.B : 1, lo, hi));
    };
    switch (m.op) {
        case qkv::kMaskAll: break;
        case qkv::kMaskWindow: {
            const auto side = [&] { return random.chance(0.3) ? -1 : random.chance(0.3) ? 0 : random.in(0, n + 5); };
            m.args = {side(), side()};
            break;
        }
        case qkv::kMaskPrefix:
            m.args = {random.in(-3, n + 5), -1};
            if (random.chance(0.5)) per_batch(-3, n + 5);
            if (!m.tables.empty()) m.args[1] = 0;
            break;
        case qkv::kMaskPadding:
            per_batch(0, n + 3);
            m.args = {0, random.in(0, 1)};
            break;
        case qkv::kMaskDocuments: return random_documents(random, z, ragged);
        case qkv::kMaskChunked: m.args = {random.in(1, std::max<int64_t>(1, random.chance(0.5) ? 20 : n))}; break;
        case qkv::kMaskStrided:
            m.args = {random.in(1, random.chance(0.5) ? 4 : n + 2), random.in(-n - 2, n + 2)};
            break;
        case qkv::kMaskDilated:
            m.args = {random.in(0, random.chance(0.5) ? 8 : n), random.in(1, random.chance(0.7) ? 4 : n + 1)};
            break;
        case qkv::kMaskGlobal: return random_global(random, z);
        case qkv::kMaskRandom:
            m.args = {random.in(0, random.chance(0.8) ? 5 : 96), random.in(1, 40),
                      static_cast<int64_t>(random.word() >> 1)};
            break;
        case qkv::kMaskBlocks: return random_block_map(random, z);
        case qkv::kMaskPerHead:
            for (int64_t h = 0; h < z.Hq; ++h) {
                Mask part = random_leaf(random, z, ragged, nested + 1);
                if (random.chance(0.3)) {
                    Mask both{qkv::kMaskOr, {}, {}, {}};
                    both.parts = {part, random_leaf(random, z, ragged, nested + 1)};
                    part = both;
                }
                m.parts.push_back(part);
            }
            break;
        case qkv::kMaskPortion: return random_portion(random, z, nested);
        case qkv::kMaskDense: return random_dense(random, z);
        case qkv::kMaskSelected: return random_selected(random, z);
        default: std::abort();  // a kind that is only half here
    }
    return m;
}

inline Mask random_mask(Random& random, const Sizes& z, bool ragged, int depth) {
    if (depth == 0 || random.chance(0.4)) return random_leaf(random, z, ragged);
    Mask m{random.in(qkv::kMaskAnd, qkv::kMaskNot), {}, {}, {}};
    const int parts = m.op == qkv::kMaskNot ? 1 : 2;
    for (int i = 0; i < parts; ++i) m.parts.push_back(random_mask(random, z, ragged, depth - 1));
    return m;
}

}  // namespace stress
