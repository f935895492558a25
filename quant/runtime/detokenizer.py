"""Tokens to text, while they come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

INCOMPLETE = "\ufffd"  # what a tokenizer decodes part of a character to


class TextStream:
    """Tokens in, text out, as soon as no later token can change it.

    Held back: bytes of a character that is not complete, and an end of the text that may turn out
    to be the beginning of a stop string. Of several stop strings the one that is complete first
    counts, so that the text does not depend on how it was cut into tokens.
    """

    def __init__(self, tokenizer: Any, stop: tuple[str, ...], context: Sequence[int] = ()) -> None:
        """context: the prompt's last tokens, on which the first one's leading space depends."""
        self.text = ""  # whole characters; ends before the stop string
        self.stopped = False
        self._tokenizer = tokenizer
        self._stop = stop
        self._ended = False
        self._taken = 0  # characters
        # Decoded are the tokens before _read. Those from _start on are decoded again as context:
        # a token's text depends on whether one comes before it.
        self._ids = list(context)
        self._start, self._read = 0, len(self._ids)

    @property
    def taken(self) -> str:
        """All that `take` has given."""
        return self.text[: self._taken]

    def push(self, token: int) -> None:
        self._ids.append(token)
        new = self._undecoded()
        if new and not new.endswith(INCOMPLETE):
            self._append(new)

    def flush(self) -> None:
        """No token will follow: what was held back is text."""
        self._append(self._undecoded())
        self._ended = True

    def take(self) -> str:
        """The text that is settled and was not taken before."""
        held = 0 if self._ended or self.stopped else self._possible_stop()
        end = len(self.text) - held
        delta = self.text[self._taken : end]
        self._taken = end
        return delta

    def _undecoded(self) -> str:
        context = self._decode(self._ids[self._start : self._read])
        return self._decode(self._ids[self._start :])[len(context) :]

    def _decode(self, ids: list[int]) -> str:
        return str(
            self._tokenizer.decode(
                ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )

    def _append(self, new: str) -> None:
        self._start, self._read = self._read, len(self._ids)
        if self.stopped:
            return
        before = len(self.text)
        self.text += new
        found = []
        for stop in self._stop:
            at = self.text.find(stop, max(0, before - len(stop) + 1))
            if at >= 0:
                found.append((at + len(stop), at))
        if found:
            self.stopped = True
            self.text = self.text[: min(found)[1]]

    def _possible_stop(self) -> int:
        """How many characters at the end of the text begin a stop string, at most."""
        starts = (stop[:length] for stop in self._stop for length in range(1, len(stop)))
        return max((len(start) for start in starts if self.text.endswith(start)), default=0)
