// The kernel for many rows: queries in lanes.
//
// A tile holds up to 3 vectors of query rows, transposed once; scores are held transposed too (one vector register: one
// key, many queries). Keys and values enter by broadcast from where they lie, so nothing is packed (bfloat16 products
// take pairs of values, which are interleaved), the softmax needs no horizontal reduction, and any stride or page
// layout will do.
#pragma once
#include "kernel/dropout.h"
#include "kernel/rowstate.h"

namespace qkv {
namespace QKV_ISA {

template <class M>
class Lanes {
  public:
    using Elements = M;
    using T = typename M::T;
    using E = typename M::E;
    using V = typename M::V;
    using Single = typename M::Single;
    using Lane = typename M::Lane;
    static constexpr int W = V::W;
    static constexpr int kTileRows = 3 * W;
    // Four vectors hold a block of 64 rows that see alike; a tile of others sees fewer keys in vain with three.
    static constexpr int kMaxVectors = kRegisters == 32 ? 4 : 3;
    static constexpr int kMostRows = kMaxVectors * W;
    static_assert(kMostRows <= kMaxRows);
    // 32 registers hold 8 keys x 3 vectors of scores or 4 x 4, 16 registers 4 x 3.
    static constexpr int keys_at_once(int vectors) { return (kRegisters == 32 && vectors < 4) || vectors == 1 ? 8 : 4; }
    static constexpr int columns_at_once(int vectors) { return keys_at_once(vectors); }
    static constexpr int kFewKeys = 2;  // at the end of the keys
    static constexpr int kRunGranules = M::kRun / kGranule;

    // The memory of one tile.
    struct State {
        Tile tile;
        Walk<kGranules> walk;
        int vectors;
        uint32_t begun;  // the vectors of rows that have sums, one bit each
        bool masked;
        Lane* queries;  // [units][vectors * W]
        E* out;         // [Dv][vectors * W]
        RowStates<E, kMostRows, 2> softmax;
        uint64_t draws[kMostRows];  // dropout's numbers, but for the key
    };
    // The granules whose converted keys and values a worker holds: tiles that take turns use them one after another.
    struct Converted {
        int64_t key[kGranules];  // by place; -1: none
        int oldest;
        void clear() {
            for (int at = 0; at < kGranules; ++at) key[at] = -1;
            oldest = 0;
        }
        // Where each granule of a block is, or is to be put; returns which are there already, one bit each. Those
        // whose keys follow no rule are nobody else's.
        uint32_t find(const Block& block, int (&place)[kGranules]) {
            uint32_t used = 0, there = 0;
            for (int g = 0; g < block.granules; ++g)
                for (int at = 0; at < kGranules && block.regular(g); ++at)
                    if (key[at] == block.key[g]) {
                        place[g] = at;
                        used |= 1u << at, there |= 1u << g;
                        break;
                    }
            for (int g = 0; g < block.granules; ++g) {
                if (there >> g & 1) continue;
                while (used >> oldest & 1) oldest = (oldest + 1) % kGranules;
                used |= 1u << oldest;
                place[g] = oldest;
                key[oldest] = block.regular(g) ? block.key[g] : -1;
            }
            return there;
        }
    };
    // The memory of one worker, apart from its states.
    struct Work {
        Scratch scratch;
        Block block;
        Converted converted;
        E* scores;          // [kWindowKeys][kMostRows], then weights
        E* bias;            // likewise
        Single* keys;       // converted keys of granules
        Lane* values;       // their converted values, or the pairs of those
        Lane* picked;       // pairs of values that were gathered
        E* rows;            // [kMostRows][max(D, Dv) rounded up]
        E* k_scales;        // [kWindowKeys], of stored keys that have them
        E* v_scales;        // likewise
        T* staged;          // [kGranule][Dv]: stored values before they are interleaved
        const Lane* pairs;  // interleaved values of the sequence from pairs_first on, or null: made a block at a time
        int64_t pairs_first;
        uint64_t kept[kWindowKeys];  // by key of the block: the rows whose weight dropout keeps
    };
    template <class From>
    static void lay_out(const Attention& a, From& memory, State& s) {
        s.queries = memory.template take<Lane>(units(a.D) * kMostRows);
        s.out = memory.template take<E>(a.Dv * kMostRows);
    }
    template <class From>
    static void lay_out(const Attention& a, From& memory, Work& w) {
        w.scores = memory.template take<E>(kWindowKeys * kMostRows);
        w.bias = memory.template take<E>(kWindowKeys * kMostRows);
        w.keys = memory.template take<Single>(kWindowKeys * units(a.D) * M::kPair);
        w.values = memory.template take<Lane>(kWindowKeys * a.Dv);
        w.picked = memory.template take<Lane>(M::kPair == 2 && a.program_length > 0 ? kWindowKeys / 2 * a.Dv : 0);
        w.rows = memory.template take<E>(kMostRows * row_width(a));
        w.k_scales = memory.template take<E>(kWindowKeys);
        w.v_scales = memory.template take<E>(kWindowKeys);
        w.staged = memory.template take<T>(kGranule * a.Dv);
        w.pairs = nullptr;
        w.pairs_first = 0;
    }

    // Whether all granules have to be converted, not only the last one.
    static bool converts(const Attention& a) {
        return !M::kInPlace || is_scaled(a) || a.k_stride[2] != 1 || a.v_stride[2] != 1 || a.D % M::kPair != 0 ||
               a.page_size % kGranule != 0;
    }

    static int64_t units(int64_t D) { return (D + M::kPair - 1) / M::kPair; }
    static int64_t row_width(const Attention& a) { return (upper(a.D, a.Dv) + 31) / 16 * 16; }

    static void reset(State& s, const Attention& a) {
        s.begun = 0;
        s.masked = false;
        s.softmax.clear();
        std::memset(s.out, 0, sizeof(E) * static_cast<size_t>(a.Dv * s.vectors * W));
    }

    // Transposes the tile's queries.
    static void load(const Job& job, State& s, Work& work) {
        const Attention& a = *job.call;
        const Rows& rows = s.tile.rows;
        s.vectors = (rows.count + W - 1) / W;
        const int n = s.vectors * W;
        for (int r = 0; r < n && a.dropout_below > 0; ++r) s.draws[r] = r < rows.count ? draw_row(a, rows, r) : 0;
        const int64_t u = units(a.D), width = row_width(a);
        Lane* flat = reinterpret_cast<Lane*>(work.rows);
        for (int r = 0; r < n; ++r) {
            Lane* to = flat + r * width;
            if (r >= rows.count) {
                std::memset(to, 0, sizeof(Lane) * static_cast<size_t>(u));
                continue;
            }
            const T* from = static_cast<const T*>(a.q) + rows.batch * a.q_stride[0] + rows.head[r] * a.q_stride[1] +
                            (s.tile.sequence->q_first + rows.index[r]) * a.q_stride[2];
            load_row(from, a.q_stride[3], a.D, job.negate, to);
        }
        transpose(flat, width, s.queries, n, n, u);
        reset(s, a);
    }

    // A tile whose sieve has a step is never cut into chunks.
    static Sieve of_chunk(const Sieve& all, int64_t k0, int64_t k1) {
        return all.step == 1 ? keys_between(k0, k1) : all;
    }

    // Takes the keys in [k0, k1) into the states of some tiles. The tiles take turns, a block each, the one that is
    // furthest behind first: so keys and values that have to be converted are, once for all.
    static void run(const Job& job, State* const* states, int64_t count, Work& work, int64_t k0, int64_t k1,
                    bool careful) {
        for (int64_t t = 0; t < count; ++t)
            states[t]->walk.begin(job.program, states[t]->tile.rows, work.scratch,
                                  of_chunk(states[t]->tile.sieve, k0, k1), !job.program.empty(), W);
        for (;;) {
            State* behind = nullptr;
            for (int64_t t = 0; t < count; ++t)
                if (behind == nullptr || states[t]->walk.position() < behind->walk.position()) behind = states[t];
            if (behind->walk.over()) return;
            if (behind->walk.next(work.scratch, work.block)) step_of(job, *behind, work, careful);
        }
    }

    // Whether hidden values may have reached the result: then the tile is run again with them as zeros.
    static bool spoiled(const Attention& a, const State& s) {
        if (!s.masked) return false;
        const int n = s.vectors * W;
        V nothing[kMaxVectors];  // 0 times everything: NaN where something is not finite
        for (int z = 0; z < s.vectors; ++z) nothing[z] = V::zero();
        for (int64_t d = 0; d < a.Dv; ++d)
            for (int z = 0; z < s.vectors; ++z) nothing[z] = fma(V::load(s.out + d * n + z * W), V::zero(), nothing[z]);
        E lanes[kMostRows];
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
        const int64_t width = unload(*job.call, s, work);
        for (int r = 0; r < s.tile.rows.count; ++r)
            write_row<T, E, V>(job, s.tile, r, work.rows + r * width, s.softmax.row(r));
    }

    // Interleaves the values of keys [j0, j0 + n) by pairs of keys; keys past the end count as zeros.
    static void interleave(const Source<T>& v, int64_t keys, int64_t j0, int64_t n, int64_t Dv, Lane* to) {
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
                zip_rows(a, b, v.stride_d, Dv, to);
            }
        }
    }
    // Two rows as pairs; null counts as zeros.
    static QKV_INLINE void zip_rows(const T* a, const T* b, int64_t stride, int64_t Dv, Lane* to) {
        if constexpr (M::kPair == 2) {
            int64_t d = 0;
            if (a != nullptr && b != nullptr && stride == 1) d = M::zip(a, b, Dv, to);
            for (; d < Dv; ++d) {
                const uint32_t low = a != nullptr ? a[d * stride].bits : 0u;
                const uint32_t high = b != nullptr ? b[d * stride].bits : 0u;
                to[d] = low | high << 16;
            }
        }
    }

    // The scores of the block that work holds, in work.scores: the same as those of `run`, to the bit. -inf: hidden.
    template <int Z>
    static void only_scores(const Job& job, State& s, Work& work, V* top) {
        Laid laid;
        scores_of<Z>(job, s, work, work.block, laid, 0, top);
    }

  private:
    // Where the keys and values of a block lie: of each granule the first row, and the distance between rows (of
    // pairs).
    struct Laid {
        const Single* keys[kGranules];
        int64_t key_strides[kGranules];
        const Lane* values[kGranules];
        int64_t value_strides[kGranules];
        int live[kGranules];  // keys of each granule: fewer than 16 at the end
    };

    static QKV_INLINE void load_row(const T* from, int64_t stride, int64_t D, bool negate, Lane* to) {
        if constexpr (M::kPair == 2) {
            const uint32_t flip = negate ? 0x80008000u : 0u;
            if (stride == 1) {
                std::memcpy(to, from, sizeof(T) * static_cast<size_t>(D));
                if (D % 2) reinterpret_cast<uint16_t*>(to)[D] = 0;
            } else {
                for (int64_t d = 0; d < D; d += 2) {
                    const uint32_t high = d + 1 < D ? from[(d + 1) * stride].bits : 0u;
                    to[d / 2] = from[d * stride].bits | high << 16;
                }
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

    // to[d * to_stride + r] = from[r * from_stride + d], rows r in whole vectors.
    static void transpose(const Lane* from, int64_t from_stride, Lane* to, int64_t to_stride, int rows,
                          int64_t columns) {
        int64_t d = 0;
        if constexpr (sizeof(Lane) == 4) {
            for (; d + kTransposeTile <= columns; d += kTransposeTile)
                for (int r = 0; r < rows; r += kTransposeTile)
                    transpose_tile(reinterpret_cast<const uint32_t*>(from) + r * from_stride + d, from_stride,
                                   reinterpret_cast<uint32_t*>(to) + d * to_stride + r, to_stride);
        }
        for (; d < columns; ++d)
            for (int r = 0; r < rows; ++r) to[d * to_stride + r] = from[r * from_stride + d];
    }

    // The products of `Keys` keys with all rows of the tile.
    struct Products {
        const Lane* queries;
        int64_t rows;  // of the tile, in whole vectors
        const Single* keys;
        int64_t stride, units;
        E* to;
        const uint64_t* words;  // the rows that see each key
        int first;              // the tile's row that is the first of these
    };
    template <int Z, int Keys, bool Masked, bool Max>
    static QKV_INLINE void scores(const Products& of, V* top) {
        constexpr int n = Z * W;
        E* const to = of.to;
        for (int64_t u0 = 0, u1; u0 < of.units; u0 = u1) {
            u1 = u0 + score_run(of.units - u0);
            V acc[Keys][Z];
            QKV_FOR(k, Keys)
                QKV_FOR(z, Z) acc[k][z] = V::zero();
            const Lane* q = of.queries + u0 * of.rows;
            for (int64_t u = u0; u < u1; ++u, q += of.rows) {
                typename M::R b[Z];
                QKV_FOR(z, Z) b[z] = M::load(q + z * W);
                QKV_FOR(k, Keys) {
                    const typename M::R x = M::broadcast(of.keys + k * of.stride + u * M::kPair);
                    QKV_FOR(z, Z) acc[k][z] = M::multiply(acc[k][z], x, b[z]);
                }
            }
            if (u0 > 0) {
                QKV_FOR(k, Keys)
                    QKV_FOR(z, Z) acc[k][z] = acc[k][z] + V::load(to + k * n + z * W);
            }
            if (u1 == of.units) {
                if constexpr (Masked) {
                    QKV_FOR(k, Keys)
                        QKV_FOR(z, Z) acc[k][z] = shown(of.words[k] >> (of.first + z * W), acc[k][z]);
                }
                if constexpr (Max) {
                    QKV_FOR(k, Keys)
                        QKV_FOR(z, Z) top[z] = maximum(top[z], acc[k][z]);
                }
            }
            QKV_FOR(k, Keys)
                QKV_FOR(z, Z) acc[k][z].store(to + k * n + z * W);
        }
    }

    template <int Z, bool Masked, bool Max>
    static QKV_APART void all_scores(const State& s, const Block& block, const Laid& laid, int64_t units, int first,
                                     E* to, V* top) {
        constexpr int kKeys = keys_at_once(Z);
        for (int g = 0; g < block.granules; ++g) {
            const auto few = [&]<int Keys>(std::integral_constant<int, Keys>, int k) {
                const int j = g * kGranule + k;
                const int64_t stride = laid.key_strides[g];
                scores<Z, Keys, Masked, Max>({s.queries + first, s.vectors * W, laid.keys[g] + k * stride, stride,
                                              units, to + j * Z * W, block.words + j, first},
                                             top);
            };
            int k = 0;
            for (; k + kKeys <= laid.live[g]; k += kKeys) few(std::integral_constant<int, kKeys>{}, k);
            for (; k < laid.live[g]; k += kFewKeys) few(std::integral_constant<int, kFewKeys>{}, k);
            for (E* at = to + (g * kGranule + k) * Z * W; k < kGranule; ++k, at += Z * W)
                QKV_FOR(z, Z) V::set1(-static_cast<E>(INFINITY)).store(at + z * W);
        }
    }

    // The scores as the definition has them, of rows from `first` on.
    template <int Z, bool Scaled>
    static void transform(const Job& job, const State& s, Work& work, Block& block, int first, V* top) {
        constexpr int n = Z * W;
        const Attention& a = *job.call;
        const Score<M> score(job);
        if (a.bias_count > 0) {
            std::memset(work.bias, 0, sizeof(E) * static_cast<size_t>(block.keys() * n));
            for (int r = first; r < s.tile.rows.count && r < first + n; ++r)
                for (int g = 0; g < block.granules; ++g) {
                    E* add = work.bias + g * kGranule * n + r - first;
                    gather_bias<E>(a, s.tile, r, block, g, add, n);
                    hide_by_bias<E>(block, r, g * kGranule, kGranule, add, n);
                }
        }
        for (int j = 0; j < block.keys(); ++j) {
            const V key_scale = Scaled ? V::set1(work.k_scales[j]) : V::zero();
            QKV_FOR(z, Z) {
                E* at = work.scores + j * n + z * W;
                V x = score.template of<Scaled>(V::load(at), key_scale, work.bias + j * n + z * W);
                if (block.masked) x = shown(block.words[j] >> (first + z * W), x);
                top[z] = maximum(top[z], x);
                x.store(at);
            }
        }
    }

    // What a block adds to the sums of values.
    template <int Z>
    struct Weighted {
        const E* weights;
        E* out;
        int64_t rows;   // of the tile, in whole vectors
        const V* keep;  // [Z]: what the sums so far count for
        bool begins;    // there are none
        int first;      // the tile's row that is the first of these
    };

    // Columns [d, d + Columns) of the granules [g0, g1).
    template <int Z, int Columns, bool Careful>
    static QKV_INLINE void values(const Block& block, const Laid& laid, const Weighted<Z>& of, int g0, int g1,
                                  int64_t d) {
        constexpr int n = Z * W;
        V acc[Columns][Z];
        QKV_FOR(c, Columns)
            QKV_FOR(z, Z) acc[c][z] = V::zero();
        for (int g = g0; g < g1; ++g) {
            const Lane* v = laid.values[g] + d;
            for (int k = 0; k < laid.live[g]; k += M::kPair, v += laid.value_strides[g]) {
                const int j = g * kGranule + k;
                const Lane* w = reinterpret_cast<const Lane*>(of.weights) + j / M::kPair * n;
                typename M::R b[Z];
                QKV_FOR(z, Z) b[z] = M::load(w + z * W);
                QKV_FOR(c, Columns) {
                    if constexpr (Careful) {
                        QKV_FOR(z, Z)
                            acc[c][z] = M::multiply(acc[c][z], M::hide(v + c, block.words + j, of.first + z * W), b[z]);
                    } else {
                        const typename M::R x = M::broadcast_lane(v + c);
                        QKV_FOR(z, Z) acc[c][z] = M::multiply(acc[c][z], x, b[z]);
                    }
                }
            }
        }
        const bool begins = of.begins && g0 == 0;
        QKV_FOR(c, Columns)
            QKV_FOR(z, Z) {
                E* at = of.out + (d + c) * of.rows + z * W;
                V sum = acc[c][z];
                if (!begins) sum = g0 > 0 ? V::load(at) + sum : fma(V::load(at), of.keep[z], sum);
                sum.store(at);
            }
    }

    template <int Z, bool Careful>
    static QKV_APART void all_values(const Block& block, const Laid& laid, const Weighted<Z>& of, int64_t Dv) {
        constexpr int kColumns = columns_at_once(Z);
        const int granules = block.granules;
        // Runs outside, columns inside: columns that share a cache line of a value take it while it is in the first
        // cache.
        for (int g = 0; g < granules || g == 0; g += kRunGranules) {
            const int end = granules < g + kRunGranules ? granules : g + kRunGranules;
            int64_t d = 0;
            for (; d + kColumns <= Dv; d += kColumns) values<Z, kColumns, Careful>(block, laid, of, g, end, d);
            for (; d < Dv; ++d) values<Z, 1, Careful>(block, laid, of, g, end, d);
        }
    }

    // Where a granule's rows of keys, or of values, are and how they are converted.
    template <class S>
    struct Granule {
        const Source<S>& source;
        const Block& block;
        int g;
        bool straight;   // rows lie one stride apart
        const S* first;  // row 0, if they do
        int rows;        // those that there are, rounded up to pairs
        int64_t columns;
        const S* row(int i) const { return source.row_of(block, g, first, straight, i); }
        // Rows as numbers of type To, `width` apart; those past the end as zeros.
        template <class To>
        void convert(To* to, int64_t width) const {
            for (int i = 0; i < rows; ++i) convert_row(row(i), source.stride_d, columns, width, to + i * width);
        }
    };

    // Where the keys and values of the block lie, converting those that cannot be multiplied as they are.
    template <class S>
    static void gather(const Job& job, const State& s, Work& work, const Block& block, Laid& laid) {
        constexpr bool kScaled = !std::is_same_v<S, T>;
        constexpr bool kInPlace = M::kInPlace && !kScaled;
        const Attention& a = *job.call;
        const Sequence& sequence = *s.tile.sequence;
        const Source<S> k = keys_of<S>(a, sequence, s.tile.kv_head), v = values_of<S>(a, sequence, s.tile.kv_head);
        const bool straight = k.straight();
        int place[kGranules];
        uint32_t there = 0;
        if (converts(a))
            there = work.converted.find(block, place);
        else
            for (int g = 0; g < block.granules; ++g) place[g] = g;
        for (int g = 0; g < block.granules; ++g) {
            const int64_t j = block.key[g];
            if (g + 1 < block.granules && !(there >> (g + 1) & 1)) ask(k, v, block, g + 1, a);
            const bool done = there >> g & 1, in_row = straight && block.straight(g);
            const bool in_place = kInPlace && block.live[g] == kGranule;
            const int rows = (block.live[g] + kFewKeys - 1) / kFewKeys * kFewKeys;
            const Granule<S> of_k{k, block, g, straight, in_row ? k.row(j) : nullptr, rows, a.D};
            const Granule<S> of_v{v, block, g, straight, in_row ? v.row(j) : nullptr, rows, a.Dv};
            laid.live[g] = block.live[g];
            if (in_place && of_k.first != nullptr && a.k_stride[2] == 1 && a.D % M::kPair == 0) {
                laid.keys[g] = reinterpret_cast<const Single*>(of_k.first);
                laid.key_strides[g] = a.k_stride[1];
            } else {
                const int64_t width = units(a.D) * M::kPair;
                Single* to = work.keys + place[g] * kGranule * width;
                if (!done) of_k.convert(to, width);
                laid.keys[g] = to;
                laid.key_strides[g] = width;
            }
            if constexpr (kScaled)
                gather_scales(a, sequence, s.tile.kv_head, block, g, work.k_scales + g * kGranule,
                              work.v_scales + g * kGranule);
            laid.value_strides[g] = a.Dv;
            if constexpr (M::kPair == 2) {
                laid.values[g] = gather_pairs(a, work, of_v, place[g], done);
            } else if (in_place && of_v.first != nullptr && a.v_stride[2] == 1) {
                laid.values[g] = reinterpret_cast<const Lane*>(of_v.first);
                laid.value_strides[g] = a.v_stride[1];
            } else {
                Lane* to = work.values + place[g] * kGranule * a.Dv;
                if (!done) of_v.convert(to, a.Dv);
                laid.values[g] = to;
            }
        }
    }

    // Asks for the rows of a granule that does not follow its neighbour: the processor does not see them coming.
    template <class S>
    static void ask(const Source<S>& k, const Source<S>& v, const Block& block, int g, const Attention& a) {
        if (block.straight(g) && block.key[g] == block.key[g - 1] + kGranule) return;
        const uintptr_t k_bytes = static_cast<uintptr_t>(a.D) * sizeof(S),
                        v_bytes = static_cast<uintptr_t>(a.Dv) * sizeof(S);
        for (int i = 0; i < block.live[g]; ++i) {
            const uintptr_t from_k = reinterpret_cast<uintptr_t>(k.row(block.at(g, i))),
                            from_v = reinterpret_cast<uintptr_t>(v.row(block.at(g, i)));
            for (uintptr_t at = 0; at < k_bytes; at += 64) prefetch(from_k + at);
            for (uintptr_t at = 0; at < v_bytes; at += 64) prefetch(from_v + at);
        }
    }

    // The interleaved values of a granule: those of the whole sequence where they were made, else its own.
    template <class S>
    static const Lane* gather_pairs(const Attention& a, Work& work, const Granule<S>& of, int place, bool done) {
        const bool straight = of.block.straight(of.g);
        if (work.pairs != nullptr && straight) return work.pairs + (of.block.key[of.g] - work.pairs_first) / 2 * a.Dv;
        // Pairs that were made of the keys as they lie may stand in `values`.
        Lane* to = (work.pairs != nullptr ? work.picked : work.values) + place * kGranule / 2 * a.Dv;
        if (done) return to;
        if constexpr (std::is_same_v<S, T>) {
            for (int i = 0; i < of.rows; i += 2)
                zip_rows(of.row(i), of.row(i + 1), of.source.stride_d, a.Dv, to + i / 2 * a.Dv);
        } else {
            of.convert(work.staged, a.Dv);
            interleave(Source<T>{work.staged, a.Dv, 1, nullptr, 0, 0}, of.rows, 0, of.rows, a.Dv, to);
        }
        return to;
    }

    template <class S, class To>
    static void convert_row(const S* from, int64_t stride, int64_t D, int64_t padded, To* to) {
        if constexpr (std::is_same_v<S, To> && !std::is_same_v<To, E>) {
            for (int64_t d = 0; d < padded; ++d) to[d] = from == nullptr || d >= D ? To{} : from[d * stride];
        } else {
            unpack_row<V>(from, stride, D, padded, to);
        }
    }

    static void step_of(const Job& job, State& s, Work& work, bool careful) {
        const int first = work.block.low * W;
        switch (work.block.high - work.block.low) {
            case 1: step<1>(job, s, work, work.block, first, careful); break;
            case 2: step<2>(job, s, work, work.block, first, careful); break;
            case 3: step<3>(job, s, work, work.block, first, careful); break;
            default:
                if constexpr (kMaxVectors == 4) step<4>(job, s, work, work.block, first, careful);
        }
    }

    // The scores of a block, in work.scores, and the largest of each row, from row `first` on. S: what keys and values
    // are stored as.
    template <int Z, class S>
    static void scores_from(const Job& job, State& s, Work& work, Block& block, Laid& laid, int first, V* top) {
        constexpr bool kScaled = !std::is_same_v<S, T>;
        gather<S>(job, s, work, block, laid);
        QKV_FOR(z, Z) top[z] = V::set1(-static_cast<E>(INFINITY));
        const int64_t u = units(job.call->D);
        if (job.transform) {
            all_scores<Z, false, false>(s, block, laid, u, first, work.scores, top);
            transform<Z, kScaled>(job, s, work, block, first, top);
        } else if (block.masked) {
            all_scores<Z, true, true>(s, block, laid, u, first, work.scores, top);
        } else {
            all_scores<Z, false, true>(s, block, laid, u, first, work.scores, top);
        }
    }
    template <int Z>
    static void scores_of(const Job& job, State& s, Work& work, Block& block, Laid& laid, int first, V* top) {
        if constexpr (sizeof(E) == 4) {
            if (is_scaled(*job.call)) {
                if (job.call->kv_type == Type::i8)
                    scores_from<Z, int8_t>(job, s, work, block, laid, first, top);
                else
                    scores_from<Z, f8>(job, s, work, block, laid, first, top);
                return;
            }
        }
        scores_from<Z, T>(job, s, work, block, laid, first, top);
    }

    // A block of keys for the Z vectors of rows from row `first` on.
    template <int Z>
    static void step(const Job& job, State& s, Work& work, Block& block, int first, bool careful) {
        const Attention& a = *job.call;
        Laid laid;
        V top[Z];
        scores_of<Z>(job, s, work, block, laid, first, top);
        s.masked |= block.masked;

        const V factor = V::set1(static_cast<E>(job.factor));
        RowState<V, 2> rows[Z];
        V from[Z], keep[Z], by[Z], sums[Z], moments[Z];
        QKV_FOR(z, Z) {
            rows[z] = s.softmax.template rows<V>(first + z * W);
            const Shift<V> shift = rows[z].template raise<6>(top[z], factor);
            from[z] = shift.from;
            keep[z] = shift.keep;
            by[z] = shift.by;
            sums[z] = moments[z] = V::zero();
        }
        const bool observed = a.observed != nullptr;
        if (is_scaled(a) || a.dropout_below > 0) {
            if (a.dropout_below > 0) draw<Z>(a, s, work, block, first);
            if (observed)
                exponentials<Z, true, true>(job, work, block, first, factor, from, sums, moments);
            else
                exponentials<Z, true, false>(job, work, block, first, factor, from, sums, moments);
        } else if (observed) {
            exponentials<Z, false, true>(job, work, block, first, factor, from, sums, moments);
        } else {
            exponentials<Z, false, false>(job, work, block, first, factor, from, sums, moments);
        }
        QKV_FOR(z, Z) {
            rows[z].absorb(keep[z], by[z], {sums[z], moments[z]});
            s.softmax.set_rows(first + z * W, rows[z]);
        }

        const uint32_t these = ((1u << Z) - 1) << (first / W);
        const Weighted<Z> weighted{work.scores, s.out + first, s.vectors * W, keep, (s.begun & these) == 0, first};
        if (careful)
            all_values<Z, true>(block, laid, weighted, a.Dv);
        else
            all_values<Z, false>(block, laid, weighted, a.Dv);
        s.begun |= these;
    }

    // Which weights dropout keeps: work.kept, by key, one bit a row.
    template <int Z>
    static QKV_APART void draw(const Attention& a, const State& s, Work& work, const Block& block, int first) {
        for (int j = 0; j < block.keys(); ++j) {
            const uint64_t key = draw_index(block.at(j / kGranule, j % kGranule));
            work.kept[j] = 0;
            for (int r = 0; r < Z * W; r += kDrawLanes)
                work.kept[j] |= static_cast<uint64_t>(keep_bits(s.draws + first + r, key, a.dropout_below)) << r;
        }
    }

    // Weights from scores, in place, and their sums; moments: the second ones of rows, of `Observed`. With `Changed`,
    // what values are multiplied by differs from what is summed: it is times the value's scale, or dropped.
    template <int Z, bool Changed, bool Observed>
    static QKV_APART void exponentials(const Job& job, Work& work, const Block& block, int first_row, V factor,
                                       const V* from, V* sums, [[maybe_unused]] V* moments) {
        constexpr int n = Z * W;
        E* scores_at = work.scores;
        const int keys = block.keys();
        const bool scaled = is_scaled(*job.call), drops = job.call->dropout_below > 0;
        const auto changed = [&](V x, int j, int z) {
            if constexpr (Changed) {
                if (scaled) x = x * V::set1(work.v_scales[j]);
                if (drops) x = choose(static_cast<uint32_t>(work.kept[j] >> (z * W)), x, V::zero());
                // 0 times a scale that is NaN is not 0.
                if (block.masked)
                    x = choose(static_cast<uint32_t>(block.words[j] >> (first_row + z * W)), x, V::zero());
            }
            return x;
        };
        for (int first = 0; first < keys; first += kGranule) {
            V part[Z], moment[Z];
            QKV_FOR(z, Z) part[z] = moment[z] = V::zero();
            const auto e = [&](const E* at, int z) {
                const V x = exponent(V::load(at + z * W), from[z], factor), y = exp2_poly<M::kDegree>(x);
                if constexpr (Observed) moment[z] = fma(y, there(x), moment[z]);
                return y;
            };
            for (int j = first; j < first + kGranule; j += M::kPair)
                QKV_FOR(z, Z) {
                    const V even = e(scores_at + j * n, z);
                    if constexpr (M::kPair == 2) {
                        const V odd = e(scores_at + (j + 1) * n, z);
                        part[z] = part[z] + (even + odd);
                        Lane* to = reinterpret_cast<Lane*>(scores_at) + j / 2 * n + z * W;
                        M::Pairs::store(M::Pairs::pack(changed(even, j, z), changed(odd, j + 1, z)), to);
                    } else {
                        part[z] = part[z] + even;
                        changed(even, j, z).store(scores_at + j * n + z * W);
                    }
                }
            QKV_FOR(z, Z) sums[z] = sums[z] + part[z];
            if constexpr (Observed)
                QKV_FOR(z, Z) moments[z] = moments[z] + moment[z];
        }
    }
};

}  // namespace QKV_ISA
}  // namespace qkv
