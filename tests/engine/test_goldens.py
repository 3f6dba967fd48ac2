"""A real model's answers: against transformers in float32, and against themselves in other company.

The goldens are made by scripts/make_goldens.py, whose docstring says what they hold.
"""

from __future__ import annotations

import json
import pathlib
from typing import Any

import pytest

from engine import LLM, RequestOutput, SamplingParams
from engine.pages import PagePool
from engine.scheduler import Scheduler
from tests.engine.buckets import few_buckets

CASES = json.loads((pathlib.Path(__file__).parent.parent / "data/smollm2_goldens.json").read_text("utf-8"))["cases"]
SMALL_GAP = 1e-3  # where the reference's first two logits are closer, either token is right
LOGPROB_TOLERANCE = 2e-3
NUM_TOP = 5
MAX_MODEL_LEN, PAGE_SIZE = 1024, 16

with_and_without_prefix_cache = pytest.mark.parametrize("prefix_cache", [True, False])
each_case = pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])


@pytest.fixture(scope="module")
def llm(smollm2_gguf: pathlib.Path) -> LLM:
    """An engine with room for everything at once."""
    return LLM(
        model=str(smollm2_gguf), max_model_len=MAX_MODEL_LEN, block_size=PAGE_SIZE,
        max_num_seqs=32, max_num_batched_tokens=64,
    )  # fmt: skip


# Against the reference


@pytest.fixture(scope="module")
def outputs(llm: LLM) -> dict[str, RequestOutput]:
    """What the engine makes of all cases together, by name."""
    params = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True, logprobs=0, prompt_logprobs=NUM_TOP)
    prompts = [{"prompt_token_ids": case["prompt_token_ids"]} for case in CASES]
    answers = llm.generate(prompts, params, use_tqdm=False)
    return {case["name"]: answer for case, answer in zip(CASES, answers, strict=True)}


def num_compared(case: dict[str, Any], token_ids: list[int]) -> int:
    """-> how many tokens agree before the first that may differ. Fails on one that may not."""
    assert len(token_ids) == len(case["token_ids"])
    for i, (ours, reference, gap) in enumerate(zip(token_ids, case["token_ids"], case["gaps"], strict=True)):
        if ours != reference:
            assert gap < SMALL_GAP, f"token {i}: {ours}, not {reference}, whose logit leads by {gap}"
            return i
    return len(token_ids)


@each_case
def test_greedy_tokens_are_the_references_wherever_its_choice_is_clear(case, outputs):
    num_compared(case, outputs[case["name"]].outputs[0].token_ids)


def test_few_tokens_escape_the_comparison(outputs):
    compared = sum(num_compared(case, outputs[case["name"]].outputs[0].token_ids) for case in CASES)
    assert compared >= 0.9 * sum(len(case["token_ids"]) for case in CASES)


@each_case
def test_logprobs_of_greedy_tokens_are_the_references(case, outputs):
    answer = outputs[case["name"]].outputs[0]
    count = num_compared(case, answer.token_ids)
    ours = [entry[token].logprob for entry, token in zip(answer.logprobs, answer.token_ids, strict=True)]
    assert ours[:count] == pytest.approx(case["logprobs"][:count], rel=0, abs=LOGPROB_TOLERANCE)


@each_case
def test_prompt_logprobs_are_the_references(case, outputs):
    first, *rest = outputs[case["name"]].prompt_logprobs
    assert first is None
    ours = [entry[token].logprob for entry, token in zip(rest, case["prompt_token_ids"][1:], strict=True)]
    assert ours == pytest.approx(case["prompt_logprobs"], rel=0, abs=LOGPROB_TOLERANCE)


@each_case
def test_the_likeliest_prompt_tokens_are_the_references_in_order(case, outputs):
    for position, expected in case["top"].items():
        entry = outputs[case["name"]].prompt_logprobs[int(position)]
        likeliest = sorted((found.rank, token) for token, found in entry.items() if found.rank <= NUM_TOP)
        assert likeliest == [(rank, token) for rank, (token, _) in enumerate(expected, 1)]
        ours = [entry[token].logprob for token, _ in expected]
        assert ours == pytest.approx([logprob for _, logprob in expected], rel=0, abs=LOGPROB_TOLERANCE)


# A request's tokens do not depend on its company, on how its prompt is cut up, or on what was computed before.

REQUESTS = [case for case in CASES if len(case["prompt_token_ids"]) < 200][:32]
WAYS_TO_SAMPLE: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 1.0},
    {"temperature": 0, "repetition_penalty": 1.3, "frequency_penalty": 0.2},
    {"temperature": 0.8, "top_p": 0.9},
    {"temperature": 0, "ignore_eos": False, "min_tokens": 8},
    {"temperature": 1.2, "top_k": 40, "presence_penalty": 0.5},
    {"temperature": 0, "logit_bias": {198: -5.0}},
    {"temperature": 1.0, "min_p": 0.05},
]
PARAMS = [
    SamplingParams(**{"max_tokens": 20, "ignore_eos": True, "seed": 1000 + i} | WAYS_TO_SAMPLE[i % len(WAYS_TO_SAMPLE)])
    for i in range(len(REQUESTS))
]
Answers = dict[str, list[int]]  # token ids by the case's name


def ask(llm: LLM, indices: range = range(len(REQUESTS))) -> list[RequestOutput]:
    prompts = [{"prompt_token_ids": REQUESTS[i]["prompt_token_ids"]} for i in indices]
    return llm.generate(prompts, [PARAMS[i] for i in indices], use_tqdm=False)


def token_ids(outputs: list[RequestOutput]) -> Answers:
    return {case["name"]: output.outputs[0].token_ids for case, output in zip(REQUESTS, outputs, strict=True)}


@pytest.fixture(scope="module")
def alone(llm: LLM) -> Answers:
    """Each request's tokens when nothing runs beside it and nothing is cached."""
    outputs = []
    for i in range(len(REQUESTS)):
        assert llm.reset_prefix_cache()
        outputs += ask(llm, range(i, i + 1))
    assert not any(output.num_cached_tokens for output in outputs)
    return token_ids(outputs)


def test_a_batch_of_32_changes_no_token_with_an_empty_prefix_cache_and_with_a_full_one(llm, alone):
    assert llm.reset_prefix_cache()
    assert token_ids(ask(llm)) == alone
    again = ask(llm)
    assert token_ids(again) == alone
    assert all(output.num_cached_tokens for output in again if len(output.prompt_token_ids) > 1)


def other_limits(
    llm: LLM,
    monkeypatch: pytest.MonkeyPatch,
    *,
    prefix_cache: bool,
    max_num_seqs: int = 32,
    max_num_batched_tokens: int = 64,
    num_pages: int | None = None,
) -> None:
    """Run `llm` under other limits until the test ends: a new scheduler over the same device state compiles nothing."""
    assert llm.reset_prefix_cache()  # its pages will be overwritten
    scheduler = Scheduler(
        PagePool(num_pages or llm.core.runner.num_pages, PAGE_SIZE, prefix_cache),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        max_model_len=MAX_MODEL_LEN,
    )
    monkeypatch.setattr(llm.core, "scheduler", scheduler)


def test_no_prefix_cache_changes_no_token(llm, alone, monkeypatch):
    other_limits(llm, monkeypatch, prefix_cache=False)
    for _ in range(2):
        outputs = ask(llm)
        assert token_ids(outputs) == alone
        assert not any(output.num_cached_tokens for output in outputs)


@with_and_without_prefix_cache
def test_chunks_of_16_tokens_change_no_token(llm, alone, monkeypatch, prefix_cache):
    other_limits(llm, monkeypatch, prefix_cache=prefix_cache, max_num_seqs=8, max_num_batched_tokens=16)
    assert token_ids(ask(llm)) == alone


@with_and_without_prefix_cache
def test_preemption_changes_no_token(llm, alone, monkeypatch, prefix_cache):
    other_limits(llm, monkeypatch, prefix_cache=prefix_cache, num_pages=40)
    assert token_ids(ask(llm)) == alone
    assert llm.get_metrics().num_preemptions > 0


def test_an_engine_made_small_changes_no_token(smollm2_gguf, alone):
    """The limits of the tests above, but as settings, and all of it in one executable, which is none of theirs."""
    with few_buckets():
        small = LLM(
            model=str(smollm2_gguf), max_model_len=160, block_size=PAGE_SIZE,
            max_num_seqs=4, max_num_batched_tokens=16, num_gpu_blocks_override=10, enable_prefix_caching=False,
        )  # fmt: skip
    assert token_ids(ask(small)) == alone
    assert small.get_metrics().num_preemptions > 0
