// Evaluates a mask program for a tile of query rows: which key ranges may be visible at all, which are visible to every
// row, and, in between, one bit for each row and key.
//
// Bits are held by key: words[j] has bit r set when row r sees key j0 + j. An interval of keys costs two writes a row
// (its two ends are toggled) and one pass that carries the toggles along the keys.
#pragma once
#include "attention.h"
#include "mutants.h"
#include <initializer_list>

#include "simd.h"

namespace qkv {
namespace QKV_ISA {

inline constexpr int kMaxRows = 64;      // rows of a tile: one bit each
inline constexpr int kMaxRanges = 96;    // ranges of a list; beyond, a list becomes conservative
inline constexpr int kMaxDepth = 12;     // of the evaluation stack
inline constexpr int kWindowKeys = 192;  // keys that bits are evaluated for at a time
inline constexpr int64_t kFar = INT64_C(1) << 60;

QKV_INLINE int64_t lower(int64_t a, int64_t b) { return a < b ? a : b; }
QKV_INLINE int64_t upper(int64_t a, int64_t b) { return a > b ? a : b; }
QKV_INLINE int64_t clamp(int64_t x, int64_t lo, int64_t hi) { return x < lo ? lo : x > hi ? hi : x; }
QKV_INLINE int64_t floor_div(int64_t a, int64_t b) { return a / b - ((a % b != 0) & ((a % b < 0) != (b < 0))); }
QKV_INLINE int64_t floor_mod(int64_t a, int64_t b) { return a - floor_div(a, b) * b; }

// The rows of a tile. `which` chooses among them (per-head masks give each head's rows its own program).
struct Rows {
    int count;
    int64_t batch;
    int64_t key_count;
    int64_t position[kMaxRows];
    int64_t index[kMaxRows];
    int64_t head[kMaxRows];
};

QKV_INLINE int64_t batch_of(const Rows& rows) { return QKV_MUTANT(batch_row) ? 0 : rows.batch; }

struct Ranges {
    int count;
    int64_t first[kMaxRanges], last[kMaxRanges];  // [first, last), sorted, not touching

    void clear() { count = 0; }
    void set(int64_t a, int64_t b) {
        count = a < b;
        first[0] = a;
        last[0] = b;
    }
};

// Appends in order. When a list is full, a superset may join its last two ranges and a subset may drop the newest.
template <bool Superset>
QKV_INLINE void append(Ranges& to, int64_t a, int64_t b) {
    if (a >= b) return;
    if (to.count > 0 && a <= to.last[to.count - 1]) {
        to.last[to.count - 1] = upper(to.last[to.count - 1], b);
    } else if (to.count < kMaxRanges) {
        to.first[to.count] = a;
        to.last[to.count++] = b;
    } else if (Superset) {
        to.last[to.count - 1] = b;
    }
}

template <bool Superset>
inline void intersect(const Ranges& a, const Ranges& b, Ranges& to) {
    to.clear();
    for (int i = 0, j = 0; i < a.count && j < b.count;) {
        append<Superset>(to, upper(a.first[i], b.first[j]), lower(a.last[i], b.last[j]));
        (a.last[i] < b.last[j]) ? ++i : ++j;
    }
}

template <bool Superset>
inline void unite(const Ranges& a, const Ranges& b, Ranges& to) {
    to.clear();
    for (int i = 0, j = 0; i < a.count || j < b.count;) {
        if (j == b.count || (i < a.count && a.first[i] <= b.first[j])) {
            append<Superset>(to, a.first[i], a.last[i]);
            ++i;
        } else {
            append<Superset>(to, b.first[j], b.last[j]);
            ++j;
        }
    }
}

template <bool Superset>
inline void complement(const Ranges& a, int64_t keys, Ranges& to) {
    to.clear();
    int64_t from = 0;
    for (int i = 0; i < a.count; ++i) {
        append<Superset>(to, from, lower(a.first[i], keys));
        from = upper(from, a.last[i]);
    }
    append<Superset>(to, from, keys);
}

// seen: no row sees a key outside. full: every row sees every key inside.
struct Bounds {
    Ranges seen, full;
};

struct Scratch {
    Bounds bounds[kMaxDepth + 1];
    uint64_t words[kMaxDepth][kWindowKeys + 1];
};

QKV_INLINE uint64_t mix(int64_t seed, int64_t block, int64_t t) {
    uint64_t x = static_cast<uint64_t>(seed) * 0x9E3779B97F4A7C15u + static_cast<uint64_t>(block) * 0xBF58476D1CE4E5B9u +
                 static_cast<uint64_t>(t) * 0x94D049BB133111EBu;
    x ^= x >> 30;
    x *= 0xBF58476D1CE4E5B9u;
    x ^= x >> 27;
    x *= 0x94D049BB133111EBu;
    return x ^ x >> 31;
}

class Program {
  public:
    Program(const int64_t* words, int64_t length, const Operand* operands) : words_(words), length_(length), operands_(operands) {}

    bool empty() const { return length_ == 0; }

    // Number of words of the instruction at `at`, or 0 if there is none such.
    static int64_t instruction_length(const int64_t* w, int64_t at, int64_t end) {
        static constexpr int kLength[] = {1, 3, 3, 3, 10, 2, 3, 3, 2, 4, 7, 0, 6, 1, 1, 1};
        const int64_t op = w[at];
        if (op < 0 || op > kMaskNot) return 0;
        if (op != kMaskPerHead) return at + kLength[op] <= end ? kLength[op] : 0;
        if (at + 2 > end) return 0;
        int64_t next = at + 2;
        for (int64_t h = 0; h < w[at + 1]; ++h) {
            if (next >= end || w[next] < 1 || w[next] > end - next - 1) return 0;
            next += 1 + w[next];
        }
        return next - at;
    }

    // Whether the numbers of an instruction are in their domains; positions and these may be added without overflow.
    static bool in_domain(const int64_t* w) {
        const auto size = [](int64_t x) { return x >= 0 && x <= kFar; };
        const auto positive = [](int64_t x) { return x >= 1 && x <= kFar; };
        const auto number = [](int64_t x) { return x >= -kFar && x <= kFar; };
        const auto product = [](int64_t a, int64_t b) { return b == 0 || a <= kFar / b; };
        switch (w[0]) {
            case kMaskWindow: return number(w[1]) && number(w[2]);
            case kMaskPrefix: return number(w[1]);
            case kMaskDocuments: return size(w[5]) && size(w[6]) && (w[2] || size(w[9]));
            case kMaskChunked: return positive(w[1]);
            case kMaskStrided: return positive(w[1]) && number(w[2]);
            case kMaskDilated: return size(w[1]) && positive(w[2]) && product(w[1], w[2]);
            case kMaskRandom: return w[1] >= 0 && w[1] <= kMaxRanges && positive(w[2]);
            case kMaskBlocks: return size(w[2]) && size(w[3]) && size(w[4]) && size(w[5]) && positive(w[6]) && product(w[5], w[6]);
            case kMaskPerHead: return size(w[1]);
            case kMaskDense: return size(w[2]) && size(w[3]) && size(w[4]) && size(w[5]);
            default: return true;
        }
    }

    // Whether the operands of a valid program hold all that this call may read of them.
    static bool readable(const Attention& a, const int64_t* w, int64_t length) {
        int64_t batches = 0, queries = 0, keys = 0;
        for (int64_t i = 0; i < a.sequence_count; ++i) {
            batches = upper(batches, a.sequences[i].batch + 1);
            queries = upper(queries, a.sequences[i].q_count);
            keys = upper(keys, a.sequences[i].k_count);
        }
        if (queries == 0) batches = 0;  // nothing is read
        for (int64_t at = 0; at < length; at += instruction_length(w, at, length))
            if (!readable(a, w + at, batches, queries, keys)) return false;
        return true;
    }

    // Whether the program is well formed and shallow enough to run.
    static bool valid(const int64_t* w, int64_t length, int64_t operands, int depth = 0) {
        int held = 0;
        for (int64_t at = 0; at < length;) {
            const int64_t n = instruction_length(w, at, length);
            if (n == 0) return false;
            if (!in_domain(w + at)) return false;
            const int64_t op = w[at];
            const auto named = [&](int64_t o) { return o >= 0 && o < operands; };
            switch (op) {
                case kMaskPrefix:
                    if (w[at + 2] != -1 && !named(w[at + 2])) return false;
                    break;
                case kMaskPadding:
                case kMaskGlobal:
                case kMaskBlocks:
                case kMaskDense:
                    if (!named(w[at + 1])) return false;
                    break;
                case kMaskDocuments:
                    if (!named(w[at + 3]) || !named(w[at + 4])) return false;
                    if (!w[at + 2] && (!named(w[at + 7]) || !named(w[at + 8]))) return false;
                    break;
                case kMaskPerHead: {
                    if (depth + held + 2 > kMaxDepth - 1) return false;  // before the recursion, which it bounds
                    int64_t sub = at + 2;
                    for (int64_t h = 0; h < w[at + 1]; ++h) {
                        if (!valid(w + sub + 1, w[sub], operands, depth + held + 1)) return false;
                        sub += 1 + w[sub];
                    }
                    break;
                }
                default: break;
            }
            if (op == kMaskAnd || op == kMaskOr) {
                if (held < 2) return false;
                --held;
            } else if (op == kMaskNot) {
                if (held < 1) return false;
            } else {
                ++held;
            }
            if (depth + held > kMaxDepth - 1) return false;
            at += n;
        }
        return held == 1;
    }

    void bounds(const Rows& rows, Scratch& scratch, Bounds& to) const {
        uint64_t all = rows.count == 64 ? ~UINT64_C(0) : (UINT64_C(1) << rows.count) - 1;
        run_bounds(words_, length_, rows, all, scratch.bounds);
        to = scratch.bounds[0];
    }

    // words[j], j in [0, n): the rows that see key j0 + j. n <= kWindowKeys.
    void bits(const Rows& rows, int64_t j0, int n, Scratch& scratch, uint64_t* words) const {
        uint64_t all = rows.count == 64 ? ~UINT64_C(0) : (UINT64_C(1) << rows.count) - 1;
        run_bits(words_, length_, rows, all, j0, n, scratch.words);
        for (int j = 0; j < n; ++j) words[j] = j0 + j < rows.key_count ? scratch.words[0][j] & all : 0;
    }

  private:
    static bool readable(const Attention& a, const int64_t* w, int64_t batches, int64_t queries, int64_t keys) {
        if (batches == 0) return w[0] != kMaskPerHead || w[1] == a.Hq;
        const auto count = [&](int64_t i) { return a.operands[i].count; };
        const auto rows = [](int64_t n, int64_t least) { return n == 1 || n >= least; };
        // Whether n numbers hold x * y * ... of them, without overflow.
        const auto holds = [](int64_t n, std::initializer_list<int64_t> sizes) {
            for (const int64_t x : sizes)
                if (x == 0) return true;
            for (const int64_t x : sizes) n /= x;  // floors compose: n / x / y is n / (x y)
            return n > 0;
        };
        switch (w[0]) {
            case kMaskPrefix: return w[2] < 0 || rows(count(w[2]), batches);
            case kMaskPadding: return rows(count(w[1]), batches);
            case kMaskDocuments:
                if (!rows(w[5], batches) || !holds(count(w[3]), {w[5], w[6]}) || !holds(count(w[4]), {w[5], w[6]})) return false;
                return w[2] || (rows(w[9], batches) && holds(count(w[7]), {w[5], w[6]}) && holds(count(w[8]), {w[9], keys}));
            case kMaskBlocks: return rows(w[2], batches) && rows(w[3], a.Hq) && holds(count(w[1]), {w[2], w[3], w[4], w[5]});
            case kMaskDense: {
                if (keys == 0) return true;
                int64_t left = count(w[1]) - 1;  // the last element that is there
                const int64_t sizes[] = {batches, a.Hq, queries, keys};
                for (int d = 0; d < 4; ++d) {
                    if (sizes[d] > 1 && w[2 + d] > left / (sizes[d] - 1)) return false;
                    left -= (sizes[d] - 1) * w[2 + d];
                }
                return left >= 0;
            }
            case kMaskPerHead: {
                if (w[1] != a.Hq) return false;
                int64_t sub = 2;
                for (int64_t h = 0; h < w[1]; sub += 1 + w[sub], ++h)
                    if (!readable(a, w + sub + 1, w[sub])) return false;
                return true;
            }
            default: return true;
        }
    }

    const int64_t* words_;
    int64_t length_;
    const Operand* operands_;

    template <class T>
    const T* operand(int64_t i) const {
        return static_cast<const T*>(operands_[i].data);
    }

    template <class F>
    static QKV_INLINE void each(uint64_t which, F f) {
        for (; which; which &= which - 1) {
            int r = 0;
            uint64_t low = which & (~which + 1);
            while (!(low & 1)) {
                const int skip = (low & 0xffffffffu) == 0 ? 32 : (low & 0xffu) == 0 ? 8 : 1;
                low >>= skip;
                r += skip;
            }
            f(r);
        }
    }

    // The key range of row r for the masks that are one interval a row.
    QKV_INLINE void interval(const int64_t* w, const Rows& rows, int r, int64_t& a, int64_t& b) const {
        const int64_t p = rows.position[r];
        switch (w[0]) {
            case kMaskWindow:
                a = w[1] < 0 ? -kFar : p - w[1] - QKV_MUTANT(window_left);
                b = w[2] < 0 ? kFar : p + w[2] + 1 - QKV_MUTANT(window_right);
                break;
            case kMaskPrefix:
                a = 0;
                b = w[2] < 0 ? w[1] : operand<int64_t>(w[2])[operands_[w[2]].count > 1 ? batch_of(rows) : 0];
                break;
            case kMaskPadding: {
                const int64_t n = operand<int64_t>(w[1])[operands_[w[1]].count > 1 ? batch_of(rows) : 0];
                const bool left = w[2] != 0 && !QKV_MUTANT(padding_side);
                a = left ? rows.key_count - n : 0;
                b = left ? rows.key_count : n;
                break;
            }
            case kMaskDocuments: {
                const int64_t x = (w[1] != 0) != QKV_MUTANT(document_by_index) ? rows.index[r] : p;
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
            default:
                a = 0;
                b = kFar;
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

    void atom_bounds(const int64_t* w, const Rows& rows, uint64_t which, Bounds& to) const {
        const int64_t keys = rows.key_count;
        if (is_interval(w) || w[0] == kMaskDocuments) {
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
            return;
        }
        to.seen.set(0, keys);
        to.full.clear();
        switch (w[0]) {
            case kMaskDilated: {
                int64_t lo = kFar, hi = -kFar;
                each(which, [&](int r) {
                    lo = lower(lo, rows.position[r] - w[1] * w[2]);
                    hi = upper(hi, rows.position[r] + w[1] * w[2] + 1);
                });
                to.seen.set(upper(lo, 0), lower(hi, keys));
                break;
            }
            case kMaskGlobal: {
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
                break;
            }
            case kMaskRandom: {
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
                break;
            }
            case kMaskBlocks: {
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
                break;
            }
            default: break;
        }
    }

    static bool contains(const int64_t* sorted, int64_t n, int64_t x) {
        int64_t lo = 0, hi = n;
        while (lo < hi) {
            const int64_t mid = (lo + hi) / 2;
            if (sorted[mid] < x)
                lo = mid + 1;
            else
                hi = mid;
        }
        return lo < n && sorted[lo] == x;
    }

    void run_bounds(const int64_t* w, int64_t length, const Rows& rows, uint64_t which, Bounds* stack) const {
        int top = -1;
        for (int64_t at = 0; at < length; at += instruction_length(w, at, length)) {
            switch (w[at]) {
                case kMaskAnd: {
                    Ranges t;
                    intersect<true>(stack[top - 1].seen, stack[top].seen, t);
                    stack[top - 1].seen = t;
                    intersect<false>(stack[top - 1].full, stack[top].full, t);
                    stack[top - 1].full = t;
                    --top;
                    break;
                }
                case kMaskOr: {
                    Ranges t;
                    unite<true>(stack[top - 1].seen, stack[top].seen, t);
                    stack[top - 1].seen = t;
                    unite<false>(stack[top - 1].full, stack[top].full, t);
                    stack[top - 1].full = t;
                    --top;
                    break;
                }
                case kMaskNot: {
                    Ranges seen, full;
                    complement<true>(stack[top].full, rows.key_count, seen);
                    complement<false>(stack[top].seen, rows.key_count, full);
                    stack[top].seen = seen;
                    stack[top].full = full;
                    break;
                }
                case kMaskPerHead: {
                    ++top;
                    stack[top].seen.clear();
                    stack[top].full.clear();
                    bool first = true;
                    int64_t sub = at + 2;
                    for (int64_t h = 0; h < w[at + 1]; sub += 1 + w[sub], ++h) {
                        const uint64_t mine = of_head(rows, which, h);
                        if (mine == 0) continue;
                        Bounds* own = stack + top + (first ? 0 : 1);
                        run_bounds(w + sub + 1, w[sub], rows, mine, own);
                        if (!first) {
                            Ranges t;
                            unite<true>(stack[top].seen, own->seen, t);
                            stack[top].seen = t;
                            intersect<false>(stack[top].full, own->full, t);
                            stack[top].full = t;
                        }
                        first = false;
                    }
                    break;
                }
                default: atom_bounds(w + at, rows, which, stack[++top]);
            }
        }
    }

    static uint64_t of_head(const Rows& rows, uint64_t which, int64_t h) {
        uint64_t mine = 0;
        for (int r = 0; r < rows.count; ++r)
            if (rows.head[r] == h) mine |= UINT64_C(1) << r;
        return mine & which;
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

    void atom_bits(const int64_t* w, const Rows& rows, uint64_t which, int64_t j0, int n, uint64_t* words) const {
        std::memset(words, 0, sizeof(uint64_t) * static_cast<size_t>(n + 1));
        if (is_interval(w)) {
            each(which, [&](int r) {
                int64_t a, b;
                interval(w, rows, r, a, b);
                toggle(words, n, j0, a, b, UINT64_C(1) << r);
            });
            carry(words, n);
            return;
        }
        switch (w[0]) {
            case kMaskDocuments: {
                const int64_t* ids = operand<int64_t>(w[8]) + (w[9] > 1 ? batch_of(rows) : 0) * rows.key_count;
                each(which, [&](int r) {
                    const int64_t x = w[1] ? rows.index[r] : rows.position[r];
                    if (x < 0 || x >= w[6]) return;
                    const int64_t id = operand<int64_t>(w[7])[(w[5] > 1 ? batch_of(rows) : 0) * w[6] + x];
                    if (id < 0) return;
                    const int64_t stop = lower(n, rows.key_count - j0);
                    for (int64_t j = 0; j < stop; ++j) words[j] |= static_cast<uint64_t>(ids[j0 + j] == id) << r;
                });
                break;
            }
            case kMaskStrided:
                each(which, [&](int r) {
                    for (int64_t j = floor_mod(rows.position[r] - w[2] - j0, w[1]); j < n; j += w[1]) words[j] |= UINT64_C(1) << r;
                });
                break;
            case kMaskDilated:
                each(which, [&](int r) {
                    const int64_t p = rows.position[r], far = (w[1] - QKV_MUTANT(dilated_reach)) * w[2];
                    const int64_t from = upper(j0, p - far), to = lower(j0 + n, p + far + 1);
                    for (int64_t j = from + floor_mod(p - from, w[2]); j < to; j += w[2]) words[j - j0] |= UINT64_C(1) << r;
                });
                break;
            case kMaskGlobal: {
                const int64_t* index = operand<int64_t>(w[1]);
                const int64_t count = operands_[w[1]].count;
                each(which, [&](int r) {
                    if (contains(index, count, rows.position[r])) toggle(words, n, j0, j0, j0 + n, UINT64_C(1) << r);
                });
                carry(words, n);
                for (int64_t i = 0; i < count; ++i)
                    if (index[i] >= j0 && index[i] < j0 + n) words[index[i] - j0] |= which;
                break;
            }
            case kMaskRandom: {
                int64_t previous = 0, chosen[kMaxRanges];
                int count = 0;
                bool first = true;
                each(which, [&](int r) {
                    const int64_t qb = floor_div(rows.position[r], w[2]);
                    if (first || qb != previous) count = random_row(w, qb, rows.key_count, chosen, kMaxRanges);
                    first = false;
                    previous = qb;
                    for (int i = 0; i < count; ++i) toggle(words, n, j0, chosen[i] * w[2], chosen[i] * w[2] + w[2], UINT64_C(1) << r);
                });
                carry(words, n);
                break;
            }
            case kMaskBlocks:
                each(which, [&](int r) {
                    const uint8_t* map = block_row(w, rows, r);
                    if (map == nullptr) return;
                    const int64_t to = lower(w[5], floor_div(j0 + n - 1, w[6]) + 1);
                    for (int64_t c = floor_div(j0, w[6]); c < to; ++c)
                        if (map[c]) toggle(words, n, j0, c * w[6], c * w[6] + w[6], UINT64_C(1) << r);
                });
                carry(words, n);
                break;
            case kMaskDense: {
                const int64_t stop = lower(n, rows.key_count - j0);
                each(which, [&](int r) {
                    const uint8_t* row = operand<uint8_t>(w[1]) + batch_of(rows) * w[2] + rows.head[r] * w[3] + rows.index[r] * w[4];
                    for (int64_t j = 0; j < stop; ++j) words[j] |= static_cast<uint64_t>(row[(j0 + j) * w[5]] != 0) << r;
                });
                break;
            }
            default: break;
        }
    }

    void run_bits(const int64_t* w, int64_t length, const Rows& rows, uint64_t which, int64_t j0, int n,
                  uint64_t (*stack)[kWindowKeys + 1]) const {
        int top = -1;
        for (int64_t at = 0; at < length; at += instruction_length(w, at, length)) {
            switch (w[at]) {
                case kMaskAnd:
                    for (int j = 0; j < n; ++j) stack[top - 1][j] &= stack[top][j];
                    --top;
                    break;
                case kMaskOr:
                    for (int j = 0; j < n; ++j) stack[top - 1][j] |= stack[top][j];
                    --top;
                    break;
                case kMaskNot:
                    for (int j = 0; j < n; ++j) stack[top][j] = ~stack[top][j];
                    break;
                case kMaskPerHead: {
                    ++top;
                    std::memset(stack[top], 0, sizeof(uint64_t) * static_cast<size_t>(n + 1));
                    int64_t sub = at + 2;
                    for (int64_t h = 0; h < w[at + 1]; sub += 1 + w[sub], ++h) {
                        const uint64_t mine = of_head(rows, which, h);
                        if (mine == 0) continue;
                        run_bits(w + sub + 1, w[sub], rows, mine, j0, n, stack + top + 1);
                        for (int j = 0; j < n; ++j) stack[top][j] |= stack[top + 1][j] & mine;
                    }
                    break;
                }
                default: atom_bits(w + at, rows, which, j0, n, stack[++top]);
            }
        }
    }
};

}  // namespace QKV_ISA
}  // namespace qkv
