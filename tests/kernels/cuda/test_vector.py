"""Products of one token or a few, without tensor cores: in interpret mode against float32, and lowered for a GPU."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.cuda.matrix import Tile
from kernels.cuda.vector import rows_product, supports
from kernels.quantized import Layout, dequantize, quantize, quantize_activations
from tests.kernels.cuda.test_lowering import H200
from tests.kernels.weights import FORMATS, random_weight

N, K = 192, 1024
TILES = Tile(1, 8, 256, stages=2), Tile(1, 16, 128, stages=3)
float32, bfloat16 = jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)
SERVED = [name for name in FORMATS if supports(random_weight(name, 256, K)) is None]


def tokens(count: int, inputs: int = K) -> jax.Array:
    """-> tokens [count, inputs] with a largest number by which none of them comes to lie between two of 127 steps."""
    x = np.random.default_rng(1).standard_normal((count, inputs))
    x[:, 0] = 129 / 32
    return jnp.asarray(x, bfloat16)


def wanted(x: jax.Array, weight) -> np.ndarray:
    """-> the product in float64 of what the weight stands for, and of what its format makes of activations."""
    a = np.asarray(x.astype(float32), np.float64)
    if weight.layout.activations != "none":
        values, scales = jax.jit(quantize_activations, static_argnums=1)(x, weight.layout)
        a = np.asarray(values.astype(float32), np.float64) * np.repeat(
            np.asarray(scales), x.shape[1] // scales.shape[1], 1
        )
    return a @ np.asarray(dequantize(weight, float32), np.float64).T


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("name", SERVED)
def test_a_product_is_float32s(name, count):
    weight, x = random_weight(name, 256 if "blocks" in name else N, K), tokens(count)
    for tile in TILES:
        got = rows_product(x, weight, float32, tile=tile, interpret=True)
        expected = wanted(x, weight)
        np.testing.assert_allclose(got, expected, atol=3e-6 * np.abs(expected).max())


def test_a_weight_of_one_group_is_scaled_once():
    weight, x = quantize(jnp.ones((128, 128)) / 3, Layout("fp8", 128, 128, "token_group")), tokens(1, 128)
    got = rows_product(x, weight, float32, tile=TILES[0], interpret=True)
    np.testing.assert_allclose(got, wanted(x, weight), rtol=1e-4, atol=1e-4)


def test_what_it_serves():
    assert {name.split(",")[0] for name in SERVED} == {"int8", "fp8", "int4"}
    assert supports(random_weight("mxfp4", N, K)) == "no weights of mxfp4"


@pytest.mark.parametrize("outputs", [256, 200])
def test_plain_weights(outputs):
    x, weight = tokens(2), jax.random.normal(jax.random.key(0), (outputs, K), bfloat16)
    expected = np.asarray(x.astype(float32), np.float64) @ np.asarray(weight.astype(float32), np.float64).T
    got = rows_product(x, weight, float32, tile=TILES[0], interpret=True)
    np.testing.assert_allclose(got, expected, atol=3e-6 * np.abs(expected).max())


@pytest.mark.skipif(H200 is None, reason="this JAX cannot lower for a GPU that is not there")
@pytest.mark.parametrize("name", [*SERVED, None])
def test_it_lowers_for_a_gpu(name):
    weight = jax.eval_shape(lambda: jnp.zeros((1024, K), bfloat16) if name is None else random_weight(name, 1024, K))
    run = jax.jit(partial(rows_product, dtype=bfloat16, tile=Tile(1, 8, 512)))
    with jax.sharding.use_abstract_mesh(H200):
        lowered = run.trace(jax.ShapeDtypeStruct((1, K), bfloat16), weight).lower(lowering_platforms=("cuda",))
    assert "triton" in lowered.as_text()
