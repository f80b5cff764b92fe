// Keys and values as all kernels see them: where they lie, and which of them a tile of rows may see.
#pragma once
#include "kernel/elements.h"
#include "mask/program.h"

namespace qkv {
namespace QKV_ISA {

inline constexpr int kGranule = 16;                       // keys that are visited or skipped together
inline constexpr int kGranules = kWindowKeys / kGranule;  // of a block

// The keys of one step of the online softmax: up to 12 granules, which need not be neighbours.
struct Block {
    int granules;
    bool masked;                  // some bit of words is 0
    int64_t key[kGranules];       // first key of each granule
    uint64_t words[kWindowKeys];  // by key of the block: the rows that see it
    int keys() const { return granules * kGranule; }
};

// The walk over the keys that a tile of rows may see: its granules in order, up to Most at a time. It stops between
// blocks, so that several tiles may take turns.
template <int Most>
class Walk {
  public:
    // The keys in [k0, k1); k0 is a multiple of kGranule.
    void begin(const Program& program, const Rows& rows, Scratch& scratch, int64_t k0, int64_t k1) {
        rows_ = &rows, program_ = &program;
        every_ = all_rows(rows);
        end_ = k1, done_ = k0;
        range_ = full_ = 0;
        open_ = false;
        part_ = parts_ = 0;
        at_ = full_end_ = 0;
        if (program.empty()) {
            bounds_.seen.set(0, rows.key_count);
            bounds_.full = bounds_.seen;
        } else {
            program.bounds(rows, scratch, bounds_);
        }
    }

    // The next block; false: there is none.
    bool next(Scratch& scratch, Block& block) {
        block.granules = 0;
        block.masked = false;
        do {
            for (; part_ < parts_; part_ += kGranule)
                if (block.granules == Most)
                    return true;
                else
                    push_part(block);
            for (; at_ + kGranule <= full_end_; at_ += kGranule)
                if (block.granules == Most)
                    return true;
                else
                    push(block, at_, nullptr);
        } while (find(scratch));
        return block.granules > 0;
    }

    // About the first key of the next block.
    int64_t position() const {
        if (part_ < parts_) return at_ - parts_ + part_;
        if (open_) return at_;
        return range_ < bounds_.seen.count ? upper(done_, bounds_.seen.first[range_]) : kFar;
    }
    bool over() const { return position() == kFar; }

  private:
    // words: the rows that see each key of the granule; null: all do.
    void push(Block& block, int64_t key, const uint64_t* words) const {
        uint64_t* to = block.words + block.keys();
        for (int j = 0; j < kGranule; ++j) to[j] = words == nullptr ? every_ : words[j];
        block.masked |= words != nullptr;
        block.key[block.granules++] = key;
    }

    // A granule that bits were evaluated for.
    void push_part(Block& block) const {
        uint64_t any = 0, all = every_;
        for (int j = 0; j < kGranule; ++j) {
            any |= words_[part_ + j];
            all &= words_[part_ + j];
        }
        if (any != 0) push(block, at_ - parts_ + part_, all == every_ ? nullptr : words_ + part_);
    }

    // Finds the keys that follow: a stretch of granules that all rows see whole, or one that bits are evaluated for.
    bool find(Scratch& scratch) {
        const Ranges &seen = bounds_.seen, &full = bounds_.full;
        for (; range_ < seen.count; ++range_) {
            if (!open_) at_ = upper(done_, seen.first[range_] / kGranule * kGranule);
            open_ = true;
            const int64_t stop = lower(seen.last[range_], end_);
            if (at_ < stop) {
                while (full_ < full.count && full.last[full_] < at_ + kGranule) ++full_;
                const bool in = full_ < full.count;
                if (!in || full.first[full_] > at_) {
                    // Up to the next full range, bits decide.
                    int64_t end = lower(stop, at_ + kWindowKeys);
                    if (in) end = lower(end, round_up(full.first[full_], kGranule));
                    evaluate(scratch, static_cast<int>(round_up(end - at_, kGranule)));
                    return true;
                }
                full_end_ = lower(full.last[full_], end_);
                if (at_ + kGranule <= full_end_) return true;
                // The end of the keys asked for cuts the granule: the next chunk has its tail.
            }
            done_ = upper(done_, at_);
            open_ = false;
        }
        return false;
    }

    // The bits of the n keys from at_, of which some rows may see some.
    void evaluate(Scratch& scratch, int n) {
        if (program_->empty()) {
            for (int j = 0; j < n; ++j) words_[j] = at_ + j < rows_->key_count ? every_ : 0;
        } else {
            program_->bits(*rows_, at_, n, scratch, words_);
        }
        at_ += n;
        part_ = 0, parts_ = n;
    }

    const Program* program_;
    const Rows* rows_;
    Bounds bounds_;
    uint64_t every_;
    int64_t end_;            // of the keys asked for
    int64_t done_;           // granules before this have been looked at
    int range_, full_;       // of the bounds
    bool open_;              // at_ is within the range
    int64_t at_, full_end_;  // the next key, and where those end that all rows see
    int part_, parts_;       // keys that bits were evaluated for, before at_
    uint64_t words_[kWindowKeys];
};
// A walk from begin to end: calls visit(block).
template <int Most = kGranules, class Visit>
inline void walk(const Program& program, const Rows& rows, int64_t k0, int64_t k1, Scratch& scratch, Block& block,
                 Visit visit) {
    Walk<Most> keys;
    keys.begin(program, rows, scratch, k0, k1);
    while (keys.next(scratch, block)) visit(block);
}

// The keys (or values) of one sequence and one head, where they lie.
template <class S>
struct Source {
    const S* base;  // key 0; with pages: slot 0 of page 0
    int64_t stride, stride_d;
    const int32_t* pages;
    int64_t page_size, page;
    // The row of key j; null where its page has no memory.
    QKV_INLINE const S* row(int64_t j) const {
        if (pages == nullptr) return base + j * stride;
        const int64_t number = pages[j / page_size];
        return number < 0 ? nullptr : base + number * page + j % page_size * stride;
    }
    // Row i of the granule that begins at key j; `first` is its row 0. Looking a page up costs a division.
    QKV_INLINE const S* row_of(const S* first, bool straight_, int64_t j, int64_t i) const {
        return !straight_ ? row(j + i) : first == nullptr ? nullptr : first + i * stride;
    }
    // Whether the keys of every granule lie one stride apart.
    bool straight() const { return pages == nullptr || page_size % kGranule == 0; }
};
template <class S>
inline Source<S> keys_of(const Attention& a, const Sequence& s, int64_t kv_head) {
    return {static_cast<const S*>(s.k) + kv_head * a.k_stride[0],
            a.k_stride[1],
            a.k_stride[2],
            s.pages,
            a.page_size,
            a.k_page};
}
template <class S>
inline Source<S> values_of(const Attention& a, const Sequence& s, int64_t kv_head) {
    return {static_cast<const S*>(s.v) + kv_head * a.v_stride[0],
            a.v_stride[1],
            a.v_stride[2],
            s.pages,
            a.page_size,
            a.v_page};
}
inline bool is_scaled(const Attention& a) { return a.k_scale != nullptr; }

// One row as numbers of type To, in the vectors of V; null counts as zeros. i8 and f8 are exact in every To, before
// their scale.
template <class V, class S, class To>
inline void unpack_row(const S* from, int64_t stride, int64_t D, int64_t padded, To* to) {
    int64_t d = 0;
    if (from != nullptr) {
        if (stride == 1) {
            if constexpr (Elements<To>::kPair == 2) {
                using P = typename Elements<To>::Pairs;
                for (; d + 2 * V::W <= D; d += 2 * V::W)
                    P::store(P::narrow(V::load(from + d), V::load(from + d + V::W)), to + d);
            }
            for (; d + V::W <= D; d += V::W) V::load(from + d).store(to + d);
        }
        for (; d < D; ++d) narrow(widen(from[d * stride]), to[d]);
    }
    if (d < padded) std::memset(static_cast<void*>(to + d), 0, sizeof(To) * static_cast<size_t>(padded - d));
}

// The scales of a granule's keys and values: those past the end, and on pages without memory, count as 0.
template <class E>
inline void gather_scales(const Attention& a, const Sequence& s, int64_t kv_head, int64_t j0, E* k_to, E* v_to) {
    const int64_t live = lower(kGranule, s.k_count - j0), step = a.scale_stride[2];
    int64_t i = 0;
    while (i < live) {  // a page at a time
        const int64_t slot = (j0 + i) % a.page_size, number = s.pages[(j0 + i) / a.page_size];
        const int64_t at = number * a.scale_stride[0] + kv_head * a.scale_stride[1] + slot * step;
        const int64_t end = lower(live, i + a.page_size - slot);
        if (number < 0) {
            for (; i < end; ++i) k_to[i] = v_to[i] = 0;
        } else if (step == 1) {
            for (int64_t x = at - i; i < end; ++i)
                k_to[i] = static_cast<E>(a.k_scale[x + i]), v_to[i] = static_cast<E>(a.v_scale[x + i]);
        } else {
            for (int64_t x = at; i < end; ++i, x += step)
                k_to[i] = static_cast<E>(a.k_scale[x]), v_to[i] = static_cast<E>(a.v_scale[x]);
        }
    }
    for (; i < kGranule; ++i) k_to[i] = v_to[i] = 0;
}

// Asks for the scales of the granule at j0 before they are needed.
inline void prefetch_scales(const Attention& a, const Sequence& s, int64_t kv_head, int64_t j0) {
    const int64_t number = s.pages[j0 / a.page_size], slot = j0 % a.page_size;
    const int64_t at =
        number < 0 ? 0 : number * a.scale_stride[0] + kv_head * a.scale_stride[1] + slot * a.scale_stride[2];
    prefetch(reinterpret_cast<uintptr_t>(a.k_scale + at));
    prefetch(reinterpret_cast<uintptr_t>(a.v_scale + at));
}

}  // namespace QKV_ISA
}  // namespace qkv
