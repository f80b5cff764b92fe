// One instruction set's backward kernels. Compiled once per instruction set, in that set's namespace.
#include "kernel/backward.h"

#include "kernel/kernels.h"

namespace qkv {
QKV_DECLARE_KERNELS(QKV_ISA)
namespace QKV_ISA {

Status run_backward(const Backward& call) {
    switch (call.call.q_type) {
        case Type::f32: return Gradients<Elements<float>>(call).go();
        case Type::bf16: return Gradients<Elements<bf16>>(call).go();
        case Type::f16: return Gradients<Elements<f16>>(call).go();
        case Type::f64: return Gradients<Elements<double>>(call).go();
        default: return Status::unsupported;
    }
}

}  // namespace QKV_ISA
}  // namespace qkv
