"""Which backend runs an op: the table, its overrides, and what is said where none can."""

import pytest
import torch

from quant_kernels import cpu, dispatch
from quant_kernels.dispatch import BackendUnavailable

CPU = torch.device("cpu")
GPU = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def no_overrides(monkeypatch):
    monkeypatch.delenv(dispatch.VARIABLE, raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.fixture
def gpu(monkeypatch):
    """A function that sets the capability of the GPU there seems to be."""

    def pretend(major: int, minor: int) -> None:
        monkeypatch.setattr(dispatch, "capability", lambda device: (major, minor))
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)

    return pretend


def test_every_op_has_a_backend_on_every_supported_device(gpu):
    for op in dispatch.OPS:
        assert dispatch.by_table(op, CPU) == ("cpu" if cpu.available() else "reference")
    for capability in [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)]:
        gpu(*capability)
        found = {op: dispatch.by_table(op, GPU) for op in dispatch.OPS}
        assert {found.pop(op) for op in dispatch.DENSE_OPS} == {"reference"}
        assert set(found.values()) == {"triton"}


def test_an_old_gpu_is_refused_by_name(gpu):
    gpu(7, 5)
    with pytest.raises(BackendUnavailable, match=r"gemm_w4a8.*sm_75.*sm_80 or newer"):
        dispatch.choose("gemm_w4a8", GPU)
    with pytest.raises(BackendUnavailable, match=r"'triton' cannot run.*sm_75"):
        dispatch.choose("gemm_w4a8", GPU, "triton")


def test_the_table_says_where_fp8_is_emulated():
    rows = dispatch.table()
    assert {op for op, *_ in rows} == set(dispatch.OPS)
    on_ampere = {op: why for op, device, _, why in rows if device == "sm_80 and newer"}
    assert set(on_ampere) == set(dispatch.OPS)
    assert "FP16" in on_ampere["gemm_w4afp8"]
    assert "INT8" in on_ampere["gemm_w4a8"]


def test_the_argument_wins_over_the_variable_and_that_over_the_table(gpu, monkeypatch):
    gpu(9, 0)
    assert dispatch.choose("gemm_w4a8", GPU) == "triton"
    monkeypatch.setenv(dispatch.VARIABLE, "reference")
    assert dispatch.choose("gemm_w4a8", GPU) == "reference"
    assert dispatch.choose("gemm_w4a8", GPU, "triton") == "triton"
    monkeypatch.setenv(dispatch.VARIABLE, "decode_attention=reference, gemm_w4a8=triton")
    assert dispatch.choose("gemm_w4a8", GPU) == "triton"
    assert dispatch.choose("decode_attention", GPU) == "reference"
    assert dispatch.choose("prefill_attention", GPU) == "triton"
    monkeypatch.setenv(dispatch.VARIABLE, "reference,gemm_w4a8=triton")
    assert dispatch.choose("gemm_w4a8", GPU) == "triton"
    assert dispatch.choose("decode_attention", GPU) == "reference"


@pytest.mark.parametrize("text", ["tritn", "gemm=triton", "gemm_w4a8=", "gemm_w4a8=cuda"])
def test_a_misspelt_variable_is_named(text, monkeypatch):
    monkeypatch.setenv(dispatch.VARIABLE, text)
    with pytest.raises(ValueError, match=rf"FOURBYEIGHT_BACKEND.*{text}.*gemm_w4afp8"):
        dispatch.choose("gemm_w4a8", CPU)


def test_an_unknown_backend_is_named():
    with pytest.raises(ValueError, match="'cublas' is unknown; known: cpu, triton, cutlass, ref"):
        dispatch.choose("gemm_w4a8", CPU, "cublas")


def test_a_backend_that_cannot_run_is_not_replaced_in_silence(monkeypatch):
    with pytest.raises(BackendUnavailable, match=r"rope_append on cpu.*'triton' cannot.*a GPU"):
        dispatch.choose("rope_append", CPU, "triton")
    monkeypatch.setenv(dispatch.VARIABLE, "triton")
    with pytest.raises(BackendUnavailable, match="needs a GPU"):
        dispatch.choose("rope_append", CPU)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BackendUnavailable, match=r"pip install 'fourbyeight\[gpu\]'"):
        dispatch.choose("rope_append", CPU)


def test_without_the_library_the_table_names_the_reference_and_the_backend_is_refused(monkeypatch):
    monkeypatch.setattr(cpu, "why_unavailable", lambda: "not built: run make native")
    monkeypatch.setattr(cpu, "usable", lambda: False)
    assert dispatch.choose("gemm_w4a8", CPU) == "reference"
    for ask in (lambda: dispatch.choose("gemm_w4a8", CPU, "cpu"), by_variable(monkeypatch, "cpu")):
        with pytest.raises(BackendUnavailable, match=r"'cpu' cannot run: .*make native"):
            ask()
    rows = {(op, device, backend): why for op, device, backend, why in dispatch.table()}
    assert "not built" in rows["gemm_w4a8", "cpu", "reference"]


def test_a_dense_product_is_torchs_on_a_gpu_and_the_table_says_so(gpu, monkeypatch):
    gpu(9, 0)
    rows = {(op, device, backend): why for op, device, backend, why in dispatch.table()}
    assert "cuBLAS" in rows["linear", "sm_80 and newer", "reference"]
    for backend in ("triton", "cutlass"):
        with pytest.raises(BackendUnavailable, match=r"linear on cuda:0.*'reference'"):
            dispatch.choose("linear", GPU, backend)
    monkeypatch.setenv(dispatch.VARIABLE, "triton")
    assert dispatch.choose("gemm_w4a8", GPU) == "triton"
    assert dispatch.choose("linear", GPU) == "reference"
    monkeypatch.setenv(dispatch.VARIABLE, "linear=triton")
    with pytest.raises(BackendUnavailable, match="'triton' cannot run: it has none"):
        dispatch.choose("linear", GPU)


def test_the_cpu_backend_says_what_it_has(gpu):
    gpu(9, 0)
    with pytest.raises(BackendUnavailable, match=r"'cpu' cannot run: .*memory of the CPU"):
        dispatch.choose("gemm_w4a8", GPU, "cpu")


def by_variable(monkeypatch, backend):
    """What chooses with $FOURBYEIGHT_BACKEND set."""

    def ask():
        monkeypatch.setenv(dispatch.VARIABLE, backend)
        return dispatch.choose("gemm_w4a8", CPU)

    return ask


def test_tensors_of_another_gpu_than_the_current_one_are_refused(gpu):
    gpu(9, 0)
    with pytest.raises(BackendUnavailable, match=r"current device, cuda:0.*device\('cuda:1'\)"):
        dispatch.choose("gemm_w4a8", torch.device("cuda", 1))


def test_the_interpreter_counts_as_triton_on_a_cpu(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert dispatch.choose("rope_append", CPU, "triton") == "triton"
    assert dispatch.choose("rope_append", CPU) == dispatch.by_table("rope_append", CPU) != "triton"
