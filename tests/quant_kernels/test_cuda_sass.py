"""libquant_cuda.so as compiled: MMAs as meant, nothing spilled, conversions in budget."""

from __future__ import annotations

import collections
import re
import subprocess
import sys

import pytest

from quant_kernels import native
from quant_kernels.cuda_tuning import INSTRUCTIONS, KINDS
from tests.quant_kernels.sass import Kernel, integers, kernels

# Weights of a thread in an MMA of 64 rows and K = 32.
WEIGHTS = 64 * 32 / 128
# The three instructions for eight weights that HighNibble and Raw take (csrc/cuda/convert.cuh).
SIMPLEST = 3 / 8
# Integer instructions a weight, with what it takes to fetch a group's scale or table; without that
# exact has the three of Raw.
BUDGETS = {
    "int8-channel": 0.4, "int8": 1.0, "fp8-channel": 0.4, "fp8-channel-8": 0.8,
    "lut": 1.0, "lut-8": 1.2, "exact": 0.46, "exact-8": 0.85,
}  # fmt: skip

Found = dict[tuple[str, int, int, int], Kernel]  # kind, group, tokens, cluster


@pytest.fixture(scope="module")
def every() -> dict[str, Kernel]:
    library = native.find("quant_cuda")
    if library is None:
        pytest.skip("libquant_cuda.so is not built here")
    return kernels(library)


@pytest.fixture(scope="module")
def gemms(every: dict[str, Kernel]) -> Found:
    found: Found = {}
    for name, kernel in every.items():
        config = re.search(r"gemm_kernel.*KindE(\d+)ELi(\d+)ELi(\d+)ELi(\d+)", name)
        if config is not None:
            kind, *numbers = map(int, config.groups())
            found[KINDS[kind], numbers[0], numbers[1], numbers[2]] = kernel
    assert found
    return found


def test_there_is_a_kernel_for_everything_that_the_plan_takes(gemms):
    wanted = set()
    for kind in KINDS:
        groups = (128,) if "channel" in kind else (32, 64, 128)
        for group in groups:
            for tokens in (16, 32, 64, 128) if "exact" in kind else (16, 32, 64, 128, 256):
                wanted.add((kind, group, tokens, 1))
                widest = tokens == (128 if "exact" in kind else 256)
                if widest or (group == 128 and tokens >= 64):
                    wanted.add((kind, group, tokens, 2))
    assert set(gemms) == wanted


def test_nothing_is_spilled(gemms):
    for key, kernel in gemms.items():
        counts = kernel.counts()
        assert kernel.stack == 0, key
        assert counts["LDL"] == counts["STL"] == 0, key


def test_weights_come_from_registers_and_sums_have_their_type(gemms):
    for (kind, group, tokens, cluster), kernel in gemms.items():
        mmas = [text for _, text in kernel.instructions if "GMMA" in text]
        wanted = "IGMMA" if kind.startswith("int8") else "QGMMA"
        assert len(mmas) >= 8
        for text in mmas:  # D, A in registers, B a descriptor
            shape = rf"{wanted}\.64x{tokens}x32\.\S+ R\d+, R\d+, gdesc\["
            assert re.search(shape, text), (kind, group, cluster, text)


def test_weights_and_activations_arrive_in_bulk(gemms):
    for key, kernel in gemms.items():
        counts = kernel.counts()
        assert counts["UBLKCP"] >= 2, key
        assert counts["UTMALDG"] >= 1, key
        loop = kernel.loop()
        assert loop["LDG"] == loop["STG"] == loop["STS"] == 0, key
        multicast = any("UTMALDG" in t and "MULTICAST" in t for _, t in kernel.instructions)
        assert multicast == (key[3] == 2), key


def test_no_fence_is_in_the_main_loop_and_one_thread_fetches(gemms):
    for key, kernel in gemms.items():
        assert kernel.loop()["MEMBAR"] == 0, key  # as a release to the cluster would be
        # Where the compiler does not know that it is one, it chooses again at every copy.
        assert kernel.counts()["ELECT"] == 1, key


def test_a_block_of_weights_is_read_once_and_sixteen_bytes_at_a_time(gemms):
    for (kind, _, tokens, _), kernel in gemms.items():
        loop = kernel.loop()
        mmas = loop["QGMMA"] + loop["IGMMA"]
        wide = [t for _, t in kernel.instructions if "LDS.128" in t]
        assert wide, (kind, tokens)
        scales = 0 if "channel" in kind else 12 * mmas / 4
        assert loop["LDS"] <= mmas / 2 * 3 + scales, (kind, tokens)


@pytest.mark.parametrize("kind", KINDS)
def test_conversion_is_in_budget(gemms, kind):
    """What a kind's main loop has more than the simplest kind's, whose conversion is known."""
    for tokens in (16, 32, 64, 128):
        simplest = "int8-channel" if kind.startswith("int8") else "fp8-channel"
        plain = gemms[simplest, 128, tokens, 1].loop()
        loop = gemms[kind, 128, tokens, 1].loop()
        overhead = integers(plain) / weights(plain) - SIMPLEST
        whole = integers(loop) / weights(loop)
        print(f"{kind} {tokens}: {whole:.2f} a weight, {whole - overhead:.2f} of them conversion")
        assert 0 < overhead < 0.5
        assert whole - overhead <= BUDGETS[kind]
        assert whole <= INSTRUCTIONS[kind] * 1.15
        if kind == "lut-8":  # two of eight weights' nine are left to what multiplies
            assert loop["SHF"] < weights(loop) / 16
            assert integers(loop) - loop["IMAD"] <= 1.2 * weights(loop)
        if kind == "exact":
            # ptxas flips the ring's parity by one of them, or by a comparison; one more in the
            # conversion would be sixteen in this loop.
            assert abs(loop["LOP3"] - plain["LOP3"]) <= 1


def weights(loop: collections.Counter[str]) -> float:
    """Weights that a thread converts in a loop."""
    return (loop["QGMMA"] + loop["IGMMA"]) * WEIGHTS


def test_what_quantizes_the_output_waits_for_it_and_reads_it_once(every):
    """The simulator runs one kernel after the other: that the second waits shows only here."""
    found = [kernel for name, kernel in every.items() if "quantize_kernel" in name]
    assert len(found) == 3  # of what a GEMM stores: BF16, FP16, FP32
    for kernel in found:
        counts, texts = kernel.counts(), [text for _, text in kernel.instructions]
        assert kernel.stack == counts["LDL"] == counts["STL"] == 0
        waits = next(i for i, text in enumerate(texts) if "ACQBULK" in text)
        touched = [i for i, text in enumerate(texts) if re.search(r"\b(LDG|STG)\b", text)]
        assert waits < min(touched)
        # Sixteen numbers a thread, all loads of which come before the maxima's.
        wide = [i for i in touched if "LDG.E.128" in texts[i]]
        maxima = [i for i in touched if re.search(r"LDG\.E R", texts[i])]
        assert len(wide) in (2, 4)
        assert max(wide) < min(maxima)


def test_the_library_answers_where_there_is_no_driver():
    if native.find("quant_cuda") is None:
        pytest.skip("libquant_cuda.so is not built here")
    code = (
        "import ctypes; from quant_kernels import cuda; from quant_kernels.cuda_gemm import Gemm, "
        "_library; library = _library(); call = Gemm(); "
        "print(library.quant_cuda_gemm_check(ctypes.byref(call)), "
        "library.quant_cuda_gemm(ctypes.byref(call), 0, None), cuda.error_string(-9))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("-7 -7 the kernels are for Hopper")
    assert done.stderr == ""
