"""The command `quantize`: options in, tables and figures out. No logic lives here."""

from __future__ import annotations

import dataclasses
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.text import Text

from quant import __version__, cli_evaluation, tables
from quant.console import (
    Device,
    Dtype,
    Json,
    Model,
    Revision,
    TrustRemoteCode,
    check_json_path,
    err,
    out,
    progress_bars,
    write_json,
    write_raw,
)
from quant.errors import RequestError, WorkFailed

if TYPE_CHECKING:
    from quant.runtime.llm import LLM
    from quant.runtime.sampling import SamplingParams

app = typer.Typer(
    name="quantize",
    help="4-bit weights by 8-bit activations for Hugging Face decoder checkpoints.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def print_version(wanted: bool) -> None:
    if wanted:
        print(f"fourbyeight {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=print_version, is_eager=True, help="Print the version, and exit."
        ),
    ] = False,
) -> None:
    """4-bit weights by 8-bit activations for Hugging Face decoder checkpoints."""


@app.command()
def run(
    model: Model,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="OUT", help="Directory to make.")
    ],
    recipe: Annotated[
        str,
        typer.Option(
            help="A preset (best, best-rotate, gptq, qqq, qqq-rotate, fireq, rtn) or a YAML file."
        ),
    ] = "best",
    scheme: Annotated[
        str | None, typer.Option(help="w4afp8 or w4a8. (default: w4afp8, or the recipe)")
    ] = None,
    group_size: Annotated[
        int | None,
        typer.Option(help="32, 64, 128, or -1 for per channel. (default: 128, or the recipe)"),
    ] = None,
    numerics: Annotated[
        str | None, typer.Option(help="w4afp8: lut or exact. (default: lut, or the recipe)")
    ] = None,
    kv_cache: Annotated[
        str | None,
        typer.Option(help="none, kv4 or kv4-symmetric. (default: none, or the recipe)"),
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(
            help="For calibration: builtin, a file, a hub id. (default: builtin, or the recipe)"
        ),
    ] = None,
    num_calibration_samples: Annotated[
        int | None, typer.Option(help="Windows of text. (default: 128, or the recipe)")
    ] = None,
    max_seq_length: Annotated[
        int | None, typer.Option(help="Tokens in a window. (default: 512, or the recipe)")
    ] = None,
    ignore: Annotated[
        list[str] | None,
        typer.Option(help="Layer to leave alone: its full name, or re:<regex>. Repeatable."),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Which windows calibration sees. (default: 0, or the recipe)")
    ] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    activation_offload: Annotated[
        str, typer.Option(help="Where activations wait: auto, none (on the device), cpu, disk.")
    ] = "auto",
    max_shard_size: Annotated[str, typer.Option(help="Of OUT's files: 5GB, 500MB, 1GiB.")] = "5GB",
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on after the last block of an unfinished run.")
    ] = False,
    on_failure: Annotated[
        str, typer.Option(help="Layers that cannot be quantized: stop, or skip-to-bf16.")
    ] = "stop",
    max_error: Annotated[
        float, typer.Option(help="Share of its output's energy that a layer may lose.")
    ] = 0.5,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be done, and how long it takes.")
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
    revision: Revision = None,
    json_path: Json = None,
) -> None:
    """Quantize MODEL into OUT. Options override the recipe."""
    from quant.calibration import quantize as calibration

    request: dict[str, Any] = {
        "scheme": scheme,
        "group_size": group_size,
        "numerics": numerics,
        "kv_cache": kv_cache,
        "dataset": dataset,
        "num_calibration_samples": num_calibration_samples,
        "max_seq_length": max_seq_length,
        "ignore": tuple(ignore) if ignore else None,
        "seed": seed,
        "revision": revision,
        "trust_remote_code": trust_remote_code,
        "activation_offload": activation_offload,
        "max_shard_size": int(max_shard_size) if max_shard_size.isdigit() else max_shard_size,
        "on_failure": on_failure,
        "max_error": max_error,
    }
    check_json_path(json_path)
    if dry_run:
        with progress_bars() as on_progress:
            plan = calibration.plan(
                model,
                output,
                recipe,
                dtype=dtype,
                device=device,
                measure=True,
                on_progress=on_progress,
                **request,
            )
        out.print(tables.plan_table(plan))
        write_json(json_path, {"command": "run", "dry_run": True, **plan.to_dict()})
        return
    with progress_bars(stops_between=True) as on_progress:
        try:
            report = calibration.quantize(
                model,
                output,
                recipe,
                dtype=dtype,
                device=device,
                resume=resume,
                on_progress=on_progress,
                **request,
            )
        except (KeyboardInterrupt, SystemExit):
            say_what_is_kept(output)
            raise
    out.print(tables.run_table(report))
    write_json(json_path, {"command": "run", "dry_run": False, **report.to_dict()})


@app.command()
def generate(
    model: Model,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", help="Text to continue. Repeatable.")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Apply the chat template.")] = False,
    max_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="0 keeps all tokens.")] = 0,
    top_p: Annotated[float, typer.Option(help="1 keeps all tokens.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="0 keeps all tokens.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="1 is off.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Of the sampling, per prompt.")] = None,
    max_model_len: Annotated[int | None, typer.Option(help="Prompt and output, tokens.")] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
    revision: Revision = None,
    json_path: Json = None,
) -> None:
    """Generate text from MODEL, quantized or not. One prompt is streamed, several are batched."""
    from quant.runtime.llm import LLM
    from quant.runtime.sampling import SamplingParams

    check_json_path(json_path)
    if not prompt:
        raise RequestError("no prompt: give --prompt TEXT, once or more")
    params = SamplingParams(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        max_tokens=max_tokens,
    )
    with err.status("loading"):
        llm = LLM(
            model,
            max_model_len=max_model_len,
            dtype=dtype,
            device=device,
            trust_remote_code=trust_remote_code,
            revision=revision,
        )
    err.print(llm.kv_cache, style="dim")
    started = time.perf_counter()
    prompts: list[Any] = [[user_message(text)] for text in prompt] if chat else prompt
    if len(prompts) == 1:
        rows = [stream_completion(llm, prompts[0], params)]
    else:
        outputs = llm.chat(prompts, params) if chat else llm.generate(prompts, params)
        rows = [dataclasses.asdict(output.outputs[0]) for output in outputs]
        for text, row in zip(prompt, rows, strict=True):
            out.print(Text(f"> {text}", style="bold"))
            write_raw(row["text"] + "\n")
    seconds = time.perf_counter() - started
    count = sum(len(row["token_ids"]) for row in rows)
    completions = [{"prompt": text, **row} for text, row in zip(prompt, rows, strict=True)]
    figures = {
        "command": "generate",
        "model": model,
        "seconds": seconds,
        "tokens": count,
        "tokens_per_second": count / seconds,
        "kv_cache_bytes_per_token": llm.model.bytes_per_token,
        "kv_cache_tokens": llm.cache_tokens,
        "outputs": completions,
    }
    write_json(json_path, figures)
    err.print(f"{count} tokens in {seconds:.1f} s, {count / seconds:.1f} tokens/s", style="dim")


app.command(name="eval")(cli_evaluation.evaluate)
app.command(name="ablation")(cli_evaluation.ablation)


@app.command()
def inspect(
    model: Model,
    trust_remote_code: TrustRemoteCode = False,
    revision: Revision = None,
    json_path: Json = None,
) -> None:
    """Show what a checkpoint holds, layer by layer: shape, format, bits, error."""
    from quant.checkpoint.inspection import inspect_checkpoint
    from quant.checkpoint.source import resolve_model

    check_json_path(json_path)
    directory = resolve_model(model, revision=revision, trust_remote_code=trust_remote_code)
    found = inspect_checkpoint(directory, trust_remote_code=trust_remote_code)
    out.print(tables.inspection_table(found))
    write_json(json_path, {"command": "inspect", **dataclasses.asdict(found)})


@app.command()
def doctor(json_path: Json = None) -> None:
    """Say what this machine can run, and why not the rest."""
    from quant.doctor import diagnose

    check_json_path(json_path)
    found = diagnose()
    for table in tables.diagnosis_tables(found):
        out.print(table)
    write_json(json_path, {"command": "doctor", **dataclasses.asdict(found)})


@app.command()
def demo(
    model: Annotated[
        str | None, typer.Option(help="Your own model instead of SmolLM2-135M-Instruct.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="OUT", help="Keep the checkpoint here."),
    ] = None,
    scheme: Annotated[str, typer.Option(help="w4afp8 or w4a8.")] = "w4afp8",
    group_size: Annotated[int, typer.Option(help="32, 64, 128, or -1 for per channel.")] = 64,
    json_path: Json = None,
) -> None:
    """Quantize a small real model, measure it before and after, and let both speak."""
    from quant.demo import run_demo

    check_json_path(json_path)
    with progress_bars() as on_progress:
        result = run_demo(
            model, output, scheme=scheme, group_size=group_size, on_progress=on_progress
        )
    for part in tables.demo_tables(result):
        out.print(part, soft_wrap=isinstance(part, Text))  # a command to copy stays one line
    write_json(json_path, {"command": "demo", **dataclasses.asdict(result)})


def say_what_is_kept(output: Path) -> None:
    """After an interruption: what is done, and how to go on."""
    from quant.calibration.resume import finished_blocks

    if output.expanduser().exists():  # it was refused where it had been there before
        err.print(f"stopped after the last step; {output} is complete")
    elif blocks := finished_blocks(output):
        err.print(
            f"stopped; {blocks} blocks are done and kept. "
            "To go on, run the same command with --resume"
        )
    else:
        err.print("stopped before the first block was done; nothing was left behind")


def user_message(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def stream_completion(llm: LLM, prompt: Any, params: SamplingParams) -> dict[str, Any]:
    """Write a completion as its tokens come; returns its figures."""
    pieces = []
    for piece in llm.stream(prompt, params):
        write_raw(piece.text)
        pieces.append(piece)
    write_raw("\n")
    return {
        "index": 0,
        "text": "".join(piece.text for piece in pieces),
        "token_ids": [piece.token_id for piece in pieces],
        "finish_reason": pieces[-1].finish_reason,
    }


def main() -> None:
    """Exit codes: 0 done, 1 the work failed, 2 the request was wrong, 130 interrupted."""
    from quant_kernels.formats import FormatError

    # Schedulers end runs this way; unwinding the stack removes what is half written.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        app()
    except (RequestError, FormatError) as error:
        fail(str(error), 2)
    except (WorkFailed, OSError) as error:
        fail(str(error), 1)


def fail(message: str, code: int) -> NoReturn:
    err.print(Text.assemble(("error: ", "bold red"), message), soft_wrap=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
