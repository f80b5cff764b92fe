// How a call is cut into tasks.
//
// A sequence's rows (all query heads of a key/value head) are cut into tiles. Many rows: one task a tile, over all
// keys. Few rows: one task a chunk of keys, over all rows; the chunks' results are merged in order. What is cut how
// depends on the sequence alone, never on its neighbours in the batch or the number of threads, and so do the bits of
// the result.
#pragma once
#include <bit>

#include "kernel/score.h"

namespace qkv {
namespace QKV_ISA {

// Up to so many tiles, 192 rows where a vector holds 8 or 16 numbers, keys are cut into chunks.
inline constexpr int64_t kShortTiles = VF::W == 8 ? 8 : 4;
inline constexpr int64_t kTogether = 4;        // tiles of a task, at most, where keys and values have to be converted
inline constexpr int64_t kTasksPerThread = 4;  // at least, if there are as many tiles
inline constexpr int64_t kMostStates = kShortTiles > kTogether ? kShortTiles : kTogether;
inline constexpr double kSerialFlops = 2e5;  // below, waking a thread costs more than it saves
inline constexpr int64_t kPackKeys = 256;    // of one packing task
// Rows of a sequence and key/value head up to which dot products beat queries in lanes.
inline constexpr int64_t kDotRows = VF::W == 16 ? 10 : VF::W == 8 ? 6 : 3;

// How one sequence is cut.
struct Cut {
    bool dots;     // by the kernel for few rows
    bool split;    // into chunks of keys
    bool by_head;  // tiles hold rows of one head
    int64_t rows;  // of all heads of a group
    // Rows of one head are dealt to bands, and those cut into tiles: all of them, the rows i, i + step, ... or, where
    // `block` is not 0, those of a block of positions.
    int64_t step, block, bands;
    bool by_query;  // rows of all heads of a query stand together
    int64_t tile_rows, tiles;
    int64_t together;  // tiles of a task, at most. The result's bits do not depend on it
    int64_t chunk, chunks;
    int64_t first_task;  // of the call
    int64_t first_row;   // of the partial results
    int64_t first_counter;
    int64_t first_pack, packs;  // of the packing tasks
    int64_t pairs;              // offset of interleaved values, or -1
    uint64_t shared;            // chunks that are computed together with other sequences'

    bool merged() const { return split && chunks > 1; }
    int64_t tasks(int64_t kv_heads) const {
        return rows == 0 ? 0 : kv_heads * (split ? chunks - std::popcount(shared) : bundles());
    }
    int64_t bundles() const { return (tiles + together - 1) / together; }
    // The chunk of one's own tasks.
    int64_t chunk_of(int64_t n) const {
        int64_t c = 0;
        for (uint64_t bits = shared; bits != 0; bits >>= 1, ++c)
            if (!(bits & 1) && n-- == 0) return c;
        return c + n;
    }
    // Tiles of one head follow each other; tasks go by tile first, so that heads of a group share keys in the cache.
    int64_t by_index(int64_t tile, int64_t group) const {
        return by_head ? tile % group * (tiles / group) + tile / group : tile;
    }
};

// What a call's sequences come to. L: the kernel for many rows.
template <class L>
struct Schedule {
    const Attention& a;
    const Job& job;
    bool arranges;        // whether rows are dealt to tiles as a mask's pattern asks for
    Cut* cuts = nullptr;  // of each sequence
    int64_t tasks = 0, packs = 0, partial_rows = 0, counters = 0, pair_words = 0;
    int64_t states = 1;  // of the kernel for many rows, that one task holds
    bool any_dots = false, any_lanes = false;

    Cut cut(const Sequence& s) const {
        Cut c{};
        c.rows = s.q_count * job.group;
        c.pairs = -1;
        c.step = c.bands = 1;
        // Gradients find scores as the kernel for many rows does. States are found anew for few rows, except of a part
        // of the keys: then that kernel has to have made them.
        c.dots = !a.part && c.rows <= kDotRows;
        if (c.dots) {
            c.tile_rows = c.rows;
            c.tiles = c.rows > 0;
            c.split = true;
        } else {
            c.by_head = s.q_count >= L::kTileRows;
            deal(s, c);
            const int64_t span = c.step > 1  ? (s.q_count + c.step - 1) / c.step
                                 : c.block   ? lower(c.block, s.q_count)
                                 : c.by_head ? s.q_count
                                             : c.rows;
            const int64_t n = (span + L::kTileRows - 1) / L::kTileRows;
            // A block's last tile is a short one: 48 and 32 rows cost less than twice 40.
            c.tile_rows = c.by_query ? L::W / job.group * job.group
                          : c.block  ? (span <= L::kMostRows ? round_up(span, L::W) : L::kTileRows)
                                     : round_up((span + n - 1) / n, L::W);
            c.tiles = (span + c.tile_rows - 1) / c.tile_rows * c.bands * (c.by_head ? job.group : 1);
            c.split = !c.by_head && c.tiles <= kShortTiles;
        }
        c.chunk = c.split ? (a.Dv > 256 && !c.dots ? 1024 : 512) : s.k_count;
        // Where lists name a part of the keys, a chunk holds as many that are seen as one would without them.
        if (c.split && job.pattern.most < s.k_count)
            c.chunk = round_up(c.chunk * s.k_count / upper(job.pattern.most, 1), kGranule);
        if (c.split && s.k_count > c.chunk * 64) c.chunk = round_up(s.k_count / 64, kGranule);
        c.chunks = c.split && s.k_count > 0 ? (s.k_count + c.chunk - 1) / c.chunk : 1;
        return c;
    }

    // How the rows of a sequence are dealt to bands: by the program and the sizes of the sequence alone.
    void deal(const Sequence& s, Cut& c) const {
        const Pattern& p = job.pattern;
        if (!arranges || !c.by_head) return;
        if (p.listed > 0 && p.listed < L::W && job.group > 1 && job.group <= L::W) {
            c.by_query = true, c.by_head = false;
            return;
        }
        // A tile of few rows costs as much as so many keys of one vector of rows.
        constexpr int64_t kTileKeys = 64;
        if (p.step > 1 && p.step <= s.q_count && s.positions == nullptr) {
            const int64_t vectors = (s.q_count + p.step * L::W - 1) / (p.step * L::W);
            if (p.step * kTileKeys + vectors * s.k_count < s.q_count / L::W * s.k_count / 2) {
                c.step = c.bands = p.step;
                return;
            }
        }
        // Blocks of fewer rows than half a vector: as many as fill one.
        const int64_t block = p.block > 0 && 2 * p.block < L::W ? L::W / p.block * p.block : p.block;
        if (block > 0 && s.positions == nullptr && s.q_count > block) {
            c.block = block;
            c.bands = floor_div(s.position + s.q_count - 1, block) - floor_div(s.position, block) + 1;
        }
    }

    // Cuts all sequences, into `cuts`, and counts what they need.
    void fill() {
        tasks = packs = partial_rows = counters = pair_words = 0;
        const int64_t together = tiles_of_a_task();
        for (int64_t i = 0; i < a.sequence_count; ++i) {
            const Sequence& s = a.sequences[i];
            Cut c = cut(s);
            (c.dots ? any_dots : any_lanes) = true;
            c.together = together;
            if (!c.dots) states = upper(states, c.split ? c.tiles : together);
            c.first_task = tasks;
            tasks += c.tasks(a.Hkv);
            c.first_row = partial_rows;
            c.first_counter = counters;
            if (c.merged()) {
                partial_rows += c.rows * c.chunks * a.Hkv;
                counters += a.Hkv;
            }
            c.first_pack = packs;
            if (L::Elements::kPair == 2 && !c.split && c.tiles > 2 && !is_scaled(a)) {
                c.pairs = pair_words;
                pair_words += a.Hkv * round_up(s.k_count, kGranule) / 2 * a.Dv;
                c.packs = (s.k_count + kPackKeys - 1) / kPackKeys * a.Hkv;
                packs += c.packs;
            }
            cuts[i] = c;
        }
    }

    // As many as share conversions well, but not so many that threads would wait for the last ones.
    int64_t tiles_of_a_task() const {
        if (!L::converts(a)) return 1;
        int64_t tiles = 0;
        for (int64_t i = 0; i < a.sequence_count; ++i) {
            const Cut c = cut(a.sequences[i]);
            if (!c.split) tiles += c.tiles * a.Hkv;
        }
        return clamp(tiles / (upper(a.threads, 1) * kTasksPerThread), 1, kTogether);
    }

    double flops() const {
        int64_t pairs_of = 0;  // of a query and a key
        for (int64_t i = 0; i < a.sequence_count; ++i) pairs_of += cuts[i].rows * a.Hkv * a.sequences[i].k_count;
        return 4.0 * static_cast<double>(pairs_of) * static_cast<double>(a.D + a.Dv) / 2;
    }

    // The sequence that number i of a running count belongs to. Sequences that count nothing share their first number
    // with the next: the last one at or before i is meant.
    int64_t find(int64_t i, int64_t Cut::* first) const {
        int64_t lo = 0, hi = a.sequence_count;
        while (hi - lo > 1) {
            const int64_t mid = (lo + hi) / 2;
            (cuts[mid].*first <= i ? lo : hi) = mid;
        }
        return lo;
    }

    // The rows of a tile: there may be none, where a band has fewer than others.
    void rows_of(const Sequence& s, const Cut& c, int64_t kv_head, int64_t tile, Tile& to) const {
        to.sequence = &s;
        to.kv_head = kv_head;
        Rows& rows = to.rows;
        rows.batch = s.batch;
        rows.key_count = s.k_count;
        const int64_t heads = c.by_head ? job.group : 1, per_band = c.tiles / heads / c.bands;
        const int64_t head = tile / (per_band * c.bands), band = tile / per_band % c.bands;
        const Band of = band_of(s, c, band);
        const int64_t first = tile % per_band * c.tile_rows;
        rows.count = static_cast<int>(clamp(of.count - first, 0, c.tile_rows));
        for (int r = 0; r < rows.count; ++r) {
            const int64_t x = first + r;
            const int64_t i = c.by_query ? x / job.group : c.by_head ? of.first + c.step * x : x % s.q_count;
            rows.head[r] = kv_head * job.group + (c.by_query ? x % job.group : c.by_head ? head : x / s.q_count);
            rows.index[r] = i;
            rows.position[r] = s.positions != nullptr ? s.positions[i] : s.position + i;
        }
        to.sieve = keys_between(0, s.k_count);
        if (c.step > 1 && rows.count > 0) {
            to.sieve.step = c.step, to.sieve.first = floor_mod(rows.position[0] - job.pattern.offset, c.step);
            to.sieve.to = upper(to.sieve.place(s.k_count), 0);
        }
    }

    // The rows of a band: first, first + step, ...
    struct Band {
        int64_t first, count;
    };
    Band band_of(const Sequence& s, const Cut& c, int64_t band) const {
        if (c.step > 1) return {band, (s.q_count - band + c.step - 1) / c.step};
        if (c.block == 0) return {0, c.by_head ? s.q_count : c.rows};
        const int64_t from = (floor_div(s.position, c.block) + band) * c.block - s.position;
        return {upper(from, 0), lower(from + c.block, s.q_count) - upper(from, 0)};
    }
};

}  // namespace QKV_ISA
}  // namespace qkv
