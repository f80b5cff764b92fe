// Keys and values as all kernels see them: where they lie, and which of them a tile of rows may see.
#pragma once
#include <bit>

#include "kernel/elements.h"
#include "mask/program.h"

namespace qkv {
namespace QKV_ISA {

inline constexpr int kGranule = 16;                       // keys that are visited or skipped together
inline constexpr int kGranules = kWindowKeys / kGranule;  // of a block
// A granule of which some row sees so many keys is cheaper where it lies than gathered: a key costs a twentieth of what
// is done with it to be copied.
inline constexpr int kWorthWhole = 15;

// The keys of one step of the online softmax: up to 12 granules, which need not be neighbours. The keys of a granule
// are neighbours, too, but for those that were gathered.
struct Block {
    int granules;
    bool masked;                  // some bit of words is 0
    int low, high;                // the vectors of rows of which some row sees a key
    uint32_t gathered;            // one bit a granule
    uint32_t loose;               // of those, the ones whose keys are not step after step
    int64_t key[kGranules];       // first key of each granule
    int live[kGranules];          // the keys that each has: fewer than 16 at the end, or where no more were gathered
    int64_t picked[kWindowKeys];  // by key of the block, where they were gathered: which key that is
    uint64_t words[kWindowKeys];  // by key of the block: the rows that see it
    int keys() const { return granules * kGranule; }
    QKV_INLINE bool straight(int g) const { return !(gathered >> g & 1); }
    // Whether the first key and the tile's sieve say which keys these are.
    QKV_INLINE bool regular(int g) const { return !(loose >> g & 1); }
    // Key i of granule g.
    QKV_INLINE int64_t at(int g, int i) const { return straight(g) ? key[g] + i : picked[g * kGranule + i]; }
};

// The walk over the keys that a tile of rows may see: its granules in order, up to Most at a time. It stops between
// blocks, so that several tiles may take turns.
//
// A walk that gathers leaves keys out that no row sees: where a granule has some, those that are seen wait until they
// are 16. Keys are counted by their places in a sieve, which are their numbers where it has a step of 1.
template <int Most>
class Walk {
  public:
    // The keys in [k0, k1); k0 is a multiple of kGranule. Granules are straight.
    void begin(const Program& program, const Rows& rows, Scratch& scratch, int64_t k0, int64_t k1) {
        begin(program, rows, scratch, keys_between(k0, k1), false);
    }
    // The keys that a sieve asks for; it has a step of 1, or asks for all and the walk gathers. lanes: rows of a
    // vector, where blocks may be for some of the tile's vectors; 0: they are for all rows.
    void begin(const Program& program, const Rows& rows, Scratch& scratch, const Sieve& sieve, bool gathers,
               int lanes = 0) {
        rows_ = &rows, program_ = &program;
        lanes_ = lanes, vectors_ = lanes > 0 ? (rows.count + lanes - 1) / lanes : 1;
        sieve_ = sieve, gathers_ = gathers;
        every_ = all_rows(rows);
        count_ = sieve.place(rows.key_count);
        done_ = sieve.from;
        part_ = parts_ = waiting_ = 0;
        find_bounds(scratch);
    }

    // The next block; false: there is none.
    bool next(Scratch& scratch, Block& block) {
        block.granules = 0;
        block.masked = false;
        block.gathered = block.loose = 0;
        do {
            for (; part_ < parts_; part_ += kGranule)
                if (block.granules == Most || !push_part(block)) return true;
            for (; at_ + kGranule <= full_end_; at_ += kGranule) {
                if (block.granules == Most || !takes(block, every_)) return true;
                push(block, at_, nullptr);
            }
        } while (find(scratch));
        if (waiting_ > 0 && block.granules < Most) push_waiting(block);
        return block.granules > 0;
    }

    // About the first key of the next block.
    int64_t position() const {
        if (part_ < parts_) return at_ - parts_ + part_;
        if (open_) return at_;
        if (range_ < bounds_.seen.count) return upper(done_, bounds_.seen.first[range_]);
        return known_ < sieve_.to || waiting_ > 0 ? upper(done_, known_) : kFar;
    }
    bool over() const { return position() == kFar; }

  private:
    // From the key that is next on, as far as they can be told.
    void find_bounds(Scratch& scratch) {
        Sieve left = sieve_;
        left.from = done_;
        if (program_->empty()) {
            bounds_.seen.set(left.from, lower(left.to, count_));
            bounds_.full = bounds_.seen;
        } else {
            program_->bounds(*rows_, left, scratch, bounds_);
        }
        // A list that is too short is right for at least twice as many keys as it has ranges: far more than a granule.
        known_ = bounds_.end() >= sieve_.to ? sieve_.to : bounds_.end() / kGranule * kGranule;
        const Ranges &seen = bounds_.seen, &full = bounds_.full;
        exact_ = seen.count == full.count;
        for (int i = 0; i < seen.count && exact_; ++i)
            exact_ = seen.first[i] == full.first[i] && seen.last[i] == full.last[i];
        range_ = full_ = 0;
        open_ = false;
        at_ = full_end_ = 0;
    }

    // What a granule costs for so many vectors of rows, and what a step costs beside its granules.
    static constexpr int kCost[] = {0, 8, 12, 16, 21}, kStepCost = 3;

    // Whether the block takes a granule of which these rows see some: not if a block of its own is cheaper.
    bool takes(Block& block, uint64_t any) const {
        int low = 0, high = vectors_;
        if (lanes_ > 0) {
            low = std::countr_zero(any) / lanes_;
            high = (63 - std::countl_zero(any)) / lanes_ + 1;
        }
        if (block.granules > 0) {
            const int own = kCost[high - low], old = kCost[block.high - block.low];
            low = block.low < low ? block.low : low, high = block.high > high ? block.high : high;
            const int both = kCost[high - low];
            if ((both - old) * block.granules + both - own > kStepCost) return false;
        }
        block.low = low, block.high = high;
        return true;
    }

    // words: the rows that see each key of the granule; null: all do.
    void push(Block& block, int64_t place, const uint64_t* words) const {
        uint64_t* to = block.words + block.keys();
        for (int j = 0; j < kGranule; ++j) to[j] = words == nullptr ? every_ : words[j];
        block.masked |= words != nullptr;
        block.live[block.granules] = static_cast<int>(lower(kGranule, count_ - place));
        block.key[block.granules] = sieve_.key(place);
        if (sieve_.step != 1) {
            block.gathered |= 1u << block.granules;
            int64_t* key = block.picked + block.keys();
            for (int j = 0; j < kGranule; ++j) key[j] = sieve_.key(place + j);
        }
        ++block.granules;
    }

    // Of a granule that bits were evaluated for, what some row sees. False: it belongs into another block.
    bool push_part(Block& block) {
        uint64_t* words = words_ + part_;
        const int64_t place = at_ - parts_ + part_;
        uint64_t any = 0, all = every_;
        int seen = 0;
        for (int j = 0; j < kGranule; ++j) {
            any |= words[j];
            all &= words[j];
            seen += words[j] != 0;
        }
        if (any == 0) return true;
        if (!gathers_ || seen >= kWorthWhole) {
            if (!takes(block, any)) return false;
            push(block, place, all == every_ ? nullptr : words);
            return true;
        }
        for (int j = 0; j < kGranule; ++j) {
            if (words[j] == 0) continue;
            waiting_keys_[waiting_] = sieve_.key(place + j);
            waiting_words_[waiting_] = words[j];
            if (++waiting_ == kGranule) push_waiting(block);
        }
        return true;
    }

    // The keys that were gathered, as a granule.
    void push_waiting(Block& block) {
        uint64_t all = waiting_ == kGranule ? every_ : 0;
        if (lanes_ == 0)
            block.low = 0, block.high = vectors_;
        else if (block.granules == 0)
            block.low = vectors_, block.high = 0;
        for (int j = 0; j < waiting_ && lanes_ > 0; ++j) {
            const int low = std::countr_zero(waiting_words_[j]) / lanes_,
                      high = (63 - std::countl_zero(waiting_words_[j])) / lanes_ + 1;
            block.low = block.low < low ? block.low : low, block.high = block.high > high ? block.high : high;
        }
        for (int j = 0; j < kGranule; ++j) {
            const bool there = j < waiting_;
            block.words[block.keys() + j] = there ? waiting_words_[j] : 0;
            block.picked[block.keys() + j] = waiting_keys_[there ? j : 0];
            if (there) all &= waiting_words_[j];
        }
        block.masked |= all != every_;
        block.gathered |= 1u << block.granules;
        block.loose |= 1u << block.granules;
        block.live[block.granules] = waiting_;
        block.key[block.granules++] = waiting_keys_[0];
        waiting_ = 0;
    }

    // Finds the keys that follow: a stretch of granules that all rows see whole, or one that bits are evaluated for.
    bool find(Scratch& scratch) {
        const Ranges &seen = bounds_.seen, &full = bounds_.full;
        for (;;) {
            // A range beyond what is known may be several: where the next bounds begin is not told by it.
            for (; range_ < seen.count && (open_ || seen.first[range_] < known_); ++range_) {
                if (!open_) at_ = upper(done_, seen.first[range_] / kGranule * kGranule);
                open_ = true;
                const int64_t stop = lower(seen.last[range_], known_);
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
                    full_end_ = lower(full.last[full_], known_);
                    if (at_ + kGranule <= full_end_) return true;
                    // The end of what is known cuts the granule: the next chunk has its tail.
                }
                done_ = upper(done_, at_);
                open_ = false;
            }
            if (known_ == sieve_.to) return false;
            done_ = upper(done_, known_);
            find_bounds(scratch);
        }
    }

    // The bits of the n keys from at_, of which some rows may see some.
    void evaluate(Scratch& scratch, int n) {
        if (exact_) {
            const Ranges& seen = bounds_.seen;
            std::memset(words_, 0, sizeof(uint64_t) * static_cast<size_t>(n));
            for (int i = range_; i < seen.count && seen.first[i] < at_ + n; ++i)
                for (int64_t x = upper(seen.first[i], at_); x < lower(seen.last[i], lower(at_ + n, count_)); ++x)
                    words_[x - at_] = every_;
        } else {
            program_->bits(*rows_, sieve_, at_, n, scratch, words_);
        }
        at_ += n;
        part_ = 0, parts_ = n;
    }

    const Program* program_;
    const Rows* rows_;
    Sieve sieve_;
    bool gathers_;
    int lanes_, vectors_;
    Bounds bounds_;
    bool exact_;  // all rows see all that any sees, as far as the bounds go
    uint64_t every_;
    int64_t count_;          // places of all keys
    int64_t known_;          // the bounds are right up to here
    int64_t done_;           // granules before this have been looked at
    int range_, full_;       // of the bounds
    bool open_;              // at_ is within the range
    int64_t at_, full_end_;  // the next place, and where those end that all rows see
    int part_, parts_;       // keys that bits were evaluated for, before at_
    uint64_t words_[kWindowKeys];
    int waiting_;  // keys that were gathered
    int64_t waiting_keys_[kGranule];
    uint64_t waiting_words_[kGranule];
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
    // Row i of granule g; null where there is none.
    QKV_INLINE const S* row_of(const Block& block, int g, const S* first, bool straight_, int i) const {
        if (i >= block.live[g]) return nullptr;
        return block.straight(g) ? row_of(first, straight_, block.key[g], i) : row(block.at(g, i));
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
inline void gather_scales(const Attention& a, const Sequence& s, int64_t kv_head, const Block& block, int g, E* k_to,
                          E* v_to) {
    const int64_t live = block.live[g], j0 = block.key[g], step = a.scale_stride[2];
    if (!block.straight(g)) {
        for (int i = 0; i < kGranule; ++i) {
            const int64_t j = block.at(g, i), number = s.pages[j / a.page_size];
            const int64_t at = number * a.scale_stride[0] + kv_head * a.scale_stride[1] + j % a.page_size * step;
            const bool there = i < live && number >= 0;
            k_to[i] = there ? static_cast<E>(a.k_scale[at]) : E(0);
            v_to[i] = there ? static_cast<E>(a.v_scale[at]) : E(0);
        }
        return;
    }
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
