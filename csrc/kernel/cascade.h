// Which chunks of keys several sequences of a batch have in common: they are read once, for all of them.
//
// A chunk is shared where the page tables name the same pages and every row of the sequences sees all of its keys. Each
// row then goes through the same arithmetic as alone, so sharing changes no bit of a result.
#pragma once
#include "kernel/score.h"

namespace qkv {
namespace QKV_ISA {

inline constexpr int kMostChunks = 64;

// Some sequences, and a chunk that is the same for them.
struct Share {
    int64_t chunk, first_member, members;
};

// What the search needs of a sequence: the keys of a chunk, which keys all rows see (a sink and a window at most: two
// ranges), and its place in a list of equal chunks.
struct Candidate {
    int64_t sequence, chunk, chunks;
    int64_t first[2], last[2];
    int64_t leader, end, next;
    void set_full(const Ranges& full) {
        for (int i = 0; i < 2; ++i) {
            first[i] = i < full.count ? full.first[i] : 0;
            last[i] = i < full.count ? full.last[i] : 0;
        }
    }
};

class Cascade {
  public:
    // Sequences that decode in chunks are candidates, if their mask is the same for all heads and batch rows.
    static bool possible(const Attention& a) {
        if (a.bias_count > 0 || a.dropout_below > 0) return false;
        for (int64_t at = 0; at < a.program_length; at += instruction_length(a.program, at, a.program_length)) {
            const int64_t op = a.program[at];
            const bool plain = op == kMaskAll || op == kMaskWindow || op == kMaskChunked ||
                               (op >= kMaskAnd && op <= kMaskNot) || (op == kMaskPrefix && a.program[at + 2] < 0);
            if (!plain) return false;
        }
        return true;
    }

    Share* shares = nullptr;
    int64_t* members = nullptr;  // sequences, share by share
    int64_t count = 0;

    // Finds all shares among the candidates; taken[sequence] gets a bit for each chunk that is in one.
    // table: more slots than candidates.
    void find(const Attention& a, Candidate* candidates, int64_t n, int32_t* table, int64_t slots, uint64_t* taken) {
        int64_t most = 0, used = 0;
        for (int64_t i = 0; i < n; ++i) most = upper(most, candidates[i].chunks);
        for (int64_t c = 0; c < most; ++c) {
            // Lists of equal chunks, found by their first page and led by their first sequence.
            for (int64_t s = 0; s < slots; ++s) table[s] = -1;
            for (int64_t i = 0; i < n; ++i) {
                Candidate& x = candidates[i];
                x.leader = x.next = -1;
                x.end = i;
                if (!sees(a, x, c)) continue;
                int64_t s = static_cast<int64_t>(static_cast<uint32_t>(*pages(a, x, c)) * UINT64_C(0x9E3779B1) %
                                                 static_cast<uint64_t>(slots));
                while (table[s] >= 0 && !same(a, candidates[table[s]], x, c)) s = s + 1 < slots ? s + 1 : 0;
                if (table[s] < 0) table[s] = static_cast<int32_t>(i);
                x.leader = table[s];
                if (x.leader == i) continue;
                Candidate& leader = candidates[x.leader];
                candidates[leader.end].next = i;
                leader.end = i;
            }
            for (int64_t i = 0; i < n; ++i) {
                if (candidates[i].leader != i || candidates[i].next < 0) continue;
                Share& share = shares[count++];
                share = {c, used, 0};
                for (int64_t x = i; x >= 0; x = candidates[x].next) {
                    members[used++] = candidates[x].sequence;
                    taken[candidates[x].sequence] |= UINT64_C(1) << c;
                    ++share.members;
                }
            }
        }
    }

  private:
    static bool sees(const Attention& a, const Candidate& x, int64_t c) {
        const int64_t k0 = c * x.chunk, k1 = k0 + x.chunk;
        if (k1 > a.sequences[x.sequence].k_count) return false;
        return (x.first[0] <= k0 && x.last[0] >= k1) || (x.first[1] <= k0 && x.last[1] >= k1);
    }
    static const int32_t* pages(const Attention& a, const Candidate& x, int64_t c) {
        return a.sequences[x.sequence].pages + c * x.chunk / a.page_size;
    }
    static bool same(const Attention& a, const Candidate& x, const Candidate& y, int64_t c) {
        const int64_t first = c * x.chunk / a.page_size, last = ((c + 1) * x.chunk - 1) / a.page_size;
        const size_t n = static_cast<size_t>(last - first + 1);
        return x.chunk == y.chunk && std::memcmp(pages(a, x, c), pages(a, y, c), n * sizeof(int32_t)) == 0;
    }
};

}  // namespace QKV_ISA
}  // namespace qkv
