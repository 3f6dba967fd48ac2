"""A KV cache in 8 bits: where its scales come from, and how little it changes."""

from __future__ import annotations

import pathlib
import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from engine import LLM, SamplingParams
from engine.kv_scales import LARGEST, MARGIN, abstract_scales, measure, wanted, with_scales
from engine.models.narrow_placement import abstract_narrow
from engine.models.placement import whole
from engine.models.transformer import attention_spec, forward, logits
from engine.weights.load import load_params, open_checkpoint
from kernels.attention import BACKENDS, RaggedBatch

TINY = pathlib.Path(__file__).parents[1] / "data" / "tiny"
COUNT, PAGE = 24, 8


def scaled_folder(folder: pathlib.Path, **scales: np.ndarray) -> pathlib.Path:
    """-> a copy of the tiny Llama with tensors of these names behind each layer's."""
    shutil.copytree(TINY / "llama3", folder)
    tensors = safetensors.numpy.load_file(TINY / "llama3" / "model.safetensors")
    for layer in range(len(open_checkpoint(TINY / "llama3").config.layers)):
        tensors |= {f"model.layers.{layer}.self_attn.{name}": value for name, value in scales.items()}
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(("dtype", "bound"), [("int8", 2 / 50), ("float8_e4m3fn", 2 / 16), ("float8_e5m2", 2 / 8)])
def test_a_cache_in_8_bits_changes_logits_little(dtype: str, bound: float):
    """Within twice the most that one number is rounded by: of itself for fp8, of its head's usual size for int8."""
    checkpoint = open_checkpoint(TINY / "qwen3")
    model, params = checkpoint.config, load_params(checkpoint, "float32")
    at = jnp.arange(COUNT, dtype=jnp.int32)
    batch = RaggedBatch(
        jnp.arange(COUNT // PAGE, dtype=jnp.int32)[None], jnp.full(1, COUNT, jnp.int32),
        jnp.array([0, COUNT], jnp.int32), jnp.int32(1), jnp.int32(0), at // PAGE, at % PAGE,
    )  # fmt: skip

    def run(params, kv_dtype: str) -> np.ndarray:
        specs = [attention_spec(model, i) for i in range(len(model.layers))]
        caches = [BACKENDS["xla"].cache_spec(spec, COUNT // PAGE, PAGE, kv_dtype) for spec in specs]
        caches = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), caches)
        step = jax.jit(lambda params, caches: forward(model, BACKENDS["xla"], params, caches, at + 3, at, batch)[0])
        return np.asarray(logits(model, params, step(params, caches)))

    narrow = with_scales(model, "float32", params, {}, seed=0) if dtype == "int8" else params
    exact = run(params, "float32")
    change = np.sqrt(np.mean((run(narrow, dtype) - exact) ** 2)) / exact.std()
    assert 0 < change < bound


def test_scales_are_measured_for_each_head_of_each_layer():
    checkpoint = open_checkpoint(TINY / "qwen3")
    model, params = replace(checkpoint.config, max_model_len=64), load_params(checkpoint, "float32")
    largest = [np.asarray(found) for found in measure(model, "float32", params, seed=3)]
    assert len({float(x) for found in largest for x in found.ravel()}) == 2 * len(model.layers) * model.num_kv_heads
    scaled = with_scales(model, "float32", params, {}, seed=3)
    for layer, found in zip(scaled["layers"], largest, strict=True):
        np.testing.assert_allclose(layer["kv_scales"], found * MARGIN / LARGEST, rtol=1e-6)
    shapes = lambda tree: jax.tree.map(lambda a: (a.shape, a.dtype), tree)
    assert shapes(abstract_scales(model, abstract_narrow(whole(model), "float32", {}))) == shapes(scaled)


def test_the_engine_serves_from_a_cache_in_int8():
    llm = LLM(
        str(TINY / "qwen3"), skip_tokenizer_init=True, kv_cache_dtype="int8", max_model_len=32, max_num_seqs=1,
        max_num_batched_tokens=16,
    )  # fmt: skip
    assert llm.core.runner.state.kv_caches[0].k.dtype == jnp.int8
    assert "kv_scales" in llm.core.runner.params["layers"][0]
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": [5, 6, 7]}], params, use_tqdm=False)
    assert len(outputs[0].outputs[0].token_ids) == 4


@pytest.mark.parametrize("names", [("k_scale", "v_scale"), ("attn.k_scale", "attn.v_scale")])
def test_a_checkpoints_scales_are_used(tmp_path: pathlib.Path, names: tuple[str, str]):
    scales = {names[0]: np.array(0.5, np.float32), names[1]: np.full(1, 0.25, np.float32)}
    checkpoint = open_checkpoint(scaled_folder(tmp_path / "model", **scales))
    model = checkpoint.config
    assert wanted(model, "float8_e4m3fn", checkpoint.kv_scales)
    assert not wanted(model, "bfloat16", checkpoint.kv_scales)
    scaled = with_scales(model, "float32", load_params(checkpoint, "float32"), checkpoint.kv_scales, seed=0)
    for layer in scaled["layers"]:
        heads = model.num_kv_heads
        np.testing.assert_array_equal(layer["kv_scales"], np.array([[0.5] * heads, [0.25] * heads], np.float32))


def test_a_scale_for_each_head_is_kept_apart(tmp_path: pathlib.Path):
    own = np.arange(1, 1 + open_checkpoint(TINY / "llama3").config.num_kv_heads, dtype=np.float32)
    folder = scaled_folder(tmp_path / "model", **{"k_proj.k_scale": own, "v_proj.v_scale": own * 2})
    np.testing.assert_array_equal(open_checkpoint(folder).kv_scales[0], np.stack([own, own * 2]))


@pytest.mark.parametrize(
    ("scales", "message"),
    [
        (dict(k_scale=np.array(1, np.float32)), "needs a k_scale and a v_scale"),
        (dict(k_scale=np.zeros(1, np.float32), v_scale=np.ones(1, np.float32)), "k_scale must be positive"),
        (dict(k_scale=np.ones(1, np.int32), v_scale=np.ones(1, np.float32)), "k_scale must hold a scale"),
    ],
)
def test_scales_that_make_no_sense_are_refused(tmp_path: pathlib.Path, scales: dict, message: str):
    with pytest.raises(ValueError, match=message):
        open_checkpoint(scaled_folder(tmp_path / "model", **scales))


def test_scales_of_other_heads_and_of_latents_are_refused():
    with pytest.raises(ValueError, match="layer 0 has 7 scales"):
        wanted(open_checkpoint(TINY / "llama3").config, "int8", {0: np.ones((2, 7), np.float32)})
    with pytest.raises(ValueError, match="latent attention has none"):
        wanted(open_checkpoint(TINY / "deepseek-v2").config, "int8", {})
