// Cuts one allocation into arrays.
#pragma once
#include <cstdint>

namespace qkv {
namespace QKV_ISA {

inline constexpr int64_t kAlign = 64;

struct Arena {
    char* base;
    int64_t used = 0;
    template <class P>
    P* take(int64_t count) {
        P* at = reinterpret_cast<P*>(base + used);
        used += (static_cast<int64_t>(sizeof(P)) * count + kAlign - 1) / kAlign * kAlign;
        return at;
    }
    static int64_t up(int64_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; }
};

// What an Arena would use.
struct Measure {
    int64_t used = 0;
    template <class P>
    P* take(int64_t count) {
        used += Arena::up(static_cast<int64_t>(sizeof(P)) * count);
        return nullptr;
    }
};

}  // namespace QKV_ISA
}  // namespace qkv
