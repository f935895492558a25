"""Which sequence computes next: a waiting queue, the cache's slots, one step at a time.

A step is either the prefill of one waiting sequence, where a slot is free, or the decode of all
running sequences together. A sequence that ends frees its slot before the next step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from quant.errors import RequestError
from quant.runtime.kv_cache import KVCache
from quant.runtime.model import AttentionOf, Decoder
from quant.runtime.sampling import Logprob, SamplingParams, penalized, sample, token_logprobs


@dataclass(eq=False)
class Request:
    """One sequence: its prompt, how to go on from it, and what came of it so far."""

    prompt: str | None  # its text, where text was given
    prompt_token_ids: list[int]
    params: SamplingParams
    generator: torch.Generator
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)  # a token each, where asked
    finish_reason: str | None = None  # "stop" or "length" once finished
    slot: int | None = None  # while running


class Scheduler:
    """Runs requests to their ends over the slots of a cache, which other schedulers may share."""

    def __init__(
        self,
        model: Decoder,
        cache: KVCache,
        eos_token_ids: frozenset[int],
        requests: Iterable[Request],
    ) -> None:
        self.model = model
        self.cache = cache
        self.eos_token_ids = eos_token_ids
        self.waiting = deque(requests)
        self.running: list[Request] = []

    @property
    def unfinished(self) -> bool:
        return bool(self.waiting or self.running)

    @torch.inference_mode()
    def step(self) -> list[Request]:
        """Give one more token to one or several unfinished requests, and return those.

        Raises RequestError where no slot is free and none of this scheduler's own will become so.
        """
        slot = self.cache.allocate() if self.waiting else None
        if slot is not None:
            return self._prefill(slot)
        if not self.running:
            raise RequestError(
                f"all {len(self.cache.lengths)} slots of the KV cache are held by streams that "
                "have not ended; read or close one, or raise max_num_seqs"
            )
        return self._decode()

    def finish(self, request: Request, reason: str) -> None:
        """End a request, also one that has just ended for another reason."""
        request.finish_reason = reason
        if request.slot is not None:
            self.cache.free(request.slot)
            request.slot = None
            self.running.remove(request)

    def close(self) -> None:
        """Give up what is unfinished, so that its slots are free."""
        self.waiting.clear()
        for request in list(self.running):
            self.finish(request, "abort")

    def _prefill(self, slot: int) -> list[Request]:
        request = self.waiting.popleft()
        request.slot = slot
        self.running.append(request)
        step = self.cache.prefill(slot, len(request.prompt_token_ids))
        return self._forward([request], [request.prompt_token_ids], *step)

    def _decode(self) -> list[Request]:
        # In the order of their slots, which then lie side by side as often as they can.
        requests = sorted(self.running, key=_slot)
        step = self.cache.decode([_slot(request) for request in requests])
        return self._forward(requests, [request.token_ids[-1:] for request in requests], *step)

    def _forward(
        self,
        requests: list[Request],
        token_ids: Sequence[Sequence[int]],
        positions: Tensor,
        attention_of: AttentionOf,
    ) -> list[Request]:
        """token_ids [B, S] of B requests -> one more token each."""
        tokens = torch.tensor(token_ids, device=self.model.device)
        hidden = self.model.hidden_states(tokens, positions, attention_of)
        logits = self.model.logits(hidden[:, -1])
        params = [request.params for request in requests]
        seen = [request.prompt_token_ids + request.token_ids for request in requests]
        changed = penalized(logits, params, seen)
        chosen = sample(changed, params, [request.generator for request in requests]).tolist()
        for row, (request, token) in enumerate(zip(requests, chosen, strict=True)):
            request.token_ids.append(token)
            if request.params.logprobs is not None:
                found = token_logprobs(logits[row], token, request.params.logprobs)
                request.logprobs.append(found)
            if reason := self._ending(request, token):
                self.finish(request, reason)
        return requests

    def _ending(self, request: Request, token: int) -> str | None:
        params = request.params
        stops = token in (params.stop_token_ids or ())
        if stops or (token in self.eos_token_ids and not params.ignore_eos):
            return "stop"
        length = len(request.prompt_token_ids) + len(request.token_ids)
        if len(request.token_ids) >= params.max_tokens or length >= self.cache.max_len:
            return "length"
        return None


def _slot(request: Request) -> int:
    assert request.slot is not None  # it runs
    return request.slot
