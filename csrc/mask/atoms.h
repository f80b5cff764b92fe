// Evaluates single masks for a tile of query rows: the words of a mask program that are no composition.
#pragma once
#include <bit>
#include <numeric>

#include "mask/ranges.h"

namespace qkv {
namespace QKV_ISA {

inline constexpr int kMaxRows = 64;      // rows of a tile: one bit each
inline constexpr int kWindowKeys = 192;  // keys that bits are evaluated for at a time

// The rows of a tile. `which` chooses among them (per-head masks give each head's rows its own program).
struct Rows {
    int count;
    int64_t batch;
    int64_t key_count;
    int64_t position[kMaxRows];
    int64_t index[kMaxRows];
    int64_t head[kMaxRows];
};

// The bits of all rows of a tile.
QKV_INLINE uint64_t all_rows(const Rows& rows) {
    return rows.count == 64 ? ~UINT64_C(0) : (UINT64_C(1) << rows.count) - 1;
}

QKV_INLINE int64_t batch_of(const Rows& rows) { return rows.batch; }

QKV_INLINE uint64_t mix(int64_t seed, int64_t block, int64_t t) {
    uint64_t x = static_cast<uint64_t>(seed) * 0x9E3779B97F4A7C15u +
                 static_cast<uint64_t>(block) * 0xBF58476D1CE4E5B9u + static_cast<uint64_t>(t) * 0x94D049BB133111EBu;
    x ^= x >> 30;
    x *= 0xBF58476D1CE4E5B9u;
    x ^= x >> 27;
    x *= 0x94D049BB133111EBu;
    return x ^ x >> 31;
}

// What a mask program says of rows that see alike (pattern.h).
struct Pattern {
    // A row at position p sees no key but those that are p - offset modulo step; 1: no such thing is known.
    int64_t step = 1, offset = 0;
    // Rows of one block of positions see alike, in part of the program at least; 0: there are none.
    int64_t block = 0;
    // Queries, counted by index, that share a list of keys with the other heads of their group; 0: there are none.
    int64_t listed = 0;
    // A row sees no more keys than its lists name; kFar: not all of it goes by lists.
    int64_t most = kFar;
    // Whether heads may see other keys than each other.
    bool by_head = false;
};

// The keys that a row at position p sees are p - offset modulo step, and no more than `most`.
struct Comb {
    int64_t step, offset, most = kFar;
};

// Blocks of two sizes: those that tiles of both fit into.
inline void add_block(Pattern& to, int64_t block) { to.block = to.block == 0 ? block : std::gcd(to.block, block); }

inline Comb comb_of(const int64_t* w, Pattern& found) {
    switch (w[0]) {
        case kMaskStrided: return {w[1], w[2]};
        case kMaskDilated: return {w[2], 0};
        case kMaskBlocks: add_block(found, w[6]), found.by_head |= w[3] > 1; break;
        case kMaskRandom: add_block(found, w[2]); break;
        case kMaskChunked: add_block(found, w[1]); break;
        case kMaskSelected:
            found.listed = found.listed == 0 ? w[8] : std::gcd(found.listed, w[8]), found.by_head |= w[4] > 1;
            return {1, 0, w[6] < kFar / w[7] ? w[6] * w[7] : kFar};
        case kMaskDense: found.by_head |= w[3] != 0; break;
        default: break;
    }
    return {1, 0};
}

class Atoms {
  public:
    Atoms(const Operand* operands, int64_t heads) : operands_(operands), heads_(heads) {}

    // Of the rows `which`, and the keys that the sieve asks for: those that may be seen by any, and those that are seen
    // by all.
    void bounds(const int64_t* w, const Rows& rows, const Sieve& sieve, uint64_t which, Bounds& to) const {
        if (is_interval(w) || w[0] == kMaskDocuments) return interval_bounds(w, rows, sieve, which, to);
        to.seen.set(sieve.from, sieve.to);
        to.full.clear();
        switch (w[0]) {
            case kMaskStrided: return strided_bounds(w, rows, sieve, which, to);
            case kMaskDilated: return dilated_bounds(w, rows, sieve, which, to);
            case kMaskGlobal: return global_bounds(w, rows, sieve, which, to);
            case kMaskRandom: return random_bounds(w, rows, sieve, which, to);
            case kMaskBlocks: return blocks_bounds(w, rows, sieve, which, to);
            case kMaskSelected: return selected_bounds(w, rows, sieve, which, to);
            default: return;
        }
    }

    // words[j], j in [0, n): the rows of `which` that see the key at place x0 + j. words has n + 1 entries.
    void bits(const int64_t* w, const Rows& rows, const Sieve& sieve, uint64_t which, int64_t x0, int n,
              uint64_t* words) const {
        std::memset(words, 0, sizeof(uint64_t) * static_cast<size_t>(n + 1));
        const Some some{sieve, x0, n, words};
        if (is_interval(w)) return interval_bits(w, rows, which, some);
        switch (w[0]) {
            case kMaskDocuments: return documents_bits(w, rows, which, some);
            case kMaskStrided: return strided_bits(w, rows, which, some);
            case kMaskDilated: return dilated_bits(w, rows, which, some);
            case kMaskGlobal: return global_bits(w, rows, which, some);
            case kMaskRandom: return random_bits(w, rows, which, some);
            case kMaskBlocks: return blocks_bits(w, rows, which, some);
            case kMaskDense: return dense_bits(w, rows, which, some);
            case kMaskSelected: return selected_bits(w, rows, which, some);
            default: return;
        }
    }

  private:
    template <class T>
    const T* operand(int64_t i) const {
        return static_cast<const T*>(operands_[i].data);
    }

    template <class F>
    static QKV_INLINE void each(uint64_t which, F f) {
        for (; which; which &= which - 1) f(std::countr_zero(which));
    }

    // The key range of row r for the masks that are one interval a row.
    QKV_INLINE void interval(const int64_t* w, const Rows& rows, int r, int64_t& a, int64_t& b) const {
        const int64_t p = rows.position[r];
        switch (w[0]) {
            case kMaskWindow:
                a = w[1] < 0 ? -kFar : p - w[1];
                b = w[2] < 0 ? kFar : p + w[2] + 1;
                break;
            case kMaskPrefix:
                a = 0;
                b = w[2] < 0 ? w[1] : operand<int64_t>(w[2])[operands_[w[2]].count > 1 ? batch_of(rows) : 0];
                break;
            case kMaskPadding: {
                const int64_t n = operand<int64_t>(w[1])[operands_[w[1]].count > 1 ? batch_of(rows) : 0];
                const bool left = w[2] != 0;
                a = left ? rows.key_count - n : 0;
                b = left ? rows.key_count : n;
                break;
            }
            case kMaskDocuments: {
                const int64_t x = w[1] != 0 ? rows.index[r] : p;
                if (x < 0 || x >= w[6]) {
                    a = b = 0;
                    break;
                }
                const int64_t at = (w[5] > 1 ? batch_of(rows) : 0) * w[6] + x;
                a = operand<int64_t>(w[3])[at];
                b = operand<int64_t>(w[4])[at];
                break;
            }
            case kMaskChunked:
                a = floor_div(p, w[1]) * w[1];
                b = a + w[1];
                break;
            default: a = 0; b = kFar;
        }
    }

    static bool is_interval(const int64_t* w) {
        return w[0] <= kMaskPadding || w[0] == kMaskChunked || (w[0] == kMaskDocuments && w[2]);
    }

    const uint8_t* block_row(const int64_t* w, const Rows& rows, int r) const {
        const int64_t row = floor_div(rows.position[r], w[6]);
        if (row < 0 || row >= w[4]) return nullptr;
        const int64_t b = w[2] > 1 ? batch_of(rows) : 0, h = w[3] > 1 ? rows.head[r] : 0;
        return operand<uint8_t>(w[1]) + ((b * w[3] + h) * w[4] + row) * w[5];
    }

    // The number of the list of blocks that row r reads.
    int64_t list_of(const int64_t* w, const Rows& rows, int r) const {
        const int64_t b = w[3] > 1 ? batch_of(rows) : 0, h = rows.head[r] / (heads_ / w[4]);
        return (b * w[4] + h) * w[5] + rows.index[r] / w[8];
    }

    // Calls f(block) for the blocks of a list in [from, to), ascending and once each.
    template <class F>
    void each_listed(const int64_t* w, int64_t list, int64_t from, int64_t to, F f) const {
        const int64_t n = w[6];
        if (w[2] != 0)
            scan(operand<int64_t>(w[1]) + list * n, n, from, to, f);
        else
            scan(operand<int32_t>(w[1]) + list * n, n, from, to, f);
    }
    template <class T, class F>
    static QKV_INLINE void scan(const T* sorted, int64_t n, int64_t from, int64_t to, F f) {
        int64_t previous = -1;
        for (int64_t i = first_at(sorted, n, from); i < n && sorted[i] < to; ++i) {
            if (sorted[i] != previous && sorted[i] >= from) f(static_cast<int64_t>(sorted[i]));
            previous = sorted[i];
        }
    }

    // The place of the first number that is not below x.
    template <class T>
    static QKV_INLINE int64_t first_at(const T* sorted, int64_t n, int64_t x) {
        int64_t lo = 0, hi = n;
        while (lo < hi) {
            const int64_t mid = (lo + hi) / 2;
            if (sorted[mid] < x)
                lo = mid + 1;
            else
                hi = mid;
        }
        return lo;
    }

    // The chosen key blocks of query block qb, ascending, by Floyd's sampling. Returns how many.
    static int random_row(const int64_t* w, int64_t qb, int64_t key_count, int64_t* chosen, int capacity) {
        const int64_t blocks = (key_count + w[2] - 1) / w[2];
        const int64_t k = lower(w[1], blocks);
        if (k > capacity) return -1;
        int n = 0;
        for (int64_t t = blocks - k; t < blocks; ++t) {
            int64_t pick = static_cast<int64_t>(mix(w[3], qb, t) % static_cast<uint64_t>(t + 1));
            for (int i = 0; i < n; ++i)
                if (chosen[i] == pick) {
                    pick = t;
                    break;
                }
            int at = n++;
            for (; at > 0 && chosen[at - 1] > pick; --at) chosen[at] = chosen[at - 1];
            chosen[at] = pick;
        }
        return n;
    }

    void interval_bounds(const int64_t* w, const Rows& rows, const Sieve& sieve, uint64_t which, Bounds& to) const {
        const int64_t keys = rows.key_count;
        int64_t lo = kFar, hi = -kFar, lo_all = -kFar, hi_all = kFar;
        bool blind = false;
        each(which, [&](int r) {
            int64_t a, b;
            interval(w, rows, r, a, b);
            a = sieve.place(clamp(a, 0, keys));
            b = sieve.place(clamp(b, 0, keys));
            if (a < b) {
                lo = lower(lo, a);
                hi = upper(hi, b);
            } else {
                blind = true;
            }
            lo_all = upper(lo_all, a);
            hi_all = lower(hi_all, b);
        });
        to.seen.set(upper(lo, sieve.from), lower(hi, sieve.to));
        if (blind || !is_interval(w)) {
            to.full.clear();
        } else {
            to.full.set(upper(lo_all, sieve.from), lower(hi_all, sieve.to));
        }
    }

    // Where all keys of the sieve are alike modulo the mask's step, so that a row sees all of them or none.
    static bool alike(const Sieve& sieve, int64_t step) { return sieve.step % step == 0; }

    void strided_bounds(const int64_t* w, const Rows& rows, const Sieve& sieve, uint64_t which, Bounds& to) const {
        if (!alike(sieve, w[1])) return;
        bool any = false, every = true;
        each(which, [&](int r) {
            const bool in = floor_mod(rows.position[r] - w[2] - sieve.first, w[1]) == 0;
            any |= in;
            every &= in;
        });
        if (!any) to.seen.clear();
        if (every) to.full = to.seen;
    }

    void dilated_bounds(const int64_t* w, const Rows& rows, const Sieve& sieve, uint64_t which, Bounds& to) const {
        const int64_t keys = rows.key_count, reach = w[1] * w[2];
        int64_t lo = kFar, hi = -kFar, lo_all = -kFar, hi_all = kFar;
        bool every = alike(sieve, w[2]);
        each(which, [&](int r) {
            const int64_t p = rows.position[r];
            const int64_t a = sieve.place(clamp(p - reach, 0, keys)), b = sieve.place(clamp(p + reach + 1, 0, keys));
            lo = lower(lo, a), hi = upper(hi, b);
            lo_all = upper(lo_all, a), hi_all = lower(hi_all, b);
            every = every && floor_mod(p - sieve.first, w[2]) == 0;
        });
        to.seen.set(upper(lo, sieve.from), lower(hi, sieve.to));
        if (every) to.full.set(upper(lo_all, sieve.from), lower(hi_all, sieve.to));
    }

    void global_bounds(const int64_t* w, const Rows& rows, const Sieve& sieve, uint64_t which, Bounds& to) const {
        const int64_t* index = operand<int64_t>(w[1]);
        const int64_t n = operands_[w[1]].count;
        bool any = false, every = true;
        each(which, [&](int r) {
            const bool in = contains(index, n, rows.position[r]);
            any |= in;
            every &= in;
        });
        if (every) to.full = to.seen;
        if (any) return;
        to.seen.clear();
        const int64_t last = lower(rows.key_count, sieve.key(sieve.to));
        for (int64_t i = first_at(index, n, upper(0, sieve.key(sieve.from))); i < n && index[i] < last; ++i)
            append_keys<true>(sieve, index[i], index[i] + 1, to.seen);
        all_see(to);
    }

    void random_bounds(const int64_t* w, const Rows& rows, const Sieve& sieve, uint64_t which, Bounds& to) const {
        const int64_t keys = rows.key_count;
        int64_t previous = 0, chosen[kMaxRanges];
        bool first = true, one = true;
        to.seen.clear();
        Ranges row, joined;
        each(which, [&](int r) {
            const int64_t qb = floor_div(rows.position[r], w[2]);
            if (!first && qb == previous) return;
            one &= first;
            first = false;
            previous = qb;
            const int n = random_row(w, qb, keys, chosen, kMaxRanges);
            row.clear();
            if (n < 0) row.set(sieve.from, sieve.to), one = false;
            for (int i = 0; i < n; ++i)
                append_keys<true>(sieve, chosen[i] * w[2], lower(chosen[i] * w[2] + w[2], keys), row);
            unite<true>(to.seen, row, joined);
            to.seen = joined;
        });
        if (one) all_see(to);
    }

    // All rows see what any sees.
    static void all_see(Bounds& to) {
        to.full = to.seen;
        if (to.full.count > 0 && to.full.end != kFar) --to.full.count;  // the last range was joined of several
    }

    void blocks_bounds(const int64_t* w, const Rows& rows, const Sieve& sieve, uint64_t which, Bounds& to) const {
        const int64_t keys = rows.key_count;
        const int64_t from = clamp(floor_div(sieve.key(sieve.from), w[6]), 0, w[5]),
                      stop = clamp(floor_div(sieve.key(sieve.to - 1), w[6]) + 1, from, w[5]);
        const uint8_t* previous = nullptr;
        to.seen.clear();
        Ranges row, joined;
        bool first = true, one = true;
        each(which, [&](int r) {
            const uint8_t* map = block_row(w, rows, r);
            if (!first && map == previous) return;
            one &= first;
            first = false;
            previous = map;
            row.clear();
            for (int64_t c = map != nullptr ? next_set(map, from, stop) : stop; c < stop;
                 c = next_set(map, c + 1, stop))
                append_keys<true>(sieve, lower(c * w[6], keys), lower(c * w[6] + w[6], keys), row);
            unite<true>(to.seen, row, joined);
            to.seen = joined;
        });
        if (one) all_see(to);
    }

    void selected_bounds(const int64_t* w, const Rows& rows, const Sieve& sieve, uint64_t which, Bounds& to) const {
        const int64_t keys = rows.key_count, from = floor_div(sieve.key(sieve.from), w[7]),
                      stop = floor_div(sieve.key(sieve.to - 1), w[7]) + 1;
        int64_t previous = -1;
        to.seen.clear();
        Ranges row, joined;
        bool one = true;
        each(which, [&](int r) {
            const int64_t list = list_of(w, rows, r);
            if (list == previous) return;
            one &= previous < 0;
            previous = list;
            row.clear();
            each_listed(w, list, from, stop, [&](int64_t block) {
                append_keys<true>(sieve, block * w[7], lower(block * w[7] + w[7], keys), row);
            });
            unite<true>(to.seen, row, joined);
            to.seen = joined;
        });
        if (one) all_see(to);
    }

    // The keys [a, b), as far as the sieve asks for them.
    template <bool Superset>
    static QKV_INLINE void append_keys(const Sieve& sieve, int64_t a, int64_t b, Ranges& to) {
        append<Superset>(to, upper(sieve.place(a), sieve.from), lower(sieve.place(b), sieve.to));
    }

    // The next column of a row of a map that is set, or `stop`: maps are mostly zeros, eight at a time.
    static QKV_INLINE int64_t next_set(const uint8_t* map, int64_t c, int64_t stop) {
        for (; c + 8 <= stop; c += 8) {
            uint64_t eight;
            std::memcpy(&eight, map + c, sizeof eight);
            if (eight != 0) break;
        }
        while (c < stop && map[c] == 0) ++c;
        return c;
    }

    static bool contains(const int64_t* sorted, int64_t n, int64_t x) {
        const int64_t at = first_at(sorted, n, x);
        return at < n && sorted[at] == x;
    }

    // The n keys from place x0 on, and their words.
    struct Some {
        const Sieve& sieve;
        int64_t x0;
        int n;
        uint64_t* words;  // n + 1 of them
        QKV_INLINE int64_t key(int64_t j) const { return sieve.key(x0 + j); }
        // The keys [a, b).
        QKV_INLINE void toggle(int64_t a, int64_t b, uint64_t bit) const {
            const int64_t from = clamp(sieve.place(a) - x0, 0, n), to = clamp(sieve.place(b) - x0, 0, n);
            if (from >= to) return;
            words[from] ^= bit;
            words[to] ^= bit;
        }
        QKV_INLINE void carry() const {
            uint64_t on = 0;
            for (int j = 0; j < n; ++j) words[j] = on ^= words[j];
        }
        // The keys [a, b) that are p modulo step.
        QKV_INLINE void comb(int64_t a, int64_t b, int64_t p, int64_t step, uint64_t bit) const {
            const int64_t from = clamp(sieve.place(a) - x0, 0, n), to = clamp(sieve.place(b) - x0, 0, n);
            if (sieve.step == 1) {
                for (int64_t j = from + floor_mod(p - key(from), step); j < to; j += step) words[j] |= bit;
            } else if (alike(sieve, step)) {
                if (floor_mod(p - sieve.first, step) == 0)
                    for (int64_t j = from; j < to; ++j) words[j] |= bit;
            } else {
                for (int64_t j = from; j < to; ++j)
                    if (floor_mod(p - key(j), step) == 0) words[j] |= bit;
            }
        }
    };

    void interval_bits(const int64_t* w, const Rows& rows, uint64_t which, const Some& some) const {
        each(which, [&](int r) {
            int64_t a, b;
            interval(w, rows, r, a, b);
            some.toggle(a, b, UINT64_C(1) << r);
        });
        some.carry();
    }

    void documents_bits(const int64_t* w, const Rows& rows, uint64_t which, const Some& some) const {
        const int64_t* ids = operand<int64_t>(w[8]) + (w[9] > 1 ? batch_of(rows) : 0) * rows.key_count;
        each(which, [&](int r) {
            const int64_t x = w[1] ? rows.index[r] : rows.position[r];
            if (x < 0 || x >= w[6]) return;
            const int64_t id = operand<int64_t>(w[7])[(w[5] > 1 ? batch_of(rows) : 0) * w[6] + x];
            if (id < 0) return;
            const int64_t stop = live(rows, some);
            for (int64_t j = 0; j < stop; ++j) some.words[j] |= static_cast<uint64_t>(ids[some.key(j)] == id) << r;
        });
    }

    void strided_bits(const int64_t* w, const Rows& rows, uint64_t which, const Some& some) const {
        const int64_t first = some.key(0), last = some.key(some.n);
        each(which, [&](int r) { some.comb(first, last, rows.position[r] - w[2], w[1], UINT64_C(1) << r); });
    }

    void dilated_bits(const int64_t* w, const Rows& rows, uint64_t which, const Some& some) const {
        each(which, [&](int r) {
            const int64_t p = rows.position[r], far = w[1] * w[2];
            some.comb(p - far, p + far + 1, p, w[2], UINT64_C(1) << r);
        });
    }

    void global_bits(const int64_t* w, const Rows& rows, uint64_t which, const Some& some) const {
        const int64_t* index = operand<int64_t>(w[1]);
        const int64_t count = operands_[w[1]].count, first = some.key(0), last = some.key(some.n);
        each(which, [&](int r) {
            if (contains(index, count, rows.position[r])) some.toggle(first, last, UINT64_C(1) << r);
        });
        some.carry();
        for (int64_t i = first_at(index, count, first); i < count && index[i] < last; ++i)
            if ((index[i] - first) % some.sieve.step == 0) some.words[(index[i] - first) / some.sieve.step] |= which;
    }

    void random_bits(const int64_t* w, const Rows& rows, uint64_t which, const Some& some) const {
        int64_t previous = 0, chosen[kMaxRanges];
        int count = 0;
        bool first = true;
        each(which, [&](int r) {
            const int64_t qb = floor_div(rows.position[r], w[2]);
            if (first || qb != previous) count = random_row(w, qb, rows.key_count, chosen, kMaxRanges);
            first = false;
            previous = qb;
            for (int i = 0; i < count; ++i) some.toggle(chosen[i] * w[2], chosen[i] * w[2] + w[2], UINT64_C(1) << r);
        });
        some.carry();
    }

    void blocks_bits(const int64_t* w, const Rows& rows, uint64_t which, const Some& some) const {
        const int64_t from = clamp(floor_div(some.key(0), w[6]), 0, w[5]),
                      to = clamp(floor_div(some.key(some.n - 1), w[6]) + 1, from, w[5]);
        each(which, [&](int r) {
            const uint8_t* map = block_row(w, rows, r);
            if (map == nullptr) return;
            for (int64_t c = from; c < to; ++c)
                if (map[c]) some.toggle(c * w[6], c * w[6] + w[6], UINT64_C(1) << r);
        });
        some.carry();
    }

    void dense_bits(const int64_t* w, const Rows& rows, uint64_t which, const Some& some) const {
        const int64_t stop = live(rows, some);
        each(which, [&](int r) {
            const uint8_t* row =
                operand<uint8_t>(w[1]) + batch_of(rows) * w[2] + rows.head[r] * w[3] + rows.index[r] * w[4];
            for (int64_t j = 0; j < stop; ++j)
                some.words[j] |= static_cast<uint64_t>(row[some.key(j) * w[5]] != 0) << r;
        });
    }

    void selected_bits(const int64_t* w, const Rows& rows, uint64_t which, const Some& some) const {
        const int64_t from = floor_div(some.key(0), w[7]), stop = floor_div(some.key(some.n - 1), w[7]) + 1;
        int64_t list = -1;
        uint64_t readers = 0;  // rows next to each other that read one list
        const auto mark = [&] {
            if (readers == 0) return;
            each_listed(w, list, from, stop,
                        [&](int64_t block) { some.toggle(block * w[7], block * w[7] + w[7], readers); });
        };
        each(which, [&](int r) {
            const int64_t own = list_of(w, rows, r);
            if (own != list) {
                mark();
                readers = 0;
            }
            list = own;
            readers |= UINT64_C(1) << r;
        });
        mark();
        some.carry();
    }

    // How many of the keys there are.
    static int64_t live(const Rows& rows, const Some& some) {
        return lower(some.n, some.sieve.place(rows.key_count) - some.x0);
    }

    const Operand* operands_;
    int64_t heads_;  // query heads of the call
};

}  // namespace QKV_ISA
}  // namespace qkv
