"""The GPU's products with quantized weights against the reference, in interpret mode; and which plan serves what."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.cuda import hopper_narrow
from kernels.cuda.activations import narrow
from kernels.cuda.matrix import Tile
from kernels.cuda.product import (
    KERNELS,
    Plan,
    default_plan,
    kind_of,
    may_be_hoppers,
    multiply,
    plan_of,
    tuned_plan,
)
from kernels.product import how_multiplied, reference
from kernels.quantized import Layout, quantize, quantize_activations
from tests.kernels.cuda.test_lowering import H200
from tests.kernels.weights import FORMATS, random_weight

N, K = 192, 512
TILES = (Tile(16, 64, 128), Tile(16, 128, 64, splits=2), Tile(32, 64, 64, splits=2, swapped=True))
float32 = jnp.dtype(jnp.float32)


def tokens(count: int, inputs: int = K) -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).standard_normal((count, inputs)), jnp.bfloat16)


def relative(got: jax.Array, wanted: jax.Array) -> float:
    return float(jnp.max(jnp.abs(got - wanted)) / jnp.max(jnp.abs(wanted)))


@pytest.mark.parametrize(("name", "tile"), list(zip(FORMATS, TILES * 5, strict=True)))
def test_a_product_is_the_references(name, tile):
    outputs = 256 if name == "fp8, blocks" else N
    weight, x = random_weight(name, outputs, K), tokens(21)
    got = multiply(x, weight, float32, Plan("triton", tile), interpret=True)
    # The kernel scales whole numbers after their product, where the reference rounds each weight to bfloat16.
    assert relative(got, reference(x, weight, float32)) < 3e-3


def test_mxfp4_in_runs_as_short_as_its_groups_is_scaled():
    weight, x = random_weight("mxfp4", N, K), tokens(5)
    short = weight.replace(layout=replace(weight.layout, split=32))
    got = multiply(x, short, float32, Plan("triton", Tile(16, 64, 64)), interpret=True)
    assert relative(got, reference(x, short, float32)) < 3e-3


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("swapped", [False, True])
def test_activations_that_programs_make_narrow_themselves_give_the_same(splits, swapped):
    weight, x = random_weight("fp8, blocks", 256, K), tokens(5)
    tile = Tile(16, 64, 128, splits, swapped=swapped)
    given, inside = (multiply(x, weight, float32, Plan(k, tile), interpret=True) for k in ("triton", "inside"))
    np.testing.assert_allclose(inside, given, atol=1e-5 * float(jnp.max(jnp.abs(given))))


def test_a_group_of_zeros_stays_zero():
    values, scales = narrow(jnp.zeros((3, 256), jnp.bfloat16), 128, interpret=True)
    assert not np.any(np.asarray(values, np.float32))
    assert np.all(np.isfinite(scales))


def test_narrow_activations_are_the_references():
    weight, x = random_weight("fp8, blocks", 256, K), tokens(40)
    values, scales = narrow(x, 128, interpret=True)
    wanted, wanted_scales = quantize_activations(x, weight.layout)
    np.testing.assert_array_equal(scales.T, wanted_scales)
    np.testing.assert_array_equal(values.astype(float32), wanted.astype(float32))


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_has_a_kernel(name):
    weight = random_weight(name, 256, K)
    assert kind_of(weight) is not None
    narrow = weight.layout.activations != "none"
    wanted = f"multiplied as {weight.values.dtype}" if narrow else "unpacked in registers"
    assert how_multiplied(weight, "gpu") == wanted


def test_what_has_no_kernel_is_left_to_xla():
    weight = random_weight("int4, short runs", 256, K)
    short = weight.replace(layout=replace(weight.layout, split=8))
    assert kind_of(short) is None
    assert how_multiplied(short, "gpu") == "unpacked by XLA"
    got = multiply(tokens(3), short, float32, Plan("triton"))
    np.testing.assert_allclose(got, reference(tokens(3), short, float32), rtol=1e-2, atol=1e-2)


@pytest.mark.skipif(H200 is None, reason="this JAX cannot lower for a GPU that is not there")
@pytest.mark.parametrize("name", FORMATS)
def test_products_lower_for_a_gpu(name):
    weight = jax.eval_shape(lambda: random_weight(name, 1024, 1024))
    for count in (1, 32):
        x = jax.ShapeDtypeStruct((count, 1024), jnp.bfloat16)
        run = jax.jit(partial(multiply, dtype=jnp.dtype(jnp.bfloat16), plan=Plan("triton", Tile(16, 64, 128))))
        with jax.sharding.use_abstract_mesh(H200):
            assert "triton" in run.trace(x, weight).lower(lowering_platforms=("cuda",)).as_text()


HOPPERS = Tile(64, 256, 128)


@pytest.mark.skipif(H200 is None, reason="this JAX cannot lower for a GPU that is not there")
@pytest.mark.skipif(not hopper_narrow.supports(1024, 1024, HOPPERS), reason="the kernel is for another JAX")
@pytest.mark.parametrize("rows, columns", hopper_narrow.TILES)
@pytest.mark.parametrize("splits", [1, 4])
def test_hoppers_own_product_lowers(rows, columns, splits):
    weight = jax.eval_shape(lambda: random_weight("fp8, blocks", 1024, 1024))
    x = jax.ShapeDtypeStruct((300, 1024), jnp.bfloat16)
    plan = Plan("hopper", Tile(rows, columns, 128, splits, stages=3))
    run = jax.jit(partial(multiply, dtype=jnp.dtype(jnp.bfloat16), plan=plan, multiprocessors=132))
    with jax.sharding.use_abstract_mesh(H200):
        assert "mosaic_gpu" in run.trace(x, weight).lower(lowering_platforms=("cuda",)).as_text()


LAYOUTS = [Layout("fp8", activations="token"), Layout("fp8", 128, 128, "token_group"), Layout("int4", 128, split=128)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("count", [1, 8, 17, 64, 100, 2000])
def test_default_plans_cut_products_into_whole_turns(layout, count):
    for inputs in (512, 1536, 14336 // 8, 14336):
        weight = jax.eval_shape(partial(quantize, layout=layout), jax.ShapeDtypeStruct((4096, inputs), float32))
        plan = default_plan(weight, count)
        assert plan.kernel in KERNELS
        assert (plan.kernel == "vector") == (count == 1)
        turn = 256 if layout.packing == 2 else plan.tile.depth  # two numbers in each byte of a run of 128
        assert plan.kernel in ("library", "vector") or inputs % (turn * plan.tile.splits) == 0


def test_one_token_takes_tensor_cores_where_outputs_are_many_and_in_blocks():
    large = jax.ShapeDtypeStruct((28672, 512), float32)
    plans = [default_plan(jax.eval_shape(partial(quantize, layout=layout), large), 1) for layout in LAYOUTS]
    assert [plan.kernel for plan in plans] == ["vector", "triton", "vector"]


@pytest.mark.parametrize("layout", [Layout("fp8", 64, 64, "token_group"), Layout("fp8", activations="token")])
def test_default_plans_take_inputs_that_128_does_not_divide(layout):
    weight, x = quantize(jnp.asarray(np.random.default_rng(2).standard_normal((128, 576))), layout), tokens(8, 576)
    plan = default_plan(weight, 8)
    assert plan.kernel == "triton"
    assert relative(multiply(x, weight, float32, plan, interpret=True), reference(x, weight, float32)) < 3e-3


def test_hoppers_kernel_is_not_asked_for_float32():
    weight = jax.eval_shape(lambda: random_weight("fp8, blocks", 1024, 1024))
    assert not may_be_hoppers(HOPPERS, weight, float32)
    wide = may_be_hoppers(HOPPERS, weight, jnp.dtype(jnp.bfloat16))
    assert wide == hopper_narrow.supports(1024, 1024, HOPPERS)


def test_a_tuned_plan_is_that_of_the_nearest_batch(tmp_path, monkeypatch):
    from kernels import tuned

    monkeypatch.setattr(tuned, "FOLDER", tmp_path)
    weight = random_weight("int4", N, K)
    assert tuned_plan(weight, 8, "some GPU") == default_plan(weight, 8)
    name = "product,N=192,K=512,int4 128x1 none,some_GPU.json"
    entry = {"kernel": "triton", "rows": 16, "columns": 32, "depth": 128, "us": 3.5}
    tuned.write(tmp_path / name, {1: entry, 64: entry | {"rows": 64}})
    tuned._read.cache_clear()
    assert tuned_plan(weight, 8, "some GPU") == Plan("triton", Tile(16, 32, 128))
    assert tuned_plan(weight, 60, "some GPU").tile.rows == 64
    with pytest.raises(ValueError, match="names no kernel"):
        plan_of({"kernel": "triton", "bogus": 1}, name)


def test_a_batch_near_a_tuned_one_of_a_few_tokens_is_not_given_its_kernel(tmp_path, monkeypatch):
    from kernels import tuned

    monkeypatch.setattr(tuned, "FOLDER", tmp_path)
    weight = random_weight("int8", N, K)
    entry = {"kernel": "vector", "rows": 1, "columns": 4, "depth": 512}
    tuned.write(tmp_path / "product,N=192,K=512,int8 512x1 none,some_GPU.json", {1: entry})
    tuned._read.cache_clear()
    assert tuned_plan(weight, 1, "some GPU") == Plan("vector", Tile(1, 4, 512))
    assert tuned_plan(weight, 8, "some GPU") == default_plan(weight, 8)
