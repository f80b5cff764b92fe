// One instruction set's backward kernels. Compiled once per instruction set, in that set's namespace.
#include "backward.h"

namespace qkv {
namespace QKV_ISA {

Status run_backward(const Backward& call);
Status run_backward(const Backward& call) {
    const Attention& a = call.call;
    if (a.bias_count > 16) return Status::unsupported;
    if ((a.program_length > 0 && !Program::valid(a.program, a.program_length, a.operand_count)) || !Program::readable(a, a.program, a.program_length))
        return Status::bad_program;
    switch (a.q_type) {
        case Type::f32: return Gradients<WideProducts<float>>(call).go();
        case Type::f64: return Gradients<WideProducts<double>>(call).go();
        case Type::f16: return Gradients<WideProducts<f16>>(call).go();
#if defined(QKV_ISA_AVX512BF16)
        case Type::bf16: return Gradients<BFloatProducts>(call).go();
#else
        case Type::bf16: return Gradients<WideProducts<bf16>>(call).go();
#endif
        default: return Status::unsupported;
    }
}

}  // namespace QKV_ISA
}  // namespace qkv
