"""What the Hopper attention kernels do not take, and how their arguments are laid out."""

from __future__ import annotations

import ctypes
import math

import pytest
import torch

from quant_kernels import cuda_attention, native
from quant_kernels.cuda_attention import Attention, Decode, Prefill, decode_call, prefill_call
from quant_kernels.registration import OpError
from tests.quant_kernels.test_cuda_attention import DIMS
from tests.quant_kernels.triton.test_prefill_attention import Case, arguments

NULL_POINTER, BAD_SHAPE, BAD_ALIGNMENT, NO_KERNEL, SMALL_WORKSPACE = -1, -5, -6, -7, -8


def test_what_no_kernel_takes_is_refused_with_its_reason(simulator):
    case = Case(64, 2, 1, ((5, 9),))
    given = arguments(case)
    out = torch.empty(given[0].shape)
    workspace = torch.empty(4 * 2 * 68)

    def status(**changes: object) -> set[int]:
        calls = (
            prefill_call(*given, 5, out, 0.125, 0),
            decode_call(*given[:5], given[6], out, 0.125, 0, workspace, 4),
        )
        found = set()
        for call, check in zip(calls, ("prefill", "decode"), strict=True):
            for name, value in changes.items():
                owner = call if hasattr(call, name) else call.attention
                setattr(owner, name, value)
            found.add(simulator[f"quant_cuda_{check}_check"](ctypes.byref(call)))
        return found

    assert status() == {0}
    assert status(head_dim=96) == {NO_KERNEL}
    assert status(head_dim=32) == {NO_KERNEL}
    assert status(heads=17) == {0, NO_KERNEL}  # of a KV head: 16 in decode, 128 in prefill
    assert status(heads=129) == {NO_KERNEL}
    assert status(heads=3, kv_heads=2) == {BAD_SHAPE}
    assert status(window=-1) == {BAD_SHAPE}
    assert status(sm_scale=0.0) == {BAD_SHAPE}
    assert status(soft_cap=-1.0) == status(soft_cap=math.inf) == {BAD_SHAPE}
    assert status(skip_threshold=-1.0) == status(skip_threshold=math.nan) == {0, BAD_SHAPE}
    assert status(out_type=3) == {BAD_SHAPE}
    assert status(kv_scales=None) == {NULL_POINTER}
    assert status(q_token=120) == {BAD_ALIGNMENT}
    assert status(out_token=66) == {BAD_ALIGNMENT}
    assert status(workspace_bytes=100) == {0, SMALL_WORKSPACE}
    assert status(batch=1025) == {0, NO_KERNEL}
    assert status(workers=0) == {0, BAD_SHAPE}
    assert status(max_query_len=0) == {0, BAD_SHAPE}


def test_the_op_says_what_takes_other_shapes():
    case = Case(96, 2, 1, ((5, 9),))
    given = arguments(case)
    out = torch.empty(given[0].shape)
    with pytest.raises(OpError, match=r"head_dim 64, 128, 256.*head_dim 96.*triton"):
        cuda_attention.prefill_attention(*given, 5, out, 0.1, 0)
    given = arguments(Case(64, 17, 1, ((1, 9),)))
    with pytest.raises(OpError, match=r"up to 16 query heads.*17"):
        cuda_attention.decode_attention(*given[:5], given[6], given[0].float(), 0.1, 0, None)


@pytest.mark.parametrize(
    ("name", "structure"),
    [("Attention", Attention), ("Prefill", Prefill), ("Decode", Decode)],
)
def test_the_structures_are_the_headers(name, structure):
    header = (native.SOURCE_TREE / "csrc" / "include" / "quant_cuda.h").read_text()
    body = header[: header.index(f"}} QuantCuda{name};")]
    declared = []
    for line in body[body.rindex("typedef struct {") :].splitlines()[1:]:
        line = line.split("//")[0].strip().rstrip(";")
        if line:
            names = line.replace("const ", "").split(" ", 1)[1]
            declared += [name.strip(" *") for name in names.split(",")]
    assert declared == [field for field, *_ in structure._fields_]


def test_decode_blocks_share_a_multiprocessor(simulator):
    blocks = simulator.quant_cuda_decode_blocks
    assert [blocks(32, 8, dim) for dim in DIMS] == [4, 3, 2]
    assert blocks(32, 8, 96) == 0
    assert blocks(34, 2, 128) == 0
