// One instruction set's kernels, and the tasks of a call. Compiled once per instruction set, in that set's namespace.
#include "kernel/bias_sums.h"
#include "kernel/cascade.h"
#include "kernel/dots.h"
#include "kernel/kernels.h"
#include "kernel/lanes.h"
#include "kernel/schedule.h"
#include "kernel/tasks.h"
#include "runtime/arena.h"

namespace qkv {
QKV_DECLARE_KERNELS(QKV_ISA)
namespace QKV_ISA {
namespace {

template <class L, class D>
class Run {
  public:
    explicit Run(const Attention& call) : a(call), job(call) {}

    Status go() {
        // The cuts are needed before the sizes are known: first they live at the front of a request of their own.
        schedule.cuts =
            static_cast<Cut*>(scratch_memory(static_cast<size_t>(Arena::up(a.sequence_count * sizeof(Cut)))));
        if (schedule.cuts == nullptr) return Status::no_memory;
        schedule.fill();
        count_candidates();
        threads = worker_limit(schedule.flops() < kSerialFlops ? 1 : a.threads);
        worker_bytes = measure_worker();
        Measure measure;
        lay_out(measure);
        char* memory = static_cast<char*>(scratch_memory(static_cast<size_t>(measure.used)));
        if (memory == nullptr) return Status::no_memory;
        Arena arena{memory};
        lay_out(arena);
        schedule.fill();
        if (candidates > 0) share();
        for (int64_t i = 0; i < a.sequence_count; ++i) {
            const Cut& c = schedule.cuts[i];
            for (int64_t g = 0; c.merged() && g < a.Hkv; ++g)
                remaining[c.first_counter + g] = static_cast<int32_t>(c.chunks);
        }
        if (schedule.packs > 0) for_each_task<&Run::pack>(this, threads, schedule.packs);
        for_each_task<&Run::task>(this, threads, schedule.tasks);
        release_large_scratch();
        return Status::ok;
    }

  private:
    using T = typename L::T;
    using E = typename L::E;
    using V = typename L::V;
    using Lane = typename L::Lane;

    // What the search for chunks in common works with.
    struct Search {
        Candidate* candidates;
        int32_t* table;
        uint64_t* taken;  // by sequence: the chunks that are in a share
        Tile* tile;
        Scratch* scratch;
        Bounds* bounds;
    };

    // ------------------------------------------------------------------------------------------------------- memory
    template <class From>
    void lay_out(From& memory) {
        schedule.cuts = memory.template take<Cut>(a.sequence_count);
        workers = memory.template take<char>(worker_bytes * threads);
        partial_out = memory.template take<E>(schedule.partial_rows * a.Dv);
        partial_states = memory.template take<RowState<E, 2>>(schedule.partial_rows);
        remaining = memory.template take<int32_t>(schedule.counters);
        pairs = memory.template take<Lane>(schedule.pair_words);
        if (candidates == 0) return;
        search.candidates = memory.template take<Candidate>(candidates);
        search.table = memory.template take<int32_t>(slots());
        cascade.shares = memory.template take<Share>(candidates * most_chunks);
        cascade.members = memory.template take<int64_t>(candidates * most_chunks);
        search.taken = memory.template take<uint64_t>(a.sequence_count);
        search.tile = memory.template take<Tile>(1);
        search.scratch = memory.template take<Scratch>(1);
        search.bounds = memory.template take<Bounds>(1);
    }
    int64_t slots() const { return candidates * 2 + 1; }

    // A worker's memory holds one of these at a time.
    struct LanesMemory {
        typename L::Work* work;
        typename L::State* states[kMostStates];
    };
    struct DotsMemory {
        typename D::Work* work;
        Tile* tile;
    };
    struct MergeMemory {
        E* total;
        Tile* tile;
    };
    // A State or Work of the kernel K, and its arrays.
    template <class K, class P, class From>
    P* laid_out(From& memory) const {
        P* at = memory.template take<P>(1);
        if constexpr (std::is_same_v<From, Measure>) {
            P unused;
            K::lay_out(a, memory, unused);
        } else {
            K::lay_out(a, memory, *at);
        }
        return at;
    }
    template <class From>
    LanesMemory lanes_memory(From& memory, int64_t states) const {
        LanesMemory m{laid_out<L, typename L::Work>(memory), {}};
        for (int64_t t = 0; t < states; ++t) m.states[t] = laid_out<L, typename L::State>(memory);
        return m;
    }
    template <class From>
    DotsMemory dots_memory(From& memory) const {
        typename D::Work* work = laid_out<D, typename D::Work>(memory);
        return {work, memory.template take<Tile>(1)};
    }
    template <class From>
    MergeMemory merge_memory(From& memory) const {
        return {memory.template take<E>(a.Dv + V::W), memory.template take<Tile>(1)};
    }
    int64_t measure_worker() const {
        Measure lanes, dots, merging;
        if (schedule.any_lanes) lanes_memory(lanes, schedule.states);
        if (schedule.any_dots) dots_memory(dots);
        merge_memory(merging);
        return upper(upper(lanes.used, dots.used), merging.used);
    }
    Arena arena_of(int worker) const { return Arena{workers + worker * worker_bytes}; }

    // ------------------------------------------------------------------------------------------- chunks in common
    // Chunks in common need a page table, and results that are merged.
    bool may_share(int64_t i) const {
        const Cut& c = schedule.cuts[i];
        return a.sequences[i].pages != nullptr && c.dots && c.rows > 0 && c.chunks > 1 && c.chunks <= kMostChunks;
    }

    void count_candidates() {
        for (int64_t i = 0; i < a.sequence_count; ++i)
            if (may_share(i)) ++candidates, most_chunks = upper(most_chunks, schedule.cuts[i].chunks);
        if (candidates < 2 || !Cascade::possible(a)) candidates = 0;
    }

    void share() {
        int64_t n = 0;
        for (int64_t i = 0; i < a.sequence_count; ++i) {
            search.taken[i] = 0;
            if (!may_share(i)) continue;
            const Sequence& s = a.sequences[i];
            Candidate& x = search.candidates[n++];
            x.sequence = i, x.chunk = schedule.cuts[i].chunk, x.chunks = schedule.cuts[i].chunks;
            Bounds& bounds = *search.bounds;
            bounds.full.clear();
            if (job.program.empty()) {
                bounds.full.set(0, s.k_count);
            } else {
                schedule.rows_of(s, schedule.cuts[i], 0, 0, *search.tile);
                job.program.bounds(search.tile->rows, keys_between(0, s.k_count), *search.scratch, bounds);
            }
            x.set_full(bounds.full);
        }
        cascade.find(a, search.candidates, n, search.table, slots(), search.taken);
        if (cascade.count == 0) return;
        schedule.tasks = cascade.count * a.Hkv;
        for (int64_t i = 0; i < a.sequence_count; ++i) {
            Cut& c = schedule.cuts[i];
            c.shared = search.taken[i];
            c.first_task = schedule.tasks;
            schedule.tasks += c.tasks(a.Hkv);
        }
    }

    // -------------------------------------------------------------------------------------------------------- tasks
    // Interleaves the values of some keys of a head, for all tiles.
    void pack(int64_t i, int) {
        const int64_t at = schedule.find(i, &Cut::first_pack);
        const Sequence& s = a.sequences[at];
        const Cut& c = schedule.cuts[at];
        const int64_t per_head = c.packs / a.Hkv, head = (i - c.first_pack) / per_head;
        const int64_t j = (i - c.first_pack) % per_head * kPackKeys, padded = round_up(s.k_count, kGranule);
        Lane* to = pairs + c.pairs + (head * padded / 2 + j / 2) * a.Dv;
        L::interleave(values_of<T>(a, s, head), s.k_count, j, lower(kPackKeys, padded - j), a.Dv, to);
    }

    void task(int64_t i, int worker) {
        if (i < cascade.count * a.Hkv) {
            shared_chunk(cascade.shares[i / a.Hkv], i % a.Hkv, worker);
            return;
        }
        const int64_t at = schedule.find(i, &Cut::first_task);
        const Sequence& s = a.sequences[at];
        const Cut& c = schedule.cuts[at];
        const int64_t local = i - c.first_task;
        if (!c.split) {
            all_keys(s, c, local, worker);
            return;
        }
        const int64_t kv_head = local % a.Hkv, chunk = c.chunk_of(local / a.Hkv);
        if (c.dots)
            dots_chunk(s, c, kv_head, chunk, worker);
        else
            lanes_chunk(s, c, kv_head, chunk, worker);
        if (c.chunks > 1) count_down(s, c, kv_head, worker);
    }

    // Some tiles of a head against all keys. One head after another: its keys and values stay in the cache until its
    // tiles are done. The last tiles first: under a causal mask they are the longest.
    void all_keys(const Sequence& s, const Cut& c, int64_t task, int worker) {
        const int64_t kv_head = task / c.bundles(), bundle = c.bundles() - 1 - task % c.bundles();
        const int64_t first = bundle * c.together, count = lower(c.together, c.tiles - first);
        Arena arena = arena_of(worker);
        const LanesMemory memory = lanes_memory(arena, count);
        auto& work = *memory.work;
        work.converted.clear();
        if (c.pairs >= 0) work.pairs = pairs + c.pairs + kv_head * (round_up(s.k_count, kGranule) / 2) * a.Dv;
        int64_t some = 0;
        for (int64_t t = 0; t < count; ++t) {
            typename L::State& state = *memory.states[some];
            schedule.rows_of(s, c, kv_head, c.by_index(first + t, job.group), state.tile);
            if (state.tile.rows.count == 0) continue;
            L::load(job, state, work);
            ++some;
        }
        if (some == 0) return;
        L::run(job, memory.states, some, work, 0, s.k_count, false);
        for (int64_t t = 0; t < some; ++t) {
            typename L::State& state = *memory.states[t];
            if (L::spoiled(a, state)) {
                L::reset(state, a);
                L::run(job, memory.states + t, 1, work, 0, s.k_count, true);
            }
            L::finish(job, state, work);
        }
    }

    // All rows of a key/value head against one chunk of keys, by the kernel for many rows.
    void lanes_chunk(const Sequence& s, const Cut& c, int64_t kv_head, int64_t chunk, int worker) {
        Arena arena = arena_of(worker);
        const LanesMemory memory = lanes_memory(arena, c.tiles);
        auto& work = *memory.work;
        const int64_t k0 = chunk * c.chunk, k1 = lower(s.k_count, k0 + c.chunk);
        work.converted.clear();
        for (int64_t t = 0; t < c.tiles; ++t) {
            schedule.rows_of(s, c, kv_head, t, memory.states[t]->tile);
            L::load(job, *memory.states[t], work);
        }
        const auto sweep = [&](int64_t from, int64_t to, bool careful) {
            for (int64_t j = k0; j < k1; j += kWindowKeys) {
                const int64_t end = lower(k1, j + kWindowKeys);
                if (L::Elements::kPair == 2 && c.tiles > 1 && !is_scaled(a)) {
                    const Source<T> values = values_of<T>(a, s, kv_head);
                    L::interleave(values, s.k_count, j, round_up(end - j, kGranule), a.Dv, work.values);
                    work.pairs = work.values;
                    work.pairs_first = j;
                }
                L::run(job, memory.states + from, to - from, work, j, end, careful);
            }
        };
        sweep(0, c.tiles, false);
        for (int64_t t = 0; t < c.tiles; ++t) {
            typename L::State& state = *memory.states[t];
            if (L::spoiled(a, state)) {
                L::reset(state, a);
                sweep(t, t + 1, true);
            }
            if (c.chunks == 1) {
                L::finish(job, state, work);
                continue;
            }
            const int64_t width = L::unload(a, state, work);
            for (int r = 0; r < state.tile.rows.count; ++r)
                keep(partial(c, kv_head, chunk, t * c.tile_rows + r), work.rows + r * width, state.softmax.row(r));
        }
    }

    // The same by the kernel for few rows.
    void dots_chunk(const Sequence& s, const Cut& c, int64_t kv_head, int64_t chunk, int worker) {
        Arena arena = arena_of(worker);
        auto& work = *dots_memory(arena).work;
        schedule.rows_of(s, c, kv_head, 0, work.tile);
        const int64_t k0 = chunk * c.chunk, k1 = lower(s.k_count, k0 + c.chunk), width = D::padded(a.Dv);
        if (!D::begin(job.program, work, k0, k1) && c.chunks > 1) {  // merging asks for nothing but the empty states
            for (int r = 0; r < work.tile.rows.count; ++r)
                partial_states[partial(c, kv_head, chunk, r)] = RowState<E, 2>::none();
            return;
        }
        D::load(job, work, work.tile, 0);
        D::reset(a, work);
        D::run(job, work, false);
        if (D::spoiled(a, work)) {
            D::reset(a, work);
            D::begin(job.program, work, k0, k1);
            D::run(job, work, true);
        }
        D::settle(a, work);
        if (c.chunks == 1) {
            D::finish(job, work);
            return;
        }
        for (int r = 0; r < work.tile.rows.count; ++r)
            keep(partial(c, kv_head, chunk, r), work.out + r * width, work.softmax.row(r));
    }

    // A chunk that several sequences have in common, a tile of as many of them as fit at a time.
    void shared_chunk(const Share& share, int64_t kv_head, int worker) {
        const int64_t width = D::padded(a.Dv);
        const Program everything(nullptr, 0, nullptr, a.Hq);
        for (int64_t done = 0, n; done < share.members; done += n) {
            Arena arena = arena_of(worker);
            const DotsMemory memory = dots_memory(arena);
            auto& work = *memory.work;
            const int64_t* members = cascade.members + share.first_member + done;
            const int64_t k0 = share.chunk * schedule.cuts[*members].chunk, k1 = k0 + schedule.cuts[*members].chunk;
            int rows = 0;
            for (n = 0; done + n < share.members && rows + schedule.cuts[members[n]].rows <= D::kTileRows; ++n) {
                schedule.rows_of(a.sequences[members[n]], schedule.cuts[members[n]], kv_head, 0, *memory.tile);
                D::load(job, work, *memory.tile, rows);
                if (n == 0) work.tile = *memory.tile;
                rows += memory.tile->rows.count;
            }
            // All rows see all keys of the chunk: nothing of the tile but its keys is looked at.
            work.tile.rows.count = rows;
            work.tile.rows.key_count = k1;
            D::reset(a, work);
            D::begin(everything, work, k0, k1);
            D::run(job, work, false);
            D::settle(a, work);
            for (int64_t i = 0, r = 0; i < n; ++i) {
                const Cut& c = schedule.cuts[members[i]];
                for (int64_t row = 0; row < c.rows; ++row, ++r)
                    keep(partial(c, kv_head, share.chunk, row), work.out + r * width,
                         work.softmax.row(static_cast<int>(r)));
            }
            for (int64_t i = 0; i < n; ++i)
                count_down(a.sequences[members[i]], schedule.cuts[members[i]], kv_head, worker);
        }
    }

    // -------------------------------------------------------------------------------------------------- their results
    int64_t partial(const Cut& c, int64_t kv_head, int64_t chunk, int64_t row) const {
        return c.first_row + (kv_head * c.chunks + chunk) * c.rows + row;
    }
    void keep(int64_t at, const E* o, const RowState<E, 2>& state) {
        partial_states[at] = state;
        std::memcpy(partial_out + at * a.Dv, o, sizeof(E) * static_cast<size_t>(a.Dv));
    }

    // A chunk of a key/value head is done: the last one's worker merges them.
    void count_down(const Sequence& s, const Cut& c, int64_t kv_head, int worker) {
        if (last_of(remaining + c.first_counter + kv_head)) merge(s, c, kv_head, worker);
    }

    // Adds up the chunks of all rows of a key/value head, in order.
    void merge(const Sequence& s, const Cut& c, int64_t kv_head, int worker) {
        Arena arena = arena_of(worker);
        const MergeMemory memory = merge_memory(arena);
        E* total = memory.total;
        Tile& tile = *memory.tile;
        for (int64_t t = 0; t < c.tiles; ++t) {
            schedule.rows_of(s, c, kv_head, t, tile);
            for (int r = 0; r < tile.rows.count; ++r) {
                const int64_t row = t * c.tile_rows + r;
                RowState<E, 2> state = RowState<E, 2>::none();
                for (int64_t x = 0; x < c.chunks; ++x) state.cover(partial_states[partial(c, kv_head, x, row)]);
                bool first = true;
                for (int64_t x = 0; x < c.chunks; ++x) {
                    const int64_t from = partial(c, kv_head, x, row);
                    if (partial_states[from].empty()) continue;
                    const E w = state.merge(partial_states[from], static_cast<E>(job.factor));
                    const E* o = partial_out + from * a.Dv;
                    for (int64_t d = 0; d < a.Dv; ++d) total[d] = first ? w * o[d] : total[d] + w * o[d];
                    first = false;
                }
                if (first) std::memset(total, 0, sizeof(E) * static_cast<size_t>(a.Dv));
                write_row<T, E, V>(job, tile, r, total, state);
            }
        }
    }

    const Attention& a;
    Job job;
    Schedule<L> schedule{a, job, true};
    Search search{};
    Cascade cascade;
    int64_t candidates = 0, most_chunks = 0;  // sequences that may share chunks
    int threads = 1;
    int64_t worker_bytes = 0;
    char* workers = nullptr;
    E* partial_out = nullptr;
    RowState<E, 2>* partial_states = nullptr;
    int32_t* remaining = nullptr;  // chunks of each sequence and key/value head
    Lane* pairs = nullptr;
};

template <class T>
Status run(const Attention& call) {
    using Many = Lanes<Elements<T>>;
    if constexpr (!std::is_same_v<T, double>) {
        if (is_scaled(call))
            return call.kv_type == Type::i8 ? Run<Many, Dots<FewElements<T, int8_t>>>(call).go()
                                            : Run<Many, Dots<FewElements<T, f8>>>(call).go();
    }
    return Run<Many, Dots<FewElements<T>>>(call).go();
}

}  // namespace

Limits limits() { return {Lanes<Plain<float>>::kTileRows, kGranule, kMaxTerms, kPairs}; }

Status run(const Attention& call) {
    switch (call.q_type) {
        case Type::f32: return run<float>(call);
        case Type::bf16: return run<bf16>(call);
        case Type::f16: return run<f16>(call);
        case Type::f64: return run<double>(call);
        default: return Status::unsupported;
    }
}

}  // namespace QKV_ISA
}  // namespace qkv
