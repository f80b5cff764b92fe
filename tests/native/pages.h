// Moves the keys and values of a random call onto pages: any page size and order, pages in common, stored in 8 bits.
#pragma once
#include <algorithm>
#include <vector>

#include "calls.h"

namespace stress {

struct Paged {
    int64_t page_size, pages;
    Array k, v, k_scale, v_scale;
};

// Sequences that are to share pages hold the same keys there.
inline void copy_rows(Array& x, int64_t from, int64_t to, int64_t count) {
    for (int64_t g = 0; g < x.size[1]; ++g)
        for (int64_t j = 0; j < count; ++j)
            for (int64_t d = 0; d < x.size[3]; ++d) x.set({to, g, j, d}, x.get({from, g, j, d}));
}

// A number that 8 bits hold, never a NaN.
inline void random_byte(Random& random, Type type, char* at) {
    unsigned char byte;
    do byte = static_cast<unsigned char>(random.word());
    while (type == Type::f8 ? (byte & 0x7f) == 0x7f : byte == 0x80);
    std::memcpy(at, &byte, 1);
}

// Lets some sequences begin with the pages of the first one; returns how many pages of each are common.
inline std::vector<int64_t> share_pages(Random& random, Call& c, bool stored) {
    std::vector<int64_t> common(c.sequences.size());
    const int64_t size = c.paged->page_size;
    for (size_t i = 1; i < c.sequences.size() && random.chance(0.6); ++i) {
        const qkv::Sequence& first = c.sequences[0];
        const int64_t most = std::min(first.k_count, c.sequences[i].k_count) / size;
        common[i] = random.chance(0.5) ? most : random.in(0, most);
        if (stored) continue;
        copy_rows(c.k, first.batch, c.sequences[i].batch, common[i] * size);
        if (!c.view) copy_rows(c.v, first.batch, c.sequences[i].batch, common[i] * size);
    }
    return common;
}

// The pages of each sequence, in any order of the pool.
inline std::vector<std::vector<int32_t>> deal_pages(Random& random, Call& c, const std::vector<int64_t>& common) {
    Paged& p = *c.paged;
    std::vector<std::vector<int32_t>> tables;
    p.pages = 0;
    for (size_t i = 0; i < c.sequences.size(); ++i) {
        const int64_t needed = (c.sequences[i].k_count + p.page_size - 1) / p.page_size;
        tables.emplace_back();
        for (int64_t n = 0; n < needed; ++n)
            tables[i].push_back(n < common[i] ? tables[0][static_cast<size_t>(n)] : static_cast<int32_t>(p.pages++));
    }
    p.pages += random.in(0, 3);
    std::vector<int32_t> order(static_cast<size_t>(p.pages));
    for (size_t n = 0; n < order.size(); ++n) order[n] = static_cast<int32_t>(n);
    for (size_t n = order.size(); n > 1; --n)
        std::swap(order[n - 1], order[static_cast<size_t>(random.in(0, static_cast<int64_t>(n) - 1))]);
    for (auto& table : tables)
        for (int32_t& page : table) page = order[static_cast<size_t>(page)];
    return tables;
}

// The tensors of pages, and of scales where numbers are stored in 8 bits.
inline void make_pools(Random& random, Call& c, Type type, bool stored) {
    const Sizes& z = c.z;
    Paged& p = *c.paged;
    const Layout any{false, true};
    p.k = make_array(random, type, {p.pages, z.Hkv, p.page_size, z.D}, any, random_guard(random), kNaNFill);
    p.v = p.k;
    p.v.size[3] = z.Dv;
    if (!c.view)
        p.v = make_array(random, type, {p.pages, z.Hkv, p.page_size, z.Dv}, any, random_guard(random), kNaNFill);
    if (!stored) return;
    p.k_scale = make_array(random, Type::f32, {p.pages, z.Hkv, p.page_size}, any, random_guard(random), kNaNFill);
    p.v_scale = p.k_scale;
    p.v_scale.slab =
        c.view ? p.k_scale.slab : std::make_shared<Slab>(p.k_scale.extent * 4, random_guard(random), kNaNFill);
    c.poisoned = false;
    // The truth about stored numbers is what they stand for, which has more digits than the call's type.
    c.k = make_array(random, Type::f64, {z.B, z.Hkv, z.Lk, z.D}, {false, false}, Guard::heap, kNaNFill);
    c.v = c.k;
    c.v.size[3] = z.Dv;
    if (!c.view) c.v = make_array(random, Type::f64, {z.B, z.Hkv, z.Lk, z.Dv}, {false, false}, Guard::heap, kNaNFill);
}

// Copies key (or value) j of head g to its slot.
inline void copy_slot(const Array& from, const Array& to, int64_t b, int64_t g, int64_t j, int64_t page, int64_t slot) {
    for (int64_t d = 0; d < to.size[3]; ++d)
        std::memcpy(to.at(to.offset({page, g, slot, d})), from.at(from.offset({b, g, j, d})),
                    static_cast<size_t>(bytes_of(to.type)));
}

// Fills a slot with random stored numbers and their scale, if it is fresh, and the truth with what they stand for.
inline void store_slot(Random& random, Array& numbers, Array& scale, Array& truth, double size, bool fresh, int64_t b,
                       int64_t g, int64_t j, int64_t page, int64_t slot) {
    const int64_t width = numbers.size[3];
    if (fresh) {
        const double most = numbers.type == Type::i8 ? 127 : 448;
        scale.set({page, g, slot}, random.chance(0.02) ? 0 : size * (0.2 + random.unit()) / most);
        for (int64_t d = 0; d < width; ++d)
            random_byte(random, numbers.type, numbers.at(numbers.offset({page, g, slot, d})));
    }
    for (int64_t d = 0; d < width; ++d)
        truth.set({b, g, j, d}, numbers.get({page, g, slot, d}) * scale.get({page, g, slot}));
}

// Puts a sequence on its pages, of which the first `common` hold keys already.
inline void put_sequence(Random& random, Call& c, qkv::Sequence& s, const std::vector<int32_t>& table, int64_t common,
                         bool stored) {
    Paged& p = *c.paged;
    auto slab = std::make_shared<Slab>(4 * static_cast<int64_t>(table.size()), random_guard(random), 0);
    if (!table.empty()) std::memcpy(slab->data(), table.data(), 4 * table.size());
    c.positions.push_back(slab);  // keeps it
    static const int32_t kNone = 0;
    s.pages = table.empty() ? &kNone : reinterpret_cast<const int32_t*>(slab->data());
    for (int64_t j = 0; j < s.k_count; ++j) {
        const int64_t page = s.pages[j / p.page_size], slot = j % p.page_size;
        const bool fresh = j / p.page_size >= common;
        for (int64_t g = 0; g < c.z.Hkv; ++g)
            if (stored) {
                store_slot(random, p.k, p.k_scale, c.k, 2, fresh, s.batch, g, j, page, slot);
                if (!c.view) store_slot(random, p.v, p.v_scale, c.v, 2, fresh, s.batch, g, j, page, slot);
            } else {
                copy_slot(c.k, p.k, s.batch, g, j, page, slot);
                if (!c.view) copy_slot(c.v, p.v, s.batch, g, j, page, slot);
            }
    }
    s.k = p.k.extent ? p.k.slab->data() : nullptr;
    s.v = p.v.extent ? p.v.slab->data() : nullptr;
}

inline void put_on_pages(Random& random, Call& c) {
    c.paged = std::make_shared<Paged>();
    Paged& p = *c.paged;
    const int64_t all = std::max<int64_t>(c.z.Lk, 1);
    p.page_size = random.chance(0.5) ? random.pick<int64_t>({16, 16, 32, 64})
                                     : random.pick<int64_t>({1, 2, 3, 5, 8, 15, 17, 24, 48, 100, 512, all});
    const bool stored = c.type != Type::f64 && random.chance(0.3);
    const Type type = stored ? random.pick({Type::i8, Type::f8}) : c.type;
    const std::vector<int64_t> common = share_pages(random, c, stored);
    const std::vector<std::vector<int32_t>> tables = deal_pages(random, c, common);
    make_pools(random, c, type, stored);
    for (size_t i = 0; i < c.sequences.size(); ++i)
        put_sequence(random, c, c.sequences[i], tables[i], i == 0 ? 0 : common[i], stored);
    qkv::Attention& a = c.a;
    a.kv_type = type;
    a.page_size = p.page_size;
    a.k_page = p.k.stride[0], a.v_page = p.v.stride[0];
    for (size_t d = 0; d < 3; ++d) a.k_stride[d] = p.k.stride[d + 1], a.v_stride[d] = p.v.stride[d + 1];
    if (stored) {
        // An empty tensor has no address; a scale's has to be one.
        static const float kOne = 1;
        a.k_scale = p.k_scale.extent ? reinterpret_cast<const float*>(p.k_scale.slab->data()) : &kOne;
        a.v_scale = p.v_scale.extent ? reinterpret_cast<const float*>(p.v_scale.slab->data()) : &kOne;
        for (size_t d = 0; d < 3; ++d) a.scale_stride[d] = p.k_scale.stride[d];
    }
    a.sequences = c.sequences.data();
}

}  // namespace stress
