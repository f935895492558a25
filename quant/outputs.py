"""What `LLM` gives: completions, whole or token by token, in vLLM's terms."""

from __future__ import annotations

import math
from dataclasses import dataclass

from quant.runtime.sampling import Logprob


@dataclass(frozen=True)
class CompletionOutput:
    """One completion. token_ids has the token that ended it; text has not, nor a stop string.

    finish_reason: "stop" (an end-of-sequence or stop token, a stop string) or "length"; None while
    it is not finished. logprobs: for each token, token id -> its log-probability and rank; None
    where SamplingParams.logprobs is.
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None
    logprobs: list[dict[int, Logprob]] | None = None

    @property
    def cumulative_logprob(self) -> float | None:
        """The log-probability of all tokens together, given the prompt; None without logprobs."""
        if self.logprobs is None:
            return None
        steps = zip(self.token_ids, self.logprobs, strict=True)
        return math.fsum(found[token].logprob for token, found in steps)


@dataclass(frozen=True)
class RequestOutput:
    """What came of one prompt; prompt is None where token ids were given."""

    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]


@dataclass(frozen=True)
class StreamOutput:
    """One more token. text: what it settled, "" while more tokens may still change its characters.

    request: all so far; its text is that of the stream up to here.
    """

    text: str
    token_id: int
    request: RequestOutput

    @property
    def finish_reason(self) -> str | None:
        return self.request.outputs[0].finish_reason
