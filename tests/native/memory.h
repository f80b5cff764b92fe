// Random numbers, numbers of every type, and memory whose every wrong byte is noticed.
#pragma once
#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "attention.h"

namespace stress {

using qkv::Type;

// splitmix64: the same numbers on every machine, so that a seed replays its case anywhere.
class Random {
  public:
    explicit Random(uint64_t seed) : state_(seed * 0x9E3779B97F4A7C15u + 0x1234567) {}
    uint64_t word() {
        uint64_t x = state_ += 0x9E3779B97F4A7C15u;
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;
        x = (x ^ x >> 27) * 0x94D049BB133111EBu;
        return x ^ x >> 31;
    }
    int64_t in(int64_t lo, int64_t hi) {
        return lo + static_cast<int64_t>(word() % static_cast<uint64_t>(hi - lo + 1));
    }
    double unit() { return static_cast<double>(word() >> 11) * 0x1p-53; }
    bool chance(double p) { return unit() < p; }
    double normal() { return (unit() + unit() + unit() + unit() + unit() + unit() - 3) * 1.4142135623730951; }
    template <class T>
    T pick(std::initializer_list<T> from) {
        return from.begin()[in(0, static_cast<int64_t>(from.size()) - 1)];
    }

  private:
    uint64_t state_;
};

inline int64_t bytes_of(Type type) {
    return type == Type::f64 ? 8 : type == Type::f32 ? 4 : type == Type::i8 || type == Type::f8 ? 1 : 2;
}

inline double decode(Type type, const void* at) {
    if (type == Type::f64) {
        double x;
        std::memcpy(&x, at, 8);
        return x;
    }
    if (type == Type::f32) {
        float x;
        std::memcpy(&x, at, 4);
        return x;
    }
    if (type == Type::i8 || type == Type::f8) {
        signed char byte;
        std::memcpy(&byte, at, 1);
        if (type == Type::i8) return byte;
        const int exponent = byte >> 3 & 15, fraction = byte & 7;
        const double size = (byte & 127) == 127 ? std::nan("")
                            : exponent == 0     ? std::ldexp(fraction, -9)
                                                : std::ldexp(8 + fraction, exponent - 10);
        return byte < 0 ? -size : size;
    }
    uint16_t half;
    std::memcpy(&half, at, 2);
    if (type == Type::bf16) {
        const uint32_t word = static_cast<uint32_t>(half) << 16;
        float x;
        std::memcpy(&x, &word, 4);
        return x;
    }
    const int exponent = half >> 10 & 31, fraction = half & 1023;
    const double size = exponent == 31  ? (fraction ? std::nan("") : INFINITY)
                        : exponent == 0 ? std::ldexp(fraction, -24)
                                        : std::ldexp(1024 + fraction, exponent - 25);
    return half >> 15 ? -size : size;
}

// Towards zero: inputs only need to be numbers of the type, not the nearest ones.
inline void encode(Type type, double x, void* at) {
    if (type == Type::f64) {
        std::memcpy(at, &x, 8);
        return;
    }
    const float f = static_cast<float>(x);
    if (type == Type::f32) {
        std::memcpy(at, &f, 4);
        return;
    }
    uint16_t half;
    if (type == Type::bf16) {
        uint32_t word;
        std::memcpy(&word, &f, 4);
        half = static_cast<uint16_t>(word >> 16 | (f != f ? 0x40u : 0u));
    } else if (f != f) {
        half = 0x7e00;
    } else {
        const double size = std::fabs(x);
        int exponent = 0;
        std::frexp(size, &exponent);
        if (size >= 65536) {
            half = 0x7c00;
        } else if (size < 0x1p-14) {
            half = static_cast<uint16_t>(std::ldexp(size, 24));
        } else {
            half = static_cast<uint16_t>((exponent + 14) << 10 |
                                         (static_cast<int>(std::ldexp(size, 11 - exponent)) & 1023));
        }
        if (std::signbit(x)) half |= 0x8000;
    }
    std::memcpy(at, &half, 2);
}

// Exactly so many bytes: on the heap (AddressSanitizer guards both ends), or against an unreadable page at one end,
// which also stops masked loads and prefetched arithmetic that no compiler instruments.
enum class Guard { heap, after, before };

class Slab {
  public:
    Slab(int64_t bytes, Guard guard, int fill) : bytes_(static_cast<size_t>(bytes)) {
        if (guard == Guard::heap) {
            data_ = static_cast<char*>(std::malloc(bytes_));
            if (data_ == nullptr && bytes_ > 0) std::abort();
        } else {
            const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE)), body = (bytes_ + page - 1) / page * page;
            mapped_ = body + 2 * page;
            map_ = static_cast<char*>(mmap(nullptr, mapped_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
            if (map_ == MAP_FAILED || (body > 0 && mprotect(map_ + page, body, PROT_READ | PROT_WRITE) != 0))
                std::abort();
            data_ = guard == Guard::before ? map_ + page : map_ + page + body - bytes_;
        }
        if (bytes_ > 0) std::memset(data_, fill, bytes_);
    }
    Slab(const Slab&) = delete;
    Slab& operator=(const Slab&) = delete;
    ~Slab() {
        if (map_ != nullptr)
            munmap(map_, mapped_);
        else
            std::free(data_);
    }
    char* data() const { return data_; }
    size_t size() const { return bytes_; }

  private:
    char* data_ = nullptr;
    char* map_ = nullptr;
    size_t bytes_, mapped_ = 0;
};

inline constexpr int kNaNFill = 0xff;  // NaN in every type
inline constexpr int kOutputFill = 0xa5;

// A strided array that owns its exact extent (or shares another's).
struct Array {
    Type type = Type::f32;
    std::vector<int64_t> size, stride;
    int64_t extent = 0;  // elements
    std::shared_ptr<Slab> slab;

    int64_t offset(std::initializer_list<int64_t> at) const {
        int64_t sum = 0;
        size_t n = 0;
        for (const int64_t x : at) sum += x * stride[n++];
        return sum;
    }
    char* at(int64_t element) const { return slab->data() + element * bytes_of(type); }
    double get(std::initializer_list<int64_t> index) const { return decode(type, at(offset(index))); }
    void set(std::initializer_list<int64_t> index, double x) const { encode(type, x, at(offset(index))); }
};

struct Layout {
    bool may_expand, may_permute;
};

// Strides of a random layout: dimensions permuted, rows padded, the last one sometimes with a step, some expanded.
inline std::vector<int64_t> random_strides(Random& random, const std::vector<int64_t>& size, Layout layout) {
    const size_t n = size.size();
    std::vector<size_t> order(n);
    for (size_t i = 0; i < n; ++i) order[i] = i;
    if (layout.may_permute) {
        const size_t movable = random.chance(0.1) ? n : n - 1;
        for (size_t i = movable; i > 1; --i)
            std::swap(order[i - 1], order[static_cast<size_t>(random.in(0, static_cast<int64_t>(i) - 1))]);
    }
    std::vector<int64_t> stride(n);
    int64_t next = random.chance(0.15) ? 2 : 1;
    const bool padded = random.chance(0.3);
    for (size_t i = n; i-- > 0;) {
        const size_t d = order[i];
        if (layout.may_expand && d + 1 < n && random.chance(0.08)) {
            stride[d] = 0;
            continue;
        }
        stride[d] = next;
        next *= std::max<int64_t>(size[d], 1);
        if (padded) next += random.in(0, 5);
    }
    return stride;
}

inline Array make_array(Random& random, Type type, std::vector<int64_t> size, Layout layout, Guard guard, int fill) {
    Array array{type, size, random_strides(random, size, layout), 0, nullptr};
    int64_t last = 0;
    bool empty = false;
    for (size_t d = 0; d < size.size(); ++d) {
        empty |= size[d] == 0;
        last += (size[d] - 1) * array.stride[d];
    }
    array.extent = empty ? 0 : last + 1;
    array.slab = std::make_shared<Slab>(array.extent * bytes_of(type), guard, fill);
    return array;
}

}  // namespace stress
