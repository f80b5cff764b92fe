// Whether a mask program can be run, and whether it reads only what is there. Compiled once, for all instruction sets.
#include "mask/validate.h"

#include <algorithm>

#include "mask/words.h"

namespace qkv {
namespace {

bool in(Word word, int64_t x) {
    switch (word) {
        case Word::number: return x >= -kFar && x <= kFar;
        case Word::size: return x >= 0 && x <= kFar;
        case Word::positive: return x >= 1 && x <= kFar;
        case Word::draws: return x >= 0 && x <= kMaxRanges;
        default: return true;
    }
}

// Whether the words of an instruction are in their domains, each and together, and its operands exist.
bool in_domain(const int64_t* w, int64_t operands) {
    using enum Word;
    const Kind& kind = kind_of(w[0]);
    const auto named = [&](int64_t o) { return o >= 0 && o < operands; };
    const auto product = [](int64_t a, int64_t b) { return b == 0 || a <= kFar / b; };
    for (int i = 1; i < kind.count; ++i) {
        const Word word = kind.words[i - 1];
        if (!in(word, w[i])) return false;
        if ((word == operand || (word == optional && w[i] != -1)) && !named(w[i])) return false;
    }
    switch (w[0]) {
#define QKV_RELATED(name, opcode, words, related, held) \
    case kMask##name: return related;
        QKV_MASK_KINDS(QKV_RELATED)
#undef QKV_RELATED
        default: return false;
    }
}

// Whether the program is well formed and shallow enough to run.
bool valid(const int64_t* w, int64_t length, int64_t operands, int depth = 0) {
    int held = 0;
    for (int64_t at = 0; at < length;) {
        const int64_t n = instruction_length(w, at, length);
        if (n == 0) return false;
        if (!in_domain(w + at, operands)) return false;
        const int64_t op = w[at];
        if (op == kMaskPerHead) {
            if (depth + held + 2 > kMaxDepth - 1) return false;  // before the recursion, which it bounds
            int64_t sub = at + 2;
            for (int64_t h = 0; h < w[at + 1]; ++h) {
                if (!valid(w + sub + 1, w[sub], operands, depth + held + 1)) return false;
                sub += 1 + w[sub];
            }
        }
        if (op == kMaskPortion) {
            if (depth + held + 2 > kMaxDepth - 1) return false;
            if (!valid(w + at + kInPortion, w[at + kInPortion - 1], operands, depth + held + 1)) return false;
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

// Of a call: how many batch rows, queries and keys its masks are asked about.
struct Extent {
    int64_t batches, queries, keys;
};

// Whether the operands of one instruction hold what it reads of so much.
bool held(const Attention& a, const int64_t* w, const Extent& of) {
    const auto [batches, queries, keys] = of;
    const auto count = [&](int64_t i) { return a.operands[i].count; };
    const auto rows = [](int64_t n, int64_t least) { return n == 1 || n >= least; };
    // Whether n numbers hold x * y * ... of them, without overflow.
    const auto holds = [](int64_t n, auto... sizes) {
        if (((sizes == 0) || ...)) return true;
        for (const int64_t x : {sizes...}) n /= x;  // floors compose: n / x / y is n / (x y)
        return n > 0;
    };
    // Whether n numbers hold the last one that strides over batch rows, heads, queries and keys come to.
    const auto spans = [&](int64_t n, const int64_t* stride) {
        if (of.keys == 0) return true;
        int64_t left = n - 1;  // the last element that is there
        const int64_t sizes[] = {of.batches, a.Hq, of.queries, of.keys};
        for (int d = 0; d < 4; ++d) {
            if (sizes[d] > 1 && stride[d] > left / (sizes[d] - 1)) return false;
            left -= (sizes[d] - 1) * stride[d];
        }
        return left >= 0;
    };
    switch (w[0]) {
#define QKV_HELD(name, opcode, words, related, held) \
    case kMask##name: return held;
        QKV_MASK_KINDS(QKV_HELD)
#undef QKV_HELD
        default: return false;
    }
}

bool readable(const Attention& a, const int64_t* w, int64_t length, const Extent& of);

bool readable(const Attention& a, const int64_t* w, const Extent& of) {
    if (of.batches == 0) return w[0] != kMaskPerHead || w[1] == a.Hq;
    if (!held(a, w, of)) return false;
    if (w[0] == kMaskPortion) return readable(a, w + kInPortion, w[kInPortion - 1], Extent{of.batches, w[3], w[4]});
    if (w[0] != kMaskPerHead) return true;
    int64_t sub = 2;
    for (int64_t h = 0; h < w[1]; sub += 1 + w[sub], ++h)
        if (!readable(a, w + sub + 1, w[sub], of)) return false;
    return true;
}

bool readable(const Attention& a, const int64_t* w, int64_t length, const Extent& of) {
    for (int64_t at = 0; at < length; at += instruction_length(w, at, length))
        if (!readable(a, w + at, of)) return false;
    return true;
}

// All that this call may ask its masks about.
Extent extent_of(const Attention& a) {
    int64_t batches = 0, queries = 0, keys = 0;
    for (int64_t i = 0; i < a.sequence_count; ++i) {
        batches = std::max<int64_t>(batches, a.sequences[i].batch + 1);
        queries = std::max<int64_t>(queries, a.sequences[i].q_count);
        keys = std::max<int64_t>(keys, a.sequences[i].k_count);
    }
    return {queries == 0 ? 0 : batches, queries, keys};  // without queries nothing is read
}

}  // namespace

bool program_fits(const int64_t* words, int64_t length, int64_t operands) {
    return length == 0 || valid(words, length, operands);
}

bool program_runs(const Attention& call) {
    return program_fits(call.program, call.program_length, call.operand_count) &&
           readable(call, call.program, call.program_length, extent_of(call));
}

}  // namespace qkv
