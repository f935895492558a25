"""What the smoke run covers, in which order, and what it does where there is nothing to run."""

import ctypes
import itertools
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from benchmarks import attention_trials, gpu_smoke, trials
from quant_kernels import cuda, cuda_attention, cuda_gemm, native
from quant_kernels.cuda_tuning import KINDS, TILES, Config
from quant_kernels.fragments import fragment_weight
from quant_kernels.reference_attention import LOG2_E, read_kv
from tests.quant_kernels.weights import random_packed

ROOT = Path(__file__).parents[2]
SMS = 132
NO_KERNEL = -7  # QuantCudaStatus
CPU = torch.device("cpu")


def needs_library():
    try:
        return cuda.library()
    except native.LibraryMissing as error:
        pytest.skip(str(error).splitlines()[0])


def test_every_gemm_kernel_of_the_library_has_a_turn():
    needs_library()
    check = cuda_gemm._library().quant_cuda_gemm_check
    codes, scale = torch.zeros(4, 384, dtype=torch.uint8), torch.ones(4, 1)
    space = torch.empty(2**25, dtype=torch.uint8)
    accepted = set()
    for (kind, group), (fmt, least) in gpu_smoke.forms().items():
        weight = fragment_weight(random_packed(128, 384, fmt, least))
        assert cuda_gemm.kind_of(weight) == kind
        for silu, tile, cluster, split in itertools.product(
            (False, True), TILES, (1, 2), (False, True)
        ):
            if split and tile > 128:
                continue
            config = Config(tile, cluster, SMS // cluster, split)
            out = torch.empty(4, 64 if silu else 128)
            call = cuda_gemm.describe(config, codes, scale, weight, out, None, None, silu, space)
            assert call.group_size == group
            if check(ctypes.byref(call)) == 0:
                accepted.add((kind, group, tile, cluster, split, silu))
    call.tile_tokens, call.cluster, call.split = 16, 1, 0
    # Nor are there kernels of kinds and group sizes that we know no weight for.
    for kind, group in itertools.product(range(len(KINDS) + 1), (16, 32, 64, 128, 256)):
        call.kind, call.group_size = kind, group
        known = kind < len(KINDS) and (KINDS[kind], group) in gpu_smoke.forms()
        assert (check(ctypes.byref(call)) == NO_KERNEL) == (not known)
    groups = {
        case.config and (
            case.kind,
            cuda_gemm.WHOLE_GROUP if case.fmt.per_channel else case.fmt.group_size,
            case.config.tile_tokens,
            case.config.cluster,
            case.config.split,
            case.silu,
        )
        for case in gpu_smoke.gemm_cases(SMS)
    }  # fmt: skip
    assert groups == accepted


def test_every_gemm_is_one_that_its_kernel_takes():
    needs_library()
    check = cuda_gemm._library().quant_cuda_gemm_check
    space = torch.empty(2**25, dtype=torch.uint8)
    weights = {}
    for case in gpu_smoke.gemm_cases(SMS):
        key = case.fmt, case.n, case.k, case.least
        if key not in weights:
            weights[key] = fragment_weight(random_packed(case.n, case.k, case.fmt, case.least))
        columns = case.n // 2 if case.silu else case.n
        x, out = torch.zeros(case.m, case.k, dtype=torch.int8), torch.empty(case.m, columns)
        scale = torch.empty(case.m, 1)
        codes = torch.empty(case.m, columns, dtype=torch.int8) if case.codes else None
        residual = torch.empty(case.m, case.n) if case.residual else None
        call = cuda_gemm.describe(
            case.config, x, scale, weights[key], out, None, residual, case.silu, space,
            codes, scale if case.codes else None,
        )  # fmt: skip
        assert check(ctypes.byref(call)) == 0, case.label


def test_every_option_of_attention_has_a_turn_at_every_head_dimension():
    prefill = {
        (case.dim, case.soft_cap > 0, case.skip_threshold > 0, case.expand)
        for case in gpu_smoke.prefill_cases()
    }
    both = (False, True)
    assert prefill == set(itertools.product(cuda_attention.HEAD_DIMS, both, both, both))
    decode = {(case.dim, case.ratio > 8, case.soft_cap > 0) for case in gpu_smoke.decode_cases()}
    assert decode == set(itertools.product(cuda_attention.HEAD_DIMS, both, both))
    every = [*gpu_smoke.prefill_cases(), *gpu_smoke.decode_cases()]
    assert {case.window > 0 for case in every} == set(both)
    assert max(case.ratio for case in every) == cuda_attention.MAX_GROUP["decode_attention"]


def test_the_simplest_come_first_and_all_have_names_of_their_own():
    items = gpu_smoke.items(CPU, SMS)
    assert len({item.key for item in items}) == len(items)
    first = [item.key for item in items[:3]]
    assert "tile 16 cluster 1 workers 1 whole" in first[0]
    assert first[1].endswith("batch 1 of 1/1 unpacked by blocks")
    assert first[2].endswith("batch 1 of 1/5")
    order = [case.config for case in gpu_smoke.gemm_cases(SMS) if case.config.workers > 1]
    assert [config.split for config in order] == sorted(config.split for config in order)
    assert all(item.limit == gpu_smoke.LIMIT_S and item.subject for item in items)


@pytest.mark.parametrize("small", [False, True])
def test_trials_have_names_of_their_own(small):
    every = [trial for make in trials.GROUPS.values() for trial in make(small)]
    assert [key for key, n in Counter(trial.key for trial in every).items() if n > 1] == []
    if not small:
        kinds = {word for trial in every for word in trial.label.split() if word == "-7"}
        assert kinds == {"-7"}
        assert {t.backends for t in every} == {("triton",), ("cutlass",), ("triton", "cutlass")}


def test_a_sink_leaves_out_all_but_its_page():
    # What `skip_threshold` does with it: every other key is SKIP powers of two and more below.
    case = attention_trials.AttentionCase(
        attention_trials.PREFILL, ((40, 300),), 64, 2, sink=True, skip_threshold=12.0
    )
    given = attention_trials.random_inputs(case, CPU)
    keys, _ = read_kv(given.codes, given.scales.nan_to_num(), given.table[0], 300)
    k = (keys.scale.float() * keys.codes.float() + keys.offset.float()).transpose(0, 1)
    q = (given.q_codes.float() * given.q_scale.unsqueeze(-1)).transpose(0, 1)
    scores = (q @ k.repeat_interleave(2, 0).mT) * 64**-0.5 * LOG2_E
    top, rest = scores[..., :64].amax(-1), scores[..., 64:].amax(-1)
    assert bool((top - rest > case.skip_threshold + 2).all())


@pytest.mark.parametrize("name", ["gpu_smoke.py", "gpu.py", "tune_cutlass.py"])
def test_without_a_gpu_it_says_so_and_ends(name):
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / name)],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert done.stdout.startswith("cutlass unavailable: ")


def test_failures_are_printed_as_they_come_and_written(tmp_path, monkeypatch, capsys):
    program = f"""
import sys, pathlib, time
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "kernels")!r}]
from benchmarks import gpu_smoke, worker
def items(device, sms):
    def bad(): raise AssertionError("out: 3 of 9 elements are off")
    yield worker.Item("good", lambda: {{"metric": 0.0}})
    yield worker.Item("bad", bad)
at = sys.argv.index("--log") + 1
sys.exit(worker.work(items(0, 0), pathlib.Path(sys.argv[at]), time.time() + 60))
"""
    script = tmp_path / "program.py"
    script.write_text(program)
    monkeypatch.setattr(gpu_smoke, "__file__", str(script))
    args = type(
        "Args",
        (),
        {"seconds": 30.0, "patience": 1.0, "processes": 1, "json": tmp_path / "smoke.json"},
    )()
    found = gpu_smoke.run(args, ["good", "bad", "late"])
    assert (found["passed"], list(found["failed"]), found["no time"]) == (1, ["bad"], ["late"])
    assert "FAILED bad\n    AssertionError: out: 3 of 9" in capsys.readouterr().out
    assert json.loads(args.json.read_text())["passed"] == 1
