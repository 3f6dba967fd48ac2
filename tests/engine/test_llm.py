"""The offline API, on a tiny model with random weights and a real vocabulary."""

from __future__ import annotations

import json
import math
import pathlib
import random
import subprocess
import sys

import pytest

from engine import LLM, RequestError, SamplingParams

SHAPE = dict(
    architectures=["LlamaForCausalLM"], hidden_size=64, intermediate_size=128, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, vocab_size=49152, max_position_embeddings=256, rms_norm_eps=1e-5,
)  # fmt: skip


@pytest.fixture(scope="module")
def llm(smollm2_gguf: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> LLM:
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "config.json").write_text(json.dumps(SHAPE))
    return LLM(
        model=str(folder), load_format="dummy", tokenizer=str(smollm2_gguf), max_num_seqs=8, max_num_batched_tokens=64,
        chat_template="{{ greeting or 'Dear' }} {{ messages[0].content }}",
    )  # fmt: skip


def greedy(**options) -> SamplingParams:
    return SamplingParams(**{"temperature": 0, "max_tokens": 8, "ignore_eos": True} | options)


def test_importing_the_package_is_quick_and_starts_no_backend():
    code = "import engine, sys; print('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_every_form_of_a_prompt_means_the_same(llm: LLM):
    ids = llm.get_tokenizer().encode("The sea is")
    forms = ["The sea is", ids, {"prompt": "The sea is"}, {"prompt_token_ids": ids}]
    outputs = llm.generate(forms, greedy())
    assert [o.prompt_token_ids for o in outputs] == [ids] * 4
    assert len({tuple(o.outputs[0].token_ids) for o in outputs}) == 1
    assert llm.generate("The sea is", greedy())[0].outputs[0].token_ids == outputs[0].outputs[0].token_ids
    assert llm.generate(ids, greedy())[0].prompt is None


def test_outputs_come_in_the_order_of_the_prompts_with_parameters_each(llm: LLM):
    prompts = [[i + 1] * (i + 1) for i in range(20)]
    outputs = llm.generate(prompts, [greedy(max_tokens=20 - i) for i in range(20)])
    assert [o.prompt_token_ids for o in outputs] == prompts
    assert [len(o.outputs[0].token_ids) for o in outputs] == list(range(20, 0, -1))
    assert all(o.finished and o.outputs[0].finish_reason == "length" for o in outputs)
    with pytest.raises(ValueError, match="sampling_params: 1 for 2 prompts"):
        llm.generate(prompts[:2], [greedy()])


def test_text_is_the_decoded_tokens(llm: LLM):
    (output,) = llm.generate("The sea is", greedy(max_tokens=30))
    completion = output.outputs[0]
    assert completion.text == llm.get_tokenizer().decode(completion.token_ids)


@pytest.mark.parametrize("name", ["trust_remote_code", "swap_space", "max_modl_len"])
def test_an_argument_that_does_not_exist_is_refused_by_name(name: str):
    with pytest.raises(ValueError, match=f"{name}: not supported"):
        LLM(model="x", **{name: 1})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(tensor_parallel_size=10**6), "tensor_parallel_size 1000000 x .* needs 1000000 devices, and there are"),
        (dict(quantization="fp9"), "quantization: must be one of"),
        (dict(block_size=24), "block_size: must be one of"),
        (dict(gpu_memory_utilization=1.5), "gpu_memory_utilization: must be in"),
        (dict(max_num_seqs=64, max_num_batched_tokens=32), "max_num_batched_tokens: 32 is less than max_num_seqs 64"),
        (dict(max_model_len=512), "max_model_len: 512 is more than the model's 256"),
        (dict(max_model_len=256, kv_cache_memory_bytes=100_000), "lower max_model_len or raise kv_cache_memory_bytes"),
        (dict(dtype="int3"), "dtype: must be one of"),
        (dict(attention_backend="flash"), "attention_backend: 'flash' is not one of"),
        (dict(enable_prefix_caching=1), "enable_prefix_caching: must be of type bool"),
        (dict(chat_template="{{ 1 }}"), "chat_template: is of no use without a tokenizer"),
    ],
)
def test_a_setting_that_cannot_be_met_is_an_error_that_names_it(tmp_path: pathlib.Path, settings, message: str):
    (tmp_path / "config.json").write_text(json.dumps(SHAPE))
    with pytest.raises(ValueError, match=message):
        LLM(model=str(tmp_path), load_format="dummy", **settings)


@pytest.mark.parametrize(
    ("prompt", "field"),
    [
        ("", "prompt"), ([], "prompt"), ([-1], "prompt"), ([49152], "prompt"), ([1.5], "prompt"), ([True], "prompt"),
        ({"text": "x"}, "prompt"), ({"prompt_token_ids": None}, "prompt"), ([1] * 256, "prompt"), ("\ud800", "prompt"),
        (None, "prompt"), ({"prompt": "x", "multi_modal_data": {}}, "prompt"),
    ],
)  # fmt: skip
def test_a_bad_prompt_is_refused_and_nothing_is_queued(llm: LLM, prompt, field: str):
    with pytest.raises(RequestError) as error:
        llm.generate([[1, 2, 3], prompt], greedy())
    assert error.value.field == field
    assert not llm.core.has_unfinished()


def test_a_chat_goes_through_a_template_with_arguments_for_it(llm: LLM):
    chat = [{"role": "user", "content": "Ann"}]
    own = "{{ tools[0].name }} {{ documents[0] }} {{ add_generation_prompt }}"
    more = {"tools": [{"name": "f"}], "chat_template_kwargs": {"documents": ["d"]}, "add_generation_prompt": False}
    assert llm.chat(chat, greedy())[0].prompt == "Dear Ann"
    assert [o.prompt for o in llm.chat([chat, chat], greedy(), chat_template_kwargs={"greeting": "Oh"})] == [
        "Oh Ann"
    ] * 2
    assert llm.chat(chat, greedy(), chat_template=own, **more)[0].prompt == "f d False"
    with pytest.raises(RequestError, match="chat_template_kwargs: must not contain tools"):
        llm.chat(chat, greedy(), chat_template_kwargs={"tools": []})


def test_n_completions_share_a_prompt_and_differ_when_sampled(llm: LLM):
    params = SamplingParams(n=4, seed=1, max_tokens=6, ignore_eos=True)
    (output,) = llm.generate([list(range(1, 40))], params)
    assert [c.index for c in output.outputs] == [0, 1, 2, 3]
    assert len({tuple(c.token_ids) for c in output.outputs}) == 4
    assert llm.generate([list(range(1, 40))], params)[0].outputs[2].token_ids == output.outputs[2].token_ids


def test_logprobs_have_the_chosen_token_first_and_then_the_most_likely(llm: LLM):
    (output,) = llm.generate([[5, 6, 7]], greedy(logprobs=3, temperature=1.0, seed=3))
    completion = output.outputs[0]
    assert completion.logprobs is not None and len(completion.logprobs) == len(completion.token_ids)
    for token, entry in zip(completion.token_ids, completion.logprobs, strict=True):
        assert next(iter(entry)) == token and len(entry) in (3, 4)
        assert sorted(e.rank for e in entry.values())[:3] == [1, 2, 3]
    total = sum(entry[t].logprob for t, entry in zip(completion.token_ids, completion.logprobs, strict=True))
    assert completion.cumulative_logprob == pytest.approx(total)
    assert llm.generate([[5, 6, 7]], greedy())[0].outputs[0].logprobs is None


def test_prompt_logprobs_cover_every_token_but_the_first_also_in_chunks(llm: LLM):
    r = random.Random(1)
    prompt = [r.randrange(49152) for _ in range(150)]  # three chunks of at most 64
    (output,) = llm.generate([prompt], greedy(prompt_logprobs=2, max_tokens=1))
    assert output.prompt_logprobs is not None and output.prompt_logprobs[0] is None
    assert [next(iter(entry)) for entry in output.prompt_logprobs[1:] if entry] == prompt[1:]
    short = llm.generate([prompt[:20]], greedy(prompt_logprobs=2, max_tokens=1))[0].prompt_logprobs
    assert short is not None
    for a, b in zip(short[1:], output.prompt_logprobs[1:20], strict=True):
        assert (
            a
            and b
            and {t: pytest.approx(e.logprob, abs=1e-4) for t, e in a.items()} == {t: e.logprob for t, e in b.items()}
        )


def test_stop_strings_and_stop_tokens_end_a_completion_and_say_which(llm: LLM):
    (free,) = llm.generate([[9, 8, 7]], greedy(max_tokens=12))
    token = free.outputs[0].token_ids[5]
    first = free.outputs[0].token_ids.index(token)
    (by_token,) = llm.generate([[9, 8, 7]], greedy(max_tokens=12, stop_token_ids=[token]))
    assert by_token.outputs[0].token_ids == free.outputs[0].token_ids[: first + 1]
    assert (by_token.outputs[0].finish_reason, by_token.outputs[0].stop_reason) == ("stop", token)
    word = free.outputs[0].text[4:9]
    (by_text,) = llm.generate([[9, 8, 7]], greedy(max_tokens=12, stop=word))
    assert by_text.outputs[0].text == free.outputs[0].text[: free.outputs[0].text.index(word)]
    assert (by_text.outputs[0].finish_reason, by_text.outputs[0].stop_reason) == ("stop", word)


def test_logit_wishes_have_their_effect(llm: LLM):
    prompt = [11, 12, 13]
    tokens = lambda **options: llm.generate([prompt], greedy(**options))[0].outputs[0].token_ids
    plain = tokens()
    assert tokens(logit_bias={77: 100.0}) == [77] * 8
    assert set(tokens(allowed_token_ids=[5, 6])) <= {5, 6}
    assert plain[0] not in tokens(bad_words=[llm.get_tokenizer().token_text(plain[0])])
    assert plain[0] not in tokens(stop_token_ids=[plain[0]], min_tokens=8)
    assert len(tokens(stop_token_ids=[plain[0]], min_tokens=8)) == 8
    penalised = tokens(frequency_penalty=2.0, presence_penalty=2.0, max_tokens=40)
    assert len(set(penalised)) > len(set(tokens(max_tokens=40)))
    assert tokens() == plain, "wishes leave nothing behind in a slot"


def test_closing_a_stream_frees_its_pages(llm: LLM):
    stream = llm.stream([1, 2, 3], greedy(max_tokens=200))
    assert next(stream).token_ids
    stream.close()
    assert not llm.core.has_unfinished()
    assert llm.core.stats().kv_cache_usage == 0


def test_a_streams_pieces_add_up_to_the_answer(llm: LLM):
    pieces = list(llm.stream("The sea is", greedy(max_tokens=20, stop=["zzzz"])))
    (whole,) = llm.generate("The sea is", greedy(max_tokens=20))
    assert "".join(p.text for p in pieces) == whole.outputs[0].text
    assert [t for p in pieces for t in p.token_ids] == whole.outputs[0].token_ids


def test_a_prompt_asked_twice_is_cached_to_its_last_token(llm: LLM):
    r = random.Random(2)
    prompt = [r.randrange(49152) for _ in range(100)]  # six pages of 16, and 4 tokens of a seventh that answers fill
    first, second = (llm.generate([prompt], greedy(max_tokens=20))[0] for _ in range(2))
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 99)
    assert first.outputs[0].token_ids == second.outputs[0].token_ids
    assert llm.reset_prefix_cache()
    assert llm.generate([prompt], greedy())[0].num_cached_tokens == 0
    assert llm.generate([{"prompt_token_ids": prompt, "cache_salt": "mine"}], greedy())[0].num_cached_tokens == 0


def test_a_random_workload_of_500_requests_traces_nothing(llm: LLM):
    r = random.Random(0)
    before = llm.core.runner.num_traces
    prompts = [[r.randrange(49152) for _ in range(r.choice([1, 2, 5, 20, 60, 150]))] for _ in range(500)]
    params = [
        SamplingParams(
            temperature=r.choice([0, 0.7]), top_p=r.choice([1, 0.9]), top_k=r.choice([0, 20]), seed=i,
            max_tokens=r.randint(1, 6), logprobs=r.choice([None, None, 2]), ignore_eos=True,
            prompt_logprobs=r.choice([None, None, None, 1]), presence_penalty=r.choice([0, 0, 0.5]),
        )
        for i in range(500)
    ]  # fmt: skip
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert llm.core.runner.num_traces == before == len(llm.core.runner.shapes)
    assert [len(o.outputs[0].token_ids) for o in outputs] == [p.max_tokens for p in params]
    assert all(math.isfinite(e.logprob) for o in outputs for x in o.outputs[0].logprobs or [] for e in x.values())


def test_a_row_whose_logits_are_not_finite_fails_alone(llm: LLM):
    runner = llm.core.runner
    broken = dict(runner.params, embed=runner.params["embed"].at[1234].set(math.nan))
    runner.params, whole = broken, runner.params
    try:
        bad, good = llm.generate([[5, 1234, 6], [5, 6, 7]], greedy(max_tokens=4))
    finally:
        runner.params = whole
    assert bad.outputs[0].finish_reason == "error"
    assert llm.generate([[5, 6, 7]], greedy(max_tokens=4))[0].outputs[0].token_ids == good.outputs[0].token_ids
    assert llm.generate([[5, 1234, 6]], greedy(max_tokens=4))[0].outputs[0].finish_reason == "length"


def test_weights_that_cannot_be_loaded_end_the_start(monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object) -> None:
        raise ValueError("model.safetensors: the file ends early")

    monkeypatch.setattr("engine.startup.random_narrow", fail)
    folder = pathlib.Path(__file__).parents[1] / "data" / "tiny" / "qwen3"
    with pytest.raises(ValueError, match="the file ends early"):
        LLM(model=str(folder), load_format="dummy", skip_tokenizer_init=True)
