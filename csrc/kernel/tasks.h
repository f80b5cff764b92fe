// Runs a method of an object for each index, in parallel.
#pragma once
#include "runtime/pool.h"
#include "simd/simd.h"

namespace qkv {
namespace QKV_ISA {

template <auto Method, class Self>
inline void for_each_task(Self* self, int threads, int64_t count) {
    const auto task = [](void* at, int64_t i, int worker) { (static_cast<Self*>(at)->*Method)(i, worker); };
    parallel_for(threads, count, task, self);
}

}  // namespace QKV_ISA
}  // namespace qkv
