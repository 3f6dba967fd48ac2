"""Embeddings against transformers' hidden states, alone, together, in chunks and beside running requests."""

from __future__ import annotations

import json
import pathlib
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from engine import LLM, RequestError, SamplingParams
from engine.config import ResolvedConfig
from engine.layout import StepLayout
from engine.models.transformer import attention_spec
from engine.pages import PagePool
from engine.pooling import Pooler
from engine.request import NoRoom
from engine.step import DeviceState
from engine.weights.load import load_params, open_checkpoint
from kernels.attention import choose_backend

TINY = pathlib.Path(__file__).parents[1] / "data" / "tiny"
MODELS = sorted(file.parent for file in TINY.glob("*/embeddings.json"))
PAGE, PAGES = 8, 20
RESOLVED = ResolvedConfig("float32", "float32", 96, max_num_seqs=3, max_num_batched_tokens=20, page_size=PAGE)


def read_cases(folder: pathlib.Path) -> list[dict[str, Any]]:
    return json.loads((folder / "embeddings.json").read_text())["cases"]


@pytest.fixture(scope="module", params=MODELS, ids=lambda folder: folder.name)
def model(request) -> tuple[Pooler, list[dict[str, Any]]]:
    """A pooler with 20 pages and 20 tokens in a chunk on a runner that has no steps, and transformers' vectors."""
    checkpoint = open_checkpoint(request.param)
    specs = [attention_spec(checkpoint.config, i) for i in range(len(checkpoint.config.layers))]
    backend = choose_backend("auto", "cpu", set(specs), PAGE, "float32")
    caches = [backend.cache_spec(spec, PAGES + 1, PAGE, "float32") for spec in specs]
    caches = jax.tree.map(lambda array: jnp.zeros(array.shape, array.dtype), caches)
    state = DeviceState(caches, jnp.zeros((3, 96 // PAGE), jnp.int32), None)  # type: ignore[arg-type]
    params = load_params(checkpoint, "float32")
    run = lambda name, *arrays: runner.operations[name](*arrays)
    runner: Any = SimpleNamespace(
        model=checkpoint.config, backend=backend, params=params, page_size=PAGE, state=state,
        layout=StepLayout(checkpoint.config, Mesh([[jax.devices()[0]]], ("stage", "model"))),
        operations={}, prepare=run, dispatch=run, fetch=np.asarray,
    )  # fmt: skip
    return Pooler(runner, PagePool(PAGES + 1, PAGE, True), RESOLVED), read_cases(request.param)


@pytest.mark.parametrize("pooling", ["last", "mean", "cls"])
def test_vectors_are_transformers_pooled_hidden_states(model, pooling):
    pooler, cases = model
    prompts = [case["prompt_token_ids"] for case in cases]
    expected = np.array([case[pooling] for case in cases])
    found = pooler.embed(prompts, pooling, False)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * expected.std())
    scaled = pooler.embed(prompts, pooling, True)
    np.testing.assert_allclose(np.linalg.norm(scaled, axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(scaled, found / np.linalg.norm(found, axis=1, keepdims=True), rtol=0, atol=1e-6)
    pooler.pool.check()


def test_each_prompt_alone_has_the_same_vector(model):
    pooler, cases = model
    prompts = [case["prompt_token_ids"] for case in cases] * 2
    together = pooler.embed(prompts, "mean", True)
    alone = np.concatenate([pooler.embed([prompt], "mean", True) for prompt in prompts])
    np.testing.assert_allclose(together, alone, rtol=0, atol=1e-5)


def test_pages_that_others_hold_are_not_taken(model):
    pooler, _ = model
    held = pooler.pool.allocate(PAGES - 11)
    with pytest.raises(NoRoom):
        pooler.embed([[1] * 20, [1] * 96], "last", True)
    pooler.pool.release(held)
    assert pooler.embed([[1] * 96], "last", True).shape == (1, 32)
    pooler.pool.check()


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(
        model=str(TINY / "qwen3"), skip_tokenizer_init=True, max_model_len=96, max_num_seqs=1, max_num_batched_tokens=16
    )


def test_generation_goes_on_around_embeddings_as_if_they_were_not_there(llm):
    cases = read_cases(TINY / "qwen3")
    prompt, params = cases[2]["prompt_token_ids"], SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    (expected,) = llm.generate([prompt], params, use_tqdm=False)
    tokens = []
    for update in llm.stream(prompt, params):
        tokens += update.token_ids
        (output,) = llm.embed(cases[1]["prompt_token_ids"], normalize=False, use_tqdm=False)
        np.testing.assert_allclose(output.outputs.embedding, cases[1]["last"], rtol=0, atol=1e-4)
        assert output.prompt_token_ids == cases[1]["prompt_token_ids"]
    assert tokens == expected.outputs[0].token_ids
    pool = llm.core.scheduler.pool
    pool.check()
    assert len(pool.free) == pool.capacity
    assert llm.embed([], use_tqdm=False) == []


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[1] * 97], {}, "prompt: 97 tokens are more than max_model_len, 96 tokens"),
        ([[]], {}, "prompt: token ids must be a non-empty list"),
        ([[1], [10**6]], {}, "prompt: token ids must be integers in"),
        (["text"], {}, "prompt: text needs a tokenizer"),
        ([[1]], {"pooling": "max"}, "pooling: must be one of"),
    ],
)
def test_what_cannot_be_embedded_is_named(llm, prompts, options, message):
    with pytest.raises(RequestError, match=message):
        llm.embed(prompts, **options)
