"""The fused preparation of heads, in interpret mode, against the same steps written out in JAX."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engine.models.layers import rms_norm
from engine.models.rope import apply_rope
from kernels.attention import AttentionSpec, HeadInputs, RaggedBatch
from kernels.cuda.attention import write
from kernels.cuda.prepare import prepare
from kernels.storage import stored

PAGES, PAGE = 12, 8


def batch_of(tokens: int, rng: np.random.Generator) -> RaggedBatch:
    """-> a batch of which only the places to write matter; the last two tokens are padding."""
    places = rng.permutation(np.arange(PAGE, PAGES * PAGE))[:tokens].astype(np.int32)
    places[-2:] = 3
    nothing = jnp.zeros((1, 1), jnp.int32)
    page, offset = jnp.asarray(places // PAGE), jnp.asarray(places % PAGE)
    return RaggedBatch(nothing, nothing[0], nothing[0], nothing[0, 0], nothing[0, 0], page, offset)


@pytest.mark.parametrize(
    ("head_dim", "rotated", "bias", "norm", "kv_dtype", "tokens"),
    [
        (64, 64, False, False, "float32", 5),
        (128, 128, False, True, "float32", 40),
        (80, 32, True, False, "float32", 19),
        (96, 96, True, True, "bfloat16", 3),
        (64, 0, False, True, "float8_e4m3fn", 33),
        (64, 64, False, False, "int8", 9),
    ],
)
def test_prepared_heads_are_those_of_the_plain_steps(head_dim, rotated, bias, norm, kv_dtype, tokens):
    rng = np.random.default_rng(0)
    rand = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    K, G, D = 2, 3, head_dim
    qkv = rand(tokens, K, G + 2, D).at[1, 0, G + 1, 3].set(jnp.nan)
    angles = rand(tokens, rotated // 2)
    inputs = HeadInputs(
        qkv,
        bias=rand(K, G + 2, D) if bias else None,
        q_norm=rand(D) if norm else None,
        k_norm=rand(D) if norm else None,
        rope=(jnp.cos(angles), jnp.sin(angles)) if rotated else None,
    )
    scales = jnp.abs(rand(2, K)) + 0.1 if jnp.dtype(kv_dtype).itemsize == 1 else None
    batch, spec = batch_of(tokens, rng), AttentionSpec(K, G, D, 1.0)
    cache = stored(rand(PAGES, 2, K, PAGE, D), None, jnp.dtype(kv_dtype))

    x = qkv if inputs.bias is None else qkv + inputs.bias[None]
    q, k, v = x[:, :, :G], x[:, :, G], x[:, :, G + 1]
    if inputs.q_norm is not None and inputs.k_norm is not None:
        q, k = rms_norm(q, inputs.q_norm, 1e-6), rms_norm(k, inputs.k_norm, 1e-6)
    if inputs.rope is not None:
        q, k = apply_rope(q, inputs.rope), apply_rope(k, inputs.rope)
    wanted = write(k, jnp.where(jnp.isfinite(v), v, 0), cache, batch, scales)

    got_q, got = jax.jit(lambda i, c: prepare(i, c, batch, spec, kv_scales=scales, interpret=True))(inputs, cache)
    np.testing.assert_allclose(got_q, q, rtol=0, atol=2e-5)
    one_step = {"float32": 0, "bfloat16": 2**-7, "float8_e4m3fn": 2**-3, "int8": 0}[kv_dtype]  # of rounding, relative
    np.testing.assert_allclose(
        np.asarray(got, np.float32),
        np.asarray(wanted, np.float32),
        rtol=one_step,
        atol=1 if kv_dtype == "int8" else 2e-5,
    )
    np.testing.assert_array_equal(np.asarray(got[0], np.float32), np.asarray(cache[0], np.float32))
