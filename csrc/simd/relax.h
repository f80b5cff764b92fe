// What a thread does between two looks at a number that another is to change.
#pragma once
#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#else
#include <thread>
#endif

namespace qkv {

static inline void relax() {
#if defined(__x86_64__) || defined(_M_X64)
    _mm_pause();
#else
    std::this_thread::yield();
#endif
}

}  // namespace qkv
