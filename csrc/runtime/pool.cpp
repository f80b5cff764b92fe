#include "runtime/pool.h"

#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#include "runtime/openmp.h"
#include "simd/relax.h"

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#define QKV_HAS_FORK 1
#endif

namespace qkv {
namespace {

constexpr int kMaxThreads = 256;
// Long enough to bridge the gap between two calls of a decode loop, short enough not to starve other runtimes.
constexpr int kSpins = 3000;
constexpr uint32_t kClosed = 1u << 31;

struct Worker {
    std::atomic<uint64_t> ticket{0};
    std::atomic<bool> asleep{false};
    std::mutex lock;
    std::condition_variable wake;
};

struct Pool {
    std::atomic_flag owned = ATOMIC_FLAG_INIT;  // set while some thread's job runs
    std::atomic<uint32_t> state{kClosed};       // closed bit, and the number of workers inside the job
    std::atomic<int64_t> next{0};
    Task task = nullptr;
    void* context = nullptr;
    int64_t count = 0;
    int limit = 0;
    std::vector<std::unique_ptr<Worker>> workers;

    void drain(int worker) {
        for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) task(context, i, worker);
    }

    // A worker that wakes late finds the job closed and goes back: the caller never waits for a sleeper.
    bool enter() {
        uint32_t seen = state.load(std::memory_order_acquire);
        while (!(seen & kClosed))
            if (state.compare_exchange_weak(seen, seen + 1, std::memory_order_acquire)) return true;
        return false;
    }

    void loop(Worker& self, int index) {
        uint64_t seen = 0;
        for (;;) {
            for (int spin = 0; self.ticket.load(std::memory_order_acquire) == seen && spin < kSpins; ++spin) relax();
            if (self.ticket.load() == seen) {
                std::unique_lock<std::mutex> guard(self.lock);
                self.asleep.store(true);
                self.wake.wait(guard, [&] { return self.ticket.load() != seen; });
                self.asleep.store(false);
            }
            seen = self.ticket.load();
            if (!enter()) continue;
            if (index < limit) drain(index);
            state.fetch_sub(1, std::memory_order_release);
        }
    }

    void grow(int threads) {
        while (static_cast<int>(workers.size()) + 1 < threads) {
            const int index = static_cast<int>(workers.size()) + 1;
            auto worker = std::make_unique<Worker>();
            try {
                std::thread([this, self = worker.get(), index] { loop(*self, index); }).detach();
            } catch (const std::system_error&) {
                return;  // no more threads to be had: the job runs on those there are
            }
            workers.push_back(std::move(worker));
        }
    }

    void run(int threads, int64_t n, Task function, void* argument) {
        grow(threads);
        task = function;
        context = argument;
        count = n;
        limit = threads;
        next.store(0, std::memory_order_relaxed);
        state.store(0);
        for (int i = 1; i < threads && i <= static_cast<int>(workers.size()); ++i) {
            Worker& worker = *workers[static_cast<size_t>(i) - 1];
            worker.ticket.fetch_add(1);
            if (worker.asleep.load()) {
                std::lock_guard<std::mutex> guard(worker.lock);
                worker.wake.notify_one();
            }
        }
        drain(0);
        state.fetch_or(kClosed, std::memory_order_acq_rel);
        while ((state.load(std::memory_order_acquire) & ~kClosed) != 0) relax();
    }
};

std::atomic<Pool*> the_pool{nullptr};

#ifdef QKV_HAS_FORK
// Told when the library is loaded: a process may be forked before its first call.
[[maybe_unused]] const int child_is_told = pthread_atfork(nullptr, nullptr, [] {
    the_pool.store(nullptr);
    is_child.store(true);
});
#endif

// The pool is never destroyed: its threads may outlive static destruction.
Pool& pool() {
    Pool* found = the_pool.load(std::memory_order_acquire);
    if (found != nullptr) return *found;
    auto made = std::make_unique<Pool>();
    if (the_pool.compare_exchange_strong(found, made.get(), std::memory_order_acq_rel)) {
        return *made.release();
    }
    return *found;
}

}  // namespace

int worker_limit(int threads) { return threads < 1 ? 1 : threads > kMaxThreads ? kMaxThreads : threads; }

void parallel_for(int threads, int64_t count, Task task, void* context) {
    const int team = threads;
    threads = worker_limit(threads);
    if (count < threads) threads = count < 1 ? 1 : static_cast<int>(count);
    if (threads > 1) {
        Pool& shared = pool();
        if (!shared.owned.test_and_set(std::memory_order_acquire)) {
            if (const StartTeam start = openmp())
                TeamJob{task, context, count, threads}.run(start, team);
            else
                shared.run(threads, count, task, context);
            shared.owned.clear(std::memory_order_release);
            return;
        }
    }
    for (int64_t i = 0; i < count; ++i) task(context, i, 0);
}

bool last_of(int32_t* counter) {
    return std::atomic_ref<int32_t>(*counter).fetch_sub(1, std::memory_order_acq_rel) == 1;
}

namespace {
constexpr size_t kKeep = size_t(16) << 20;
struct Scratch {
    void* raw = nullptr;
    size_t size = 0;
    void drop() {
        std::free(raw);
        raw = nullptr;
        size = 0;
    }
    ~Scratch() { drop(); }
};
thread_local Scratch scratch;
}  // namespace

void* scratch_memory(size_t bytes) {
    if (bytes + 64 > scratch.size) {
        scratch.drop();
        scratch.raw = std::malloc(bytes + 64);
        if (scratch.raw == nullptr) return nullptr;
        scratch.size = bytes + 64;
    }
    return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(scratch.raw) + 63) & ~uintptr_t(63));
}

void release_large_scratch() {
    if (scratch.size > kKeep) scratch.drop();
}

}  // namespace qkv
