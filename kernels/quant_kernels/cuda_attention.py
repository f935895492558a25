"""Attention over the INT4 cache on Hopper (csrc/cuda/prefill_kernel.cuh, decode_kernel.cuh).

Head dims 64, 128 and 256, up to 16 query heads a KV head in decode; other shapes raise OpError and
name the backend that takes them. Soft cap and skipping are kernels of their own, and so is prefill
over pages that a kernel before it has unpacked, for prompts long enough.
"""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from quant_kernels import cuda
from quant_kernels.cuda_gemm import TYPES, multiprocessors
from quant_kernels.registration import OpError

HEAD_DIMS = (64, 128, 256)
MAX_GROUP = {"prefill_attention": 128, "decode_attention": 16}  # query heads of a KV head
MAX_BATCH = 1024  # sequences of a decode step
ROW_EXTRAS = 4  # behind the D sums of a row of workspace

BAD_ALIGNMENT = -6  # QuantCudaStatus


class Attention(ctypes.Structure):
    """QuantCudaAttention."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in (
            "q", "q_scale", "kv_codes", "kv_scales", "block_table", "kv_lens", "out")),
        *((name, ctypes.c_int64) for name in (
            "q_token", "q_head", "q_scale_token", "table_row", "out_token", "out_head", "pages")),
        ("sm_scale", ctypes.c_float),
        ("soft_cap", ctypes.c_float),
        *((name, ctypes.c_int) for name in (
            "window", "batch", "heads", "kv_heads", "head_dim", "out_type")),
    )  # fmt: skip


class Prefill(ctypes.Structure):
    """QuantCudaPrefill."""

    _fields_ = (
        ("attention", Attention),
        ("cu_seqlens", ctypes.c_void_p),
        ("workspace", ctypes.c_void_p),
        ("workspace_bytes", ctypes.c_int64),
        ("max_query_len", ctypes.c_int),
        ("table_pages", ctypes.c_int),
        ("workers", ctypes.c_int),
        ("skip_threshold", ctypes.c_float),
    )


class Decode(ctypes.Structure):
    """QuantCudaDecode."""

    _fields_ = (
        ("attention", Attention),
        ("workspace", ctypes.c_void_p),
        ("workspace_bytes", ctypes.c_int64),
        ("workers", ctypes.c_int),
    )


def prefill_call(
    q_codes: Tensor,
    q_scale: Tensor,
    kv_codes: Tensor,
    kv_scales: Tensor,
    block_table: Tensor,
    cu_seqlens: Tensor,
    kv_lens: Tensor,
    max_query_len: int,
    out: Tensor,
    sm_scale: float,
    window: int,
    soft_cap: float = 0.0,
    skip_threshold: float = 0.0,
    workspace: Tensor | None = None,
    workers: int = 0,
) -> Prefill:
    """What the library is told; the tensors must outlive it. workers: blocks, with a workspace."""
    attention = _attention(
        q_codes, q_scale, kv_codes, kv_scales, block_table, kv_lens, out, sm_scale, window,
        soft_cap,
    )  # fmt: skip
    call = Prefill(attention, cu_seqlens.data_ptr(), None, 0, max_query_len, block_table.shape[1])
    call.skip_threshold = skip_threshold
    call.workers = workers
    if workspace is not None:
        call.workspace = workspace.data_ptr()
        call.workspace_bytes = workspace.numel() * workspace.element_size()
    return call


def decode_call(
    q_codes: Tensor,
    q_scale: Tensor,
    kv_codes: Tensor,
    kv_scales: Tensor,
    block_table: Tensor,
    kv_lens: Tensor,
    out: Tensor,
    sm_scale: float,
    window: int,
    workspace: Tensor,
    workers: int,
    soft_cap: float = 0.0,
) -> Decode:
    """What the library is told; the tensors must outlive it. workers: blocks of the launch."""
    attention = _attention(
        q_codes, q_scale, kv_codes, kv_scales, block_table, kv_lens, out, sm_scale, window,
        soft_cap,
    )  # fmt: skip
    held = workspace.numel() * workspace.element_size()
    return Decode(attention, workspace.data_ptr(), held, workers)


def prefill_attention(
    q_codes: Tensor,
    q_scale: Tensor,
    kv_codes: Tensor,
    kv_scales: Tensor,
    block_table: Tensor,
    cu_seqlens: Tensor,
    kv_lens: Tensor,
    max_query_len: int,
    out: Tensor,
    sm_scale: float,
    window: int,
    soft_cap: float = 0.0,
    skip_threshold: float = 0.0,
    expand: bool | None = None,
) -> None:
    """`ops.prefill_attention`.

    expand: whether pages are unpacked once, into a workspace of this call, or by every block that
    reads them; None: as it is faster. Outputs have the same bits.
    """
    op = "prefill_attention"
    _check_group(op, q_codes, kv_codes)
    if 0 in (len(kv_lens), max_query_len):
        return
    call = prefill_call(
        q_codes, q_scale, kv_codes, kv_scales, block_table, cu_seqlens, kv_lens, max_query_len,
        out, sm_scale, window, soft_cap, skip_threshold,
        workers=multiprocessors(q_codes.device),
    )  # fmt: skip
    library = cuda.library()
    if library.quant_cuda_prefill_gains(ctypes.byref(call)) if expand is None else expand:
        # From torch's pool: in the stream's order, and in a graph from the graph's own.
        call.workspace_bytes = library.quant_cuda_prefill_workspace(ctypes.byref(call))
        workspace = q_codes.new_empty(call.workspace_bytes, dtype=torch.uint8)
        call.workspace = workspace.data_ptr()
    _start(op, call, q_codes.device)


def decode_attention(
    q_codes: Tensor,
    q_scale: Tensor,
    kv_codes: Tensor,
    kv_scales: Tensor,
    block_table: Tensor,
    kv_lens: Tensor,
    out: Tensor,
    sm_scale: float,
    window: int,
    workspace: Tensor | None,
    soft_cap: float = 0.0,
) -> None:
    """`ops.decode_attention`."""
    op = "decode_attention"
    _check_group(op, q_codes, kv_codes)
    batch, heads, dim = q_codes.shape
    if batch == 0:
        return
    if batch > MAX_BATCH:
        raise OpError(f"{op}: {batch} sequences; a call takes {MAX_BATCH}")
    shape = (batch, heads, kv_codes.shape[2], dim)
    needed = decode_workspace_bytes(q_codes.device, *shape)
    held = 0 if workspace is None else workspace.numel() * workspace.element_size()
    if workspace is None or held < needed:
        raise OpError(
            f"{op} needs a workspace of {needed} bytes, got {held}; allocate "
            f"ops.workspace_bytes(device, attention={shape}) of them"
        )
    call = decode_call(
        q_codes, q_scale, kv_codes, kv_scales, block_table, kv_lens, out, sm_scale, window,
        workspace, worker_count(q_codes.device, heads, shape[2], dim), soft_cap,
    )  # fmt: skip
    _start(op, call, q_codes.device)


def decode_workspace_bytes(
    device: torch.device, batch: int, heads: int, kv_heads: int, head_dim: int
) -> int:
    """Bytes of a decode step's workspace, whatever its batch and lengths."""
    workers = worker_count(device, heads, kv_heads, head_dim)
    return workers * (heads // kv_heads) * (head_dim + ROW_EXTRAS) * 4


@functools.cache
def worker_count(device: torch.device, heads: int, kv_heads: int, head_dim: int) -> int:
    """Blocks that fit on the device at once."""
    blocks = int(cuda.library().quant_cuda_decode_blocks(heads, kv_heads, head_dim))
    return blocks * multiprocessors(device)


def _attention(
    q_codes: Tensor,
    q_scale: Tensor,
    kv_codes: Tensor,
    kv_scales: Tensor,
    block_table: Tensor,
    kv_lens: Tensor,
    out: Tensor,
    sm_scale: float,
    window: int,
    soft_cap: float,
) -> Attention:
    heads, dim = q_codes.shape[1:]
    pages, kv_heads = kv_codes.shape[1:3]
    return Attention(
        q_codes.data_ptr(), q_scale.data_ptr(), kv_codes.data_ptr(), kv_scales.data_ptr(),
        block_table.data_ptr(), kv_lens.data_ptr(), out.data_ptr(),
        q_codes.stride(0), q_codes.stride(1), q_scale.stride(0), block_table.stride(0),
        out.stride(0), out.stride(1), pages, sm_scale, soft_cap, window, len(kv_lens), heads,
        kv_heads, dim, TYPES[out.dtype],
    )  # fmt: skip


def _check_group(op: str, q_codes: Tensor, kv_codes: Tensor) -> None:
    """Raise OpError where no kernel has this head_dim or that many heads of a KV head."""
    heads, dim = q_codes.shape[1:]
    group, most = heads // kv_codes.shape[2], MAX_GROUP[op]
    if dim not in HEAD_DIMS or group > most:
        raise OpError(
            f"{op}: the CUDA kernels take head_dim {', '.join(map(str, HEAD_DIMS))} and up to "
            f"{most} query heads a KV head, got head_dim {dim} and {group}; the triton backend "
            "takes these"
        )


def _start(op: str, call: Prefill | Decode, device: torch.device) -> None:
    stream = ctypes.c_void_p(torch.cuda.current_stream(device).cuda_stream)
    start = getattr(cuda.library(), f"quant_cuda_{op}")
    status = start(ctypes.byref(call), device.index, stream)
    if status:
        raise OpError(f"{op}: {_explain(status, call.attention)}")


def _explain(status: int, call: Attention) -> str:
    if status == BAD_ALIGNMENT:
        return (
            "addresses and strides of queries and cache must be multiples of 16 bytes, and of out "
            f"of 4 elements; got strides {call.q_token}, {call.q_head} and {call.out_token}, "
            f"{call.out_head}"
        )
    return cuda.error_string(status)
