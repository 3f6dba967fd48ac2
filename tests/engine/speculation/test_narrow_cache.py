"""What drafts shares the KV cache's dtype: in 8 bits with scales of its own, or it is refused."""

from __future__ import annotations

import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from engine import LLM, SamplingParams
from engine.speculation.checkpoint import open_draft
from engine.speculation.speculator import Speculator
from engine.speculative_config import SpeculativeConfig
from engine.weights.load import open_checkpoint
from tests.engine.buckets import few_buckets
from tests.engine.test_kv_scales import TINY, scaled_folder


def test_a_draft_model_in_int8_is_as_right_as_the_model_that_it_is(monkeypatch: pytest.MonkeyPatch):
    config = dict(method="draft_model", model=str(TINY / "qwen3"), num_speculative_tokens=2, adaptive=False)
    with few_buckets():
        llm = LLM(
            str(TINY / "qwen3"), skip_tokenizer_init=True, dtype="float32", kv_cache_dtype="int8", max_model_len=64,
            max_num_seqs=1, max_num_batched_tokens=16, speculative_config=config,
        )  # fmt: skip
    assert llm.core.runner.state.draft_caches[0].k.dtype == jnp.int8
    params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True, detokenize=False)
    answer = lambda: llm.generate([{"prompt_token_ids": [5, 6, 7]}], params, use_tqdm=False)[0].outputs[0]
    speculated = answer()
    stats = llm.get_metrics().speculation
    assert stats is not None and stats.num_accepted_tokens >= 0.9 * stats.num_draft_tokens > 15
    drafted = stats.num_draft_tokens
    monkeypatch.setattr(Speculator, "extend", lambda self, plan, scheduler: None)
    assert answer().token_ids == speculated.token_ids
    assert llm.get_metrics().speculation.num_draft_tokens == drafted


def test_a_draft_model_has_its_checkpoints_own_scales(tmp_path: pathlib.Path):
    folder = scaled_folder(tmp_path / "draft", k_scale=np.array(0.5, np.float32), v_scale=np.array(0.25, np.float32))
    target = open_checkpoint(TINY / "llama3").config
    spec = SpeculativeConfig("draft_model", 3, model=str(folder))
    draft = open_draft(spec, target, None, dummy=False, kv_dtype="float8_e4m3fn")
    assert draft.load is not None
    wanted = np.array([[0.5] * target.num_kv_heads, [0.25] * target.num_kv_heads], np.float32)
    for layer in draft.load("float32", 0)["layers"]:
        np.testing.assert_array_equal(layer["kv_scales"], wanted)


@pytest.mark.parametrize("method", ["eagle3", "mtp"])
def test_a_head_is_refused_where_numbers_need_scales(method: str):
    spec = SpeculativeConfig(method, 3, model="somewhere")
    with pytest.raises(ValueError, match=f"kv_cache_dtype: int8 needs scales, which a head for method '{method}'"):
        open_draft(spec, open_checkpoint(TINY / "llama3").config, None, dummy=True, kv_dtype="int8")
