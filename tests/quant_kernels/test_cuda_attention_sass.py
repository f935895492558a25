"""The Hopper attention kernels as compiled: the MMAs that were meant, nothing spilled, bulk copies.

That ptxas serializes no WGMMA is held by the build (csrc/cmake/refuse_serialized_wgmma.sh).
"""

from __future__ import annotations

import re

import pytest

from quant_kernels import native
from tests.quant_kernels.sass import Kernel, kernels
from tests.quant_kernels.test_cuda_attention import DIMS

EXPANDED = [f"prefill_{dim}_{options}" for dim in DIMS for options in range(4, 8)]


@pytest.fixture(scope="module")
def kernels_of() -> dict[str, Kernel]:
    """Every kernel: prefill_128_0, decode_128_1_0, expand_128, ...

    The last number of the first two is their options (attention_params.h).
    """
    library = native.find("quant_cuda")
    if library is None:
        pytest.skip("libquant_cuda.so is not built here")
    found = {}
    for name, kernel in kernels(library).items():
        config = re.search(r"(prefill|decode|expand)_kernel(?:.*Config)?I((?:Li\d+E)+)", name)
        if config is not None:
            found["_".join((config[1], *re.findall(r"Li(\d+)E", config[2])))] = kernel
    return found


@pytest.fixture(scope="module")
def compiled(kernels_of) -> dict[str, list[str]]:
    """Their opcodes."""
    found = {}
    for name, kernel in kernels_of.items():
        assert kernel.stack == 0
        texts = (re.sub(r"^@!?U?P\w+\s+", "", text) for _, text in kernel.instructions)
        found[name] = [text.split()[0] for text in texts]
    return found


def test_no_kernel_spills(compiled):
    assert len(compiled) == len(DIMS) * (8 + 2 * 2 + 1)
    for name, ops in compiled.items():
        assert not any(op.startswith(("LDL", "STL")) for op in ops), name
        copies = sum(op.startswith("UBLKCP") for op in ops)
        if name.startswith("expand"):
            assert copies == 0
        else:  # an image; codes, scales of K and V
            assert copies >= (1 if name in EXPANDED else 4), name


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("options", range(8))
def test_prefill_multiplies_in_fp8_on_warpgroups(compiled, dim, options):
    ops = compiled[f"prefill_{dim}_{options}"]
    mmas = [op for op in ops if "GMMA" in op]
    assert set(mmas) == {"QGMMA.64x64x32.F32.E4M3.E4M3"}  # Q K of 64 keys, P V of 64 channels
    assert len(mmas) >= dim // 32 + 2 * dim // 64
    assert sum(op.startswith("USETMAXREG") for op in ops) == 2
    assert not any(op.startswith("HMMA") for op in ops)


@pytest.mark.parametrize("dim", DIMS)
def test_expanded_pages_are_unpacked_in_one_kernel_and_not_in_the_next(compiled, dim):
    assert sum(op.startswith("PRMT") for op in compiled[f"expand_{dim}"]) >= 32  # transposes V
    assert sum(op.startswith("FENCE.VIEW.ASYNC.G") for op in compiled[f"expand_{dim}"]) == 1
    for options in range(4, 8):
        ops = compiled[f"prefill_{dim}_{options}"]
        assert sum(op.startswith("PRMT") for op in ops) < 4
        assert sum(op.startswith("FENCE.VIEW.ASYNC.G") for op in ops) == 1


@pytest.mark.parametrize(("options", "budget"), [(0, 456), (4, 436)])
def test_a_page_is_as_many_instructions_as_the_budget_says(kernels_of, options, budget):
    loop = kernels_of[f"prefill_128_{options}"].loop()
    fading = 64  # sums, where M rises
    assert sum(loop.values()) <= budget + fading
    # No masks, and addresses that the compiler knows to be the same in all lanes.
    assert loop["FSEL"] == 0
    assert loop["R2UR"] + loop["BSSY"] <= 1
    assert loop["MUFU"] == 34
    assert loop["LDS"] == 17


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("options", [0, 1])
def test_decode_multiplies_once_for_all_heads(compiled, dim, blocks, options):
    ops = compiled[f"decode_{dim}_{blocks}_{options}"]
    # Of a page a warp has 16 tokens: D / 16 MMAs for K and as many for V, for every 8 heads.
    assert sum(op.startswith("HMMA.16816.F32") for op in ops) == 2 * blocks * dim // 16
    assert sum(op.startswith("MOVM") for op in ops) == 2 * blocks
