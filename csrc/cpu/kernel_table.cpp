#include "kernels.h"

#define QUANT_NAME_OF(isa) #isa
#define QUANT_NAME(isa) QUANT_NAME_OF(isa)

namespace quant {
namespace QUANT_ISA {

const Kernels table = {QUANT_NAME(QUANT_ISA), quantize_token, rms_norm_token,
                       silu_mul_token,        rope_token,     attend,
                       state_floats,          attend_span,    combine};

}  // namespace QUANT_ISA
}  // namespace quant
