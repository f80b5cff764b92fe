// The kernel for few rows (decode): dot products along the head dimension.
//
// Every key and value is loaded, and widened, once for up to four rows of its group. A vector's worth of sums is made
// side by side and reduced together. What comes next is asked for while keys are multiplied, a line for each that is
// used: between pages, and in several passes over values, the processor does not see it coming, and asked for at once,
// requests queue.
#pragma once
#include "kernel/dropout.h"
#include "kernel/rowstate.h"

namespace qkv {
namespace QKV_ISA {

// A granule's rows, as addresses to ask for before they are needed. Hints only: an address need not exist.
struct Ahead {
    uintptr_t first = 0, stride = 0, bytes = 0;

    template <class S>
    static QKV_INLINE Ahead of(const S* first, int64_t stride, int64_t width) {
        return {reinterpret_cast<uintptr_t>(first), static_cast<uintptr_t>(stride) * sizeof(S),
                static_cast<uintptr_t>(first == nullptr ? 0 : width) * sizeof(S)};
    }
    QKV_INLINE void line(int row, uintptr_t at) const {
        if (at < bytes) prefetch(first + static_cast<uintptr_t>(row) * stride + at);
    }
};

template <class M>
class Dots {
  public:
    using T = typename M::T;  // of queries
    using S = typename M::S;  // of keys and values as they are stored
    using E = typename M::E;
    using V = typename M::V;
    using Single = typename M::Single;
    static constexpr int W = V::W;
    static constexpr int kTileRows = 16;
    static constexpr int kRunGranules = M::kRun / kGranule;
    static constexpr int kStepGranules = 8;  // divides a chunk: all steps of a long call are as long as each other
    // Keys multiplied side by side: enough for products not to wait for each other, and few requests at once.
    static constexpr int kSideBySide = 4;
    static constexpr int kStepKeys = kStepGranules * kGranule;
    // How far ahead keys are asked for. Those of 8 bits take half as long.
    static constexpr int kAheadKeys = kGranule * (sizeof(S) == 1 ? 2 : 1);
    static constexpr bool kScaled = !std::is_same_v<S, T>;

    struct Work {
        Scratch scratch;
        Block block;
        Walk<kStepGranules> walk;
        Tile tile;
        Single* queries;  // [rows][padded D], in the order in which M loads numbers
        E* out;           // [rows][padded Dv], likewise
        E* scores;        // [rows][kWindowKeys]
        E* bias;          // [kWindowKeys]
        uint32_t* pairs;  // [rows][kWindowKeys / 2]
        S* keys;          // rows that cannot be loaded where they lie: [kGranule][padded D]
        S* values;        // likewise [kStepKeys][padded Dv]
        E* k_scales;      // [kWindowKeys], of stored keys that have them
        E* v_scales;
        RowStates<E, kTileRows, 2> softmax;
        uint64_t draws[kWindowKeys];  // dropout's numbers of a step's keys
        bool masked;
    };
    template <class From>
    static void lay_out(const Attention& a, From& memory, Work& w) {
        w.queries = memory.template take<Single>(kTileRows * padded(a.D));
        w.out = memory.template take<E>(kTileRows * padded(a.Dv));
        w.scores = memory.template take<E>(kTileRows * kWindowKeys);
        w.bias = memory.template take<E>(kWindowKeys);
        w.pairs = memory.template take<uint32_t>(kTileRows * kWindowKeys / 2);
        w.keys = memory.template take<S>(kGranule * padded(a.D));
        w.values = memory.template take<S>(kStepKeys * padded(a.Dv));
        w.k_scales = memory.template take<E>(kWindowKeys);
        w.v_scales = memory.template take<E>(kWindowKeys);
    }

    static int64_t padded(int64_t D) { return (D + M::kStep - 1) / M::kStep * M::kStep; }

    static void reset(const Attention& a, Work& w) {
        w.masked = false;
        w.softmax.clear();
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
            Single* to = w.queries + (first + r) * width;
            int64_t d = 0;
            if (a.q_stride[3] == 1)
                for (; d + M::kStep <= a.D; d += M::kStep) M::take(from + d, job.negate, to + d);
            T rest[M::kStep] = {};
            for (int64_t end = d; end < width; end += M::kStep) {
                for (int64_t x = 0; x < M::kStep; ++x) rest[x] = end + x < a.D ? from[(end + x) * a.q_stride[3]] : T{};
                M::take(rest, job.negate, to + end);
            }
        }
    }

    // Finds the first of the keys in [k0, k1) that the tile may see. False: there is none.
    static bool begin(const Program& program, Work& w, int64_t k0, int64_t k1) {
        w.walk.begin(program, w.tile.rows, w.scratch, keys_between(k0, k1), !program.empty());
        return !w.walk.over();
    }
    // Goes through the keys from where it began.
    static void run(const Job& job, Work& w, bool careful) {
        while (w.walk.next(w.scratch, w.block)) step(job, w, w.block, careful);
    }

    static bool spoiled(const Attention& a, const Work& w) {
        if (!w.masked) return false;
        const int64_t width = padded(a.Dv);
        for (int r = 0; r < w.tile.rows.count; ++r) {
            V nothing = V::zero();  // 0 times everything: NaN where something is not finite
            for (int64_t d = 0; d < width; d += W) nothing = fma(V::load(w.out + r * width + d), V::zero(), nothing);
            if (sum(nothing) != 0) return true;
        }
        return false;
    }

    // Puts the columns of w.out in order.
    static void settle([[maybe_unused]] const Attention& a, [[maybe_unused]] Work& w) {
        if constexpr (M::kStep > W) {
            const int64_t width = padded(a.Dv);
            for (int r = 0; r < w.tile.rows.count; ++r)
                for (int64_t d = 0; d < width; d += M::kStep) M::in_order(w.out + r * width + d);
        }
    }

    static void finish(const Job& job, Work& w) {
        for (int r = 0; r < w.tile.rows.count; ++r)
            write_row<T, E, V>(job, w.tile, r, w.out + r * padded(job.call->Dv), w.softmax.row(r));
    }

  private:
    // Rows of keys or values whose first `whole` numbers may be loaded kStep at a time, and the rest as a part.
    struct Row16 {
        const S* first;
        int64_t stride, whole;
    };
    // Where the values of a block lie.
    struct Laid {
        const S* values[kGranules];
        int64_t strides[kGranules];
        int live[kGranules];  // keys of each granule: fewer than 16 at the end
        int64_t whole;        // of all of them
    };

    // A granule's products with some rows of queries.
    struct Products {
        const Single* queries;
        int64_t D, width;  // width: of a row of queries
        Row16 keys;
        int live;  // past them there are no keys
        Ahead next, soon;
        E* to;  // [rows of queries][kWindowKeys], keys in the order of memory
    };
    // Asks: for a line of what comes next with every line of keys.
    template <int Count, bool Asks>
    static QKV_INLINE void scores(const Products& of) {
        constexpr int kAtOnce = W / Count;  // W sums are reduced together
        constexpr int kSide = kAtOnce < kSideBySide ? kAtOnce : kSideBySide;
        constexpr int64_t kLine = 64 / sizeof(S) > M::kStep ? 64 / sizeof(S) : M::kStep;
        for (int g = 0; g < of.live; g += kAtOnce) {
            V acc[W];
            QKV_FOR(part, kAtOnce / kSide) {
                const int first = g + part * kSide;
                if (part > 0 && first >= of.live) {  // nobody looks at them
                    QKV_FOR(r, Count)
                        QKV_FOR(k, kSide) acc[r * kAtOnce + part * kSide + k] = V::zero();
                    continue;
                }
                const S* keys[kSide];
                QKV_FOR(k, kSide) keys[k] = of.keys.first + (first + k < of.live ? first + k : 0) * of.keys.stride;
                V side[Count * kSide];
                QKV_FOR(x, Count * kSide) side[x] = V::zero();
                for (int64_t line = 0; line < of.width; line += kLine) {
                    if constexpr (Asks) ask<kSide>(of, first, line);
                    for (int64_t d = line; d < line + kLine && d < of.keys.whole; d += M::kStep)
                        multiply<Count, kSide, false>(side, keys, of, d);
                }
                if constexpr (M::kParts)
                    if (of.keys.whole < of.width) multiply<Count, kSide, true>(side, keys, of, of.keys.whole);
                if constexpr (Asks)
                    for (int64_t line = of.width; line * sizeof(S) < of.soon.bytes; line += kLine)
                        ask<kSide>(of, first, line);
                QKV_FOR(r, Count)
                    QKV_FOR(k, kSide) acc[r * kAtOnce + part * kSide + k] = side[r * kSide + k];
            }
            if constexpr (Count == 1) {
                sums(acc).store(of.to + g);
            } else {
                E all[W];
                sums(acc).store(all);
                QKV_FOR(r, Count) std::memcpy(of.to + r * kWindowKeys + g, all + r * kAtOnce, sizeof(E) * kAtOnce);
            }
        }
    }
    template <int Keys>
    static QKV_INLINE void ask(const Products& of, int g, int64_t line) {
        const uintptr_t at = static_cast<uintptr_t>(line) * sizeof(S);
        QKV_FOR(k, Keys) of.next.line(g + k, at);
        QKV_FOR(k, Keys) of.soon.line(g + k, at);
    }
    // One register of each key with one of each row of queries. The fewer of the two stay in registers.
    template <int Count, int Keys, bool Part>
    static QKV_INLINE void multiply(V* acc, const S* const* keys, const Products& of, int64_t d) {
        const auto query = [&](int r) { return M::load(of.queries + r * of.width + d); };
        const auto key = [&](int k) { return load<Part>(keys[k] + d, of.D - d); };
        if constexpr (Count > Keys) {
            typename M::R x[Keys];
            QKV_FOR(k, Keys) x[k] = key(k);
            QKV_FOR(r, Count) {
                const typename M::R q = query(r);
                QKV_FOR(k, Keys) acc[r * Keys + k] = M::multiply(acc[r * Keys + k], x[k], q);
            }
        } else {
            typename M::R q[Count];
            QKV_FOR(r, Count) q[r] = query(r);
            QKV_FOR(k, Keys) {
                const typename M::R x = key(k);
                QKV_FOR(r, Count) acc[r * Keys + k] = M::multiply(acc[r * Keys + k], x, q[r]);
            }
        }
    }
    // A register of numbers; Part: as many as are left, and zeros.
    template <bool Part>
    static QKV_INLINE typename M::R load(const S* from, [[maybe_unused]] int64_t left) {
        if constexpr (Part)
            return M::load_part(from, static_cast<int>(left));
        else
            return M::load(from);
    }

    // The keys (or values) of granule g: where they lie if they can be loaded there, else in `copy`.
    static Row16 resident(const Source<S>& source, int64_t D, const Block& block, int g, S* copy) {
        const int64_t width = padded(D);
        const bool straight = source.straight();
        const S* first = straight && block.straight(g) ? source.row(block.key[g]) : nullptr;
        if (source.stride_d == 1 && (M::kParts || D == width) && first != nullptr &&
            (M::kPair == 1 || block.live[g] == kGranule))
            return {first, source.stride, D / M::kStep * M::kStep};
        // Rows past the end are not read, but for the second of a pair.
        const int rows = block.live[g];
        for (int i = 0; i < rows; ++i) {
            const S* from = source.row_of(block, g, first, straight, i);
            S* to = copy + i * width;
            if (from == nullptr)
                std::memset(static_cast<void*>(to), 0, sizeof(S) * static_cast<size_t>(D));
            else if (source.stride_d == 1 && D > 0)
                std::memcpy(to, from, sizeof(S) * static_cast<size_t>(D));
            else
                for (int64_t d = 0; d < D; ++d) to[d] = from[d * source.stride_d];
            std::memset(static_cast<void*>(to + D), 0, sizeof(S) * static_cast<size_t>(width - D));
        }
        if (rows % M::kPair != 0)
            std::memset(static_cast<void*>(copy + rows * width), 0, sizeof(S) * static_cast<size_t>(width));
        return {copy, width, width};
    }

    // What some rows of queries add to their sums of values.
    struct Weighted {
        const E* weights;       // [rows][kWindowKeys]
        const uint32_t* pairs;  // the same, where products take pairs: [rows][kWindowKeys / 2]
        E* out;                 // [rows][width]
        int64_t Dv, width;
        const E* keep;  // [rows]: what the sums so far count for
        int row;        // the first
    };

    // Columns [d, d + Vectors W) of the granules [g0, g1). Part: those that there are.
    template <int Count, int Vectors, bool Careful, bool Part = false>
    static QKV_INLINE void values(const Block& block, const Laid& laid, const Weighted& of, int g0, int g1, int64_t d) {
        V acc[Count][Vectors];
        QKV_FOR(r, Count)
            QKV_FOR(c, Vectors) acc[r][c] = V::zero();
        for (int g = g0; g < g1; ++g) {
            const int64_t stride = laid.strides[g];
            const S* v = laid.values[g] + d;
            for (int k = 0; k < laid.live[g]; k += M::kPair, v += M::kPair * stride) {
                const int j = g * kGranule + k;
                const bool hidden = Careful && !(block.words[j] >> of.row & 1);
                if constexpr (M::kPair == 2) {
                    using P = typename M::Pairs;
                    const bool next_hidden = Careful && !(block.words[j + 1] >> of.row & 1);
                    QKV_FOR(half, Vectors / 2) {
                        const int c = 2 * half;
                        const auto x = hidden ? P::zero() : load<Part>(v + c * W, of.Dv - d);
                        const auto y = next_hidden ? P::zero() : load<Part>(v + stride + c * W, of.Dv - d);
                        const auto low = P::zip_low(x, y), high = P::zip_high(x, y);
                        QKV_FOR(r, Count) {
                            const auto w = P::broadcast(of.pairs[r * kWindowKeys / 2 + j / 2]);
                            acc[r][c] = M::multiply(acc[r][c], low, w);
                            acc[r][c + 1] = M::multiply(acc[r][c + 1], high, w);
                        }
                    }
                } else {
                    constexpr int kParts = M::kStep / W;
                    typename M::R x[Vectors / kParts];
                    QKV_FOR(c, Vectors / kParts) x[c] = hidden ? M::none() : load<Part>(v + c * M::kStep, of.Dv - d);
                    QKV_FOR(r, Count) {
                        const V w = V::set1(of.weights[r * kWindowKeys + j]);
                        QKV_FOR(c, Vectors / kParts) M::add(acc[r] + c * kParts, x[c], w);
                    }
                }
            }
        }
        QKV_FOR(r, Count) {
            const V old = V::set1(g0 > 0 ? E(1) : of.keep[r]);
            QKV_FOR(c, Vectors) {
                E* at = of.out + r * of.width + d + c * W;
                fma(V::load(at), old, acc[r][c]).store(at);
            }
        }
    }

    template <int Count, int Vectors, bool Careful>
    static void all_values(const Block& block, const Laid& laid, Work& w, const E* keep, int row, int64_t Dv) {
        const int64_t width = padded(Dv);
        const Weighted of{w.scores + row * kWindowKeys,
                          w.pairs + row * kWindowKeys / 2,
                          w.out + row * width,
                          Dv,
                          width,
                          keep + row,
                          row};
        // Runs outside, columns inside: the passes over the columns of a value find it in the first cache.
        for (int g = 0; g < block.granules; g += kRunGranules) {
            const int end = block.granules < g + kRunGranules ? block.granules : g + kRunGranules;
            int64_t d = 0;
            for (; d + Vectors * W <= laid.whole; d += Vectors * W)
                values<Count, Vectors, Careful>(block, laid, of, g, end, d);
            constexpr int kFew = M::kStep / W;
            for (; d < laid.whole; d += kFew * W) values<Count, kFew, Careful>(block, laid, of, g, end, d);
            if constexpr (M::kParts)
                if (d < width) values<Count, kFew, Careful, true>(block, laid, of, g, end, d);
        }
    }

    static void step(const Job& job, Work& w, Block& block, bool careful) {
        const Attention& a = *job.call;
        const Sequence& sequence = *w.tile.sequence;
        const int n = block.keys();
        const Source<S> k = keys_of<S>(a, sequence, w.tile.kv_head), v = values_of<S>(a, sequence, w.tile.kv_head);
        Laid laid;
        laid.whole = padded(a.Dv);
        for (int g = 0; g < block.granules; ++g) all_scores(a, w, block, g, k, v, laid);
        if constexpr (kScaled)
            for (int g = 0; g < block.granules; ++g)
                gather_scales(a, sequence, w.tile.kv_head, block, g, w.k_scales + g * kGranule,
                              w.v_scales + g * kGranule);
        for (int j = 0; j < n && a.dropout_below > 0; ++j)
            w.draws[j] = draw_index(block.at(j / kGranule, j % kGranule));
        E keep[kTileRows];
        for (int r = 0; r < w.tile.rows.count; ++r) keep[r] = weigh(job, w, block, r);
        w.masked |= block.masked;
        add_values(a, w, block, laid, keep, careful);
    }

    // The scores of a granule's keys as products, and where its values lie.
    static void all_scores(const Attention& a, Work& w, const Block& block, int g, const Source<S>& k,
                           const Source<S>& v, Laid& laid) {
        const int64_t j = block.key[g], keys = w.tile.sequence->k_count;
        const int rows = w.tile.rows.count, later = g + kAheadKeys / kGranule;
        // What comes next; past the last block, what would if keys went on.
        const int64_t after = w.walk.over() ? block.key[block.granules - 1] + kGranule : w.walk.position();
        const int64_t then = later < block.granules ? block.key[later] : after + (later - block.granules) * kGranule;
        laid.live[g] = block.live[g];
        Products of{};
        of.D = a.D, of.width = padded(a.D), of.live = laid.live[g];
        of.keys = resident(k, a.D, block, g, w.keys);
        const Row16 values = resident(v, a.Dv, block, g, w.values + g * kGranule * padded(a.Dv));
        laid.values[g] = values.first, laid.strides[g] = values.stride;
        laid.whole = lower(laid.whole, values.whole);
        of.next = Ahead::of(then < keys ? k.row(then) : nullptr, k.stride, a.D);
        of.soon = Ahead::of(values.first, values.stride, a.Dv);
        if constexpr (kScaled) prefetch_scales(a, *w.tile.sequence, w.tile.kv_head, j);
        for (int r = 0, n; r < rows; r += n) {
            constexpr int kMost = W < 4 ? W : 4;
            n = rows - r >= kMost ? kMost : rows - r >= 2 ? 2 : 1;
            of.queries = w.queries + r * of.width;
            of.to = w.scores + r * kWindowKeys + g * kGranule;
            const bool asks = r == 0;
            if (n == kMost)
                asks ? scores<kMost, true>(of) : scores<kMost, false>(of);
            else if (n == 2)
                asks ? scores<2, true>(of) : scores<2, false>(of);
            else
                asks ? scores<1, true>(of) : scores<1, false>(of);
        }
    }

    // From row r's products to its weights, in place. Returns what its sums so far count for.
    static E weigh(const Job& job, Work& w, Block& block, int r) {
        const Attention& a = *job.call;
        const int n = block.keys();
        E* s = w.scores + r * kWindowKeys;
        if (job.transform) transform(job, w, block, r, s);
        if (block.masked)
            for (int j = 0; j < n; ++j) s[j] = block.words[j] >> r & 1 ? s[j] : -static_cast<E>(INFINITY);
        V top = V::set1(-static_cast<E>(INFINITY));
        for (int j = 0; j < n; j += W) top = maximum(top, V::load(s + j));
        const V factor = V::set1(static_cast<E>(job.factor));
        RowState<E, 2> state = w.softmax.row(r);
        const Shift<V> shift = state.template raise<6>(largest(top), factor);
        const E keep = first_lane(shift.keep);
        V l = V::zero(), t = V::zero();
        if (a.observed != nullptr)
            exponentials<true>(s, n, shift.from, factor, l, t);
        else
            exponentials<false>(s, n, shift.from, factor, l, t);
        state.absorb(keep, first_lane(shift.by), {sum(l), sum(t)});
        w.softmax.set(r, state);
        if constexpr (kScaled) {
            for (int j = 0; j < n; j += W) (V::load(s + j) * V::load(w.v_scales + j)).store(s + j);
            if (block.masked)  // 0 times a scale that is NaN is not 0
                for (int j = 0; j < n; ++j) s[j] = block.words[j] >> r & 1 ? s[j] : E(0);
        }
        if (a.dropout_below > 0) drop(a, w, r, n, s);
        if constexpr (M::kPair == 2) {
            T* to = reinterpret_cast<T*>(w.pairs + r * kWindowKeys / 2);
            for (int j = 0; j < n; j += W) M::Pairs::store(M::Pairs::narrow(V::load(s + j)), to + j);
        }
        return keep;
    }

    // Weights from scores, in place, and what they add to a row's sums.
    template <bool Observed>
    static QKV_INLINE void exponentials(E* s, int n, V from, V factor, V& l, [[maybe_unused]] V& t) {
        for (int j = 0; j < n; j += W) {
            const V x = exponent(V::load(s + j), from, factor), e = exp2_poly<M::kDegree>(x);
            l = l + e;
            if constexpr (Observed) t = fma(e, there(x), t);
            e.store(s + j);
        }
    }

    static void drop(const Attention& a, const Work& w, int r, int n, E* weights) {
        const uint64_t row = draw_row(a, w.tile.rows, r);
        for (int j = 0; j < n; j += W) {
            uint32_t kept = 0;
            for (int x = 0; x < W; x += kDrawLanes) kept |= keep_bits(w.draws + j + x, row, a.dropout_below) << x;
            choose(kept, V::load(weights + j), V::zero()).store(weights + j);
        }
    }

    // Adds the weighted values of a block to the sums of all rows.
    static void add_values(const Attention& a, Work& w, const Block& block, const Laid& laid, const E* keep,
                           bool careful) {
        const int rows = w.tile.rows.count;
        if (careful) {
            for (int r = 0; r < rows; ++r) all_values<1, 2, true>(block, laid, w, keep, r, a.Dv);
            return;
        }
        constexpr bool kWide = kRegisters == 32;
        int r = 0;
        for (; r + 4 <= rows; r += 4) all_values<4, kWide ? 4 : 2, false>(block, laid, w, keep, r, a.Dv);
        for (; r + 2 <= rows; r += 2) all_values<2, kWide ? 8 : 4, false>(block, laid, w, keep, r, a.Dv);
        for (; r < rows; ++r) all_values<1, kWide ? 8 : 4, false>(block, laid, w, keep, r, a.Dv);
    }

    static QKV_INLINE E first_lane(V x) {
        E lanes[W];
        x.store(lanes);
        return lanes[0];
    }

    // The scores of one row as the definition has them, but for the mask.
    static void transform(const Job& job, Work& w, Block& block, int r, E* s) {
        const Attention& a = *job.call;
        const Score<M> score(job);
        const int n = block.keys();
        if (a.bias_count > 0) {
            std::memset(w.bias, 0, sizeof(E) * static_cast<size_t>(n));
            for (int g = 0; g < block.granules; ++g) gather_bias<E>(a, w.tile, r, block, g, w.bias + g * kGranule, 1);
            hide_by_bias<E>(block, r, 0, n, w.bias, 1);
        }
        for (int j = 0; j < n; j += W) {
            const V key_scale = kScaled ? V::load(w.k_scales + j) : V::zero();
            score.template of<kScaled>(V::load(s + j), key_scale, w.bias + j).store(s + j);
        }
    }
};

}  // namespace QKV_ISA
}  // namespace qkv
