// The Python module: the only file that knows nanobind. Sizes and strides are checked once, when a call is prepared;
// running it takes addresses only.
#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "attention.h"

namespace nb = nanobind;

namespace qkv {
namespace {

using Integers = std::vector<int64_t>;
using Addresses = std::vector<uintptr_t>;
using Strides = std::array<int64_t, 4>;
using BiasNumbers = std::array<int64_t, 7>;      // kind, type, strides of b h i j, reach
using GradientNumbers = std::array<int64_t, 6>;  // address, strides of b h i j, whether it is in double
using RowAddresses = std::array<uintptr_t, 3>;   // of lse, states, and largest scores, weights and entropies; or 0
// Keys of a row and the addresses of those, of their weights and of distances; of what keys receive, and how many have
// a place there; of the map, and its rows and columns. 0: not wanted.
using Wanted = std::array<int64_t, 9>;

void require(bool ok, const char* what) {
    if (!ok) throw std::invalid_argument(what);
}

void* pointer(uintptr_t address) { return reinterpret_cast<void*>(address); }
template <class T>
const T* array_at(uintptr_t address) {
    return static_cast<const T*>(pointer(address));
}

void check(Status status) {
    switch (status) {
        case Status::ok: return;
        case Status::no_memory: throw std::bad_alloc();
        case Status::bad_program:
            throw std::invalid_argument(
                "the mask is nested too deeply, or has too many random blocks a row, for the native kernel");
        default: throw std::invalid_argument("the native kernel does not support this call");
    }
}

void copy(const Strides& from, int64_t (&to)[4]) { std::copy(from.begin(), from.end(), to); }

// The addresses of one call, 0 where there is none, and what else may differ from call to call.
struct Given {
    uintptr_t q, k, v, out, lse, sinks, positions, state, observed;
    int64_t position_rows, seed;
    int threads;
};

// Where sequences lie on pages: int32 tables one after the other, and int64 starts (n + 1), lengths (n) and, for a
// ragged batch, queries (n).
struct Layout {
    const int32_t* tables;
    const int64_t *starts, *lengths, *queries;
    int64_t table_size, n;
};

// Every size, stride and mask of a call; only addresses are missing.
class Prepared {
  public:
    // sizes: B, Hq, Hkv, Lq, Lk, D, Dv. sinks: none, or their type and stride. positions: of the first query, none for
    // 0, one for all batch rows or one for each. pages: none, or size, number, type of stored keys and values, and the
    // strides of their scales from page to page, head to head, slot to slot. part: as of Attention.
    Prepared(std::string isa, int type, const std::array<int64_t, 7>& sizes, const Strides& q_stride,
             const Strides& k_stride, const Strides& v_stride, const Strides& out_stride, double scale, double softcap,
             Integers program, const std::vector<std::tuple<uintptr_t, int64_t>>& operands,
             const std::vector<BiasNumbers>& bias, const Integers& sinks, Integers positions, const Integers& pages,
             double dropout_p, bool part)
        : isa_(std::move(isa)), program_(std::move(program)), positions_(std::move(positions)) {
        const auto& [B, Hq, Hkv, Lq, Lk, D, Dv] = sizes;
        B_ = B, Lq_ = Lq, Lk_ = Lk;
        for (const int64_t n : sizes) require(n >= 0, "sizes must not be negative");
        require(type >= 0 && type <= 3, "type must be 0..3");
        require(std::isfinite(scale) && std::isfinite(softcap) && softcap >= 0, "scale and softcap must be finite");
        require(dropout_p >= 0 && dropout_p < 1, "0 <= dropout_p < 1");
        require(positions_.size() <= 1 || positions_.size() == static_cast<size_t>(B_),
                "positions must be one a batch row");
        require(D > 0 && (Hkv == 0 ? Hq == 0 : Hq % Hkv == 0), "D must be positive and Hq a multiple of Hkv");
        a_.size = sizeof(Attention);
        a_.q_type = a_.kv_type = static_cast<Type>(type);
        a_.Hq = Hq, a_.Hkv = Hkv, a_.D = D, a_.Dv = Dv;
        copy(q_stride, a_.q_stride), copy(out_stride, a_.out_stride);
        if (!pages.empty()) set_pages(pages);
        for (size_t i = 0; i < 3; ++i) a_.k_stride[i] = k_stride[i + 1], a_.v_stride[i] = v_stride[i + 1];
        k_batch_ = a_.k_page = k_stride[0], v_batch_ = a_.v_page = v_stride[0];
        a_.lse_stride[0] = Hq * Lq, a_.lse_stride[1] = Lq, a_.lse_stride[2] = 1;
        a_.scale = scale, a_.softcap = softcap, a_.part = part;
        a_.dropout_below = static_cast<uint64_t>(std::nearbyint(dropout_p * 9007199254740992.0));
        a_.dropout_scale = 1 / (1 - dropout_p);
        a_.state_step = a_.observed_step = B * Hq * Lq;
        for (const auto& [address, count] : operands) operands_.push_back({pointer(address), count});
        a_.program = program_.data(), a_.program_length = static_cast<int64_t>(program_.size());
        a_.operands = operands_.data(), a_.operand_count = static_cast<int64_t>(operands_.size());
        for (const auto& [kind, of, b, h, i, j, reach] : bias) {
            require(kind >= 0 && kind <= 2 && of >= 0 && of <= 3, "a bias must be (kind, type, 4 strides, reach)");
            bias_.push_back({static_cast<BiasKind>(kind), static_cast<Type>(of), nullptr, {b, h, i, j}, reach});
        }
        a_.bias_count = static_cast<int64_t>(bias_.size());
        set_sinks(sinks);
        static constexpr int64_t kBytes[] = {4, 2, 2, 8};
        bytes_ = kBytes[type];
        if (!program_fits(a_.program, a_.program_length, a_.operand_count)) check(Status::bad_program);
        Attention probe = a_;  // without sequences: asks only whether this build and machine have the instruction set
        if (a_.kv_type != a_.q_type) probe.k_scale = probe.v_scale = &kOne;
        check(attention(probe, isa_.c_str()));
    }

    void run(uintptr_t q, uintptr_t k, uintptr_t v, uintptr_t out, uintptr_t lse, int threads) const {
        Given given{};
        given.q = q, given.k = k, given.v = v, given.out = out, given.lse = lse, given.threads = threads;
        forward(given, bias_);
    }

    // state: where the rows' states go, or 0. seed: of dropout.
    void run_full(uintptr_t q, uintptr_t k, uintptr_t v, uintptr_t out, uintptr_t lse, int threads, uintptr_t sinks,
                  uintptr_t positions, int64_t position_rows, const Addresses& bias, uintptr_t state,
                  int64_t seed) const {
        const Given given{q, k, v, out, lse, sinks, positions, state, 0, position_rows, seed, threads};
        forward(given, bias_at(given, bias));
    }

    // The call, and what its weights come to. rows: where they are wanted.
    void observe(uintptr_t q, uintptr_t k, uintptr_t v, uintptr_t out, int threads, uintptr_t sinks,
                 uintptr_t positions, int64_t position_rows, const Addresses& bias, int64_t seed,
                 const RowAddresses& rows, const Wanted& wanted) const {
        const auto& [lse, state, observed] = rows;
        const Given given{q, k, v, out, lse, sinks, positions, state, observed, position_rows, seed, threads};
        with_call(given, bias_at(given, bias), [&](const Attention& call) { return observed_call(call, wanted); });
    }

    // What is computed, without computing it: pairs, step, block, whether tiles hold all heads of a query, and whether
    // keys are gathered.
    std::tuple<int64_t, int64_t, int64_t, bool, bool> cover(uintptr_t positions, int64_t position_rows,
                                                            int64_t granules) const {
        require(positions == 0 || position_rows == 1 || position_rows == B_, "positions must have 1 or B rows");
        Given given{};
        given.positions = positions, given.position_rows = position_rows;
        Cover found{};
        found.granules = granules;
        with_call(given, bias_, [&](const Attention& call) { return qkv::cover(call, isa_.c_str(), found); });
        return {found.pairs, found.step, found.block, found.by_query, found.gathers};
    }

    // Keys and values on pages.
    void run_pages(const std::array<uintptr_t, 8>& tensors, int threads, uintptr_t sinks, const Addresses& bias,
                   const std::array<uintptr_t, 4>& layout, const Strides& counts, const Integers& which) const {
        with_pages(tensors, threads, sinks, bias, layout, counts, which,
                   [&](const Attention& call) { return attention(call, isa_.c_str()); });
    }

    // The same, and what its weights come to. rows: without lse, which is of the tensors.
    void observe_pages(const std::array<uintptr_t, 8>& tensors, int threads, uintptr_t sinks, const Addresses& bias,
                       const std::array<uintptr_t, 4>& layout, const Strides& counts, const Integers& which,
                       const RowAddresses& rows, const Wanted& wanted) const {
        with_pages(tensors, threads, sinks, bias, layout, counts, which, [&](const Attention& given) {
            Attention call = given;
            call.state = pointer(rows[1]), call.observed = pointer(rows[2]);
            return observed_call(call, wanted);
        });
    }

    // Addresses of what the call was given and gave, its gradients' addresses (of q, k, v) and strides; state (it is
    // then found anew), d_lse, d_sinks and single gradients may be 0.
    void backward(uintptr_t q, uintptr_t k, uintptr_t v, uintptr_t out, uintptr_t state, int threads, uintptr_t sinks,
                  uintptr_t positions, int64_t position_rows, const Addresses& bias, int64_t seed, uintptr_t d_out,
                  const Strides& d_out_stride, uintptr_t d_lse, const std::array<uintptr_t, 3>& to,
                  const std::array<Strides, 3>& strides, const std::vector<GradientNumbers>& d_bias,
                  uintptr_t d_sinks) const {
        const Given given{q, k, v, out, 0, sinks, positions, state, 0, position_rows, seed, threads};
        const std::vector<Bias> terms = bias_at(given, bias);
        require(d_bias.size() == terms.size(), "bias was prepared otherwise");
        std::vector<BiasGradient> gradients;
        for (const auto& [address, b, h, i, j, wide] : d_bias)
            gradients.push_back(
                {pointer(static_cast<uintptr_t>(address)), {b, h, i, j}, wide || a_.q_type == Type::f64});
        Backward call{};
        call.size = sizeof(Backward);
        call.d_out = pointer(d_out), call.d_lse = pointer(d_lse);
        call.d_q = pointer(to[0]), call.d_k = pointer(to[1]), call.d_v = pointer(to[2]);
        copy(d_out_stride, call.d_out_stride);
        copy(strides[0], call.d_q_stride), copy(strides[1], call.d_k_stride), copy(strides[2], call.d_v_stride);
        call.d_bias = gradients.empty() ? nullptr : gradients.data();
        call.d_sinks = static_cast<double*>(pointer(d_sinks));
        with_call(given, terms, [&](const Attention& whole) {
            call.call = whole;
            return qkv::backward(call, isa_.c_str());
        });
    }

  private:
    void set_pages(const Integers& pages) {
        require(pages.size() == 6 && pages[0] > 0 && pages[1] >= 0 && pages[2] >= 0 && pages[2] <= 5,
                "pages must be (size, count, type, 3 strides of scales)");
        a_.page_size = page_size_ = pages[0];
        page_count_ = pages[1];
        a_.kv_type = static_cast<Type>(pages[2]);
        std::copy(pages.begin() + 3, pages.end(), a_.scale_stride);
    }

    void set_sinks(const Integers& sinks) {
        require(sinks.empty() || sinks.size() == 2, "sinks must be (type, stride)");
        has_sinks_ = !sinks.empty();
        if (has_sinks_) a_.sink_type = static_cast<Type>(sinks[0]), a_.sink_stride = sinks[1];
    }

    // The bias terms with their addresses; all that was given has to be what was prepared.
    std::vector<Bias> bias_at(const Given& given, const Addresses& addresses) const {
        require((given.sinks != 0) == has_sinks_, "sinks were prepared otherwise");
        require(addresses.size() == bias_.size(), "bias was prepared otherwise");
        require(given.positions == 0 || given.position_rows == 1 || given.position_rows == B_,
                "positions must have 1 or B rows");
        std::vector<Bias> terms = bias_;
        for (size_t i = 0; i < terms.size(); ++i) terms[i].data = pointer(addresses[i]);
        return terms;
    }

    // Sequence i of a layout; q_first: its first row of q.
    Sequence sequence_of(const Layout& at, int64_t i, int64_t q_first, const void* k, const void* v) const {
        Sequence s{};
        s.q_first = q_first;
        s.q_count = at.queries != nullptr ? at.queries[i] : Lq_;
        s.k_count = at.lengths[i];
        s.batch = i;
        s.position = s.k_count - s.q_count;
        s.k = k, s.v = v;
        const int64_t first = at.starts[i], last = at.starts[i + 1];
        require(first >= 0 && last >= first && last <= at.table_size, "a page table lies outside of the tables");
        const int64_t needed = s.k_count / page_size_ + (s.k_count % page_size_ != 0);
        require(s.k_count >= 0 && needed <= last - first, "a page table is too short for its sequence");
        require(s.q_count >= 0 && s.q_count <= Lq_ - q_first, "there are more queries than rows");
        require(s.q_count <= s.k_count, "there are more queries than keys");
        s.pages = at.tables + first;
        int32_t low = 0, high = -1;
        for (int64_t p = 0; p < needed; ++p) low = std::min(low, s.pages[p]), high = std::max(high, s.pages[p]);
        require(low >= -1 && high < page_count_, "a page table names a page that does not exist");
        return s;
    }

    // Those of `which`, ascending, or all of them; without the ones that have no queries.
    std::vector<Sequence> sequences_of(const Layout& at, const void* k, const void* v, const Integers& which) const {
        std::vector<Sequence> sequences;
        sequences.reserve(which.empty() ? static_cast<size_t>(at.n) : which.size());
        int64_t first = 0;
        size_t next = 0;
        for (int64_t i = 0; i < at.n; ++i) {
            if (which.empty() || (next < which.size() && which[next] == i)) {
                const Sequence s = sequence_of(at, i, at.queries != nullptr ? first : 0, k, v);
                if (s.q_count > 0) sequences.push_back(s);
                ++next;
            }
            if (at.queries != nullptr) {
                require(at.queries[i] >= 0 && at.queries[i] <= Lq_ - first, "there are more queries than rows");
                first += at.queries[i];
            }
        }
        require(at.queries == nullptr || first == Lq_, "there are fewer queries than rows");
        return sequences;
    }

    void forward(const Given& given, const std::vector<Bias>& bias) const {
        with_call(given, bias, [&](const Attention& call) { return attention(call, isa_.c_str()); });
    }

    // Runs the call on keys and values that are tensors.
    template <class Run>
    void with_call(const Given& given, const std::vector<Bias>& bias, Run run) const {
        std::array<Sequence, 16> few;
        std::vector<Sequence> many;
        Sequence* sequences = few.data();
        if (B_ > static_cast<int64_t>(few.size())) {
            many.resize(static_cast<size_t>(B_));
            sequences = many.data();
        }
        for (int64_t b = 0; b < B_; ++b) {
            Sequence& s = sequences[b];
            s = Sequence{};
            s.q_count = Lq_;
            s.k_count = Lk_;
            s.batch = b;
            s.position = positions_.empty() ? 0 : positions_[positions_.size() > 1 ? static_cast<size_t>(b) : 0];
            if (given.positions != 0)
                s.positions = array_at<int64_t>(given.positions) + (given.position_rows > 1 ? b * Lq_ : 0);
            s.k = array_at<char>(given.k) + b * k_batch_ * bytes_;
            s.v = array_at<char>(given.v) + b * v_batch_ * bytes_;
        }
        Attention call = a_;
        call.q = pointer(given.q);
        call.out = pointer(given.out);
        call.lse = pointer(given.lse);
        call.state = pointer(given.state);
        call.observed = pointer(given.observed);
        call.dropout_seed = static_cast<uint64_t>(given.seed);
        call.sequences = sequences;
        call.sequence_count = Lq_ > 0 ? B_ : 0;
        call.sinks = pointer(given.sinks);
        call.bias = bias.data();
        call.threads = given.threads;
        check(run(call));
    }

    // The same on keys and values that lie on pages. `which`: the sequences that run, or none for all. Their tables are
    // checked here: a wrong number would be a wrong address.
    template <class Run>
    void with_pages(const std::array<uintptr_t, 8>& tensors, int threads, uintptr_t sinks, const Addresses& bias,
                    const std::array<uintptr_t, 4>& layout, const Strides& counts, const Integers& which,
                    Run run) const {
        const auto& [q, k, v, k_scale, v_scale, out, lse, state] = tensors;
        const auto& [tables, starts, lengths, queries] = counts;
        require(starts == lengths + 1 && (layout[3] == 0 || queries == lengths),
                "a layout has n lengths, n + 1 starts and n queries");
        require(page_size_ > 0 && a_.dropout_below == 0, "the call was prepared without pages, or with dropout");
        require(layout[3] != 0 || lengths == B_, "sequences must be one a batch row");
        Given given{};
        given.sinks = sinks;
        const std::vector<Bias> terms = bias_at(given, bias);
        const Layout at{array_at<int32_t>(layout[0]),
                        array_at<int64_t>(layout[1]),
                        array_at<int64_t>(layout[2]),
                        array_at<int64_t>(layout[3]),
                        tables,
                        lengths};
        const std::vector<Sequence> sequences = sequences_of(at, pointer(k), pointer(v), which);
        Attention call = a_;
        if (at.queries != nullptr) {
            call.q_stride[0] = call.out_stride[0] = call.lse_stride[0] = 0;
            call.state_step = call.observed_step = call.Hq * Lq_;
        }
        call.q = pointer(q);
        call.k_scale = array_at<float>(k_scale), call.v_scale = array_at<float>(v_scale);
        call.out = pointer(out), call.lse = pointer(lse), call.state = pointer(state);
        call.sequences = sequences.data();
        call.sequence_count = static_cast<int64_t>(sequences.size());
        call.sinks = pointer(sinks);
        call.bias = terms.data();
        call.threads = threads;
        check(run(call));
    }

    Status observed_call(const Attention& call, const Wanted& wanted) const {
        const Status status = attention(call, isa_.c_str());
        const auto& [top, keys, weights, distance, mass, length, map, rows, columns] = wanted;
        if (status != Status::ok || (top == 0 && distance == 0 && mass == 0 && map == 0)) return status;
        const auto at = [](int64_t address) { return pointer(static_cast<uintptr_t>(address)); };
        Observation of{};
        of.size = sizeof(Observation);
        of.call = call;
        of.top = top, of.top_keys = static_cast<int64_t*>(at(keys)), of.top_weights = at(weights);
        of.distance = at(distance);
        of.mass = static_cast<double*>(at(mass)), of.map = static_cast<double*>(at(map));
        of.mass_stride[0] = call.Hq * length, of.mass_stride[1] = length;
        of.rows = rows, of.columns = columns;
        of.map_stride[0] = call.Hq * rows * columns, of.map_stride[1] = rows * columns, of.map_stride[2] = columns;
        return qkv::observe(of, isa_.c_str());
    }

    static constexpr float kOne = 1;
    std::string isa_;
    Attention a_{};
    Integers program_, positions_;
    std::vector<Operand> operands_;
    std::vector<Bias> bias_;
    int64_t page_size_ = 0, page_count_ = 0;
    int64_t B_ = 0, Lq_ = 0, Lk_ = 0, k_batch_ = 0, v_batch_ = 0, bytes_ = 4;
    bool has_sinks_ = false;
};

}  // namespace
}  // namespace qkv

#define QKV_STRING2(x) #x
#define QKV_STRING(x) QKV_STRING2(x)

NB_MODULE(QKV_MODULE, m) {
    using qkv::Prepared;
    // Prepared calls live in caches until the interpreter ends, and in the graphs of tensors that do: nothing is
    // leaked.
    nb::set_leak_warnings(false);
    m.doc() = "Native attention kernels (see csrc/attention.h).";
    m.def("instruction_sets", [] { return std::string(qkv::instruction_sets()); }, "Comma-separated, best first.");
    m.def("program_fits", [](const qkv::Integers& words, int64_t operands) {
        return qkv::program_fits(words.data(), static_cast<int64_t>(words.size()), operands);
    });
    m.def(
        "limits",
        [](const std::string& isa) {
            qkv::Limits limits{};
            if (qkv::limits(isa.c_str(), limits) != qkv::Status::ok)
                throw std::invalid_argument("this build or machine has no instruction set " + isa);
            return std::make_tuple(limits.tile_rows, limits.granule, limits.terms);
        },
        "Rows of a tile, keys that are visited or skipped together, and score terms that have gradients; \"\": of the "
        "best.");
    using nb::literals::operator""_a;
    const nb::call_guard<nb::gil_scoped_release> free;
    nb::class_<Prepared>(m, "Prepared")
        .def(nb::init<std::string, int, const std::array<int64_t, 7>&, const qkv::Strides&, const qkv::Strides&,
                      const qkv::Strides&, const qkv::Strides&, double, double, qkv::Integers,
                      const std::vector<std::tuple<uintptr_t, int64_t>>&, const std::vector<qkv::BiasNumbers>&,
                      const qkv::Integers&, qkv::Integers, const qkv::Integers&, double, bool>(),
             "isa"_a, "type"_a, "sizes"_a, "q_stride"_a, "k_stride"_a, "v_stride"_a, "out_stride"_a, "scale"_a,
             "softcap"_a, "program"_a, "operands"_a, "bias"_a, "sinks"_a, "positions"_a, "pages"_a, "dropout_p"_a,
             "part"_a = false)
        .def("run", &Prepared::run, free)
        .def("cover", &Prepared::cover, free, "positions"_a, "position_rows"_a, "granules"_a)
        .def("run_full", &Prepared::run_full, free, "q"_a, "k"_a, "v"_a, "out"_a, "lse"_a, "threads"_a, "sinks"_a,
             "positions"_a, "position_rows"_a, "bias"_a, "state"_a, "seed"_a)
        .def("run_pages", &Prepared::run_pages, free, "tensors"_a, "threads"_a, "sinks"_a, "bias"_a, "layout"_a,
             "counts"_a, "which"_a)
        .def("observe", &Prepared::observe, free, "q"_a, "k"_a, "v"_a, "out"_a, "threads"_a, "sinks"_a, "positions"_a,
             "position_rows"_a, "bias"_a, "seed"_a, "rows"_a, "wanted"_a)
        .def("observe_pages", &Prepared::observe_pages, free, "tensors"_a, "threads"_a, "sinks"_a, "bias"_a, "layout"_a,
             "counts"_a, "which"_a, "rows"_a, "wanted"_a)
        .def("backward", &Prepared::backward, free, "q"_a, "k"_a, "v"_a, "out"_a, "state"_a, "threads"_a, "sinks"_a,
             "positions"_a, "position_rows"_a, "bias"_a, "seed"_a, "d_out"_a, "d_out_stride"_a, "d_lse"_a, "to"_a,
             "strides"_a, "d_bias"_a, "d_sinks"_a);
}
