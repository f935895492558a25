"""CUTLASS's layout of a weight: where every code lies, and what its lookup makes of it."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quant_kernels import cutlass_baseline as baseline
from quant_kernels.formats import (
    LUT_ANCHOR,
    FormatError,
    WeightFormat,
    e4m3_values,
    every_format,
    join_scales,
    kernel_operand,
    product_levels,
    round_row_unit,
    split_scales,
)
from quant_kernels.packing import PackedWeight, pack_int4, unpack_int4

ROOT = Path(__file__).parents[2]
LUT = WeightFormat("w4afp8", 128, "lut")
PER_CHANNEL = WeightFormat("w4afp8", -1, "lut")
TAKEN = (LUT, PER_CHANNEL, WeightFormat("w4afp8", -1, "exact"))

# A program that says where CuTe puts W [n, k], and which (row, column) a thread's values are of.
CUTE = """
#include <cstdio>
#include <cstdlib>
#include "cute/tensor.hpp"
#include "cute/atom/mma_traits_sm90_gmma.hpp"
#include "cuda/baseline/weight_layout.cuh"

int main(int, char** arguments) {
  const int n = std::atoi(arguments[1]), k = std::atoi(arguments[2]);
  const auto layout = quant_baseline::weight_layout(n, k);
  for (int i = 0; i < n; ++i)
    for (int j = 0; j < k; ++j) std::printf("%d ", int(layout(i, j, 0)));
  std::printf("\\n");
  using Wgmma = cute::SM90::GMMA::MMA_64x16x32_F32E4M3E4M3_RS_TN<>;
  const auto owned = typename cute::MMA_Traits<Wgmma>::ALayout{};
  for (int thread = 0; thread < 128; ++thread)
    for (int value = 0; value < 16; ++value) std::printf("%d ", int(owned(thread, value)));
}
"""


def random_weight(n: int, k: int, fmt: WeightFormat, seed: int) -> PackedWeight:
    """Random codes, and scales on the format's grid that differ in every row and group."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-8, 8, (n, k), generator=generator, dtype=torch.int8)
    rough = torch.rand(n, fmt.groups(k), generator=generator).add(0.02)
    rough = (rough * torch.rand(n, 1, generator=generator).mul(4).exp()).bfloat16()
    t, c = split_scales(rough, fmt)
    return PackedWeight(pack_int4(codes), join_scales(t, round_row_unit(c)), fmt)


def offset(n: torch.Tensor, k: torch.Tensor, rows: int) -> torch.Tensor:
    """The formula in the module's docstring."""
    inner = 64 * (n % 8) + 16 * (k // 4 % 4) + 8 * (k // 16 % 2) + 4 * (n // 8 % 2) + k % 4
    return inner + 512 * (n // 16 + rows // 16 * (k // 32))


def cuda_include() -> Path | None:
    """The headers of a CUDA installation, or None."""
    nvcc = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), nvcc and Path(nvcc).resolve().parents[1]]
    for home in (*homes, "/usr/local/cuda"):
        if home and (Path(home) / "include" / "cuda_runtime_api.h").is_file():
            return Path(home) / "include"
    return None


def cutlass_include() -> Path | None:
    """CUTLASS's headers: $CUTLASS_DIR's, or those that a build has fetched, or None."""
    homes = [Path(os.environ[name]) for name in ("CUTLASS_DIR",) if name in os.environ]
    if "QUANT_LIB_DIR" in os.environ:
        homes.append(Path(os.environ["QUANT_LIB_DIR"]) / "cutlass")
    for home in (*homes, *ROOT.glob("build/*/cutlass")):
        if (home / "include" / "cutlass" / "version.h").is_file():
            return home / "include"
    return None


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(TAKEN), st.integers(1, 5), st.integers(1, 3), st.integers(0, 2**20))
def test_preparing_loses_nothing(fmt, blocks, groups, seed):
    n, k = 16 * blocks, groups * (32 if fmt.per_channel else 128)
    weight = random_weight(n, k, fmt, seed)
    prepared = baseline.prepare(weight)
    assert prepared.shape == (n, k)
    assert prepared.group == (k if fmt.per_channel else 128)
    assert prepared.codes.shape == (k // 32, n // 16, 256)
    back = baseline.restore(prepared)
    assert torch.equal(back.words, weight.words)
    assert torch.equal(back.scales, weight.scales)


def test_parts_of_a_weight_come_to_the_same_as_the_whole(monkeypatch):
    weight = random_weight(112, 256, LUT, 3)
    whole = baseline.prepare(weight)
    monkeypatch.setattr(baseline, "CODES_AT_ONCE", 3 * 16 * 256)
    parts = baseline.prepare(weight)
    assert torch.equal(whole.codes, parts.codes)


def test_a_nibble_says_the_place_in_the_table_and_the_sign():
    codes = torch.arange(-8, 8, dtype=torch.int8)
    nibbles = baseline.encode(codes)
    assert sorted(nibbles.tolist()) == list(range(16))
    for code, nibble in zip(codes.tolist(), nibbles.tolist(), strict=True):
        assert (nibble >= 8) == (code < 0)
        assert nibble % 8 == (8 - abs(code)) % 8  # the table's entry i is (i - 8) t
    assert torch.equal(baseline.decode(nibbles), codes)


@pytest.mark.parametrize(("rows", "columns"), [(16, 32), (48, 96), (64, 256)])
def test_every_code_lies_where_the_formula_says(rows, columns):
    n, k = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    places = offset(n, k, rows)
    assert torch.equal(places.flatten().sort().values, torch.arange(rows * columns))
    generator = torch.Generator().manual_seed(rows)
    nibbles = torch.randint(0, 16, (rows, columns), generator=generator, dtype=torch.uint8)
    stored = baseline.shuffle(nibbles)
    found = stored.flatten()[places // 2] >> 4 * (places % 2).to(torch.uint8) & 15
    assert torch.equal(found, nibbles)
    assert torch.equal(baseline.unshuffle(stored), nibbles)


@pytest.mark.parametrize(("rows", "columns"), [(64, 64), (80, 192)])
def test_formula_is_cutes_own(rows, columns, tmp_path):
    compiler, cutlass, cuda = shutil.which("g++"), cutlass_include(), cuda_include()
    if compiler is None or cutlass is None or cuda is None:
        pytest.skip("needs g++, CUDA's headers, and CUTLASS's (CUTLASS_DIR, or `make native`)")
    (tmp_path / "layout.cpp").write_text(CUTE)
    command = [compiler, "-std=c++17", "-w", f"-I{ROOT / 'csrc'}"]
    command += [f"-I{folder}" for folder in (cutlass, cuda, cuda / "cccl")]
    program = tmp_path / "layout"
    subprocess.run([*command, tmp_path / "layout.cpp", "-o", program], check=True)
    done = subprocess.run(
        [program, str(rows), str(columns)], capture_output=True, text=True, check=True
    )
    layout, owned = (
        torch.tensor([int(x) for x in line.split()]) for line in done.stdout.split("\n")
    )
    n, k = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    assert torch.equal(layout.view(rows, columns), offset(n, k, rows))

    # Value v of lane l of the warp that has rows 16 w .. 16 w + 15 of WGMMA's 64 x 32, stored as
    # row + 64 column, lies at code 16 l + v of that warp's block.
    thread, value = torch.meshgrid(torch.arange(128), torch.arange(16), indexing="ij")
    owned = owned.view(128, 16)
    expected = 512 * (thread // 32) + 16 * (thread % 32) + value
    assert torch.equal(offset(owned % 64, owned // 64, 64), expected)


def every_group_scale() -> torch.Tensor:
    """All E4M3 numbers from 0 to 56, the largest group scale."""
    values = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    return values[values <= LUT_ANCHOR]


def test_tables_hold_the_formats_products_for_every_scale():
    t = every_group_scale()
    tables = baseline.tables_of(t.unsqueeze(1), LUT)
    assert tables.shape == (1, len(t), 8)
    levels = product_levels(t, LUT)  # of codes -8 .. 7
    negative = tables[0].float()
    assert torch.equal(negative, levels[:, :8])
    assert torch.equal(negative, (t[:, None] * torch.arange(-8, 0)).to(torch.float8_e4m3fn).float())
    # And those of 7 .. 1 are the same without the sign, as the kernel takes them to be.
    assert torch.equal(-negative[:, 1:].flip(1), levels[:, 9:])


def lop3(a: torch.Tensor, b: int, c: int, table: int) -> torch.Tensor:
    """PTX lop3.b32: bit i of the table is the answer to inputs abc = i."""
    result = torch.zeros_like(a)
    for i in range(8):
        if table >> i & 1:
            term = torch.full_like(a, 0xFFFFFFFF)
            for operand, bit in ((a, i >> 2 & 1), (b, i >> 1 & 1), (c, i & 1)):
                term = term & (operand if bit else ~torch.as_tensor(operand)) & 0xFFFFFFFF
            result |= term
    return result


def prmt(a: torch.Tensor, b: torch.Tensor, selector: torch.Tensor) -> torch.Tensor:
    """PTX prmt.b32 for selectors whose nibbles are below 8: four of the eight bytes of (b, a)."""
    result = torch.zeros_like(a)
    for i in range(4):
        choice = selector >> 4 * i & 15
        assert (choice < 8).all()
        word = torch.where(choice < 4, a, b)
        result |= (word >> 8 * (choice % 4) & 0xFF) << 8 * i
    return result


def looked_up(weight: baseline.BaselineWeight) -> torch.Tensor:
    """The E4M3 operand [N, K] that CUTLASS's instructions make of a weight, from its bytes.

    A word of 8 codes becomes two of 4 bytes: the first four codes are of row n, the others of row
    n + 8, each with its own table.
    """
    (n, k), both = weight.shape, 2
    words = weight.codes.view(k // 32, n // 16, 64, 4).long()
    words = (words << torch.arange(0, 32, 8)).sum(-1)  # [K / 32, N / 16, 64]
    sign = lop3(words, 0x88888888, 0x64206420, (0xF0 & 0xCC) | 0xAA) >> 1
    index = words & 0x77777777

    # Tables of these words' rows: word w of a block is of row w // 8 and, its second half, 8 more.
    tables = weight.tables.view(torch.uint8).long().view(-1, n // 16, both, 8, 2, 4)
    tables = (tables << torch.arange(0, 32, 8)).sum(-1)  # [G, N / 16, half, 8, 2 words]
    tables = tables.repeat_interleave(k // 32 // len(tables), 0).repeat_interleave(8, 3)
    produced = []
    for half in range(both):
        negative = tables[:, :, half].unbind(-1)
        positive = (
            lop3(negative[0], 0xFFFFFF00, 0x80808080, (0xF0 & 0xCC) ^ 0xAA),
            negative[1] ^ 0x80808080,
        )
        selector, choice = index >> 16 * half & 0xFFFF, sign >> 16 * half & 0xFFFF
        produced.append(prmt(prmt(*positive, selector), prmt(*negative, selector), choice))
    bytes_of = torch.stack(produced, -1).unsqueeze(-1) >> torch.arange(0, 32, 8) & 0xFF
    # [K / 32, N / 16, r, c, j, half, i] as in `unshuffle`
    view = bytes_of.to(torch.uint8).view(k // 32, n // 16, 8, 4, 2, both, 4)
    operand = view.permute(1, 5, 2, 0, 4, 3, 6).reshape(n, k).contiguous()
    return e4m3_values(operand.view(torch.float8_e4m3fn))


@pytest.mark.parametrize("fmt", TAKEN, ids=lambda fmt: fmt.label)
@pytest.mark.parametrize(("rows", "columns"), [(16, 128), (48, 384)])
def test_the_kernels_lookup_gives_the_formats_operand(fmt, rows, columns):
    weight = random_weight(rows, columns, fmt, 11)
    operand, c = kernel_operand(unpack_int4(weight.words), weight.scales, fmt)
    prepared = baseline.prepare(weight)
    assert torch.equal(looked_up(prepared), operand)
    assert torch.equal(prepared.c, c.flatten())


def test_the_kernels_lookup_knows_every_code_with_every_scale():
    t = every_group_scale()
    rows = -(-len(t) // 16) * 16
    t = torch.nn.functional.pad(t, (0, rows - len(t)), value=LUT_ANCHOR)
    # Every row has every code in every place of a word, more than once.
    codes = (torch.arange(128) * 5 + torch.arange(128) // 16).remainder(16).sub(8).to(torch.int8)
    codes = codes.expand(rows, 128)
    weight = baseline.BaselineWeight(
        baseline.shuffle(baseline.encode(codes)),
        baseline.tables_of(t.unsqueeze(1), LUT),
        torch.ones(rows),
        LUT,
    )
    expected = product_levels(t, LUT).gather(1, codes.long() + 8)
    assert torch.equal(looked_up(weight), expected)


def test_vllms_loader_finds_the_same_tables():
    # c = max s / 448, t = E4M3(E4M3(s / c) / 8), c * 8: the same for scales on the grid.
    weight = random_weight(64, 1024, LUT, 5)
    s = weight.scales.float()
    c = s.amax(1, keepdim=True) / 448
    t = ((s / c).to(torch.float8_e4m3fn).float() / 8).to(torch.float8_e4m3fn).float()
    prepared = baseline.prepare(weight)
    assert torch.equal(prepared.tables.float(), baseline.tables_of(t, LUT).float())
    torch.testing.assert_close(prepared.c, 8 * c.flatten(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("fmt", every_format(), ids=lambda fmt: fmt.label)
def test_formats_without_a_table_are_refused_by_name(fmt):
    weight = random_weight(16, 256, fmt, 1)
    if fmt in TAKEN:
        baseline.prepare(weight)
        return
    with pytest.raises(FormatError, match=fmt.label):
        baseline.prepare(weight)


@pytest.mark.parametrize(
    ("rows", "columns", "fmt", "words"),
    [(24, 128, LUT, "out_features 24"), (16, 48, PER_CHANNEL, "in_features 48")],
)
def test_shapes_that_the_layout_pads_are_refused(rows, columns, fmt, words):
    with pytest.raises(FormatError, match=words):
        baseline.prepare(random_weight(rows, columns, fmt, 1))


def test_tile_grows_with_the_tokens():
    for n, k in ((4096, 4096), (14336, 4096), (4096, 14336), (28672, 8192)):
        tiles = [baseline.choose_tile(m, n, k) for m in (1, 16, 17, 33, 64, 128, 256, 512, 8192)]
        assert set(tiles) <= set(baseline.TILES)
        assert tiles == sorted(tiles)
        assert (tiles[0], tiles[-1]) == (16, 256)
