"""From prompts to text, in vLLM's shape: `LLM(model).generate(prompts, SamplingParams(...))`."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from quant.checkpoint.reader import end_of_sequence_ids, load_tokenizer
from quant.checkpoint.source import resolve_model
from quant.device import select_device, select_dtype
from quant.errors import RequestError
from quant.memory import available_bytes
from quant.outputs import CompletionOutput, RequestOutput, StreamOutput
from quant.runtime.batch import pages_needed
from quant.runtime.detokenizer import TextStream
from quant.runtime.model import load_model
from quant.runtime.recordings import recorded_steps
from quant.runtime.sampling import SamplingParams
from quant.runtime.scheduler import Request, Scheduler
from quant_kernels.packing import KV_PAGE

DEFAULT_MODEL_LEN = 4096  # a cache for every position of a 128k model would not fit most machines
# Of the memory that is free when the model is loaded, what the cache takes at most; a step's
# activations need the rest.
CACHE_SHARE = {"cuda": 0.85, "cpu": 0.5}

PROMPT_CONTEXT = 4  # tokens: whole characters, wherever a prompt of text is cut

Message = dict[str, Any]  # {"role": "user", "content": "..."}
Params = SamplingParams | Sequence[SamplingParams] | None


class LLM:
    """A loaded model with its tokenizer and KV cache. Not for several threads at once.

    model: an HF directory, dense or quantized, a .gguf file, or a hub id. max_model_len: tokens of
    prompt and output together; None is what the model takes, at most 4096. max_num_seqs: sequences
    that run at the same time; others wait. max_num_batched_tokens: of a step; longer prompts come
    in chunks. kv_cache_memory_bytes: of the KV cache; None is what max_num_seqs sequences of
    max_model_len take, as far as there is room. dtype: of what is not packed, and of the KV cache
    where the checkpoint has no format for it ("auto": as stored). device: "auto" takes a GPU where
    there is one. enforce_eager: no CUDA graphs, and no recordings on a CPU.

    Raises RequestError where the model does not run here.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        max_model_len: int | None = None,
        max_num_seqs: int = 32,
        max_num_batched_tokens: int = 2048,
        kv_cache_memory_bytes: int | None = None,
        dtype: str = "auto",
        device: str = "auto",
        enforce_eager: bool = False,
        trust_remote_code: bool = False,
        revision: str | None = None,
    ) -> None:
        if max_num_seqs < 1:
            raise RequestError(f"max_num_seqs is {max_num_seqs}; it must be at least 1")
        if max_num_batched_tokens < max_num_seqs:
            raise RequestError(
                f"max_num_batched_tokens is {max_num_batched_tokens}; it must be at least "
                f"max_num_seqs, {max_num_seqs}, so that every sequence gets a token in each step"
            )
        target, kind = select_device(device), select_dtype(dtype)
        directory = resolve_model(
            str(model), revision=revision, trust_remote_code=trust_remote_code
        )
        self.tokenizer = load_tokenizer(directory, trust_remote_code)
        self.model = load_model(
            directory, device=target, dtype=kind, trust_remote_code=trust_remote_code
        )
        longest = self.model.config.max_position_embeddings
        if max_model_len is None:
            max_model_len = min(longest, DEFAULT_MODEL_LEN)
        if not 2 <= max_model_len <= longest:
            raise RequestError(
                f"max_model_len is {max_model_len}; this model allows 2 to {longest}"
            )
        self.max_model_len = max_model_len
        size = self.model.bytes_per_token
        pages = cache_pages(size, max_num_seqs, max_model_len, target, kv_cache_memory_bytes)
        self.cache = self.model.new_cache(pages, max_model_len)
        self.scheduler = Scheduler(
            self.model,
            self.cache,
            end_of_sequence_ids(directory, self.tokenizer),
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            max_num_batched_tokens=max_num_batched_tokens,
            graphs=None if enforce_eager else recorded_steps(self.model, self.cache, max_model_len),
        )
        # Of the streams that are being read: what was computed and not yet taken.
        self._outboxes: dict[Request, deque[StreamOutput]] = {}
        self._texts: dict[Request, TextStream] = {}

    @property
    def cache_tokens(self) -> int:
        """How many tokens the KV cache holds, of all sequences together."""
        return self.cache.pool.count * KV_PAGE

    @property
    def kv_cache(self) -> str:
        """The KV cache, for people: its format, bytes per token, and room."""
        kind = self.model.kv.label if self.model.kv else str(self.model.dtype).split(".")[-1]
        size, tokens = self.model.bytes_per_token / 1e3, self.cache_tokens
        room = f"room for {tokens:,} tokens ({size * tokens / 1e3:,.1f} MB)"
        return f"KV cache: {kind}, {size:.1f} kB a token, {room}"

    def generate(
        self, prompts: str | Sequence[str | list[int]], sampling_params: Params = None
    ) -> list[RequestOutput]:
        """A completion of each prompt, in the prompts' order.

        prompts: texts, or token ids that are taken as they are. sampling_params: one for all or one
        each; None is SamplingParams(). Raises RequestError, before any work, where a prompt is
        empty or too long.
        """
        prompts = [prompts] if isinstance(prompts, str) else prompts
        encoded = [self._encode(prompt) for prompt in prompts]
        texts = [prompt if isinstance(prompt, str) else None for prompt in prompts]
        return self._run(self._requests(encoded, texts, sampling_params))

    def chat(
        self, messages: list[Message] | list[list[Message]], sampling_params: Params = None
    ) -> list[RequestOutput]:
        """The next message of one conversation or of several; otherwise as `generate`.

        messages: {"role": ..., "content": ...} each.
        """
        is_one = not messages or isinstance(messages[0], dict)
        conversations: list[Any] = [messages] if is_one else messages
        texts = [self._render(conversation) for conversation in conversations]
        encoded = [self._encode(text, add_special_tokens=False) for text in texts]
        return self._run(self._requests(encoded, texts, sampling_params))

    def chat_prompt(self, messages: str | list[Message]) -> list[int]:
        """A conversation as a prompt for `generate` or `stream`; a str is one message of a user."""
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        return self._encode(self._render(messages), add_special_tokens=False)

    def stream(
        self,
        prompt: str | list[int] | list[Message],
        sampling_params: SamplingParams | None = None,
    ) -> Iterator[StreamOutput]:
        """One completion, token by token; the texts, put together, are what `generate` gives.

        prompt: as for `generate`, or the messages of a conversation as for `chat`. Raises
        RequestError as those do, at the call. From its first token until it ends or is closed, the
        stream runs beside whatever else this LLM computes, also while it is not read.
        """
        is_chat = isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], dict)
        content = self._render(prompt) if is_chat else prompt
        ids = self._encode(content, add_special_tokens=not is_chat)
        text = content if isinstance(content, str) else None
        return self._stream(self._requests([ids], [text], sampling_params)[0])

    def _render(self, messages: Any) -> str:
        if not getattr(self.tokenizer, "chat_template", None):
            raise RequestError(
                "this model's tokenizer has no chat template: give plain prompts, not a chat"
            )
        try:
            text = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # a template may refuse in any way, and so may malformed input
            raise RequestError(f"the chat template refuses these messages: {error}") from error
        return str(text)

    def _encode(self, prompt: Any, *, add_special_tokens: bool = True) -> list[int]:
        """A text's token ids, or token ids as they are.

        Without special tokens for the text of a chat template, which spells them out itself.
        """
        if isinstance(prompt, str):
            return list(self.tokenizer(prompt, add_special_tokens=add_special_tokens)["input_ids"])
        if not isinstance(prompt, list) or not all(type(token) is int for token in prompt):
            raise RequestError(f"a prompt is a string or a list of token ids, not {prompt!r:.80}")
        vocab_size = self.model.config.vocab_size
        if wrong := [token for token in prompt if not 0 <= token < vocab_size]:
            raise RequestError(f"token id {wrong[0]} is outside the vocabulary of {vocab_size}")
        return list(prompt)

    def _requests(
        self, encoded: list[list[int]], texts: Sequence[str | None], sampling_params: Params
    ) -> list[Request]:
        if sampling_params is None or isinstance(sampling_params, SamplingParams):
            sampling_params = [sampling_params or SamplingParams()] * len(encoded)
        if len(sampling_params) != len(encoded):
            raise RequestError(
                f"there are {len(encoded)} prompts and {len(sampling_params)} sampling params; "
                "give one for all, or one for each"
            )
        for index, ids in enumerate(encoded):
            if not ids:
                raise RequestError(f"prompt {index} is empty: it has no token to go on from")
            if len(ids) >= self.max_model_len:
                raise RequestError(
                    f"prompt {index} has {len(ids)} tokens; the limit is {self.max_model_len - 1} "
                    f"(max_model_len {self.max_model_len}, less one token of output)"
                )
        rows = zip(texts, encoded, sampling_params, strict=True)
        return [Request(text, ids, params, params.generator()) for text, ids, params in rows]

    def _start(self, request: Request) -> None:
        context = request.prompt_token_ids[-PROMPT_CONTEXT:]
        self._texts[request] = TextStream(self.tokenizer, request.params.stop_strings, context)
        self.scheduler.add(request)

    def _end(self, request: Request) -> str:
        """Forget a request, and abort it where it is unfinished; its text."""
        if request.finish_reason is None:
            self.scheduler.finish(request, "abort")
        return self._texts.pop(request).text

    def _step(self) -> None:
        """One step for all that runs, whoever waits for it."""
        try:
            ready = self.scheduler.step()
        except BaseException:
            self.scheduler.close()  # the cache may be half written
            raise
        for request in ready:
            text = self._texts[request]
            if request.finish_reason != "stop":  # the token that stopped it is no text
                text.push(request.token_ids[-1])
            if request.finish_reason is not None:
                text.flush()
            if text.stopped:
                self.scheduler.finish(request, "stop")
            if request in self._outboxes:
                delta = text.take()
                piece = StreamOutput(delta, request.token_ids[-1], _output(request, text.taken))
                self._outboxes[request].append(piece)

    def _run(self, requests: list[Request]) -> list[RequestOutput]:
        try:
            for request in requests:
                self._start(request)
            while any(request.finish_reason is None for request in requests):
                self._step()
        finally:
            texts = [self._end(request) for request in requests if request in self._texts]
        return [_output(request, text) for request, text in zip(requests, texts, strict=True)]

    def _stream(self, request: Request) -> Iterator[StreamOutput]:
        outbox = self._outboxes[request] = deque()
        try:
            self._start(request)
            while outbox or request.finish_reason is None:
                if outbox:
                    yield outbox.popleft()
                else:
                    self._step()
        finally:
            del self._outboxes[request]
            self._end(request)


def cache_pages(
    bytes_per_token: int,
    max_num_seqs: int,
    max_model_len: int,
    device: torch.device,
    budget: int | None,
) -> int:
    """How many pages the KV cache gets: what its sequences can fill, as far as there is room.

    budget: bytes; None: a share of what the device has free. Raises RequestError where not even
    one sequence of max_model_len tokens fits.
    """
    given = budget is not None
    if budget is None:
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_bytes()
        budget = int(free * CACHE_SHARE[device.type])
    one = pages_needed(max_model_len)
    pages = min(budget // (bytes_per_token * KV_PAGE), max_num_seqs * one)
    if pages < one:
        size = one * KV_PAGE * bytes_per_token
        found = "kv_cache_memory_bytes is" if given else f"{device} has room for"
        raise RequestError(
            f"one sequence of {max_model_len:,} tokens takes {size / 1e6:,.1f} MB of KV cache, and "
            f"{found} {budget / 1e6:,.1f} MB; lower max_model_len"
        )
    return pages


def _output(request: Request, text: str) -> RequestOutput:
    logprobs = None if request.params.logprobs is None else list(request.logprobs)
    completion = CompletionOutput(0, text, list(request.token_ids), request.finish_reason, logprobs)
    return RequestOutput(request.prompt, request.prompt_token_ids, [completion])
