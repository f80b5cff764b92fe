// Runs the native kernels on random calls, malformed mask programs, many threads and forks; meant for sanitizer builds.
//
//   stress [--seconds 60] [--seed N] [--mode calls|gradients|looks|fuzz|mutate|nest|threads|fork] [--isa NAME]
//          [--failures 20] [--strict 1]
//   stress --cases N             so many, dealt to the modes by their shares, instead of for a time
//   stress --mutant N            with one of the mistakes of tests/kit/native_mutants.py, where they are compiled in
//   stress --mode M --case N     replays one case
//
// Cases run in child processes: a crash, a hang or a wrong result is reported with its case number, and the run goes
// on.
#include <signal.h>
#include <sys/wait.h>

#include <atomic>
#include <chrono>

#include "gradients.h"
#include "looks.h"
#include "pages.h"

extern "C" {
// Clean allocations hold NaN; a fork after threads is what one of the modes is for.
__attribute__((visibility("default"))) const char* __asan_default_options() {
    return "max_malloc_fill_size=1073741824:malloc_fill_byte=255:detect_stack_use_after_return=0";
}
__attribute__((visibility("default"))) const char* __ubsan_default_options() { return "print_stacktrace=1"; }
__attribute__((visibility("default"))) const char* __tsan_default_options() {
    return "die_after_fork=0:halt_on_error=1:exitcode=66";
}

// Called by the kernels of the AddressSanitizer build for each array they cut from their scratch memory.
#if defined(QKV_STRESS_MUTANTS)
extern int qkv_mutant;
#endif

void* qkv_stress_gap(void* at, long bytes);
void* qkv_stress_gap(void* at, long bytes) {
#if defined(__SANITIZE_ADDRESS__)
    const size_t whole = (static_cast<size_t>(bytes) + 63) / 64 * 64;
    ASAN_UNPOISON_MEMORY_REGION(at, whole);
    ASAN_POISON_MEMORY_REGION(static_cast<char*>(at) + bytes, whole - static_cast<size_t>(bytes) + 64);
#else
    (void)bytes;
#endif
    return at;
}
}

namespace stress {
namespace {

struct Options {
    double seconds = 60, budget = 4e6;
    uint64_t seed = 0;
    std::string mode, isa;
    int64_t only = -1, cases = 0;
    int failures = 20;
    bool strict = false;
};

// Shared with the parent: where a child is.
struct Progress {
    std::atomic<uint64_t> number, calls, programs, accepted, refused, loose;
    std::atomic<double> loosest;
};
Progress* progress;
Options options;

uint64_t case_seed(const std::string& mode, uint64_t number) {
    uint64_t x = number;
    for (const char letter : mode) x = x * 131 + static_cast<uint64_t>(letter);
    return x;
}

// Checks the result. An error beyond the rule that the length of the sums explains is counted, and fails only if
// --strict.
std::string verdict(const Call& c) {
    double loose = 0;
    const std::string fault = check(c, loose);
    if (loose > 0) {
        ++progress->loose;
        if (loose > progress->loosest) progress->loosest = loose;
        if (options.strict && fault.empty()) return "an error is " + std::to_string(loose) + " times its bound";
    }
    return fault;
}

std::string fault_of(const Call& c, const std::string& what) { return what + "\n  " + describe(c); }

// One call: checked, and now and then repeated on another number of threads, which must give the same bits.
std::string one_call(Random& random, double budget) {
    Call c;
    make_call(random, c, budget, options.isa);
    if (random.chance(0.45)) put_on_pages(random, c);
    soil_scratch();
    qkv::Status status = qkv::Status::ok;
    if (random.chance(0.3)) {
        std::thread([&] { status = run(c); }).join();  // its scratch memory is fresh, and of the exact size
    } else {
        status = run(c);
    }
    ++progress->calls;
    if (status != qkv::Status::ok) {
        if (status == qkv::Status::bad_program && c.a.program_length > 40) return "";  // may be nested too deeply
        return fault_of(c, "status " + std::to_string(static_cast<int>(status)));
    }
    std::string fault = verdict(c);
    if (!fault.empty()) return fault_of(c, fault);
    if (random.chance(0.3)) {
        const std::string before(c.out.slab->data(), c.out.slab->size());
        c.a.threads = c.a.threads % 4 + 1;
        run(c);
        if (std::memcmp(before.data(), c.out.slab->data(), before.size()) != 0)
            return fault_of(c, "the bits depend on the number of threads");
    }
    return "";
}

// One call's gradients: checked, and repeated on another number of threads, which must give the same bits.
std::string gradients(Random& random) {
    Call c;
    do {
        c = Call{};
        make_call(random, c, options.budget / 8, options.isa);
    } while (!c.lse.slab || !c.out.extent);
    if (run(c) != qkv::Status::ok) return "";
    Adjoint x;
    make_adjoint(random, c, x);
    soil_scratch();
    const auto backward = [&] {
#if defined(__SANITIZE_ADDRESS__)
        open_scratch(2048);
#endif
        return qkv::backward(x.b, c.isa.c_str());
    };
    const qkv::Status status = backward();
    ++progress->calls;
    if (status != qkv::Status::ok) return fault_of(c, "backward: status " + std::to_string(static_cast<int>(status)));
    if (c.poisoned) return "";  // what is not finite is the gate's: here it must only do no harm
    const std::string fault = compare_gradients(c, x);
    if (!fault.empty()) return fault_of(c, fault);
    const auto bits = [&] {
        std::string all;
        for (const Array* a : {&x.d_q, &x.d_k, &x.d_v}) all.append(a->slab->data(), a->slab->size());
        for (const auto& d : x.d_bias) all.append(reinterpret_cast<const char*>(d.data()), d.size() * sizeof(double));
        return all.append(reinterpret_cast<const char*>(x.d_sinks.data()), x.d_sinks.size() * sizeof(double));
    };
    const std::string before = bits();
    for (auto& d : x.d_bias) std::fill(d.begin(), d.end(), 0.0);
    x.b.call.threads = c.a.threads % 4 + 1;
    backward();
    return before == bits() ? "" : fault_of(c, "the bits of gradients depend on the number of threads");
}

// What a call's weights come to: checked, and repeated on another number of threads, which must give the same bits. The
// output has to be that of the call unobserved.
std::string looks(Random& random) {
    Call c;
    do {
        c = Call{};
        make_call(random, c, options.budget, options.isa);
    } while (!c.lse.slab || !c.out.extent);
    if (random.chance(0.45)) put_on_pages(random, c);
    if (run(c) != qkv::Status::ok) return "";
    const std::string unobserved(c.out.slab->data(), c.out.slab->size());
    Look x;
    make_look(random, c, x);
    const auto look = [&] {
        soil_scratch();
        for (const auto& slab : {x.mass, x.map}) std::memset(slab->data(), 0, slab->size());
        const qkv::Status status = run(c);
        soil_scratch();
#if defined(__SANITIZE_ADDRESS__)
        open_scratch(2048);
#endif
        return status == qkv::Status::ok ? qkv::observe(x.o, c.isa.c_str()) : status;
    };
    const qkv::Status status = look();
    ++progress->calls;
    if (status != qkv::Status::ok) return fault_of(c, "observe: status " + std::to_string(static_cast<int>(status)));
    const int64_t n = bytes_of(c.type);
    for (int64_t e = 0; e < c.out.extent; ++e) {
        const char *was = unobserved.data() + e * n, *is = c.out.at(e);
        const double a = decode(c.type, was), b = decode(c.type, is);
        if (std::memcmp(was, is, static_cast<size_t>(n)) != 0 && (a == a || b == b))  // one NaN is as good as another
            return fault_of(c, "looking at a call changes its bits");
    }
    if (!c.poisoned)  // what is not finite is the gate's: here it must only do no harm
        if (const std::string fault = LookJudge(c, x).fault(); !fault.empty()) return fault_of(c, fault);
    const std::string before = bits_of(x);
    c.a.threads = x.o.call.threads = c.a.threads % 4 + 1;
    look();
    return before == bits_of(x) ? "" : fault_of(c, "the bits of statistics depend on the number of threads");
}

int64_t odd_word(Random& random) {
    if (random.chance(0.4)) return random.in(-3, 20);
    // clang-format off
    return random.pick<int64_t>({0, 1, -1, -2, 2, 11, 63, 64, 65, 96, 97, 1 << 20, INT64_C(1) << 31, INT64_C(1) << 32,
                                 INT64_C(1) << 60, INT64_MAX, INT64_MAX - 1, INT64_MIN, INT64_MIN + 1,
                                 -(INT64_C(1) << 40), static_cast<int64_t>(random.word())});
    // clang-format on
}

// Random words through program_fits, many to a case, each ending at an unreadable page.
std::string fuzz(Random& random) {
    constexpr int64_t kMost = 48;
    Slab slab(kMost * 8, Guard::after, 0);
    for (int n = 0; n < 20000; ++n) {
        const int64_t length = random.in(0, kMost);
        std::vector<int64_t> words(static_cast<size_t>(length));
        for (auto& w : words) w = random.chance(0.6) ? random.in(-1, 18) : odd_word(random);
        if (random.chance(0.3) && length > 2) words[0] = qkv::kMaskPerHead;
        char* at = slab.data() + (kMost - length) * 8;
        if (length > 0) std::memcpy(at, words.data(), static_cast<size_t>(length) * 8);
        const bool fits = qkv::program_fits(reinterpret_cast<const int64_t*>(at), length, random.in(-1, 4));
        ++(fits ? progress->accepted : progress->refused);
        ++progress->programs;
    }
    return "";
}

// A good program with some words changed: it must be refused or run without harm. Memory is what a good program needs.
std::string mutate(Random& random) {
    Call c;
    do {
        c = Call{};
        make_call(random, c, 2e5, options.isa);
    } while (!c.has_mask);
    lower_mask(c, Guard::heap, true);
    const std::vector<int64_t> good = c.lowered.words;
    for (int n = 0; n < 20; ++n) {
        std::vector<int64_t> words = good;
        if (n == 0) words = {random.in(0, 17), odd_word(random), odd_word(random), odd_word(random)};
        if (random.chance(0.2)) words.resize(static_cast<size_t>(random.in(0, static_cast<int64_t>(words.size()))));
        for (int64_t changes = random.in(0, 3); changes > 0 && !words.empty(); --changes)
            words[static_cast<size_t>(random.in(0, static_cast<int64_t>(words.size()) - 1))] = odd_word(random);
        if (random.chance(0.2)) words.insert(words.end(), good.begin(), good.end());
        Slab slab(static_cast<int64_t>(words.size()) * 8, random_guard(random), 0);
        if (!words.empty()) std::memcpy(slab.data(), words.data(), slab.size());
        c.a.program = reinterpret_cast<const int64_t*>(slab.data());
        c.a.program_length = static_cast<int64_t>(words.size());
        if (options.only >= 0) std::fprintf(stderr, "  %s\n", describe(c).c_str());
        const bool fits = qkv::program_fits(c.a.program, c.a.program_length, c.a.operand_count);
        ++progress->programs;
        ++(fits ? progress->accepted : progress->refused);
        const qkv::Status status = run(c);
        const bool may_run = c.z.Hq > 0 && c.a.sequence_count > 0;
        if (may_run && !fits && status != qkv::Status::bad_program)
            return fault_of(c, "a program that does not fit was run");
    }
    return "";
}

// Programs that are deep or long.
std::string nest(Random& random) {
    const int64_t depth = random.pick<int64_t>({1, 5, 11, 12, 13, 100, 10000, 1000000});
    std::vector<int64_t> words;
    const int64_t kind = random.in(0, 5);
    if (kind == 0) {  // one head in another
        for (int64_t d = 0; d < depth; ++d) words.insert(words.end(), {qkv::kMaskPerHead, 1, 3 * (depth - d - 1) + 1});
        words.push_back(qkv::kMaskAll);
    } else if (kind == 1) {  // NOT of NOT
        words.push_back(qkv::kMaskAll);
        words.insert(words.end(), static_cast<size_t>(depth), qkv::kMaskNot);
    } else if (kind == 2) {  // a deep stack
        words.insert(words.end(), static_cast<size_t>(depth), qkv::kMaskAll);
        words.insert(words.end(), static_cast<size_t>(depth - 1), qkv::kMaskAnd);
    } else if (kind == 3) {  // a long list on a flat stack
        words.push_back(qkv::kMaskAll);
        for (int64_t d = 0; d < std::min<int64_t>(depth, 10000); ++d)
            words.insert(words.end(), {qkv::kMaskWindow, d, 0, qkv::kMaskOr});
    } else if (kind == 4) {  // one portion in another
        for (int64_t d = 0; d < depth; ++d)
            words.insert(words.end(), {qkv::kMaskPortion, 1, 1, 1 << 20, 1 << 20, 6 * (depth - d - 1) + 1});
        words.push_back(qkv::kMaskAll);
    } else {  // many heads, or more than there are words for
        words = {qkv::kMaskPerHead, depth + random.in(0, 1)};
        for (int64_t d = 0; d < depth; ++d) words.insert(words.end(), {1, qkv::kMaskAll});
    }
    Slab slab(static_cast<int64_t>(words.size()) * 8, random_guard(random), 0);
    std::memcpy(slab.data(), words.data(), slab.size());
    Call c;
    do {
        c = Call{};
        make_call(random, c, 2e4, options.isa);
    } while (c.z.Hq == 0);
    c.has_mask = true;
    c.a.program = reinterpret_cast<const int64_t*>(slab.data());
    c.a.program_length = static_cast<int64_t>(words.size());
    const bool fits = qkv::program_fits(c.a.program, c.a.program_length, 0);
    const qkv::Status status = run(c);
    ++progress->programs;
    ++(fits ? progress->accepted : progress->refused);
    if (!fits && status == qkv::Status::ok) return fault_of(c, "a program that does not fit was run");
    return "";
}

// Eight threads call at once, each on its own number of workers.
std::string threads(Random& random) {
    std::string faults[8];
    std::vector<std::thread> crowd;
    for (int t = 0; t < 8; ++t) {
        const uint64_t seed = random.word();
        crowd.emplace_back([&, t, seed] {
            Random own(seed);
            for (int n = 0; n < 6 && faults[t].empty(); ++n) {
                Call c;
                make_call(own, c, 4e5, options.isa);
                c.a.threads = 1 + (t + n) % 4;
                if (run(c) != qkv::Status::ok) continue;
                const std::string fault = verdict(c);
                if (!fault.empty()) faults[t] = fault_of(c, fault);
            }
        });
    }
    for (auto& thread : crowd) thread.join();
    progress->calls += 48;
    for (const std::string& fault : faults)
        if (!fault.empty()) return fault;
    return "";
}

// A fork after use, sometimes while another thread is inside a call: the child has no workers and must start its own.
std::string forks(Random& random) {
    Call c;
    do {
        c = Call{};
        make_call(random, c, 2e6, options.isa);
    } while (c.z.Hq == 0);
    c.a.threads = 4;
    std::atomic<bool> stop{false};
    std::thread busy;
    if (random.chance(0.5)) {
        auto other = std::make_shared<Call>();
        make_call(random, *other, 4e5, options.isa);
        busy = std::thread([other, &stop] {
            while (!stop) run(*other);
        });
    }
    std::string fault;
    for (int n = 0; n < 3 && fault.empty(); ++n) {
        const qkv::Status first = run(c);
        const pid_t child = fork();
        if (child == 0) {
            alarm(30);
            c.a.threads = 3;
            const qkv::Status status = run(c);
            const std::string own = status == qkv::Status::ok ? verdict(c) : "";
            if (!own.empty()) std::fprintf(stderr, "in the child of a fork: %s\n", own.c_str());
            _exit(status != first || !own.empty() ? 3 : 0);
        }
        int state = 0;
        waitpid(child, &state, 0);
        if (!WIFEXITED(state) || WEXITSTATUS(state) != 0)
            fault = WIFSIGNALED(state) ? "the child of a fork ended by signal " + std::to_string(WTERMSIG(state))
                                       : "the child of a fork ended with " + std::to_string(WEXITSTATUS(state));
        progress->calls += 2;
    }
    stop = true;
    if (busy.joinable()) busy.join();
    return fault.empty() ? "" : fault_of(c, fault);
}

// A hang is told from a slow case by the clock alone. Under ThreadSanitizer one that takes 3 seconds of a processor was
// taken for a hang where six other programs shared two of them.
#if defined(__SANITIZE_THREAD__)
constexpr unsigned kPatience = 4;
#else
constexpr unsigned kPatience = 1;
#endif

struct Mode {
    const char* name;
    std::string (*run)(Random&);
    double share;    // of the time
    unsigned limit;  // seconds a case may take, times kPatience
};
const Mode kModes[] = {
    {"calls", [](Random& random) { return one_call(random, options.budget); }, 0.3, 120},
    {"gradients", gradients, 0.13, 120},
    {"looks", looks, 0.12, 120},
    {"fuzz", fuzz, 0.08, 60},
    {"mutate", mutate, 0.15, 30},
    {"nest", nest, 0.03, 60},
    {"threads", threads, 0.11, 180},
    {"fork", forks, 0.08, 120},
};

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// Where a slice of one mode ends: in time, or before a case.
struct End {
    double time;
    uint64_t number;
    bool reached(uint64_t next) const { return now() >= time || next >= number || options.only >= 0; }
};

// Runs cases from progress->number on until the end; returns the exit status of the child.
int work(const Mode& mode, const End& end) {
    do {
        alarm(kPatience * mode.limit);
        Random random(case_seed(mode.name, progress->number));
        const std::string fault = mode.run(random);
        if (!fault.empty()) {
            std::fprintf(stderr, "%s\n", fault.c_str());
            return 3;
        }
        ++progress->number;
    } while (!end.reached(progress->number));
    return 0;
}

// A slice of one mode in children. Returns the number of failures.
int slice(const Mode& mode, uint64_t& number, const End& end) {
    int failures = 0;
    do {
        progress->number = number;
        std::fflush(nullptr);
        const pid_t child = fork();
        if (child == 0) _exit(work(mode, end));
        int state = 0;
        waitpid(child, &state, 0);
        number = progress->number + 1;
        if (WIFEXITED(state) && WEXITSTATUS(state) == 0) break;
        ++failures;
        const int code = WIFSIGNALED(state) ? WTERMSIG(state) : WEXITSTATUS(state);
        std::fprintf(stderr, "FAILED (%s %d%s): --mode %s --case %llu\n", WIFSIGNALED(state) ? "signal" : "exit", code,
                     WIFSIGNALED(state) && code == SIGALRM ? ", hung" : "", mode.name,
                     static_cast<unsigned long long>(progress->number.load()));
    } while (!end.reached(number) && failures < options.failures);
    return failures;
}

// Takes the options; false for one that is not known.
bool take_options(int argc, char** argv) {
    options.seed = static_cast<uint64_t>(std::chrono::system_clock::now().time_since_epoch().count()) % 1000000;
    for (int i = 1; i + 1 < argc; i += 2) {
        const std::string name = argv[i], value = argv[i + 1];
        if (name == "--seconds")
            options.seconds = std::stod(value);
        else if (name == "--seed")
            options.seed = std::stoull(value);
        else if (name == "--mode")
            options.mode = value;
        else if (name == "--isa")
            options.isa = value;
        else if (name == "--case")
            options.only = std::stoll(value);
        else if (name == "--strict")
            options.strict = value != "0";
        else if (name == "--failures")
            options.failures = std::stoi(value);
        else if (name == "--cases")
            options.cases = std::stoll(value);
        else if (name == "--budget")
            options.budget = std::stod(value);
#if defined(QKV_STRESS_MUTANTS)
        else if (name == "--mutant")
            qkv_mutant = std::stoi(value);
#endif
        else
            return std::fprintf(stderr, "unknown option %s\n", argv[i]), false;
    }
    return true;
}

int stress(int argc, char** argv) {
    if (!take_options(argc, argv)) return 2;
    progress = static_cast<Progress*>(
        mmap(nullptr, sizeof(Progress), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
    if (progress == MAP_FAILED) return 2;
    std::printf("seed %llu, instruction sets %s\n", static_cast<unsigned long long>(options.seed),
                qkv::instruction_sets());
    int failures = 0, known = 0;
    const double start = now();
    for (const Mode& mode : kModes) {
        if (!options.mode.empty() && options.mode != mode.name) continue;
        ++known;
#if defined(__SANITIZE_THREAD__)
        // ThreadSanitizer does not follow threads that start after the fork of a process with threads.
        if (std::strcmp(mode.name, "fork") == 0) {
            std::printf("fork      left out under ThreadSanitizer\n");
            continue;
        }
#endif
        const uint64_t first = options.only >= 0 ? static_cast<uint64_t>(options.only) : options.seed * 1000000;
        uint64_t number = first;
        const double before = now();
        const double share = options.mode.empty() ? mode.share : 1;
        const double cases = std::ceil(static_cast<double>(options.cases) * share);
        const End end = options.cases > 0 ? End{INFINITY, first + static_cast<uint64_t>(cases)}
                                          : End{before + options.seconds * share, UINT64_MAX};
        const int failed = slice(mode, number, end);
        std::printf("%-9s %8llu cases, %d failed, %.1f s\n", mode.name,
                    static_cast<unsigned long long>(number - first - 1 + (failed > 0)), failed, now() - before);
        failures += failed;
        if (failures >= options.failures) break;
    }
    if (known == 0) return std::fprintf(stderr, "no mode %s\n", options.mode.c_str()), 2;
    std::printf("%llu calls, %llu programs (%llu accepted), %d failures, %.1f s\n",
                static_cast<unsigned long long>(progress->calls.load()),
                static_cast<unsigned long long>(progress->programs.load()),
                static_cast<unsigned long long>(progress->accepted.load()), failures, now() - start);
    if (progress->loose > 0)
        std::printf("%llu calls with an error beyond the rule, by the length of their sums: at most %.2f times\n",
                    static_cast<unsigned long long>(progress->loose.load()), progress->loosest.load());
    return failures > 0;
}

}  // namespace
}  // namespace stress

int main(int argc, char** argv) { return stress::stress(argc, argv); }
