// The kernel for few rows (decode): dot products along the head dimension.
//
// Every key and value is loaded once for all rows of its group. The sums of one vector's worth of keys are reduced together.
#pragma once
#include <type_traits>

#include "blocks.h"

namespace qkv {
namespace QKV_ISA {

// Element-wise products in float or double; narrow elements are widened as they are loaded.
template <class Element>
struct PlainDots {
    using T = Element;
    using E = typename Storage<T>::E;
    using V = std::conditional_t<sizeof(E) == 8, VD, VF>;
    using Q = E;
    static constexpr int kStep = V::W;  // elements of a key taken at a time
    static constexpr int kRunGranules = 4;  // rounding grows with the length of a sum: it is taken in runs of 64 keys
    static constexpr int kPair = 1;
    static constexpr int kDegree = 6;
};

#if defined(QKV_ISA_AVX512BF16)
struct PairDots {
    using T = bf16;
    using E = float;
    using V = VF;
    using Q = bf16;
    static constexpr int kStep = 32;
    static constexpr int kRunGranules = kGranules;
    static constexpr int kPair = 2;
    static constexpr int kDegree = 5;
};
#endif

template <class M>
class Dots {
  public:
    using T = typename M::T;
    using E = typename M::E;
    using V = typename M::V;
    using Q = typename M::Q;
    static constexpr int W = V::W;
    static constexpr int kTileRows = 16;
    static constexpr int kConvertedGranules = 2;
    static constexpr int kStepGranules = 8;  // divides a chunk: all steps of a long call are as long as each other

    struct Work {
        Scratch scratch;
        Block block;
        Tile tile;
        Q* queries;  // [rows][padded D]
        E* out;      // [rows][padded Dv]
        E* scores;   // [rows][kWindowKeys]
        E* bias;     // [kWindowKeys]
        uint32_t* pairs;  // [rows][kWindowKeys / 2]
        T* keys;     // rows that cannot be loaded where they lie: [kWindowKeys][padded D]
        T* values;   // likewise [kWindowKeys][padded Dv]
        E* k_scales; // [kWindowKeys], of stored keys that have them
        E* v_scales;
        E m[kTileRows], l[kTileRows];
        uint64_t draws[kWindowKeys];  // dropout's numbers of a step's keys
        bool masked;
    };

    static int64_t padded(int64_t D) { return (D + M::kStep - 1) / M::kStep * M::kStep; }

    static void reset(const Attention& a, Work& w) {
        w.masked = false;
        for (int r = 0; r < kTileRows; ++r) {
            w.m[r] = -static_cast<E>(INFINITY);
            w.l[r] = 0;
        }
        std::memset(w.out, 0, sizeof(E) * static_cast<size_t>(w.tile.rows.count * padded(a.Dv)));
    }

    // Takes the queries of a tile, into rows from `first` on.
    static void load(const Job& job, Work& w, const Tile& tile, int first) {
        const Attention& a = *job.call;
        const Rows& rows = tile.rows;
        const int64_t width = padded(a.D);
        for (int r = 0; r < rows.count; ++r) {
            const T* from = static_cast<const T*>(a.q) + rows.batch * a.q_stride[0] + rows.head[r] * a.q_stride[1] +
                            (tile.sequence->q_first + rows.index[r]) * a.q_stride[2];
            Q* to = w.queries + (first + r) * width;
            for (int64_t d = 0; d < width; ++d) {
                if constexpr (M::kPair == 2) {
                    to[d].bits = d < a.D ? static_cast<uint16_t>(from[d * a.q_stride[3]].bits ^ (job.negate ? 0x8000u : 0u)) : uint16_t(0);
                } else {
                    to[d] = d < a.D ? widen(from[d * a.q_stride[3]]) * (job.negate ? E(-1) : E(1)) : E(0);
                }
            }
        }
    }

    static void run(const Job& job, const Program& program, Work& w, int64_t k0, int64_t k1, bool careful) {
        walk<kStepGranules>(program, w.tile.rows, k0, k1, w.scratch, w.block, [&](Block& block) { step(job, w, block, careful); });
    }

    static bool spoiled(const Attention& a, const Work& w) {
        if (!w.masked || QKV_MUTANT(poison_passes)) return false;
        const int64_t width = padded(a.Dv);
        for (int r = 0; r < w.tile.rows.count; ++r) {
            V nothing = V::zero();  // 0 times everything: NaN where something is not finite
            for (int64_t d = 0; d < width; d += W) nothing = fma(V::load(w.out + r * width + d), V::zero(), nothing);
            if (sum(nothing) != 0) return true;
        }
        return false;
    }

    // Puts the columns of w.out in order (pair products leave them shuffled).
    static void settle(const Attention& a, Work& w) {
#if defined(QKV_ISA_AVX512BF16)
        if constexpr (M::kPair == 2) {
            const __m512i first = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), second = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
            const int64_t width = padded(a.Dv);
            for (int r = 0; r < w.tile.rows.count; ++r)
                for (int64_t d = 0; d < width; d += 32) {
                    E* at = w.out + r * width + d;
                    const __m512i lo = _mm512_loadu_si512(at), hi = _mm512_loadu_si512(at + 16);
                    _mm512_storeu_si512(at, _mm512_permutex2var_epi64(lo, first, hi));
                    _mm512_storeu_si512(at + 16, _mm512_permutex2var_epi64(lo, second, hi));
                }
        }
#endif
        (void)a, (void)w;
    }

    static void finish(const Job& job, Work& w) {
        const Attention& a = *job.call;
        for (int r = 0; r < w.tile.rows.count; ++r) write_row<T, E, V>(job, w.tile, r, w.out + r * padded(a.Dv), w.m[r], w.l[r]);
    }

  private:
    static constexpr int kKeys = W;  // keys whose sums are reduced together

    static QKV_INLINE V multiply(const Q* q, const T* k, V acc) {
#if defined(QKV_ISA_AVX512BF16)
        if constexpr (M::kPair == 2) {
            return {_mm512_dpbf16_ps(acc.r, reinterpret_cast<__m512bh>(_mm512_loadu_si512(k)), reinterpret_cast<__m512bh>(_mm512_loadu_si512(q)))};
        } else
#endif
            return fma(V::load(k), V::load(q), acc);
    }

    // A granule's rows, as addresses to ask for before they are needed. Hints only: an address need not exist.
    struct Ahead {
        uintptr_t first, stride, bytes;
        uintptr_t from, step;  // of each row, what this pass over the rows of queries asks for

        // Asks for parts [part, end) of `parts` of the granule at once. Where keys lie one after the other the processor follows
        // by itself, and this is enough; between them the passes fetch a granule.
        QKV_INLINE void burst(int part, int end, int parts) const {
            for (int i = kGranule * part / parts; i < kGranule * end / parts; ++i) lines(i, 0, 64);
        }
        // Asks for a part of row i. On pages the processor does not see what comes next: requests are spread over the products,
        // few at a time, or they would queue.
        QKV_INLINE void row(int i) const { lines(i, from, step); }
        QKV_INLINE void share(int part, int parts) {
            from = 64 * static_cast<uintptr_t>(part);
            step = 64 * static_cast<uintptr_t>(parts);
        }

      private:
        QKV_INLINE void lines(int i, uintptr_t o, uintptr_t by) const {
#if defined(__GNUC__)
            for (; o < bytes; o += by) __builtin_prefetch(reinterpret_cast<const void*>(first + static_cast<uintptr_t>(i) * stride + o));
#else
            (void)i, (void)o, (void)by;
#endif
        }
    };
    template <class S>
    static QKV_INLINE Ahead ahead(const S* first, int64_t stride, int64_t width) {
        return {reinterpret_cast<uintptr_t>(first), static_cast<uintptr_t>(stride) * sizeof(S), static_cast<uintptr_t>(first == nullptr ? 0 : width) * sizeof(S), 0, 64};
    }

    // One granule's scores for `Rows_` rows of queries (1 or 2), keys in the order of memory. Past `live` there are no keys.
    template <int Rows_, bool Spread>
    static QKV_INLINE void scores(const Q* q, int64_t next_row, const T* keys, int64_t stride, int64_t width, int live, const Ahead& next, const Ahead& soon, E* to) {
        constexpr int kAtOnce = kKeys / Rows_;
        for (int g = 0; g < kGranule; g += kAtOnce) {
            V acc[kKeys];
            QKV_UNROLL for (int k = 0; k < kAtOnce; ++k) {
                V x[Rows_];
                QKV_UNROLL for (int r = 0; r < Rows_; ++r) x[r] = V::zero();
                const int64_t end = g + k < live ? width : 0;
                if constexpr (Spread) next.row(g + k), soon.row(g + k);
                for (int64_t d = 0; d < end; d += M::kStep)
                    QKV_UNROLL for (int r = 0; r < Rows_; ++r) x[r] = multiply(q + r * next_row + d, keys + (g + k) * stride + d, x[r]);
                QKV_UNROLL for (int r = 0; r < Rows_; ++r) acc[r * kAtOnce + k] = x[r];
            }
            if constexpr (Rows_ == 1) {
                sums(acc).store(to + g);
            } else {
                E both[W];
                sums(acc).store(both);
                QKV_UNROLL for (int r = 0; r < Rows_; ++r) std::memcpy(to + r * kWindowKeys + g, both + r * kAtOnce, sizeof(E) * kAtOnce);
            }
        }
    }

    // The granule of keys from j, as T: where it lies if it can be loaded there, else in `copy`.
    template <class S>
    static const T* resident(const Source<S>& source, int64_t D, int64_t j, int64_t keys, T* copy, int64_t& step_to) {
        const int64_t width = padded(D);
        const bool straight = source.straight();
        const S* first = straight ? source.row(j) : nullptr;
        if constexpr (std::is_same_v<S, T>) {
            if ((source.stride_d == 1 || QKV_MUTANT(stride_ignored)) && D == width && j + kGranule <= keys && first != nullptr) {
                step_to = source.stride;
                return first;
            }
        }
        // Rows past the end are not read, but for the second of a pair.
        step_to = width;
        const int64_t rows = lower(kGranule, keys - j);
        for (int64_t i = 0; i < rows; ++i) {
            const S* from = source.row_of(first, straight, j, i);
            T* to = copy + i * width;
            if constexpr (!std::is_same_v<S, T>) {
                unpack_row<V>(from, source.stride_d, D, width, to);
            } else {
                if (from == nullptr)
                    std::memset(static_cast<void*>(to), 0, sizeof(T) * static_cast<size_t>(D));
                else if (source.stride_d == 1 && D > 0)
                    std::memcpy(to, from, sizeof(T) * static_cast<size_t>(D));
                else
                    for (int64_t d = 0; d < D; ++d) to[d] = from[d * source.stride_d];
                std::memset(static_cast<void*>(to + D), 0, sizeof(T) * static_cast<size_t>(width - D));
            }
        }
        if (rows % M::kPair != 0) std::memset(static_cast<void*>(copy + rows * width), 0, sizeof(T) * static_cast<size_t>(width));
        return copy;
    }

    template <int Rows_, int Vectors, bool Careful>
    static QKV_INLINE void values(const Block& block, int g0, int g1, const T* const* from, const int64_t* strides, const int* live, const E* p, const uint32_t* pairs, E* out,
                                  int64_t width, int64_t d, const E* keep, int row) {
        V acc[Rows_][Vectors];
        QKV_UNROLL for (int r = 0; r < Rows_; ++r) QKV_UNROLL for (int c = 0; c < Vectors; ++c) acc[r][c] = V::zero();
        for (int g = g0; g < g1; ++g) {
            const T* v = from[g] + d;
            for (int k = 0; k < live[g]; k += M::kPair, v += M::kPair * strides[g]) {
                const int j = g * kGranule + k;
#if defined(QKV_ISA_AVX512BF16)
                if constexpr (M::kPair == 2) {
                    QKV_UNROLL for (int c = 0; c < Vectors; c += 2) {
                        __m512i x = _mm512_loadu_si512(v + c * 16), y = _mm512_loadu_si512(v + strides[g] + c * 16);
                        if constexpr (Careful) {
                            if (!(block.words[j] >> row & 1)) x = _mm512_setzero_si512();
                            if (!(block.words[j + 1] >> row & 1)) y = _mm512_setzero_si512();
                        }
                        const __m512i lo = _mm512_unpacklo_epi16(x, y), hi = _mm512_unpackhi_epi16(x, y);
                        QKV_UNROLL for (int r = 0; r < Rows_; ++r) {
                            const __m512bh w = reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(pairs[(QKV_MUTANT(dots_rows) ? r & ~1 : r) * kWindowKeys / 2 + j / 2])));
                            acc[r][c].r = _mm512_dpbf16_ps(acc[r][c].r, reinterpret_cast<__m512bh>(lo), w);
                            acc[r][c + 1].r = _mm512_dpbf16_ps(acc[r][c + 1].r, reinterpret_cast<__m512bh>(hi), w);
                        }
                    }
                    continue;
                }
#endif
                V x[Vectors];
                QKV_UNROLL for (int c = 0; c < Vectors; ++c) x[c] = V::load(v + c * W);
                if constexpr (Careful) {
                    if (!(block.words[j] >> row & 1))
                        QKV_UNROLL for (int c = 0; c < Vectors; ++c) x[c] = V::zero();
                }
                QKV_UNROLL for (int r = 0; r < Rows_; ++r) {
                    const V w = V::set1(p[(QKV_MUTANT(dots_rows) ? r & ~1 : r) * kWindowKeys + j]);
                    QKV_UNROLL for (int c = 0; c < Vectors; ++c) acc[r][c] = fma(x[c], w, acc[r][c]);
                }
            }
        }
        (void)p, (void)pairs, (void)row;
        QKV_UNROLL for (int r = 0; r < Rows_; ++r) {
            const V old = V::set1(g0 > 0 ? E(1) : keep[r]);
            QKV_UNROLL for (int c = 0; c < Vectors; ++c) {
                E* at = out + r * width + d + c * W;
                fma(V::load(at), old, acc[r][c]).store(at);
            }
        }
    }

    template <int Rows_, int Vectors, bool Careful>
    static void all_values(const Block& block, const T* const* from, const int64_t* strides, const int* live, Work& w, const E* keep, int row, int64_t width, int first, int last) {
        const E* p = w.scores + row * kWindowKeys;
        const uint32_t* pairs = w.pairs + row * kWindowKeys / 2;
        E* out = w.out + row * width;
        int64_t d = 0;
        const auto columns = [&]<int C>(std::integral_constant<int, C>) {
            for (int g = first; g < last; g += M::kRunGranules) {
                const int end = last < g + M::kRunGranules ? last : g + M::kRunGranules;
                values<Rows_, C, Careful>(block, g, end, from, strides, live, p, pairs, out, width, d, keep + row, row);
            }
        };
        for (; d + Vectors * W <= width; d += Vectors * W) columns(std::integral_constant<int, Vectors>{});
        constexpr int kFew = M::kPair;  // vectors that one step of a key fills
        for (; d < width; d += kFew * W) columns(std::integral_constant<int, kFew>{});
    }

    static void step(const Job& job, Work& w, Block& block, bool careful) {
        if constexpr (sizeof(E) == 4) {
            if (is_scaled(*job.call)) {
                if (job.call->kv_type == Type::i8)
                    step_from<int8_t>(job, w, block, careful);
                else
                    step_from<f8>(job, w, block, careful);
                return;
            }
        }
        step_from<T>(job, w, block, careful);
    }

    // S: what keys and values are stored as.
    template <class S>
    static void step_from(const Job& job, Work& w, Block& block, bool careful) {
        constexpr bool kScaled = !std::is_same_v<S, T>;
        const Attention& a = *job.call;
        const Sequence& sequence = *w.tile.sequence;
        const int64_t width = padded(a.D), width_v = padded(a.Dv);
        const int rows = w.tile.rows.count, n = block.keys();
        const Source<S> k = keys_of<S>(a, sequence, w.tile.kv_head), v = values_of<S>(a, sequence, w.tile.kv_head);
        const T* from[kGranules];
        int64_t strides[kGranules];
        int live[kGranules];
        for (int g = 0; g < block.granules; ++g) {
            live[g] = static_cast<int>(lower(kGranule, sequence.k_count - block.key[g]));
            int64_t stride;
            const int64_t j = block.key[g];
            const T* keys = resident(k, a.D, j, sequence.k_count, w.keys, stride);
            // Stored keys are converted a granule at a time, at once: they have to be there earlier.
            const int64_t then = j + (kScaled ? 4 : 1) * kGranule;
            const bool more = then < sequence.k_count;
            Ahead next = ahead(more ? k.row(then) : nullptr, k.stride, a.D), soon;
            if constexpr (kScaled) {  // scales are read and values converted when they are wanted: until then they have time to come
                prefetch_scales(a, sequence, w.tile.kv_head, j);
                soon = ahead(v.row(j), v.stride, a.Dv);
            } else {
                from[g] = resident(v, a.Dv, j, sequence.k_count, w.values + g * kGranule * width_v, strides[g]);
                soon = ahead(from[g], strides[g], width_v);
            }
            // Narrow vectors take a row of values in several passes, which the processor does not follow either.
            const bool spread = kScaled || W * sizeof(E) < 64 || (more && next.first != reinterpret_cast<uintptr_t>(keys + kGranule * stride));
            for (int r = 0, two = 0; r < rows; r += 1 + two) {
                two = r + 1 < rows;
                const Q* q = w.queries + r * width;
                E* to = w.scores + r * kWindowKeys + g * kGranule;
                if (spread) {
                    next.share(r / 2, (rows + 1) / 2);
                    soon.share(r / 2, (rows + 1) / 2);
                    if (two)
                        scores<2, true>(q, width, keys, stride, width, live[g], next, soon, to);
                    else
                        scores<1, true>(q, width, keys, stride, width, live[g], next, soon, to);
                } else {
                    next.burst(r, r + 1 + two, rows);
                    if (rows > 1) soon.burst(r, r + 1 + two, rows);  // one row keeps up without
                    if (two)
                        scores<2, false>(q, width, keys, stride, width, live[g], next, soon, to);
                    else
                        scores<1, false>(q, width, keys, stride, width, live[g], next, soon, to);
                }
            }
        }
        if constexpr (kScaled)
            for (int g = 0; g < block.granules; ++g)
                gather_scales(a, sequence, w.tile.kv_head, block.key[g], w.k_scales + g * kGranule, w.v_scales + g * kGranule);
        for (int j = 0; j < n && a.dropout_below > 0; ++j) w.draws[j] = draw_index(block.key[j / kGranule] + j % kGranule);
        E keep[kTileRows];
        for (int r = 0; r < rows; ++r) {
            E* s = w.scores + r * kWindowKeys;
            if (job.transform) transform<kScaled>(job, w, block, r, s);
            if (block.masked)
                for (int j = 0; j < n; ++j) s[j] = block.words[j] >> r & 1 ? s[j] : -static_cast<E>(INFINITY);
            V top = V::set1(-static_cast<E>(INFINITY));
            for (int j = 0; j < n; j += W) top = maximum(top, V::load(s + j));
            const E high = largest(top);
            const E now = w.m[r] > high ? w.m[r] : high;
            const V factor = V::set1(static_cast<E>(job.factor)), m = V::set1(now == -static_cast<E>(INFINITY) ? E(0) : now);
            keep[r] = first_lane(weight<6>(V::set1(w.m[r]), m, factor));
            w.m[r] = now;
            V l = V::zero();
            for (int j = 0; j < n; j += W) {
                const V e = weight<M::kDegree>(V::load(s + j), m, factor);
                l = l + e;
                e.store(s + j);
            }
            w.l[r] = w.l[r] * (QKV_MUTANT(dots_rescale) ? E(1) : keep[r]) + sum(l);
            if constexpr (kScaled) {
                for (int j = 0; j < n && !QKV_MUTANT(scale_values); j += W) (V::load(s + j) * V::load(w.v_scales + j)).store(s + j);
                if (block.masked)  // 0 times a scale that is NaN is not 0
                    for (int j = 0; j < n; ++j) s[j] = block.words[j] >> r & 1 ? s[j] : E(0);
            }
            if (a.dropout_below > 0 && !QKV_MUTANT(dropout_ignored)) {
                const uint64_t row = draw_row(a, w.tile.rows, r);
                for (int j = 0; j < n; j += W) {
                    uint32_t kept = 0;
                    for (int x = 0; x < W; x += kDrawLanes) kept |= keep_bits(w.draws + j + x, row, a.dropout_below) << x;
                    choose(kept, V::load(s + j), V::zero()).store(s + j);
                }
            }
#if defined(QKV_ISA_AVX512BF16)
            if constexpr (M::kPair == 2)
                for (int j = 0; j < n; j += 16)
                    _mm256_storeu_si256(reinterpret_cast<__m256i*>(w.pairs + r * kWindowKeys / 2 + j / 2),
                                        reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(_mm512_loadu_ps(s + j))));
#endif
        }
        w.masked |= block.masked;
        // Converted values are used while they are in the first cache.
        const int at_once = kScaled ? kConvertedGranules : block.granules;
        for (int first = 0; first < block.granules; first += at_once) {
            const int last = block.granules < first + at_once ? block.granules : first + at_once;
            if constexpr (kScaled)
                for (int g = first; g < last; ++g)
                    from[g] = resident(v, a.Dv, block.key[g], sequence.k_count, w.values + (g - first) * kGranule * width_v, strides[g]);
            if (careful) {
                for (int r = 0; r < rows; ++r) all_values<1, 2, true>(block, from, strides, live, w, keep, r, width_v, first, last);
                continue;
            }
            constexpr bool kWide = W * sizeof(E) == 64;
            int r = 0;
            for (; r + 4 <= rows; r += 4) all_values<4, kWide ? 4 : 2, false>(block, from, strides, live, w, keep, r, width_v, first, last);
            for (; r + 2 <= rows; r += 2) all_values<2, kWide ? 8 : 4, false>(block, from, strides, live, w, keep, r, width_v, first, last);
            for (; r < rows; ++r) all_values<1, kWide ? 8 : 4, false>(block, from, strides, live, w, keep, r, width_v, first, last);
        }
    }

    static QKV_INLINE E first_lane(V x) {
        E lanes[W];
        x.store(lanes);
        return lanes[0];
    }

    // The scores of one row as the definition has them, but for the mask.
    template <bool Scaled>
    static void transform(const Job& job, Work& w, Block& block, int r, E* s) {
        const Attention& a = *job.call;
        const V scale = V::set1(static_cast<E>(a.scale)), cap = V::set1(static_cast<E>(a.softcap));
        const V shrink = V::set1(static_cast<E>(a.softcap > 0 ? 1 / a.softcap : 0));
        const int n = block.keys();
        if (a.bias_count > 0) {
            std::memset(w.bias, 0, sizeof(E) * static_cast<size_t>(n));
            for (int g = 0; g < block.granules; ++g) gather_bias<E>(a, w.tile, r, block.key[g], kGranule, w.bias + g * kGranule, 1);
            hide_by_bias<E>(block, r, 0, n, w.bias, 1);
        }
        for (int j = 0; j < n; j += W) {
            V x = V::load(s + j) * scale;
            if (Scaled && !QKV_MUTANT(scale_keys)) x = x * V::load(w.k_scales + j);
            if (QKV_MUTANT(bias_before_cap) && a.bias_count > 0) x = x + V::load(w.bias + j);
            if (a.softcap > 0 && !QKV_MUTANT(softcap_ignored)) x = cap * tanh_vector(x * shrink);
            if (a.bias_count > 0 && !QKV_MUTANT(bias_before_cap)) x = x + V::load(w.bias + j);
            x.store(s + j);
        }
    }
};

}  // namespace QKV_ISA
}  // namespace qkv
