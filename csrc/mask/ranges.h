// Sorted ranges of keys, and what may be done to them. Lists have a fixed capacity: beyond it they become conservative,
// and say from where on.
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

// The keys that are looked at: first + step x, by their places x = 0, 1, ..., of which those in [from, to) are asked
// for. Rows whose positions are alike modulo a pattern's step see keys of one such sequence alone.
struct Sieve {
    int64_t first, step;
    int64_t from, to;
    QKV_INLINE int64_t key(int64_t place) const { return first + step * place; }
    // The first place whose key is not before this one.
    QKV_INLINE int64_t place(int64_t key) const { return step == 1 ? key - first : -floor_div(first - key, step); }
};
QKV_INLINE Sieve keys_between(int64_t from, int64_t to) { return {0, 1, from, to}; }

struct Ranges {
    int count;
    int64_t end;                                  // from here on the list was too short, and is conservative
    int64_t first[kMaxRanges], last[kMaxRanges];  // [first, last), sorted, not touching

    void clear() {
        count = 0;
        end = kFar;
    }
    void set(int64_t a, int64_t b) {
        count = a < b;
        end = kFar;
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
    } else {
        to.end = lower(to.end, to.last[to.count - 1]);
        if (Superset) to.last[to.count - 1] = b;
    }
}

template <bool Superset>
inline void intersect(const Ranges& a, const Ranges& b, Ranges& to) {
    to.clear();
    to.end = lower(a.end, b.end);
    for (int i = 0, j = 0; i < a.count && j < b.count;) {
        append<Superset>(to, upper(a.first[i], b.first[j]), lower(a.last[i], b.last[j]));
        (a.last[i] < b.last[j]) ? ++i : ++j;
    }
}

template <bool Superset>
inline void unite(const Ranges& a, const Ranges& b, Ranges& to) {
    to.clear();
    to.end = lower(a.end, b.end);
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

// Of the places that are asked for.
template <bool Superset>
inline void complement(const Ranges& a, const Sieve& sieve, Ranges& to) {
    to.clear();
    to.end = a.end;
    int64_t from = sieve.from;
    for (int i = 0; i < a.count; ++i) {
        append<Superset>(to, from, lower(a.first[i], sieve.to));
        from = upper(from, a.last[i]);
    }
    append<Superset>(to, from, sieve.to);
}

// seen: no row sees a key outside. full: every row sees every key inside. Ranges are of places in a sieve.
struct Bounds {
    Ranges seen, full;
    int64_t end() const { return lower(seen.end, full.end); }
};

}  // namespace QKV_ISA
}  // namespace qkv
