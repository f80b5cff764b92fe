// One instruction set's statistics of weights. Compiled once per instruction set, in that set's namespace.
#include "kernel/observe.h"

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

}  // namespace QKV_ISA
}  // namespace qkv
