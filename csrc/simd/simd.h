// Vectors of float and double for one instruction set, in that set's own namespace: nothing here may be shared between
// translation units, or the linker could keep an AVX-512 copy of a function for a machine without it.
//
// maximum(a, b) returns b when either is NaN (the x86 rule): put the value whose NaN must survive second.
// `bits` arguments choose lanes: bit l set takes `yes`. above(a, b) makes such bits: where a > b, and neither is NaN.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(_MSC_VER)
#define QKV_INLINE __forceinline
#define QKV_APART __declspec(noinline)
#define QKV_UNROLL
#else
#define QKV_INLINE inline __attribute__((always_inline))
#define QKV_APART __attribute__((noinline))  // a loop that has all registers to itself
#define QKV_UNROLL _Pragma("GCC unroll 32")
#endif

#define QKV_FOR(i, n) QKV_UNROLL for (int i = 0; i < (n); ++i)  // unrolled

namespace qkv {
namespace QKV_ISA {

struct bf16 {
    uint16_t bits;
};
struct f16 {
    uint16_t bits;
};
struct f8 {  // e4m3: 4 bits of exponent, 3 of mantissa, no infinities, one NaN a sign
    uint8_t bits;
};

template <class To, class From>
QKV_INLINE To cast_bits(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

// A hint: what is at the address will be read. There need not be anything.
QKV_INLINE void prefetch([[maybe_unused]] uintptr_t address) {
#if defined(__GNUC__)
    __builtin_prefetch(reinterpret_cast<const void*>(address));
#endif
}

QKV_INLINE float widen(float x) { return x; }
QKV_INLINE double widen(double x) { return x; }
QKV_INLINE float widen(bf16 x) { return cast_bits<float>(static_cast<uint32_t>(x.bits) << 16); }
QKV_INLINE float widen(f16 x);
QKV_INLINE float widen(int8_t x) { return static_cast<float>(x); }
QKV_INLINE float widen(f8 x) {
    const uint32_t sign = static_cast<uint32_t>(x.bits & 0x80u) << 24, rest = x.bits & 0x7fu;
    if (rest == 0x7fu) return cast_bits<float>(sign | 0x7fc00000u);
    // Below the least exponent the leading 1 is put there and taken away again: denormal numbers may be switched off.
    const float magnitude = rest < 8 ? cast_bits<float>(0x3c800000u | rest << 20) - 0.015625f
                                     : cast_bits<float>((rest << 20) + 0x3c000000u);
    return cast_bits<float>(sign | cast_bits<uint32_t>(magnitude));
}

QKV_INLINE void narrow(float x, float& to) { to = x; }
QKV_INLINE void narrow(double x, double& to) { to = x; }
QKV_INLINE void narrow(float x, bf16& to) {
    const uint32_t u = cast_bits<uint32_t>(x);
    if ((u & 0x7fffffffu) > 0x7f800000u) {
        to.bits = static_cast<uint16_t>(u >> 16 | 0x40u);  // NaN stays NaN
        return;
    }
    to.bits = static_cast<uint16_t>((u + 0x7fffu + (u >> 16 & 1u)) >> 16);
}
QKV_INLINE void narrow(float x, f16& to);

// 2^f on [-1/2, 1/2]: minimax polynomials in the relative error (7.5e-8, 1.9e-9 and 3.1e-18), computed with Remez'
// algorithm.
inline constexpr float kExp2Degree5[] = {1.0000000716551239f, 0.69314696706227247f,   0.24022119722860972f,
                                         0.055507132756957f,  0.0096755413713432092f, 0.0013276471543198622f};
inline constexpr float kExp2Degree6[] = {1.0000000005541557f,    0.69314720573733291f,   0.24022646890650353f,
                                         0.05550328776811010f,   0.0096184889556784500f, 0.0013399931274298112f,
                                         0.00015345812412369481f};
inline constexpr double kExp2Degree11[] = {1.0,
                                           0.69314718055994533,
                                           0.240226506959101562,
                                           0.0555041086648199215,
                                           0.00961812910758833509,
                                           0.00133335581467899551,
                                           0.000154035304625146422,
                                           0.000015252733489957609,
                                           1.32154330895704608e-6,
                                           1.01781980342497771e-7,
                                           7.07410563116744845e-9,
                                           4.43528089925904905e-10};

// The finaliser of splitmix64 (Steele, Lea and Flood, 2014), which dropout draws with.
inline constexpr uint64_t kMixFirst = UINT64_C(0xBF58476D1CE4E5B9), kMixSecond = UINT64_C(0x94D049BB133111EB);
QKV_INLINE uint64_t draw_mix(uint64_t x) {
    x = (x ^ x >> 30) * kMixFirst;
    x = (x ^ x >> 27) * kMixSecond;
    return x ^ x >> 31;
}
// keep_bits(draws, key, below): bit r says whether draw_mix(draws[r] + key) >> 11 is not below, for kDrawLanes rows.

// What a set's file defines, besides VF and VD and their functions:
//   kRegisters: how many vectors are held at a time, 16 or 32;
//   kPartLoads: whether a part of a register of bfloat16 can be loaded (split_part, Pairs::load_part);
//   widen and narrow of f16; transpose_tile of kTransposeTile x kTransposeTile words; keep_bits and kDrawLanes;
//   kPairs, and Pairs where it is true: products of bfloat16 in pairs, two neighbours of a sum in 32 bits.
struct Pairs;

}  // namespace QKV_ISA
}  // namespace qkv

#include QKV_SIMD
