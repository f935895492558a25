"""Which tokens the next step computes: continuous batching with chunked prefill.

A step takes at most max_num_batched_tokens tokens: first the one new token of every sequence that
decodes, so that none of them ever waits, then prompts in the order of their arrival, the last of
them as far as the room allows (SARATHI: long prompts come in chunks that share steps with decodes).
A waiting request is admitted when a place among max_num_seqs and its pages are free: those of its
prompt and of all it may generate. So what runs always runs to its end, and a sequence that ends
frees its pages before the next step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from quant.errors import RequestError
from quant.runtime.batch import Chunk, in_order, make_batch, pages_needed
from quant.runtime.graphs import DecodeGraphs
from quant.runtime.model import Cache, Model
from quant.runtime.recordings import DecodeRecordings
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
    finish_reason: str | None = None  # "stop", "length" or "abort" once finished
    computed: int = 0  # tokens whose keys and values the cache holds
    pages: list[int] = field(default_factory=list)  # while running

    @property
    def length(self) -> int:
        return len(self.prompt_token_ids) + len(self.token_ids)

    @property
    def remaining(self) -> int:
        """Tokens to compute before the next one can be chosen; 1 while decoding."""
        return self.length - self.computed

    def tokens(self, start: int, stop: int) -> list[int]:
        """Of prompt and output together."""
        split = len(self.prompt_token_ids)
        if start >= split:
            return self.token_ids[start - split : stop - split]
        return self.prompt_token_ids[start:stop] + self.token_ids[: max(0, stop - split)]


class Scheduler:
    """Runs requests to their ends, over a model and a cache that it alone uses."""

    def __init__(
        self,
        model: Model,
        cache: Cache,
        eos_token_ids: frozenset[int],
        *,
        max_num_seqs: int,
        max_model_len: int,
        max_num_batched_tokens: int,
        graphs: DecodeGraphs | DecodeRecordings | None = None,
    ) -> None:
        self.model, self.cache, self.eos_token_ids = model, cache, eos_token_ids
        self.max_num_seqs, self.max_model_len = max_num_seqs, max_model_len
        self.max_num_batched_tokens = max_num_batched_tokens
        self.graphs = graphs
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []

    def add(self, request: Request) -> None:
        """Let a request wait for its turn; RequestError where the cache can never hold it."""
        needed, there = self._pages(request), self.cache.pool.count
        if needed > there:
            raise RequestError(
                f"a prompt of {len(request.prompt_token_ids)} tokens and up to "
                f"{request.params.max_tokens} of output take {needed} pages of the KV cache, which "
                f"has {there}; lower max_tokens, or raise kv_cache_memory_bytes"
            )
        self.waiting.append(request)

    @torch.inference_mode()
    def step(self) -> list[Request]:
        """Compute once; the requests that got one more token, none where only prompts went on."""
        self._admit()
        planned = self._plan()
        if not planned:
            return []
        chunks = [
            Chunk(
                request.tokens(request.computed, request.computed + count),
                request.computed,
                request.pages,
                wants_logits=count == request.remaining,
            )
            for request, count in planned
        ]
        order = in_order(chunks)
        batch = make_batch([chunks[i] for i in order], self.model.device)
        recorded = self.graphs if self.graphs is not None and self.graphs.takes(batch) else None
        logits = (recorded or self.model).next_logits(batch, self.cache)
        for request, count in planned:
            request.computed += count
        ready = [planned[i][0] for i in order if chunks[i].wants_logits]
        if ready:
            self._choose(ready, logits)
        return ready

    def finish(self, request: Request, reason: str) -> None:
        """End a request, also one that waits, or has just ended for another reason."""
        request.finish_reason = reason
        if request in self.running:
            self.running.remove(request)
            self.cache.pool.free(request.pages)
            request.pages = []
        elif request in self.waiting:
            self.waiting.remove(request)

    def close(self) -> None:
        """Abort everything that is unfinished, so that its room is free."""
        for request in [*self.waiting, *self.running]:
            self.finish(request, "abort")

    def _pages(self, request: Request) -> int:
        """Of the longest that the request may become; its last token is never stored."""
        longest = len(request.prompt_token_ids) + request.params.max_tokens
        return pages_needed(min(longest, self.max_model_len) - 1)

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self.max_num_seqs:
            pages = self.cache.pool.allocate(self._pages(self.waiting[0]))
            if pages is None:
                return
            request = self.waiting.popleft()
            request.pages = pages
            self.running.append(request)

    def _plan(self) -> list[tuple[Request, int]]:
        """Requests and how many tokens of each: decodes first, then prompts as they came."""
        room = self.max_num_batched_tokens
        planned = []
        for request in sorted(self.running, key=lambda request: request.remaining > 1):
            count = min(request.remaining, room)
            if count:
                planned.append((request, count))
                room -= count
        return planned

    def _choose(self, requests: Sequence[Request], logits: Tensor) -> None:
        """A token for each of R requests, from logits [R, V]."""
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

    def _ending(self, request: Request, token: int) -> str | None:
        params = request.params
        stops = token in (params.stop_token_ids or ())
        if stops or (token in self.eos_token_ids and not params.ignore_eos):
            return "stop"
        if len(request.token_ids) >= params.max_tokens or request.length >= self.max_model_len:
            return "length"
        return None
