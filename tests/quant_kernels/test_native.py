"""The two shared libraries: what they compute, what they refuse, and how their absence reads."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quant_kernels import cpu, cuda, native

ROOT = Path(__file__).parents[2]
OK, NULL_POINTER, NEGATIVE_SIZE, COLUMNS_OUT_OF_RANGE = range(4)  # QuantCpuStatus


def random_words(rows: int, words: int, seed: int = 0) -> torch.Tensor:
    """int32 [rows, words], every bit random."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**31), 2**31, (rows, words), generator=generator).to(torch.int32)


def unpack_with_int64(packed: torch.Tensor, columns: int) -> torch.Tensor:
    """The layout's formula in int64, where no shift meets the sign bit."""
    k = torch.arange(columns)
    word = packed.long()[:, k // 8] % 2**32
    return (word // 16 ** (k % 8) % 16 - 8).to(torch.int8)


def unpack_raw(packed: torch.Tensor, columns: int, codes: torch.Tensor) -> int:
    """Call the C function on memory that this test owns."""
    library = native.load("quant_cpu", cpu.ABI)
    return library.quant_cpu_unpack_int4(
        ctypes.c_void_p(packed.data_ptr()),
        ctypes.c_int64(packed.shape[0]),
        ctypes.c_int64(packed.shape[1]),
        ctypes.c_int64(columns),
        ctypes.c_void_p(codes.data_ptr()),
    )


def run_python(code: str, **environment: str) -> str:
    """stdout of `python -c code` with quant_kernels on the path."""
    paths = [str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **environment}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@settings(deadline=None)
@given(st.integers(1, 9), st.integers(0, 40), st.integers(0, 7), st.integers(0, 2**31))
def test_unpack_is_the_formula_on_random_words(rows, words, missing, seed):
    packed = random_words(rows, words, seed)
    columns = max(8 * words - missing, 0)
    codes = cpu.unpack_int4(packed, columns)
    assert codes.shape == (rows, columns)
    assert torch.equal(codes, unpack_with_int64(packed, columns))


@pytest.mark.parametrize(
    ("rows", "words", "columns"),
    [(1, 1, 1), (1, 1, 8), (1, 513, 4097), (5000, 3, 17), (577, 72, 576), (0, 4, 32), (3, 9, 0)],
)
def test_unpack_is_the_formula_at_the_edges(rows, words, columns):
    packed = random_words(rows, words)
    assert torch.equal(cpu.unpack_int4(packed, columns), unpack_with_int64(packed, columns))


def test_unpack_knows_every_nibble_in_every_place():
    # Word 16 k + v of the row has nibble v in place k and, elsewhere, 15 - v.
    value, place = torch.meshgrid(torch.arange(16), torch.arange(8), indexing="xy")
    nibbles = (15 - value)[..., None].expand(8, 16, 8).clone()
    nibbles.scatter_(2, place[..., None], value[..., None])
    words = (nibbles * 16 ** torch.arange(8)).sum(-1)
    packed = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32).reshape(1, -1)
    assert torch.equal(cpu.unpack_int4(packed, 1024), (nibbles - 8).to(torch.int8).reshape(1, -1))


@pytest.mark.parametrize("poison", [0x5A, -1])
@pytest.mark.parametrize("columns", [1, 30, 33, 95, 96])
def test_unpack_writes_its_codes_and_nothing_else(columns, poison):
    rows, guard = 7, 64
    packed = random_words(rows, 12)
    memory = torch.full((guard + rows * columns + guard,), poison, dtype=torch.int8)
    assert unpack_raw(packed, columns, memory[guard:]) == OK
    codes = memory[guard:-guard].reshape(rows, columns)
    assert torch.equal(codes, unpack_with_int64(packed, columns))
    assert (memory[:guard] == poison).all()
    assert (memory[-guard:] == poison).all()


@pytest.mark.parametrize("columns", [-1, 33, 2**40])
def test_unpack_refuses_columns_that_a_row_does_not_hold(columns):
    with pytest.raises(ValueError, match=rf"columns = {columns} is outside 0\.\.32.*\[2, 4\]"):
        cpu.unpack_int4(random_words(2, 4), columns)


@pytest.mark.parametrize(
    ("packed", "found"),
    [
        (torch.zeros(2, 4, dtype=torch.int64), r"int32 .*not torch\.int64 \[2, 4\]"),
        (torch.zeros(4, dtype=torch.int32), r"int32 \[N, W\].*not torch\.int32 \[4\]"),
        (torch.zeros(2, 4, dtype=torch.int32, device="meta"), r"CPU, not .* on meta"),
        (torch.zeros(4, 2, dtype=torch.int32).T, r"contiguous.*\[2, 4\].*strides \(1, 2\)"),
        (torch.zeros(2, 8, dtype=torch.int32)[:, :4], r"contiguous.*\[2, 4\].*strides \(8, 1\)"),
    ],
)
def test_unpack_refuses_other_tensors_and_shows_them(packed, found):
    with pytest.raises(ValueError, match=found):
        cpu.unpack_int4(packed, 8)


@pytest.mark.parametrize(
    ("rows", "words", "columns", "status"),
    [
        (-1, 1, 8, NEGATIVE_SIZE),
        (1, -1, 0, NEGATIVE_SIZE),
        (1, 1, -8, NEGATIVE_SIZE),
        (1, 1, 9, COLUMNS_OUT_OF_RANGE),
        (1, 0, 1, COLUMNS_OUT_OF_RANGE),
        (1, 1, 2**63 - 1, COLUMNS_OUT_OF_RANGE),
        (1, 2**62, 8, NULL_POINTER),  # 8 * words overflows
        (1, 1, 8, NULL_POINTER),
        (0, 1, 8, OK),
        (1, 1, 0, OK),
    ],
)
def test_c_function_checks_its_arguments_before_it_touches_memory(rows, words, columns, status):
    library = native.load("quant_cpu", cpu.ABI)
    sizes = [ctypes.c_int64(size) for size in (rows, words, columns)]
    assert library.quant_cpu_unpack_int4(None, *sizes, None) == status


def test_every_status_has_its_own_sentence():
    library = cpu._library()
    statuses = (OK, NULL_POINTER, NEGATIVE_SIZE, COLUMNS_OUT_OF_RANGE, 999)
    assert len({library.quant_cpu_error_string(status) for status in statuses}) == len(statuses)


@pytest.mark.parametrize(("module", "library"), [("cpu", "quant_cpu"), ("cuda", "quant_cuda")])
def test_missing_library_says_which_where_and_what_to_run(module, library, tmp_path):
    code = f"from quant_kernels import {module} as m; print(m.available(), m.why_unavailable())"
    said = run_python(code, QUANT_LIB_DIR=str(tmp_path))
    assert said.startswith(f"False lib{library}.so was not found")
    assert str(tmp_path) in said
    # The named folder stands alone: nothing else was searched in silence.
    assert str(ROOT / "build" / "*") not in said
    assert f"make -C {ROOT} native" in said or "pip install" in said
    assert ("QUANT_CUDA=ON" in said) == (module == "cuda")


def test_calling_into_a_missing_library_raises(tmp_path):
    code = """
import torch
from quant_kernels import cpu, cuda, native
for call in (lambda: cpu.unpack_int4(torch.zeros(1, 1, dtype=torch.int32), 8), cuda.devices):
    try:
        call()
    except native.LibraryMissing:
        print("missing")
"""
    assert run_python(code, QUANT_LIB_DIR=str(tmp_path)).split() == ["missing"] * 2


def test_library_of_another_abi_is_refused():
    with pytest.raises(native.LibraryMissing, match=rf"has ABI {cpu.ABI}, .* needs ABI 99"):
        native.load("quant_cpu", 99)


def test_file_that_is_no_library_is_refused(tmp_path, monkeypatch):
    (tmp_path / "libquant_broken.so").write_text("not an ELF file")
    monkeypatch.setenv("QUANT_LIB_DIR", str(tmp_path))
    with pytest.raises(native.LibraryMissing, match=r"libquant_broken\.so does not load"):
        native.load("quant_broken", 1)


def test_cuda_without_a_gpu_says_which_thing_is_missing():
    why = cuda.why_unavailable()
    assert cuda.available() == (why is None)
    if native.find("quant_cuda") is None:
        assert why is not None
        assert why.startswith("libquant_cuda.so was not found")
    elif torch.cuda.is_available():
        assert why is None
    else:
        assert why is not None
        assert why.startswith("libquant_cuda.so is built, but")
        assert "driver" in why
        assert cuda.devices() == []


@pytest.mark.skipif(native.find("quant_cuda") is None, reason="libquant_cuda.so was not built")
def test_cuda_refuses_null_pointers_and_absent_devices():
    library = native.load("quant_cuda", cuda.ABI)
    assert library.quant_cuda_device_count(None) != 0
    assert library.quant_cuda_device_capability(0, None, None) != 0
    with pytest.raises(RuntimeError, match="capability of GPU 12345"):
        cuda._capability(12345)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_cuda_sees_the_gpus_that_torch_sees():
    count = torch.cuda.device_count()
    expected = [(device, torch.cuda.get_device_capability(device)) for device in range(count)]
    assert cuda.devices() == expected


def test_e4m3_to_float_knows_every_code():
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    # Any order and any length, so that no vector tail is left out.
    for length in (256, 255, 1, 17):
        order = torch.randperm(256, generator=torch.Generator().manual_seed(length))[:length]
        some = codes.view(torch.uint8)[order].view(torch.float8_e4m3fn)
        values = cpu.e4m3_to_float(some)
        zeros = values == 0
        assert torch.equal(values[zeros].signbit(), some.float()[zeros].signbit())
        torch.testing.assert_close(values, some.float(), rtol=0, atol=0, equal_nan=True)
    assert cpu.e4m3_to_float(codes.view(4, 64)).shape == (4, 64)
    assert cpu.e4m3_to_float(codes[:0]).shape == (0,)


def test_e4m3_to_float_keeps_subnormals_where_they_are_flushed():
    code = (
        "import torch; from quant_kernels import cpu; torch.set_flush_denormal(True);"
        "codes = torch.arange(1, 8, dtype=torch.uint8).view(torch.float8_e4m3fn);"
        "print((cpu.e4m3_to_float(codes) * 512).tolist())"
    )
    assert run_python(code).split("[")[1] == "1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]\n"


def test_a_named_folder_without_the_library_is_an_error_and_no_fallback(tmp_path):
    code = (
        "import torch; from quant_kernels import native, packing\n"
        "try: packing.unpack_int4(torch.zeros(1, 1, dtype=torch.int32))\n"
        "except native.LibraryMissing: print('missing')"
    )
    assert run_python(code, QUANT_LIB_DIR=str(tmp_path)).strip() == "missing"


def test_e4m3_to_float_refuses_what_it_cannot_read():
    codes = torch.zeros(4, 6).to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match=r"contiguous.*\[6, 4\]"):
        cpu.e4m3_to_float(codes.T)
    with pytest.raises(ValueError, match="float8_e4m3fn"):
        cpu.e4m3_to_float(codes.float())


def test_e4m3_to_float_stays_inside_its_output():
    library = native.load("quant_cpu", cpu.ABI)
    codes = torch.full((21,), 0x38, dtype=torch.uint8)  # 1.0
    values = torch.full((23,), -7.0)
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (codes, values)]
    status = library.quant_cpu_e4m3_to_float(pointers[0], ctypes.c_int64(20), pointers[1])
    assert status == OK
    assert values.tolist() == [1.0] * 20 + [-7.0] * 3
    assert library.quant_cpu_e4m3_to_float(pointers[0], ctypes.c_int64(-1), None) == NEGATIVE_SIZE
    assert library.quant_cpu_e4m3_to_float(None, ctypes.c_int64(1), pointers[1]) == NULL_POINTER
