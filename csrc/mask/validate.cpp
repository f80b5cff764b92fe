// Whether a mask program can be run, and whether it reads only what is there. Compiled once, for all instruction sets.
#include "mask/validate.h"

#include <algorithm>
#include <initializer_list>

#include "mask/words.h"

namespace qkv {
namespace {

bool readable(const Attention& a, const int64_t* w, int64_t length);

// Whether the numbers of an instruction are in their domains; positions and these may be added without overflow.
bool in_domain(const int64_t* w) {
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
        case kMaskBlocks:
            return size(w[2]) && size(w[3]) && size(w[4]) && size(w[5]) && positive(w[6]) && product(w[5], w[6]);
        case kMaskPerHead: return size(w[1]);
        case kMaskDense: return size(w[2]) && size(w[3]) && size(w[4]) && size(w[5]);
        default: return true;
    }
}

// Whether the program is well formed and shallow enough to run.
bool valid(const int64_t* w, int64_t length, int64_t operands, int depth = 0) {
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

bool readable(const Attention& a, const int64_t* w, int64_t batches, int64_t queries, int64_t keys) {
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
            if (!rows(w[5], batches) || !holds(count(w[3]), {w[5], w[6]}) || !holds(count(w[4]), {w[5], w[6]}))
                return false;
            return w[2] ||
                   (rows(w[9], batches) && holds(count(w[7]), {w[5], w[6]}) && holds(count(w[8]), {w[9], keys}));
        case kMaskBlocks:
            return rows(w[2], batches) && rows(w[3], a.Hq) && holds(count(w[1]), {w[2], w[3], w[4], w[5]});
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

// Whether the operands of a valid program hold all that this call may read of them.
bool readable(const Attention& a, const int64_t* w, int64_t length) {
    int64_t batches = 0, queries = 0, keys = 0;
    for (int64_t i = 0; i < a.sequence_count; ++i) {
        batches = std::max<int64_t>(batches, a.sequences[i].batch + 1);
        queries = std::max<int64_t>(queries, a.sequences[i].q_count);
        keys = std::max<int64_t>(keys, a.sequences[i].k_count);
    }
    if (queries == 0) batches = 0;  // nothing is read
    for (int64_t at = 0; at < length; at += instruction_length(w, at, length))
        if (!readable(a, w + at, batches, queries, keys)) return false;
    return true;
}

}  // namespace

bool program_fits(const int64_t* words, int64_t length, int64_t operands) {
    return length == 0 || valid(words, length, operands);
}

bool program_runs(const Attention& call) {
    return program_fits(call.program, call.program_length, call.operand_count) &&
           readable(call, call.program, call.program_length);
}

}  // namespace qkv
