"""The command: exit codes, one-screen errors, nothing left behind, figures under stable keys."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from quant import cli
from quant.doctor import diagnose
from quant_kernels import cpu, dispatch

ROOT = Path(__file__).parents[1]
SCREEN = 24  # lines
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def small(calibration_text: Path) -> list[str]:
    """Options for a run of seconds."""
    options = ["--dataset", calibration_text, "--num-calibration-samples", 4]
    return [*map(str, options), "--max-seq-length", "32", "--group-size", "32"]


def refused(run: Run, folder: Path, *args: Any) -> str:
    """Run a wrong request: exit code 2, one screen, and `folder` as it was. Returns the error."""
    before = sorted(path.relative_to(folder) for path in folder.rglob("*"))
    code, out, err = run(*args)
    assert code == 2, (out, err)
    assert 0 < len(err.splitlines()) <= SCREEN
    assert "Traceback" not in err
    assert sorted(path.relative_to(folder) for path in folder.rglob("*")) == before
    return " ".join(err.split())


def test_run_inspect_eval_generate_agree(
    run: Run, tiny_checkpoint: Any, calibration_text: Path, small: list[str], tmp_path: Path
) -> None:
    source, output = tiny_checkpoint("qwen3"), tmp_path / "deep" / "out"
    code, out, err = run("run", source, "-o", output, *small, "--json", tmp_path / "run.json")
    assert code == 0, err
    report = json.loads((tmp_path / "run.json").read_text())
    assert report["command"] == "run"
    assert report["dry_run"] is False
    assert report["size_bytes"] == sum(p.stat().st_size for p in output.glob("*.safetensors"))
    assert report["bits_per_weight"] == 4.5  # 4 bits and a BF16 scale for every 32 weights
    assert len(report["layers"]) == 14
    assert all(0 < row["error_after"] < 0.2 for row in report["layers"])
    assert str(output) in out.replace("\n", "")

    code, out, err = run("inspect", output, "--json", tmp_path / "inspect.json")
    assert code == 0, err
    found = json.loads((tmp_path / "inspect.json").read_text())
    assert [row["error"] for row in found["layers"]] == [
        row["error_after"] for row in report["layers"]
    ]
    assert found["scheme"] == "w4afp8"
    assert found["bits_per_weight"] == 4.5

    options = ["--dataset", calibration_text, "--max-seq-length", 64, "--json"]
    code, out, err = run("eval", output, *options, tmp_path / "eval.json")
    assert code == 0, err
    figures = json.loads((tmp_path / "eval.json").read_text())
    assert figures["windows"] == 4000 // 64
    assert figures["tokens"] == figures["windows"] * 63
    assert f"{figures['perplexity']:.3f}" in out

    options = ["--max-tokens", 5, "--json"]
    code, one, err = run("generate", output, "-p", "Hello", *options, tmp_path / "one.json")
    assert code == 0, err
    code, _, err = run("generate", output, "-p", "x", "-p", "Hello", *options, tmp_path / "2.json")
    assert code == 0, err
    streamed = json.loads((tmp_path / "one.json").read_text())["outputs"]
    batched = json.loads((tmp_path / "2.json").read_text())["outputs"]
    assert streamed[0]["token_ids"] == batched[1]["token_ids"]
    assert streamed[0]["text"] == batched[1]["text"]
    assert one.rstrip("\n") == streamed[0]["text"].rstrip("\n")
    assert batched[0]["prompt"] == "x"


def test_dry_run_writes_nothing_and_predicts_the_size(
    run: Run, tiny_checkpoint: Any, small: list[str], tmp_path: Path
) -> None:
    source, output = tiny_checkpoint("llama"), tmp_path / "out"
    request = ["run", source, "-o", output, *small, "--json", tmp_path / "figures.json"]
    code, out, err = run(*request, "--dry-run")
    assert code == 0, err
    assert not output.exists()
    plan = json.loads((tmp_path / "figures.json").read_text())
    assert plan["dry_run"] is True
    assert plan["seconds"] > 0
    assert "from one measured block" in " ".join(out.split())
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"]
    assert run(*request)[0] == 0
    report = json.loads((tmp_path / "figures.json").read_text())
    # A file adds the length of its header, and rounds the header up to 8 bytes.
    assert 0 < report["size_bytes"] - plan["size_bytes"] <= 16
    assert plan["bits_per_weight"] == report["bits_per_weight"]


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("passes:\n  - compensate: {dampin: 0.1}\n", ["dampin", "did you mean 'damping'"]),
        ("shceme: w4a8\n", ["shceme", "did you mean 'scheme'"]),
        ("passes:\n  - compensat\n", ["compensat", "did you mean 'compensate'"]),
        ("group_size: 48\n", ["48", "32, 64, 128"]),
        ("group_size: large\n", ["group_size", "int", "'large'"]),
        ("passes: [\n", ["not valid YAML"]),
    ],
)
def test_wrong_recipes(
    run: Run, tiny_checkpoint: Any, tmp_path: Path, text: str, names: list[str]
) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(text)
    source = tiny_checkpoint("llama")
    err = refused(run, tmp_path, "run", source, "-o", tmp_path / "out", "--recipe", recipe)
    for name in ["mine.yaml", *names]:
        assert name in err


def test_group_size_that_does_not_divide(run: Run, odd_checkpoint: Path, tmp_path: Path) -> None:
    request = ["run", odd_checkpoint, "-o", tmp_path / "out", "--group-size", 128]
    err = refused(run, tmp_path, *request)
    for part in ("q_proj [96, 96]", "group size 128", "use 32 or -1"):
        assert part in err


@pytest.fixture
def odd_checkpoint(tmp_path: Path, byte_tokenizer: Any) -> Path:
    """A random model whose hidden size, 96 = 3 x 32, only the smallest group divides."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=258,
        hidden_size=96,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=3,
        num_key_value_heads=3,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "odd")
    byte_tokenizer.save_pretrained(tmp_path / "odd")
    return tmp_path / "odd"


def test_wrong_data(run: Run, tiny_checkpoint: Any, small: list[str], tmp_path: Path) -> None:
    source, empty = tiny_checkpoint("llama"), tmp_path / "empty.txt"
    empty.write_text(" \n")
    request = ["run", source, "-o", tmp_path / "out", *small]
    assert "empty" in refused(run, tmp_path, *request, "--dataset", empty)
    err = refused(run, tmp_path, *request, "--num-calibration-samples", 1000)
    for part in ("4,000 tokens", "1000 samples", "32,000"):
        assert part in err
    assert "no such file" in refused(run, tmp_path, *request, "--dataset", tmp_path / "no.txt")
    binary = tmp_path / "binary.txt"
    binary.write_bytes(b"\xff\xfe\x00abc")
    assert "UTF-8" in refused(run, tmp_path, *request, "--dataset", binary)


def test_output_that_exists(
    run: Run, tiny_checkpoint: Any, small: list[str], tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    request = ["run", tiny_checkpoint("llama"), "-o", tmp_path / "out", *small]
    assert "exists" in refused(run, tmp_path, *request)
    assert (tmp_path / "out" / "mine.txt").read_text() == "keep"


def test_wrong_models(
    run: Run, tiny_checkpoint: Any, small: list[str], tmp_path: Path, quantized_case: Any
) -> None:
    def request(model: Any) -> list[Any]:
        return ["run", model, "-o", tmp_path / "out", *small]

    assert "no such" in refused(run, tmp_path, *request(tmp_path / "nowhere"))
    copy = tmp_path / "copy"
    shutil.copytree(tiny_checkpoint("llama"), copy)

    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "model_type": "mamba"}))
    err = refused(run, tmp_path, *request(copy))
    for part in ("mamba", "llama", "mistral", "qwen2", "qwen3"):
        assert part in err
    (copy / "config.json").write_text(json.dumps(config))

    weights = (copy / "model.safetensors").rename(tmp_path / "aside.safetensors")
    torch.save({}, copy / "pytorch_model.bin")
    assert "pickle" in refused(run, tmp_path, *request(copy))
    (copy / "pytorch_model.bin").unlink()
    weights.rename(copy / "model.safetensors")

    (copy / "config.json").write_text(json.dumps({**config, "intermediate_size": 512}))
    err = refused(run, tmp_path, *request(copy))
    for part in ("gate_proj.weight", "[256, 128]", "[512, 128]"):
        assert part in err

    assert "already quantized" in refused(run, tmp_path, *request(quantized_case("int8-64").output))


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--scheme", "w4a4"], "w4a4"),
        (["--group-size", 100], "100"),
        (["--scheme", "w4a8", "--numerics", "lut"], "int8"),
        (["--ignore", "model.layers.9.mlp.up_proj"], "matches no layer"),
        (["--ignore", "re:.*"], "no layer to quantize"),
        (["--dtype", "int8"], "bfloat16"),
        (["--device", "tpu"], "cuda"),
        (["--recipe", "gptqq"], "did you mean 'gptq'"),
        (["--seed", -1], "seed"),
        (["--json", "/nowhere/at/all.json"], "--json"),
        (["--unknown"], "No such option"),
        (["--ignore", "re:("], "no regular expression"),
        (["--dtype", "int8", "--dry-run"], "bfloat16"),
        (["--max-seq-length", 300, "--dry-run"], "max_position_embeddings is 256"),
        (["--on-failure", "skip"], "known: stop, skip-to-bf16"),
        (["--max-error", "0"], "must be positive"),
        (["--max-error", "nan"], "must be positive"),
        (["--activation-offload", "gpu"], "known: auto, none, cpu, disk"),
        (["--max-shard-size", "5XB"], "write 5GB, 500MB or 1GiB"),
        (["--max-shard-size", "0"], "not positive"),
    ],
)
def test_wrong_options(
    run: Run,
    tiny_checkpoint: Any,
    small: list[str],
    tmp_path: Path,
    options: list[Any],
    part: str,
) -> None:
    source = tiny_checkpoint("llama")
    assert part in refused(run, tmp_path, "run", source, "-o", tmp_path / "out", *small, *options)


def test_generate_and_eval_refuse(run: Run, tiny_checkpoint: Any, tmp_path: Path) -> None:
    model = tiny_checkpoint("llama")
    assert "--prompt" in refused(run, tmp_path, "generate", model)
    assert "temperature" in refused(run, tmp_path, "generate", model, "-p", "x", "--temperature=-1")
    assert "300 tokens" in refused(run, tmp_path, "generate", model, "-p", "x" * 300)
    err = refused(run, tmp_path, "eval", model, "--max-seq-length", 512)
    assert "max_position_embeddings is 256" in err
    short = tmp_path / "short.txt"
    short.write_text("few")
    options = ["--dataset", short, "--max-seq-length", 64]
    assert "3 tokens" in refused(run, tmp_path, "eval", model, *options)


def test_doctor_says_what_runs_and_why_not_the_rest(run: Run, tmp_path: Path) -> None:
    code, _, err = run("doctor", "--json", tmp_path / "doctor.json")
    assert code == 0, err
    found = json.loads((tmp_path / "doctor.json").read_text())
    works = {check["name"]: check["ok"] for check in found["schemes"]}
    assert works["w4afp8 on reference"] is True
    assert works["w4a8 on cpu"] == cpu.available()
    assert works["w4a8 on triton"] == torch.cuda.is_available()
    assert not works["w4afp8 on cutlass"] or torch.cuda.is_available()
    assert all(check["detail"] for check in found["libraries"] + found["schemes"])
    assert found["versions"]["torch"] == torch.__version__
    rows = {(row["op"], row["backend"]): row for row in found["ops"]}
    assert {op for op, _ in rows} == set(dispatch.OPS)
    assert rows["gemm_w4a8", "reference"]["missing"] is None
    assert bool(rows["gemm_w4a8", "triton"]["missing"]) != torch.cuda.is_available()


def test_doctor_names_the_instruction_set_and_one_that_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    details = {check.name: check for check in diagnose().libraries}
    assert f"uses {cpu.isa()} (of {', '.join(cpu.isas())})" in details["CPU library"].detail
    # The library reads the variable once in a process.
    monkeypatch.setenv("QUANT_CPU_ISA", "avx1024")
    monkeypatch.setattr(cpu, "isa", lambda: "")
    found = diagnose()
    library = next(check for check in found.libraries if check.name == "CPU library")
    assert not library.ok
    assert library.detail.startswith("QUANT_CPU_ISA=avx1024: this machine lacks it, and has ")
    missing = {row.missing for row in found.ops if row.backend == "cpu"}
    assert missing == {library.detail}


def test_python_m_quant_is_the_command(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "quant", "inspect", str(tmp_path / "nowhere")],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"},
        check=False,
    )
    assert done.returncode == 2
    assert "no such directory" in " ".join(done.stderr.split())


def test_the_readme_documents_every_key(
    run: Run, tiny_checkpoint: Any, calibration_text: Path, small: list[str], tmp_path: Path
) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    source, output, figures = tiny_checkpoint("llama"), tmp_path / "out", tmp_path / "figures.json"
    request = ["run", source, "-o", output, *small]
    text = ["--dataset", calibration_text, "--max-seq-length", 64]
    for command in (
        [*request, "--dry-run"],
        request,
        ["inspect", output],
        ["eval", output, *text],
        ["generate", output, "-p", "a", "--max-tokens", 2],
        ["doctor"],
    ):
        code, _, err = run(*command, "--json", figures)
        assert code == 0, err
        found = json.loads(figures.read_text())
        rows = [row for rows in found.values() if isinstance(rows, list) for row in rows[:1]]
        keys = [*found, *(key for row in rows if isinstance(row, dict) for key in row)]
        for key in keys:
            assert f"`{key}`" in readme or f"`{key}[]`" in readme, (command[0], key)


def test_version(run: Run) -> None:
    code, out, _ = run("--version")
    assert code == 0
    assert out == f"fourbyeight {cli.__version__}\n"


def test_inspect_keeps_its_figures_on_a_narrow_screen(
    run: Run, quantized_case: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "out", type(cli.out)(width=60))
    case = quantized_case("int8-128")
    code, out, err = run("inspect", case.output)
    assert code == 0, err
    for row in case.report.layers:
        assert f"{row.error_after:.3%}" in out
        assert f"{row.shape[0]} x {row.shape[1]}" in out
