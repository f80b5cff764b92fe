// Threads for tasks: PyTorch's, where its OpenMP runtime can be found, else a small pool, whose threads start on first
// use. They never nest, and a child of fork has a pool of its own.
#pragma once
#include <cstddef>
#include <cstdint>

namespace qkv {

using Task = void (*)(void* context, int64_t index, int worker);

// Calls task(context, i, worker) once for each i in [0, count), on at most `threads` threads, the caller among them.
// Tasks start in order of i. Runs on the caller alone when the pool is in use by another thread.
void parallel_for(int threads, int64_t count, Task task, void* context);

// Upper bound of `worker` + 1 that parallel_for will use for this number of threads.
int worker_limit(int threads);

// Counts down; true for the caller that reaches zero, who then sees what the others wrote.
bool last_of(int32_t* counter);

// Memory of the calling thread, aligned to 64 bytes, valid until its next call; null when there is none. Small requests
// are kept for the next call, since fresh pages cost more than a short attention call.
void* scratch_memory(size_t bytes);
void release_large_scratch();

}  // namespace qkv
