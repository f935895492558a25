"""From prompts to text, in vLLM's shape: `LLM(model).generate(prompts, SamplingParams(...))`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quant.checkpoint.reader import load_tokenizer
from quant.checkpoint.source import read_json, resolve_model
from quant.device import select_device, select_dtype
from quant.errors import RequestError
from quant.runtime.kv_cache import KVCache
from quant.runtime.model import load_decoder
from quant.runtime.sampling import SamplingParams
from quant.runtime.scheduler import Request, Scheduler

DEFAULT_MODEL_LEN = 4096  # a cache for every position of a 128k model would not fit most machines
INCOMPLETE = "\ufffd"  # what a tokenizer decodes part of a character to

Message = dict[str, Any]  # {"role": "user", "content": "..."}
ParamsOrList = SamplingParams | list[SamplingParams] | None


@dataclass(frozen=True)
class CompletionOutput:
    """One completion. token_ids has the token that ended it, text has not, nor a stop string.

    finish_reason: "stop" (an end-of-sequence or stop token, a stop string) or "length".
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str


@dataclass(frozen=True)
class RequestOutput:
    """What came of one prompt; prompt is None where token ids were given."""

    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]


@dataclass(frozen=True)
class StreamOutput:
    """One token, and the text that it settled: "" while more tokens may still change it.

    finish_reason: None until the last.
    """

    text: str
    token_id: int
    finish_reason: str | None


class LLM:
    """A loaded model with its tokenizer and KV cache.

    model: an HF directory, dense or quantized, a .gguf file, or a hub id. max_model_len: tokens of
    prompt and output together; None is what the model takes, at most 4096. max_num_seqs: sequences
    that run at the same time; others wait. dtype: of what is not packed, and of the KV cache
    ("auto": as stored). device: "auto" takes a GPU where there is one.

    Raises RequestError where the model does not run here.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        max_model_len: int | None = None,
        max_num_seqs: int = 8,
        dtype: str = "auto",
        device: str = "auto",
        trust_remote_code: bool = False,
        revision: str | None = None,
    ) -> None:
        if dtype not in DTYPES:
            raise RequestError(f"dtype {dtype!r} is unknown; known: {', '.join(DTYPES)}")
        if max_num_seqs < 1:
            raise RequestError(f"max_num_seqs is {max_num_seqs}; it must be at least 1")
        target = select_device(device)
        directory = resolve_model(
            str(model), revision=revision, trust_remote_code=trust_remote_code
        )
        self.tokenizer = load_tokenizer(directory, trust_remote_code)
        self.model = load_decoder(
            directory, device=target, dtype=DTYPES[dtype], trust_remote_code=trust_remote_code
        )
        config = self.model.config
        longest = config.max_position_embeddings
        self.max_model_len = min(longest, DEFAULT_MODEL_LEN)
        if max_model_len is not None:
            if not 2 <= max_model_len <= longest:
                raise RequestError(
                    f"max_model_len is {max_model_len}; this model allows 2 to {longest}"
                )
            self.max_model_len = max_model_len
        self.eos_token_ids = end_of_sequence_ids(directory, self.tokenizer)
        self.cache = KVCache(
            config, max_num_seqs, self.max_model_len, dtype=self.model.dtype, device=target
        )

    def generate(
        self,
        prompts: str | list[str] | list[list[int]],
        sampling_params: ParamsOrList = None,
    ) -> list[RequestOutput]:
        """A completion of each prompt, in the prompts' order.

        prompts: texts, or token ids that are taken as they are. sampling_params: one for all or one
        each; None is SamplingParams(). Raises RequestError, before any work, where a prompt is
        empty or too long.
        """
        batch: list[str] | list[list[int]] = [prompts] if isinstance(prompts, str) else prompts
        texts = [prompt if isinstance(prompt, str) else None for prompt in batch]
        requests = self._requests([self._encode(prompt) for prompt in batch], sampling_params)
        return self._run(requests, texts)

    def chat(
        self,
        messages: list[Message] | list[list[Message]],
        sampling_params: ParamsOrList = None,
    ) -> list[RequestOutput]:
        """The next message of one conversation or of several; arguments and errors as `generate`.

        messages: {"role": ..., "content": ...} each, put together by the tokenizer's chat template.
        """
        is_one = not messages or isinstance(messages[0], dict)
        conversations: list[Any] = [messages] if is_one else messages
        texts = [self.render_chat(conversation) for conversation in conversations]
        ids = [self._encode(text, add_special_tokens=False) for text in texts]
        return self._run(self._requests(ids, sampling_params), texts)

    def stream(
        self,
        prompt: str | list[int] | list[Message],
        sampling_params: SamplingParams | None = None,
    ) -> Iterator[StreamOutput]:
        """One completion, token by token; the texts put together are `generate`'s, or `chat`'s.

        prompt: a text, token ids, or the messages of a chat. Errors as `generate`, at the call. The
        stream holds a slot of the cache from its first token until it ends or is closed.
        """
        if isinstance(prompt, list) and prompt and isinstance(prompt[0], dict):
            rendered = self.render_chat(prompt)
            ids = self._encode(rendered, add_special_tokens=False)
        else:
            ids = self._encode(prompt)
        return self._stream(self._requests([ids], sampling_params)[0])

    def render_chat(self, messages: list[Any]) -> str:
        """The text that the model sees of a conversation whose next message it writes.

        Special tokens are spelled out in it: encode it with add_special_tokens=False.
        """
        if not getattr(self.tokenizer, "chat_template", None):
            raise RequestError("the model's tokenizer has no chat template; use generate")
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=True
                )
            )
        except Exception as error:  # a template may refuse in any way, and so may malformed input
            raise RequestError(f"the chat template refuses these messages: {error}") from error

    def _encode(self, prompt: Any, *, add_special_tokens: bool = True) -> list[int]:
        """A text's token ids, or checked token ids as they are."""
        if isinstance(prompt, str):
            return list(self.tokenizer(prompt, add_special_tokens=add_special_tokens)["input_ids"])
        vocab_size = self.model.config.vocab_size
        if not isinstance(prompt, list) or not all(type(token) is int for token in prompt):
            raise RequestError(f"a prompt is a string or a list of token ids, not {prompt!r:.80}")
        if wrong := [token for token in prompt if not 0 <= token < vocab_size]:
            raise RequestError(f"token id {wrong[0]} is outside the vocabulary of {vocab_size}")
        return prompt

    def _requests(self, prompts: list[list[int]], sampling_params: ParamsOrList) -> list[Request]:
        if isinstance(sampling_params, list):
            if len(sampling_params) != len(prompts):
                raise RequestError(
                    f"there are {len(prompts)} prompts and {len(sampling_params)} sampling params; "
                    "give one for all, or one for each"
                )
            params = sampling_params
        else:
            params = [sampling_params or SamplingParams()] * len(prompts)
        for index, ids in enumerate(prompts):
            if not ids:
                raise RequestError(f"prompt {index} is empty: it has no token to go on from")
            if len(ids) >= self.max_model_len:
                raise RequestError(
                    f"prompt {index} has {len(ids)} tokens; the limit is {self.max_model_len - 1} "
                    f"(max_model_len {self.max_model_len}, less one token of output)"
                )
        return [
            Request(ids, one, one.generator()) for ids, one in zip(prompts, params, strict=True)
        ]

    def _run(self, requests: list[Request], prompts: list[Any]) -> list[RequestOutput]:
        """Run requests to their ends; prompts are their texts, or None."""
        texts = {r: TextStream(self.tokenizer, r.params.stop_strings) for r in requests}
        scheduler = Scheduler(self.model, self.cache, self.eos_token_ids, requests)
        try:
            while scheduler.unfinished:
                for request in scheduler.step():
                    self._add_text(scheduler, request, texts[request])
        finally:
            scheduler.close()
        return [
            RequestOutput(
                prompt,
                request.prompt_token_ids,
                [
                    CompletionOutput(
                        0, texts[request].text, request.token_ids, str(request.finish_reason)
                    )
                ],
            )
            for request, prompt in zip(requests, prompts, strict=True)
        ]

    def _stream(self, request: Request) -> Iterator[StreamOutput]:
        text = TextStream(self.tokenizer, request.params.stop_strings)
        scheduler = Scheduler(self.model, self.cache, self.eos_token_ids, [request])
        try:
            while scheduler.unfinished:
                scheduler.step()
                self._add_text(scheduler, request, text)
                yield StreamOutput(text.take(), request.token_ids[-1], request.finish_reason)
        finally:
            scheduler.close()

    def _add_text(self, scheduler: Scheduler, request: Request, text: TextStream) -> None:
        """Decode a request's newest token, and end the request where a stop string is complete."""
        if request.finish_reason != "stop":  # the token that stopped it is no text
            text.push(request.token_ids[-1])
        if request.finish_reason is not None:
            text.flush()
        if text.stopped:
            scheduler.finish(request, "stop")


class TextStream:
    """Tokens in, text out, as soon as no later token can change it.

    Held back: bytes of a character that is not complete, and an end of the text that may turn out
    to be the beginning of a stop string. Of several stop strings the one that is complete first
    counts, so that the text does not depend on how it was cut into tokens.
    """

    def __init__(self, tokenizer: Any, stop: tuple[str, ...]) -> None:
        self.text = ""  # whole characters; ends before the stop string
        self.stopped = False
        self._tokenizer = tokenizer
        self._stop = stop
        self._ended = False
        self._taken = 0  # characters of the text
        # Decoded are the tokens before _read. Those from _start on are decoded again as context:
        # a token's text depends on whether one comes before it.
        self._ids: list[int] = []
        self._start = self._read = 0

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
        """Characters at the end of the text that begin a stop string; the most there are."""
        lengths = (k for stop in self._stop for k in range(1, len(stop)))
        return max((k for k in lengths if self._ends_with_start(k)), default=0)

    def _ends_with_start(self, count: int) -> bool:
        end = self.text[-count:]
        return any(len(stop) > count and stop.startswith(end) for stop in self._stop)


def end_of_sequence_ids(directory: Path, tokenizer: Any) -> frozenset[int]:
    """The tokens that end a text: generation_config.json's, config.json's and the tokenizer's."""
    found: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        if (directory / name).is_file():
            ids = read_json(directory / name).get("eos_token_id")
            found.update(ids if isinstance(ids, list) else [] if ids is None else [ids])
    if tokenizer.eos_token_id is not None:
        found.add(tokenizer.eos_token_id)
    return frozenset(found)
