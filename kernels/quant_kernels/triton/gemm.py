"""The GEMM on the host: a configuration, the launches, and what the offline compiler looks at.

The kernels and their mathematics: `gemm_kernels.py`; the choice of tiles: `tuning.py`.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import torch
import triton
from torch import Tensor

from quant_kernels import dispatch
from quant_kernels.packing import SplitWeight
from quant_kernels.triton import tuning
from quant_kernels.triton.activation import quantize_activation
from quant_kernels.triton.gemm_kernels import gemm_kernel, reduce_kernel
from quant_kernels.triton.tuning import Config

REDUCE_ROWS, REDUCE_TOKENS = 64, 16


def gemm(
    x_codes: Tensor,
    x_scale: Tensor,
    weight: SplitWeight,
    out: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    silu_mul: bool,
    workspace: Tensor | None,
    codes: Tensor | None = None,
    scale: Tensor | None = None,
) -> None:
    """As `ops.gemm`, in the configuration that `tuning.choose` names."""
    device = x_codes.device
    rows, columns = weight.shape
    config = tuning.choose(
        dispatch.capability(device),
        tuning.kind_of(weight.fmt),
        len(x_codes),
        rows,
        columns,
        tuning.multiprocessors(device),
        silu_mul,
    )
    run(config, x_codes, x_scale, weight, out, bias, residual, silu_mul, workspace)
    if codes is not None and scale is not None:
        quantize_activation(out, codes, scale)


def run(
    config: Config,
    x_codes: Tensor,
    x_scale: Tensor,
    weight: SplitWeight,
    out: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    silu_mul: bool,
    workspace: Tensor | None,
) -> None:
    """`gemm` in a given configuration. Raises ops.OpError where the workspace is too small."""
    tokens, rows_out = out.shape
    if out.numel() == 0:
        return
    (rows, columns), fmt = weight.shape, weight.fmt
    kind, span = tuning.kind_of(fmt), 2 * weight.codes.shape[2]
    whole = fmt.scheme == "w4a8"
    tuning.check_workspace(config, tokens, rows, columns, workspace)
    split = config.split_k > 1
    partial = None if not split or workspace is None else workspace
    if partial is not None:
        partial = partial[: 4 * (partial.numel() // 4)].view(
            torch.int32 if whole else torch.float32
        )
    fp8 = fp8_operands(x_codes.device)
    x = x_codes if whole or fp8 else x_codes.view(torch.uint8)
    strides = (x_scale.stride(0), 0 if residual is None else residual.stride(0), out.stride(0))
    common: dict[str, Any] = {"KIND": kind, "PAIR": silu_mul, "SPLIT_K": config.split_k, "FP8": fp8}
    # exact adds t times a sum to the rest, and rounds less if that is one operation; INT8 owes the
    # reference's bits.
    fused = kind == "exact"
    grid = (
        triton.cdiv(rows_out, config.block_n),
        triton.cdiv(tokens, config.block_m),
        config.split_k,
    )
    gemm_kernel[grid](
        x, x_scale, weight.codes, weight.t, weight.c, bias, residual, out, partial,
        tokens, rows_out, columns // span, x.stride(0), *strides,
        SPAN=span,
        SHARED_T=fmt.group_size >= span,
        BLOCK_N=config.block_n,
        BLOCK_M=config.block_m,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        enable_fp_fusion=fused,
        **common,
    )  # fmt: skip
    if split:
        tiles = (triton.cdiv(rows_out, REDUCE_ROWS), triton.cdiv(tokens, REDUCE_TOKENS))
        reduce_kernel[tiles](
            partial, x_scale, weight.c, bias, residual, out, tokens, rows_out, *strides,
            BLOCK_N=REDUCE_ROWS,
            BLOCK_M=REDUCE_TOKENS,
            num_warps=4,
            enable_fp_fusion=fused,
            **common,
        )  # fmt: skip


def fp8_operands(device: torch.device) -> bool:
    """Whether E4M3 is multiplied as it is (also in the interpreter), or as FP16."""
    return device.type != "cuda" or dispatch.capability(device) >= dispatch.FP8_CAPABILITY


def gemm_workspace_bytes(device: torch.device, max_tokens: int, n: int, k: int) -> int:
    """Bytes that `gemm` asks for with a [n, k] weight of any format and up to max_tokens tokens."""
    return tuning.workspace_bytes(
        dispatch.capability(device), max_tokens, n, k, tuning.multiprocessors(device)
    )


def compile_cases() -> list[tuple[Any, ...]]:
    """(name, kernel, signature, constexprs, options, needs_fp8) of what `offline.py` compiles.

    The tiles of `tuning.by_rule` with every addend, groups of 32, and the reduction.
    """
    cases = []
    for kind in tuning.KINDS:
        for fp8 in (True,) if kind.startswith("int8") else (True, False):
            for pair, bucket in product((False, True), tuning.BUCKETS):
                chosen = tuning.by_rule(tuning.Case(kind, bucket, 4096, 4096, pair), 132, fp8)
                for parts in (1, 4) if bucket == tuning.BUCKETS[0] else (1,):
                    config = replace(chosen, split_k=parts)
                    tile = f"{config.block_n}x{config.block_m}"
                    name = f"{kind}{' fp16' * (not fp8)} {tile}{' silu_mul' * pair}"
                    name += " split_k" * (parts > 1)
                    cases.append(_compile_case(name, kind, config, pair, fp8))
    for kind in ("int8", "lut", "exact"):
        config = Config(128, 128, 1, 8, 3)
        cases.append(_compile_case(f"{kind} 128x128 g32", kind, config, False, True, 64))
    for kind in ("int8", "exact"):
        for pair in (False, True):
            name = f"{kind} reduce{' silu_mul' * pair}"
            cases.append(
                _compile_case(name, kind, Config(64, 16, 4, 4, 1), pair, True, kernel=reduce_kernel)
            )
    return list({case[0]: case for case in cases}.values())


def _compile_case(
    name: str,
    kind: str,
    config: Config,
    pair: bool,
    fp8: bool,
    span: int = 128,
    kernel: Any = gemm_kernel,
) -> tuple[Any, ...]:
    whole = kind.startswith("int8")
    sums = "*i32" if whole else "*fp32"
    types = {
        "x": "*i8" if whole else "*fp8e4nv" if fp8 else "*u8",
        "x_scale": "*fp32",
        "codes": "*u8",
        "t": {"int8": "*u8", "lut": "*fp16"}.get(kind, "*fp32"),
        "c": "*fp32",
        "bias": "*bf16",
        "residual": "*bf16",
        "out": "*bf16",
        "partial": sums,
    }
    types |= dict.fromkeys(("M", "N", "spans"), "i32")
    types |= dict.fromkeys(("stride_x", "stride_scale", "stride_residual", "stride_out"), "i32")
    constants: dict[str, Any] = {
        "KIND": kind, "SPAN": span, "SHARED_T": span == 128, "PAIR": pair, "FP8": fp8,
        "SPLIT_K": config.split_k, "BLOCK_N": config.block_n, "BLOCK_M": config.block_m,
    }  # fmt: skip
    if pair:
        constants["residual"] = None
    if config.split_k == 1:
        constants["partial"] = None
    signature = {
        arg: types[arg] for arg in kernel.arg_names if arg in types and arg not in constants
    }
    constants = {arg: value for arg, value in constants.items() if arg in kernel.arg_names}
    options = {
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "enable_fp_fusion": kind == "exact",
        "unaligned": ("M", "spans", "stride_scale"),
    }
    return name, kernel, signature, constants, options, fp8 and not whole
