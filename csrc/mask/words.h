// What is known of a mask program without evaluating it: its limits, and where instructions end. Nothing here has
// external linkage: it is compiled into every instruction set, and once more for the check of a program (validate.cpp).
#pragma once
#include <cstdint>
#include <initializer_list>

#include "attention.h"

namespace qkv {

constexpr int kMaxRanges = 96;  // ranges of a list; beyond, a list becomes conservative
constexpr int kMaxDepth = 12;   // of the evaluation stack
constexpr int64_t kFar = INT64_C(1) << 60;

// What a word of an instruction may be. Positions and these may be added without overflow.
enum class Word {
    any,
    number,    // -kFar to kFar
    size,      // 0 to kFar
    positive,  // 1 to kFar
    draws,     // 0 to kMaxRanges
    operand,   // the index of one
    optional,  // the index of an operand, or -1
};

struct Kind {
    int64_t opcode;
    int count;  // of words, with the opcode
    Word words[9];
};

#define QKV_ONE(...) +1
constexpr int kKinds = 0 QKV_MASK_KINDS(QKV_ONE);
#undef QKV_ONE

// A function of its own in every file, not a table with a name that the linker could share.
static inline const Kind& kind_of(int64_t op) {
    using enum Word;
#define QKV_BRACED(...) {__VA_ARGS__}
#define QKV_KIND(name, opcode, words, ...) \
    {opcode, 1 + static_cast<int>(std::initializer_list<Word> QKV_BRACED words.size()), QKV_BRACED words},
    static constexpr Kind kTable[] = {QKV_MASK_KINDS(QKV_KIND)};
#undef QKV_KIND
#undef QKV_BRACED
    static_assert([] {
        for (int i = 0; i < kKinds; ++i)
            if (kTable[i].opcode != i) return false;
        return true;
    }());
    return kTable[op];
}

constexpr int64_t kInPortion = 6;  // where the program of a portion begins, its length before it

// Number of words of the instruction at `at`, or 0 if there is none such.
static inline int64_t instruction_length(const int64_t* w, int64_t at, int64_t end) {
    const int64_t op = w[at];
    if (op < 0 || op >= kKinds) return 0;
    const int64_t count = kind_of(op).count;
    if (op == kMaskPortion) {
        const int64_t inner = at + kInPortion;
        return inner < end && w[inner - 1] >= 1 && w[inner - 1] <= end - inner ? kInPortion + w[inner - 1] : 0;
    }
    if (op != kMaskPerHead) return at + count <= end ? count : 0;
    if (at + 2 > end) return 0;
    int64_t next = at + 2;
    for (int64_t h = 0; h < w[at + 1]; ++h) {
        if (next >= end || w[next] < 1 || w[next] > end - next - 1) return 0;
        next += 1 + w[next];
    }
    return next - at;
}

}  // namespace qkv
