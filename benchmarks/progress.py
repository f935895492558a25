"""Figures on disk while they are still being found: a run that is killed loses seconds of them."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


def write(path: Path | None, figures: dict[str, Any]) -> None:
    """The JSON, whole or not at all; nothing without a path."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.partial")
        partial.write_text(json.dumps(figures, indent=2) + "\n")
        os.replace(partial, path)


@contextlib.contextmanager
def regularly(run: Callable[[], object], seconds: float) -> Iterator[None]:
    """Call `run` every so many seconds, in a thread, as long as the block lasts.

    What it raises is printed and stops nothing.
    """
    ended = threading.Event()

    def turns() -> None:
        while not ended.wait(seconds):
            try:
                run()
            except Exception:
                traceback.print_exc()

    thread = threading.Thread(target=turns, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
