"""Tokens settle to text as soon as they can, wherever characters and stop strings are cut."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quant.runtime.detokenizer import TextStream


def settle(tokenizer: Any, ids: Sequence[int], stop: tuple[str, ...] = ()) -> tuple[str, list[str]]:
    """All the text of a token sequence, and what came of each token."""
    stream = TextStream(tokenizer, stop)
    deltas = []
    for token in ids:
        stream.push(token)
        deltas.append(stream.take())
        if stream.stopped:
            break
    stream.flush()
    deltas.append(stream.take())
    return stream.text, deltas


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_tokens_settle_to_their_text(merging_tokenizer: Any, data: st.DataObject) -> None:
    # Mostly bytes that are no UTF-8 at all.
    token = st.integers(0, len(merging_tokenizer) - 1)
    ids = data.draw(st.lists(token, max_size=20))
    text, deltas = settle(merging_tokenizer, ids)
    assert text == "".join(deltas) == merging_tokenizer.decode(ids, skip_special_tokens=True)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_stop_strings_do_not_depend_on_the_tokens(
    byte_tokenizer: Any, merging_tokenizer: Any, metaspace_tokenizer: Any, data: st.DataObject
) -> None:
    piece = st.sampled_from([*"aENDñ猫🙂 ", "END", "cats", "naïve"])
    text = "".join(data.draw(st.lists(piece, max_size=12)))
    stop = tuple(data.draw(st.lists(st.text("aENDñ猫", min_size=1, max_size=4), max_size=3)))
    ends = [(text.find(s) + len(s), text.find(s)) for s in stop if s in text]
    expected = text[: min(ends)[1]] if ends else text
    for tokenizer in (byte_tokenizer, merging_tokenizer, metaspace_tokenizer):
        found, deltas = settle(tokenizer, tokenizer(text)["input_ids"], stop)
        assert found == "".join(deltas) == expected
        settled = ""
        for delta in deltas:
            settled += delta
            assert expected.startswith(settled)


@pytest.mark.parametrize("name", ["byte", "merging", "metaspace"])
def test_context_decides_about_spaces(request: pytest.FixtureRequest, name: str) -> None:
    tokenizer = request.getfixturevalue(f"{name}_tokenizer")
    text = "of cats  of cats 猫 of"
    assert settle(tokenizer, tokenizer(text)["input_ids"])[0] == text


@pytest.mark.parametrize("name", ["byte", "merging", "metaspace"])
def test_the_stop_string_that_is_complete_first_counts(
    request: pytest.FixtureRequest, name: str
) -> None:
    # For one of the tokenizers "at" is a token, which completes both.
    tokenizer = request.getfixturevalue(f"{name}_tokenizer")
    assert settle(tokenizer, tokenizer("cat")["input_ids"], ("cat", "a"))[0] == "c"


def test_text_is_held_back_only_while_it_may_stop(byte_tokenizer: Any) -> None:
    ids = byte_tokenizer("xEENDEN")["input_ids"]
    _, deltas = settle(byte_tokenizer, ids, ("ENDE!", "EX"))
    #         after x    E   E    N   D   E   N      and the end
    assert deltas == ["x", "", "E", "", "", "", "END", "EN"]
