"""Every family against transformers, on tiny models with random weights (scripts/make_tiny_models.py makes them)."""

from __future__ import annotations

import json
import pathlib

import numpy as np
import pytest

from engine import LLM, SamplingParams
from engine.models.families import FAMILIES
from tests.engine.buckets import few_buckets

TINY = pathlib.Path(__file__).parents[2] / "data" / "tiny"
GOLDENS = sorted(TINY.glob("*/goldens*.json"))


def test_every_family_has_a_tiny_model():
    architectures = {
        json.loads((TINY / path / "config.json").read_text())["architectures"][0] for path in TINY.iterdir()
    }
    assert architectures == {family.architecture for family in FAMILIES}


@pytest.mark.parametrize("file", GOLDENS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_logprobs_and_greedy_tokens_are_those_of_transformers(file: pathlib.Path):
    goldens = json.loads(file.read_text())
    with few_buckets():
        llm = LLM(
            model=str(file.parent), skip_tokenizer_init=True, max_model_len=goldens.get("max_model_len"),
            max_num_seqs=3, max_num_batched_tokens=16,  # prompts come in chunks, among each other's answers
        )  # fmt: skip
    params = SamplingParams(temperature=0, max_tokens=len(goldens["answers"][0]), prompt_logprobs=0)
    outputs = llm.generate(goldens["prompts"], params, use_tqdm=False)
    for output, expected in zip(outputs, goldens["logprobs"], strict=True):
        assert output.prompt_logprobs is not None
        found = [next(iter(entry.values())).logprob for entry in output.prompt_logprobs[1:] if entry]
        assert np.abs(np.subtract(found, expected)).max() < 2e-5 * goldens["spread"]  # of the logits
    assert [output.outputs[0].token_ids for output in outputs] == goldens["answers"]
