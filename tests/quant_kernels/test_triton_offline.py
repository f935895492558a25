"""Triton's kernels through the compiler for Hopper and Ampere, in a process of their own.

Elsewhere in the tests they are interpreted, and what is interpreted cannot be compiled.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

COMMAND = [sys.executable, "-m", "quant_kernels.triton.offline"]


def environment(cache: Path, **more: str) -> dict[str, str]:
    kernels = Path(__file__).parents[2] / "kernels"
    kept = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    path = os.pathsep.join([str(kernels), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**kept, "PYTHONPATH": path, "TRITON_CACHE_DIR": str(cache), **more}


@pytest.fixture
def offline():
    # Not when this file is collected: Triton looks whether it interprets when it is imported, and
    # tests that are collected later say that it does.
    from quant_kernels.triton import offline

    return offline


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """(exit code, what was printed, the reports) of the whole command."""
    directory = tmp_path_factory.mktemp("offline")
    command = [*COMMAND, "--json", str(directory / "kernels.json")]
    done = subprocess.run(
        command,
        env=environment(directory / "cache"),
        capture_output=True,
        text=True,
        check=False,
    )
    reports = json.loads((directory / "kernels.json").read_text())["kernels"]
    return done.returncode, done.stdout + done.stderr, reports


@pytest.mark.slow
def test_every_kernel_compiles_without_problems(compiled):
    code, printed, reports = compiled
    assert [f"{row['name']}: {row['problems']}" for row in reports if row["problems"]] == []
    assert code == 0, printed


@pytest.mark.slow
def test_every_module_is_compiled_for_both_architectures(compiled, offline):
    for module in offline.MODULES:
        rows = [row for row in compiled[2] if row["module"] == module]
        assert {row["compiled"]["target"] for row in rows} == {"sm_90a", "sm_80"}, module


@pytest.mark.slow
def test_nothing_spills_and_tensor_cores_are_the_ones_meant(compiled):
    for row in compiled[2]:
        made = row["compiled"]
        assert made["stack"] == made["local_accesses"] == 0, row["name"]
        if row["intended"] is not None:
            assert made["instructions"].get(row["intended"]), row["name"]
    intended = {(row["module"], row["arch"], row["intended"]) for row in compiled[2]}
    assert intended >= {
        ("gemm", 90, "QGMMA"),
        ("gemm", 90, "IGMMA"),
        ("gemm", 80, "HMMA"),
        ("gemm", 80, "IMMA"),
        ("prefill_attention", 90, "QGMMA"),
        ("prefill_attention", 80, "HMMA"),
        ("decode_attention", 90, "HMMA"),
        ("decode_attention", 80, "HMMA"),
    }


SPILLING = """
import json, sys, triton, triton.language as tl
from quant_kernels.triton import offline

@triton.jit
def product(a, b, c, K, M: tl.constexpr, N: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, 64)
    acc = tl.zeros((M, N), dtype=tl.float32)
    for start in range(0, K, 64):
        x = tl.load(a + m[:, None] * K + (start + k)[None, :])
        y = tl.load(b + n[None, :] * K + (start + k)[:, None])
        acc = tl.dot(x, y, acc)
    tl.store(c + m[:, None] * N + n[None, :], acc)

kinds = dict(a="*fp8e4nv", b="*fp8e4nv", c="*fp32", K="i32")
found = []
for size in ((64, 64), (256, 256), (16, 64)):
    tile = dict(zip("MN", size))
    case = ("product fp8", product, kinds, tile, dict(num_warps=4, num_stages=2), True)
    made = offline.compile_kernel(case, 90)
    found.append(offline.problems(made, offline.intended("gemm", case, 90), 90))
print(json.dumps(found))
"""


def test_a_spill_and_a_wrong_instruction_are_found(tmp_path):
    # An accumulator of 256 x 256 in 128 threads is twice what their registers hold, and wgmma has
    # no tile of 16 rows. Triton reads a kernel's source from its file.
    script = tmp_path / "spilling.py"
    script.write_text(SPILLING)
    done = subprocess.run(
        [sys.executable, str(script)],
        env=environment(tmp_path / "cache"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    well, spilled, small = json.loads(done.stdout.splitlines()[-1])
    assert well == []
    assert any(re.match(r"[1-9]\d* bytes of stack", line) for line in spilled)
    assert any("local memory" in line for line in spilled)
    assert small == ["QGMMA was meant, and HMMA is used"]


def test_interpreted_kernels_are_refused(tmp_path):
    done = subprocess.run(
        COMMAND,
        env=environment(tmp_path, TRITON_INTERPRET="1"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "unset TRITON_INTERPRET" in done.stdout


def test_cases_are_meant_for_the_architectures_that_have_their_instructions(offline):
    def case(name, needs_fp8):
        return (name, None, {}, {}, {}, needs_fp8)

    assert offline.applies("gemm", case("lut_fp8", True), 90)
    assert not offline.applies("gemm", case("lut_fp8", True), 80)
    assert not offline.applies("gemm", case("lut_fp16", False), 90)
    assert offline.applies("gemm", case("lut_fp16", False), 80)
    assert offline.applies("gemm", case("int8", False), 90)
    assert offline.applies("activation", case("quantize fp16 i8 4096", False), 90)
    assert not offline.applies("activation", case("quantize bf16 u8 without FP8", False), 90)


LINE = (
    '%a:2 = tt.elementwise_inline_asm "{{mad}}" {{constraints = "=r,r", packed_element = 4 : i32, '
    "pure = true}} {operands} : tensor<64x64xi8, {layout}>, tensor<64x64xi32, {layout}> -> ..."
)
ROWS_APART = "#ttg.blocked<{sizePerThread = [16, 1], threadsPerWarp = [8, 4], order = [0, 1]}>"
ROWS_WHOLE = "#ttg.blocked<{sizePerThread = [1, 16], threadsPerWarp = [8, 4], order = [1, 0]}>"


@pytest.mark.parametrize(
    ("layout", "mixed"),
    [
        ("#ttg.linear<{register = [[0, 1], [0, 2], [8, 0]], lane = [[0, 4]]}>", False),
        ("#ttg.linear<{register = [[1, 0], [2, 0], [0, 1]], lane = [[0, 2]]}>", True),
        ("#ttg.dot_op<{opIdx = 0, parent = #mma, kWidth = 4}>", False),
        ("#ttg.dot_op<{opIdx = 0, parent = #mma, kWidth = 2}>", True),
        (ROWS_WHOLE, False),
        (ROWS_APART, True),
    ],
)
def test_rows_that_share_a_register_must_not_have_scales(offline, layout, mixed):
    named = f"#mine = {layout}\n" + LINE.format(operands="%w, %t", layout="#mine")
    assert offline.mixed_rows(named) is mixed
    assert offline.mixed_rows(LINE.format(operands="%w, %t", layout=layout)) is mixed
    assert not offline.mixed_rows(LINE.format(operands="%w", layout=layout))


def test_opcodes_are_counted_with_their_predicates_and_variants(offline):
    sass = """
        /*0010*/                   LDL.64 R2, [R1] ;                  /* 0x000 */
        /*0020*/              @!P0 STL [R1+0x8], R4 ;
        /*0030*/             @!UP2 IMAD.WIDE R2, R3, R4, R5 ;
        /*0040*/                   QGMMA.64x16x32.F32.E4M3.E4M3 R24, gdesc[UR8], R24 ;
        /*0050*/                   MOV R1, c[0x0][0x28] ;  // LDL is a name here
    """
    found = {name: count for name, count in offline._count(sass).items() if count}
    assert found == {"LDL": 1, "STL": 1, "IMAD": 1, "QGMMA": 1}
