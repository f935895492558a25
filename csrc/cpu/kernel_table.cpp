#include "kernels.h"

namespace quant {
namespace QUANT_ISA {

const OpKernels table = {quantize_token, rms_norm_token, silu_mul_token, rope_token,
                         attend,         state_floats,   attend_span,    combine,
                         linear_prepare, linear,         finish_gemm,    group_errors};

}  // namespace QUANT_ISA
}  // namespace quant
