"""Task accuracy is what scoring every choice alone, token by token, gives; the rest is refused."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from quant.checkpoint.loading import load_decoder
from quant.checkpoint.reader import load_tokenizer
from quant.errors import RequestError
from quant.evaluation.harness import BATCH_TOKENS, DecoderLM
from quant.evaluation.perplexity import hidden_states
from quant.evaluation.tasks import check_tasks, evaluate_tasks
from quant.runtime.model import load_model

ITEMS = 40
# Scores of FP32 sums in another order; the margins between the items' choices are far larger.
TOLERANCE = 1e-4
Scorer = Callable[[list[int], list[int]], list[float]]  # context, continuation -> log p per token


def text(generator: torch.Generator, low: int, high: int) -> str:
    length = int(torch.randint(low, high + 1, (1,), generator=generator))
    return "".join(map(chr, torch.randint(97, 123, (length,), generator=generator).tolist()))


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def items() -> list[dict[str, Any]]:
    """Three choices each; of one length in the first half, so that no length decides."""
    generator = torch.Generator().manual_seed(5)
    rows = []
    for i in range(ITEMS):
        low, high = (4, 4) if i < ITEMS // 2 else (2, 9)
        choices = [text(generator, low, high) for _ in range(3)]
        gold = int(torch.randint(3, (1,), generator=generator))
        rows.append({"query": text(generator, 3, 60), "choices": choices, "gold": gold})
    # Equals: the first of them is the answer, whichever is gold.
    rows += [{"query": "the same", "choices": ["ab", "ab"], "gold": gold} for gold in (0, 1, 1)]
    return rows


@pytest.fixture(scope="module")
def partial_items() -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(6)
    rows = []
    for _ in range(ITEMS):
        ctxs = [text(generator, 3, 30) for _ in range(2)]
        gold = int(torch.randint(2, (1,), generator=generator))
        rows.append({"query": "", "ctxs": ctxs, "cont": " " + text(generator, 3, 9), "gold": gold})
    return rows


def transformers_scorer(directory: Path) -> Scorer:
    """An independent model: one pair at a time, no batch, no padding."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)

    @torch.inference_mode()
    def score(context: list[int], continuation: list[int]) -> list[float]:
        logits = model(torch.tensor([context + continuation])).logits[0].float()
        log_p = logits.log_softmax(-1)
        return [float(log_p[len(context) - 1 + i, t]) for i, t in enumerate(continuation)]

    return score


def decoder_scorer(directory: Path) -> Scorer:
    """Our model of a quantized checkpoint, one pair at a time."""
    decoder = load_decoder(directory, dtype=torch.float32)

    @torch.inference_mode()
    def score(context: list[int], continuation: list[int]) -> list[float]:
        ids = torch.tensor([context + continuation])
        hidden = decoder.hidden_states(ids, torch.arange(ids.shape[1])[None])[0]
        log_p = decoder.logits(hidden).float().log_softmax(-1)
        return [float(log_p[len(context) - 1 + i, t]) for i, t in enumerate(continuation)]

    return score


def share(found: list[int], rows: list[dict[str, Any]]) -> float:
    return sum(i == row["gold"] for i, row in zip(found, rows, strict=True)) / len(rows)


def best(scores: list[float]) -> int:
    return max(range(len(scores)), key=lambda i: (scores[i], -i))


def byte_ids(string: str, tokenizer: Any) -> list[int]:
    return list(tokenizer(string, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_accuracy_is_the_hand_computed_one(
    kind: str, tiny_checkpoint: Any, byte_tokenizer: Any, items: Any, tmp_path: Path
) -> None:
    directory = tiny_checkpoint(kind)
    score = transformers_scorer(directory)

    def answers(
        join: str, combine: Callable[[list[float], str], float], back: int = 0
    ) -> list[int]:
        found = []
        for row in items:
            context = byte_ids(row["query"], byte_tokenizer)
            choices = [byte_ids(join + c, byte_tokenizer) for c in row["choices"]]
            if back:  # the mistake of an index: continuation and context cut one token apart
                choices = [context[-back:] + choice[:-back] for choice in choices]
                context = context[:-back]
            scores = [score(context, choice) for choice in choices]
            pairs = zip(scores, row["choices"], strict=True)
            found.append(best([combine(tokens, c) for tokens, c in pairs]))
        return found

    right = answers(" ", lambda tokens, _: sum(tokens))
    normalized = answers(" ", lambda tokens, choice: sum(tokens) / len(choice))
    # Most have the right answer as gold, so that whoever answers otherwise scores less.
    golds = [answer if i % 8 else (answer + 1) % 3 for i, answer in enumerate(right[:ITEMS])]
    rows = [{**row, "gold": gold} for row, gold in zip(items, golds, strict=False)] + items[ITEMS:]
    path = write(tmp_path / "mine.jsonl", rows)
    expected = share(right, rows)
    result = evaluate_tasks(str(directory), [str(path)], dtype="float32", device="cpu").tasks[0]
    assert (result.name, result.items) == ("mine", len(items))
    assert result.accuracy == pytest.approx(expected, abs=1e-12)
    assert result.accuracy_norm == pytest.approx(share(normalized, rows), abs=1e-12)
    deviation = math.sqrt(expected * (1 - expected) / (len(rows) - 1))
    assert result.standard_error == pytest.approx(deviation)
    # Mistakes would show: normalizing, a dropped token at either end (the very first is the space,
    # the same for all choices), no space, cut one token apart.
    mistakes = [
        normalized,
        answers(" ", lambda tokens, _: sum(tokens[:-1])),
        answers(" ", lambda tokens, _: sum(tokens[2:])),
        answers("", lambda tokens, _: sum(tokens)),
        answers(" ", lambda tokens, _: sum(tokens), back=1),
    ]
    assert 0.75 < expected < 0.9
    for mistake in mistakes:
        assert share(mistake, rows) < expected - 0.02


def test_partial_scoring_scores_the_same_words_after_every_context(
    tiny_checkpoint: Any, byte_tokenizer: Any, partial_items: Any, tmp_path: Path
) -> None:
    directory = tiny_checkpoint("qwen3")
    score = transformers_scorer(directory)
    right, whole, without_first, without_last = [], [], [], []
    for row in partial_items:
        continuation = byte_ids(row["cont"], byte_tokenizer)
        contexts = [byte_ids(context, byte_tokenizer) for context in row["ctxs"]]
        scores = [score(context, continuation) for context in contexts]
        right.append(best([sum(tokens) for tokens in scores]))
        without_first.append(best([sum(tokens[1:]) for tokens in scores]))
        without_last.append(best([sum(tokens[:-1]) for tokens in scores]))
        whole.append(best([sum(score(c[:1], c[1:] + continuation)) for c in contexts]))
    golds = [answer if i % 8 else 1 - answer for i, answer in enumerate(right)]
    rows = [{**row, "gold": gold} for row, gold in zip(partial_items, golds, strict=True)]
    path = write(tmp_path / "choose.jsonl", rows)
    result = evaluate_tasks(str(directory), [str(path)], dtype="float32", device="cpu").tasks[0]
    assert result.accuracy == pytest.approx(share(right, rows), abs=1e-12)
    assert result.accuracy_norm is None
    for mistake in (whole, without_first, without_last):
        assert share(mistake, rows) < share(right, rows) - 0.02


def test_a_quantized_checkpoint_is_scored_as_it_runs(
    quantized_case: Any, byte_tokenizer: Any, items: Any, tmp_path: Path
) -> None:
    directory = quantized_case("int8-64").output
    score = decoder_scorer(directory)
    found = []
    for row in items:
        context = byte_ids(row["query"], byte_tokenizer)
        pairs = [byte_ids(" " + choice, byte_tokenizer) for choice in row["choices"]]
        found.append(best([sum(score(context, choice)) for choice in pairs]))
    path = write(tmp_path / "mine.jsonl", items)
    result = evaluate_tasks(str(directory), [str(path)], dtype="float32", device="cpu").tasks[0]
    assert result.accuracy == pytest.approx(share(found, items), abs=1e-12)


class Request:
    """What lm-eval hands over, as far as a model sees it."""

    def __init__(self, *args: str) -> None:
        self.args = args


@pytest.fixture
def lm(tiny_checkpoint: Any) -> DecoderLM:
    directory = tiny_checkpoint("llama")
    return DecoderLM(load_model(directory, dtype=torch.float32), load_tokenizer(directory))


def test_batches_and_padding_change_no_score(lm: DecoderLM, tiny_checkpoint: Any) -> None:
    generator = torch.Generator().manual_seed(8)
    pairs = [(text(generator, 1, 200), text(generator, 1, 40)) for _ in range(40)]
    assert sum(len(c) + len(t) for c, t in pairs) > 2 * BATCH_TOKENS  # several batches
    done: list[tuple[int, int]] = []
    lm.on_batch = lambda *where: done.append(where)
    scores = lm.loglikelihood([Request(*pair) for pair in pairs])
    score = transformers_scorer(tiny_checkpoint("llama"))
    for (context, continuation), (found, _) in zip(pairs, scores, strict=True):
        wanted = score(*(byte_ids(part, lm.tokenizer) for part in (context, continuation)))
        assert found == pytest.approx(sum(wanted), abs=TOLERANCE * len(wanted))
    assert done[0] == (0, 40)
    assert done[-1] == (40, 40)
    assert [where[0] for where in done] == sorted({where[0] for where in done})


def test_greedy_continuations_are_told(lm: DecoderLM) -> None:
    context = byte_ids("some words", lm.tokenizer)
    greedy: list[int] = []
    with torch.inference_mode():
        for _ in range(4):
            (hidden,) = hidden_states(lm.model, [context + greedy])
            greedy.append(int(lm.model.logits(hidden[-1:]).argmax()))
    other = [*greedy[:-1], (greedy[-1] + 1) % 256]
    texts = ("", "")
    scores = lm._loglikelihood_tokens([(texts, context, greedy), (texts, context, other)])
    assert [flag for _, flag in scores] == [True, False]


def test_a_long_context_keeps_its_end(lm: DecoderLM, tiny_checkpoint: Any) -> None:
    generator = torch.Generator().manual_seed(9)
    context, continuation = text(generator, 300, 300), text(generator, 5, 5)
    score = transformers_scorer(tiny_checkpoint("llama"))
    limit = lm.model.config.max_position_embeddings
    # The last token is predicted and not an input: limit positions hold limit + 1 tokens.
    kept = byte_ids(context, lm.tokenizer)[-(limit + 1 - 5) :]
    wanted = score(kept, byte_ids(continuation, lm.tokenizer))
    ((found, _),) = lm.loglikelihood([Request(context, continuation)])
    assert found == pytest.approx(sum(wanted), abs=TOLERANCE * 5)
    shorter = score(kept[1:], byte_ids(continuation, lm.tokenizer))
    assert abs(sum(shorter) - sum(wanted)) > 10 * TOLERANCE
    with pytest.raises(RequestError, match="257 tokens; the model takes 256"):
        lm.loglikelihood([Request("a", "b" * 257)])


def test_a_text_without_context_follows_bos(lm: DecoderLM, tiny_checkpoint: Any) -> None:
    score = transformers_scorer(tiny_checkpoint("llama"))
    wanted = score([lm.tokenizer.bos_token_id], byte_ids("words", lm.tokenizer))
    ((found, _),) = lm.loglikelihood([Request("", "words")])
    assert found == pytest.approx(sum(wanted), abs=TOLERANCE * 5)


def test_what_is_no_choice_is_refused(lm: DecoderLM) -> None:
    with pytest.raises(RequestError, match="use --dataset"):
        lm.loglikelihood_rolling([])
    with pytest.raises(RequestError, match="generate text are not supported"):
        lm.generate_until([])


def test_limit_directory_and_mean(
    tiny_checkpoint: Any, items: Any, partial_items: Any, tmp_path: Path
) -> None:
    write(tmp_path / "b.jsonl", items)
    write(tmp_path / "a.jsonl", partial_items)
    (tmp_path / "notes.txt").write_text("not a task")
    request = (str(tiny_checkpoint("llama")), [str(tmp_path)])
    stages: dict[str, tuple[int, int]] = {}
    found = evaluate_tasks(
        *request,
        limit=7,
        device="cpu",
        on_progress=lambda p: stages.update({p.stage: (p.done, p.total)}),
    )
    assert [(row.name, row.items) for row in found.tasks] == [("a", 7), ("b", 7)]
    assert found.mean_accuracy == pytest.approx(sum(row.accuracy for row in found.tasks) / 2)
    assert list(stages) == ["a", "b"]
    assert all(done == total > 0 for done, total in stages.values())
    write(tmp_path / "b.jsonl", items[:7])
    write(tmp_path / "a.jsonl", partial_items[:7])
    first = evaluate_tasks(*request, device="cpu")
    assert [dataclasses.replace(row, seconds=0.0) for row in first.tasks] == [
        dataclasses.replace(row, seconds=0.0) for row in found.tasks
    ]


def test_one_item_has_no_standard_error(tiny_checkpoint: Any, items: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "one.jsonl", items[:1])
    (row,) = evaluate_tasks(str(tiny_checkpoint("llama")), [str(path)], device="cpu").tasks
    assert row.standard_error is None


def test_a_query_of_digits_is_a_text(tiny_checkpoint: Any, tmp_path: Path) -> None:
    # lm-eval's templates turn "12" into a number, and a number into an index of contexts.
    rows = [{"query": "12", "choices": ["ab", "cd"], "gold": gold} for gold in (0, 1)]
    path = write(tmp_path / "digits.jsonl", rows)
    (row,) = evaluate_tasks(str(tiny_checkpoint("llama")), [str(path)], device="cpu").tasks
    assert (row.accuracy, row.items) == (0.5, 2)  # whatever the answer is, it is one of the two


GOOD = {"query": "q", "choices": ["a", "b"], "gold": 0}
PARTIAL = {"ctxs": ["a", "b"], "cont": " c", "gold": 0}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**GOOD, "gold": 2}, "the right one of 2 choices, 0..1; got 2"),
        ({**GOOD, "gold": -1}, "got -1"),
        ({**GOOD, "gold": True}, "got True"),
        ({**GOOD, "gold": "a"}, "got 'a'"),
        ({**GOOD, "choices": ["a"]}, "at least two"),
        ({**GOOD, "choices": ["a", ""]}, "at least two non-empty"),
        ({**GOOD, "choices": "ab"}, "at least two"),
        ({**GOOD, "query": 3}, "'query' must be a text, got 3"),
        ({"query": "q", "choices": ["a", "b"]}, "'gold' is missing"),
        ({"question": "q"}, "'query' is missing"),
        (PARTIAL, "'query' is missing; an item has `query`, `choices` and `gold`"),
        ([1], "an item is an object, got list"),
    ],
)
def test_malformed_items_are_named(tmp_path: Path, row: Any, message: str) -> None:
    path = write(tmp_path / "bad.jsonl", [GOOD, row])
    with pytest.raises(RequestError) as caught:
        check_tasks([str(path)])
    assert f"{path}, line 2" in str(caught.value)
    assert message in str(caught.value)


def test_malformed_partial_items_are_named(tmp_path: Path) -> None:
    for row, message in (
        ({**PARTIAL, "cont": ""}, "'cont' must be a text, got ''"),
        ({**PARTIAL, "gold": 2}, "2 ctxs"),
        (GOOD, "'cont' is missing; an item has `ctxs`, `cont` and `gold`"),
    ):
        path = write(tmp_path / "bad.jsonl", [PARTIAL, row])
        with pytest.raises(RequestError, match="line 2") as caught:
            check_tasks([str(path)])
        assert message in str(caught.value)


def test_wrong_requests(tmp_path: Path, items: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    good = str(write(tmp_path / "good.jsonl", items))
    (tmp_path / "none").mkdir()
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "text.jsonl").write_text("{")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe")
    (tmp_path / "table.csv").write_text("a,b\n")
    for tasks, limit, message in (
        ([], None, "no task"),
        ([good], 0, "the limit is 0 items"),
        ([good, good], None, "'good' is given twice"),
        ([str(tmp_path / "no.jsonl")], None, "no such file"),
        (["no/such"], None, "no such file"),
        ([str(tmp_path / "none")], None, "has no .jsonl file"),
        ([str(tmp_path / "empty.jsonl")], None, "is empty"),
        ([str(tmp_path / "text.jsonl")], None, "line 1"),
        ([str(tmp_path / "binary.jsonl")], None, "not UTF-8"),
        ([str(tmp_path / "table.csv")], None, "'.csv' are not read"),
    ):
        with pytest.raises(RequestError, match=message):
            check_tasks(tasks, limit)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(RequestError, match=r"pip install 'fourbyeight\[tasks\]'"):
        check_tasks([good])


def test_unknown_names_are_refused_with_the_nearest(
    tiny_checkpoint: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lm_eval.tasks

    class Few(lm_eval.tasks.TaskManager):
        """One folder of the thousands of tasks that the harness reads before it knows a name."""

        def __init__(self, include_defaults: bool) -> None:
            assert include_defaults  # where a task is asked for by name
            folder = Path(lm_eval.tasks.__file__).parent / "arc"
            super().__init__(include_defaults=False, include_path=folder)

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", Few)
    with pytest.raises(RequestError, match="did you mean 'arc_easy'"):
        evaluate_tasks(str(tiny_checkpoint("llama")), ["arc_esy"], device="cpu")


def test_the_harness_is_imported_only_where_tasks_are_run() -> None:
    code = "import sys, quant, quant.cli, quant.evaluation.tasks as t; t.check_tasks(['piqa']); "
    code += "assert not {'lm_eval', 'datasets', 'matplotlib'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
