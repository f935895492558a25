"""Error feedback: the ridge regression is the one of its formula, and the stream comes closer."""

import pytest
import torch
from torch import Tensor

from quant.calibration.activations import MemoryStore
from quant.calibration.data import calibration_windows, load_tokens
from quant.calibration.feedback import UnquantizedStream, corrected
from quant.calibration.hessian import InputHessian
from quant.calibration.quantize import quantize
from quant.checkpoint.loading import load_decoder
from quant.checkpoint.reader import load_tokenizer
from quant.decoder import block_forward, causal_attention, rotary_table

CPU = torch.device("cpu")


def hessian_of(x: Tensor) -> InputHessian:
    hessian = InputHessian(x.shape[1], CPU)
    hessian.add(x)
    hessian.finish()
    return hessian


@pytest.fixture
def inputs() -> Tensor:
    """[T, K] BF16 numbers, correlated, of different sizes; more than one strip of columns."""
    generator = torch.Generator().manual_seed(4)
    mixing = torch.randn(320, 320, generator=generator) / 18 + torch.eye(320)
    x = torch.randn(900, 320, generator=generator) @ mixing * (0.2 + torch.rand(320) * 3)
    return x.to(torch.bfloat16).float()


@pytest.mark.parametrize("factorized", [False, True])
def test_products_and_solutions_are_those_of_the_dense_hessian(inputs, factorized):
    hessian = hessian_of(inputs)
    dense = (inputs.double().T @ inputs.double()) / len(inputs)
    if factorized:
        hessian.factorize(0.05, act_order=True)
    rows = torch.randn(7, 320, generator=torch.Generator().manual_seed(1))
    expected = rows.double() @ dense
    assert (hessian.times(rows) - expected).abs().max() < 1e-4 * expected.abs().max()
    hessian.factorize(0.3, act_order=True)
    damped = dense + 0.3 * dense.diagonal().mean() * torch.eye(320)
    expected = torch.linalg.solve(damped, rows.double().T).T
    assert (hessian.solve(rows) - expected).abs().max() < 1e-4 * expected.abs().max()


def test_correction_minimizes_the_ridge_objective(inputs):
    generator = torch.Generator().manual_seed(2)
    w = torch.randn(24, 320, generator=generator)
    true = w + 0.2 * torch.randn(24, 320, generator=generator)
    missing = inputs @ true.T + 0.5 * torch.randn(900, 24, generator=generator)
    cross = missing.T @ inputs / 900
    ridge = 0.1
    penalty = ridge * float(inputs.square().mean(dim=0).mean())
    found = corrected(w, cross, hessian_of(inputs), 1.0, ridge).double().requires_grad_()
    objective = (missing.double() - inputs.double() @ found.T).square().sum() / 900
    objective = objective + penalty * (found - w).square().sum()
    (gradient,) = torch.autograd.grad(objective, found)
    scale = (missing.double().T @ inputs.double()).abs().max() / 900
    assert gradient.abs().max() < 1e-3 * scale
    half = corrected(w, cross, hessian_of(inputs), 0.5, ridge)
    assert torch.allclose(half, (w + found.detach().float()) / 2, atol=1e-4)
    # Towards what is missing, not away from it.
    assert (found.detach() - true).norm() < 0.8 * (w - true).norm()


def test_the_residual_stream_comes_closer_to_the_unquantized_one(
    deep_checkpoint, calibration, tmp_path
):
    options = {**calibration, "num_calibration_samples": 40, "group_size": 64, "device": "cpu"}
    tokens = load_tokens(calibration["dataset"], load_tokenizer(deep_checkpoint), 258)
    windows = calibration_windows(tokens, 40, calibration["max_seq_length"], seed=0)
    positions = torch.arange(windows.shape[1]).unsqueeze(0)
    wanted = load_decoder(deep_checkpoint, dtype=torch.float32).hidden_states(windows, positions)

    def lost(feedback: float) -> float:
        recipe = tmp_path / f"{feedback}.yaml"
        recipe.write_text(f"passes: [{{compensate: {{feedback: {feedback}}}}}]")
        output = tmp_path / f"out-{feedback}"
        quantize(str(deep_checkpoint), output, str(recipe), **options)
        found = load_decoder(output, dtype=torch.float32).hidden_states(windows, positions)
        return float((found - wanted).square().sum() / wanted.square().sum())

    without, half = lost(0.0), lost(0.5)
    assert half < 0.93 * without


def test_tokens_count_by_their_error_relative_to_the_stream(tiny_checkpoint):
    # The stream after a site weighs its tokens, not the one before it, and not all of them alike.
    model = load_decoder(tiny_checkpoint("llama"), dtype=torch.float32)
    cfg, block = model.config, model.blocks[0]
    tensors = dict(block.norms)
    for name, linear in block.linears.items():
        assert isinstance(linear.weight, Tensor)
        tensors[f"{name}.weight"] = linear.weight
    positions = torch.arange(24).unsqueeze(0)
    rope = rotary_table(cfg, positions)
    stream = UnquantizedStream(cfg, MemoryStore(CPU, host=False), 1, rope)
    hidden = model.embedding[torch.arange(48).view(2, 24)] * 50
    hidden[0, 3] *= 30
    stream.begin(0, hidden)
    stream.advance(0, tensors)
    attend = causal_attention(None)
    after = block_forward(cfg, block.norms, block.linears, hidden, rope, attend)
    assert (stream.after(0, "down", 0) - after).abs().max() < 0.02 * after.abs().mean()
    found = stream.token_weights(0, "down", 0)
    expected = after.flatten(0, 1).square().mean(dim=1, keepdim=True).rsqrt()
    assert torch.allclose(found, expected, rtol=0.02)
    assert found[3] < 0.1 * found.median()
    middle = stream.after(0, "o", 0)
    assert not torch.allclose(middle, after, rtol=0.02)
    assert (middle - hidden).abs().max() > 0
