"""What comes out of an engine that speculates: exactly what comes out of one that doesn't, in fewer steps."""

from __future__ import annotations

import contextlib
import json
import pathlib
from typing import Any

import pytest

from engine import LLM, SamplingParams
from tests.engine.buckets import few_buckets

SHAPE = dict(
    architectures=["LlamaForCausalLM"], hidden_size=64, intermediate_size=128, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, vocab_size=49152, max_position_embeddings=128, rms_norm_eps=1e-5,
)  # fmt: skip
K = 3
METHODS: dict[str, dict[str, Any]] = {
    "ngram": {"prompt_lookup_min": 1},
    "draft_model": {},
    "suffix": {},
    "eagle3": {"num_speculative_tokens": 2},  # each of theirs is one more sampler to compile; test_heads has more
    "mtp": {"num_speculative_tokens": 2},
}
EAGLE3 = SHAPE | dict(
    architectures=["LlamaForCausalLMEagle3"], num_hidden_layers=1, draft_vocab_size=500,
    eagle_config=dict(eagle_aux_hidden_state_layer_ids=[0, 1, 2]),
)  # fmt: skip
SETTINGS = dict(load_format="dummy", max_num_seqs=2, max_num_batched_tokens=16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("tiny")
    (path / "config.json").write_text(json.dumps(SHAPE))
    (path / "eagle3").mkdir()
    (path / "eagle3" / "config.json").write_text(json.dumps(EAGLE3))
    return path


@pytest.fixture(scope="module")
def plain(folder: pathlib.Path, smollm2_gguf: pathlib.Path) -> LLM:
    return LLM(model=str(folder), tokenizer=str(smollm2_gguf), **SETTINGS)


@pytest.fixture(scope="module", params=METHODS)
def speculating(request: pytest.FixtureRequest, folder: pathlib.Path, smollm2_gguf: pathlib.Path) -> LLM:
    """Draft models and heads have random weights: the model's own, so that drafts are right, or some of their own."""
    config = {"method": request.param, "num_speculative_tokens": K, "adaptive": False} | METHODS[request.param]
    if request.param == "draft_model":
        config["model"] = str(folder)
    if request.param == "eagle3":
        config["model"] = str(folder / "eagle3")
    few_pages = dict(num_gpu_blocks_override=9)
    with contextlib.nullcontext() if request.param == "ngram" else few_buckets():  # ngram's are quickly compiled
        return LLM(model=str(folder), tokenizer=str(smollm2_gguf), speculative_config=config, **few_pages, **SETTINGS)


PROMPTS = [[7, 8, 9, 7, 8, 9, 7], list(range(20)), [5], [3, 1] * 20]
GREEDY = dict(temperature=0, max_tokens=40, ignore_eos=True)
SEEDED = dict(temperature=0.7, seed=11, max_tokens=40, ignore_eos=True)
WISHES: dict[str, dict[str, Any]] = {
    "greedy": GREEDY,
    "seeded": SEEDED,
    "cut": SEEDED | dict(top_p=0.8, top_k=20, min_p=0.01),
    "penalties": GREEDY | dict(repetition_penalty=1.3, frequency_penalty=0.4, presence_penalty=0.2),
    "edits": SEEDED | dict(logit_bias={5: 6.0, 9: 5.0}, min_tokens=10, stop_token_ids=[5]),
    "allowed": SEEDED | dict(allowed_token_ids=[3, 4, 5, 6]),
    "bad words": GREEDY | dict(allowed_token_ids=list(range(300, 304)), bad_words=["!"]),
    "logprobs": SEEDED | dict(allowed_token_ids=[3, 4, 5], logprobs=3, prompt_logprobs=1),
    "stop string": SEEDED | dict(allowed_token_ids=list(range(33, 60)), stop=["7", "?"], temperature=1.5),
    "several": SEEDED | dict(n=3, allowed_token_ids=[3, 4, 5]),
}


def results(llm: LLM, params: SamplingParams, prompts: list[list[int]] = PROMPTS) -> list[Any]:
    """-> all that a user sees, but for what may differ in the last digits."""
    llm.reset_prefix_cache()
    found = []
    for output in llm.generate(prompts, params, use_tqdm=False):
        for c in output.outputs:
            found.append((c.token_ids, c.text, c.finish_reason, c.stop_reason, [*map(list, c.logprobs or [])]))
    return found


@pytest.mark.parametrize("wish", WISHES)
def test_every_wish_gets_the_tokens_that_it_gets_without(plain: LLM, speculating: LLM, wish: str):
    params = SamplingParams(**WISHES[wish])
    traces = speculating.core.runner.num_traces
    assert results(speculating, params) == results(plain, params)
    assert speculating.core.runner.num_traces == traces, "serving compiled something"


def test_drafts_are_accepted_and_counted(speculating: LLM):
    before = speculating.get_metrics().speculation
    output = speculating.generate([3, 1] * 20, SamplingParams(**GREEDY | {"logit_bias": {3: 90.0}}), use_tqdm=False)[0]
    after = speculating.get_metrics().speculation
    assert before is not None and after is not None
    drafted, kept = output.metrics.num_draft_tokens, output.metrics.num_accepted_tokens
    assert after.num_draft_tokens - before.num_draft_tokens == drafted
    assert after.num_accepted_tokens - before.num_accepted_tokens == kept
    assert sum(after.accepted_per_position) - sum(before.accepted_per_position) == kept
    assert drafted >= kept >= 15, "drafts are chosen as tokens are, so a bias makes them right"
    assert after.accepted_per_position[0] >= after.accepted_per_position[-1] > before.accepted_per_position[-1]


def test_several_tokens_of_one_step_come_as_one_update(speculating: LLM):
    params = SamplingParams(**GREEDY | {"logit_bias": {3: 90.0}})
    updates = [update for update in speculating.stream([3, 1] * 20, params) if update.token_ids]
    assert sum(len(update.token_ids) for update in updates) == 40
    assert len(updates) < 30
    drafts = len(speculating.get_metrics().speculation.accepted_per_position)
    assert max(len(update.token_ids) for update in updates) == drafts + 1


def test_a_request_is_the_same_alone_in_a_batch_and_after_preemption(plain: LLM, speculating: LLM):
    params = SamplingParams(temperature=0.7, seed=11, max_tokens=80, allowed_token_ids=[3, 4, 5])
    scheduler = speculating.core.scheduler
    before, want = scheduler.num_preemptions, results(plain, params)
    assert results(speculating, params) == want
    assert scheduler.num_preemptions > before
    assert [results(speculating, params, [prompt])[0] for prompt in PROMPTS] == want
    assert len(scheduler.pool.free) == scheduler.pool.capacity


def test_a_sequence_may_be_as_long_as_the_model_allows(plain: LLM, speculating: LLM):
    params = SamplingParams(**GREEDY | {"max_tokens": None, "logit_bias": {3: 90.0}})
    outputs = speculating.generate(PROMPTS, params, use_tqdm=False)
    assert [len(o.prompt_token_ids) + len(o.outputs[0].token_ids) for o in outputs] == [128] * len(PROMPTS)
    assert results(speculating, params) == results(plain, params)
