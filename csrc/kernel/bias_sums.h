// The gradients of score terms. Where tasks would add to the same numbers, each adds to a copy of its own, in double.
#pragma once
#include "kernel/score.h"

namespace qkv {
namespace QKV_ISA {

inline constexpr int kMaxTerms = 16;  // of a bias that has gradients

// Which chunk of keys a gradient comes from.
struct ChunkPlace {
    int64_t at, kv_head, number;  // sequence, head, chunk of keys
};

template <class E>
class BiasSums {
  public:
    // longest: queries of a sequence at most. chunks: of keys, likewise.
    void begin(const Backward& call, int64_t longest, int64_t chunks) {
        b_ = &call, a_ = &call.call;
        group_ = a_->Hq / a_->Hkv, longest_ = longest, chunks_ = chunks;
    }

    template <class From>
    void lay_out(From& memory) {
        for (int64_t t = 0; t < a_->bias_count; ++t)
            if (by_copies(t)) copies_[t] = memory.template take<double>(copies() * copy_size(t));
    }
    void clear() {
        for (int64_t t = 0; t < a_->bias_count; ++t)
            if (by_copies(t)) std::memset(copies_[t], 0, static_cast<size_t>(copies() * copy_size(t)) * sizeof(double));
    }

    // Adds the gradient of the score of row r of the tile and key j.
    void add(const ChunkPlace& chunk, const Rows& rows, int r, int64_t j, E ds) {
        for (int64_t t = 0; t < a_->bias_count; ++t) {
            const BiasGradient& d = b_->d_bias[t];
            if (d.data == nullptr) continue;
            if (by_copies(t)) {
                add_to_copy(t, chunk, rows, r, j, ds);
                continue;
            }
            const int64_t to =
                rows.batch * d.stride[0] + rows.head[r] * d.stride[1] + rows.index[r] * d.stride[2] + j * d.stride[3];
            if (d.wide)
                static_cast<double*>(d.data)[to] += static_cast<double>(ds);
            else
                static_cast<E*>(d.data)[to] += ds;
        }
    }

    // Adds the copies up, in order.
    void finish() {
        for (int64_t t = 0; t < a_->bias_count; ++t)
            if (by_copies(t)) add_copies(t);
    }

  private:
    bool by_copies(int64_t t) const {
        if (b_->d_bias == nullptr || b_->d_bias[t].data == nullptr) return false;
        return a_->bias[t].kind != BiasKind::tensor || b_->d_bias[t].stride[3] == 0;
    }
    int64_t copies() const { return a_->sequence_count * a_->Hkv * chunks_; }
    int64_t copy_size(int64_t t) const { return group_ * copy_width(t); }
    // Of one task's copy: numbers for each head of the group.
    int64_t copy_width(int64_t t) const {
        const Bias& bias = a_->bias[t];
        if (bias.kind == BiasKind::alibi) return 1;
        if (bias.kind == BiasKind::relative) return 2 * bias.reach + 1;
        return b_->d_bias[t].stride[2] == 0 ? 1 : longest_;
    }

    void add_to_copy(int64_t t, const ChunkPlace& chunk, const Rows& rows, int r, int64_t j, E ds) {
        const Bias& bias = a_->bias[t];
        const int64_t width = copy_width(t), away = j - rows.position[r];
        const int64_t task = (chunk.at * a_->Hkv + chunk.kv_head) * chunks_ + chunk.number;
        double* copy = copies_[t] + (task * group_ + rows.head[r] - chunk.kv_head * group_) * width;
        if (bias.kind == BiasKind::alibi)
            copy[0] -= static_cast<double>(ds) * static_cast<double>(away < 0 ? -away : away);
        else if (bias.kind == BiasKind::relative)
            copy[clamp(away, -bias.reach, bias.reach) + bias.reach] += static_cast<double>(ds);
        else
            copy[width == 1 ? 0 : rows.index[r]] += static_cast<double>(ds);
    }

    void add_copies(int64_t t) {
        const BiasGradient& d = b_->d_bias[t];
        const BiasKind kind = a_->bias[t].kind;
        const int64_t width = copy_width(t), Hkv = a_->Hkv, tasks = copies();
        const double* copy = copies_[t];
        for (int64_t task = 0; task < tasks; ++task) {
            const int64_t kv_head = task / chunks_ % Hkv, batch = a_->sequences[task / chunks_ / Hkv].batch;
            for (int64_t h = kv_head * group_; h < (kv_head + 1) * group_; ++h)
                for (int64_t x = 0; x < width; ++x, ++copy) {
                    if (*copy == 0) continue;
                    int64_t to = h * d.stride[1];
                    if (kind == BiasKind::relative) to += x * d.stride[3];
                    if (kind == BiasKind::tensor) to += batch * d.stride[0] + x * d.stride[2];
                    if (d.wide)
                        static_cast<double*>(d.data)[to] += *copy;
                    else
                        static_cast<E*>(d.data)[to] += static_cast<E>(*copy);
                }
        }
    }

    const Backward* b_ = nullptr;
    const Attention* a_ = nullptr;
    int64_t group_ = 0, longest_ = 0, chunks_ = 0;
    double* copies_[kMaxTerms] = {};
};

}  // namespace QKV_ISA
}  // namespace qkv
