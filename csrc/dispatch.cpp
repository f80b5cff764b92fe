// Chooses an instruction set at run time and checks what the plain interface can check.
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
    bool (*supported)();
};

const Entry kEntries[] = {
#ifdef QKV_WITH_AVX512BF16
    {"avx512bf16", avx512bf16::run,
     [] {
         return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
     }},
#endif
#ifdef QKV_WITH_AVX512
    {"avx512", avx512::run,
     [] {
         return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                __builtin_cpu_supports("avx512dq");
     }},
#endif
#ifdef QKV_WITH_AVX2
    // Every processor with AVX2 has F16C.
    {"avx2", avx2::run, [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }},
#endif
    {"portable", portable::run, [] { return true; }},
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

Status attention(const Attention& call, const char* instruction_set) {
    if (call.size != sizeof(Attention)) return Status::bad_struct;
    if (call.kv_type != call.q_type || call.k_scale != nullptr || call.v_scale != nullptr || call.dropout_key != 0 || call.row_max != nullptr)
        return Status::unsupported;
    if (call.D < 1 || call.Hkv < 0 || call.Hq < 0 || (call.Hkv > 0 && call.Hq % call.Hkv != 0)) return Status::unsupported;
    for (int64_t i = 0; i < call.sequence_count; ++i)
        if (call.sequences[i].pages != nullptr) return Status::unsupported;
    const bool best = instruction_set == nullptr || instruction_set[0] == 0;
    for (const Entry& entry : kEntries)
        if ((best || std::strcmp(entry.name, instruction_set) == 0) && supported(entry)) {
            if (call.Hkv == 0 || call.Hq == 0 || call.sequence_count == 0) return Status::ok;
            return entry.run(call);
        }
    return Status::unsupported;
}

}  // namespace qkv
