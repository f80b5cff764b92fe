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

// The walk over the keys that a tile of rows may see: calls visit(block) for their granules in order, up to Most at a
// time.
template <int Most, class Visit>
class Walk {
  public:
    Walk(const Program& program, const Rows& rows, Scratch& scratch, Block& block, Visit visit)
        : program_(program), rows_(rows), scratch_(scratch), block_(block), visit_(visit), every_(all_rows(rows)) {}

    // The keys in [k0, k1); k0 is a multiple of kGranule.
    void go(int64_t k0, int64_t k1) {
        Bounds bounds;
        if (program_.empty()) {
            bounds.seen.set(0, rows_.key_count);
            bounds.full = bounds.seen;
        } else {
            program_.bounds(rows_, scratch_, bounds);
        }
        clear();
        int64_t done = k0;  // granules before this have been looked at
        int f = 0;
        for (int i = 0; i < bounds.seen.count; ++i) {
            int64_t at = upper(done, bounds.seen.first[i] / kGranule * kGranule);
            const int64_t stop = lower(bounds.seen.last[i], k1);
            while (at < stop) {
                while (f < bounds.full.count && bounds.full.last[f] < at + kGranule) ++f;
                const bool in = f < bounds.full.count;
                if (in && bounds.full.first[f] <= at) {
                    for (const int64_t end = lower(bounds.full.last[f], k1); at + kGranule <= end; at += kGranule)
                        push(at, nullptr);
                    if (at >= stop) break;
                    if (bounds.full.last[f] >= at + kGranule)
                        break;  // k1 cuts the granule: the next chunk has its tail
                    continue;
                }
                // Up to the next full range, bits decide.
                int64_t end = lower(stop, at + kWindowKeys);
                if (in && bounds.full.first[f] > at) end = lower(end, round_up(bounds.full.first[f], kGranule));
                at += partly(at, static_cast<int>(round_up(end - at, kGranule)));
            }
            done = upper(done, at);
        }
        if (block_.granules > 0) visit_(block_);
        clear();
    }

  private:
    void clear() {
        block_.granules = 0;
        block_.masked = false;
    }

    // words: the rows that see each key of the granule; null: all do.
    void push(int64_t key, const uint64_t* words) {
        uint64_t* to = block_.words + block_.keys();
        for (int j = 0; j < kGranule; ++j) to[j] = words == nullptr ? every_ : words[j];
        block_.masked |= words != nullptr;
        block_.key[block_.granules++] = key;
        if (block_.granules == Most) {
            visit_(block_);
            clear();
        }
    }

    // The n keys from `at`, of which some rows may see some. Returns n.
    int partly(int64_t at, int n) {
        uint64_t words[kWindowKeys];
        if (program_.empty()) {
            for (int j = 0; j < n; ++j) words[j] = at + j < rows_.key_count ? every_ : 0;
        } else {
            program_.bits(rows_, at, n, scratch_, words);
        }
        for (int g = 0; g < n; g += kGranule) {
            uint64_t any = 0, all = every_;
            for (int j = 0; j < kGranule; ++j) {
                any |= words[g + j];
                all &= words[g + j];
            }
            if (any != 0) push(at + g, all == every_ ? nullptr : words + g);
        }
        return n;
    }

    const Program& program_;
    const Rows& rows_;
    Scratch& scratch_;
    Block& block_;
    Visit visit_;
    uint64_t every_;
};
template <int Most = kGranules, class Visit>
inline void walk(const Program& program, const Rows& rows, int64_t k0, int64_t k1, Scratch& scratch, Block& block,
                 Visit visit) {
    Walk<Most, Visit>(program, rows, scratch, block, visit).go(k0, k1);
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
