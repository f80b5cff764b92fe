// Chooses an instruction set at run time and checks what the plain interface can check.
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "attention.h"
#include "kernel/kernels.h"
#include "mask/validate.h"
#include "runtime/processor.h"

namespace qkv {

#define QKV_ISA(name, runs) QKV_DECLARE_KERNELS(name)
#include "isas.inc"
#undef QKV_ISA

namespace {

struct Entry {
    const char* name;
    Status (*run)(const Attention&);
    Status (*run_backward)(const Backward&);
    Status (*run_observation)(const Observation&);
    Status (*run_cover)(const Attention&, Cover&);
    Limits (*limits)();
    bool (*supported)();
};

// Best first, for most processors.
const Entry kEntries[] = {
#define QKV_ISA(name, runs) \
    {#name, name::run, name::run_backward, name::run_observation, name::run_cover, name::limits, [] { return runs; }},
#include "isas.inc"
#undef QKV_ISA
};

constexpr int kCount = sizeof kEntries / sizeof *kEntries;

// Whether elements that are widened are multiplied faster than pairs. Intel's cores take four times as long for
// VDPBF16PS as for a fused product of floats (measured on Emerald Rapids), so twice as long for the same sum.
bool pairs_are_slow() {
#if defined(__x86_64__) && defined(__GNUC__)
    return __builtin_cpu_is("intel");
#else
    return false;
#endif
}

// What this processor runs, best first.
struct Order {
    const Entry* entries[kCount];
    int count = 0;
    Order() {
        for (const Entry& entry : kEntries)
            if (entry.supported()) entries[count++] = &entry;
        if (count < 2 || !pairs_are_slow()) return;
        const Limits first = entries[0]->limits(), second = entries[1]->limits();
        if (first.pairs && first.tile_rows == second.tile_rows) std::swap(entries[0], entries[1]);  // as wide without
    }
};
const Order& order() {
    static const Order made;
    return made;
}

}  // namespace

const char* instruction_sets() {
    static char names[128] = "";
    static const bool made = [] {
        for (int i = 0; i < order().count; ++i) {
            if (i > 0) std::strcat(names, ",");
            std::strcat(names, order().entries[i]->name);
        }
        return true;
    }();
    (void)made;
    return names;
}

namespace {

Status acceptable(const Attention& call) {
    if (call.size != sizeof(Attention)) return Status::bad_struct;
    if (call.dropout_below > UINT64_C(1) << 53 ||
        (call.dropout_below > 0 && !(call.dropout_scale >= 1 && std::isfinite(call.dropout_scale))))
        return Status::unsupported;
    const bool scaled = call.k_scale != nullptr && call.v_scale != nullptr;
    if (call.kv_type == call.q_type
            ? call.k_scale != nullptr || call.v_scale != nullptr
            : !scaled || call.q_type == Type::f64 || (call.kv_type != Type::i8 && call.kv_type != Type::f8))
        return Status::unsupported;
    if (call.D < 1 || call.Hkv < 0 || call.Hq < 0 || (call.Hkv > 0 && call.Hq % call.Hkv != 0))
        return Status::unsupported;
    // Scales have strides of pages: scaled keys lie on pages.
    for (int64_t i = 0; i < call.sequence_count; ++i)
        if (call.sequences[i].pages != nullptr ? call.page_size < 1 : scaled) return Status::unsupported;
    return Status::ok;
}

bool empty(const Attention& call) { return call.Hkv == 0 || call.Hq == 0 || call.sequence_count == 0; }

const Entry* find(const char* instruction_set) {
    const bool best = instruction_set == nullptr || instruction_set[0] == 0;
    for (int i = 0; i < order().count; ++i)
        if (best || std::strcmp(order().entries[i]->name, instruction_set) == 0) return order().entries[i];
    return nullptr;
}

}  // namespace

Status limits(const char* instruction_set, Limits& to) {
    const Entry* entry = find(instruction_set);
    if (entry == nullptr) return Status::unsupported;
    to = entry->limits();
    return Status::ok;
}

Status attention(const Attention& call, const char* instruction_set) {
    const Status status = acceptable(call);
    if (status != Status::ok) return status;
    const Entry* entry = find(instruction_set);
    if (entry == nullptr) return Status::unsupported;
    if (empty(call)) return Status::ok;
    return program_runs(call) ? entry->run(call) : Status::bad_program;
}

Status cover(const Attention& call, const char* instruction_set, Cover& to) {
    const Entry* entry = find(instruction_set);
    if (call.size != sizeof(Attention) || entry == nullptr) return Status::unsupported;
    if (empty(call)) return Status::ok;
    return program_runs(call) ? entry->run_cover(call, to) : Status::bad_program;
}

Status backward(const Backward& call, const char* instruction_set) {
    if (call.size != sizeof(Backward)) return Status::bad_struct;
    const Status status = acceptable(call.call);
    if (status != Status::ok) return status;
    for (int64_t i = 0; i < call.call.sequence_count; ++i)
        if (call.call.sequences[i].pages != nullptr) return Status::unsupported;
    if (call.d_out == nullptr || call.call.out == nullptr) return Status::unsupported;
    const Entry* entry = find(instruction_set);
    if (entry == nullptr) return Status::unsupported;
    if (empty(call.call)) return Status::ok;
    if (call.call.bias_count > entry->limits().terms) return Status::unsupported;
    return program_runs(call.call) ? entry->run_backward(call) : Status::bad_program;
}

Status observe(const Observation& call, const char* instruction_set) {
    if (call.size != sizeof(Observation)) return Status::bad_struct;
    const Status status = acceptable(call.call);
    if (status != Status::ok) return status;
    if (call.top < 0 || call.top > kMostTop ||
        (call.top > 0 && (call.top_keys == nullptr || call.top_weights == nullptr)))
        return Status::unsupported;
    if (call.map != nullptr && (call.rows < 1 || call.columns < 1)) return Status::unsupported;
    const Entry* entry = find(instruction_set);
    if (entry == nullptr) return Status::unsupported;
    if (empty(call.call)) return Status::ok;
    return program_runs(call.call) ? entry->run_observation(call) : Status::bad_program;
}

}  // namespace qkv
