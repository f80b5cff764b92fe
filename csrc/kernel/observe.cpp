// One instruction set's statistics of weights, and what its kernels compute. Compiled once per instruction set, in that
// set's namespace.
#include "kernel/observe.h"

#include <memory>
#include <new>

#include "kernel/cover.h"
#include "kernel/kernels.h"

namespace qkv {
QKV_DECLARE_KERNELS(QKV_ISA)
namespace QKV_ISA {

Status run_observation(const Observation& call) {
    switch (call.call.q_type) {
        case Type::f32: return Observer<Elements<float>>(call).go();
        case Type::bf16: return Observer<Elements<bf16>>(call).go();
        case Type::f16: return Observer<Elements<f16>>(call).go();
        case Type::f64: return Observer<Elements<double>>(call).go();
        default: return Status::unsupported;
    }
}

template <class T>
static Status find_cover(const Attention& call, Cover& to) {
    using Found = Covering<Lanes<Elements<T>>>;
    const std::unique_ptr<Found> found(new (std::nothrow) Found(call));  // it is large for a stack
    if (found == nullptr) return Status::no_memory;
    found->find(to);
    return Status::ok;
}
Status run_cover(const Attention& call, Cover& to) {
    return call.q_type == Type::f64 ? find_cover<double>(call, to) : find_cover<float>(call, to);
}

}  // namespace QKV_ISA
}  // namespace qkv
