"""Which tiles a Hopper GEMM runs in: out of a measured table, else by the model below.

A table, cuda_tuned/sm_90.json, is made offline by timing `candidates` (benchmarks/tune.py), by
bucket of tokens, so that nothing is tuned at run time and `workspace_bytes` is a maximum over few
cases. The model counts clocks of a multiprocessor for a unit of work, 128 rows of weights x 128
columns x a tile's tokens:

    tensor cores   4 clocks a token          (4096 8-bit products a clock)
    conversion     256 a clocks              (64 integer lanes; a: instructions a weight, as
                                              tests/quant_kernels/test_cuda_sass.py counts them)
    DRAM           8192 bytes / 20           (4.8 TB/s over 132 SMs at 1.83 GHz)
    L2             codes and X / 25          (about 6 TB/s; X once a cluster)

The slowest of the four is what a unit takes, and a worker takes as many units as its share. Sums
of split tiles cost a meeting in the L2. None of it is measured on a GPU yet.
"""

from __future__ import annotations

import functools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KINDS = (
    "int8-channel",
    "int8",
    "fp8-channel",
    "fp8-channel-8",
    "lut",
    "lut-8",
    "exact",
    "exact-8",
)  # in the order of QuantCudaKind; -8: some code is -8
BUCKETS = (16, 32, 64, 128, 256, 512)
TILES = (16, 32, 64, 128, 256)
TABLES = Path(__file__).parent / "cuda_tuned"
TILE_ROWS, TILE_ROWS_SILU_MUL, BLOCK_COLUMNS = 128, 64, 128
MOST_BLOCKS = 160

INSTRUCTIONS = {
    "int8-channel": 0.75,
    "int8": 1.3,
    "fp8-channel": 0.75,
    "fp8-channel-8": 1.1,
    "lut": 1.25,
    "lut-8": 1.5,
    "exact": 0.8,
    "exact-8": 1.15,
}
DRAM_BYTES, L2_BYTES, LANES = 20.0, 25.0, 64.0  # a clock
UNIT_BYTES = TILE_ROWS * BLOCK_COLUMNS // 2
OVERHEAD, MEETING, EPILOGUE = 60, 3000, 2000  # clocks of a unit, a split tile, a tile of 128 tokens


@dataclass(frozen=True)
class Config:
    """Tiles of 128 rows by tile_tokens, in clusters of `cluster` blocks; `workers` clusters take
    them whole, or split in equal parts."""

    tile_tokens: int
    cluster: int
    workers: int
    split: bool

    def __post_init__(self) -> None:
        if self.tile_tokens not in TILES or self.cluster not in (1, 2):
            raise ValueError(f"{self}: tiles have {TILES} tokens, and clusters one block or two")
        if not 1 <= self.workers * self.cluster <= MOST_BLOCKS:
            raise ValueError(f"{self}: workers make 1 to {MOST_BLOCKS} blocks")
        if self.split and self.tile_tokens > 128:
            raise ValueError(f"{self}: only tiles of up to 128 tokens are split")


@dataclass(frozen=True)
class Case:
    """What a configuration is chosen for: kind, bucket of tokens, weight [n, k], silu_mul."""

    kind: str
    group_size: int
    bucket: int
    n: int
    k: int
    silu_mul: bool


def bucket_of(tokens: int) -> int:
    """The bucket of a number of tokens."""
    return next((bucket for bucket in BUCKETS if tokens <= bucket), BUCKETS[-1])


def choose(case: Case, tokens: int, sms: int) -> Config:
    """The configuration for a case and its number of tokens on a GPU of sms multiprocessors."""
    measured = read_table(TABLES / "sm_90.json").get(case)
    return measured or by_model(case, tokens if case.bucket == BUCKETS[-1] else case.bucket, sms)


@functools.cache
def by_model(case: Case, tokens: int, sms: int) -> Config:
    """The candidate that the model gives the fewest clocks."""
    return min(candidates(case, sms), key=lambda config: clocks(case, config, tokens))


def candidates(case: Case, sms: int) -> list[Config]:
    """Configurations that there are kernels for, and that a bucket may want; the simplest first."""
    widest = 128 if case.kind.startswith("exact") else 256
    found = []
    for tile in TILES:
        if tile > widest or (tile > 2 * case.bucket and tile > TILES[0]):
            continue
        for cluster in (1, 2):
            wide = tile == widest or (case.group_size == 128 and tile >= 64)
            if cluster == 1 or wide:
                whole = Config(tile, cluster, sms // cluster, False)
                found += (
                    [whole] if tile > 128 else [whole, Config(tile, cluster, sms // cluster, True)]
                )
    return found


def clocks(case: Case, config: Config, tokens: int) -> float:
    """The model of the module docstring."""
    rows, tile_rows = case.n, TILE_ROWS
    if case.silu_mul:
        rows, tile_rows = case.n // 2, TILE_ROWS_SILU_MUL
    tiles = math.ceil(rows / (tile_rows * config.cluster)) * math.ceil(tokens / config.tile_tokens)
    blocks = math.ceil(case.k / BLOCK_COLUMNS)
    x_bytes = config.tile_tokens * BLOCK_COLUMNS / config.cluster
    promotion = config.tile_tokens * (128 / case.group_size) if "exact" in case.kind else 0
    unit = OVERHEAD + max(
        4.0 * config.tile_tokens + promotion,
        TILE_ROWS * BLOCK_COLUMNS * INSTRUCTIONS[case.kind] / LANES,
        UNIT_BYTES / DRAM_BYTES,
        (UNIT_BYTES + x_bytes) / L2_BYTES,
    )
    epilogue = EPILOGUE * config.tile_tokens / 128
    if config.split:
        workers = min(config.workers, tiles * blocks)
        return math.ceil(tiles * blocks / workers) * unit + MEETING + epilogue
    return math.ceil(tiles / config.workers) * (blocks * unit + epilogue)


@functools.cache
def read_table(path: Path) -> dict[Case, Config]:
    """A measured table; empty where there is none. ValueError says what is wrong in it.

    {"measured": {...}, "entries": [{"kind", "group_size", "bucket", "n", "k", "silu_mul",
    "config": {...}}]}
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
