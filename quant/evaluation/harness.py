"""Our decoder as a model of lm-eval, the evaluation harness. Imported only where tasks are run.

A request is a context c and a continuation t, as tokens; its score is

    sum over i of log p(t_i | c, t_0 .. t_{i-1})

Position p of the model predicts token p + 1, so the input is c t without its last token, and the
positions len(c) - 1 .. len(c) + len(t) - 2 of it are scored. How texts become c and t is the rule
of lm-eval's `TemplateLM`: both are encoded together, and t is what follows c's tokens.

Requests are sorted by length and padded on the right. Under causal attention a position sees no
position after it, so what stands in the padding changes no score.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import lm_eval.api.task
import torch
from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import evaluate
from torch import Tensor

from quant.errors import RequestError, WorkFailed
from quant.evaluation.perplexity import LOGIT_ROWS, hidden_states
from quant.runtime.model import Model

# Tokens that go through the model together, padding included: its activations stay small, and on a
# CPU more of them are not faster.
BATCH_TOKENS = 2048
FEWSHOT_SEED = 1234  # lm-eval's own default

Pair = tuple[tuple[int, ...], tuple[int, ...]]  # (context, continuation), as the model sees them
Score = tuple[float, bool]  # log-likelihood, and whether greedy decoding would say the same
OnBatch = Callable[[int, int], None]  # requests scored, of how many


class DecoderLM(TemplateLM):
    """Scores continuations with a `Model`. Equal requests are computed once: ties are exact."""

    def __init__(self, model: Model, tokenizer: Any) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.on_batch: OnBatch = lambda done, total: None

    @property
    def eot_token_id(self) -> int:
        ids = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
        found = next((token for token in ids if token is not None), None)
        if found is None:
            raise RequestError(
                "a task asks for a text without a context, and this tokenizer has neither a BOS "
                "nor an EOS token to begin with"
            )
        return int(found)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Token ids; special tokens as the tokenizer adds them, where nothing else is asked for."""
        if add_special_tokens is None:
            bos = self.tokenizer.bos_token
            add_special_tokens = not (bos and string.startswith(bos))
        ids = self.tokenizer(string, add_special_tokens=add_special_tokens, verbose=False)
        return list(ids["input_ids"])

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[Score]:
        return list(super().loglikelihood(requests, disable_tqdm=disable_tqdm))

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[Score]:
        pairs = [self._fit(texts, *ids) for texts, *ids in requests]
        scores: dict[Pair, Score] = {}
        todo = sorted(set(pairs), key=lambda pair: (-_length(pair), pair))
        for batch in _batches(todo):
            self.on_batch(len(scores), len(todo))
            scores.update(zip(batch, self._score(batch), strict=True))
        self.on_batch(len(todo), len(todo))
        return [scores[pair] for pair in pairs]

    def _fit(self, texts: tuple[str, str], context: list[int], continuation: list[int]) -> Pair:
        """The pair with as much of the context's end as the model's positions leave room for."""
        if not context or not continuation:
            part = "continuation" if context else "context"
            raise RequestError(
                f"a task's {part} has no token: {texts[0][-40:]!r}, {texts[1]!r:.80}"
            )
        limit = self.model.config.max_position_embeddings
        if len(continuation) > limit:
            raise RequestError(
                f"a task's choice has {len(continuation):,} tokens; the model takes {limit:,}: "
                f"{texts[1]!r:.80}"
            )
        # The last token is predicted and never an input.
        return tuple(context[-(limit + 1 - len(continuation)) :]), tuple(continuation)

    @torch.inference_mode()
    def _score(self, batch: Sequence[Pair]) -> list[Score]:
        model = self.model
        inputs = [[*context, *continuation[:-1]] for context, continuation in batch]
        rows = zip(hidden_states(model, inputs), batch, strict=True)
        scored = torch.cat(
            [
                hidden[len(context) - 1 : len(context) - 1 + len(continuation)]
                for hidden, (context, continuation) in rows
            ]
        )
        wanted = torch.tensor([token for _, continuation in batch for token in continuation])
        log_p, greedy = _log_probabilities(model, scored, wanted.to(model.device))
        if not bool(log_p.isfinite().all()):
            raise WorkFailed("a log-likelihood is not finite: the model is broken")
        lengths = [len(continuation) for _, continuation in batch]
        parts = zip(log_p.split(lengths), greedy.split(lengths), strict=True)
        return [(float(p.sum()), bool(best.all())) for p, best in parts]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        raise RequestError(
            "tasks that score whole texts are not supported; for perplexity use --dataset"
        )

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        raise RequestError(
            "tasks that generate text are not supported; choose multiple-choice tasks"
        )


def run_task(lm: DecoderLM, name: str, task: Any, limit: int | None) -> tuple[dict[str, Any], int]:
    """lm-eval's metrics of one task, by name ("acc", "acc_stderr", ...), and how many items."""
    if task.get_config("num_fewshot") is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=FEWSHOT_SEED)
    with quiet():
        results = evaluate(
            lm, {"tasks": {name: task}}, limit=limit, bootstrap_iters=1, log_samples=False
        )
    metrics: dict[str, Any] = {}
    for key, value in results["results"][name].items():
        metrics.setdefault(key.partition(",")[0], value)  # "acc,none": the first filter's
    return metrics, int(results["n-samples"][name]["effective"])


def _log_probabilities(model: Model, hidden: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """hidden [T, H], wanted [T] -> log p of wanted [T] FP64, and whether it is the most likely."""
    log_p, greedy = [], []
    for rows, tokens in zip(hidden.split(LOGIT_ROWS), wanted.split(LOGIT_ROWS), strict=True):
        table = model.logits(rows).float().log_softmax(-1)
        log_p.append(table.gather(-1, tokens.unsqueeze(-1)).squeeze(-1).double())
        greedy.append(table.argmax(-1) == tokens)
    return torch.cat(log_p), torch.cat(greedy)


def _length(pair: Pair) -> int:
    return len(pair[0]) + len(pair[1]) - 1


def _batches(pairs: Sequence[Pair]) -> Iterator[list[Pair]]:
    """pairs, longest first, in batches of at most BATCH_TOKENS tokens."""
    start = 0
    while start < len(pairs):
        count = max(1, BATCH_TOKENS // _length(pairs[start]))
        yield list(pairs[start : start + count])
        start += count


@contextmanager
def quiet() -> Iterator[None]:
    """No bar and no notes of lm-eval's in the middle of ours; its warnings pass."""
    bar, logger = lm_eval.api.task.tqdm, logging.getLogger("lm_eval")
    level = logger.level
    lm_eval.api.task.tqdm = lambda items, **_: items
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        lm_eval.api.task.tqdm = bar
        logger.setLevel(level)
