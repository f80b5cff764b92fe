// What the weights of a call come to: a second pass over its scores, when the rows' states are known.
//
// Scores come out as in the forward kernel for many rows, bit for bit, and so do weights: a row's sum to 1 at any
// magnitude. Rows that the kernel for few rows took get states of their own first, as for gradients.
//
// A unit is the rows of one query head, or of a group of heads that have few. Its tiles are dealt to stripes in turn,
// so that a causal mask gives each the same to do. A stripe adds what columns receive to sums of its own, the first to
// the results themselves, and the others are added to those in order: how many there are depends on sizes alone, never
// on the number of threads, and so do the bits of a result. Units whose sums would take more than kMostBytes wait for
// others.
#pragma once
#include "kernel/lanes.h"
#include "kernel/schedule.h"
#include "kernel/tally.h"
#include "kernel/tasks.h"
#include "runtime/arena.h"

namespace qkv {
namespace QKV_ISA {

template <class M>
class Observer {
  public:
    explicit Observer(const Observation& observation)
        : o_(observation), a_(of_keys(observation.call)), job_(a_), schedule_{a_, job_, false} {}

    Status go() {
        double pairs = 0;
        for (int64_t i = 0; i < a_.sequence_count; ++i) {
            const Sequence& s = a_.sequences[i];
            most_units_ += schedule_.cut(s).by_head ? a_.Hq : a_.Hkv;
            pairs += static_cast<double>(s.q_count) * static_cast<double>(s.k_count * a_.Hq * a_.D);
        }
        threads_ = worker_limit(2 * pairs < kSerialFlops ? 1 : a_.threads);
        Measure worker, all;
        memory_of(worker);
        worker_bytes_ = worker.used;
        lay_out(all);
        // The units are needed before the size of their sums is known.
        char* memory = static_cast<char*>(scratch_memory(static_cast<size_t>(all.used)));
        if (memory == nullptr) return Status::no_memory;
        Arena arena{memory};
        lay_out(arena);
        fill();
        Measure whole;
        lay_out(whole);
        memory = static_cast<char*>(scratch_memory(static_cast<size_t>(whole.used)));
        if (memory == nullptr) return Status::no_memory;
        Arena again{memory};
        lay_out(again);
        fill();
        for (begin_ = 0; begin_ < count_; begin_ = end_) {
            int64_t tasks = 0;
            for (end_ = begin_; end_ < count_ && units_[end_].wave == units_[begin_].wave; ++end_)
                tasks += units_[end_].stripes;
            for_each_task<&Observer::stripe>(this, threads_, tasks);
            for_each_task<&Observer::merge>(this, threads_, end_ - begin_);
        }
        release_large_scratch();
        return Status::ok;
    }

  private:
    using L = Lanes<M>;
    using E = typename M::E;
    using V = typename M::V;
    using Marks = Tally<V, L::kTileRows>;
    static constexpr int W = V::W;
    static constexpr int64_t kMostStripes = 8;
    static constexpr int64_t kMostBytes = INT64_C(16) << 20;

    struct Unit {
        Cut cut;
        int64_t sequence, kv_head, head, heads;  // heads from `head` on
        int64_t first_tile, tiles, stripes;
        int64_t first_task;  // of its wave
        int64_t sums;        // offset of the sums of its second stripe
        int64_t wave;
    };
    struct Memory {
        typename L::Work* work;
        typename L::State* state;
        Marks* marks;
    };

    // The call without values: there are none, and they would lie where the first one does.
    static Attention of_keys(const Attention& call) {
        Attention a = call;
        a.Dv = 0;
        a.v_stride[0] = a.v_stride[1] = a.v_page = 0;
        a.v_stride[2] = 1;
        a.dropout_below = 0;
        a.observed = nullptr;
        return a;
    }

    // ------------------------------------------------------------------------------------------------------- memory
    template <class From>
    void lay_out(From& memory) {
        units_ = memory.template take<Unit>(most_units_);
        workers_ = memory.template take<char>(worker_bytes_ * threads_);
        sums_ = memory.template take<double>(most_sums_);
    }
    template <class From>
    Memory memory_of(From& memory) const {
        Memory m{memory.template take<typename L::Work>(1), memory.template take<typename L::State>(1),
                 memory.template take<Marks>(1)};
        if constexpr (std::is_same_v<From, Measure>) {
            typename L::Work work;
            typename L::State state;
            Marks marks;
            L::lay_out(a_, memory, work), L::lay_out(a_, memory, state), marks.lay_out(memory, o_.top);
        } else {
            L::lay_out(a_, memory, *m.work), L::lay_out(a_, memory, *m.state), m.marks->lay_out(memory, o_.top);
        }
        return m;
    }

    // The units, and the waves in which they run.
    void fill() {
        int64_t wave = 0, used = 0, tasks = 0;
        count_ = 0;
        for (int64_t i = 0; i < a_.sequence_count; ++i) {
            Unit u{};
            u.cut = schedule_.cut(a_.sequences[i]);
            u.sequence = i;
            u.heads = u.cut.by_head ? 1 : job_.group;
            u.tiles = u.cut.by_head ? u.cut.tiles / job_.group : u.cut.tiles;
            if (u.tiles == 0) continue;
            const int64_t sums = sums_of(u), bytes = upper(sums, 1) * static_cast<int64_t>(sizeof(double));
            u.stripes = clamp(1 + kMostBytes / bytes, 1, lower(kMostStripes, u.tiles));
            for (u.head = 0; u.head < a_.Hq; u.head += u.heads) {
                u.kv_head = u.head / job_.group;
                u.first_tile = u.cut.by_head ? u.head % job_.group * u.tiles : 0;
                const int64_t more = (u.stripes - 1) * sums;
                if (tasks > 0 && (used + more) * static_cast<int64_t>(sizeof(double)) > kMostBytes)
                    ++wave, used = tasks = 0;
                u.first_task = tasks, u.sums = used, u.wave = wave;
                tasks += u.stripes, used += more;
                most_sums_ = upper(most_sums_, used);
                units_[count_++] = u;
            }
        }
    }

    // Numbers that one stripe of a unit adds up.
    int64_t sums_of(const Unit& u) const {
        const int64_t columns = o_.mass != nullptr ? a_.sequences[u.sequence].k_count : 0;
        return u.heads * (columns + (o_.map != nullptr ? o_.rows * o_.columns : 0));
    }

    // Where a stripe's sums of a head are: of its columns and, one row after another, of its map.
    struct Sums {
        double *mass, *map;
        int64_t map_row;
    };
    Sums sums_at(const Unit& u, int64_t of_stripe, int64_t head) const {
        const Sequence& s = a_.sequences[u.sequence];
        if (of_stripe == 0) {
            double* mass =
                o_.mass == nullptr ? nullptr : o_.mass + s.batch * o_.mass_stride[0] + head * o_.mass_stride[1];
            double* map = o_.map == nullptr ? nullptr : o_.map + s.batch * o_.map_stride[0] + head * o_.map_stride[1];
            return {mass, map, o_.map_stride[2]};
        }
        const int64_t columns = o_.mass != nullptr ? s.k_count : 0;
        double* mine = sums_ + u.sums + (of_stripe - 1) * sums_of(u) + (head - u.head) * (sums_of(u) / u.heads);
        return {mine, mine + columns, o_.columns};
    }

    // -------------------------------------------------------------------------------------------------------- tasks
    void stripe(int64_t task, int worker) {
        int64_t lo = begin_, hi = end_;
        while (hi - lo > 1) {
            const int64_t mid = (lo + hi) / 2;
            (units_[mid].first_task <= task ? lo : hi) = mid;
        }
        const Unit& u = units_[lo];
        const int64_t number = task - u.first_task;
        if (number > 0)
            std::memset(sums_ + u.sums + (number - 1) * sums_of(u), 0,
                        sizeof(double) * static_cast<size_t>(sums_of(u)));
        Arena arena{workers_ + worker * worker_bytes_};
        const Memory m = memory_of(arena);
        m.work->converted.clear();
        for (int64_t t = number; t < u.tiles; t += u.stripes) {
            schedule_.rows_of(a_.sequences[u.sequence], u.cut, u.kv_head, u.first_tile + t, m.state->tile);
            L::load(job_, *m.state, *m.work);
            switch (m.state->vectors) {
                case 1: tile<1>(u, number, m); break;
                case 2: tile<2>(u, number, m); break;
                default: tile<3>(u, number, m);
            }
        }
    }

    // Adds the sums of a unit's stripes to those of the first.
    void merge(int64_t i, int) {
        const Unit& u = units_[begin_ + i];
        const int64_t columns = o_.mass != nullptr ? a_.sequences[u.sequence].k_count : 0;
        for (int64_t n = 1; n < u.stripes; ++n)
            for (int64_t h = u.head; h < u.head + u.heads; ++h) {
                const Sums to = sums_at(u, 0, h), from = sums_at(u, n, h);
                for (int64_t j = 0; j < columns; ++j) to.mass[j] += from.mass[j];
                for (int64_t r = 0; r < o_.rows && o_.map != nullptr; ++r)
                    for (int64_t c = 0; c < o_.columns; ++c)
                        to.map[r * to.map_row + c] += from.map[r * from.map_row + c];
            }
    }

    template <int Z>
    void tile(const Unit& u, int64_t number, const Memory& m) const {
        typename L::State& state = *m.state;
        typename L::Work& work = *m.work;
        Marks& marks = *m.marks;
        const Tile& rows = state.tile;
        const int64_t keys = rows.sequence->k_count, columns = o_.map != nullptr ? lower(o_.columns, keys) : 0;
        marks.begin(rows.rows.count);
        for (int r = 0; r < rows.rows.count; ++r) {
            const Sums to = sums_at(u, number, rows.rows.head[r]);
            const int64_t bins = lower(o_.rows, rows.sequence->q_count);
            marks.mass[r] = to.mass;
            marks.map_row[r] = to.map + rows.rows.index[r] * bins / rows.sequence->q_count * to.map_row;
        }
        if (a_.state == nullptr || u.cut.dots)
            find_states<Z>(state, work, marks);
        else
            load_states(rows, marks);
        marks.turn_over(rows.rows.count);
        each_block(state, work, [&] {
            V top[Z];
            L::template only_scores<Z>(job_, state, work, top);
            for (int g = 0; g < work.block.granules; ++g) {
                const int64_t key = work.block.key[g];
                const int there = static_cast<int>(lower(kGranule, keys - key));
                E* p = work.scores + g * kGranule * Z * W;
                if (o_.top > 0) marks.template rank<Z>(p, key);
                marks.template weigh<Z, M::kDegree>(p, static_cast<E>(job_.factor));
                if (o_.distance != nullptr) marks.template add_distance<Z>(p, key, rows.rows);
                if (columns > 0) marks.template add_map<Z>(p, key, there, columns, keys, rows.rows.count);
                if (o_.mass != nullptr) marks.template add_mass<Z>(p, key, there, rows.rows);
            }
        });
        if (columns > 0) marks.close_bin(rows.rows.count);
        write(rows, marks);
    }

    template <class Visit>
    void each_block(typename L::State& state, typename L::Work& work, Visit visit) const {
        state.walk.begin(job_.program, state.tile.rows, work.scratch, 0, state.tile.sequence->k_count);
        while (state.walk.next(work.scratch, work.block)) visit();
    }

    // The states of a tile's rows: (m, l) in marks.m and marks.inverse.
    void load_states(const Tile& tile, Marks& marks) const {
        for (int r = 0; r < tile.rows.count; ++r) {
            const E* state = static_cast<const E*>(a_.state) + place(tile, r);
            marks.m[r] = state[0], marks.inverse[r] = state[a_.state_step];
        }
    }
    // The same, found anew.
    template <int Z>
    void find_states(typename L::State& state, typename L::Work& work, Marks& marks) const {
        const V factor = V::set1(static_cast<E>(job_.factor));
        RowStates<E, L::kTileRows> found;
        found.clear();
        each_block(state, work, [&] {
            V top[Z];
            L::template only_scores<Z>(job_, state, work, top);
            QKV_FOR(z, Z) {
                RowState<V> rows = found.template rows<V>(z * W);
                const Shift<V> shift = rows.template raise<6>(top[z], factor);
                V sum = V::zero();
                for (int j = 0; j < work.block.keys(); ++j)
                    sum = sum + weight<M::kDegree>(V::load(work.scores + (j * Z + z) * W), shift.from, factor);
                rows.absorb(shift.keep, shift.by, {sum});
                found.set_rows(z * W, rows);
            }
        });
        for (int r = 0; r < state.tile.rows.count; ++r) {
            E sink = 0;
            const bool has_sink = sink_of(a_, state.tile.rows.head[r], sink);
            const Closing<E> end = found.row(r).close(job_, has_sink, sink);
            marks.m[r] = end.m, marks.inverse[r] = end.l;
        }
    }

    // Where a row's numbers lie, in elements of lse.
    int64_t place(const Tile& tile, int r) const {
        const Rows& rows = tile.rows;
        return rows.batch * a_.lse_stride[0] + rows.head[r] * a_.lse_stride[1] +
               (tile.sequence->q_first + rows.index[r]) * a_.lse_stride[2];
    }

    void write(const Tile& tile, Marks& marks) const {
        for (int r = 0; r < tile.rows.count; ++r) {
            const int64_t at = place(tile, r);
            if (o_.distance != nullptr) static_cast<E*>(o_.distance)[at] = marks.distance(r);
            if (o_.top > 0)
                marks.write_top(r, o_.top, static_cast<E>(job_.factor), o_.top_keys + at * o_.top,
                                static_cast<E*>(o_.top_weights) + at * o_.top);
        }
    }

    const Observation& o_;
    const Attention a_;
    const Job job_;
    const Schedule<L> schedule_;
    int64_t most_units_ = 0, most_sums_ = 0, worker_bytes_ = 0;
    int threads_ = 1;
    Unit* units_ = nullptr;
    int64_t count_ = 0, begin_ = 0, end_ = 0;  // all units, and those of the wave that runs
    char* workers_ = nullptr;
    double* sums_ = nullptr;
};

}  // namespace QKV_ISA
}  // namespace qkv
