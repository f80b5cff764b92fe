// What this processor has, by the names of isas.def: for processors whose compilers cannot be asked to find out
// (__builtin_cpu_supports is x86's).
#pragma once
#include <cstddef>
#include <cstring>

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace qkv {

// Anything this does not know of is not there.
inline bool processor_has([[maybe_unused]] const char* feature) {
#if defined(__aarch64__) && defined(__linux__)
    // asm/hwcap.h; older ones do not have all names.
    if (std::strcmp(feature, "simd") == 0) return (getauxval(AT_HWCAP) >> 1 & 1) != 0;
    if (std::strcmp(feature, "bf16") == 0) return (getauxval(AT_HWCAP2) >> 14 & 1) != 0;
#elif defined(__aarch64__) && defined(__APPLE__)
    if (std::strcmp(feature, "simd") == 0) return true;  // all have it
    int has = 0;
    size_t size = sizeof has;
    if (std::strcmp(feature, "bf16") == 0)
        return sysctlbyname("hw.optional.arm.FEAT_BF16", &has, &size, nullptr, 0) == 0 && has != 0;
#endif
    return false;
}

}  // namespace qkv
