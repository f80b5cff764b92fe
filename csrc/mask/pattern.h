// What a mask program says of rows that see alike, without evaluating it: which rows a tile should hold.
#pragma once
#include "mask/atoms.h"

namespace qkv {
namespace QKV_ISA {

class PatternReader {
  public:
    static Pattern of(const int64_t* words, int64_t length) {
        Pattern found;
        const Comb comb = read(words, length, found);
        found.step = comb.step, found.offset = comb.offset, found.most = comb.most;
        return found;
    }

  private:
    static Comb both(Comb a, Comb b) {
        const Comb finer = a.step >= b.step ? a : b;
        return {finer.step, finer.offset, lower(a.most, b.most)};
    }
    static Comb either(Comb a, Comb b) {
        return {std::gcd(std::gcd(a.step, b.step), a.offset < b.offset ? b.offset - a.offset : a.offset - b.offset),
                a.offset, lower(a.most, kFar - b.most) + b.most};
    }
    // A shift leaves p - j alone, and lists; blocks that it does not leave in place help no longer.
    static Comb of_portion(const int64_t* w, Pattern& found) {
        Pattern inner;
        inner.listed = found.listed;
        const Comb comb = read(w + kInPortion, w[kInPortion - 1], inner);
        if (inner.block > 0 && w[1] % inner.block == 0) add_block(found, inner.block);
        found.listed = inner.listed, found.by_head |= inner.by_head;
        return comb;
    }
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
                case kMaskPortion: stack[++top] = of_portion(w + at, found); break;
                default: stack[++top] = comb_of(w + at, found);
            }
        }
        return top < 0 ? Comb{1, 0} : stack[0];
    }
};

}  // namespace QKV_ISA
}  // namespace qkv
