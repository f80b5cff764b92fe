// The Python module: the only file that knows nanobind. Sizes and strides are checked once, when a call is prepared; running
// it takes addresses only.
#include <nanobind/nanobind.h>
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
#include "mutants.h"

namespace nb = nanobind;

namespace qkv {
namespace {

using Integers = std::vector<int64_t>;

void require(bool ok, const char* what) {
    if (!ok) throw std::invalid_argument(what);
}

void* pointer(uintptr_t address) { return reinterpret_cast<void*>(address); }

// Every size, stride and mask of a call; only addresses are missing.
class Prepared {
  public:
    Prepared(std::string isa, int type, const Integers& sizes, const Integers& q_stride, const Integers& k_stride, const Integers& v_stride,
             const Integers& out_stride, double scale, double softcap, Integers program, const std::vector<std::tuple<uintptr_t, int64_t>>& operands,
             const std::vector<Integers>& bias, const Integers& sinks, Integers positions, const Integers& pages, double dropout_p)
        : isa_(std::move(isa)), program_(std::move(program)), positions_(std::move(positions)) {
        require(sizes.size() == 7, "sizes must be B, Hq, Hkv, Lq, Lk, D, Dv");
        for (const int64_t n : sizes) require(n >= 0, "sizes must not be negative");
        require(q_stride.size() == 4 && k_stride.size() == 4 && v_stride.size() == 4 && out_stride.size() == 4, "strides must be four each");
        require(type >= 0 && type <= 3, "type must be 0..3");
        require(sinks.empty() || sinks.size() == 2, "sinks must be (type, stride)");
        require(std::isfinite(scale) && std::isfinite(softcap) && softcap >= 0, "scale and softcap must be finite");
        require(dropout_p >= 0 && dropout_p < 1, "0 <= dropout_p < 1");
        B_ = sizes[0], Lq_ = sizes[3], Lk_ = sizes[4];
        require(positions_.size() <= 1 || positions_.size() == static_cast<size_t>(B_), "positions must be one a batch row");
        a_.size = sizeof(Attention);
        a_.q_type = a_.kv_type = static_cast<Type>(type);
        static constexpr float kOne = 1;
        a_.Hq = sizes[1], a_.Hkv = sizes[2], a_.D = sizes[5], a_.Dv = sizes[6];
        for (size_t i = 0; i < 4; ++i) a_.q_stride[i] = q_stride[i], a_.out_stride[i] = out_stride[i];
        if (!pages.empty()) set_pages(pages);
        for (size_t i = 0; i < 3; ++i) a_.k_stride[i] = k_stride[i + 1], a_.v_stride[i] = v_stride[i + 1];
        k_batch_ = k_stride[0], v_batch_ = v_stride[0];
        a_.k_page = k_batch_, a_.v_page = v_batch_;
        a_.lse_stride[0] = a_.Hq * Lq_, a_.lse_stride[1] = Lq_, a_.lse_stride[2] = 1;
        a_.scale = scale, a_.softcap = softcap;
        a_.dropout_below = static_cast<uint64_t>(std::nearbyint(dropout_p * 9007199254740992.0)), a_.dropout_scale = 1 / (1 - dropout_p);
        a_.state_step = B_ * a_.Hq * Lq_;
        for (const auto& [address, count] : operands) operands_.push_back({pointer(address), count});
        a_.program = program_.data(), a_.program_length = static_cast<int64_t>(program_.size());
        a_.operands = operands_.data(), a_.operand_count = static_cast<int64_t>(operands_.size());
        for (const Integers& b : bias) {
            require(b.size() == 7 && b[0] >= 0 && b[0] <= 2 && b[1] >= 0 && b[1] <= 3, "a bias must be (kind, type, 4 strides, reach)");
            bias_.push_back({static_cast<BiasKind>(b[0]), static_cast<Type>(b[1]), nullptr, {b[2], b[3], b[4], b[5]}, b[6]});
        }
        a_.bias_count = static_cast<int64_t>(bias_.size());
        if (!sinks.empty()) a_.sink_type = static_cast<Type>(sinks[0]), a_.sink_stride = sinks[1];
        has_sinks_ = !sinks.empty();
        static constexpr int64_t kBytes[] = {4, 2, 2, 8};
        bytes_ = kBytes[type];
        require(a_.D > 0 && (a_.Hkv == 0 ? a_.Hq == 0 : a_.Hq % a_.Hkv == 0), "D must be positive and Hq a multiple of Hkv");
        if (!program_fits(a_.program, a_.program_length, a_.operand_count)) check(Status::bad_program);
        Attention probe = a_;  // without sequences: asks only whether this build and machine have the instruction set
        if (a_.kv_type != a_.q_type) probe.k_scale = probe.v_scale = &kOne;
        check(attention(probe, isa_.c_str()));
    }

    void run(uintptr_t q, uintptr_t k, uintptr_t v, uintptr_t out, uintptr_t lse, int threads) const {
        go(q, k, v, out, lse, threads, 0, 0, 0, bias_, 0, 0);
    }

    // state: where the rows' states go, or 0. seed: of dropout.
    void run_full(uintptr_t q, uintptr_t k, uintptr_t v, uintptr_t out, uintptr_t lse, int threads, uintptr_t sinks, uintptr_t positions,
                  int64_t position_rows, const std::vector<uintptr_t>& bias, uintptr_t state, int64_t seed) const {
        require((sinks != 0) == has_sinks_, "sinks were prepared otherwise");
        require(bias.size() == bias_.size(), "bias was prepared otherwise");
        require(positions == 0 || position_rows == 1 || position_rows == B_, "positions must have 1 or B rows");
        std::vector<Bias> terms = bias_;
        for (size_t i = 0; i < terms.size(); ++i) terms[i].data = pointer(bias[i]);
        go(q, k, v, out, lse, threads, sinks, positions, position_rows, terms, state, seed);
    }

    // Keys and values on pages. The layout: int32 tables one after the other, and int64 starts (n + 1), lengths (n) and, for
    // a ragged batch, queries (n), with the sizes of all four. `which`: the sequences that run, or none for all. Their tables
    // are checked here: a wrong number would be a wrong address.
    void run_pages(const std::vector<uintptr_t>& tensors, int threads, uintptr_t sinks, const std::vector<uintptr_t>& bias, const std::vector<uintptr_t>& layout,
                   const Integers& sizes, const Integers& which) const {
        require(tensors.size() == 7 && layout.size() == 4 && sizes.size() == 4, "tensors are q, k, v, k_scale, v_scale, out, lse; a layout is tables, starts, lengths, queries");
        const int64_t tables = sizes[0], n = sizes[2];
        require(sizes[1] == n + 1 && (layout[3] == 0 || sizes[3] == n), "a layout has n lengths, n + 1 starts and n queries");
        require(page_size_ > 0 && a_.dropout_below == 0, "the call was prepared without pages, or with dropout");
        require((sinks != 0) == has_sinks_, "sinks were prepared otherwise");
        require(bias.size() == bias_.size(), "bias was prepared otherwise");
        const int32_t* table = static_cast<const int32_t*>(pointer(layout[0]));
        const int64_t* starts = static_cast<const int64_t*>(pointer(layout[1]));
        const int64_t* lengths = static_cast<const int64_t*>(pointer(layout[2]));
        const int64_t* queries = static_cast<const int64_t*>(pointer(layout[3]));
        require(queries != nullptr || n == B_, "sequences must be one a batch row");
        std::vector<Bias> terms = bias_;
        for (size_t i = 0; i < terms.size(); ++i) terms[i].data = pointer(bias[i]);
        std::vector<Sequence> sequences;
        sequences.reserve(static_cast<size_t>(which.empty() ? n : static_cast<int64_t>(which.size())));
        const auto add = [&](int64_t i, int64_t q_first) {
            Sequence s{};
            s.q_first = q_first;
            s.q_count = queries != nullptr ? queries[i] : Lq_;
            s.k_count = lengths[i];
            s.batch = i;
            s.position = s.k_count - s.q_count;
            s.k = pointer(tensors[1]);
            s.v = pointer(tensors[2]);
            require(starts[i] >= 0 && starts[i + 1] >= starts[i] && starts[i + 1] <= tables, "a page table lies outside of the tables");
            const int64_t needed = s.k_count / page_size_ + (s.k_count % page_size_ != 0);
            require(s.k_count >= 0 && needed <= starts[i + 1] - starts[i], "a page table is too short for its sequence");
            require(s.q_count >= 0 && s.q_count <= Lq_ - q_first, "there are more queries than rows");
            require(s.q_count <= s.k_count, "there are more queries than keys");
            s.pages = table + starts[i];
            int32_t low = 0, high = -1;
            for (int64_t p = 0; p < needed; ++p) low = std::min(low, s.pages[p]), high = std::max(high, s.pages[p]);
            require(low >= -1 && high < page_count_, "a page table names a page that does not exist");
            if (s.q_count > 0) sequences.push_back(s);
        };
        int64_t first = 0;
        size_t next = 0;
        for (int64_t i = 0; i < n; ++i) {
            if (which.empty() || (next < which.size() && which[next] == i)) add(i, queries != nullptr ? first : 0), ++next;
            if (queries != nullptr) {
                require(queries[i] >= 0 && queries[i] <= Lq_ - first, "there are more queries than rows");
                first += queries[i];
            }
        }
        require(queries == nullptr || first == Lq_, "there are fewer queries than rows");
        Attention call = a_;
        if (queries != nullptr) call.q_stride[0] = call.out_stride[0] = call.lse_stride[0] = 0;
        call.q = pointer(tensors[0]);
        call.k_scale = static_cast<const float*>(pointer(tensors[3]));
        call.v_scale = static_cast<const float*>(pointer(tensors[4]));
        call.out = pointer(tensors[5]);
        call.lse = pointer(tensors[6]);
        call.sequences = sequences.data();
        call.sequence_count = static_cast<int64_t>(sequences.size());
        call.sinks = pointer(sinks);
        call.bias = terms.data();
        call.threads = threads;
        check(attention(call, isa_.c_str()));
    }

    // Addresses of what the call was given and gave, its gradients' addresses and strides; state (it is then found anew), d_lse,
    // d_sinks and single gradients may be 0. d_bias: (address, 4 strides, wide) of each term.
    void backward(uintptr_t q, uintptr_t k, uintptr_t v, uintptr_t out, uintptr_t state, int threads, uintptr_t sinks, uintptr_t positions,
                  int64_t position_rows, const std::vector<uintptr_t>& bias, int64_t seed, uintptr_t d_out, const Integers& d_out_stride, uintptr_t d_lse,
                  const std::vector<uintptr_t>& to, const std::vector<Integers>& strides, const std::vector<Integers>& d_bias, uintptr_t d_sinks) const {
        require((sinks != 0) == has_sinks_, "sinks were prepared otherwise");
        require(bias.size() == bias_.size() && d_bias.size() == bias_.size(), "bias was prepared otherwise");
        require(positions == 0 || position_rows == 1 || position_rows == B_, "positions must have 1 or B rows");
        require(to.size() == 3 && strides.size() == 3 && d_out_stride.size() == 4, "gradients of q, k and v must be three, strides four each");
        for (const Integers& s : strides) require(s.size() == 4, "strides must be four each");
        std::vector<Bias> terms = bias_;
        std::vector<BiasGradient> gradients;
        for (size_t i = 0; i < terms.size(); ++i) {
            terms[i].data = pointer(bias[i]);
            const Integers& d = d_bias[i];
            require(d.size() == 6, "a bias gradient must be (address, 4 strides, wide)");
            gradients.push_back({pointer(static_cast<uintptr_t>(d[0])), {d[1], d[2], d[3], d[4]}, static_cast<int32_t>(d[5] || a_.q_type == Type::f64)});
        }
        Backward call{};
        call.size = sizeof(Backward);
        call.d_out = pointer(d_out), call.d_lse = pointer(d_lse);
        call.d_q = pointer(to[0]), call.d_k = pointer(to[1]), call.d_v = pointer(to[2]);
        for (size_t i = 0; i < 4; ++i) {
            call.d_out_stride[i] = d_out_stride[i];
            call.d_q_stride[i] = strides[0][i], call.d_k_stride[i] = strides[1][i], call.d_v_stride[i] = strides[2][i];
        }
        call.d_bias = gradients.empty() ? nullptr : gradients.data();
        call.d_sinks = static_cast<double*>(pointer(d_sinks));
        with_call(q, k, v, out, 0, threads, sinks, positions, position_rows, terms, state, seed, [&](const Attention& forward) {
            call.call = forward;
            return qkv::backward(call, isa_.c_str());
        });
    }

  private:
    // page size, number of pages, type of stored keys and values, strides of their scales: page, head, slot
    void set_pages(const Integers& pages) {
        require(pages.size() == 6 && pages[0] > 0 && pages[1] >= 0 && pages[2] >= 0 && pages[2] <= 5, "pages must be (size, count, type, 3 strides of scales)");
        a_.page_size = page_size_ = pages[0];
        page_count_ = pages[1];
        a_.kv_type = static_cast<Type>(pages[2]);
        for (size_t i = 0; i < 3; ++i) a_.scale_stride[i] = pages[i + 3];
    }

    static void check(Status status) {
        switch (status) {
            case Status::ok: return;
            case Status::no_memory: throw std::bad_alloc();
            case Status::bad_program: throw std::invalid_argument("the mask is nested too deeply, or has too many random blocks a row, for the native kernel");
            default: throw std::invalid_argument("the native kernel does not support this call");
        }
    }

    void go(uintptr_t q, uintptr_t k, uintptr_t v, uintptr_t out, uintptr_t lse, int threads, uintptr_t sinks, uintptr_t positions, int64_t position_rows,
            const std::vector<Bias>& bias, uintptr_t state, int64_t seed) const {
        with_call(q, k, v, out, lse, threads, sinks, positions, position_rows, bias, state, seed, [&](const Attention& call) { return attention(call, isa_.c_str()); });
    }

    template <class Run>
    void with_call(uintptr_t q, uintptr_t k, uintptr_t v, uintptr_t out, uintptr_t lse, int threads, uintptr_t sinks, uintptr_t positions,
                   int64_t position_rows, const std::vector<Bias>& bias, uintptr_t state, int64_t seed, Run run) const {
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
            if (positions != 0) s.positions = static_cast<const int64_t*>(pointer(positions)) + (position_rows > 1 ? b * Lq_ : 0);
            s.k = reinterpret_cast<const char*>(k) + b * k_batch_ * bytes_;
            s.v = reinterpret_cast<const char*>(v) + b * v_batch_ * bytes_;
        }
        Attention call = a_;
        call.q = pointer(q);
        call.out = pointer(out);
        call.lse = pointer(lse);
        call.state = pointer(state);
        call.dropout_seed = static_cast<uint64_t>(seed);
        call.sequences = sequences;
        call.sequence_count = Lq_ > 0 ? B_ : 0;
        call.sinks = pointer(sinks);
        call.bias = bias.data();
        call.threads = threads;
        check(run(call));
    }

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
    // Prepared calls live in caches until the interpreter ends, and in the graphs of tensors that do: nothing is leaked.
    nb::set_leak_warnings(false);
    m.doc() = "Native attention kernels (see csrc/attention.h).";
    m.def("instruction_sets", [] { return std::string(qkv::instruction_sets()); }, "Comma-separated, best first.");
    m.def("program_fits", [](const qkv::Integers& words, int64_t operands) {
        return qkv::program_fits(words.data(), static_cast<int64_t>(words.size()), operands);
    });
#ifdef QKV_MUTATE
    m.def("set_mutant", [](int number) { qkv::mutant = number; });
    m.def("mutant_names", [] {
        return std::vector<std::string>{
#define QKV_ENTRY(name, text) #name ": " text,
            QKV_MUTANTS(QKV_ENTRY)
#undef QKV_ENTRY
        };
    });
#endif
    nb::class_<Prepared>(m, "Prepared")
        .def(nb::init<std::string, int, const qkv::Integers&, const qkv::Integers&, const qkv::Integers&, const qkv::Integers&, const qkv::Integers&, double, double,
                      qkv::Integers, const std::vector<std::tuple<uintptr_t, int64_t>>&, const std::vector<qkv::Integers>&, const qkv::Integers&, qkv::Integers,
                      const qkv::Integers&, double>())
        .def("run", &Prepared::run, nb::call_guard<nb::gil_scoped_release>())
        .def("run_pages", &Prepared::run_pages, nb::call_guard<nb::gil_scoped_release>())
        .def("run_full", &Prepared::run_full, nb::call_guard<nb::gil_scoped_release>())
        .def("backward", &Prepared::backward, nb::call_guard<nb::gil_scoped_release>());
}
