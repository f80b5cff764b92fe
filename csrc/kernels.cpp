// One instruction set's kernels and their schedule. Compiled once per instruction set, in that set's namespace.
//
// A sequence's rows (all query heads of a key/value head) are cut into tiles. Many rows: one task a tile, over all keys.
// Few rows: one task a chunk of keys, over all rows; the chunks' results are merged in order. What is cut how depends on the
// sequence alone, never on its neighbours in the batch or the number of threads, and so do the bits of the result.
#include "arena.h"
#include "cascade.h"
#include "dots.h"
#include "lanes.h"
#include "pool.h"

namespace qkv {
namespace QKV_ISA {
namespace {

constexpr int64_t kShortTiles = 4;     // up to here, keys are cut into chunks
constexpr double kSerialFlops = 2e5;   // below, waking a thread costs more than it saves

// How one sequence is cut.
struct Cut {
    bool dots, split;
    bool by_head;          // tiles hold rows of one head
    int64_t rows;          // of all heads of a group
    int64_t tile_rows, tiles;
    int64_t chunk, chunks;
    int64_t first_task;    // of the call
    int64_t first_row;     // of the partial results
    int64_t first_counter;
    int64_t first_pack, packs;  // of the packing tasks
    int64_t pairs;              // offset of interleaved values, or -1
    uint64_t shared;            // chunks that are computed together with other sequences'
    int64_t tasks(int64_t kv_heads) const { return rows == 0 ? 0 : kv_heads * (split ? chunks - __builtin_popcountll(shared) : tiles); }
    // The chunk of one's own tasks.
    int64_t chunk_of(int64_t n) const {
        int64_t c = 0;
        for (uint64_t bits = shared; bits != 0; bits >>= 1, ++c)
            if (!(bits & 1) && n-- == 0) return c;
        return c + n;
    }
};

constexpr int64_t kPackKeys = 256;

template <class L, class D>
struct Run {
    using T = typename L::T;
    using E = typename L::E;
    using V = typename L::V;

    const Attention& a;
    Job job;
    Cut* cuts = nullptr;
    int64_t tasks = 0, packs = 0, partial_rows = 0, counters = 0, pair_words = 0;
    int64_t worker_bytes = 0;
    char* workers = nullptr;
    E* partial_out = nullptr;
    E* partial_m = nullptr;
    E* partial_l = nullptr;
    int32_t* remaining = nullptr;
    typename L::U* pairs = nullptr;
    int64_t states = 1;
    bool any_dots = false, any_lanes = false;
    Cascade cascade;

    explicit Run(const Attention& call) : a(call), job(call) {}

    Cut cut(const Sequence& s) const {
        Cut c{};
        c.rows = s.q_count * job.group;
        c.pairs = -1;
        c.dots = c.rows <= kDotRows;
        if (c.dots) {
            c.tile_rows = c.rows;
            c.tiles = c.rows > 0;
            c.split = true;
        } else {
            c.by_head = s.q_count >= L::kTileRows;
            const int64_t span = c.by_head ? s.q_count : c.rows;
            const int64_t n = (span + L::kTileRows - 1) / L::kTileRows;
            c.tile_rows = ((span + n - 1) / n + L::W - 1) / L::W * L::W;
            c.tiles = (span + c.tile_rows - 1) / c.tile_rows * (c.by_head ? job.group : 1);
            c.split = !c.by_head && c.tiles <= kShortTiles;
        }
        c.chunk = c.split ? (a.Dv > 256 && !c.dots ? 1024 : 512) : s.k_count;
        if (c.split && s.k_count > c.chunk * 64) c.chunk = (s.k_count / 64 + kGranule - 1) / kGranule * kGranule;
        c.chunks = c.split && s.k_count > 0 ? (s.k_count + c.chunk - 1) / c.chunk : 1;
        return c;
    }

    static int64_t up(int64_t bytes) { return Arena::up(bytes); }

    int64_t lanes_bytes() const {
        const int64_t n = L::kTileRows, u = L::units(a.D);
        int64_t bytes = up(sizeof(typename L::Work)) + 2 * up(kWindowKeys * n * sizeof(E));
        bytes += up(kWindowKeys * u * L::Products::kPair * sizeof(typename L::K)) + up(kWindowKeys * a.Dv * sizeof(typename L::U));
        bytes += up(n * L::row_width(a) * sizeof(E));
        bytes += 2 * up(kWindowKeys * sizeof(E)) + up(kGranule * a.Dv * sizeof(T));
        return bytes + states * (up(sizeof(typename L::State)) + up(u * n * sizeof(typename L::Q)) + up(a.Dv * n * sizeof(E)));
    }
    int64_t dots_bytes() const {
        const int64_t n = D::kTileRows, d = D::padded(a.D), dv = D::padded(a.Dv);
        return up(sizeof(typename D::Work)) + up(n * d * sizeof(typename D::Q)) + up(n * dv * sizeof(E)) + up(n * kWindowKeys * sizeof(E)) +
               3 * up(kWindowKeys * sizeof(E)) + up(n * kWindowKeys / 2 * 4) + up(kWindowKeys * d * sizeof(T)) + up(kWindowKeys * dv * sizeof(T));
    }

    Status go() {
        int64_t flops_keys = 0;
        const int64_t table = up(a.sequence_count * sizeof(Cut));
        // The table of cuts is needed before the sizes are known: it lives at the front of a first request.
        cuts = static_cast<Cut*>(scratch_memory(table));
        if (cuts == nullptr) return Status::no_memory;
        layout();
        int64_t candidates = 0, most = 0;
        for (int64_t i = 0; i < a.sequence_count; ++i) {
            flops_keys += cuts[i].rows * a.Hkv * a.sequences[i].k_count;
            if (may_share(i)) ++candidates, most = upper(most, cuts[i].chunks);
        }
        if (candidates < 2 || !Cascade::possible(a)) candidates = 0;
        const int64_t slots = candidates * 2 + 1;
        const int threads = worker_limit(4.0 * static_cast<double>(flops_keys) * static_cast<double>(a.D + a.Dv) / 2 < kSerialFlops ? 1 : a.threads);
        worker_bytes = up(upper(any_lanes ? lanes_bytes() : 0, any_dots ? dots_bytes() : 0)) + 2 * up(sizeof(Tile)) + up((a.Dv + V::W) * sizeof(E));
        const int64_t bytes = table + worker_bytes * threads + up(partial_rows * a.Dv * sizeof(E)) + 2 * up(partial_rows * sizeof(E)) +
                              up(counters * 4) + up(pair_words * sizeof(typename L::U)) +
                              (candidates > 0 ? up(candidates * sizeof(Candidate)) + up(slots * 4) + up(candidates * most * sizeof(Share)) + up(candidates * most * 8) +
                                                    up(a.sequence_count * 8) + up(sizeof(Tile)) + up(sizeof(Scratch)) + up(sizeof(Bounds))
                                              : 0);
        char* memory = static_cast<char*>(scratch_memory(static_cast<size_t>(bytes)));
        if (memory == nullptr) return Status::no_memory;
        Arena arena{memory};
        cuts = arena.take<Cut>(a.sequence_count);
        layout();
        workers = arena.take<char>(worker_bytes * threads);
        partial_out = arena.take<E>(partial_rows * a.Dv);
        partial_m = arena.take<E>(partial_rows);
        partial_l = arena.take<E>(partial_rows);
        remaining = arena.take<int32_t>(counters);
        pairs = arena.take<typename L::U>(pair_words);
        if (candidates > 0) share(arena, candidates, most, slots);
        for (int64_t i = 0; i < a.sequence_count; ++i)
            for (int64_t g = 0; cuts[i].split && cuts[i].chunks > 1 && g < a.Hkv; ++g) remaining[cuts[i].first_counter + g] = static_cast<int32_t>(cuts[i].chunks);
        if (packs > 0)
            parallel_for(threads, packs, [](void* self, int64_t i, int) { static_cast<Run*>(self)->pack(i); }, this);
        parallel_for(threads, tasks, [](void* self, int64_t i, int worker) { static_cast<Run*>(self)->task(i, worker); }, this);
        release_large_scratch();
        return Status::ok;
    }

    // Chunks in common need a page table, and results that are merged.
    bool may_share(int64_t i) const { return a.sequences[i].pages != nullptr && cuts[i].dots && cuts[i].rows > 0 && cuts[i].chunks > 1 && cuts[i].chunks <= kMostChunks; }

    void share(Arena& arena, int64_t count, int64_t most, int64_t slots) {
        Candidate* candidates = arena.take<Candidate>(count);
        int32_t* table = arena.take<int32_t>(slots);
        cascade.shares = arena.take<Share>(count * most);
        cascade.members = arena.take<int64_t>(count * most);
        uint64_t* taken = arena.take<uint64_t>(a.sequence_count);
        Tile& tile = *arena.take<Tile>(1);
        Scratch& scratch = *arena.take<Scratch>(1);
        Bounds& bounds = *arena.take<Bounds>(1);
        int64_t n = 0;
        for (int64_t i = 0; i < a.sequence_count; ++i) {
            taken[i] = 0;
            if (!may_share(i)) continue;
            const Sequence& s = a.sequences[i];
            Candidate& x = candidates[n++];
            x.sequence = i, x.chunk = cuts[i].chunk, x.chunks = cuts[i].chunks;
            bounds.full.clear();
            if (job.program.empty()) {
                bounds.full.set(0, s.k_count);
            } else {
                fill(s, cuts[i], 0, 0, tile);
                job.program.bounds(tile.rows, scratch, bounds);
            }
            x.set_full(bounds.full);
        }
        cascade.find(a, candidates, n, table, slots, taken);
        if (cascade.count == 0) return;
        tasks = cascade.count * a.Hkv;
        for (int64_t i = 0; i < a.sequence_count; ++i) {
            cuts[i].shared = taken[i];
            cuts[i].first_task = tasks;
            tasks += cuts[i].tasks(a.Hkv);
        }
    }

    void layout() {
        tasks = packs = partial_rows = counters = pair_words = 0;
        for (int64_t i = 0; i < a.sequence_count; ++i) {
            const Sequence& s = a.sequences[i];
            Cut c = cut(s);
            (c.dots ? any_dots : any_lanes) = true;
            if (c.split && !c.dots) states = upper(states, c.tiles);
            c.first_task = tasks;
            tasks += c.tasks(a.Hkv);
            c.first_row = partial_rows;
            c.first_counter = counters;
            if (c.split && c.chunks > 1) {
                partial_rows += c.rows * c.chunks * a.Hkv;
                counters += a.Hkv;
            }
            c.first_pack = packs;
            if (L::Products::kPair == 2 && !c.split && c.tiles > 2 && !is_scaled(a)) {
                c.pairs = pair_words;
                const int64_t half = (s.k_count + kGranule - 1) / kGranule * kGranule / 2;
                pair_words += a.Hkv * half * a.Dv;
                c.packs = (s.k_count + kPackKeys - 1) / kPackKeys * a.Hkv;
                packs += c.packs;
            }
            cuts[i] = c;
        }
    }

    // The sequence that number i of a running count belongs to.
    template <class First>
    int64_t find(int64_t i, First first) const {
        int64_t lo = 0, hi = a.sequence_count;
        while (hi - lo > 1) {
            const int64_t mid = (lo + hi) / 2;
            (first(cuts[mid]) <= i ? lo : hi) = mid;
        }
        return lo;
    }

    void pack(int64_t i) {
        // Sequences without packing share their first_pack with the next: the last one at or before i is meant.
        const int64_t at = find(i, [](const Cut& c) { return c.first_pack; });
        const Sequence& s = a.sequences[at];
        const Cut& c = cuts[at];
        const int64_t per_head = c.packs / a.Hkv, head = (i - c.first_pack) / per_head, j = (i - c.first_pack) % per_head * kPackKeys;
        const int64_t padded = (s.k_count + kGranule - 1) / kGranule * kGranule;
        typename L::U* to = pairs + c.pairs + (head * padded / 2 + j / 2) * a.Dv;
        L::interleave(values_of<T>(a, s, head), s.k_count, j, lower(kPackKeys, padded - j), a.Dv, to);
    }

    void fill(const Sequence& s, const Cut& c, int64_t kv_head, int64_t tile, Tile& to) const {
        to.sequence = &s;
        to.kv_head = kv_head;
        Rows& rows = to.rows;
        rows.batch = s.batch;
        rows.key_count = s.k_count;
        const int64_t per_head = c.by_head ? c.tiles / job.group : 0;
        const int64_t first = (c.by_head ? tile % per_head : tile) * c.tile_rows;
        const int64_t span = c.by_head ? s.q_count : c.rows;
        rows.count = static_cast<int>(lower(c.tile_rows, span - first));
        for (int r = 0; r < rows.count; ++r) {
            const int64_t x = first + r;
            const int64_t i = c.by_head ? x : x % s.q_count;
            rows.head[r] = QKV_MUTANT(head_map) ? (c.by_head ? tile / per_head : x / s.q_count) * a.Hkv + kv_head
                                         : kv_head * job.group + (c.by_head ? tile / per_head : x / s.q_count);
            rows.index[r] = i;
            rows.position[r] = s.positions != nullptr && !QKV_MUTANT(positions_ignored) ? s.positions[i] : s.position + i;
        }
    }

    void task(int64_t i, int worker) {
        if (i < cascade.count * a.Hkv) {
            together(cascade.shares[i / a.Hkv], i % a.Hkv, worker);
            return;
        }
        const int64_t at = find(i, [](const Cut& c) { return c.first_task; });
        const Sequence& s = a.sequences[at];
        const Cut& c = cuts[at];
        const int64_t local = i - c.first_task;
        Arena arena{workers + worker * worker_bytes};
        if (!c.split) {
            // One head after another: its keys and values stay in the cache until its tiles are done. The last tiles first: under a
            // causal mask they are the longest.
            whole(s, c, local / c.tiles, by_index(c, c.tiles - 1 - local % c.tiles), arena);
            return;
        }
        const int64_t kv_head = local % a.Hkv, chunk = c.chunk_of(local / a.Hkv);
        if (c.dots)
            few(s, c, kv_head, chunk, arena);
        else
            some(s, c, kv_head, chunk, arena);
        if (c.chunks > 1 && last_of(remaining + c.first_counter + kv_head)) {
            Arena again{workers + worker * worker_bytes};
            merge(s, c, kv_head, again);
        }
    }

    // Tiles of one head follow each other; tasks go by tile first, so that heads of a group share keys in the cache.
    int64_t by_index(const Cut& c, int64_t tile) const {
        if (!c.by_head) return tile;
        const int64_t per_head = c.tiles / job.group;
        return tile % job.group * per_head + tile / job.group;
    }

    typename L::Work& lanes_work(Arena& arena) const {
        const int64_t n = L::kTileRows;
        auto& w = *arena.take<typename L::Work>(1);
        w.scores = arena.take<E>(kWindowKeys * n);
        w.bias = arena.take<E>(kWindowKeys * n);
        w.keys = arena.take<typename L::K>(kWindowKeys * L::units(a.D) * L::Products::kPair);
        w.values = arena.take<typename L::U>(kWindowKeys * a.Dv);
        w.rows = arena.take<E>(n * L::row_width(a));
        w.k_scales = arena.take<E>(kWindowKeys);
        w.v_scales = arena.take<E>(kWindowKeys);
        w.staged = arena.take<T>(kGranule * a.Dv);
        w.pairs = nullptr;
        w.pairs_first = 0;
        return w;
    }
    typename L::State& lanes_state(Arena& arena) const {
        auto& s = *arena.take<typename L::State>(1);
        s.queries = arena.take<typename L::Q>(L::units(a.D) * L::kTileRows);
        s.out = arena.take<E>(a.Dv * L::kTileRows);
        return s;
    }

    // One tile against all keys.
    void whole(const Sequence& s, const Cut& c, int64_t kv_head, int64_t tile, Arena& arena) {
        auto& work = lanes_work(arena);
        auto& state = lanes_state(arena);
        fill(s, c, kv_head, tile, state.tile);
        if (c.pairs >= 0) work.pairs = pairs + c.pairs + kv_head * ((s.k_count + kGranule - 1) / kGranule * kGranule / 2) * a.Dv;
        L::load(job, state, work);
        L::run(job, state, work, 0, s.k_count, false);
        if (L::spoiled(a, state)) {
            L::reset(state, a);
            L::run(job, state, work, 0, s.k_count, true);
        }
        L::finish(job, state, work);
    }

    // All rows of a key/value head against one chunk of keys.
    void some(const Sequence& s, const Cut& c, int64_t kv_head, int64_t chunk, Arena& arena) {
        auto& work = lanes_work(arena);
        const int64_t k0 = chunk * c.chunk, k1 = lower(s.k_count, k0 + c.chunk);
        typename L::State* tiles[kShortTiles];
        for (int64_t t = 0; t < c.tiles; ++t) {
            tiles[t] = &lanes_state(arena);
            fill(s, c, kv_head, t, tiles[t]->tile);
            L::load(job, *tiles[t], work);
        }
        const auto sweep = [&](int64_t from, int64_t to, bool careful) {
            for (int64_t j = k0; j < k1; j += kWindowKeys) {
                const int64_t end = lower(k1, j + kWindowKeys);
                if (L::Products::kPair == 2 && c.tiles > 1 && !is_scaled(a)) {
                    L::interleave(values_of<T>(a, s, kv_head), s.k_count, j, (end - j + kGranule - 1) / kGranule * kGranule, a.Dv, work.values);
                    work.pairs = work.values;
                    work.pairs_first = j;
                }
                for (int64_t t = from; t < to; ++t) L::run(job, *tiles[t], work, j, end, careful);
            }
        };
        sweep(0, c.tiles, false);
        for (int64_t t = 0; t < c.tiles; ++t) {
            typename L::State& state = *tiles[t];
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
                keep(partial(c, kv_head, chunk, t * c.tile_rows + r), work.rows + r * width, state.m[r], state.l[r]);
        }
    }

    typename D::Work& dots_work(Arena& arena) const {
        const int64_t n = D::kTileRows, width = D::padded(a.Dv);
        auto& w = *arena.take<typename D::Work>(1);
        w.queries = arena.take<typename D::Q>(n * D::padded(a.D));
        w.out = arena.take<E>(n * width);
        w.scores = arena.take<E>(n * kWindowKeys);
        w.bias = arena.take<E>(kWindowKeys);
        w.pairs = arena.take<uint32_t>(n * kWindowKeys / 2);
        w.keys = arena.take<T>(kWindowKeys * D::padded(a.D));
        w.values = arena.take<T>(kWindowKeys * width);
        w.k_scales = arena.take<E>(kWindowKeys);
        w.v_scales = arena.take<E>(kWindowKeys);
        return w;
    }

    void few(const Sequence& s, const Cut& c, int64_t kv_head, int64_t chunk, Arena& arena) {
        const int64_t width = D::padded(a.Dv);
        auto& w = dots_work(arena);
        fill(s, c, kv_head, 0, w.tile);
        const int64_t k0 = chunk * c.chunk, k1 = lower(s.k_count, k0 + c.chunk);
        D::load(job, w, w.tile, 0);
        D::reset(a, w);
        D::run(job, job.program, w, k0, k1, false);
        if (D::spoiled(a, w)) {
            D::reset(a, w);
            D::run(job, job.program, w, k0, k1, true);
        }
        D::settle(a, w);
        if (c.chunks == 1) {
            D::finish(job, w);
            return;
        }
        for (int r = 0; r < w.tile.rows.count; ++r) keep(partial(c, kv_head, chunk, r), w.out + r * width, w.m[r], w.l[r]);
    }

    // A chunk that several sequences have in common, a tile of as many of them as fit at a time.
    void together(const Share& share, int64_t kv_head, int worker) {
        const int64_t width = D::padded(a.Dv);
        const Program everything(nullptr, 0, nullptr);
        for (int64_t done = 0; done < share.members;) {
            Arena arena{workers + worker * worker_bytes};
            auto& w = dots_work(arena);
            Tile& tile = *arena.take<Tile>(1);
            const int64_t* members = cascade.members + share.first_member + done;
            const int64_t k0 = share.chunk * cuts[*members].chunk;
            int64_t n = 0;
            int rows = 0;
            for (; done + n < share.members && rows + cuts[members[n]].rows <= D::kTileRows; ++n) {
                fill(a.sequences[members[n]], cuts[members[n]], kv_head, 0, tile);
                D::load(job, w, tile, rows);
                if (n == 0) w.tile = tile;
                rows += tile.rows.count;
            }
            // All rows see all keys of the chunk: nothing of the tile but its keys is looked at.
            w.tile.rows.count = rows;
            w.tile.rows.key_count = k0 + cuts[*members].chunk;
            D::reset(a, w);
            D::run(job, everything, w, k0, k0 + cuts[*members].chunk, false);
            D::settle(a, w);
            for (int64_t i = 0, r = 0; i < n; ++i) {
                const Cut& c = cuts[members[i]];
                for (int64_t row = 0; row < c.rows; ++row, ++r) {
                    const int64_t x = QKV_MUTANT(cascade_rows) ? row : r;
                    keep(partial(c, kv_head, share.chunk, row), w.out + x * width, w.m[x], w.l[x]);
                }
            }
            for (int64_t i = 0; i < n; ++i) {
                const Cut& c = cuts[members[i]];
                if (last_of(remaining + c.first_counter + kv_head)) {
                    Arena again{workers + worker * worker_bytes};
                    merge(a.sequences[members[i]], c, kv_head, again);
                }
            }
            done += n;
        }
    }

    int64_t partial(const Cut& c, int64_t kv_head, int64_t chunk, int64_t row) const {
        return c.first_row + (kv_head * c.chunks + chunk) * c.rows + row;
    }
    void keep(int64_t at, const E* o, E m, E l) {
        partial_m[at] = m;
        partial_l[at] = l;
        std::memcpy(partial_out + at * a.Dv, o, sizeof(E) * static_cast<size_t>(a.Dv));
    }

    // Adds up the chunks of all rows of a key/value head, in order.
    void merge(const Sequence& s, const Cut& c, int64_t kv_head, Arena& arena) {
        E* total = arena.take<E>(a.Dv + V::W);
        Tile& tile = *arena.take<Tile>(1);
        for (int64_t t = 0; t < c.tiles; ++t) {
            fill(s, c, kv_head, t, tile);
            for (int r = 0; r < tile.rows.count; ++r) {
                const int64_t row = t * c.tile_rows + r;
                E m = -static_cast<E>(INFINITY);
                for (int64_t x = 0; x < c.chunks; ++x) {
                    const E next = partial_m[partial(c, kv_head, x, row)];
                    m = m > next || m != m ? m : next;
                }
                E l = 0;
                bool first = true;
                for (int64_t x = 0; x < c.chunks; ++x) {
                    const int64_t from = partial(c, kv_head, x, row);
                    if (partial_m[from] == -static_cast<E>(INFINITY) && partial_l[from] == 0) continue;
                    E w = QKV_MUTANT(chunk_weights) ? E(1) : std::exp2((partial_m[from] - m) * static_cast<E>(job.factor));
                    if (QKV_MUTANT(chunk_twice) && x == 0) w *= 2;
                    l += w * partial_l[from];
                    const E* o = partial_out + from * a.Dv;
                    for (int64_t d = 0; d < a.Dv; ++d) total[d] = first ? w * o[d] : total[d] + w * o[d];
                    first = false;
                }
                if (first)
                    for (int64_t d = 0; d < a.Dv; ++d) total[d] = 0;
                write_row<T, E, V>(job, tile, r, total, m, l);
            }
        }
    }
};

}  // namespace

bool program_fits(const int64_t* words, int64_t length, int64_t operands);
bool program_fits(const int64_t* words, int64_t length, int64_t operands) { return length == 0 || Program::valid(words, length, operands); }

Status run(const Attention& call);
Status run(const Attention& call) {
    if (!program_fits(call.program, call.program_length, call.operand_count) || !Program::readable(call, call.program, call.program_length))
        return Status::bad_program;
    switch (call.q_type) {
        case Type::f32: return Run<Lanes<PlainProducts<float>>, Dots<PlainDots<float>>>(call).go();
        case Type::f64: return Run<Lanes<PlainProducts<double>>, Dots<PlainDots<double>>>(call).go();
        case Type::f16: return Run<Lanes<PlainProducts<f16>>, Dots<PlainDots<f16>>>(call).go();
#if defined(QKV_ISA_AVX512BF16)
        case Type::bf16: return Run<Lanes<PairProducts>, Dots<PairDots>>(call).go();
#else
        case Type::bf16: return Run<Lanes<PlainProducts<bf16>>, Dots<PlainDots<bf16>>>(call).go();
#endif
        default: return Status::unsupported;
    }
}

}  // namespace QKV_ISA
}  // namespace qkv
