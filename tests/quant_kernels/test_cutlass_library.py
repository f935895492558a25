"""libquant_cutlass.so: what it takes and refuses, what its instructions are; and its build's gates.

The library takes minutes to compile (`make baseline`): tests of it are skipped where it is not
built.
"""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch

from quant_kernels import cutlass_baseline as baseline
from quant_kernels import native, reference
from quant_kernels.formats import WeightFormat, join_scales, round_row_unit, split_scales
from quant_kernels.packing import PackedWeight, pack_int4

ROOT = Path(__file__).parents[2]
LAUNCHER = ROOT / "csrc" / "cmake" / "refuse_serialized_wgmma.sh"
OK, NULL_POINTER, NO_DRIVER = 0, -1, -2  # QuantCutlassStatus
UNKNOWN_TILE, SIZE_OUT_OF_RANGE, RAGGED_ROWS, RAGGED_GROUPS, MISALIGNED = -5, -6, -7, -8, -9
# Of `difference`, half the squared relative error: BF16 rounds by up to 2^-9, and Hopper's FP8 sums
# keep some 13 bits of the largest addend, over up to 32 steps: together well below 2^-7.
BOUND = 1e-4
built = pytest.mark.skipif(
    native.find("quant_cutlass") is None,
    reason="libquant_cutlass.so was not built (make baseline)",
)


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    paths = [str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **environment}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )


def call(x: int = 16, bias: int = 0, m: int = 16, tile: int = 16) -> int:
    """quant_cutlass_gemm [m, 128, 128] on pointers that it may look at, and not follow."""
    return baseline._library().quant_cutlass_gemm(
        x, 16, 16, 16, 16, bias, 16, m, 128, 128, 128, tile, None, 0, 0, None
    )


def test_missing_library_says_what_to_run(tmp_path):
    code = (
        "from quant_kernels import cutlass_baseline as m; print(m.available(), m.why_unavailable())"
    )
    done = run_python(code, QUANT_LIB_DIR=str(tmp_path))
    assert done.stdout.startswith("False libquant_cutlass.so was not found")
    assert "baseline" in done.stdout


def test_gemm_refuses_what_the_epilogue_lacks_and_other_tensors():
    fmt = WeightFormat("w4afp8", 128, "lut")
    words, scales = torch.zeros(16, 16, dtype=torch.int32), torch.ones(16, 1, dtype=torch.bfloat16)
    weight = baseline.prepare(PackedWeight(words, scales, fmt))
    x, scale = torch.zeros(3, 128).to(torch.float8_e4m3fn), torch.ones(3, 1)
    out = torch.empty(3, 16, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="residual"):
        baseline.gemm(x, scale, weight, out, residual=out)
    with pytest.raises(ValueError, match="SiLU"):
        baseline.gemm(x, scale, weight, out, silu_mul=True)
    with pytest.raises(ValueError, match=r"out must be torch\.bfloat16 \[3, 16\].*float32"):
        baseline.gemm(x, scale, weight, out.float())
    with pytest.raises(ValueError, match=r"bias must be torch\.bfloat16 \[16\]"):
        baseline.gemm(x, scale, weight, out, out[0, :8])
    with pytest.raises(ValueError, match=r"x_codes .* contiguous"):
        baseline.gemm(x.T.contiguous().T, scale, weight, out)
    with pytest.raises(ValueError, match="one GPU"):
        baseline.gemm(x, scale, weight, out)


@built
def test_library_takes_the_shapes_that_we_say_it_takes():
    library = baseline._library()
    sizes = (1, 17, 4096), (8, 16, 24, 48, 128, 4096), (16, 32, 48, 96, 128, 160, 256, 384, 4096)
    seen = set()
    for m, n, k, tile in product(*sizes, (*baseline.TILES, 8, 48)):
        for group in {32, 64, 128, 192, 256, k}:
            status = library.quant_cutlass_can_run(m, n, k, group, tile)
            assert (status == OK) == (baseline.why_not(m, n, k, group, tile) is None), (
                f"{[m, n, k]} group {group} tile {tile}: {status}"
            )
            seen.add(status)
    # CUTLASS itself had nothing to add.
    assert seen == {OK, UNKNOWN_TILE, RAGGED_ROWS, RAGGED_GROUPS}


@built
def test_library_refuses_sizes_that_32_bits_or_a_weight_cannot_have():
    for size in (0, -1, 2**31, 2**32 + 128, -(2**63)):
        for place in range(4):
            shape = [128, 128, 128, 128]
            shape[place] = size
            status = baseline._library().quant_cutlass_can_run(*shape, 64)
            assert status < 0, shape
            assert baseline.why_not(*shape, 64) is not None


@built
def test_every_status_has_its_own_sentence():
    string = baseline._library().quant_cutlass_error_string
    sentences = [string(status) for status in (*range(0, -14, -1), -99, 100)]
    assert len(set(sentences)) == len(sentences)
    assert all(sentences)


@built
def test_no_tile_needs_a_workspace():
    weight = baseline.BaselineWeight(
        torch.empty(32, 64, 256, dtype=torch.uint8),
        torch.empty(8, 1024, 8, dtype=torch.float8_e4m3fn),
        torch.empty(1024),
        WeightFormat("w4afp8", 128, "lut"),
    )
    for tile in baseline.TILES:
        assert baseline.workspace_bytes(100, weight, tile) == 0
    with pytest.raises(RuntimeError, match=r"\[1024, 1024\], tile 7: a tile has 16"):
        baseline.workspace_bytes(100, weight, 7)


@built
def test_gemm_checks_its_arguments_before_it_looks_for_a_gpu():
    assert call(x=0) == NULL_POINTER
    assert call(x=24) == MISALIGNED
    assert call(bias=8) == MISALIGNED
    assert call(m=0) == SIZE_OUT_OF_RANGE
    assert call(tile=8) == UNKNOWN_TILE


@built
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_library_loads_and_answers_in_silence():
    code = """
from quant_kernels import cutlass_baseline as baseline
gemm = baseline._library().quant_cutlass_gemm
print(*{gemm(*[16] * 5, None, 16, 16, 128, 128, 128, t, None, 0, 0, None) for t in baseline.TILES})
"""
    done = run_python(code)
    assert done.returncode == 0
    assert int(done.stdout) in (NO_DRIVER, -3, -4)
    assert done.stderr == ""


@built
def test_instructions_are_fp8_wgmma_of_every_tile_without_local_memory():
    offline = pytest.importorskip("quant_kernels.triton.offline")
    library = native.find("quant_cutlass")
    assert library is not None
    usage, sass = offline._disassemble(library.read_bytes())
    stacks = re.findall(r"REG:\d+ STACK:(\d+)", usage)
    assert stacks
    assert set(stacks) == {"0"}
    functions = [part for part in sass.split("Function : ")[1:] if "QGMMA" in part]
    tiles = {}
    for function in functions:
        counts = offline._count(function)
        assert counts["LDL"] == counts["STL"] == 0
        assert counts["QGMMA"] >= 4  # a K tile of 128 is four of 32
        assert counts["UTMALDG"] >= 3  # weights, tokens, tables
        shapes = set(re.findall(r"QGMMA\.64x(\d+)x32\.F32\.E4M3\.E4M3", function))
        assert len(shapes) == 1
        tiles[int(shapes.pop())] = counts
    assert sorted(tiles) == list(baseline.TILES)
    assert len(functions) == len(baseline.TILES)


def difference(x: torch.Tensor, y: torch.Tensor) -> float:
    x, y = x.double(), y.double()
    return float(1 - 2 * (x * y).sum() / (x.square().sum() + y.square().sum()))


@built
@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="needs a Hopper GPU",
)
@pytest.mark.parametrize("tile", baseline.TILES)
@pytest.mark.parametrize("group_size", [128, -1])
@pytest.mark.parametrize(("n", "k"), [(128, 128), (528, 1024), (4096, 384), (272, 160)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_gemm_is_the_references_on_a_gpu(tile, group_size, n, k, with_bias):
    if k % 128 and group_size == 128:
        pytest.skip("no whole group")
    fmt, generator = WeightFormat("w4afp8", group_size, "lut"), torch.Generator().manual_seed(n)
    codes = torch.randint(-8, 8, (n, k), generator=generator, dtype=torch.int8)
    rough = torch.rand(n, fmt.groups(k), generator=generator).add(0.05).bfloat16()
    t, c = split_scales(rough, fmt)
    weight = PackedWeight(pack_int4(codes), join_scales(t, round_row_unit(c)), fmt)
    prepared = baseline.prepare(PackedWeight(weight.words.cuda(), weight.scales.cuda(), fmt))
    for m in (1, 17, tile, 300):
        x = torch.randn(m, k, generator=generator).mul(50).to(torch.float8_e4m3fn)
        scale = torch.rand(m, 1, generator=generator).add(0.1)
        bias = torch.randn(n, generator=generator).mul(100).bfloat16() if with_bias else None
        expected = reference.gemm_w4afp8(x, scale, weight, bias)
        out = torch.full((m, n), float("nan"), dtype=torch.bfloat16, device="cuda")
        on_gpu = None if bias is None else bias.cuda()
        baseline.gemm(x.cuda(), scale.cuda(), prepared, out, on_gpu, tile=tile)
        assert difference(out.cpu(), expected) < BOUND


def test_no_native_source_includes_torch():
    # One build serves every torch: the ABI is C, and the sources know CUDA's and CUTLASS's headers.
    sources = [
        path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cuh", ".cu", ".cpp")
    ]
    assert any(path.suffix == ".cuh" for path in sources)
    for path in sources:
        included = re.findall(r"^\s*#\s*include\s*[<\"]([^>\"]+)", path.read_text(), re.MULTILINE)
        found = [
            name
            for name in included
            if re.match(r"(torch|ATen|c10|caffe2|pybind11|Python)\b", name)
        ]
        assert not found, f"{path.relative_to(ROOT)} includes {found}"


def launch(
    tmp_path: Path, says: str, status: int = 0
) -> tuple[subprocess.CompletedProcess[str], bool]:
    """A compiler behind the launcher that writes its object, says something and exits."""
    compiler, made = tmp_path / "nvcc", tmp_path / "a b.o"
    compiler.write_text(f'#!/bin/sh\ntouch "$3"\necho "{says}" >&2\nexit {status}\n')
    compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
    command = ["sh", str(LAUNCHER), str(compiler), "-c", "-o", str(made), "a.cu"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done, made.exists()


def test_build_fails_where_ptxas_serializes_wgmma(tmp_path):
    loss = "Potential Performance Loss: wgmma.mma_async instructions are serialized due to"
    for code in ("(C7508)", "(C7510)", "(C7511)", loss):
        done, made = launch(tmp_path, f"ptxas info    : {code}")
        assert done.returncode == 1
        assert code in done.stdout
        assert "error:" in done.stderr
        assert not made


def test_launcher_is_otherwise_the_compiler(tmp_path):
    done, made = launch(tmp_path, "ptxas info    : Used 168 registers")
    assert (done.returncode, made) == (0, True)
    assert "168 registers" in done.stdout
    assert launch(tmp_path, "error: nothing", status=3)[0].returncode == 3
