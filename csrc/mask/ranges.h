// Sorted ranges of keys, and what may be done to them. Lists have a fixed capacity: beyond it they become conservative.
#pragma once
#include "mask/words.h"
#include "simd/simd.h"

namespace qkv {
namespace QKV_ISA {

QKV_INLINE int64_t lower(int64_t a, int64_t b) { return a < b ? a : b; }
QKV_INLINE int64_t upper(int64_t a, int64_t b) { return a > b ? a : b; }
QKV_INLINE int64_t clamp(int64_t x, int64_t lo, int64_t hi) { return x < lo ? lo : x > hi ? hi : x; }
QKV_INLINE int64_t floor_div(int64_t a, int64_t b) { return a / b - ((a % b != 0) & ((a % b < 0) != (b < 0))); }
QKV_INLINE int64_t floor_mod(int64_t a, int64_t b) { return a - floor_div(a, b) * b; }
QKV_INLINE int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

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

}  // namespace QKV_ISA
}  // namespace qkv
