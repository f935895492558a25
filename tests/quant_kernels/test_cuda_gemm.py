"""The Hopper GEMMs' own source on a CPU: numbers, races, deadlocks, schedules, refusals.

The simulator runs the kernels thread by thread (csrc/cuda/simulate/simulator.h). `late` lets copies
and MMAs happen as late as the program allows, so a buffer that is reused too early or a sum that is
read too early shows in the numbers, and barriers that do not add up stop the run.
"""

from __future__ import annotations

import ctypes
import dataclasses
import itertools

import pytest
import torch

from quant_kernels import cuda_gemm, cuda_tuning, dispatch, ops, reference
from quant_kernels.cuda_gemm import Gemm, describe
from quant_kernels.cuda_tuning import (
    BUCKETS,
    KINDS,
    Case,
    Config,
    by_model,
    candidates,
    clocks,
    parse_table,
)
from quant_kernels.formats import WeightFormat, every_format
from quant_kernels.fragments import fragment_weight
from tests.quant_kernels.weights import random_packed

FORMATS = every_format()
INT8, LUT = WeightFormat("w4a8", 128, "int8"), WeightFormat("w4afp8", 128, "lut")
CHANNEL, EXACT = WeightFormat("w4a8", -1, "int8"), WeightFormat("w4afp8", 128, "exact")
NO_KERNEL, BAD_SHAPE, BAD_ALIGNMENT, NULL_POINTER, SMALL_WORKSPACE = -7, -5, -6, -1, -8
# The sum of a few hundred products in FP32, in another order: a handful of units in the last place
# of the largest partial sum.
CLOSE = 2e-6


@dataclasses.dataclass
class Problem:
    """A GEMM's tensors; outputs are poisoned."""

    weight: object
    packed: object
    codes: torch.Tensor
    scale: torch.Tensor
    out: torch.Tensor
    bias: torch.Tensor | None = None
    residual: torch.Tensor | None = None
    silu_mul: bool = False
    out_codes: torch.Tensor | None = None
    out_scale: torch.Tensor | None = None

    def reference(self) -> torch.Tensor:
        args = (self.codes, self.scale, self.packed, self.bias, torch.float32)
        y = reference.gemm(*args, self.residual)
        return (reference.silu_mul(y) if self.silu_mul else y).to(self.out.dtype)


def problem(
    fmt: WeightFormat, m: int, n: int, k: int, *, least: int = -8, dtype=torch.float32, **options
) -> Problem:
    torch.manual_seed(m * 31 + n * 7 + k)
    packed = random_packed(n, k, fmt, least)
    x = torch.randn(m, k)
    x[:, 3] *= 30
    codes, scale = reference.quantize_activation(x, fmt.activation)
    columns = n // 2 if options.get("silu_mul") else n
    out = torch.full((m, columns), float("nan"), dtype=dtype)
    return Problem(fragment_weight(packed), packed, codes, scale, out, **options)


def needed_bytes(p: Problem, config: Config) -> int:
    maxima = 0 if p.out_codes is None else cuda_gemm.maxima_bytes(len(p.out), p.weight.shape[0])
    return cuda_gemm.needed_bytes(config) + maxima


def called(p: Problem, config: Config, workspace: torch.Tensor) -> Gemm:
    return describe(
        config, p.codes, p.scale, p.weight, p.out, p.bias, p.residual, p.silu_mul, workspace,
        p.out_codes, p.out_scale,
    )  # fmt: skip


def simulate(
    simulator, p: Problem, config: Config, resident=4, late=True, seed=0, workspace=None
) -> None:
    """Run a problem in the simulator; RuntimeError says what went wrong."""
    if workspace is None:
        workspace = torch.full((max(16, needed_bytes(p, config)),), 255, dtype=torch.uint8)
    flags = torch.zeros(config.workers * config.cluster, dtype=torch.int32)
    call = called(p, config, workspace)
    run = simulator.quant_simulate_gemm
    run.restype = ctypes.c_char_p
    said = run(ctypes.byref(call), ctypes.c_void_p(flags.data_ptr()), resident, late, seed)
    if said is not None:
        raise RuntimeError(said.decode())
    assert int(flags.abs().max()) == 0  # as the next launch wants them


def check(p: Problem) -> None:
    wanted, scheme = p.reference(), p.packed.fmt.scheme
    if scheme == "w4a8" and not p.silu_mul:
        assert torch.equal(p.out, wanted)
    else:
        error = (p.out.float() - wanted.float()).abs().max() / wanted.float().abs().max()
        assert error < (CLOSE if p.out.dtype == torch.float32 else 2.0**-8)


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.label)
@pytest.mark.parametrize("least", [-8, -7])
@pytest.mark.parametrize("late", [False, True])
def test_every_kind_agrees_with_the_reference(simulator, fmt, least, late):
    columns = 288 if fmt.per_channel else 3 * fmt.group_size
    for config in (Config(16, 1, 3, True), Config(32, 1, 2, False), Config(64, 1, 5, True)):
        p = problem(fmt, 21, 200, columns, least=least)
        simulate(simulator, p, config, resident=2, late=late, seed=config.workers)
        check(p)


# More blocks of K than stages, so that every stage is used again; a ragged token tile and row tile.
@pytest.mark.parametrize("fmt", [INT8, LUT, CHANNEL, EXACT], ids=lambda fmt: fmt.label)
@pytest.mark.parametrize(
    "config",
    [
        Config(16, 1, 3, True),
        Config(64, 2, 2, True),
        Config(64, 2, 1, False),
        Config(128, 1, 2, True),
        Config(128, 2, 1, True),
        Config(128, 2, 2, False),
        Config(256, 1, 2, False),
        Config(256, 2, 1, False),
    ],
    ids=str,
)
def test_stages_are_used_again(simulator, fmt, config):
    if config.tile_tokens == 256 and fmt.numerics == "exact":
        pytest.skip("two accumulators of 256 tokens do not fit into registers")
    for late, seed in ((True, 1), (False, 2), (True, 3)):
        p = problem(fmt, 150, 330, 1920)
        simulate(simulator, p, config, resident=2 * config.cluster, late=late, seed=seed)
        check(p)


@pytest.mark.parametrize("workers", [1, 2, 3, 5, 7, 11, 24, 40])
def test_a_split_tile_is_summed_in_one_order(simulator, workers):
    found = []
    for resident, seed in ((1, 0), (3, 1), (workers, 2)):
        p = problem(LUT, 9, 300, 1024)
        simulate(simulator, p, Config(16, 1, workers, True), resident, late=seed > 0, seed=seed)
        check(p)
        found.append(p.out)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("fmt", [INT8, LUT], ids=lambda fmt: fmt.label)
def test_bias_residual_and_types(simulator, fmt, dtype):
    for n in (128, 131):  # fours, and rows that vectors would run over
        bias, residual = torch.randn(n).to(dtype), torch.randn(21, n).bfloat16()
        p = problem(fmt, 21, n, 256, dtype=dtype, bias=bias, residual=residual)
        simulate(simulator, p, Config(32, 1, 2, False))
        check(p)
        p = problem(fmt, 21, n, 256, dtype=dtype)
        p.residual = p.out
        p.out.copy_(torch.randn(21, n))  # in place, as a decoder's residual stream
        wanted = p.reference()
        simulate(simulator, p, Config(16, 1, 3, True))
        assert (p.out.float() - wanted.float()).abs().max() <= 2.0**-8 * wanted.float().abs().max()


@pytest.mark.parametrize("fmt", [INT8, LUT, EXACT, CHANNEL], ids=lambda fmt: fmt.label)
def test_gate_and_up_meet_in_the_epilogue(simulator, fmt):
    for config in (Config(16, 1, 5, True), Config(64, 2, 1, False), Config(128, 1, 3, False)):
        p = problem(fmt, 70, 2 * 192, 384, bias=torch.randn(384).bfloat16(), silu_mul=True)
        simulate(simulator, p, config, resident=4)
        check(p)


def test_rows_beside_the_output_are_left_alone(simulator):
    p = problem(INT8, 5, 100, 256)
    whole = torch.full((9, 120), 7.0)
    p.out = whole[2:7, 8:108]
    simulate(simulator, p, Config(16, 1, 2, True))
    check(p)
    whole[2:7, 8:108] = 7.0
    assert bool((whole == 7.0).all())


# --- schedules ---
@pytest.mark.parametrize("split", [0, 1])
def test_a_schedule_covers_every_unit_once_and_waits_for_lower_workers(simulator, split):
    for tiles, blocks, workers in itertools.product((1, 2, 7, 33), (1, 3, 8, 56), (1, 2, 5, 132)):
        workers = min(workers, tiles * blocks if split else tiles)
        seen = torch.zeros(tiles, blocks, dtype=torch.int64)
        last = [-1] * tiles
        most, segments_of = tiles * blocks, []
        for worker in range(workers):
            segments, owner = (ctypes.c_int * (3 * most))(), (ctypes.c_int * most)()
            count = simulator.quant_simulate_work(
                tiles, blocks, workers, split, worker, most, segments, owner
            )
            found = [tuple(segments[3 * i : 3 * i + 3]) for i in range(count)]
            assert count > 0
            segments_of.append(found)
            for i, (tile, begin, end) in enumerate(found):
                assert begin < end
                seen[tile, begin:end] += 1
                if end == blocks:
                    last[tile] = worker
                    # Whom it collects from: the first worker of the tile, to the one before it.
                    assert owner[i] <= worker
                    holders = [w for w, f in enumerate(segments_of) if any(s[0] == tile for s in f)]
                    assert holders == list(range(owner[i], worker + 1))
                else:  # what others wait for comes before what waits for others
                    assert i == 0
            assert [tile for tile, *_ in found] == sorted(
                (tile for tile, *_ in found), reverse=bool(split)
            )
        assert bool((seen == 1).all())
        assert min(last) >= 0
        if split:
            sizes = [sum(end - begin for _, begin, end in found) for found in segments_of]
            assert max(sizes) - min(sizes) <= 1


# --- what is refused ---
def status(simulator, p: Problem, config: Config, workspace_size: int | None = None, **changes):
    size = needed_bytes(p, config) if workspace_size is None else workspace_size
    workspace = torch.empty(max(size, 16), dtype=torch.uint8)[:size]
    call = called(p, config, workspace)
    for name, value in changes.items():
        setattr(call, name, value)
    return simulator.quant_cuda_gemm_check(ctypes.byref(call))


def test_what_no_kernel_takes_is_refused_with_its_reason(simulator):
    p, config = problem(LUT, 8, 256, 256), Config(16, 1, 4, True)
    assert status(simulator, p, config) == 0
    assert status(simulator, p, config, tile_tokens=48) == NO_KERNEL
    assert status(simulator, p, config, cluster=2) == NO_KERNEL
    assert status(simulator, p, config, group_size=16) == NO_KERNEL
    assert status(simulator, p, config, kind=8) == NO_KERNEL
    assert status(simulator, p, config, workers=1000) == NO_KERNEL
    assert status(simulator, p, config, tokens=0) == BAD_SHAPE
    assert status(simulator, p, config, columns=192) == BAD_SHAPE  # a ragged group
    assert status(simulator, problem(CHANNEL, 8, 64, 64), config, columns=24) == BAD_SHAPE
    assert status(simulator, p, config, out_type=3) == BAD_SHAPE
    assert status(simulator, p, config, silu_mul=1, rows=192) == BAD_SHAPE
    assert status(simulator, p, config, codes=None) == NULL_POINTER
    assert status(simulator, p, config, t=None) == NULL_POINTER
    assert status(simulator, p, config, x_stride=264) == BAD_ALIGNMENT
    assert status(simulator, p, config, x=p.codes.data_ptr() + 8) == BAD_ALIGNMENT
    assert status(simulator, p, config, workspace_size=64) == SMALL_WORKSPACE
    exact = problem(EXACT, 8, 256, 256)
    assert status(simulator, exact, Config(256, 1, 4, False)) == NO_KERNEL


def test_every_candidate_has_a_kernel(simulator):
    for fmt in FORMATS:
        p = problem(fmt, 8, 256, 256)
        for bucket in BUCKETS:
            case = cuda_gemm.case_of(p.weight, bucket, False)
            for config in candidates(case, 132):
                assert status(simulator, p, config) == 0


# --- the choice of tiles ---
def test_the_model_takes_small_tiles_for_few_tokens_and_wide_ones_for_many():
    case = Case("lut", 128, 16, 4096, 4096, False)
    few = by_model(case, 16, 132)
    assert few.tile_tokens == 16
    assert few.split
    many = by_model(dataclasses.replace(case, bucket=512), 8192, 132)
    assert many == Config(256, 2, 66, False)
    for kind, bucket in itertools.product(KINDS, BUCKETS):
        case = Case(kind, 128, bucket, 6144, 4096, False)
        best = by_model(case, bucket, 132)
        others = candidates(case, 132)
        assert clocks(case, best, bucket) == min(clocks(case, c, bucket) for c in others)


def test_a_table_is_checked():
    entry = {**dataclasses.asdict(Case("lut", 128, 16, 4096, 4096, False))}
    entry["config"] = dataclasses.asdict(Config(16, 1, 132, True))
    assert len(parse_table({"entries": [entry]}, "table")) == 1
    with pytest.raises(ValueError, match=r"entry 1.*twice"):
        parse_table({"entries": [entry, entry]}, "table")
    with pytest.raises(ValueError, match="table: entry 0"):
        parse_table({"entries": [{**entry, "config": {"tile_tokens": 48}}]}, "table")
    for wrong in ((48, 1, 4, True), (16, 3, 4, True), (16, 1, 0, True), (256, 1, 4, True)):
        with pytest.raises(ValueError, match="Config"):
            Config(*wrong)


# --- the backend ---
def test_the_backend_says_why_it_cannot_run(monkeypatch):
    weight = random_packed(64, 128, LUT)
    with pytest.raises(dispatch.BackendUnavailable, match="its kernels run on a GPU"):
        ops.prepare(weight, backend="cutlass")
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(dispatch, "capability", lambda device: (8, 9))
    with pytest.raises(dispatch.BackendUnavailable, match=r"for Hopper, sm_90.*sm_89"):
        dispatch.choose("gemm_w4a8", gpu, "cutlass")
    with pytest.raises(dispatch.BackendUnavailable, match="it has gemm_w4afp8"):
        dispatch.choose("rope_append", gpu, "cutlass")


def test_the_ops_take_a_fragment_weight_to_its_backend_alone():
    p = problem(LUT, 4, 64, 128, dtype=torch.bfloat16)
    with pytest.raises(ops.OpError, match="fragment layout"):
        ops.gemm(p.codes, p.scale, p.weight, p.out, backend="reference")
    short = dataclasses.replace(p.weight, t=p.weight.t[:0])
    with pytest.raises(ops.OpError, match="t must be float8_e4m3fn"):
        ops.gemm(p.codes, p.scale, short, p.out, backend="reference")


def test_the_workspace_is_enough_for_every_choice(monkeypatch):
    monkeypatch.setattr(cuda_gemm, "multiprocessors", lambda device: 132)
    found = cuda_gemm.workspace_bytes(torch.device("cuda"), [(4096, 4096)], 64)
    for tokens in range(1, 65, 7):
        for kind in KINDS:
            bucket = next(b for b in BUCKETS if tokens <= b)
            case = Case(kind, 128, bucket, 4096, 4096, False)
            assert cuda_gemm.needed_bytes(by_model(case, bucket, 132)) <= found


def test_the_workspace_is_enough_for_fewer_tokens_and_asked_for_at_no_cost(monkeypatch):
    monkeypatch.setattr(cuda_gemm, "multiprocessors", lambda device: 132)
    gpu, gemms = torch.device("cuda"), [(6144, 4096), (4096, 14336), (28672, 4096)]
    counts = [1, 2, 15, 16, 17, 64, 65, 128, 200, 256, 257, 511, 512, 513, 700, 1000, 1024, 2048]
    counts += [2049, 4095, 4096, 8192, 8193, 16384]
    found = [cuda_gemm.workspace_bytes(gpu, gemms, tokens) for tokens in counts]
    assert found == sorted(found)
    # What any number of tokens asks for fits in the workspace of the next count and of all after.
    for tokens, size in zip(counts, found, strict=True):
        bucket = next((b for b in BUCKETS if tokens <= b), BUCKETS[-1])
        for (n, k), kind, silu_mul in itertools.product(gemms, KINDS, (False, True)):
            case = Case(kind, 128, bucket, n, k, silu_mul)
            config = cuda_tuning.choose(case, tokens, 132)
            maxima = cuda_gemm.maxima_bytes(tokens, n)
            assert cuda_gemm.needed_bytes(config) + maxima <= size
    asked = []
    monkeypatch.setattr(cuda_tuning, "choose", lambda *args: asked.append(args))
    again = [cuda_gemm.workspace_bytes(gpu, gemms, tokens + 1) for tokens in counts]
    assert asked == []
    assert all(x >= y for x, y in zip(again, found, strict=True))


def test_the_structure_is_the_headers():
    fields = [name for name, _ in Gemm._fields_]
    header = (dispatch.cuda.native.SOURCE_TREE / "csrc/include/quant_cuda.h").read_text()
    body = header[header.index("typedef struct {") : header.index("} QuantCudaGemm;")]
    declared = []
    for line in body.splitlines()[1:]:
        line = line.split("//")[0].strip().rstrip(";")
        if line:
            names = line.replace("const ", "").split(" ", 1)[1]
            declared += [name.strip(" *") for name in names.split(",")]
    assert declared == fields
