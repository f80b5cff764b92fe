// Evaluates a mask program for a tile of query rows: which key ranges may be visible at all, which are visible to every
// row, and, in between, one bit for each row and key.
//
// Bits are held by key: words[j] has bit r set when row r sees key j0 + j. An interval of keys costs two writes a row
// (its two ends are toggled) and one pass that carries the toggles along the keys.
#pragma once
#include "mask/atoms.h"

namespace qkv {
namespace QKV_ISA {

struct Scratch {
    Bounds bounds[kMaxDepth + 1];
    uint64_t words[kMaxDepth][kWindowKeys + 1];
};

class Program {
  public:
    Program(const int64_t* words, int64_t length, const Operand* operands, int64_t heads)
        : words_(words), length_(length), atoms_(operands, heads) {}

    bool empty() const { return length_ == 0; }

    // Of the keys that the sieve asks for.
    void bounds(const Rows& rows, const Sieve& sieve, Scratch& scratch, Bounds& to) const {
        run_bounds(words_, length_, rows, sieve, all_rows(rows), scratch.bounds);
        to = scratch.bounds[0];
    }

    // words[j], j in [0, n): the rows that see the key at place x0 + j. n <= kWindowKeys.
    void bits(const Rows& rows, const Sieve& sieve, int64_t x0, int n, Scratch& scratch, uint64_t* words) const {
        const uint64_t all = all_rows(rows);
        run_bits(words_, length_, rows, sieve, all, x0, n, scratch.words);
        const int64_t live = lower(n, sieve.place(rows.key_count) - x0);
        for (int j = 0; j < n; ++j) words[j] = j < live ? scratch.words[0][j] & all : 0;
    }

  private:
    void run_bounds(const int64_t* w, int64_t length, const Rows& rows, const Sieve& sieve, uint64_t which,
                    Bounds* stack) const {
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
                    complement<true>(stack[top].full, sieve, seen);
                    complement<false>(stack[top].seen, sieve, full);
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
                        run_bounds(w + sub + 1, w[sub], rows, sieve, mine, own);
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
                case kMaskPortion: ++top, portion_bounds(w + at, rows, sieve, which, stack + top); break;
                default: atoms_.bounds(w + at, rows, sieve, which, stack[++top]);
            }
        }
    }

    static uint64_t of_head(const Rows& rows, uint64_t which, int64_t h) {
        uint64_t mine = 0;
        for (int r = 0; r < rows.count; ++r)
            if (rows.head[r] == h) mine |= UINT64_C(1) << r;
        return mine & which;
    }

    void run_bits(const int64_t* w, int64_t length, const Rows& rows, const Sieve& sieve, uint64_t which, int64_t x0,
                  int n, uint64_t (*stack)[kWindowKeys + 1]) const {
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
                        run_bits(w + sub + 1, w[sub], rows, sieve, mine, x0, n, stack + top + 1);
                        for (int j = 0; j < n; ++j) stack[top][j] |= stack[top + 1][j] & mine;
                    }
                    break;
                }
                case kMaskPortion: ++top, portion_bits(w + at, rows, sieve, which, x0, n, stack + top); break;
                default: atoms_.bits(w + at, rows, sieve, which, x0, n, stack[++top]);
            }
        }
    }

    // Rows and keys of a part of a call as the whole counts them. The keys' places stay what they are, and with them
    // ranges and bits.
    struct Whole {
        Rows rows;
        Sieve sieve;
        Whole(const int64_t* w, const Rows& part, const Sieve& asked) : sieve(asked) {
            rows.count = part.count, rows.batch = part.batch, rows.key_count = w[4];
            for (int r = 0; r < part.count; ++r) {
                rows.position[r] = part.position[r] + w[1];
                rows.index[r] = part.index[r] + w[2];
                rows.head[r] = part.head[r];
            }
            sieve.first = asked.first + w[1];  // and `to`, the part's own: keys of the whole go on
        }
    };
    void portion_bounds(const int64_t* w, const Rows& rows, const Sieve& sieve, uint64_t which, Bounds* stack) const {
        const Whole whole(w, rows, sieve);
        run_bounds(w + kInPortion, w[kInPortion - 1], whole.rows, whole.sieve, which, stack);
    }
    void portion_bits(const int64_t* w, const Rows& rows, const Sieve& sieve, uint64_t which, int64_t x0, int n,
                      uint64_t (*stack)[kWindowKeys + 1]) const {
        const Whole whole(w, rows, sieve);
        run_bits(w + kInPortion, w[kInPortion - 1], whole.rows, whole.sieve, which, x0, n, stack);
    }

    const int64_t* words_;
    int64_t length_;
    Atoms atoms_;
};

}  // namespace QKV_ISA
}  // namespace qkv
