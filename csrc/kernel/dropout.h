#pragma once
#include "mask/program.h"

namespace qkv {
namespace QKV_ISA {

// Dropout draws a number for every weight: a hash of seed, batch row, query head, query and key (`dropout_keep` in
// numerics.py). draw_row has all but the key in it.
QKV_INLINE uint64_t draw_index(int64_t index) {
    return (static_cast<uint64_t>(index) + 1) * UINT64_C(0x9E3779B97F4A7C15);
}
inline uint64_t draw_row(const Attention& a, const Rows& rows, int r) {
    uint64_t x = draw_mix(a.dropout_seed + draw_index(rows.batch));
    x = draw_mix(x + draw_index(rows.head[r]));
    return draw_mix(x + draw_index(rows.index[r]));
}

}  // namespace QKV_ISA
}  // namespace qkv
