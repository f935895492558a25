"""CUTLASS's INT4 x FP8 GEMM on Hopper, which our own kernels are measured against.

    out[m, n] = BF16(a[m] c[n] sum_k x[m, k] P(q, t)[n, k] + bias[n]),    P(q, t) = E4M3(q t)

`lut` of `formats.py` with group size 128, or any numerics of w4afp8 with one scale a row (t = 1). A
kernel does not multiply q by t: it looks the product up. Its operands (`BaselineWeight`):

    tables  [G, N, 8] E4M3: -8 t, -7 t, ..., -t
    codes   nibble = q for q <= 0, 8 - q for q > 0

so that the low three bits of both (q + 8 for q < 0) are |q| t's place in the table, and the highest
bit is the sign. The kernel makes a positive table of it, with zero in place 0. Codes lie where a
thread finds its 16 of a WGMMA's 64 x 32 next to each other:

    offset(n, k) = 64 (n % 8) + 16 (k / 4 % 4) + 8 (k / 16 % 2) + 4 (n / 8 % 2) + k % 4
                 + 512 (n / 16 + (N / 16) (k / 32))        in codes, the even one in the low nibble

That is what CUTLASS's example 55 and vLLM's W4A8-FP8 path store too. The library,
libquant_cutlass.so (csrc/include/quant_cutlass.h), is built by `make baseline`; `prepare` needs
neither it nor a GPU.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quant_kernels import native
from quant_kernels.formats import (
    FormatError,
    WeightFormat,
    e4m3_values,
    join_scales,
    product_levels,
    split_scales,
)
from quant_kernels.packing import CODES_AT_ONCE, PackedWeight, pack_int4, unpack_int4

ABI = 1
TILES = (16, 32, 64, 128, 256)  # tokens; 128 output features
TABLE = 8
TABLE_GROUP = 128  # groups are multiples of CUTLASS's tile of K
BLOCK_ROWS, BLOCK_COLUMNS = 16, 32
BLOCK_BYTES = BLOCK_ROWS * BLOCK_COLUMNS // 2


@dataclass(frozen=True)
class BaselineWeight:
    """A quantized linear as CUTLASS reads it (module docstring).

    codes [K / 32, N / 16, 256] uint8; tables [G, N, 8] float8_e4m3fn; c [N] FP32.
    """

    LAYOUT: ClassVar[str] = "cutlass"
    codes: Tensor
    tables: Tensor
    c: Tensor
    fmt: WeightFormat

    @property
    def shape(self) -> tuple[int, int]:
        """[N, K] of the weight."""
        return len(self.c), len(self.codes) * BLOCK_COLUMNS

    @property
    def group(self) -> int:
        """Consecutive k that share a table."""
        return self.shape[1] // len(self.tables)


def why_not(m: int, n: int, k: int, group: int, tile: int) -> str | None:
    """Why m tokens by n output and k input features cannot run in a tile; None where they can.

    group: consecutive k that share a scale, k itself for one scale a row.
    """
    if tile not in TILES:
        return f"a tile has {', '.join(map(str, TILES))} tokens, not {tile}"
    if not all(1 <= size < 2**31 for size in (m, n, k, group)):
        return f"a size of [{m}, {n}, {k}], group {group} is below 1 or does not fit 32 bits"
    if n % BLOCK_ROWS:
        return f"out_features {n} must be a multiple of {BLOCK_ROWS}"
    if k % BLOCK_COLUMNS:
        return f"in_features {k} must be a multiple of {BLOCK_COLUMNS}"
    if k % group or (group != k and group % TABLE_GROUP):
        return (
            f"in_features {k} in groups of {group}: CUTLASS takes groups of {TABLE_GROUP} and its "
            "multiples, without a remainder, or one scale a row"
        )
    return None


def choose_tile(m: int, n: int, k: int) -> int:
    """Tokens of a tile, as vLLM chooses them: few enough to fill the GPU with tiles."""
    if m <= 32:
        return 16 if m <= 16 else 32
    if m <= 64:
        return 32 if max(n, k) <= 8192 else 64
    if m <= 128:
        return 64 if n <= 8192 else 128
    if m <= 256:
        return 64 if n <= 4096 else 128 if n <= 8192 else 256
    return 128 if m <= 512 and n <= 4096 else 256


def encode(codes: Tensor) -> Tensor:
    """Codes [...] int8 in [-8, 7] -> nibbles [...] uint8 that index a table."""
    return (torch.where(codes > 0, 8 - codes, codes) & 15).view(torch.uint8)


def decode(nibbles: Tensor) -> Tensor:
    """Inverse of `encode`."""
    signed = nibbles.view(torch.int8)
    positive = (8 - signed) % 8  # 0 stays 0
    return torch.where(signed >= 8, signed - 16, positive)


def shuffle(nibbles: Tensor) -> Tensor:
    """Nibbles [N, K] uint8 -> bytes [K / 32, N / 16, 256] in the order of `offset`."""
    rows, columns = nibbles.shape
    # n = 16 b + 8 h + r and k = 32 B + 16 j + 4 c + i: axes b, h, r, B, j, c, i.
    view = nibbles.view(rows // BLOCK_ROWS, 2, 8, columns // BLOCK_COLUMNS, 2, 4, 4)
    ordered = view.permute(3, 0, 2, 5, 4, 1, 6).reshape(-1, 2)
    low, high = ordered.unbind(1)
    return (low | high << 4).view(columns // BLOCK_COLUMNS, rows // BLOCK_ROWS, BLOCK_BYTES)


def unshuffle(codes: Tensor) -> Tensor:
    """Inverse of `shuffle`."""
    deep, blocks, _ = codes.shape
    ordered = torch.stack((codes & 15, codes >> 4), dim=-1)
    view = ordered.view(deep, blocks, 8, 4, 2, 2, 4)  # B, b, r, c, j, h, i
    return view.permute(1, 5, 2, 0, 4, 3, 6).reshape(blocks * BLOCK_ROWS, deep * BLOCK_COLUMNS)


def prepare(weight: PackedWeight) -> BaselineWeight:
    """Checkpoint layout -> CUTLASS's, some rows at a time; on the weight's device.

    Raises FormatError where CUTLASS cannot multiply the format or the shape.
    """
    (rows, columns), fmt = weight.shape, weight.fmt
    if fmt.scheme != "w4afp8" or (fmt.numerics != "lut" and not fmt.per_channel):
        raise FormatError(
            f"CUTLASS's table holds w4afp8 with lut numerics, or one scale a row, not {fmt.label}"
        )
    reason = why_not(1, rows, columns, columns if fmt.per_channel else fmt.group_size, TILES[0])
    if reason is not None:
        raise FormatError(f"weight [{rows}, {columns}] of {fmt.label}: {reason}")
    deep, blocks = columns // BLOCK_COLUMNS, rows // BLOCK_ROWS
    codes = torch.empty(deep, blocks, BLOCK_BYTES, dtype=torch.uint8, device=weight.words.device)
    step = max(1, CODES_AT_ONCE // (columns * BLOCK_ROWS))
    for start in range(0, blocks, step):
        part = unpack_int4(weight.words[start * BLOCK_ROWS : (start + step) * BLOCK_ROWS])
        codes[:, start : start + step] = shuffle(encode(part))
    t, c = split_scales(weight.scales, fmt)
    return BaselineWeight(codes, tables_of(t, fmt), c.flatten().contiguous(), fmt)


def tables_of(t: Tensor, fmt: WeightFormat) -> Tensor:
    """Group scales t [N, G] -> tables [G, N, 8] float8_e4m3fn: the products with -8 .. -1."""
    negative = product_levels(t, fmt)[..., :TABLE]  # exact in E4M3
    return negative.to(torch.float8_e4m3fn).transpose(0, 1).contiguous()


def restore(weight: BaselineWeight) -> PackedWeight:
    """CUTLASS's layout -> checkpoint layout. Inverse of `prepare` for scales on the grid."""
    t = -e4m3_values(weight.tables)[..., -1].T
    scales = join_scales(t, weight.c.unsqueeze(1)).contiguous()
    return PackedWeight(pack_int4(decode(unshuffle(weight.codes))), scales, weight.fmt)


def available() -> bool:
    """Whether the library is built; whether there is a GPU for it, `cuda.devices` says."""
    return why_unavailable() is None


def why_unavailable() -> str | None:
    """Why the library cannot be used and what to do about it; None where it can."""
    try:
        _library()
    except native.LibraryMissing as error:
        return str(error)
    return None


def workspace_bytes(m: int, weight: BaselineWeight, tile: int | None = None) -> int:
    """Bytes of workspace that `gemm` needs for m tokens."""
    (n, k), needed = weight.shape, ctypes.c_int64(0)
    tile = choose_tile(m, n, k) if tile is None else tile
    status = _library().quant_cutlass_workspace_bytes(
        m, n, k, weight.group, tile, ctypes.byref(needed)
    )
    if status:
        raise RuntimeError(_failure(m, weight, tile, status))
    return needed.value


def gemm(
    x_codes: Tensor,
    x_scale: Tensor,
    weight: BaselineWeight,
    out: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    silu_mul: bool = False,
    workspace: Tensor | None = None,
    *,
    tile: int | None = None,
) -> None:
    """As `ops.gemm`, on the current stream, for what CUTLASS's epilogue holds.

    x_codes [M, K] float8_e4m3fn; x_scale [M, 1] FP32; out [M, N] BF16; bias [N] BF16. residual and
    silu_mul are refused: a baseline with them is this GEMM and another kernel. tile: tokens of a
    tile, `choose_tile` by default. workspace: uint8 [`workspace_bytes`].

    Raises ValueError for other arguments, RuntimeError where the GPU cannot run it.
    """
    m, (n, k) = len(x_codes), weight.shape
    if residual is not None or silu_mul:
        raise ValueError("gemm: CUTLASS's baseline has neither a residual nor SiLU * mul")
    _expect("x_codes", x_codes, (m, k), torch.float8_e4m3fn)
    _expect("x_scale", x_scale, (m, 1), torch.float32)
    _expect("out", out, (m, n), torch.bfloat16)
    if bias is not None:
        _expect("bias", bias, (n,), torch.bfloat16)
    device = x_codes.device
    parts = (x_scale, weight.codes, weight.tables, weight.c, out, bias, workspace)
    if device.type != "cuda" or any(part is not None and part.device != device for part in parts):
        raise ValueError(f"gemm: all tensors must be on one GPU, and x_codes is on {device}")
    if m == 0:
        return
    tile = choose_tile(m, n, k) if tile is None else tile
    status = _library().quant_cutlass_gemm(
        x_codes.data_ptr(), x_scale.data_ptr(),
        weight.codes.data_ptr(), weight.tables.data_ptr(), weight.c.data_ptr(),
        None if bias is None else bias.data_ptr(), out.data_ptr(),
        m, n, k, weight.group, tile,
        *((None, 0) if workspace is None else (workspace.data_ptr(), workspace.nbytes)),
        device.index, torch.cuda.current_stream(device).cuda_stream,
    )  # fmt: skip
    if status:
        raise RuntimeError(_failure(m, weight, tile, status))


def _expect(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tuple(tensor.shape) != shape or tensor.dtype != dtype or not tensor.is_contiguous():
        raise ValueError(
            f"gemm: {name} must be {dtype} {list(shape)}, contiguous, not {tensor.dtype} "
            f"{list(tensor.shape)} with strides {tensor.stride()}"
        )


def _failure(m: int, weight: BaselineWeight, tile: int, status: int) -> str:
    (n, k), reason = weight.shape, _library().quant_cutlass_error_string(status).decode()
    return f"gemm of {m} tokens and a {weight.fmt.label} weight [{n}, {k}], tile {tile}: {reason}"


@functools.cache
def _library() -> ctypes.CDLL:
    library = native.load("quant_cutlass", ABI)
    pointer, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    sizes = [size, size, size, size, number]  # m, n, k, group, tile
    library.quant_cutlass_error_string.argtypes = [number]
    library.quant_cutlass_error_string.restype = ctypes.c_char_p
    library.quant_cutlass_can_run.argtypes = sizes
    library.quant_cutlass_workspace_bytes.argtypes = [*sizes, ctypes.POINTER(size)]
    library.quant_cutlass_gemm.argtypes = [
        pointer, pointer,  # x, x_scale
        pointer, pointer, pointer,  # codes, tables, c
        pointer, pointer,  # bias, out
        *sizes,
        pointer, size,  # workspace and its bytes
        number, pointer,  # device, stream
    ]  # fmt: skip
    return library
