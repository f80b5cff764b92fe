// What is known of a mask program without evaluating it: its limits, and where instructions end. Nothing here has
// external linkage: it is compiled into every instruction set, and once more for the check of a program (validate.cpp).
#pragma once
#include <cstdint>

#include "attention.h"

namespace qkv {

constexpr int kMaxRanges = 96;  // ranges of a list; beyond, a list becomes conservative
constexpr int kMaxDepth = 12;   // of the evaluation stack
constexpr int64_t kFar = INT64_C(1) << 60;

// Number of words of the instruction at `at`, or 0 if there is none such.
static inline int64_t instruction_length(const int64_t* w, int64_t at, int64_t end) {
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

}  // namespace qkv
