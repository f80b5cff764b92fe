// The threads of the OpenMP runtime that PyTorch has loaded.
//
// After an operator of PyTorch its threads spin for milliseconds, waiting for the next one. A pool of our own would
// have to share the cores with them: a call right after an operator took up to 1.4 times as long.
#pragma once
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstring>

#include "runtime/pool.h"

#if defined(__linux__)
#include <dlfcn.h>
#endif

namespace qkv {

// Runs the first function with its argument on a team of threads, the caller among them (GCC's libgomp, whose entry
// point LLVM's and Intel's runtimes have as well).
using StartTeam = void (*)(void (*)(void*), void*, unsigned, unsigned);

// Whether this is a child process (pool.cpp is told). It has the runtime's books and none of its threads: a team would
// never come together there.
inline std::atomic<bool> is_child{false};

#if defined(__linux__)
// Whether it was one already when this library was loaded: the kernel's flag PF_FORKNOEXEC.
inline bool began_as_child() {
    std::FILE* file = std::fopen("/proc/self/stat", "r");
    if (file == nullptr) return false;
    char text[512];
    text[std::fread(text, 1, sizeof text - 1, file)] = 0;
    std::fclose(file);
    const char* after_name = std::strrchr(text, ')');
    unsigned flags = 0;
    if (after_name == nullptr || std::sscanf(after_name + 1, " %*c %*d %*d %*d %*d %*d %u", &flags) != 1) return false;
    return (flags & 0x40u) != 0;
}

// Null where there is no such runtime. Looked for at the first call: PyTorch, which loads it for all to see, is there
// then.
inline StartTeam openmp() {
    static const StartTeam found =
        began_as_child() ? nullptr : reinterpret_cast<StartTeam>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    return is_child.load(std::memory_order_relaxed) ? nullptr : found;
}
#else
inline StartTeam openmp() { return nullptr; }
#endif

// A job that a team's threads share.
struct TeamJob {
    Task task;
    void* context;
    int64_t count;
    int limit;  // of threads that take part
    std::atomic<int64_t> next{0};
    std::atomic<int> arrived{0};

    // The team has as many threads as the caller's other teams: libgomp ends threads that a smaller one does not need,
    // and the next operator would have to start them again.
    void run(StartTeam start, int threads) {
        start([](void* job) { static_cast<TeamJob*>(job)->take_part(); }, this, static_cast<unsigned>(threads), 0);
    }
    void take_part() {
        const int worker = arrived.fetch_add(1, std::memory_order_relaxed);
        if (worker >= limit) return;
        for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) task(context, i, worker);
    }
};

}  // namespace qkv
