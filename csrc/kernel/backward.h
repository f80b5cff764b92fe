// Gradients of one call: one sweep over chunks of keys, weights recomputed from the rows' states.
//
// A task owns a chunk of one key/value head's keys, and with it those rows of dK and dV. It goes through the tiles of
// queries from the last to the first; each tile's dQ is added to by one chunk after another, in the order of the
// chunks, whichever thread they run on: a chunk waits until those before it have passed the tile. So nothing is summed
// twice, nothing quadratic is kept, and the bits of a result do not depend on the number of threads.
//
// Scores come out as in the forward kernel for many rows, bit for bit, and out . d_out is summed as v . d_out is:
// however large scores are, a row's weights sum to 1, and a saturated row's gradient of scores is 0. Rows that the
// kernel for few rows took get states of their own first.
#pragma once
#include <atomic>
#include <thread>

#include "kernel/bands.h"
#include "kernel/bias_sums.h"
#include "kernel/dropout.h"
#include "kernel/products.h"
#include "kernel/rowstate.h"
#include "kernel/schedule.h"
#include "kernel/tasks.h"
#include "runtime/arena.h"

namespace qkv {
namespace QKV_ISA {

QKV_INLINE bool finite(float x) { return (cast_bits<uint32_t>(x) & 0x7f800000u) != 0x7f800000u; }
QKV_INLINE bool finite(double x) { return (cast_bits<uint64_t>(x) >> 52 & 0x7ff) != 0x7ff; }

template <class M>
class Gradients {
  public:
    explicit Gradients(const Backward& call)
        : b_(call), a_(call.call), job_(call.call), program_(job_.program), group_(job_.group) {
        D_ = round_up(a_.D, W), Dv_ = round_up(a_.Dv, W);
        const int64_t keys =
            32768 / upper(upper(D_, Dv_), 64);  // a chunk's operands and sums share the second-level cache
        chunk_ = clamp(keys / kGranule * kGranule, kStepKeys, 512);
        double flops = 0;
        for (int64_t i = 0; i < a_.sequence_count; ++i) {
            const Sequence& s = a_.sequences[i];
            longest_ = upper(longest_, s.q_count);
            flops += 10.0 * static_cast<double>(s.q_count) * static_cast<double>(s.k_count * a_.Hq * a_.D);
        }
        bands_.begin(a_, job_, longest_);
        tiles_ = bands_.tiles();
        for (int64_t i = 0; i < a_.sequence_count; ++i)
            per_class_ = upper(per_class_, (keys_of_class(a_.sequences[i], 0) + chunk_ - 1) / chunk_);
        chunks_ = bands_.step() * per_class_;
        rows_ = group_ * longest_;
        threads_ = worker_limit(flops < 4e5 ? 1 : a_.threads);
        bias_.begin(b_, longest_, chunks_);
        for (int64_t t = 0; b_.d_bias != nullptr && t < a_.bias_count; ++t) {
            const BiasGradient& d = b_.d_bias[t];
            if (d.data == nullptr) continue;
            wanted_ = true;
            const bool by_key = a_.bias[t].kind == BiasKind::tensor && d.stride[3] != 0;
            // Where tasks would add to the same place, they take their turns inside one task, or add to copies.
            if (by_key && d.stride[0] == 0) one_task_for_batch_ = true;
            if (by_key && d.stride[1] == 0) one_task_for_heads_ = true;
        }
    }

    Status go() {
        Measure worker, all;
        Work unused;
        worker.take<Work>(1);
        lay_out(worker, unused);
        worker_bytes_ = worker.used;
        lay_out(all);
        char* memory = static_cast<char*>(scratch_memory(static_cast<size_t>(all.used)));
        if (memory == nullptr) return Status::no_memory;
        Arena arena{memory};
        lay_out(arena);
        const int64_t heads = a_.sequence_count * a_.Hkv, batches = one_task_for_batch_ ? 1 : a_.sequence_count;
        for (int64_t i = 0; i < heads * chunks_; ++i) new (passed_ + i) std::atomic<int64_t>(0);
        bias_.clear();
        for_each_task<&Gradients::prepare>(this, threads_, heads * tiles_);
        for_each_task<&Gradients::task>(this, threads_, chunks_ * batches * (one_task_for_heads_ ? 1 : a_.Hkv));
        if (b_.d_q != nullptr) for_each_task<&Gradients::write_d_q>(this, threads_, heads * tiles_);
        if (b_.d_sinks != nullptr) for_each_task<&Gradients::sink>(this, threads_, a_.Hq);
        bias_.finish();
        release_large_scratch();
        return Status::ok;
    }

  private:
    using T = typename M::T;
    using E = typename M::E;
    using V = typename M::V;
    using Single = typename M::Single;
    using Lane = typename M::Lane;
    using P = Product<M>;
    static constexpr int W = V::W;
    static constexpr int kPair = M::kPair;
    static constexpr int kTileRows = 4 * W;
    static constexpr int kRowUnit = W > 4 ? W : 4;
    static constexpr int kAskRows = 16;
    static constexpr uintptr_t kLine = 64;  // bytes
    static constexpr int kStepGranules = 8;
    static constexpr int kStepKeys = kStepGranules * kGranule;
    static_assert(kTileRows <= kMaxRows);

    // The chunks of keys that a tile may see keys of: sorted ranges of their numbers. A list that is full joins its
    // last ones; a chunk that turns out to hold nothing costs its bounds, and no more.
    struct Visits {
        static constexpr int kMost = 48;
        int count;
        int32_t first[kMost], last[kMost];  // [first, last)

        void add(int64_t from, int64_t to) {
            if (count > 0 && (from <= last[count - 1] || count == kMost)) {
                last[count - 1] = upper(last[count - 1], static_cast<int32_t>(to));
            } else {
                first[count] = static_cast<int32_t>(from);
                last[count++] = static_cast<int32_t>(to);
            }
        }
        bool has(int64_t number) const {
            int i = 0;
            while (i < count && last[i] <= number) ++i;
            return i < count && first[i] <= number;
        }
    };

    // One chunk of keys of one key/value head: those at the places of a sieve.
    struct Chunk {
        const Sequence* sequence;
        int64_t at, kv_head, number;
        Sieve sieve;
        int64_t count() const { return sieve.to - sieve.from; }
        int64_t padded() const { return round_up(count(), kGranule); }
        int64_t key(int64_t j) const { return sieve.key(sieve.from + j); }
        int64_t place(int64_t key) const { return sieve.place(key) - sieve.from; }
        const Single* k;  // rows to broadcast from
        int64_t k_stride;
        const Single* v;
        int64_t v_stride;
        const Lane* k_lanes;  // rows, or pairs of rows, of whole vectors
        int64_t k_lanes_stride;
        bool any_bad;
    };

    // A granule of a block, as its products are taken: keys that follow each other in the chunk are read where they lie
    // there, others are copied; and of the tile's rows those in [row0, row1), outside of which none sees any.
    struct Part {
        bool straight, masked;
        int64_t first;  // of a straight granule, in the chunk
        int64_t row0, row1;
    };

    struct Work {
        Scratch scratch;
        Bounds bounds;
        Walk<kStepGranules> walk;
        Block block;
        Part parts[kStepGranules];
        int64_t places[kStepKeys];  // by key of the block: where in the chunk
        Tile tile;
        Tile ahead;  // the next one of the chunk, whose memory is asked for in time
        int asked;   // rows of it
        int64_t n;   // rows of the tile, rounded up to whole vectors
        uint64_t bad_rows;
        int64_t row[kTileRows];  // of delta_, lse2_ and d_q_
        Lane* q_lanes;           // transposed queries, or outputs: [steps of D or Dv][n]
        Lane* do_lanes;          // [steps of Dv][n]
        Lane* q_rows;            // [n / pair][D_]
        Lane* do_rows;           // [n / pair][Dv_]
        E* flat;                 // rows on their way to be transposed
        E *s, *dp;               // one granule: [16][n]
        E* bias;                 // [16][n]
        E* ds;                   // [16][n], before the softcap, where a bias wants it
        Single* p;               // [kStepKeys][n]
        Single* dx;              // [kStepKeys][n]
        Lane* dx_lanes;          // pairs of keys: [kStepKeys / 2][n]
        E* d_q;                  // [n][D_]
        E* d_k;                  // [chunk][D_]
        E* d_v;                  // [chunk][Dv_]
        Single* k_copy;          // [chunk][D_]
        Single* v_copy;
        Lane* k_lanes;   // [chunk / pair][D_]
        Single* k_some;  // likewise for gathered keys: [kStepKeys][D_]
        Single* v_some;
        Lane* k_some_lanes;
        E* d_some;          // [kStepKeys][D_ or Dv_]
        uint8_t* bad_keys;  // [chunk]
        E m[kTileRows], inverse[kTileRows], delta[kTileRows], rise[kTileRows];
        uint64_t draws[kTileRows];  // dropout's numbers, but for the key
    };

    static int64_t steps(int64_t D) { return (D + kPair - 1) / kPair; }
    static int64_t even(int64_t D) { return steps(D) * kPair; }

    template <class From>
    void lay_out(From& arena) {
        const int64_t heads = a_.sequence_count * a_.Hkv, all = heads * rows_;
        delta_ = arena.template take<E>(all);
        rise_ = arena.template take<E>(all);
        max_ = arena.template take<E>(all);
        inverse_ = arena.template take<E>(all);
        d_q_ = arena.template take<E>(all * D_);
        visits_ = arena.template take<Visits>(heads * tiles_);
        passed_ = arena.template take<std::atomic<int64_t>>(heads * chunks_);
        bias_.lay_out(arena);
        workers_ = arena.template take<char>(worker_bytes_ * threads_);
    }
    template <class From>
    void lay_out(From& arena, Work& w) const {
        const int64_t n = kTileRows, width = upper(D_, Dv_);
        w.q_lanes = arena.template take<Lane>(steps(upper(a_.D, a_.Dv)) * n);
        w.do_lanes = arena.template take<Lane>(steps(a_.Dv) * n);
        w.q_rows = arena.template take<Lane>(n / kPair * D_);
        w.do_rows = arena.template take<Lane>(n / kPair * Dv_);
        w.flat = arena.template take<E>(n * width);
        w.s = arena.template take<E>(kGranule * n);
        w.dp = arena.template take<E>(kGranule * n);
        w.bias = arena.template take<E>(kGranule * n);
        w.ds = arena.template take<E>(kGranule * n);
        w.p = arena.template take<Single>(kStepKeys * n);
        w.dx = arena.template take<Single>(kStepKeys * n);
        w.dx_lanes = arena.template take<Lane>(kPair == 2 ? kStepKeys / 2 * n : 0);
        w.d_q = arena.template take<E>(n * D_);
        w.d_k = arena.template take<E>(chunk_ * D_);
        w.d_v = arena.template take<E>(chunk_ * Dv_);
        w.k_copy = arena.template take<Single>(chunk_ * even(D_));
        w.v_copy = arena.template take<Single>(chunk_ * even(Dv_));
        w.k_lanes = arena.template take<Lane>(kPair == 2 ? chunk_ / 2 * D_ : 0);
        w.bad_keys = arena.template take<uint8_t>(chunk_);
        w.k_some = arena.template take<Single>(kStepKeys * even(D_));
        w.v_some = arena.template take<Single>(kStepKeys * even(Dv_));
        w.k_some_lanes = arena.template take<Lane>(kPair == 2 ? kStepKeys / 2 * D_ : 0);
        w.d_some = arena.template take<E>(kStepKeys * width);
    }
    Work& work(int worker) const {
        Arena arena{workers_ + worker * worker_bytes_};
        Work& w = *arena.take<Work>(1);
        lay_out(arena, w);
        return w;
    }

    int64_t first_row(int64_t at, int64_t g) const { return (at * a_.Hkv + g) * rows_; }
    std::atomic<int64_t>* passed(int64_t at, int64_t g) const { return passed_ + (at * a_.Hkv + g) * chunks_; }

    bool fill(int64_t at, int64_t g, int64_t t, Tile& tile) const { return bands_.fill(a_.sequences[at], g, t, tile); }
    // Keys first, first + step, ... of a sequence.
    int64_t keys_of_class(const Sequence& s, int64_t first) const {
        return (upper(s.k_count - first, 0) + bands_.step() - 1) / bands_.step();
    }
    // Chunks are numbered class by class.
    Chunk chunk_at(int64_t at, int64_t g, int64_t number) const {
        Chunk c{};
        c.sequence = a_.sequences + at;
        c.at = at, c.kv_head = g, c.number = number;
        const int64_t first = number / per_class_, from = number % per_class_ * chunk_;
        c.sieve = {first, bands_.step(), from, lower(from + chunk_, keys_of_class(*c.sequence, first))};
        return c;
    }
    int64_t row_of(int64_t at, const Tile& tile, int r) const {
        return first_row(at, tile.kv_head) + (tile.rows.head[r] - tile.kv_head * group_) * longest_ +
               tile.rows.index[r];
    }
    template <class X>
    static X* element(X* base, const int64_t* stride, int64_t b, int64_t h, int64_t i) {
        return base + b * stride[0] + h * stride[1] + i * stride[2];
    }

    // The chunks that the tile may see keys of.
    void find_visits(Work& w, Visits& visits) const {
        const Rows& rows = w.tile.rows;
        Sieve left = {bands_.first_key(w.tile), bands_.step(), 0, 0};
        left.to = keys_of_class(*w.tile.sequence, left.first);
        const int64_t before = left.first * per_class_;
        if (program_.empty()) return visits.add(0, (left.to + chunk_ - 1) / chunk_);
        for (int64_t end; left.from < left.to; left.from = end) {
            program_.bounds(rows, left, w.scratch, w.bounds);
            const Ranges& seen = w.bounds.seen;
            end = lower(seen.end, left.to);
            for (int i = 0; i < seen.count && seen.first[i] < end; ++i)
                visits.add(before + seen.first[i] / chunk_, before + (lower(seen.last[i], end) - 1) / chunk_ + 1);
        }
    }

    // Per tile: delta (d_lse is kept apart: added to a large delta it would be lost), the rows' states, the keys it may
    // see, and dQ set to zero.
    void prepare(int64_t i, int worker) {
        const int64_t t = i % tiles_, g = i / tiles_ % a_.Hkv, at = i / tiles_ / a_.Hkv;
        Work& w = work(worker);
        Visits& visits = visits_[i];
        visits.count = 0;
        if (!fill(at, g, t, w.tile)) return;
        find_visits(w, visits);
        const Rows& rows = w.tile.rows;
        const Sequence& sequence = *w.tile.sequence;
        w.n = round_up(rows.count, kRowUnit);
        w.bad_rows = 0;
        pack(w.tile, a_.out, a_.out_stride, a_.Dv, Dv_, w, w.q_lanes, w.do_rows);
        pack(w.tile, b_.d_out, b_.d_out_stride, a_.Dv, Dv_, w, w.do_lanes, w.do_rows);
        for (int64_t z = 0; z < w.n; z += W)
            P::dot(steps(a_.Dv), w.q_lanes + z, w.do_lanes + z, w.n).store(w.delta + z);
        const E* state = static_cast<const E*>(a_.state);
        for (int r = 0; r < rows.count; ++r) {
            const int64_t row = row_of(at, w.tile, r), q = sequence.q_first + rows.index[r];
            const int64_t place =
                rows.batch * a_.lse_stride[0] + rows.head[r] * a_.lse_stride[1] + q * a_.lse_stride[2];
            E delta = w.delta[r];
            if (w.bad_rows >> r & 1) {
                const T* o = element(static_cast<const T*>(a_.out), a_.out_stride, rows.batch, rows.head[r], q);
                delta = dot(o, a_.out_stride[3],
                            element(static_cast<const T*>(b_.d_out), b_.d_out_stride, rows.batch, rows.head[r], q),
                            b_.d_out_stride[3]);
            }
            delta_[row] = delta;
            rise_[row] = b_.d_lse != nullptr ? static_cast<const E*>(b_.d_lse)[place] : E(0);
            w.m[r] = -static_cast<E>(INFINITY), w.inverse[r] = 0;  // here l, until it is turned over
            if (state != nullptr) w.m[r] = state[place], w.inverse[r] = state[place + a_.state_step];
            std::memset(d_q_ + row * D_, 0, sizeof(E) * static_cast<size_t>(D_));
        }
        if (state == nullptr || (!a_.part && sequence.q_count * group_ <= kDotRows)) find_states(at, g, visits, w);
        for (int r = 0; r < rows.count; ++r) {
            const int64_t row = row_of(at, w.tile, r);
            // A row that sees nothing gets weights of 0, whatever its scores.
            const bool dead = RowState<E>{w.m[r], {w.inverse[r]}}.empty();
            max_[row] = dead ? kLargest<E> : w.m[r];
            inverse_[row] = dead ? E(0) : E(1) / w.inverse[r];
        }
    }

    // The states of a tile's rows: (m, l) in w.m and w.inverse.
    void find_states(int64_t at, int64_t g, const Visits& visits, Work& w) {
        const Rows& rows = w.tile.rows;
        RowStates<E, kTileRows> states;
        states.clear();
        w.bad_rows = 0;
        pack(w.tile, a_.q, a_.q_stride, a_.D, D_, w, w.q_lanes, w.q_rows);
        for (int i = 0; i < visits.count; ++i)
            for (int64_t number = visits.first[i]; number < visits.last[i]; ++number) {
                Chunk c = chunk_at(at, g, number);
                load_keys(c, w);
                w.walk.begin(program_, rows, w.scratch, c.sieve, !program_.empty());
                while (w.walk.next(w.scratch, w.block)) absorb(c, w, w.block, states);
            }
        for (int r = 0; r < rows.count; ++r) {
            E score = 0;
            const bool has_sink = sink_of(a_, rows.head[r], score);
            const Closing<E> end = states.row(r).close(job_, has_sink, score);
            w.m[r] = end.m, w.inverse[r] = end.l;
        }
    }
    void absorb(const Chunk& c, Work& w, Block& block, RowStates<E, kTileRows>& states) {
        locate(c, w, block);
        for (int g = 0; g < block.granules; ++g) {
            w.parts[g].row0 = 0, w.parts[g].row1 = w.n;
            if (!w.parts[g].straight) gather(c, w, g);
            absorb_granule(c, w, block, g, states);
        }
    }
    void absorb_granule(const Chunk& c, Work& w, Block& block, int g, RowStates<E, kTileRows>& states) {
        products(c, w, block, g);
        const uint64_t* words = block.words + g * kGranule;
        const int live = block.live[g];
        // What is not finite was taken as zeros.
        for (int j = 0; j < live && (c.any_bad || w.bad_rows != 0); ++j)
            for (int r = 0; r < w.tile.rows.count; ++r)
                if (const int64_t key = w.places[g * kGranule + j]; w.bad_keys[key] || w.bad_rows >> r & 1)
                    w.s[j * w.n + r] = product_of(c, w, key, r);
        const Score<M> score(job_);
        const V factor = V::set1(static_cast<E>(job_.factor));
        for (int64_t z = 0; z < w.n; z += W) {
            V s[kGranule], slope, top = V::set1(-static_cast<E>(INFINITY)), sum = V::zero();
            for (int j = 0; j < kGranule; ++j) {
                const V product = V::load(w.s + j * w.n + z);
                s[j] = job_.transform ? score.template held<true>(product, w.bias + j * w.n + z, slope)
                                      : score.template held<false>(product, nullptr, slope);
                s[j] = shown(j < live ? words[j] >> z : 0u, s[j]);
                top = maximum(top, s[j]);
            }
            RowState<V> rows = states.template rows<V>(z);
            const Shift<V> shift = rows.template raise<M::kDegree>(top, factor);
            for (int j = 0; j < kGranule; ++j) sum = sum + weight<M::kDegree>(s[j], shift.from, factor);
            rows.absorb(shift.keep, shift.by, {sum});
            states.set_rows(z, rows);
        }
    }
    // One product of a query and a key where they lie.
    E product_of(const Chunk& c, const Work& w, int64_t key, int r) const {
        const Rows& rows = w.tile.rows;
        const T* q = element(static_cast<const T*>(a_.q), a_.q_stride, rows.batch, rows.head[r],
                             w.tile.sequence->q_first + rows.index[r]);
        const T* k = static_cast<const T*>(c.sequence->k) + c.kv_head * a_.k_stride[0] + c.key(key) * a_.k_stride[1];
        E s = 0;
        for (int64_t d = 0; d < a_.D; ++d) s += widen(q[d * a_.q_stride[3]]) * widen(k[d * a_.k_stride[2]]);
        return s;
    }

    // out . d_out. Where out is 0 a dead row's gradient, whatever it holds, counts as nothing.
    E dot(const T* o, int64_t o_stride, const T* g, int64_t g_stride) const {
        E total = 0;
        int64_t d = 0;
        // The same order of additions whatever the strides: so are the bits.
        V acc = V::zero();
        for (; d + W <= a_.Dv; d += W) {
            if (o_stride == 1 && g_stride == 1) {
                acc = fma(V::load(o + d), V::load(g + d), acc);
                continue;
            }
            E x[W], y[W];
            for (int i = 0; i < W; ++i) x[i] = widen(o[(d + i) * o_stride]), y[i] = widen(g[(d + i) * g_stride]);
            acc = fma(V::load(x), V::load(y), acc);
        }
        total = sum(acc);
        for (; d < a_.Dv; ++d) total += widen(o[d * o_stride]) * widen(g[d * g_stride]);
        if (finite(total)) return total;
        total = 0;
        for (d = 0; d < a_.Dv; ++d) {
            const E x = widen(o[d * o_stride]);
            if (x != 0) total += x * widen(g[d * g_stride]);
        }
        return total;
    }
    // Copies a row widened, or for pairs as it is, and pads it with zeros; false if something in it is not finite.
    template <class To>
    static bool copy_row(const T* from, int64_t stride, int64_t D, int64_t padded, To* to) {
        bool clean = true;
        int64_t d = 0;
        if constexpr (std::is_same_v<To, T> && kPair == 2) {
            if (stride == 1 && D > 0) {
                std::memcpy(static_cast<void*>(to), from, sizeof(T) * static_cast<size_t>(D));
                uint32_t worst = 0;
                for (int64_t x = 0; x < D; ++x) worst |= static_cast<uint32_t>((from[x].bits & 0x7f80u) == 0x7f80u);
                clean = worst == 0;
            } else {
                for (; d < D; ++d) {
                    to[d] = from[d * stride];
                    clean &= finite(widen(to[d]));
                }
            }
        } else {
            if (stride == 1) {
                V nothing = V::zero();
                for (; d + W <= D; d += W) {
                    const V x = V::load(from + d);
                    nothing = fma(x, V::zero(), nothing);
                    x.store(to + d);
                }
                clean = sum(nothing) == 0;
            }
            for (; d < D; ++d) {
                to[d] = widen(from[d * stride]);
                clean &= finite(to[d]);
            }
        }
        for (d = D; d < padded; ++d) to[d] = To{};
        return clean;
    }

    void task(int64_t i, int worker) {
        const int64_t batches = one_task_for_batch_ ? 1 : a_.sequence_count, heads = one_task_for_heads_ ? 1 : a_.Hkv;
        const int64_t number = i / (batches * heads), rest = i % (batches * heads);
        Work& w = work(worker);
        // The first chunks first: under a causal mask they are the longest.
        for (int64_t at = rest / heads; at < (one_task_for_batch_ ? a_.sequence_count : rest / heads + 1); ++at)
            for (int64_t g = rest % heads; g < (one_task_for_heads_ ? a_.Hkv : rest % heads + 1); ++g)
                chunk(at, g, number, w);
    }

    void chunk(int64_t at, int64_t g, int64_t number, Work& w) {
        Chunk c = chunk_at(at, g, number);
        if (c.count() <= 0) return;
        load_keys(c, w);
        std::memset(w.d_k, 0, sizeof(E) * static_cast<size_t>(c.padded() * D_));
        std::memset(w.d_v, 0, sizeof(E) * static_cast<size_t>(c.padded() * Dv_));
        std::atomic<int64_t>* done = passed(at, g);
        const int64_t some = bands_.some();
        int64_t behind = number / per_class_ * per_class_;
        for (int64_t x = next_tile(c, 0), then; x < some; x = then) {
            then = next_tile(c, x + 1);
            done[number].store(x, std::memory_order_release);
            w.asked = 0, w.ahead.rows.count = 0;
            if (then < some) fill(at, g, bands_.tile(*c.sequence, c.sieve.first, then), w.ahead);
            if (!fill(at, g, bands_.tile(*c.sequence, c.sieve.first, x), w.tile) || !tile(c, w)) continue;
            for (int64_t before = behind; before < number; ++before) {
                for (int spin = 0; done[before].load(std::memory_order_acquire) <= x; ++spin)
                    if (spin > 1000) std::this_thread::yield();
                if (before == behind && done[before].load(std::memory_order_acquire) >= some) ++behind;
            }
            for (int r = 0; r < w.tile.rows.count; ++r) {
                E* to = d_q_ + w.row[r] * D_;
                const E* from = w.d_q + r * D_;
                for (int64_t d = 0; d < D_; d += W) (V::load(to + d) + V::load(from + d)).store(to + d);
            }
        }
        done[number].store(some, std::memory_order_release);
        const int64_t batch = c.sequence->batch;
        for (int64_t j = 0; j < c.count(); ++j) {
            if (b_.d_k != nullptr)
                write(w.d_k + j * D_, static_cast<E>(a_.scale), a_.D, b_.d_k, b_.d_k_stride, batch, g, c.key(j));
            if (b_.d_v != nullptr) write(w.d_v + j * Dv_, E(1), a_.Dv, b_.d_v, b_.d_v_stride, batch, g, c.key(j));
        }
    }
    // The next tile, by its number among the chunk's, that may see keys of the chunk.
    int64_t next_tile(const Chunk& c, int64_t x) const {
        const Visits* all = visits_ + (c.at * a_.Hkv + c.kv_head) * tiles_;
        const int64_t some = bands_.some();
        while (x < some && !all[bands_.tile(*c.sequence, c.sieve.first, x)].has(c.number)) ++x;
        return x;
    }
    // Asks for the rows of the next tile before they are needed: some at a granule.
    QKV_INLINE void ask(const Chunk& c, Work& w) const {
        const Rows& rows = w.ahead.rows;
        const auto all_of = [](const auto* from, int64_t count) {
            const uintptr_t at = reinterpret_cast<uintptr_t>(from);
            for (uintptr_t x = 0; x < sizeof(*from) * static_cast<uintptr_t>(count); x += kLine) prefetch(at + x);
        };
        for (int stop = static_cast<int>(lower(rows.count, w.asked + kAskRows)); w.asked < stop; ++w.asked) {
            const int r = w.asked;
            const int64_t i = c.sequence->q_first + rows.index[r];
            all_of(element(static_cast<const T*>(a_.q), a_.q_stride, rows.batch, rows.head[r], i), a_.D);
            all_of(element(static_cast<const T*>(b_.d_out), b_.d_out_stride, rows.batch, rows.head[r], i), a_.Dv);
            all_of(d_q_ + row_of(c.at, w.ahead, r) * D_, D_);
        }
    }

    // Of a part of the keys in the type of sums: what all parts come to is rounded once, and does not overflow before.
    void write(const E* from, E scale, int64_t D, void* to, const int64_t* stride, int64_t b, int64_t h,
               int64_t i) const {
        if (a_.part)
            write_as(from, scale, D, element(static_cast<E*>(to), stride, b, h, i), stride[3]);
        else
            write_as(from, scale, D, element(static_cast<T*>(to), stride, b, h, i), stride[3]);
    }
    template <class To>
    static void write_as(const E* from, E scale, int64_t D, To* to, int64_t stride) {
        int64_t d = 0;
        if (stride == 1)
            for (; d + W <= D; d += W) fma(V::load(from + d), V::set1(scale), V::zero()).store(to + d);
        for (; d < D; ++d) narrow(from[d] * scale + E(0), to[d * stride]);
    }

    // The chunk's keys and values as the products want them.
    void load_keys(Chunk& c, Work& w) {
        const int64_t k_step = a_.k_stride[1] * c.sieve.step, v_step = a_.v_stride[1] * c.sieve.step;
        const T* k = static_cast<const T*>(c.sequence->k) + c.kv_head * a_.k_stride[0] + c.key(0) * a_.k_stride[1];
        const T* v = static_cast<const T*>(c.sequence->v) + c.kv_head * a_.v_stride[0] + c.key(0) * a_.v_stride[1];
        const int64_t keys = c.count(), padded = c.padded();
        const int64_t k_width = even(D_), v_width = even(Dv_);
        for (int64_t j = 0; j < padded; ++j) {
            bool clean = true;
            if (j < keys) {
                clean &= copy_row(k + j * k_step, a_.k_stride[2], a_.D, k_width, w.k_copy + j * k_width);
                clean &= copy_row(v + j * v_step, a_.v_stride[2], a_.Dv, v_width, w.v_copy + j * v_width);
            }
            if (j >= keys || !clean) {
                std::memset(static_cast<void*>(w.k_copy + j * k_width), 0,
                            sizeof(Single) * static_cast<size_t>(k_width));
                std::memset(static_cast<void*>(w.v_copy + j * v_width), 0,
                            sizeof(Single) * static_cast<size_t>(v_width));
            }
            w.bad_keys[j] = !clean;
            c.any_bad |= w.bad_keys[j] != 0;
        }
        c.k = w.k_copy, c.k_stride = k_width, c.v = w.v_copy, c.v_stride = v_width;
        if constexpr (kPair == 2) {
            for (int64_t j = 0; j < padded; j += 2)
                interleave(w.k_copy + j * k_width, w.k_copy + (j + 1) * k_width, D_, w.k_lanes + j / 2 * D_);
            c.k_lanes = w.k_lanes, c.k_lanes_stride = D_;
        } else {
            c.k_lanes = w.k_copy, c.k_lanes_stride = k_width;
        }
    }

    // to[d]: low half from x, high half from y. D is a multiple of 16.
    static QKV_INLINE void interleave(const Single* x, const Single* y, int64_t D, Lane* to) {
        using H = typename M::Pairs;
        for (int64_t d = 0; d < D; d += W) H::store(H::zip(H::load_half(x + d), H::load_half(y + d)), to + d);
    }

    // Queries or output gradients of a tile, as rows and transposed.
    void pack(const Tile& tile, const void* base, const int64_t* stride, int64_t D, int64_t padded, Work& w,
              Lane* lanes, Lane* rows) {
        const int64_t u = steps(D), width = padded, n = w.n;
        Single* flat = kPair == 2 ? reinterpret_cast<Single*>(w.flat) : reinterpret_cast<Single*>(rows);
        for (int r = 0; r < n; ++r) {
            Single* to = flat + r * width;
            const bool there = r < tile.rows.count;
            bool clean = true;
            if (there) {
                const T* from = element(static_cast<const T*>(base), stride, tile.rows.batch, tile.rows.head[r],
                                        tile.sequence->q_first + tile.rows.index[r]);
                clean = copy_row(from, stride[3], D, width, to);
                if (!clean) w.bad_rows |= UINT64_C(1) << r;
            }
            if (!there || !clean) std::memset(static_cast<void*>(to), 0, sizeof(Single) * static_cast<size_t>(width));
        }
        if constexpr (kPair == 2)
            for (int r = 0; r < n; r += 2)
                interleave(flat + r * width, flat + (r + 1) * width, padded, rows + r / 2 * padded);
        // width is a multiple of kPair here: columns() rounds to whole vectors.
        const Lane* from = reinterpret_cast<const Lane*>(flat);
        const int64_t from_stride = width / kPair;
        int64_t d = 0;
        if constexpr (sizeof(Lane) == 4) {
            if (n % kTransposeTile == 0)
                for (; d + kTransposeTile <= u; d += kTransposeTile)
                    for (int r = 0; r < n; r += kTransposeTile)
                        transpose_tile(reinterpret_cast<const uint32_t*>(from) + r * from_stride + d, from_stride,
                                       reinterpret_cast<uint32_t*>(lanes) + d * n + r, n);
        }
        for (; d < u; ++d)
            for (int r = 0; r < n; ++r) std::memcpy(lanes + d * n + r, from + r * from_stride + d, sizeof(Lane));
    }

    // One tile of queries against the chunk: adds to its dK and dV, and leaves the tile's share of dQ in w.d_q. False:
    // it sees nothing there.
    bool tile(const Chunk& c, Work& w) {
        const Rows& rows = w.tile.rows;
        w.walk.begin(program_, rows, w.scratch, c.sieve, !program_.empty());
        if (!w.walk.next(w.scratch, w.block)) return false;
        w.n = round_up(rows.count, kRowUnit);
        w.bad_rows = 0;
        pack(w.tile, a_.q, a_.q_stride, a_.D, D_, w, w.q_lanes, w.q_rows);
        pack(w.tile, b_.d_out, b_.d_out_stride, a_.Dv, Dv_, w, w.do_lanes, w.do_rows);
        for (int r = 0; r < w.n; ++r) {
            const bool there = r < rows.count;
            w.row[r] = there ? row_of(c.at, w.tile, r) : 0;
            w.m[r] = there ? max_[w.row[r]] : kLargest<E>;
            w.inverse[r] = there ? inverse_[w.row[r]] : E(0);
            w.delta[r] = there ? delta_[w.row[r]] : E(0);
            w.rise[r] = there ? rise_[w.row[r]] : E(0);
            w.draws[r] = there && a_.dropout_below > 0 ? draw_row(a_, rows, r) : 0;
        }
        std::memset(w.d_q, 0, sizeof(E) * static_cast<size_t>(w.n * D_));
        do step(c, w, w.block);
        while (w.walk.next(w.scratch, w.block));
        return true;
    }

    // Where in the chunk the keys of a block lie.
    void locate(const Chunk& c, Work& w, const Block& block) const {
        for (int g = 0; g < block.granules; ++g) {
            Part& part = w.parts[g];
            int64_t* at = w.places + g * kGranule;
            for (int i = 0; i < kGranule; ++i) at[i] = c.place(block.at(g, i));
            const int last = block.live[g] - 1;
            part.first = at[0];
            part.straight = at[last] - at[0] == last && at[0] % kPair == 0 && at[0] + kGranule <= c.padded();
        }
    }
    // The rows that see any key of a granule, in whole vectors.
    void find_rows(const Work& w, const Block& block, int g, Part& part) const {
        uint64_t any = 0, all = ~UINT64_C(0);
        for (int j = g * kGranule; j < (g + 1) * kGranule; ++j) any |= block.words[j], all &= block.words[j];
        part.masked = all != all_rows(w.tile.rows);
        part.row0 = any == 0 ? 0 : std::countr_zero(any) / kRowUnit * kRowUnit;
        part.row1 = any == 0 ? 0 : round_up(64 - std::countl_zero(any), kRowUnit);
    }
    // Copies the keys of a granule that lie apart.
    void gather(const Chunk& c, Work& w, int g) const {
        const int64_t from = g * kGranule;
        for (int64_t i = from; i < from + kGranule; ++i) {
            std::memcpy(static_cast<void*>(w.k_some + i * c.k_stride), c.k + w.places[i] * c.k_stride,
                        sizeof(Single) * static_cast<size_t>(c.k_stride));
            std::memcpy(static_cast<void*>(w.v_some + i * c.v_stride), c.v + w.places[i] * c.v_stride,
                        sizeof(Single) * static_cast<size_t>(c.v_stride));
        }
        if constexpr (kPair == 2)
            for (int64_t i = from; i < from + kGranule; i += 2)
                interleave(w.k_some + i * c.k_stride, w.k_some + (i + 1) * c.k_stride, D_, w.k_some_lanes + i / 2 * D_);
    }
    const Single* k_rows(const Chunk& c, const Work& w, int g) const {
        return w.parts[g].straight ? c.k + w.parts[g].first * c.k_stride : w.k_some + g * kGranule * c.k_stride;
    }
    const Single* v_rows(const Chunk& c, const Work& w, int g) const {
        return w.parts[g].straight ? c.v + w.parts[g].first * c.v_stride : w.v_some + g * kGranule * c.v_stride;
    }

    void step(const Chunk& c, Work& w, Block& block) {
        uint64_t visible[kStepKeys];
        locate(c, w, block);
        const bool careful = c.any_bad || w.bad_rows != 0;
        // Pairs of a query and a key that are not both finite are taken one by one; the products see zeros there.
        const auto bad = [&](int j) {
            return j % kGranule < block.live[j / kGranule] && w.bad_keys[w.places[j]] ? ~UINT64_C(0) : w.bad_rows;
        };
        for (int j = 0; j < block.keys() && careful; ++j) {
            visible[j] = block.words[j] & bad(j);
            block.words[j] &= ~bad(j);
        }
        for (int g = 0; g < block.granules; ++g) {
            Part& part = w.parts[g];
            find_rows(w, block, g, part);
            if (part.row0 == part.row1) continue;
            if (!part.straight) gather(c, w, g);
            scores(c, w, block, g);
            ask(c, w);
        }
        for (int g = 0, end; g < block.granules; g = end) {
            for (end = g + 1; end < block.granules && follows(w.parts[end - 1], w.parts[end]);) ++end;
            if (w.parts[g].row0 < w.parts[g].row1) accumulate(c, w, block, g, end);
        }
        for (int j = 0; j < block.keys() && careful; ++j)
            for (uint64_t left = visible[j]; left != 0; left &= left - 1)
                one(c, w, w.places[j], std::countr_zero(left));
    }
    // Whether the sums of a granule may be taken together with those of the one before.
    static bool follows(const Part& x, const Part& y) {
        if (x.straight != y.straight || (x.straight && y.first != x.first + kGranule)) return false;
        return x.row0 == y.row0 && x.row1 == y.row1;
    }

    // A granule's products q . k, and its biases.
    void products(const Chunk& c, Work& w, Block& block, int g) {
        const int64_t n = w.n, row = w.parts[g].row0;
        P::scores({.rows = kGranule,
                   .vectors = (w.parts[g].row1 - row) / W,
                   .count = steps(a_.D),
                   .a = k_rows(c, w, g),
                   .a_row = c.k_stride,
                   .a_step = kPair,
                   .b = w.q_lanes + row,
                   .b_step = n,
                   .c = w.s + row,
                   .c_row = n});
        if (a_.bias_count == 0) return;
        std::memset(w.bias, 0, sizeof(E) * static_cast<size_t>(kGranule * n));
        for (int r = 0; r < w.tile.rows.count; ++r) {
            gather_bias<E>(a_, w.tile, r, block, g, w.bias + r, n);
            hide_by_bias<E>(block, r, g * kGranule, kGranule, w.bias + r, n);
        }
    }

    // A granule's scores and gradients of scores: w.p, w.dx (and pairs), and the gradients of biases.
    void scores(const Chunk& c, Work& w, Block& block, int g) {
        const int64_t n = w.n, row = w.parts[g].row0;
        products(c, w, block, g);
        P::run({.rows = kGranule,
                .vectors = (w.parts[g].row1 - row) / W,
                .count = steps(a_.Dv),
                .a = v_rows(c, w, g),
                .a_row = c.v_stride,
                .a_step = kPair,
                .b = w.do_lanes + row,
                .b_step = n,
                .c = w.dp + row,
                .c_row = n},
               false);
        const bool masked = w.parts[g].masked;
        if (a_.dropout_below > 0)
            job_.transform ? element_wise<true, true, true>(w, block, g) : element_wise<false, true, true>(w, block, g);
        else if (job_.transform)
            element_wise<true, true, false>(w, block, g);
        else
            masked ? element_wise<false, true, false>(w, block, g) : element_wise<false, false, false>(w, block, g);
        if (wanted_) add_bias(c, w, block, g);
    }

    // The weights, and the gradients of scores, of some rows and all keys of a granule.
    template <bool Transform, bool Masked, bool Dropped>
    struct Slopes {
        const Attention& a;
        const Score<M> score;
        const V factor, grown;
        explicit Slopes(const Attention& call, const Job& job)
            : a(call),
              score(job),
              factor(V::set1(static_cast<E>(job.factor))),
              grown(V::set1(static_cast<E>(call.dropout_scale))) {}

        V m, inverse, delta, rise;  // of rows [z, z + W)
        QKV_INLINE void begin(const Work& w, int64_t z) {
            m = V::load(w.m + z), inverse = V::load(w.inverse + z);
            delta = V::load(w.delta + z), rise = V::load(w.rise + z);
        }

        // Of these rows and key j of the granule g.
        QKV_INLINE void of(Work& w, const Block& block, int g, int j, int64_t z, V& p, V& dx) const {
            const int64_t n = w.n;
            const V zero = V::zero();
            const uint64_t bits = block.words[g * kGranule + j] >> z;
            V slope = V::set1(1), dp = V::load(w.dp + j * n + z);
            const V x = score.template held<Transform>(V::load(w.s + j * n + z), w.bias + j * n + z, slope);
            p = weight<M::kDegree>(x, m, factor) * inverse;
            if constexpr (Dropped) {
                uint32_t kept = 0;
                for (int r = 0; r < W; r += kDrawLanes)
                    kept |= keep_bits(w.draws + z + r, draw_index(block.at(g, j)), a.dropout_below) << r;
                dp = choose(kept, dp * grown, zero);
                dx = p * (dp - delta + rise);
                p = choose(kept, p * grown, zero);
            } else {
                dx = p * (dp - delta + rise);
            }
            if constexpr (Masked) {
                p = choose(static_cast<uint32_t>(bits), p, zero);
                dx = choose(static_cast<uint32_t>(bits), dx, zero);
            }
            if constexpr (Transform) {
                dx.store(w.ds + j * n + z);
                // A hidden score may have overflowed: its slope is nothing to multiply by.
                dx = choose(Masked ? static_cast<uint32_t>(bits) : ~0u, dx * slope, zero);
            }
        }
    };

    template <bool Transform, bool Masked, bool Dropped>
    void element_wise(Work& w, const Block& block, int g) {
        const int64_t n = w.n;
        Slopes<Transform, Masked, Dropped> slopes(a_, job_);
        for (int64_t z = w.parts[g].row0; z < w.parts[g].row1; z += W) {
            slopes.begin(w, z);
            for (int j = 0; j < kGranule; j += kPair) {
                const int64_t at = (g * kGranule + j) * n + z;
                V p, dx;
                slopes.of(w, block, g, j, z, p, dx);
                if constexpr (kPair == 2) {
                    using H = typename M::Pairs;
                    V p2, dx2;
                    slopes.of(w, block, g, j + 1, z, p2, dx2);
                    H::store(H::narrow(p), w.p + at);
                    H::store(H::narrow(p2), w.p + at + n);
                    const auto x = H::narrow(dx), y = H::narrow(dx2);
                    H::store(x, w.dx + at);
                    H::store(y, w.dx + at + n);
                    H::store(H::zip(x, y), w.dx_lanes + (g * kGranule + j) / 2 * n + z);
                } else {
                    p.store(w.p + at);
                    dx.store(w.dx + at);
                }
            }
        }
    }

    // dV += P dO, dK += dX Q, dQ += dX^T K for the granules [g, end), which follow each other.
    void accumulate(const Chunk& c, Work& w, const Block& block, int g, int end) {
        const Part& part = w.parts[g];
        const int64_t n = w.n, from = g * kGranule, keys = (end - g) * kGranule;
        const int64_t row = part.row0, rows = part.row1 - row;
        // Sums of gathered keys are made apart, and each is added where its key lies.
        const auto to_keys = [&](const Single* a, const Lane* b, int64_t width, E* to) {
            P::run({.rows = keys,
                    .vectors = width / W,
                    .count = rows / kPair,
                    .a = a + from * n + row,
                    .a_row = n,
                    .a_step = kPair,
                    .b = b + row / kPair * width,
                    .b_step = width,
                    .c = part.straight ? to + part.first * width : w.d_some,
                    .c_row = width},
                   part.straight);
            if (!part.straight) scatter(w, block, g, end, width, to);
        };
        if (b_.d_v != nullptr) to_keys(w.p, w.do_rows, Dv_, w.d_v);
        if (b_.d_k != nullptr) to_keys(w.dx, w.q_rows, D_, w.d_k);
        if (b_.d_q == nullptr) return;
        const Lane* gathered = kPair == 2 ? w.k_some_lanes : reinterpret_cast<const Lane*>(w.k_some);
        typename P::Factors f = {.rows = rows,
                                 .vectors = D_ / W,
                                 .count = keys / kPair,
                                 .a = w.dx + from * n + row,
                                 .a_row = 1,
                                 .a_step = n,
                                 .b = (part.straight ? c.k_lanes + part.first / kPair * c.k_lanes_stride
                                                     : gathered + from / kPair * c.k_lanes_stride),
                                 .b_step = c.k_lanes_stride,
                                 .c = w.d_q + row * D_,
                                 .c_row = D_};
        if constexpr (kPair == 2)
            f.a = reinterpret_cast<const Single*>(w.dx_lanes + from / 2 * n + row), f.a_row = 2, f.a_step = 2 * n;
        P::run(f, true);
    }
    // Adds the sums of the keys of the granules [g, end) to their own.
    void scatter(const Work& w, const Block& block, int g, int end, int64_t width, E* to) const {
        const E* from = w.d_some;
        for (; g < end; ++g, from += kGranule * width)
            for (int i = 0; i < block.live[g]; ++i) {
                E* own = to + w.places[g * kGranule + i] * width;
                for (int64_t d = 0; d < width; d += W)
                    (V::load(own + d) + V::load(from + i * width + d)).store(own + d);
            }
    }

    // One pair of a query and a key of which something is not finite, by the definition. Infinities count as zeros in
    // the last products: their own row is NaN already.
    void one(const Chunk& c, Work& w, int64_t key, int r) {
        const Rows& rows = w.tile.rows;
        const int64_t j = c.key(key), row = w.tile.sequence->q_first + rows.index[r];
        const T* q = element(static_cast<const T*>(a_.q), a_.q_stride, rows.batch, rows.head[r], row);
        const T* g = element(static_cast<const T*>(b_.d_out), b_.d_out_stride, rows.batch, rows.head[r], row);
        const T* k = static_cast<const T*>(c.sequence->k) + c.kv_head * a_.k_stride[0] + j * a_.k_stride[1];
        const T* v = static_cast<const T*>(c.sequence->v) + c.kv_head * a_.v_stride[0] + j * a_.v_stride[1];
        E dp = 0, add = 0;
        for (int64_t d = 0; d < a_.Dv; ++d) dp += widen(g[d * b_.d_out_stride[3]]) * widen(v[d * a_.v_stride[2]]);
        if (a_.bias_count > 0) gather_bias<E>(a_, w.tile, r, j, 1, &add, 1);
        if (add == -static_cast<E>(INFINITY)) return;
        const OneScore<E> of = one_score<E>(job_, product_of(c, w, key, r), add);
        if (of.score == -static_cast<E>(INFINITY)) return;
        E p = std::exp2((of.score - w.m[r]) * static_cast<E>(job_.factor)) * w.inverse[r], kept = 1;
        if (a_.dropout_below > 0)
            kept = draw_mix(w.draws[r] + draw_index(j)) >> 11 >= a_.dropout_below ? static_cast<E>(a_.dropout_scale)
                                                                                  : E(0);
        const E ds = p * ((kept > 0 ? dp * kept : E(0)) - w.delta[r] + w.rise[r]), dx = ds * of.slope;
        p *= kept;
        if (wanted_) bias_.add(place_of(c), rows, r, j, ds);
        const auto tame = [](E x) { return finite(x) ? x : E(0); };
        for (int64_t d = 0; d < a_.Dv; ++d) w.d_v[key * Dv_ + d] += p * widen(g[d * b_.d_out_stride[3]]);
        for (int64_t d = 0; d < a_.D; ++d) {
            w.d_k[key * D_ + d] += dx * tame(widen(q[d * a_.q_stride[3]]));
            w.d_q[r * D_ + d] += dx * tame(widen(k[d * a_.k_stride[2]]));
        }
    }

    static ChunkPlace place_of(const Chunk& c) { return {c.at, c.kv_head, c.number}; }
    void add_bias(const Chunk& c, Work& w, const Block& block, int g) {
        for (int r = 0; r < w.tile.rows.count; ++r)
            for (int j = 0; j < block.live[g]; ++j)
                if (block.words[g * kGranule + j] >> r & 1)
                    bias_.add(place_of(c), w.tile.rows, r, block.at(g, j), w.ds[j * w.n + r]);
    }

    void sink(int64_t h, int) {
        E score = 0;
        sink_of(a_, h, score);
        double total = 0;
        const int64_t g = h / group_;
        const bool absent = score == -static_cast<E>(INFINITY);  // its share is 0, but 0 times NaN is still NaN
        for (int64_t at = 0; at < a_.sequence_count; ++at)
            for (int64_t i = 0; i < a_.sequences[at].q_count; ++i) {
                const int64_t row = first_row(at, g) + (h - g * group_) * longest_ + i;
                const double share = absent ? 0
                                            : std::exp(static_cast<double>(score) - static_cast<double>(max_[row])) *
                                                  static_cast<double>(inverse_[row]);
                total -= share * (static_cast<double>(delta_[row]) - static_cast<double>(rise_[row]));
            }
        b_.d_sinks[h] = total;
    }

    void write_d_q(int64_t i, int worker) {
        const int64_t t = i % tiles_, g = i / tiles_ % a_.Hkv, at = i / tiles_ / a_.Hkv;
        Work& w = work(worker);
        if (!fill(at, g, t, w.tile)) return;
        for (int r = 0; r < w.tile.rows.count; ++r)
            write(d_q_ + row_of(at, w.tile, r) * D_, static_cast<E>(a_.scale), a_.D, b_.d_q, b_.d_q_stride,
                  w.tile.rows.batch, w.tile.rows.head[r], w.tile.sequence->q_first + w.tile.rows.index[r]);
    }

    const Backward& b_;
    const Attention& a_;
    Job job_;
    const Program& program_;
    int64_t group_, D_ = 0, Dv_ = 0, chunk_ = 0, per_class_ = 0, chunks_ = 0, longest_ = 0, tiles_ = 0, rows_ = 0;
    bool wanted_ = false, one_task_for_batch_ = false, one_task_for_heads_ = false;
    int threads_ = 1;
    E *delta_ = nullptr, *rise_ = nullptr, *max_ = nullptr, *inverse_ = nullptr, *d_q_ = nullptr;
    Visits* visits_ = nullptr;
    std::atomic<int64_t>* passed_ = nullptr;
    BiasSums<E> bias_;
    Bands<W, kRowUnit, kTileRows> bands_;
    char* workers_ = nullptr;
    int64_t worker_bytes_ = 0;
};

}  // namespace QKV_ISA
}  // namespace qkv
