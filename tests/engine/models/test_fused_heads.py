"""Whole models through the GPU backend in interpret mode, with the heads prepared by its one kernel."""

from __future__ import annotations

import json
import pathlib
from functools import partial

import pytest

from engine import LLM, SamplingParams
from kernels.attention import BACKENDS
from kernels.cuda.attention import attend_product, update_and_attend
from tests.engine.buckets import few_buckets

TINY = pathlib.Path(__file__).parents[2] / "data" / "tiny"


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "gemma2", "phi3", "olmo2", "gpt-oss"])
def test_a_models_tokens_do_not_depend_on_the_backend(family: str, monkeypatch: pytest.MonkeyPatch):
    options = {"interpret": True, "multiprocessors": 2}
    interpreted = BACKENDS["triton"]._replace(
        name="interpreted",
        supports=lambda *_: None,  # heads of 8, too
        update_and_attend=partial(update_and_attend, **options),
        attend_product=partial(attend_product, **options),
    )
    monkeypatch.setitem(BACKENDS, "interpreted", interpreted)
    goldens = json.loads((TINY / family / "goldens.json").read_text())
    with few_buckets():
        llm = LLM(
            model=str(TINY / family), skip_tokenizer_init=True, max_num_seqs=3, max_num_batched_tokens=16,
            attention_backend="interpreted",
        )  # fmt: skip
    outputs = llm.generate(goldens["prompts"], SamplingParams(temperature=0, max_tokens=8), use_tqdm=False)
    assert [output.outputs[0].token_ids for output in outputs] == [answer[:8] for answer in goldens["answers"]]
