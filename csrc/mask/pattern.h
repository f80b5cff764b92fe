// What a mask program says of rows that see alike, without evaluating it: which rows a tile should hold.
#pragma once
#include <numeric>

#include "mask/ranges.h"

namespace qkv {
namespace QKV_ISA {

struct Pattern {
    // A row at position p sees no key but those that are p - offset modulo step; 1: no such thing is known.
    int64_t step = 1, offset = 0;
    // Rows of one block of positions see alike, in part of the program at least; 0: there are none.
    int64_t block = 0;
    // Queries, counted by index, that share a list of keys with the other heads of their group; 0: there are none.
    int64_t listed = 0;
    // Whether heads may see other keys than each other.
    bool by_head = false;
};

class PatternReader {
  public:
    static Pattern of(const int64_t* words, int64_t length) {
        Pattern found;
        const Comb comb = read(words, length, found);
        found.step = comb.step, found.offset = comb.offset;
        return found;
    }

  private:
    struct Comb {
        int64_t step, offset;
    };
    static Comb both(Comb a, Comb b) { return a.step >= b.step ? a : b; }
    static Comb either(Comb a, Comb b) {
        return {std::gcd(std::gcd(a.step, b.step), a.offset < b.offset ? b.offset - a.offset : a.offset - b.offset),
                a.offset};
    }
    // Blocks of two sizes: those that tiles of both fit into.
    static void add_block(Pattern& to, int64_t block) { to.block = to.block == 0 ? block : std::gcd(to.block, block); }

    static Comb read(const int64_t* w, int64_t length, Pattern& found) {
        Comb stack[kMaxDepth + 1];
        int top = -1;
        for (int64_t at = 0; at < length; at += instruction_length(w, at, length)) {
            switch (w[at]) {
                case kMaskAnd: stack[top - 1] = both(stack[top - 1], stack[top]), --top; break;
                case kMaskOr: stack[top - 1] = either(stack[top - 1], stack[top]), --top; break;
                case kMaskNot: stack[top] = {1, 0}; break;
                case kMaskPerHead: {
                    found.by_head = true;
                    ++top;
                    int64_t sub = at + 2;
                    for (int64_t h = 0; h < w[at + 1]; sub += 1 + w[sub], ++h) {
                        const Comb own = read(w + sub + 1, w[sub], found);
                        stack[top] = h == 0 ? own : either(stack[top], own);
                    }
                    break;
                }
                default: stack[++top] = atom(w + at, found);
            }
        }
        return top < 0 ? Comb{1, 0} : stack[0];
    }
    static Comb atom(const int64_t* w, Pattern& found) {
        switch (w[0]) {
            case kMaskStrided: return {w[1], w[2]};
            case kMaskDilated: return {w[2], 0};
            case kMaskBlocks: add_block(found, w[6]), found.by_head |= w[3] > 1; break;
            case kMaskRandom: add_block(found, w[2]); break;
            case kMaskChunked: add_block(found, w[1]); break;
            case kMaskSelected:
                found.listed = found.listed == 0 ? w[8] : std::gcd(found.listed, w[8]), found.by_head |= w[4] > 1;
                break;
            case kMaskDense: found.by_head |= w[3] != 0; break;
            default: break;
        }
        return {1, 0};
    }
};

}  // namespace QKV_ISA
}  // namespace qkv
