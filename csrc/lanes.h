// The kernel for many rows: queries in lanes.
//
// A tile holds up to 3 vectors of query rows, transposed once; scores are held transposed too (one vector register: one key,
// many queries). Keys and values enter by broadcast from where they lie, so nothing is packed (bfloat16 products take pairs
// of values, which are interleaved), the softmax needs no horizontal reduction, and any stride or page layout will do.
#pragma once
#include <type_traits>

#include "blocks.h"

namespace qkv {
namespace QKV_ISA {

// Products in float or double. Elements of another type are converted a granule at a time.
template <class Element>
struct PlainProducts {
    using T = Element;
    using E = typename Storage<T>::E;
    using V = std::conditional_t<sizeof(E) == 8, VD, VF>;
    using Q = E;  // element of the transposed queries
    using K = E;  // element of keys as they are multiplied
    using U = E;  // element of values as they are multiplied
    using R = V;
    static constexpr int kPair = 1;
    static constexpr int kDegree = 6;
    static constexpr int kRunGranules = 4;  // rounding grows with the length of a sum: it is taken in runs of 64 keys
    static constexpr bool kDirect = std::is_same_v<T, E>;  // K and V may be read where they lie
    static QKV_INLINE V broadcast_key(const K* p) { return V::set1(*p); }
    static QKV_INLINE V broadcast_value(const U* p) { return V::set1(*p); }
    static QKV_INLINE V load(const Q* p) { return V::load(p); }
    static QKV_INLINE V multiply(V acc, V a, V b) { return fma(a, b, acc); }
    static QKV_INLINE V hide(const U* p, const uint64_t* words, int shift) {
        return choose(static_cast<uint32_t>(words[0] >> shift), V::set1(*p), V::zero());
    }
};

#if defined(QKV_ISA_AVX512BF16)
struct PairRegister {
    __m512i r;
};
// Products of bfloat16 pairs, added in float (VDPBF16PS).
struct PairProducts {
    using T = bf16;
    using E = float;
    using V = VF;
    using Q = uint32_t;
    using K = bf16;
    using U = uint32_t;
    using R = PairRegister;
    static constexpr int kPair = 2;
    static constexpr int kDegree = 5;
    static constexpr int kRunGranules = kGranules;  // float's rounding is far below bfloat16's
    static constexpr bool kDirect = true;
    static QKV_INLINE R broadcast_key(const K* p) { return {_mm512_set1_epi32(cast_bits<int>(*reinterpret_cast<const Two*>(p)))}; }
    static QKV_INLINE R broadcast_value(const U* p) { return {_mm512_set1_epi32(static_cast<int>(*p))}; }
    static QKV_INLINE R load(const Q* p) { return {_mm512_loadu_si512(p)}; }
    static QKV_INLINE V multiply(V acc, R a, R b) {
        return {_mm512_dpbf16_ps(acc.r, reinterpret_cast<__m512bh>(a.r), reinterpret_cast<__m512bh>(b.r))};
    }
    static QKV_INLINE R hide(const U* p, const uint64_t* words, int shift) {
        const __m512i lo = _mm512_maskz_set1_epi32(static_cast<__mmask16>(words[0] >> shift), static_cast<int>(*p & 0xffffu));
        const __m512i hi = _mm512_maskz_set1_epi32(static_cast<__mmask16>(words[1] >> shift), static_cast<int>(*p & 0xffff0000u));
        return {_mm512_or_si512(lo, hi)};
    }
    // Lane l of the result: bfloat16 of even[l] below bfloat16 of odd[l].
    static QKV_INLINE __m512i pack(V even, V odd) {
        const __m512i both = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(odd.r, even.r));
        const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5,
                                               20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
        return _mm512_permutexvar_epi16(order, both);
    }

  private:
    struct Two {
        uint16_t low, high;
    };
};
#endif

template <class M>
class Lanes {
  public:
    using Products = M;
    using T = typename M::T;
    using E = typename M::E;
    using V = typename M::V;
    using Q = typename M::Q;
    using K = typename M::K;
    using U = typename M::U;
    static constexpr int W = V::W;
    static constexpr int kMaxVectors = 3;
    static constexpr int kTileRows = kMaxVectors * W;
    static_assert(kTileRows <= kMaxRows);
    // Wide register files hold 8 keys x 3 vectors of scores; 16 registers hold 4 x 3.
    static constexpr int keys_at_once(int vectors) { return W * sizeof(E) == 64 || vectors == 1 ? 8 : 4; }
    static constexpr int kFewKeys = 2;  // at the end of the keys
    static constexpr int columns_at_once(int vectors) { return W * sizeof(E) == 64 ? 8 : vectors == 1 ? 8 : 4; }

    // The memory of one tile.
    struct State {
        Tile tile;
        int vectors;
        bool any, masked;
        Q* queries;  // [units][vectors * W]
        E* out;      // [Dv][vectors * W]
        E m[kTileRows], l[kTileRows];
        uint64_t draws[kTileRows];  // dropout's numbers, but for the key
    };
    // The memory of one worker, apart from its states.
    struct Work {
        Scratch scratch;
        Block block;
        E* scores;     // [kWindowKeys][kTileRows], then probabilities
        E* bias;       // likewise
        K* keys;       // converted keys of a block
        U* values;     // converted values of a block, or their pairs
        E* rows;       // [kTileRows][max(D, Dv) rounded up]
        E* k_scales;   // [kWindowKeys], of stored keys that have them
        E* v_scales;
        T* staged;     // [kGranule][Dv]: stored values before they are interleaved
        const U* pairs;       // interleaved values of the sequence from pairs_first on, or null: made a block at a time
        int64_t pairs_first;
        uint64_t kept[kWindowKeys];  // by key of the block: the rows whose weight dropout keeps
    };

    static int64_t units(int64_t D) { return (D + M::kPair - 1) / M::kPair; }
    static int64_t row_width(const Attention& a) { return (upper(a.D, a.Dv) + 31) / 16 * 16; }

    static void reset(State& s, const Attention& a) {
        s.any = s.masked = false;
        const int n = s.vectors * W;
        for (int r = 0; r < kTileRows; ++r) {
            s.m[r] = -static_cast<E>(INFINITY);
            s.l[r] = 0;
        }
        std::memset(s.out, 0, sizeof(E) * static_cast<size_t>(a.Dv * n));
    }

    // Transposes the tile's queries.
    static void load(const Job& job, State& s, Work& work) {
        const Attention& a = *job.call;
        const Rows& rows = s.tile.rows;
        s.vectors = (rows.count + W - 1) / W;
        const int n = s.vectors * W;
        for (int r = 0; r < n && a.dropout_below > 0; ++r) s.draws[r] = r < rows.count ? draw_row(a, rows, r) : 0;
        const int64_t u = units(a.D), width = row_width(a);
        Q* flat = reinterpret_cast<Q*>(work.rows);
        for (int r = 0; r < n; ++r) {
            Q* to = flat + r * width;
            if (r >= rows.count) {
                std::memset(to, 0, sizeof(Q) * static_cast<size_t>(u));
                continue;
            }
            const T* from = static_cast<const T*>(a.q) + rows.batch * a.q_stride[0] + rows.head[r] * a.q_stride[1] +
                            (s.tile.sequence->q_first + rows.index[r]) * a.q_stride[2];
            load_row(from, a.q_stride[3], a.D, job.negate, to);
        }
        int64_t d = 0;
        if constexpr (sizeof(Q) == 4) {
            for (; d + kTransposeTile <= u; d += kTransposeTile)
                for (int r = 0; r < n; r += kTransposeTile)
                    transpose_tile(reinterpret_cast<const uint32_t*>(flat) + r * width + d, width,
                                   reinterpret_cast<uint32_t*>(s.queries) + d * n + r, n);
        }
        for (; d < u; ++d)
            for (int r = 0; r < n; ++r) s.queries[d * n + r] = flat[r * width + d];
        reset(s, a);
    }

    // Takes the keys in [k0, k1) into the state.
    static void run(const Job& job, State& s, Work& work, int64_t k0, int64_t k1, bool careful) {
        const auto visit = [&](Block& block) {
            switch (s.vectors) {
                case 1: step<1>(job, s, work, block, careful); break;
                case 2: step<2>(job, s, work, block, careful); break;
                default: step<3>(job, s, work, block, careful);
            }
        };
        walk(job.program, s.tile.rows, k0, k1, work.scratch, work.block, visit);
    }

    // Whether hidden values may have reached the result: then the tile is run again with them as zeros.
    static bool spoiled(const Attention& a, const State& s) {
        if (!s.masked || QKV_MUTANT(poison_passes)) return false;
        const int n = s.vectors * W;
        V nothing[kMaxVectors];  // 0 times everything: NaN where something is not finite
        for (int z = 0; z < s.vectors; ++z) nothing[z] = V::zero();
        for (int64_t d = 0; d < a.Dv; ++d)
            for (int z = 0; z < s.vectors; ++z) nothing[z] = fma(V::load(s.out + d * n + z * W), V::zero(), nothing[z]);
        E lanes[kTileRows];
        for (int z = 0; z < s.vectors; ++z) nothing[z].store(lanes + z * W);
        for (int r = 0; r < s.tile.rows.count; ++r)
            if (lanes[r] != 0) return true;
        return false;
    }

    // Back to one row of outputs after another in work.rows; returns the distance between rows.
    static int64_t unload(const Attention& a, State& s, Work& work) {
        const int n = s.vectors * W;
        const int64_t width = row_width(a);
        int64_t d = 0;
        if constexpr (sizeof(E) == 4) {
            for (; d + kTransposeTile <= a.Dv; d += kTransposeTile)
                for (int r = 0; r < n; r += kTransposeTile)
                    transpose_tile(reinterpret_cast<const uint32_t*>(s.out) + d * n + r, n,
                                   reinterpret_cast<uint32_t*>(work.rows) + r * width + d, width);
        }
        for (; d < a.Dv; ++d)
            for (int r = 0; r < n; ++r) work.rows[r * width + d] = s.out[d * n + r];
        return width;
    }

    static void finish(const Job& job, State& s, Work& work) {
        const Attention& a = *job.call;
        const int64_t width = unload(a, s, work);
        for (int r = 0; r < s.tile.rows.count; ++r) write_row<T, E, V>(job, s.tile, r, work.rows + r * width, s.m[r], s.l[r]);
    }

    // Interleaves the values of keys [j0, j0 + n) by pairs of keys; keys past the end count as zeros.
    static void interleave(const Source<T>& v, int64_t keys, int64_t j0, int64_t n, int64_t Dv, U* to) {
        if constexpr (M::kPair == 2) {
            const bool straight = v.straight();
            const T* first = nullptr;
            for (int64_t j = j0; j < j0 + n; j += 2, to += Dv) {
                const T *a, *b;
                if (straight) {
                    if ((j - j0) % kGranule == 0 && j < keys) first = v.row(j);
                    a = j < keys && first != nullptr ? first + (j - j0) % kGranule * v.stride : nullptr;
                    b = j + 1 < keys && a != nullptr ? a + v.stride : nullptr;
                } else {
                    a = j < keys ? v.row(j) : nullptr;
                    b = j + 1 < keys ? v.row(j + 1) : nullptr;
                }
                if (QKV_MUTANT(odd_tail) && j + 2 > keys - 1) b = nullptr;
                int64_t d = 0;
                if (a != nullptr && b != nullptr && v.stride_d == 1) {
                    for (; d + 32 <= Dv; d += 32) interleave_32(a + d, b + d, to + d);
                }
                for (; d < Dv; ++d) {
                    const uint32_t low = a != nullptr ? a[d * v.stride_d].bits : 0u;
                    const uint32_t high = b != nullptr ? b[d * v.stride_d].bits : 0u;
                    to[d] = low | high << 16;
                }
            }
        }
    }

  private:
    static QKV_INLINE void interleave_32(const T* a, const T* b, U* to) {
#if defined(QKV_ISA_AVX512BF16)
        const __m512i x = _mm512_loadu_si512(a), y = _mm512_loadu_si512(b);
        const __m512i lo = _mm512_unpacklo_epi16(x, y), hi = _mm512_unpackhi_epi16(x, y);
        const __m512i first = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), second = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
        _mm512_storeu_si512(to, _mm512_permutex2var_epi64(lo, first, hi));
        _mm512_storeu_si512(to + 16, _mm512_permutex2var_epi64(lo, second, hi));
#else
        for (int d = 0; d < 32; ++d) to[d] = static_cast<U>(a[d].bits | static_cast<uint32_t>(b[d].bits) << 16);
#endif
    }

    static QKV_INLINE void load_row(const T* from, int64_t stride, int64_t D, bool negate, Q* to) {
        if constexpr (M::kPair == 2) {
            const uint32_t flip = negate ? 0x80008000u : 0u;
            if (stride == 1) {
                std::memcpy(to, from, sizeof(T) * static_cast<size_t>(D));
                if (D % 2) reinterpret_cast<uint16_t*>(to)[D] = 0;
            } else {
                for (int64_t d = 0; d < D; d += 2)
                    to[d / 2] = from[d * stride].bits | (d + 1 < D ? static_cast<uint32_t>(from[(d + 1) * stride].bits) << 16 : 0u);
            }
            if (flip)
                for (int64_t u = 0; u < units(D); ++u) to[u] ^= flip;
        } else {
            const E sign = negate ? E(-1) : E(1);
            int64_t d = 0;
            if (stride == 1)
                for (; d + W <= D; d += W) (V::load(from + d) * V::set1(sign)).store(to + d);
            for (; d < D; ++d) to[d] = widen(from[d * stride]) * sign;
        }
    }

    // Scores of `Keys` keys against all rows of the tile.
    template <int Z, int Keys, bool Masked, bool Max>
    static QKV_INLINE void scores(const Q* queries, const K* keys, int64_t stride, int64_t u_all, E* to, const uint64_t* words, V* top) {
        constexpr int n = Z * W;
        for (int64_t u0 = 0, u1; u0 < u_all; u0 = u1) {
            u1 = u0 + score_run(u_all - u0);
            V acc[Keys][Z];
            QKV_UNROLL for (int k = 0; k < Keys; ++k) QKV_UNROLL for (int z = 0; z < Z; ++z) acc[k][z] = V::zero();
            const Q* q = queries + u0 * n;
            for (int64_t u = u0; u < u1; ++u, q += n) {
                typename M::R b[Z];
                QKV_UNROLL for (int z = 0; z < Z; ++z) b[z] = M::load(q + z * W);
                QKV_UNROLL for (int k = 0; k < Keys; ++k) {
                    const typename M::R x = M::broadcast_key(keys + k * stride + u * M::kPair);
                    QKV_UNROLL for (int z = 0; z < Z; ++z) acc[k][z] = M::multiply(acc[k][z], x, b[z]);
                }
            }
            if (u0 > 0) {
                QKV_UNROLL for (int k = 0; k < Keys; ++k)
                    QKV_UNROLL for (int z = 0; z < Z; ++z) acc[k][z] = acc[k][z] + V::load(to + k * n + z * W);
            }
            if (u1 == u_all) {
                if constexpr (Masked) {
                    const V hidden = V::set1(-static_cast<E>(INFINITY));
                    QKV_UNROLL for (int k = 0; k < Keys; ++k)
                        QKV_UNROLL for (int z = 0; z < Z; ++z)
                            acc[k][z] = choose(static_cast<uint32_t>(words[k] >> (z * W)), acc[k][z], hidden);
                }
                if constexpr (Max) {
                    QKV_UNROLL for (int k = 0; k < Keys; ++k)
                        QKV_UNROLL for (int z = 0; z < Z; ++z) top[z] = maximum(top[z], acc[k][z]);
                }
            }
            QKV_UNROLL for (int k = 0; k < Keys; ++k) QKV_UNROLL for (int z = 0; z < Z; ++z) acc[k][z].store(to + k * n + z * W);
        }
    }

    template <int Z, bool Masked, bool Max>
    static QKV_APART void all_scores(const State& s, const Block& block, const K* const* keys, const int64_t* strides, const int* live, int64_t u, E* to, V* top) {
        constexpr int kKeys = keys_at_once(Z);
        for (int g = 0; g < block.granules; ++g) {
            const auto few = [&]<int Keys>(std::integral_constant<int, Keys>, int k) {
                const int j = g * kGranule + k;
                scores<Z, Keys, Masked, Max>(s.queries, keys[g] + k * strides[g], strides[g], u, to + j * Z * W, block.words + j, top);
            };
            int k = 0;
            for (; k + kKeys <= live[g]; k += kKeys) few(std::integral_constant<int, kKeys>{}, k);
            for (; k < live[g]; k += kFewKeys) few(std::integral_constant<int, kFewKeys>{}, k);
            for (E* at = to + (g * kGranule + k) * Z * W; k < kGranule; ++k)
                QKV_UNROLL for (int z = 0; z < Z; ++z, at += W) V::set1(-static_cast<E>(INFINITY)).store(at);
        }
    }

    // The scores as the definition has them: scale, softcap, bias, mask.
    template <int Z, bool Scaled>
    static void transform(const Job& job, const State& s, Work& work, Block& block, V* top) {
        constexpr int n = Z * W;
        const Attention& a = *job.call;
        const V scale = V::set1(static_cast<E>(a.scale)), hidden = V::set1(-static_cast<E>(INFINITY));
        const V cap = V::set1(static_cast<E>(a.softcap)), shrink = V::set1(static_cast<E>(a.softcap > 0 ? 1 / a.softcap : 0));
        if (a.bias_count > 0) {
            std::memset(work.bias, 0, sizeof(E) * static_cast<size_t>(block.keys() * n));
            for (int r = 0; r < s.tile.rows.count; ++r)
                for (int g = 0; g < block.granules; ++g) {
                    E* add = work.bias + g * kGranule * n + r;
                    gather_bias<E>(a, s.tile, r, block.key[g], kGranule, add, n);
                    hide_by_bias<E>(block, r, g * kGranule, kGranule, add, n);
                }
        }
        for (int j = 0; j < block.keys(); ++j) {
            QKV_UNROLL for (int z = 0; z < Z; ++z) {
                E* at = work.scores + j * n + z * W;
                V x = V::load(at) * scale;
                if (Scaled && !QKV_MUTANT(scale_keys)) x = x * V::set1(work.k_scales[j]);
                if (QKV_MUTANT(bias_before_cap) && a.bias_count > 0) x = x + V::load(work.bias + j * n + z * W);
                if (QKV_MUTANT(cap_after_mask) && block.masked) x = choose(static_cast<uint32_t>(block.words[j] >> (z * W)), x, hidden);
                if (a.softcap > 0 && !QKV_MUTANT(softcap_ignored)) x = cap * tanh_vector(x * shrink);
                if (a.bias_count > 0 && !QKV_MUTANT(bias_before_cap)) x = x + V::load(work.bias + j * n + z * W);
                if (block.masked && !QKV_MUTANT(cap_after_mask)) x = choose(static_cast<uint32_t>(block.words[j] >> (z * W)), x, hidden);
                top[z] = maximum(top[z], x);
                x.store(at);
            }
        }
    }

    template <int Z, int Columns, bool Careful>
    static QKV_INLINE void values(const Block& block, int g0, int g1, const U* const* from, const int64_t* strides, const int* live, const E* p, E* out, const V* keep,
                                  bool first, int64_t d) {
        constexpr int n = Z * W;
        V acc[Columns][Z];
        QKV_UNROLL for (int c = 0; c < Columns; ++c) QKV_UNROLL for (int z = 0; z < Z; ++z) acc[c][z] = V::zero();
        for (int g = g0; g < g1; ++g) {
            const U* v = from[g] + d;
            for (int k = 0; k < live[g]; k += M::kPair, v += strides[g]) {
                const int j = g * kGranule + k;
                const Q* w = reinterpret_cast<const Q*>(p) + j / M::kPair * n;
                typename M::R b[Z];
                QKV_UNROLL for (int z = 0; z < Z; ++z) b[z] = M::load(w + z * W);
                QKV_UNROLL for (int c = 0; c < Columns; ++c) {
                    if constexpr (Careful) {
                        QKV_UNROLL for (int z = 0; z < Z; ++z)
                            acc[c][z] = M::multiply(acc[c][z], M::hide(v + c, block.words + j, z * W), b[z]);
                    } else {
                        const typename M::R x = M::broadcast_value(v + c);
                        QKV_UNROLL for (int z = 0; z < Z; ++z) acc[c][z] = M::multiply(acc[c][z], x, b[z]);
                    }
                }
            }
        }
        QKV_UNROLL for (int c = 0; c < Columns; ++c) QKV_UNROLL for (int z = 0; z < Z; ++z) {
            E* at = out + (d + c) * n + z * W;
            (first ? acc[c][z] : g0 > 0 ? V::load(at) + acc[c][z] : fma(V::load(at), keep[z], acc[c][z])).store(at);
        }
    }

    template <int Z, bool Careful>
    static QKV_APART void all_values(const Block& block, const U* const* from, const int64_t* strides, const int* live, const E* p, E* out, const V* keep, bool first, int64_t Dv) {
        constexpr int kColumns = columns_at_once(Z);
        int64_t d = 0;
        const int granules = block.granules - QKV_MUTANT(last_granule);
        const auto columns = [&]<int C>(std::integral_constant<int, C>) {
            for (int g = 0; g < granules || g == 0; g += M::kRunGranules) {
                const int end = granules < g + M::kRunGranules ? granules : g + M::kRunGranules;
                values<Z, C, Careful>(block, g, end, from, strides, live, p, out, keep, first && g == 0, d);
            }
        };
        for (; d + kColumns <= Dv; d += kColumns) columns(std::integral_constant<int, kColumns>{});
        for (; d < Dv; ++d) columns(std::integral_constant<int, 1>{});
    }

    // Where the keys and values of the block lie, converting those that cannot be multiplied as they are.
    template <class S>
    static void gather(const Job& job, const State& s, Work& work, const Block& block, const K** keys, int64_t* key_strides,
                       const U** values_at, int64_t* value_strides) {
        constexpr bool kScaled = !std::is_same_v<S, T>;
        constexpr bool kInPlace = M::kDirect && !kScaled;
        const Attention& a = *job.call;
        const Sequence& sequence = *s.tile.sequence;
        const Source<S> k = keys_of<S>(a, sequence, s.tile.kv_head), v = values_of<S>(a, sequence, s.tile.kv_head);
        const bool straight = k.straight();
        const int64_t D2 = units(a.D) * M::kPair;
        for (int g = 0; g < block.granules; ++g) {
            const int64_t j = block.key[g];
            const bool whole = j + kGranule <= sequence.k_count;
            const int rows = whole ? kGranule : static_cast<int>(sequence.k_count - j + kFewKeys - 1) / kFewKeys * kFewKeys;
            const S* first_key = straight ? k.row(j) : nullptr;
            const S* first_value = straight ? v.row(j) : nullptr;
            const bool in_place = kInPlace && whole;
            if (in_place && first_key != nullptr && (a.k_stride[2] == 1 || QKV_MUTANT(stride_ignored)) && a.D % M::kPair == 0) {
                keys[g] = reinterpret_cast<const K*>(first_key);
                key_strides[g] = a.k_stride[1];
            } else {
                K* to = work.keys + g * kGranule * D2;
                for (int i = 0; i < rows; ++i) convert_row(j + i < sequence.k_count ? k.row_of(first_key, straight, j, i) : nullptr, a.k_stride[2], a.D, D2, to + i * D2);
                keys[g] = to;
                key_strides[g] = D2;
            }
            if constexpr (kScaled) {
                gather_scales(a, sequence, s.tile.kv_head, j, work.k_scales + g * kGranule, work.v_scales + g * kGranule);
            }
            if constexpr (M::kPair == 2) {
                value_strides[g] = a.Dv;
                if (work.pairs != nullptr) {
                    values_at[g] = work.pairs + (j - work.pairs_first) / 2 * a.Dv;
                } else {
                    U* to = work.values + g * kGranule / 2 * a.Dv;
                    if constexpr (kScaled) {
                        for (int i = 0; i < rows; ++i)
                            convert_row(j + i < sequence.k_count ? v.row_of(first_value, straight, j, i) : nullptr, a.v_stride[2], a.Dv, a.Dv, work.staged + i * a.Dv);
                        interleave(Source<T>{work.staged, a.Dv, 1, nullptr, 0, 0}, rows, 0, rows, a.Dv, to);
                    } else {
                        interleave(v, sequence.k_count, j, rows, a.Dv, to);
                    }
                    values_at[g] = to;
                }
            } else if (in_place && first_value != nullptr && a.v_stride[2] == 1) {
                values_at[g] = reinterpret_cast<const U*>(first_value);
                value_strides[g] = a.v_stride[1];
            } else {
                U* to = work.values + g * kGranule * a.Dv;
                if constexpr (M::kPair == 1)
                    for (int i = 0; i < rows; ++i)
                        convert_row(j + i < sequence.k_count ? v.row_of(first_value, straight, j, i) : nullptr, a.v_stride[2], a.Dv, a.Dv, to + i * a.Dv);
                values_at[g] = to;
                value_strides[g] = a.Dv;
            }
        }
    }

    template <class S, class To>
    static void convert_row(const S* from, int64_t stride, int64_t D, int64_t padded, To* to) {
        if constexpr (std::is_same_v<S, To> && !std::is_same_v<To, E>) {
            for (int64_t d = 0; d < padded; ++d) to[d] = from == nullptr || d >= D ? To{} : from[d * stride];
        } else {
            unpack_row<V>(from, stride, D, padded, to);
        }
    }

    template <int Z>
    static void step(const Job& job, State& s, Work& work, Block& block, bool careful) {
        if constexpr (sizeof(E) == 4) {
            if (is_scaled(*job.call)) {
                if (job.call->kv_type == Type::i8)
                    step_from<Z, int8_t>(job, s, work, block, careful);
                else
                    step_from<Z, f8>(job, s, work, block, careful);
                return;
            }
        }
        step_from<Z, T>(job, s, work, block, careful);
    }

    // S: what keys and values are stored as.
    template <int Z, class S>
    static void step_from(const Job& job, State& s, Work& work, Block& block, bool careful) {
        constexpr bool kScaled = !std::is_same_v<S, T>;
        const Attention& a = *job.call;
        const K* keys[kGranules];
        const U* from[kGranules];
        int64_t key_strides[kGranules], value_strides[kGranules];
        int live[kGranules];  // keys of each granule: fewer than 16 at the end
        for (int g = 0; g < block.granules; ++g) live[g] = static_cast<int>(lower(kGranule, s.tile.sequence->k_count - block.key[g]));
        gather<S>(job, s, work, block, keys, key_strides, from, value_strides);
        const V lowest = V::set1(-static_cast<E>(INFINITY));
        V top[Z];
        QKV_UNROLL for (int z = 0; z < Z; ++z) top[z] = lowest;
        const int64_t u = units(a.D);
        if (job.transform) {
            all_scores<Z, false, false>(s, block, keys, key_strides, live, u, work.scores, top);
            transform<Z, kScaled>(job, s, work, block, top);
        } else if (block.masked) {
            all_scores<Z, true, true>(s, block, keys, key_strides, live, u, work.scores, top);
        } else {
            all_scores<Z, false, true>(s, block, keys, key_strides, live, u, work.scores, top);
        }

        s.masked |= block.masked;

        // New maximum; the state so far counts `keep` times as much.
        const V factor = V::set1(static_cast<E>(job.factor));
        V m[Z], keep[Z], l[Z];
        QKV_UNROLL for (int z = 0; z < Z; ++z) {
            const V old = V::load(s.m + z * W);
            V now = maximum(old, top[z]);
            if (QKV_MUTANT(no_maximum)) now = V::zero();
            m[z] = maximum(V::set1(-kLargest<E>), now);
            keep[z] = weight<6>(old, m[z], factor);
            if (QKV_MUTANT(rescale_forgotten)) keep[z] = V::set1(1);
            now.store(s.m + z * W);
            l[z] = V::zero();
        }
        if (kScaled || a.dropout_below > 0) {
            if (a.dropout_below > 0) draw<Z>(a, s, work, block);
            exponentials<Z, true>(job, work, block, factor, m, l);
        } else {
            exponentials<Z, false>(job, work, block, factor, m, l);
        }
        QKV_UNROLL for (int z = 0; z < Z; ++z) fma(V::load(s.l + z * W), keep[z], l[z]).store(s.l + z * W);

        if (careful)
            all_values<Z, true>(block, from, value_strides, live, work.scores, s.out, keep, !s.any, a.Dv);
        else
            all_values<Z, false>(block, from, value_strides, live, work.scores, s.out, keep, !s.any, a.Dv);
        s.any = true;
    }


    // Which weights dropout keeps: work.kept, by key, one bit a row.
    template <int Z>
    static QKV_APART void draw(const Attention& a, const State& s, Work& work, const Block& block) {
        for (int j = 0; j < block.keys(); ++j) {
            const uint64_t key = draw_index(block.key[j / kGranule] + j % kGranule);
            work.kept[j] = 0;
            for (int r = 0; r < Z * W; r += kDrawLanes) work.kept[j] |= static_cast<uint64_t>(keep_bits(s.draws + r, key, a.dropout_below)) << r;
        }
    }

    // Weights from scores, in place. With `Changed`, what values are multiplied by differs from what is summed: it is times the
    // value's scale, or dropped.
    template <int Z, bool Changed>
    static QKV_APART void exponentials(const Job& job, Work& work, const Block& block, V factor, const V* m, V* l) {
        constexpr int n = Z * W;
        E* scores_at = work.scores;
        const int keys = block.keys();
        const bool scaled = is_scaled(*job.call), drops = job.call->dropout_below > 0;
        const auto changed = [&](V x, int j, int z) {
            if constexpr (Changed) {
                if (scaled && !QKV_MUTANT(scale_values)) x = x * V::set1(work.v_scales[j]);
                if (drops && !QKV_MUTANT(dropout_ignored)) x = choose(static_cast<uint32_t>(work.kept[j] >> (z * W)), x, V::zero());
                if (block.masked) x = choose(static_cast<uint32_t>(block.words[j] >> (z * W)), x, V::zero());  // 0 times a scale that is NaN is not 0
            }
            return x;
        };
        const auto e = [&](const E* at, int z) { return weight<M::kDegree>(V::load(at + z * W), m[z], factor); };
        if constexpr (M::kPair == 2) {
            Q* to = reinterpret_cast<Q*>(scores_at);
            for (int from = 0; from < keys; from += kGranule) {
                V part[Z];
                QKV_UNROLL for (int z = 0; z < Z; ++z) part[z] = V::zero();
                for (int j = from; j < from + kGranule; j += 2)
                    QKV_UNROLL for (int z = 0; z < Z; ++z) {
                        const V even = e(scores_at + j * n, z), odd = e(scores_at + (j + 1) * n, z);
                        part[z] = part[z] + (even + odd);
                        store_pair(to + j / 2 * n + z * W, changed(even, j, z), changed(odd, j + 1, z));
                    }
                QKV_UNROLL for (int z = 0; z < Z; ++z) l[z] = l[z] + part[z];
            }
        } else {
            for (int from = 0; from < keys; from += kGranule) {
                V part[Z];
                QKV_UNROLL for (int z = 0; z < Z; ++z) part[z] = V::zero();
                for (int j = from; j < from + kGranule; ++j)
                    QKV_UNROLL for (int z = 0; z < Z; ++z) {
                        const V x = e(scores_at + j * n, z);
                        part[z] = part[z] + x;
                        changed(x, j, z).store(scores_at + j * n + z * W);
                    }
                QKV_UNROLL for (int z = 0; z < Z; ++z) l[z] = l[z] + part[z];
            }
        }
    }
    static QKV_INLINE void store_pair(Q* to, V even, V odd) {
#if defined(QKV_ISA_AVX512BF16)
        if constexpr (M::kPair == 2) _mm512_storeu_si512(to, M::pack(even, odd));
#else
        (void)to, (void)even, (void)odd;
#endif
    }
};

}  // namespace QKV_ISA
}  // namespace qkv
