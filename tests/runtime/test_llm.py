"""Generation: the tokens are transformers', whatever runs beside them; the text is the tokens'."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from quant.checkpoint.loading import load_decoder
from quant.checkpoint.reader import end_of_sequence_ids
from quant.decoder import Decoder
from quant.errors import RequestError
from quant.evaluation.perplexity import hidden_states
from quant.runtime import llm as llm_module
from quant.runtime.llm import LLM
from quant.runtime.model import Model
from quant.runtime.sampling import SamplingParams

EOS = 257
GREEDY = SamplingParams(temperature=0.0, max_tokens=24)
LoadLLM = Callable[..., LLM]
Script = Callable[[Sequence[Sequence[int]]], None]


def random_prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(13)
    return [torch.randint(0, 256, (n,), generator=generator).tolist() for n in lengths]


def token_ids(outputs: Sequence[Any]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


def assert_idle(llm: LLM) -> None:
    """Nothing waits or runs, and every page is free."""
    assert not llm.scheduler.waiting
    assert not llm.scheduler.running
    assert len(llm.cache.pool.unused) == llm.cache.pool.count
    assert not llm._texts
    assert not llm._outboxes


def load_fp32(directory: Path) -> Decoder:
    return load_decoder(directory, dtype=torch.float32)


def spell(llm: LLM, text: str) -> list[int]:
    """A byte a token."""
    return list(llm.tokenizer(text)["input_ids"])


def scripted_params(index: int = 0, **fields: Any) -> SamplingParams:
    return SamplingParams(seed=index, **{"max_tokens": 100, **fields})


# --- tokens ---


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2-windows", "qwen3"])
def test_greedy_tokens_are_those_of_transformers(
    load_llm: LoadLLM, tiny_checkpoint: Callable[[str], Path], kind: str
) -> None:
    from transformers import AutoModelForCausalLM

    prompts = random_prompts(1, 5, 17, 30)  # shorter and longer than the windows
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint(kind), dtype=torch.float32)
    expected = [
        model.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=24, pad_token_id=EOS
        )[0, len(prompt) :].tolist()
        for prompt in prompts
    ]
    assert token_ids(load_llm(kind).generate(prompts, GREEDY)) == expected


def test_a_quantized_checkpoint_generates_what_it_gives_without_a_cache(
    quantized_case: Callable[[str], Any],
) -> None:
    directory = quantized_case("lut-64").output
    llm, decoder = LLM(directory, dtype="float32", device="cpu"), load_fp32(directory)
    (prompt,) = random_prompts(14)
    found = token_ids(llm.generate([prompt], GREEDY))[0]
    tokens = list(prompt)
    with torch.inference_mode():
        for _ in found:
            positions = torch.arange(len(tokens)).unsqueeze(0)
            hidden = decoder.hidden_states(torch.tensor([tokens]), positions)
            tokens.append(int(decoder.logits(hidden[0, -1]).argmax()))
    assert found == tokens[len(prompt) :]


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_a_batch_gives_the_tokens_of_one_at_a_time(load_llm: LoadLLM, kind: str) -> None:
    prompts = random_prompts(3, 21, 1, 9, 30, 2, 14)
    params = [
        SamplingParams(temperature=0.0, max_tokens=9),
        SamplingParams(seed=1, max_tokens=20),
        SamplingParams(seed=2, max_tokens=3, top_k=20),
        SamplingParams(temperature=0.0, max_tokens=17, ignore_eos=True),
        SamplingParams(seed=3, max_tokens=1),
        SamplingParams(seed=4, max_tokens=25, temperature=1.5, top_p=0.8),
        SamplingParams(seed=5, max_tokens=12, min_p=0.05),
    ]
    one_at_a_time = load_llm(kind, max_num_seqs=1)
    alone = [
        one_at_a_time.generate([prompt], one)[0]
        for prompt, one in zip(prompts, params, strict=True)
    ]
    llm = load_llm(kind, max_num_seqs=3)
    # Twice: the second time, the pages hold what the first has left in them.
    assert llm.generate(prompts, params) == alone
    assert llm.generate(prompts[::-1], params[::-1]) == alone[::-1]
    assert_idle(llm)


def test_seeds_reproduce(load_llm: LoadLLM) -> None:
    llm = load_llm()
    params = SamplingParams(seed=3, max_tokens=20, ignore_eos=True)
    prompts = random_prompts(6) * 2
    first, second = token_ids(llm.generate(prompts, params))
    assert first == second == token_ids(llm.generate(prompts[:1], params))[0]
    other = SamplingParams(seed=4, max_tokens=20, ignore_eos=True)
    assert token_ids(llm.generate(prompts[:1], other))[0] != first
    unseeded = SamplingParams(max_tokens=20, ignore_eos=True)
    first, second = token_ids(llm.generate(prompts, unseeded))
    assert first != second


def test_logprobs_are_those_of_the_whole_text_at_once(load_llm: LoadLLM) -> None:
    llm = load_llm()
    params = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True, logprobs=3)
    prompts = random_prompts(7)
    for output in llm.generate(prompts, params):
        completion, prompt = output.outputs[0], output.prompt_token_ids
        tokens = prompt + completion.token_ids
        (hidden,) = hidden_states(llm.model, [tokens])
        wanted = llm.model.logits(hidden)[len(prompt) - 1 : -1].double().log_softmax(-1)
        assert completion.logprobs is not None
        for row, token, found in zip(
            wanted, completion.token_ids, completion.logprobs, strict=True
        ):
            assert found[token].rank == 1  # greedy
            assert len(found) == 3
            assert all(abs(row[i] - one.logprob) < 1e-3 for i, one in found.items())
        total = wanted.gather(1, torch.tensor(completion.token_ids)[:, None]).sum()
        assert completion.cumulative_logprob == pytest.approx(float(total), abs=1e-2)
    assert llm.generate(prompts[:1], GREEDY)[0].outputs[0].logprobs is None


def test_a_penalty_stops_a_sequence_that_repeats(load_llm: LoadLLM) -> None:
    llm = load_llm()
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    plain = llm.generate(random_prompts(8)[:1], params)[0].outputs[0].token_ids
    assert len(set(plain)) < len(plain)
    penalty = dataclasses.replace(params, repetition_penalty=1e6)
    found = llm.generate(random_prompts(8)[:1], penalty)[0]
    everything = found.prompt_token_ids + found.outputs[0].token_ids
    assert len(set(found.outputs[0].token_ids)) == 40
    assert not set(found.prompt_token_ids) & set(everything[len(found.prompt_token_ids) :])


def test_text_and_its_tokens_are_the_same_prompt(load_llm: LoadLLM) -> None:
    llm = load_llm()
    (from_text,) = llm.generate("añejo", GREEDY)
    (from_tokens,) = llm.generate([list("añejo".encode())], GREEDY)
    assert from_text.prompt == "añejo"
    assert from_tokens.prompt is None
    # The tokenizer numbers bytes in an order of its own.
    assert from_text.prompt_token_ids == spell(llm, "añejo") != from_tokens.prompt_token_ids
    (again,) = llm.generate([from_text.prompt_token_ids], GREEDY)
    assert again.outputs == from_text.outputs


# --- where it ends ---


def test_end_of_sequence_ends_it_unless_ignored(load_llm: LoadLLM, script: Script) -> None:
    llm = load_llm()
    tokens = [*spell(llm, "one"), EOS, *spell(llm, "two")]
    script([tokens, tokens])
    params = [scripted_params(0), scripted_params(1, ignore_eos=True, max_tokens=7)]
    ended, ignored = (output.outputs[0] for output in llm.generate(["a", "b"], params))
    assert (ended.text, ended.token_ids, ended.finish_reason) == ("one", tokens[:4], "stop")
    assert (ignored.text, ignored.token_ids, ignored.finish_reason) == ("onetwo", tokens, "length")


def test_a_stop_token_ends_it_and_is_no_text(load_llm: LoadLLM, script: Script) -> None:
    llm = load_llm()
    tokens = spell(llm, "one!two")
    script([tokens])
    params = scripted_params(stop_token_ids=[EOS, tokens[3]], ignore_eos=True)
    output = llm.generate(["a"], params)[0].outputs[0]
    assert (output.text, output.token_ids, output.finish_reason) == ("one", tokens[:4], "stop")


@pytest.mark.parametrize(
    ("stop", "text", "tokens"),
    [
        ("END", "one ", 7),
        (["never", "two", "END"], "one ", 7),
        ("e END", "on", 7),
        ("EN", "one ", 6),  # complete first, though the next begins at the same place
        (["END", "N"], "one E", 6),  # complete first, though the other begins before
        ("END two", "one ", 11),
        ("one", "", 3),
        ("猫", "one END two ", 15),  # three bytes, three tokens
        ("END.", "one END two 猫", 15),
    ],
)
def test_a_stop_string_ends_it_and_is_cut_off(
    load_llm: LoadLLM, script: Script, stop: Any, text: str, tokens: int
) -> None:
    llm = load_llm()
    written = spell(llm, "one END two 猫")
    script([[*written, EOS]])
    output = llm.generate(["a"], scripted_params(stop=stop, max_tokens=15))[0].outputs[0]
    assert output.text == text
    assert output.token_ids == written[:tokens]
    assert output.finish_reason == ("length" if stop == "END." else "stop")
    script([[*written, EOS]])
    streamed = list(llm.stream("a", scripted_params(stop=stop, max_tokens=15)))
    assert "".join(item.text for item in streamed) == text
    assert streamed[-1].finish_reason == output.finish_reason


def test_it_ends_where_the_cache_does(load_llm: LoadLLM) -> None:
    llm = load_llm(max_model_len=16)
    params = SamplingParams(temperature=0.0, max_tokens=100, ignore_eos=True)
    short, long = llm.generate(random_prompts(10, 15), params)
    assert [len(ids) for ids in token_ids([short, long])] == [6, 1]
    assert short.outputs[0].finish_reason == long.outputs[0].finish_reason == "length"
    unlimited = load_llm().generate(random_prompts(10), params)
    assert token_ids(unlimited)[0][:6] == token_ids([short])[0]


# --- streams ---


@pytest.mark.parametrize("cut", [None, 8, 15, 16, 17, 30])  # some of these end inside a character
def test_a_stream_adds_up_to_the_text(
    load_llm: LoadLLM, script: Script, awkward_text: str, cut: int | None
) -> None:
    llm = load_llm()
    written = [*spell(llm, awkward_text), EOS]
    params = scripted_params(max_tokens=cut or 200)
    script([written])
    (whole,) = llm.generate("a", params)
    script([written])
    streamed = list(llm.stream("a", params))
    assert "".join(item.text for item in streamed) == whole.outputs[0].text
    assert [item.token_id for item in streamed] == whole.outputs[0].token_ids
    assert streamed[-1].request == whole
    assert [item.finish_reason for item in streamed[:-1]] == [None] * (len(streamed) - 1)
    assert not any("\ufffd" in item.text for item in streamed[:-1])
    tokens = whole.outputs[0].token_ids
    assert whole.outputs[0].text == llm.tokenizer.decode(tokens, skip_special_tokens=True)
    if cut is None:
        assert whole.outputs[0].text == awkward_text
        # As soon as it can: a character is given with its last byte.
        assert [item.text for item in streamed[:4]] == ["n", "a", "", "ï"]


def test_a_stream_of_real_tokens_is_what_generate_gives(load_llm: LoadLLM) -> None:
    llm = load_llm()
    params = SamplingParams(seed=1, max_tokens=40, ignore_eos=True)
    (whole,) = llm.generate("some prompt", params)
    streamed = list(llm.stream("some prompt", params))
    assert streamed[-1].request == whole
    assert "".join(item.text for item in streamed) == whole.outputs[0].text


def test_streams_run_beside_each_other_and_beside_generate(load_llm: LoadLLM) -> None:
    llm = load_llm(max_num_seqs=2)
    prompts = random_prompts(5, 11, 8)
    params = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
    expected = token_ids(llm.generate(prompts, params))
    streams = [llm.stream(prompt, params) for prompt in prompts[:2]]
    pairs = [(next(streams[0]), next(streams[1])) for _ in range(3)]
    # No place is free: the streams go on until one is, and what they gave waits to be read.
    assert token_ids(llm.generate(prompts[2:], params)) == expected[2:]
    pairs += zip(*streams, strict=True)
    found = [[item.token_id for item in items] for items in zip(*pairs, strict=True)]
    assert found == expected[:2]
    assert_idle(llm)
    for closed in (0, 1, 3):
        abandoned = llm.stream(prompts[0], params)
        for _ in range(closed):
            next(abandoned)
        abandoned.close()
        assert_idle(llm)
    assert token_ids(llm.generate(prompts, params)) == expected


def test_what_fails_in_a_step_leaves_nothing_behind(
    load_llm: LoadLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = load_llm()
    prompts = random_prompts(5, 9)
    expected = token_ids(llm.generate(prompts, GREEDY))
    stream = llm.stream(prompts[0], GREEDY)
    next(stream)
    with monkeypatch.context() as patch:

        def interrupted(*_: object) -> None:
            raise KeyboardInterrupt

        patch.setattr(Model, "forward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(prompts, GREEDY)
    rest = list(stream)  # it was interrupted too, and says so by ending without a reason to stop
    assert [item.finish_reason for item in rest] == [None] * len(rest)
    assert_idle(llm)
    assert token_ids(llm.generate(prompts, GREEDY)) == expected


def test_a_consumer_of_a_stream_may_train(load_llm: LoadLLM) -> None:
    # Between two tokens, the caller's code runs: not under our inference mode.
    for _ in load_llm().stream("a", GREEDY):
        assert not torch.is_inference_mode_enabled()


# --- chats ---


def test_a_chat_is_its_template_as_a_prompt(load_llm: LoadLLM) -> None:
    llm = load_llm()
    messages = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": "añejo?"},
    ]
    (output,) = llm.chat(messages, GREEDY)
    assert output.prompt == (
        "<|begin|>user\nHello<|end|>\n<|begin|>assistant\nHi<|end|>\n"
        "<|begin|>user\nañejo?<|end|>\n<|begin|>assistant\n"
    )
    assert output.prompt_token_ids == llm.chat_prompt(messages)
    assert output.prompt_token_ids.count(256) == 4
    assert llm.generate([llm.chat_prompt(messages)], GREEDY)[0].outputs == output.outputs
    assert list(llm.stream(messages, GREEDY))[-1].request == output
    several = llm.chat([messages, messages[:1]], GREEDY)
    assert several[0] == output
    assert several[1].prompt_token_ids == llm.chat_prompt("Hello")


def test_a_chat_spells_its_first_token_once(load_llm: LoadLLM, byte_tokenizer: Any) -> None:
    from copy import deepcopy

    from tokenizers.processors import TemplateProcessing

    llm = load_llm()
    llm.tokenizer = deepcopy(byte_tokenizer)
    llm.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", 256)]
    )
    (output,) = llm.generate("a", GREEDY)
    assert output.prompt_token_ids == [256, *spell(load_llm(), "a")]
    chat = [{"role": "user", "content": "a"}]
    assert llm.chat_prompt(chat)[:2] == [256, spell(load_llm(), "u")[0]]
    assert llm.chat(chat, GREEDY)[0].prompt_token_ids == llm.chat_prompt(chat)
    assert next(llm.stream(chat, GREEDY)).request.prompt_token_ids == llm.chat_prompt(chat)


def test_a_chat_that_cannot_be_rendered_is_refused(load_llm: LoadLLM) -> None:
    llm = load_llm()
    llm.tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(RequestError, match=r"template refuses.*roles must alternate"):
        llm.chat([{"role": "user", "content": "a"}], GREEDY)
    llm.tokenizer.chat_template = None
    with pytest.raises(RequestError, match="no chat template"):
        llm.chat_prompt("Hello")


# --- requests ---


def test_what_cannot_be_generated_is_refused_before_any_work(
    load_llm: LoadLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = load_llm(max_model_len=16)

    def work(*_: object) -> None:
        raise AssertionError("this is work")

    monkeypatch.setattr(Model, "forward", work)
    fine = [1, 2, 3]
    too_long = random_prompts(16)[0]
    refused: list[tuple[Any, Any, str]] = [
        ("", None, "prompt 0 is empty"),
        ([fine, []], None, "prompt 1 is empty"),
        ([fine, too_long], None, r"prompt 1 has 16 tokens; the limit is 15 .*max_model_len 16"),
        ("sixteen letters!", None, r"prompt 0 has 16 tokens; the limit is 15"),
        ([[1, 258]], None, "token id 258 is outside the vocabulary of 258"),
        ([[-1]], None, "token id -1 is outside"),
        ([1, 2], None, "a string or a list of token ids, not 1"),
        ([["a"]], None, r"a string or a list of token ids, not \['a'\]"),
        ([fine, fine], [GREEDY], "2 prompts and 1 sampling params"),
    ]
    for prompts, params, message in refused:
        with pytest.raises(RequestError, match=message):
            llm.generate(prompts, params)
    with pytest.raises(RequestError, match="16 tokens"):
        llm.stream(too_long)  # at the call, not at the first token
    assert llm.generate([]) == []
    monkeypatch.undo()
    assert len(token_ids(llm.generate([fine]))[0]) <= 13


def test_options_out_of_range_are_refused(
    load_llm: LoadLLM, tiny_checkpoint: Callable[[str], Path]
) -> None:
    for length in (1, 257):
        with pytest.raises(RequestError, match=f"max_model_len is {length}.* 2 to 256"):
            load_llm(max_model_len=length)
    with pytest.raises(RequestError, match="max_num_seqs is 0"):
        load_llm(max_num_seqs=0)
    with pytest.raises(RequestError, match=r"max_num_batched_tokens is 3; .* max_num_seqs, 4"):
        load_llm(max_num_seqs=4, max_num_batched_tokens=3)
    with pytest.raises(RequestError, match=r"256 tokens takes 0\.3 MB .* is 0\.1 MB"):
        load_llm(kv_cache_memory_bytes=100_000)
    with pytest.raises(RequestError, match="dtype 'int3'"):
        LLM(tiny_checkpoint("llama"), dtype="int3")


def test_the_default_length_is_the_models_or_4096(
    load_llm: LoadLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert load_llm().max_model_len == 256
    monkeypatch.setattr(llm_module, "DEFAULT_MODEL_LEN", 100)
    assert load_llm().max_model_len == 100
    assert len(load_llm().cache.rope[0]) == 100
    assert load_llm(max_model_len=200).max_model_len == 200


def test_the_cache_has_the_models_type(tiny_checkpoint: Callable[[str], Path]) -> None:
    llm = LLM(tiny_checkpoint("llama"), device="cpu")
    assert llm.model.dtype == llm.cache.kv.dtype == torch.bfloat16
    assert len(token_ids(llm.generate(["a", "bc"], GREEDY))) == 2


def test_end_of_sequence_is_what_any_file_says(tmp_path: Path, byte_tokenizer: Any) -> None:
    (tmp_path / "config.json").write_text('{"eos_token_id": 3}')
    assert end_of_sequence_ids(tmp_path, byte_tokenizer) == {3, EOS}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [4, 5]}')
    assert end_of_sequence_ids(tmp_path, byte_tokenizer) == {3, 4, 5, EOS}
    (tmp_path / "config.json").write_text('{"eos_token_id": null}')
    assert end_of_sequence_ids(tmp_path, byte_tokenizer) == {4, 5, EOS}
