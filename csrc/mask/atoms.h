// Evaluates single masks for a tile of query rows: the words of a mask program that are no composition.
#pragma once
#include <bit>

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

class Atoms {
  public:
    Atoms(const Operand* operands, int64_t heads) : operands_(operands), heads_(heads) {}

    // Of the rows `which`: keys that may be seen by any, and keys that are seen by all.
    void bounds(const int64_t* w, const Rows& rows, uint64_t which, Bounds& to) const {
        if (is_interval(w) || w[0] == kMaskDocuments) return interval_bounds(w, rows, which, to);
        to.seen.set(0, rows.key_count);
        to.full.clear();
        switch (w[0]) {
            case kMaskDilated: return dilated_bounds(w, rows, which, to);
            case kMaskGlobal: return global_bounds(w, rows, which, to);
            case kMaskRandom: return random_bounds(w, rows, which, to);
            case kMaskBlocks: return blocks_bounds(w, rows, which, to);
            case kMaskSelected: return selected_bounds(w, rows, which, 0, rows.key_count, to);
            default: return;
        }
    }

    // words[j], j in [0, n): the rows of `which` that see key j0 + j. words has n + 1 entries.
    void bits(const int64_t* w, const Rows& rows, uint64_t which, int64_t j0, int n, uint64_t* words) const {
        std::memset(words, 0, sizeof(uint64_t) * static_cast<size_t>(n + 1));
        if (is_interval(w)) return interval_bits(w, rows, which, j0, n, words);
        switch (w[0]) {
            case kMaskDocuments: return documents_bits(w, rows, which, j0, n, words);
            case kMaskStrided: return strided_bits(w, rows, which, j0, n, words);
            case kMaskDilated: return dilated_bits(w, rows, which, j0, n, words);
            case kMaskGlobal: return global_bits(w, rows, which, j0, n, words);
            case kMaskRandom: return random_bits(w, rows, which, j0, n, words);
            case kMaskBlocks: return blocks_bits(w, rows, which, j0, n, words);
            case kMaskDense: return dense_bits(w, rows, which, j0, n, words);
            case kMaskSelected: return selected_bits(w, rows, which, j0, n, words);
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

    void interval_bounds(const int64_t* w, const Rows& rows, uint64_t which, Bounds& to) const {
        const int64_t keys = rows.key_count;
        int64_t lo = kFar, hi = -kFar, lo_all = -kFar, hi_all = kFar;
        bool blind = false;
        each(which, [&](int r) {
            int64_t a, b;
            interval(w, rows, r, a, b);
            a = clamp(a, 0, keys);
            b = clamp(b, 0, keys);
            if (a < b) {
                lo = lower(lo, a);
                hi = upper(hi, b);
            } else {
                blind = true;
            }
            lo_all = upper(lo_all, a);
            hi_all = lower(hi_all, b);
        });
        to.seen.set(lo, hi);
        if (blind || !is_interval(w)) {
            to.full.clear();
        } else {
            to.full.set(upper(lo_all, 0), lower(hi_all, keys));
        }
    }

    void dilated_bounds(const int64_t* w, const Rows& rows, uint64_t which, Bounds& to) const {
        const int64_t keys = rows.key_count;
        int64_t lo = kFar, hi = -kFar;
        each(which, [&](int r) {
            lo = lower(lo, rows.position[r] - w[1] * w[2]);
            hi = upper(hi, rows.position[r] + w[1] * w[2] + 1);
        });
        to.seen.set(upper(lo, 0), lower(hi, keys));
    }

    void global_bounds(const int64_t* w, const Rows& rows, uint64_t which, Bounds& to) const {
        const int64_t keys = rows.key_count;
        const int64_t* index = operand<int64_t>(w[1]);
        const int64_t n = operands_[w[1]].count;
        bool any = false, every = true;
        each(which, [&](int r) {
            const bool in = contains(index, n, rows.position[r]);
            any |= in;
            every &= in;
        });
        if (every) to.full.set(0, keys);
        if (!any) {
            to.seen.clear();
            for (int64_t i = 0; i < n; ++i)
                if (index[i] >= 0 && index[i] < keys) append<true>(to.seen, index[i], index[i] + 1);
            to.full = to.seen;
            if (to.full.count == kMaxRanges) to.full.clear();  // the list may have been joined
        }
    }

    void random_bounds(const int64_t* w, const Rows& rows, uint64_t which, Bounds& to) const {
        const int64_t keys = rows.key_count;
        int64_t previous = 0, chosen[kMaxRanges];
        bool first = true;
        to.seen.clear();
        Ranges row, joined;
        each(which, [&](int r) {
            const int64_t qb = floor_div(rows.position[r], w[2]);
            if (!first && qb == previous) return;
            first = false;
            previous = qb;
            const int n = random_row(w, qb, keys, chosen, kMaxRanges);
            row.clear();
            if (n < 0) row.set(0, keys);
            for (int i = 0; i < n; ++i) append<true>(row, chosen[i] * w[2], lower(chosen[i] * w[2] + w[2], keys));
            unite<true>(to.seen, row, joined);
            to.seen = joined;
        });
    }

    void blocks_bounds(const int64_t* w, const Rows& rows, uint64_t which, Bounds& to) const {
        const int64_t keys = rows.key_count;
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
            for (int64_t c = 0; map != nullptr && c < w[5]; ++c)
                if (map[c]) append<true>(row, lower(c * w[6], keys), lower(c * w[6] + w[6], keys));
            unite<true>(to.seen, row, joined);
            to.seen = joined;
        });
        if (one && to.seen.count < kMaxRanges) to.full = to.seen;
    }

    // Of the keys in [k0, k1) alone.
    void selected_bounds(const int64_t* w, const Rows& rows, uint64_t which, int64_t k0, int64_t k1, Bounds& to) const {
        const int64_t from = k0 / w[7], stop = k1 > k0 ? (k1 - 1) / w[7] + 1 : from;
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
                append<true>(row, upper(block * w[7], k0), lower(block * w[7] + w[7], k1));
            });
            unite<true>(to.seen, row, joined);
            to.seen = joined;
        });
        if (one && to.seen.count < kMaxRanges) to.full = to.seen;
    }

    static bool contains(const int64_t* sorted, int64_t n, int64_t x) {
        const int64_t at = first_at(sorted, n, x);
        return at < n && sorted[at] == x;
    }

    static QKV_INLINE void toggle(uint64_t* words, int n, int64_t j0, int64_t a, int64_t b, uint64_t bit) {
        const int64_t from = clamp(a - j0, 0, n), to = clamp(b - j0, 0, n);
        if (from >= to) return;
        words[from] ^= bit;
        words[to] ^= bit;  // words has n + 1 entries
    }

    static QKV_INLINE void carry(uint64_t* words, int n) {
        uint64_t on = 0;
        for (int j = 0; j < n; ++j) words[j] = on ^= words[j];
    }

    void interval_bits(const int64_t* w, const Rows& rows, uint64_t which, int64_t j0, int n, uint64_t* words) const {
        each(which, [&](int r) {
            int64_t a, b;
            interval(w, rows, r, a, b);
            toggle(words, n, j0, a, b, UINT64_C(1) << r);
        });
        carry(words, n);
    }

    void documents_bits(const int64_t* w, const Rows& rows, uint64_t which, int64_t j0, int n, uint64_t* words) const {
        const int64_t* ids = operand<int64_t>(w[8]) + (w[9] > 1 ? batch_of(rows) : 0) * rows.key_count;
        each(which, [&](int r) {
            const int64_t x = w[1] ? rows.index[r] : rows.position[r];
            if (x < 0 || x >= w[6]) return;
            const int64_t id = operand<int64_t>(w[7])[(w[5] > 1 ? batch_of(rows) : 0) * w[6] + x];
            if (id < 0) return;
            const int64_t stop = lower(n, rows.key_count - j0);
            for (int64_t j = 0; j < stop; ++j) words[j] |= static_cast<uint64_t>(ids[j0 + j] == id) << r;
        });
    }

    void strided_bits(const int64_t* w, const Rows& rows, uint64_t which, int64_t j0, int n, uint64_t* words) const {
        each(which, [&](int r) {
            for (int64_t j = floor_mod(rows.position[r] - w[2] - j0, w[1]); j < n; j += w[1])
                words[j] |= UINT64_C(1) << r;
        });
    }

    void dilated_bits(const int64_t* w, const Rows& rows, uint64_t which, int64_t j0, int n, uint64_t* words) const {
        each(which, [&](int r) {
            const int64_t p = rows.position[r], far = w[1] * w[2];
            const int64_t from = upper(j0, p - far), to = lower(j0 + n, p + far + 1);
            for (int64_t j = from + floor_mod(p - from, w[2]); j < to; j += w[2]) words[j - j0] |= UINT64_C(1) << r;
        });
    }

    void global_bits(const int64_t* w, const Rows& rows, uint64_t which, int64_t j0, int n, uint64_t* words) const {
        const int64_t* index = operand<int64_t>(w[1]);
        const int64_t count = operands_[w[1]].count;
        each(which, [&](int r) {
            if (contains(index, count, rows.position[r])) toggle(words, n, j0, j0, j0 + n, UINT64_C(1) << r);
        });
        carry(words, n);
        for (int64_t i = 0; i < count; ++i)
            if (index[i] >= j0 && index[i] < j0 + n) words[index[i] - j0] |= which;
    }

    void random_bits(const int64_t* w, const Rows& rows, uint64_t which, int64_t j0, int n, uint64_t* words) const {
        int64_t previous = 0, chosen[kMaxRanges];
        int count = 0;
        bool first = true;
        each(which, [&](int r) {
            const int64_t qb = floor_div(rows.position[r], w[2]);
            if (first || qb != previous) count = random_row(w, qb, rows.key_count, chosen, kMaxRanges);
            first = false;
            previous = qb;
            for (int i = 0; i < count; ++i)
                toggle(words, n, j0, chosen[i] * w[2], chosen[i] * w[2] + w[2], UINT64_C(1) << r);
        });
        carry(words, n);
    }

    void blocks_bits(const int64_t* w, const Rows& rows, uint64_t which, int64_t j0, int n, uint64_t* words) const {
        each(which, [&](int r) {
            const uint8_t* map = block_row(w, rows, r);
            if (map == nullptr) return;
            const int64_t to = lower(w[5], floor_div(j0 + n - 1, w[6]) + 1);
            for (int64_t c = floor_div(j0, w[6]); c < to; ++c)
                if (map[c]) toggle(words, n, j0, c * w[6], c * w[6] + w[6], UINT64_C(1) << r);
        });
        carry(words, n);
    }

    void dense_bits(const int64_t* w, const Rows& rows, uint64_t which, int64_t j0, int n, uint64_t* words) const {
        const int64_t stop = lower(n, rows.key_count - j0);
        each(which, [&](int r) {
            const uint8_t* row =
                operand<uint8_t>(w[1]) + batch_of(rows) * w[2] + rows.head[r] * w[3] + rows.index[r] * w[4];
            for (int64_t j = 0; j < stop; ++j) words[j] |= static_cast<uint64_t>(row[(j0 + j) * w[5]] != 0) << r;
        });
    }

    void selected_bits(const int64_t* w, const Rows& rows, uint64_t which, int64_t j0, int n, uint64_t* words) const {
        const int64_t from = j0 / w[7], stop = (j0 + n - 1) / w[7] + 1;
        int64_t list = -1;
        uint64_t readers = 0;  // rows next to each other that read one list
        const auto mark = [&] {
            if (readers == 0) return;
            each_listed(w, list, from, stop,
                        [&](int64_t block) { toggle(words, n, j0, block * w[7], block * w[7] + w[7], readers); });
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
        carry(words, n);
    }

    const Operand* operands_;
    int64_t heads_;  // query heads of the call
};

}  // namespace QKV_ISA
}  // namespace qkv
