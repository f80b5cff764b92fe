// How many pairs of a query and a key a call computes: the walk of its tiles, without products.
#pragma once
#include "kernel/lanes.h"
#include "kernel/schedule.h"

namespace qkv {
namespace QKV_ISA {

template <class L>
class Covering {
  public:
    explicit Covering(const Attention& call) : a_(call), job_(call), schedule_{a_, job_, true} {}

    void find(Cover& to) {
        to.step = 1;
        for (int64_t i = 0; i < a_.sequence_count; ++i) {
            const Sequence& s = a_.sequences[i];
            const Cut c = schedule_.cut(s);
            if (c.tiles == 0) continue;
            to.step = upper(to.step, c.step), to.block = upper(to.block, c.block), to.by_query |= c.by_query;
            // Heads that see alike are told by the first of them.
            const int64_t groups = job_.pattern.by_head ? a_.Hkv : 1;
            const int64_t heads = c.by_head && !job_.pattern.by_head ? job_.group : 1, tiles = c.tiles / heads;
            const int64_t most = upper(8, to.granules / (a_.sequence_count * groups * (s.k_count / kGranule + 1)));
            const int64_t every = (tiles + most - 1) / most;
            int64_t pairs = 0, seen = 0;
            for (int64_t g = 0; g < groups; ++g)
                for (int64_t t = every / 2; t < tiles; t += every, ++seen) pairs += tile(s, c, g, t);
            const double all =
                static_cast<double>(pairs) * static_cast<double>(tiles * groups) / static_cast<double>(upper(seen, 1));
            to.pairs += static_cast<int64_t>(all) * heads * (a_.Hkv / groups);
        }
        to.gathers = 4 * gathered_ > keys_;
    }

  private:
    int64_t tile(const Sequence& s, const Cut& c, int64_t kv_head, int64_t t) {
        schedule_.rows_of(s, c, kv_head, t, tile_);
        const Rows& rows = tile_.rows;
        if (rows.count == 0) return 0;
        walk_.begin(job_.program, rows, scratch_, tile_.sieve, !job_.program.empty(), c.dots ? 0 : L::W);
        int64_t pairs = 0;
        while (walk_.next(scratch_, block_)) {
            const int64_t first = c.dots ? 0 : block_.low * L::W;
            const int64_t last = c.dots ? rows.count : lower(rows.count, block_.high * L::W);
            for (int g = 0; g < block_.granules; ++g) {
                pairs += (last - first) * block_.live[g];
                keys_ += block_.live[g], gathered_ += block_.straight(g) ? 0 : block_.live[g];
            }
        }
        return pairs;
    }

    const Attention& a_;
    const Job job_;
    const Schedule<L> schedule_;
    int64_t keys_ = 0, gathered_ = 0;
    Tile tile_;
    Walk<kGranules> walk_;
    Block block_;
    Scratch scratch_;
};

}  // namespace QKV_ISA
}  // namespace qkv
