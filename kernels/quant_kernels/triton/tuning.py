"""Which tiles a GEMM runs in: out of a table measured on such a GPU, else by the rule below.

A table, tuned/sm_XY.json, is made offline by timing `candidates`; nothing is tuned at run time,
when a first call would take seconds and answers could depend on which one won. Both depend on the
number of tokens through its bucket alone (16, 32, 64, 128, 256: at most as many, or more), so that
a server compiles few kernels and `workspace_bytes` is a maximum over few cases.

The rule. A tile has as many tokens as the bucket, but at most 128, or 64 with two accumulators
(silu_mul): wider ones leave FP8 no registers for the second sum that its MMAs need. Where E4M3 is
multiplied as FP16, which takes instructions and registers to convert, a tile has 32 or 16.

Up to 64 tokens a GEMM streams its weights, and what counts is that every multiprocessor has enough
programs in flight: 64 rows a program, one warp group, and K split into as many parts as fill
RESIDENT programs a multiprocessor, the fewest among about equally full splits. From 128 tokens on
tensor cores count: 128 rows, two warp groups, no split.
"""

from __future__ import annotations

import functools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quant_kernels import dispatch
from quant_kernels.formats import WeightFormat
from quant_kernels.registration import OpError

KINDS = ("int8", "int8-channel", "lut", "fp8-channel", "exact")
BUCKETS = (16, 32, 64, 128, 256)
SPLITS = (1, 2, 4, 8, 16)
# Columns of K that a program of a split has at least: four of the widest spans, so that its
# pipeline fills.
SPLIT_COLUMNS = 512
# Programs of a memory-bound GEMM that a multiprocessor holds at a time, as far as the rule cares.
RESIDENT = 4
# A split that fills the GPU this much better is worth its partial sums.
GAIN = 1.1
# The interpreter's stand-in: small shapes then run unsplit, as large ones do on a GPU.
INTERPRETED_MULTIPROCESSORS = 2
TABLES = Path(__file__).parent / "tuned"


@dataclass(frozen=True)
class Config:
    """Tiles of block_n weight rows by block_m tokens, K in split_k parts, and Triton's options."""

    block_n: int
    block_m: int
    split_k: int
    num_warps: int
    num_stages: int

    def __post_init__(self) -> None:
        for name in ("block_n", "block_m", "split_k", "num_warps"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1 or value & (value - 1):
                raise ValueError(f"{name} of {self} must be a power of two")
        if self.block_n < 64 or self.block_m < 16:
            raise ValueError(f"{self}: tiles have at least 64 weight rows and 16 tokens")
        if not isinstance(self.num_stages, int) or self.num_stages < 1:
            raise ValueError(f"num_stages of {self} must be at least 1")


@dataclass(frozen=True)
class Case:
    """What a configuration is chosen for: format, bucket of tokens, weight [n, k], silu_mul."""

    kind: str
    bucket: int
    n: int
    k: int
    silu_mul: bool


def kind_of(fmt: WeightFormat) -> str:
    """What the kernels call a format: its numerics, or its operand where there are no groups."""
    if fmt.per_channel:
        return "int8-channel" if fmt.scheme == "w4a8" else "fp8-channel"
    return fmt.numerics


def bucket_of(tokens: int) -> int:
    """The bucket of a number of tokens."""
    return next((bucket for bucket in BUCKETS if tokens <= bucket), BUCKETS[-1])


def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU; a fixed number in the interpreter."""
    if device.type != "cuda":
        return INTERPRETED_MULTIPROCESSORS
    return _multiprocessors(device)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def choose(
    capability: tuple[int, int], kind: str, m: int, n: int, k: int, sms: int, silu_mul: bool = False
) -> Config:
    """The configuration for m tokens and a weight [n, k] on a GPU of sms multiprocessors."""
    return _choose(capability, Case(kind, bucket_of(m), n, k, silu_mul), sms)


@functools.cache
def _choose(capability: tuple[int, int], case: Case, sms: int) -> Config:
    path = TABLES / f"sm_{capability[0]}{capability[1]}.json"
    return read_table(path).get(case) or by_rule(case, sms, capability >= dispatch.FP8_CAPABILITY)


def by_rule(case: Case, sms: int, fp8: bool = True) -> Config:
    """The rule of the module docstring; fp8 False: E4M3 is multiplied as FP16."""
    widest = 64 if case.silu_mul else 128
    if not fp8 and not case.kind.startswith("int8"):
        widest = 16 if case.silu_mul else 32
    elif case.bucket > 64:
        return Config(128, widest, 1, 8, 3)
    block_m = min(case.bucket, widest)
    stages = 5 if block_m <= 32 else 4
    rows = case.n // 2 if case.silu_mul else case.n
    programs = math.ceil(rows / 64) * math.ceil(case.bucket / block_m)
    return Config(64, block_m, _split(programs, case.k, RESIDENT * sms), 4, stages)


def _split(tiles: int, columns: int, slots: int) -> int:
    """The fewest parts of K with which programs of `tiles` fill `slots` places about best."""
    if tiles >= slots:
        return 1

    def time(parts: int) -> float:
        return math.ceil(tiles * parts / slots) / parts

    fitting = [parts for parts in SPLITS if parts == 1 or columns >= parts * SPLIT_COLUMNS]
    best = min(map(time, fitting))
    return next(parts for parts in fitting if time(parts) <= best * GAIN)


def candidates(kind: str, bucket: int, k: int, silu_mul: bool = False) -> list[Config]:
    """Configurations worth timing for a bucket: those whose tiles fit registers (`by_rule`)."""
    widest = 64 if silu_mul else 256 if kind.startswith("int8") else 128
    shapes = [(64, 4), (128, 8)] if bucket > 64 or not silu_mul else [(64, 4)]
    found = []
    for rows, warps in shapes:
        for block_m in (16, 32, 64, 128, 256):
            if not bucket // 4 <= block_m <= min(bucket, widest) or (block_m, rows) == (256, 64):
                continue
            for stages in (2, 3, 4) if block_m >= 128 else (3, 4, 5, 6):
                for parts in SPLITS if bucket <= 128 else (1,):
                    if parts == 1 or k >= parts * SPLIT_COLUMNS:
                        found.append(Config(rows, block_m, parts, warps, stages))
    return found


def needed_bytes(config: Config, tokens: int, n: int) -> int:
    """Bytes of the partial sums of a weight of n rows."""
    return 0 if config.split_k == 1 else 4 * config.split_k * n * tokens


def check_workspace(config: Config, tokens: int, n: int, k: int, workspace: Tensor | None) -> None:
    """Raise ops.OpError where a split GEMM has no workspace, or too small a one."""
    needed = needed_bytes(config, tokens, n)
    found = 0 if workspace is None else workspace.numel() * workspace.element_size()
    if found < needed:
        raise OpError(
            f"gemm of {tokens} tokens with a weight [{n}, {k}] splits K in {config.split_k} parts "
            f"and needs a workspace of {needed} bytes, got {found}; see ops.workspace_bytes"
        )


def workspace_bytes(capability: tuple[int, int], max_tokens: int, n: int, k: int, sms: int) -> int:
    """The most that `choose`'s configurations need with up to max_tokens tokens."""
    ends = {min(bucket, max_tokens) for bucket in BUCKETS if bucket_of(max_tokens) >= bucket}
    ends.add(max_tokens)
    return max(
        needed_bytes(choose(capability, kind, m, n, k, sms, silu_mul), m, n)
        for kind in KINDS
        for m in ends
        for silu_mul in (False, True)
    )


@functools.cache
def read_table(path: Path) -> dict[Case, Config]:
    """A measured table; empty where there is none. ValueError says what is wrong in it.

    {"measured": {...}, "entries": [{"kind", "bucket", "n", "k", "silu_mul", "config": {...}}]}
    """
    if not path.exists():
        return {}
    return parse_table(json.loads(path.read_text()), str(path))


def parse_table(content: Any, name: str) -> dict[Case, Config]:
    """`read_table` of what is in the file."""
    if not isinstance(content, dict) or not isinstance(content.get("entries"), list):
        raise ValueError(f'{name}: a table of configurations is {{"entries": [...]}}')
    table: dict[Case, Config] = {}
    for i, entry in enumerate(content["entries"]):
        try:
            fields = dict(entry)
            config = Config(**fields.pop("config"))
            case = Case(**fields)
        except (TypeError, KeyError, ValueError) as error:
            raise ValueError(f"{name}: entry {i} is no case with a config: {error}") from error
        if case.kind not in KINDS or case.bucket not in BUCKETS or case in table:
            raise ValueError(f"{name}: entry {i}, {case}, is unknown or there twice")
        table[case] = config
    return table
