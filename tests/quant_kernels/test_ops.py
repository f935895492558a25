"""The ops as torch sees them: schemas, errors that name shapes, torch.compile, and definitions."""

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from quant_kernels import dispatch, ops, reference, reference_attention
from quant_kernels.formats import FormatError, WeightFormat, every_format
from quant_kernels.kv4 import KVFormat
from quant_kernels.ops import OpError
from quant_kernels.packing import KV_PAGE, PackedWeight, pack_int4, split_weight

F8 = torch.float8_e4m3fn
HQ, HK, D, PAGES = 6, 2, 32, 5


@pytest.fixture(autouse=True)
def by_definition(monkeypatch):
    """The backend that reads weights as they are stored; the others have tests of their own."""
    monkeypatch.setenv(dispatch.VARIABLE, "reference")


def packed(n: int, k: int, fmt: WeightFormat, seed: int = 0) -> PackedWeight:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-8, 8, (n, k), generator=generator, dtype=torch.int8)
    scales = torch.rand(n, fmt.groups(k), generator=generator).add(0.1).bfloat16()
    return PackedWeight(pack_int4(codes), scales, fmt)


def activation(m: int, k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Poisoned outputs: codes [m, k] and scales [m, 1]."""
    codes = torch.full((m, k), 0x55, dtype=torch.uint8).view(dtype)
    return codes, torch.full((m, 1), torch.nan)


def tokens(m: int, k: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(m, k, generator=generator)
    return (x * torch.rand(m, 1, generator=generator).mul(5).exp()).bfloat16()


def cache() -> tuple[Tensor, Tensor]:
    codes = torch.full((2, PAGES, HK, KV_PAGE, D // 2), 0xAA, dtype=torch.uint8)
    return codes, torch.full((2, PAGES, HK, KV_PAGE, 2), torch.nan, dtype=torch.float16)


def rope_arguments(count: int = 7) -> dict[str, Tensor]:
    angles = torch.rand(50, D // 2, generator=torch.Generator().manual_seed(3)) * 6
    kv_codes, kv_scales = cache()
    return {
        "qkv": tokens(count, (HQ + 2 * HK) * D),
        "positions": torch.arange(count) * 3,
        "cos": angles.cos(),
        "sin": angles.sin(),
        "slots": torch.tensor([130, 64, -1, 3, 255, 200, 65])[:count],
        "q_codes": activation(count * HQ, D, F8)[0].view(count, HQ, D),
        "q_scale": torch.full((count, HQ), torch.nan),
        "kv_codes": kv_codes,
        "kv_scales": kv_scales,
    }


@pytest.mark.parametrize("dtype", [F8, torch.int8])
def test_activation_ops_are_their_definitions(dtype):
    kind = "fp8" if dtype == F8 else "int8"
    x, weight = tokens(5, 48), tokens(1, 24)[0]
    for run, y in (
        (lambda c, s: ops.quantize_activation(x, c, s), x),
        (lambda c, s: ops.silu_mul_quantize(x, c, s), reference.silu_mul(x)),
        (
            lambda c, s: ops.rms_norm_quantize(x[:, :24], weight, 1e-5, c, s),
            reference.rms_norm(x[:, :24], weight, 1e-5),
        ),
    ):
        codes, scale = activation(5, y.shape[1], dtype)
        run(codes, scale)
        wanted = reference.quantize_activation(y, kind)
        assert torch.equal(codes.view(torch.uint8), wanted[0].view(torch.uint8))
        assert torch.equal(scale, wanted[1])


def test_the_norm_adds_into_the_residual_first():
    x, residual, weight = tokens(4, 24), tokens(4, 24, seed=2), tokens(1, 24)[0]
    total = (x.float() + residual.float()).bfloat16()
    codes, scale = activation(4, 24, torch.int8)
    ops.rms_norm_quantize(x, weight, 1e-5, codes, scale, residual=residual)
    assert torch.equal(residual, total)
    wanted = reference.quantize_activation(reference.rms_norm(total, weight, 1e-5), "int8")
    assert torch.equal(codes, wanted[0])


@pytest.mark.parametrize("fmt", every_format(), ids=lambda fmt: fmt.label)
@pytest.mark.parametrize("silu_mul", [False, True])
def test_gemm_is_its_definition(fmt, silu_mul):
    weight = packed(20, 128, fmt)
    codes, scale = reference.quantize_activation(tokens(3, 128), fmt.activation)
    bias, residual = tokens(1, 20)[0], tokens(3, 20, seed=5)
    out = torch.full((3, 10 if silu_mul else 20), torch.nan, dtype=torch.bfloat16)
    if silu_mul:
        ops.gemm(codes, scale, weight, out, bias=bias, silu_mul=True)
        y = reference.gemm(codes, scale, weight, bias, torch.float32)
        assert torch.equal(out, reference.silu_mul(y).bfloat16())
    else:
        ops.gemm(codes, scale, weight, out, bias=bias, residual=residual)
        y = reference.gemm(codes, scale, weight, bias, torch.float32)
        assert torch.equal(out, (y + residual.float()).bfloat16())


@pytest.mark.parametrize("kind", [F8, torch.int8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("fmt", every_format()[::3], ids=lambda fmt: fmt.label)
def test_gate_and_up_may_be_quantized_as_they_are_stored(fmt, dtype, kind):
    weight = packed(20, 128, fmt)
    x = reference.quantize_activation(tokens(3, 128) / 30, fmt.activation)
    out, alone = (torch.full((3, 10), torch.nan, dtype=dtype) for _ in range(2))
    codes, scale = activation(3, 10, kind)
    ops.gemm(*x, weight, out, silu_mul=True, codes=codes, scale=scale)
    ops.gemm(*x, weight, alone, silu_mul=True)
    assert torch.equal(out, alone)
    wanted = reference.quantize_activation(out, "fp8" if kind == F8 else "int8")
    assert torch.equal(codes.view(torch.uint8), wanted[0].view(torch.uint8))
    assert torch.equal(scale, wanted[1])


def test_a_dense_product_is_its_definition():
    x, weight = tokens(3, 48), tokens(20, 48, seed=2)
    out = torch.full((3, 20), torch.nan, dtype=torch.bfloat16)
    ops.linear(x, weight, out)
    assert torch.equal(out, torch.nn.functional.linear(x, weight))


def test_rope_append_writes_its_slots_and_nothing_else():
    arguments = rope_arguments()
    kv_codes, kv_scales = arguments["kv_codes"], arguments["kv_scales"]
    ops.rope_append(*arguments.values())
    slots = arguments["slots"]
    rows = reference_attention.rope_quantize(
        *(arguments[name] for name in ("qkv", "positions", "cos", "sin")), (HQ, HK), KVFormat()
    )
    assert torch.equal(arguments["q_scale"], rows.q_scale)
    untouched = torch.ones(PAGES * KV_PAGE, dtype=torch.bool)
    untouched[slots[slots >= 0]] = False
    flat = kv_codes.transpose(2, 3).flatten(1, 2)
    assert bool((flat[:, untouched] == 0xAA).all())
    assert bool(kv_scales.transpose(2, 3).flatten(1, 2)[:, untouched].isnan().all())
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            pages = torch.tensor([slot // KV_PAGE])
            keys, values = reference_attention.read_kv(kv_codes, kv_scales, pages, KV_PAGE)
            place = slot % KV_PAGE
            assert torch.equal(keys.codes[place], rows.keys.codes[token])
            assert torch.equal(values.offset[place], rows.values.offset[token])


def filled_cache(lengths: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """A cache with random rows for sequences of these lengths, and their block table."""
    kv_codes, kv_scales = cache()
    generator = torch.Generator().manual_seed(4)
    kv_codes.copy_(torch.randint(0, 256, kv_codes.shape, generator=generator))
    kv_scales.copy_(torch.rand(kv_scales.shape, generator=generator) - 0.4)
    table = torch.full((len(lengths), 2), 4, dtype=torch.int32)
    for b, pages in enumerate(([3, 1], [0, 4], [2, 4])[: len(lengths)]):
        table[b] = torch.tensor(pages)
    return kv_codes, kv_scales, table


def test_decode_is_prefill_of_one_token():
    lengths = torch.tensor([100, 64, 0], dtype=torch.int32)
    kv_codes, kv_scales, table = filled_cache(lengths.tolist())
    q_codes, a = reference.quantize_activation(tokens(3 * HQ, D).view(3, HQ, D), "fp8")
    q_scale = a.squeeze(-1)
    found, wanted = (torch.full((3, HQ, D), torch.nan) for _ in range(2))
    shared = (q_codes, q_scale, kv_codes, kv_scales, table)
    ops.decode_attention(*shared, lengths, found, sm_scale=0.2)
    cu_seqlens = torch.arange(4, dtype=torch.int32)
    ops.prefill_attention(*shared, cu_seqlens, lengths, 1, wanted, sm_scale=0.2)
    assert torch.equal(found, wanted)
    assert bool((found[2] == 0).all())
    assert bool(found[:2].isfinite().all())


REFUSED = {
    "x_scale": lambda a: a.update(x_scale=a["x_scale"][:2]),
    "x_codes": lambda a: a.update(x_codes=a["x_codes"][:, :64]),
    "out": lambda a: a.update(out=a["out"][:, :5]),
    "bias": lambda a: a.update(bias=a["out"][0, :3]),
    "residual": lambda a: a.update(residual=a["out"].T),
}


@pytest.mark.parametrize("name", REFUSED)
def test_gemm_names_the_argument_that_does_not_fit(name):
    fmt = WeightFormat("w4a8", 64, "int8")
    codes, scale = reference.quantize_activation(tokens(3, 128), "int8")
    arguments = {"x_codes": codes, "x_scale": scale, "weight": packed(20, 128, fmt),
                 "out": torch.empty(3, 20), "bias": None, "residual": None}  # fmt: skip
    REFUSED[name](arguments)
    first = [arguments.pop(key) for key in ("x_codes", "x_scale", "weight", "out")]
    with pytest.raises(OpError, match=rf"gemm_w4a8: {name} must be .* got "):
        ops.gemm(*first, **arguments)


def test_codes_of_the_output_that_do_not_fit_are_refused():
    weight = packed(20, 128, WeightFormat("w4a8", 64, "int8"))
    x = reference.quantize_activation(tokens(3, 128), "int8")
    out, whole = torch.empty(3, 10), torch.empty(3, 20)
    codes, scale = activation(3, 10, F8)
    together = "gemm_w4a8: codes and scale of the output come together, and with silu_mul"
    for options in ({"codes": codes}, {"scale": scale}):
        with pytest.raises(OpError, match=together):
            ops.gemm(*x, weight, out, silu_mul=True, **options)
    with pytest.raises(OpError, match=together):
        ops.gemm(*x, weight, whole, codes=activation(3, 20, F8)[0], scale=scale)
    for wrong in (codes[:, :9], codes[:2], codes.float(), codes.T):
        with pytest.raises(OpError, match=r"codes must be float8_e4m3fn or int8 \[3, 10\] .* got "):
            ops.gemm(*x, weight, out, silu_mul=True, codes=wrong, scale=scale)
    for wrong in (scale[:2], scale.double(), scale[:, 0]):
        with pytest.raises(OpError, match=r"scale must be float32 \[3, 1\] .* got "):
            ops.gemm(*x, weight, out, silu_mul=True, codes=codes, scale=wrong)


def test_a_weight_in_another_backends_layout_is_refused():
    fmt = WeightFormat("w4a8", 64, "int8")
    codes, scale = reference.quantize_activation(tokens(3, 128), "int8")
    with pytest.raises(OpError, match=r"\[20, 128\] is in the split layout, not in the c.*prepare"):
        ops.gemm(codes, scale, split_weight(packed(20, 128, fmt)), torch.empty(3, 20))


@pytest.mark.parametrize("split", [False, True])
def test_a_weight_whose_parts_do_not_fit_is_refused(split):
    fmt = WeightFormat("w4afp8", 64, "lut")
    codes, scale = reference.quantize_activation(tokens(3, 128), "fp8")
    weight = packed(20, 128, fmt)
    if split:
        made = split_weight(weight)
        parts = {"codes": made.codes, "t": made.t, "c": made.c}
    else:
        parts = {"codes": weight.words, "t": weight.scales, "c": torch.empty(0)}
    out = torch.empty(3, 20)
    for name in ("codes", "t", "c") if split else ("codes", "t"):
        for wrong in (
            parts[name][..., :-1],
            parts[name].double(),
            parts[name].mT if name != "c" else parts[name][::2],
        ):
            changed = {**parts, name: wrong}
            with pytest.raises((OpError, FormatError), match=r"^gemm_w4afp8: "):
                torch.ops.fourbyeight.gemm_w4afp8(
                    codes,
                    scale,
                    *changed.values(),
                    64,
                    "lut",
                    out,
                    None,
                    None,
                    False,
                    None,
                    None,
                    None,
                    "",
                )


def test_the_cache_and_the_queries_must_belong_together():
    arguments = rope_arguments()
    for change, message in (
        (
            {"kv_codes": arguments["kv_codes"][:, :, :, :32]},
            r"kv_codes must be uint8 \[2, 5, 2, 64",
        ),
        ({"kv_scales": arguments["kv_scales"].float()}, "kv_scales must be float16"),
        ({"q_scale": arguments["q_scale"].T}, "q_scale must be float32"),
        ({"cos": arguments["cos"][:, :5]}, "cos must be float32"),
        ({"slots": arguments["slots"].float()}, "slots must be int32 or int64"),
        ({"qkv": arguments["qkv"][:, :-1]}, "qkv must be"),
    ):
        with pytest.raises(OpError, match=f"rope_append: {message}"):
            ops.rope_append(*{**arguments, **change}.values())
    odd = {**arguments, "q_codes": arguments["q_codes"][:, :5], "q_scale": torch.empty(7, 5)}
    with pytest.raises(OpError, match="5 query heads over 2 KV heads of dimension 32"):
        ops.rope_append(*odd.values())


def every_call() -> dict[str, tuple]:
    """Arguments of every registered op."""
    fmt = WeightFormat("w4afp8", 64, "lut")
    weight = packed(16, 128, fmt)
    x, scale = reference.quantize_activation(tokens(3, 128), "fp8")
    kv_codes, kv_scales, table = filled_cache([100, 64])
    lengths = torch.tensor([100, 64], dtype=torch.int32)
    q_codes, a = reference.quantize_activation(tokens(2 * HQ, D).view(2, HQ, D), "fp8")
    shared = (q_codes, a.squeeze(-1), kv_codes, kv_scales, table)
    kv = tokens(kv_codes.numel() // D * 2, D).view(*kv_codes.shape[:-1], D)
    empty = torch.empty(0)
    gemm = (weight.words, weight.scales, empty, 64)
    integer = packed(16, 128, WeightFormat("w4a8", 64, "int8"))
    xi, si = reference.quantize_activation(tokens(3, 128), "int8")
    out = torch.zeros(3, 16)
    return {
        "quantize_activation": (tokens(3, 32), *activation(3, 32, torch.int8), ""),
        "rms_norm_quantize": (
            tokens(3, 32), tokens(1, 32)[0], 1e-5, *activation(3, 32, torch.int8), tokens(3, 32),
            "",
        ),
        "silu_mul_quantize": (tokens(3, 64), *activation(3, 32, torch.int8), ""),
        "gemm_w4afp8": (
            x, scale, *gemm, "lut", torch.zeros(3, 8), None, None, True, *activation(3, 8, F8),
            None, "",
        ),
        "gemm_w4a8": (
            xi, si, integer.words, integer.scales, empty, 64, "int8", out, None, None, False, None,
            None, None, "",
        ),
        "linear": (tokens(3, 128), tokens(16, 128), torch.zeros(3, 16).bfloat16(), ""),
        "rope_append": (*rope_arguments().values(), None, None, 1e-6, None, None, False, ""),
        "prefill_attention": (
            *shared, torch.tensor([0, 1, 2], dtype=torch.int32), lengths, 1, torch.zeros(2, HQ, D),
            0.2, 0, 5.0, 0.0, "",
        ),
        "decode_attention": (*shared, lengths, torch.zeros(2, HQ, D), 0.2, 0, 5.0, None, ""),
        "dense_rope_append": (
            *(rope_arguments()[name] for name in ("qkv", "positions", "cos", "sin", "slots")),
            torch.zeros(7, HQ, D).bfloat16(), kv, None, None, 1e-6, "",
        ),
        "dense_prefill_attention": (
            tokens(2 * HQ, D).view(2, HQ, D), kv, table, [1, 1], [100, 64], torch.zeros(2, HQ, D),
            0.2, 0, "",
        ),
        "dense_decode_attention": (
            tokens(2 * HQ, D).view(2, HQ, D), kv, table, lengths, torch.zeros(2, HQ, D), 0.2, 0, "",
        ),
    }  # fmt: skip


@pytest.mark.parametrize("name", every_call())
def test_torch_knows_an_ops_outputs(name):
    op = getattr(torch.ops.fourbyeight, name).default
    opcheck(op, every_call()[name], test_utils="test_faketensor")
    arguments = every_call()[name]
    before = [a.clone() if isinstance(a, Tensor) else None for a in arguments]
    assert op(*arguments) is None
    for slot, old, new in zip(op._schema.arguments, before, arguments, strict=True):
        if old is not None:
            changed = old.contiguous().view(torch.uint8) != new.contiguous().view(torch.uint8)
            written = slot.alias_info is not None and slot.alias_info.is_write
            assert bool(changed.any()) == written, slot.name


def test_an_op_is_one_node_of_a_compiled_graph():
    weight = packed(16, 128, WeightFormat("w4a8", 64, "int8"))

    def linear(x: Tensor) -> Tensor:
        codes = torch.empty(x.shape, dtype=torch.int8)
        scale = torch.empty(len(x), 1)
        out = torch.empty(len(x), 16, dtype=x.dtype)
        ops.quantize_activation(x, codes, scale)
        ops.gemm(codes, scale, weight, out)
        return out * 2

    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    for m in (3, 7):
        assert torch.equal(compiled(tokens(m, 128)), linear(tokens(m, 128)))


def test_no_tokens_are_no_work():
    fmt = WeightFormat("w4a8", 64, "int8")
    codes, scale = activation(0, 128, torch.int8)
    ops.quantize_activation(tokens(1, 128)[:0], codes, scale)
    around = torch.full((2, 16), 77.0)
    ops.gemm(codes, scale, packed(16, 128, fmt), around[1:1])
    assert bool((around == 77).all())
