"""Datasets: every form gives the same tokens; what cannot be used is refused with the reason."""

import copy
import json

import numpy as np
import pytest
import torch

from quant.calibration.data import builtin_texts, calibration_windows, load_tokens
from quant.errors import RequestError

TEXTS = ["First text, naïve.", "Second\ntext: 3 < 4.", "x"]
CHATS = [
    [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello, you."}],
    [{"role": "user", "content": "Once more, é."}],
]
VOCABULARY = 258


def tokens_of(text: str, tokenizer) -> list[int]:
    return tokenizer(text)["input_ids"]


def write_jsonl(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def write(tmp_path, monkeypatch):
    """(suffix, rows) -> a dataset file of that form."""

    def parquet(path, rows) -> None:
        parquet_files = pytest.importorskip("pyarrow.parquet")
        datasets = pytest.importorskip("datasets")
        import pyarrow

        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        parquet_files.write_table(pyarrow.Table.from_pylist(rows), path)

    def make(suffix: str, rows: list) -> str:
        path = tmp_path / f"data{suffix}"
        if suffix == ".jsonl":
            return write_jsonl(path, rows)
        if suffix == ".json":
            path.write_text(json.dumps(rows), encoding="utf-8")
        else:
            parquet(path, rows)
        return str(path)

    return make


each_form = pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])


def test_text_file_is_one_text(byte_tokenizer, tmp_path):
    path = tmp_path / "data.txt"
    path.write_text("\n\n".join(TEXTS), encoding="utf-8")
    tokens = load_tokens(str(path), byte_tokenizer, VOCABULARY)
    assert tokens.dtype == torch.int64
    assert tokens.tolist() == tokens_of("\n\n".join(TEXTS), byte_tokenizer)
    assert byte_tokenizer.decode(tokens) == "\n\n".join(TEXTS)


@each_form
def test_rows_of_text_are_joined_by_blank_lines(suffix, write, byte_tokenizer):
    dataset = write(suffix, [{"text": text, "other": i} for i, text in enumerate(TEXTS)])
    tokens = load_tokens(dataset, byte_tokenizer, VOCABULARY)
    assert tokens.tolist() == tokens_of("\n\n".join(TEXTS), byte_tokenizer)


@each_form
def test_rows_of_messages_go_through_the_chat_template(suffix, write, byte_tokenizer):
    dataset = write(suffix, [{"messages": chat} for chat in CHATS])
    tokens = load_tokens(dataset, byte_tokenizer, VOCABULARY)
    chats = [byte_tokenizer.apply_chat_template(chat, tokenize=False) for chat in CHATS]
    assert tokens.tolist() == tokens_of("\n\n".join(chats), byte_tokenizer)
    # Roles' markers are single tokens, not their spelling.
    assert tokens.tolist().count(256) == sum(map(len, CHATS))


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_rows_may_be_plain_strings(suffix, write, byte_tokenizer):
    tokens = load_tokens(write(suffix, TEXTS), byte_tokenizer, VOCABULARY)
    assert tokens.tolist() == tokens_of("\n\n".join(TEXTS), byte_tokenizer)


def test_blank_lines_of_a_jsonl_file_are_skipped(byte_tokenizer, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('\n{"text": "a"}\n\n   \n{"text": "b"}\n\n')
    tokens = load_tokens(str(path), byte_tokenizer, VOCABULARY)
    assert tokens.tolist() == tokens_of("a\n\nb", byte_tokenizer)


@pytest.mark.parametrize("dtype", [np.int32, np.uint16, np.int64])
@pytest.mark.parametrize("shape", [(24,), (4, 6)])
def test_token_ids_come_as_they_are(dtype, shape, byte_tokenizer, tmp_path):
    ids = np.random.default_rng(0).integers(0, VOCABULARY, 24).astype(dtype)
    np.save(tmp_path / "ids.npy", ids.reshape(shape))
    tokens = load_tokens(str(tmp_path / "ids.npy"), byte_tokenizer, VOCABULARY)
    assert tokens.dtype == torch.int64
    assert tokens.tolist() == ids.tolist()


def test_no_token_is_added(byte_tokenizer, tmp_path):
    # Documents end in a blank line and nothing else, whatever the tokenizer would put around them.
    dataset = write_jsonl(tmp_path / "data.jsonl", [{"text": "a"}, {"text": "b"}])

    def with_special_tokens(text, add_special_tokens=True, **_):
        ids = byte_tokenizer(text)["input_ids"]
        return {"input_ids": [256, *ids, 257] if add_special_tokens else ids}

    tokens = load_tokens(dataset, with_special_tokens, VOCABULARY)
    assert tokens.tolist() == tokens_of("a\n\nb", byte_tokenizer)


def test_builtin_is_text_that_needs_no_network(byte_tokenizer):
    whole = load_tokens("builtin", byte_tokenizer, VOCABULARY)
    assert len(whole) > 300_000  # bytes
    for part in ("calibration", "evaluation"):
        tokens = load_tokens(f"builtin:{part}", byte_tokenizer, VOCABULARY)
        assert 50_000 < len(tokens) < len(whole)
        assert builtin_texts(part) == builtin_texts(part)


def test_builtin_parts_share_no_paragraph():
    # Topics quote each other at length: a part is clean only where its paragraphs are.
    def paragraphs(part: str) -> set[str]:
        words = (" ".join(p.split()) for text in builtin_texts(part) for p in text.split("\n\n"))
        return {paragraph for paragraph in words if len(paragraph) > 80}

    shared = paragraphs("calibration") & paragraphs("evaluation")
    assert not shared, f"{len(shared)}, such as {min(shared)!r}"
    assert paragraphs("calibration") | paragraphs("evaluation") <= paragraphs("")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("data.txt", "", "is empty"),
        ("data.txt", " \n\n ", "is empty"),
        ("data.jsonl", "", "is empty"),
        ("data.json", "[]", "is empty"),
        ("data.jsonl", '{"text": ""}\n{"text": " "}\n', "is empty"),
        ("data.jsonl", '{"text": "a"}\n{"text": "b"\n', "line 2"),
        ("data.jsonl", '{"text": "a"}\n{"txt": "b"}\n', "row 2: expected 'text'"),
        ("data.jsonl", '{"text": 7}\n', "row 1: expected 'text'"),
        ("data.jsonl", '{"messages": []}\n', "row 1: expected 'text'"),
        ("data.jsonl", "17\n", "row 1: expected 'text'"),
        ("data.json", '{"text": "a"}', "expected a list of rows, got dict"),
        ("data.json", "[", "data.json"),
        ("data.csv", "text\na\n", "'.csv' are not read; supported: .txt, .jsonl, .json, .parquet"),
        ("data", "a", "supported: .txt"),
    ],
)
def test_files_that_cannot_be_used_are_refused_with_the_reason(
    name, content, message, byte_tokenizer, tmp_path
):
    (tmp_path / name).write_text(content)
    with pytest.raises(RequestError) as caught:
        load_tokens(str(tmp_path / name), byte_tokenizer, VOCABULARY)
    assert name in str(caught.value)
    assert message in str(caught.value)


def test_messages_that_the_template_refuses_are_refused_with_the_row(byte_tokenizer, tmp_path):
    strict = copy.deepcopy(byte_tokenizer)
    strict.chat_template = "{{ raise_exception('roles must alternate') }}"
    dataset = write_jsonl(tmp_path / "data.jsonl", [{"text": "a"}, {"messages": CHATS[0]}])
    with pytest.raises(RequestError, match=r"row 2.*roles must alternate"):
        load_tokens(dataset, strict, VOCABULARY)


def test_messages_without_a_chat_template_are_refused(byte_tokenizer, tmp_path):
    plain = copy.deepcopy(byte_tokenizer)
    plain.chat_template = None
    dataset = write_jsonl(tmp_path / "data.jsonl", [{"messages": CHATS[0]}])
    with pytest.raises(RequestError, match=r"row 1.*chat.template"):
        load_tokens(dataset, plain, VOCABULARY)


@pytest.mark.parametrize("content", [b"\xff\xfe\x00abc", b"caf\xe9"])
@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".json"])
def test_bytes_that_are_no_utf8_are_refused(suffix, content, byte_tokenizer, tmp_path):
    path = tmp_path / f"data{suffix}"
    path.write_bytes(content)
    with pytest.raises(RequestError, match="UTF-8"):
        load_tokens(str(path), byte_tokenizer, VOCABULARY)


def test_a_corrupt_parquet_file_is_refused(byte_tokenizer, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "data.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(RequestError, match="could not be loaded"):
        load_tokens(str(tmp_path / "data.parquet"), byte_tokenizer, VOCABULARY)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (np.array([1, 2, VOCABULARY]), r"1\.\.258.*vocabulary has 258"),
        (np.array([1, -1]), r"-1\.\.1.*vocabulary has 258"),
        (np.array([], dtype=np.int64), "is empty"),
        (np.array([1.0, 2.0]), "float64; token ids must be integers"),
        (np.array([{"a": 1}], dtype=object), "not a readable .npy"),
    ],
)
def test_token_ids_that_do_not_fit_are_refused(ids, message, byte_tokenizer, tmp_path):
    np.save(tmp_path / "ids.npy", ids, allow_pickle=True)
    with pytest.raises(RequestError, match=message):
        load_tokens(str(tmp_path / "ids.npy"), byte_tokenizer, VOCABULARY)


def test_text_beyond_the_models_vocabulary_is_refused(byte_tokenizer, tmp_path):
    dataset = write_jsonl(tmp_path / "data.jsonl", [{"messages": CHATS[0]}])
    with pytest.raises(RequestError, match="vocabulary has 250"):
        load_tokens(dataset, byte_tokenizer, 250)


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ("builtin:train", "builtin has the parts calibration, evaluation"),
        ("nothing.txt", "no such file"),
        ("./folder/nothing", "no such file"),
        ("folder/nothing.npy", "no such file"),
        ("word", "no such file"),
    ],
)
def test_datasets_that_are_not_there_are_refused(dataset, message, byte_tokenizer):
    with pytest.raises(RequestError, match=message):
        load_tokens(dataset, byte_tokenizer, VOCABULARY)


# Windows: on a stream of its own positions, a window's tokens say where it was cut.


@pytest.mark.parametrize("seed", [0, 1, 2, 12345])
@pytest.mark.parametrize(
    ("total", "n", "length"), [(1000, 7, 100), (1000, 10, 100), (37, 1, 5), (10, 10, 1)]
)
def test_windows_are_runs_of_the_stream_that_do_not_overlap(total, n, length, seed):
    windows = calibration_windows(torch.arange(total), n, length, seed)
    assert windows.shape == (n, length)
    starts = windows[:, 0]
    assert torch.equal(windows, starts.unsqueeze(1) + torch.arange(length))
    assert bool((starts[1:] - starts[:-1] >= length).all())
    spacing = starts[1:] - starts[:-1]
    assert bool((spacing == total // n).all())  # evenly, over the whole stream


def test_seeds_shift_all_windows_together():
    tokens = torch.arange(10_000)
    first = [int(calibration_windows(tokens, 10, 100, seed)[0, 0]) for seed in range(20)]
    assert first[0] == 0
    assert len(set(first)) > 15
    for seed in (0, 3):
        again = calibration_windows(tokens, 10, 100, seed)
        assert torch.equal(calibration_windows(tokens, 10, 100, seed), again)


def test_too_few_tokens_are_refused_with_what_would_fit():
    with pytest.raises(RequestError) as caught:
        calibration_windows(torch.arange(1999), 20, 100, 0)
    message = str(caught.value)
    assert "1,999 tokens" in message
    assert "need 2,000" in message
    assert "at most 19 of this length" in message
    assert calibration_windows(torch.arange(1999), 19, 100, 0).shape == (19, 100)
