"""The Hopper GEMMs of libquant_cuda.so (csrc/cuda/gemm_kernel.cuh), over fragment weights."""

from __future__ import annotations

import ctypes
import functools
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from quant_kernels import cuda, cuda_tuning
from quant_kernels.cuda_tuning import BUCKETS, KINDS, Case, Config
from quant_kernels.formats import WeightFormat
from quant_kernels.fragments import FragmentWeight
from quant_kernels.registration import OpError

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # QuantCudaType
CODE_TYPES = {torch.float8_e4m3fn: 0, torch.int8: 1}  # QuantCudaCodes
WHOLE_GROUP = 128  # what kernels without groups are listed under


class Gemm(ctypes.Structure):
    """QuantCudaGemm of csrc/include/quant_cuda.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in (
            "x", "x_scale", "codes", "t", "c", "bias", "residual", "out", "out_codes",
            "out_scale", "workspace")),
        *((name, ctypes.c_int64) for name in (
            "tokens", "rows", "columns", "x_stride", "x_scale_stride", "residual_stride",
            "out_stride", "out_codes_stride", "out_scale_stride", "workspace_bytes")),
        *((name, ctypes.c_int) for name in (
            "kind", "group_size", "bias_type", "residual_type", "out_type", "out_codes_type",
            "silu_mul", "tile_tokens", "cluster", "workers", "split")),
    )  # fmt: skip


def gemm(
    x_codes: Tensor,
    x_scale: Tensor,
    weight: FragmentWeight,
    out: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    silu_mul: bool,
    workspace: Tensor | None,
    codes: Tensor | None = None,
    scale: Tensor | None = None,
) -> None:
    """As `ops.gemm`, in the configuration that `cuda_tuning.choose` names."""
    device = x_codes.device
    tokens = len(x_codes)
    if out.numel() == 0:
        return
    case = case_of(weight, cuda_tuning.bucket_of(tokens), silu_mul)
    config = cuda_tuning.choose(case, tokens, multiprocessors(device))
    run(config, x_codes, x_scale, weight, out, bias, residual, silu_mul, workspace, codes, scale)


def run(
    config: Config,
    x_codes: Tensor,
    x_scale: Tensor,
    weight: FragmentWeight,
    out: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    silu_mul: bool,
    workspace: Tensor | None,
    codes: Tensor | None = None,
    scale: Tensor | None = None,
) -> None:
    """`gemm` in a given configuration.

    Raises OpError where the kernels do not take a shape or an alignment, and where the workspace is
    too small.
    """
    device = x_codes.device
    arguments = describe(
        config, x_codes, x_scale, weight, out, bias, residual, silu_mul, workspace, codes, scale
    )
    stream = torch.cuda.current_stream(device).cuda_stream
    status = _library().quant_cuda_gemm(ctypes.byref(arguments), device.index, stream)
    if status:
        raise OpError(
            f"gemm of x_codes {list(x_codes.shape)} with strides {x_codes.stride()} and a "
            f"{weight.fmt.label} weight {list(weight.shape)} in {config}: "
            f"{cuda.error_string(status)}; backend='triton' takes what these kernels do not"
        )


def describe(
    config: Config,
    x_codes: Tensor,
    x_scale: Tensor,
    weight: FragmentWeight,
    out: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    silu_mul: bool,
    workspace: Tensor | None,
    codes: Tensor | None = None,
    scale: Tensor | None = None,
) -> Gemm:
    """The call's arguments as the library takes them."""

    def address(x: Tensor | None) -> int | None:
        return None if x is None else x.data_ptr()

    (rows, columns), fmt = weight.shape, weight.fmt
    return Gemm(
        x=address(x_codes), x_scale=address(x_scale), codes=address(weight.codes),
        t=address(weight.t), c=address(weight.c), bias=address(bias), residual=address(residual),
        out=address(out), out_codes=address(codes), out_scale=address(scale),
        workspace=address(workspace),
        tokens=len(x_codes), rows=rows, columns=columns, x_stride=x_codes.stride(0),
        x_scale_stride=x_scale.stride(0),
        residual_stride=0 if residual is None else residual.stride(0),
        out_stride=out.stride(0),
        out_codes_stride=0 if codes is None else codes.stride(0),
        out_scale_stride=0 if scale is None else scale.stride(0),
        workspace_bytes=0 if workspace is None else workspace.numel() * workspace.element_size(),
        kind=KINDS.index(kind_of(weight)),
        group_size=WHOLE_GROUP if fmt.per_channel else fmt.group_size,
        bias_type=0 if bias is None else TYPES[bias.dtype],
        residual_type=0 if residual is None else TYPES[residual.dtype],
        out_type=TYPES[out.dtype],
        out_codes_type=0 if codes is None else CODE_TYPES[codes.dtype], silu_mul=silu_mul,
        tile_tokens=config.tile_tokens, cluster=config.cluster, workers=config.workers,
        split=config.split,
    )  # fmt: skip


def kind_of(weight: FragmentWeight) -> str:
    """Which of `cuda_tuning.KINDS` multiplies a weight."""
    return kind_name(weight.fmt, weight.has_minus_eight)


def kind_name(fmt: WeightFormat, minus_eight: bool) -> str:
    """Which of `cuda_tuning.KINDS` multiplies a format, with or without codes of -8."""
    if fmt.scheme == "w4a8":
        return "int8-channel" if fmt.per_channel else "int8"
    kind = "fp8-channel" if fmt.per_channel else fmt.numerics
    return f"{kind}-8" if minus_eight else kind


def case_of(weight: FragmentWeight, bucket: int, silu_mul: bool) -> Case:
    """What `cuda_tuning` chooses for."""
    group = WHOLE_GROUP if weight.fmt.per_channel else weight.fmt.group_size
    return Case(kind_of(weight), group, bucket, *weight.shape, silu_mul)


def workspace_bytes(device: torch.device, gemms: Sequence[tuple[int, int]], max_tokens: int) -> int:
    """Bytes that `gemm` asks for with weights [n, k] of any format and up to max_tokens tokens.

    Never less for more tokens. Asked for by every step of a model: what takes long is cached.
    """
    if not gemms:
        return 0
    sums = _most_sums(multiprocessors(device), tuple(gemms), cuda_tuning.bucket_of(max_tokens))
    # Whose weight is a gate's is not said.
    return sums + max(maxima_bytes(max_tokens, n) for n, _ in gemms)


@functools.cache
def _most_sums(sms: int, gemms: tuple[tuple[int, int], ...], largest: int) -> int:
    """Bytes of the sums of any call with up to `largest` tokens; the last bucket has no end."""
    most = 0
    for (n, k), kind, group, silu_mul in itertools.product(
        gemms, KINDS, (32, 64, 128), (False, True)
    ):
        for bucket in (bucket for bucket in BUCKETS if bucket <= largest):
            case = Case(kind, group, bucket, n, k, silu_mul)
            configs = [cuda_tuning.choose(case, bucket, sms)]
            if bucket == BUCKETS[-1]:
                # Its choice depends on the tokens, and not in one direction.
                configs += cuda_tuning.candidates(case, sms)
            most = max(most, *map(needed_bytes, configs))
    return most


def needed_bytes(config: Config) -> int:
    """Bytes of the sums of split tiles."""
    blocks = config.workers * config.cluster
    return 4 * blocks * cuda_tuning.TILE_ROWS * config.tile_tokens if config.split else 0


def maxima_bytes(tokens: int, n: int) -> int:
    """Bytes of the maxima of tokens, where the output of gate and up [n, k] is quantized."""
    return 4 * tokens * (n // cuda_tuning.TILE_ROWS)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@functools.cache
def _library() -> ctypes.CDLL:
    library = cuda.library()
    library.quant_cuda_gemm.argtypes = [ctypes.POINTER(Gemm), ctypes.c_int, ctypes.c_void_p]
    library.quant_cuda_gemm_check.argtypes = [ctypes.POINTER(Gemm)]
    library.quant_cuda_gemm_workspace.argtypes = [ctypes.POINTER(Gemm)]
    library.quant_cuda_gemm_workspace.restype = ctypes.c_int64
    return library
