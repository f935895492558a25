"""What the commands share: consoles, common options, progress bars, and files of figures."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from quant import __version__
from quant.errors import RequestError
from quant.report import OnProgress, Progress

out = Console()
err = Console(stderr=True)

Model = Annotated[str, typer.Argument(metavar="MODEL", help="HF directory, .gguf file, or hub id.")]
Json = Annotated[
    Path | None, typer.Option("--json", metavar="PATH", help="Write the figures to PATH.")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, or cuda:N.")]
Dtype = Annotated[
    str, typer.Option(help="Of what is not quantized: auto, bfloat16, float16, float32.")
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")
]


@contextmanager
def interrupt_flag(announce: Callable[[str], None]) -> Iterator[list[int]]:
    """A list that the first SIGINT or SIGTERM adds its number to; the second stops at once."""
    received: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, _: object) -> None:
        received.append(number)
        for number, handler in before.items():
            signal.signal(number, handler)
        announce("stopping after the current step; once more stops at once")

    for number in before:
        signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def progress_bars(stops_between: bool = False) -> Iterator[OnProgress]:
    """One bar per stage on stderr, in the order in which the stages begin.

    stops_between: the first interrupt stops at the next event, so between two tensors.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description:<20}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[what]}", markup=False),
    )
    with Bars(*columns, console=err) as bars, ExitStack() as stack:
        tasks: dict[str, Any] = {}
        received = stack.enter_context(interrupt_flag(err.print)) if stops_between else []

        def listen(p: Progress) -> None:
            if received:
                raise (
                    KeyboardInterrupt
                    if received[0] == signal.SIGINT
                    else SystemExit(128 + signal.SIGTERM)
                )
            if p.stage not in tasks:
                tasks[p.stage] = bars.add_task(p.stage, total=p.total, what=p.what)
            what = p.what if p.done < p.total else ""
            bars.update(tasks[p.stage], completed=p.done, total=p.total, what=what)

        yield listen


def write_raw(text: str) -> None:
    """Model output, as it is: no markup, no wrapping."""
    sys.stdout.write(text)
    sys.stdout.flush()


def check_json_path(path: Path | None) -> None:
    """Refuse a --json path that cannot be written, before the work and not after it."""
    if path is None:
        return
    folder = path.absolute().parent
    if path.is_dir():
        raise RequestError(f"--json {str(path)!r} is a directory; name a file")
    if not folder.is_dir():
        raise RequestError(f"--json {str(path)!r}: there is no directory {folder}")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise RequestError(f"--json {str(path)!r}: {folder} is not writable")


def write_json(path: Path | None, figures: dict[str, Any]) -> None:
    """The figures of a command under stable keys, whole or not at all."""
    if path is None:
        return
    partial = path.with_name(f".{path.name}.partial")
    figures = {"fourbyeight": __version__, **figures}
    partial.write_text(json.dumps(figures, indent=2, default=str) + "\n", encoding="utf-8")
    partial.replace(path)
