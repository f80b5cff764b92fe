// How the backward kernel deals rows to tiles: next to each other, or as a mask's pattern asks for.
//
// Rows that see the same keys belong into one tile: those whose positions are alike modulo a pattern's step, those of a
// block of positions where blocks do not fill whole vectors of rows, and the heads of one query where each has a list
// of keys for all of them. Which row stands where depends on the mask and the sizes alone, never on the number of
// threads.
#pragma once
#include "kernel/score.h"

namespace qkv {
namespace QKV_ISA {

// W: rows of a vector. Unit: those that are told apart within a tile. Most: rows of a tile.
template <int W, int Unit, int Most>
class Bands {
  public:
    // longest: queries of a sequence at most.
    void begin(const Attention& a, const Job& job, int64_t longest) {
        group_ = job.group;
        by_head_ = longest >= Most;
        const int64_t span = by_head_ ? arrange(a, job.pattern, longest) : longest * group_;
        per_band_ = (span + tile_rows_ - 1) / tile_rows_;
    }

    // Of one sequence and key/value head.
    int64_t tiles() const { return per_band_ * bands_ * (by_head_ ? group_ : 1); }
    // A row at position p sees no key but those that are p - offset modulo step.
    int64_t step() const { return step_; }
    // The step's keys that a tile may see at all: first, first + step, ...
    int64_t first_key(const Tile& tile) const {
        return step_ == 1 ? 0 : floor_mod(tile.rows.position[0] - offset_, step_);
    }

    // Tiles that may see keys of such a class, the last one first: x in [0, some()).
    int64_t some() const { return step_ == 1 ? tiles() : per_band_ * group_; }
    int64_t tile(const Sequence& s, int64_t first, int64_t x) const {
        const int64_t back = some() - 1 - x;
        if (step_ == 1) return back;
        const int64_t band = floor_mod(first + offset_ - s.position, step_);
        return (back / per_band_ * bands_ + band) * per_band_ + back % per_band_;
    }

    // The rows of tile t; false if there are none: other bands, or other sequences, have more.
    bool fill(const Sequence& s, int64_t kv_head, int64_t t, Tile& tile) const {
        tile.sequence = &s;
        tile.kv_head = kv_head;
        Rows& rows = tile.rows;
        rows.batch = s.batch;
        rows.key_count = s.k_count;
        const int64_t head = t / (per_band_ * bands_), first = t % per_band_ * tile_rows_;
        const Band band = band_of(s, t / per_band_ % bands_);
        rows.count = static_cast<int>(clamp(band.count - first, 0, tile_rows_));
        for (int r = 0; r < rows.count; ++r) {
            const int64_t x = first + r;
            const int64_t i = by_head_ ? band.first + step_ * x : by_query_ ? x / group_ : x % s.q_count;
            rows.head[r] = kv_head * group_ + (by_head_ ? head : by_query_ ? x % group_ : x / s.q_count);
            rows.index[r] = i;
            rows.position[r] = s.positions != nullptr ? s.positions[i] : s.position + i;
        }
        return rows.count > 0;
    }

  private:
    // The rows of a band: first, first + step, ...
    struct Band {
        int64_t first, count;
    };
    Band band_of(const Sequence& s, int64_t band) const {
        if (!by_head_) return {0, s.q_count * group_};
        if (block_ == 0) return {band, upper(0, s.q_count - band + step_ - 1) / step_};
        const int64_t from = (floor_div(s.position, block_) + band) * block_ - s.position;
        return {upper(from, 0), lower(from + block_, s.q_count) - upper(from, 0)};
    }

    // Returns the rows of a band, at most.
    int64_t arrange(const Attention& a, const Pattern& p, int64_t longest) {
        bool placed = false, aligned = p.block % Unit == 0;
        for (int64_t i = 0; i < a.sequence_count; ++i) {
            placed |= a.sequences[i].positions != nullptr;
            aligned &= floor_mod(a.sequences[i].position, Unit) == 0;
        }
        if (p.listed > 0 && p.listed < W && group_ > 1 && group_ <= W) {
            by_query_ = true, by_head_ = false;
            tile_rows_ = W / group_ * group_;
            return longest * group_;
        }
        if (!placed && p.step > 1 && p.step <= longest) {
            step_ = bands_ = p.step, offset_ = p.offset;
            return (longest + step_ - 1) / step_;
        }
        // Blocks of few rows: as many as fill a vector.
        const int64_t block = p.block > 0 && p.block < W ? W / p.block * p.block : p.block;
        if (placed || aligned || block == 0 || block >= longest) return longest;
        block_ = block;
        for (int64_t i = 0; i < a.sequence_count; ++i) {
            const Sequence& s = a.sequences[i];
            if (s.q_count == 0) continue;
            bands_ = upper(bands_, floor_div(s.position + s.q_count - 1, block) - floor_div(s.position, block) + 1);
        }
        tile_rows_ = lower(Most, round_up(block, Unit));
        return block;
    }

    int64_t group_ = 1, step_ = 1, offset_ = 0, block_ = 0, bands_ = 1, per_band_ = 0, tile_rows_ = Most;
    bool by_head_ = false, by_query_ = false;
};

}  // namespace QKV_ISA
}  // namespace qkv
