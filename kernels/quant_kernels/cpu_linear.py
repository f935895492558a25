"""Dense products on the CPU: quant_cpu_linear (csrc/cpu/linear.cpp) for few tokens, torch for many.

Up to MOST_TOKENS the weight is read once and where it lies, while torch's oneDNN lays it out anew
in every call, and a token's bits depend neither on its batch nor on the threads. Beyond, oneDNN's
product in large blocks repays that; its sums have another order, so a last bit may differ.
"""

from __future__ import annotations

from struct import Struct

import torch
from torch import Tensor

from quant_kernels import reference
from quant_kernels.cpu_activation import TYPES
from quant_kernels.cpu_calls import invoke

# Measured in BF16 on a Xeon with AMX: at 64 tokens our time is 0.8 of torch's with H = 576 and 0.9
# with 4096; at 128, 0.8 and 1.3; at 512, 1.7 with H = 576.
MOST_TOKENS = 64
_LINEAR = Struct("@PqPqPqqqqqq").pack  # QuantCpuLinear


def linear(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """`ops.linear`."""
    if len(x) > MOST_TOKENS:
        reference.linear(x, weight, out)
        return
    invoke(
        "linear",
        _LINEAR(
            x.data_ptr(), x.stride(0), weight.data_ptr(), weight.stride(0),
            out.data_ptr(), out.stride(0), TYPES[x.dtype],
            len(x), len(weight), x.shape[1], torch.get_num_threads(),
        ),
    )  # fmt: skip
