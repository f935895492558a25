"""Choosing a configuration: the rule, the measured tables, and the workspace that they imply."""

import json
from itertools import pairwise

import pytest
import torch

from benchmarks.shapes import MODELS, TOKENS
from quant_kernels.formats import WeightFormat, every_format
from quant_kernels.triton import tuning
from quant_kernels.triton.gemm import gemm_workspace_bytes
from quant_kernels.triton.tuning import Case, Config

SMS = 132
HOPPER = (9, 0)
LINEARS = sorted({shape for model in MODELS for shape in model.linears.values()})
ENTRY = {
    "kind": "lut",
    "bucket": 16,
    "n": 4096,
    "k": 4096,
    "silu_mul": False,
    "config": {"block_n": 128, "block_m": 16, "split_k": 2, "num_warps": 8, "num_stages": 6},
}


def test_every_format_has_a_kind_and_every_kind_a_format():
    assert {tuning.kind_of(fmt) for fmt in every_format()} == set(tuning.KINDS)
    assert tuning.kind_of(WeightFormat("w4afp8", -1, "exact")) == "fp8-channel"


@pytest.mark.parametrize(
    ("tokens", "bucket"),
    [(0, 16), (16, 16), (17, 32), (64, 64), (65, 128), (129, 256), (9999, 256)],
)
def test_a_bucket_holds_its_tokens(tokens, bucket):
    assert tuning.bucket_of(tokens) == bucket


@pytest.mark.parametrize("silu_mul", [False, True])
@pytest.mark.parametrize(("n", "k"), LINEARS)
def test_the_rule_splits_k_only_to_fill_the_gpu(n, k, silu_mul):
    for bucket in tuning.BUCKETS:
        config = tuning.by_rule(Case("lut", bucket, n, k, silu_mul), SMS)
        assert config.block_m <= max(bucket, 16)
        if config.split_k == 1:
            continue
        rows = n // 2 if silu_mul else n
        programs = -(-rows // config.block_n)
        assert bucket <= 64
        assert programs < tuning.RESIDENT * SMS
        assert k // config.split_k >= tuning.SPLIT_COLUMNS


def test_a_small_gemm_is_split_and_a_large_one_is_not():
    small = tuning.by_rule(Case("lut", 16, 4096, 14336, False), SMS)
    large = tuning.by_rule(Case("lut", 16, 131072, 4096, False), SMS)
    assert small.split_k > 1
    assert large.split_k == 1


def test_more_multiprocessors_never_mean_fewer_parts():
    case = Case("lut", 16, 4096, 14336, False)
    parts = [tuning.by_rule(case, sms).split_k for sms in (4, 8, 16, 32, 64, 128)]
    assert all(a <= b for a, b in pairwise(parts))


@pytest.mark.parametrize("silu_mul", [False, True])
@pytest.mark.parametrize("bucket", tuning.BUCKETS)
@pytest.mark.parametrize("kind", tuning.KINDS)
def test_the_rule_is_among_its_candidates(kind, bucket, silu_mul):
    found = tuning.candidates(kind, bucket, 4096, silu_mul)
    assert len(set(found)) == len(found) > 0
    for n, k in LINEARS:
        if k >= 4096:
            config = tuning.by_rule(Case(kind, bucket, n, k, silu_mul), SMS)
            assert config in tuning.candidates(kind, bucket, k, silu_mul)
    assert all(k.split_k == 1 for k in tuning.candidates(kind, bucket, 512, silu_mul))


@pytest.mark.parametrize("most", TOKENS)
@pytest.mark.parametrize(("n", "k"), LINEARS)
def test_the_workspace_is_enough_for_any_number_of_tokens_up_to_the_most(n, k, most):
    bytes_ = tuning.workspace_bytes(HOPPER, most, n, k, SMS)
    for kind in tuning.KINDS:
        for silu_mul in (False, True):
            for m in {1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 128, 129, most}:
                if m <= most:
                    config = tuning.choose(HOPPER, kind, m, n, k, SMS, silu_mul)
                    assert tuning.needed_bytes(config, m, n) <= bytes_


def test_a_workspace_is_the_partial_sums_in_four_bytes():
    assert tuning.needed_bytes(Config(64, 16, 1, 4, 3), 7, 40) == 0
    assert tuning.needed_bytes(Config(64, 16, 4, 4, 3), 7, 40) == 4 * 4 * 7 * 40
    assert tuning.workspace_bytes(HOPPER, 0, 4096, 4096, SMS) == 0


def test_the_interpreter_needs_no_gpu_to_choose():
    cpu = torch.device("cpu")
    assert tuning.multiprocessors(cpu) == tuning.INTERPRETED_MULTIPROCESSORS
    assert gemm_workspace_bytes(cpu, 64, 40, 576) == 0


def test_a_measured_table_comes_before_the_rule(tmp_path, monkeypatch):
    (tmp_path / "sm_90.json").write_text(json.dumps({"measured": {}, "entries": [ENTRY]}))
    monkeypatch.setattr(tuning, "TABLES", tmp_path)
    tuning._choose.cache_clear()
    try:
        measured = Config(128, 16, 2, 8, 6)
        assert tuning.choose(HOPPER, "lut", 5, 4096, 4096, SMS) == measured
        for other in ((HOPPER, "int8", 5, 4096, 4096), (HOPPER, "lut", 17, 4096, 4096),
                      (HOPPER, "lut", 5, 8192, 4096), ((8, 0), "lut", 5, 4096, 4096)):  # fmt: skip
            assert tuning.choose(*other, SMS) != measured
        assert tuning.choose(HOPPER, "lut", 5, 4096, 4096, SMS, True) != measured
        assert tuning.workspace_bytes(HOPPER, 16, 4096, 4096, SMS) >= 4 * 2 * 4096 * 16
    finally:
        tuning._choose.cache_clear()


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ([], "a table of configurations is"),
        ({"entries": [ENTRY | {"kind": "int4"}]}, "entry 0, .* is unknown"),
        ({"entries": [ENTRY | {"bucket": 17}]}, "entry 0, .* is unknown"),
        ({"entries": [ENTRY, ENTRY]}, "entry 1, .* there twice"),
        ({"entries": [{"kind": "lut"}]}, "entry 0 is no case"),
        ({"entries": [ENTRY | {"extra": 1}]}, "entry 0 is no case.*extra"),
        ({"entries": [ENTRY | {"config": ENTRY["config"] | {"block_n": 96}}]}, "power of two"),
        ({"entries": [ENTRY | {"config": ENTRY["config"] | {"block_m": 8}}]}, "at least 64"),
        ({"entries": [ENTRY | {"config": ENTRY["config"] | {"num_stages": 0}}]}, "at least 1"),
    ],
)
def test_a_broken_table_is_refused_by_name(content, complaint):
    with pytest.raises(ValueError, match=f"table.json: {complaint}|table.json: .*{complaint}"):
        tuning.parse_table(content, "table.json")


def test_committed_tables_are_sound():
    for path in tuning.TABLES.glob("*.json"):
        assert tuning.read_table(path)
