"""Every family against transformers, on tiny models with random weights (scripts/make_tiny_models.py makes them)."""

from __future__ import annotations

import json
import pathlib

import pytest

from engine import LLM, SamplingParams
from engine.models.families import FAMILIES

TINY = pathlib.Path(__file__).parents[2] / "data" / "tiny"
FOLDERS = sorted(path.parent for path in TINY.glob("*/goldens.json"))


def test_every_family_has_a_tiny_model():
    architectures = {json.loads((folder / "config.json").read_text())["architectures"][0] for folder in FOLDERS}
    assert architectures == {family.architecture for family in FAMILIES}


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_logprobs_and_greedy_tokens_are_those_of_transformers(folder: pathlib.Path):
    goldens = json.loads((folder / "goldens.json").read_text())
    llm = LLM(model=str(folder), skip_tokenizer_init=True, max_num_seqs=1, max_num_batched_tokens=32)  # three chunks
    params = SamplingParams(temperature=0, max_tokens=len(goldens["token_ids"]), prompt_logprobs=0)
    (output,) = llm.generate([goldens["prompt_token_ids"]], params, use_tqdm=False)
    assert output.outputs[0].token_ids == goldens["token_ids"]
    assert output.prompt_logprobs is not None
    found = [next(iter(entry.values())).logprob for entry in output.prompt_logprobs[1:] if entry]
    assert found == pytest.approx(goldens["prompt_logprobs"], rel=0, abs=1e-4)
