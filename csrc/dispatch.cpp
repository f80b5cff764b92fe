// Chooses an instruction set at run time and checks what the plain interface can check.
#include <cmath>
#include <cstdlib>
#include <cstring>

#include "attention.h"
#include "mutants.h"

namespace qkv {

#ifdef QKV_MUTATE
int mutant = 0;
#endif

#define QKV_DECLARE(isa)                     \
    namespace isa {                          \
    Status run(const Attention& call);       \
    Status run_backward(const Backward& call); \
    }
#ifdef QKV_WITH_AVX512BF16
QKV_DECLARE(avx512bf16)
#endif
#ifdef QKV_WITH_AVX512
QKV_DECLARE(avx512)
#endif
#ifdef QKV_WITH_AVX2
QKV_DECLARE(avx2)
#endif
QKV_DECLARE(portable)
namespace portable {
bool program_fits(const int64_t* words, int64_t length, int64_t operands);
}

namespace {

struct Entry {
    const char* name;
    Status (*run)(const Attention&);
    Status (*run_backward)(const Backward&);
    bool (*supported)();
};

const Entry kEntries[] = {
#ifdef QKV_WITH_AVX512BF16
    {"avx512bf16", avx512bf16::run, avx512bf16::run_backward,
     [] {
         return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
     }},
#endif
#ifdef QKV_WITH_AVX512
    {"avx512", avx512::run, avx512::run_backward,
     [] {
         return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                __builtin_cpu_supports("avx512dq");
     }},
#endif
#ifdef QKV_WITH_AVX2
    // Every processor with AVX2 has F16C.
    {"avx2", avx2::run, avx2::run_backward, [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }},
#endif
    {"portable", portable::run, portable::run_backward, [] { return true; }},
};

bool supported(const Entry& entry) { return entry.supported(); }

}  // namespace

const char* instruction_sets() {
    static char names[128] = "";
    static const bool made = [] {
        for (const Entry& entry : kEntries)
            if (supported(entry)) {
                if (names[0] != 0) std::strcat(names, ",");
                std::strcat(names, entry.name);
            }
        return true;
    }();
    (void)made;
    return names;
}

bool program_fits(const int64_t* words, int64_t length, int64_t operands) { return portable::program_fits(words, length, operands); }

namespace {

Status acceptable(const Attention& call) {
    if (call.size != sizeof(Attention)) return Status::bad_struct;
    if (call.dropout_below > UINT64_C(1) << 53 || (call.dropout_below > 0 && !(call.dropout_scale >= 1 && std::isfinite(call.dropout_scale)))) return Status::unsupported;
    const bool scaled = call.k_scale != nullptr && call.v_scale != nullptr;
    if (call.kv_type == call.q_type ? call.k_scale != nullptr || call.v_scale != nullptr
                                    : !scaled || call.q_type == Type::f64 || (call.kv_type != Type::i8 && call.kv_type != Type::f8))
        return Status::unsupported;
    if (call.D < 1 || call.Hkv < 0 || call.Hq < 0 || (call.Hkv > 0 && call.Hq % call.Hkv != 0)) return Status::unsupported;
    // Scales have strides of pages: scaled keys lie on pages.
    for (int64_t i = 0; i < call.sequence_count; ++i)
        if (call.sequences[i].pages != nullptr ? call.page_size < 1 : scaled) return Status::unsupported;
    return Status::ok;
}

const Entry* find(const char* instruction_set) {
    const bool best = instruction_set == nullptr || instruction_set[0] == 0;
    for (const Entry& entry : kEntries)
        if ((best || std::strcmp(entry.name, instruction_set) == 0) && supported(entry)) return &entry;
    return nullptr;
}

}  // namespace

Status attention(const Attention& call, const char* instruction_set) {
    const Status status = acceptable(call);
    if (status != Status::ok) return status;
    const Entry* entry = find(instruction_set);
    if (entry == nullptr) return Status::unsupported;
    return call.Hkv == 0 || call.Hq == 0 || call.sequence_count == 0 ? Status::ok : entry->run(call);
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
    return call.call.Hkv == 0 || call.call.Hq == 0 || call.call.sequence_count == 0 ? Status::ok : entry->run_backward(call);
}

}  // namespace qkv
