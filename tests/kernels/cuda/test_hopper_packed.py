"""Hopper's products with packed weights: which it takes, in what tiles, and that numbers come whole from their bytes.

The kernel itself has no interpreter: scripts/check_products.py compares it with the reference on a card.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import tuned
from kernels.cuda import mosaic, product
from kernels.cuda.hopper_packed import default_tile, fits, supports, tiles_of
from kernels.cuda.hopper_unpack import SMALL, part_of
from kernels.cuda.matrix import Tile
from kernels.cuda.product import Plan, default_plan, matrix_product, multiply
from kernels.product import reference
from kernels.quantized import Layout, pack, quantize, unpack
from tests.kernels.cuda.test_lowering import H200
from tests.kernels.weights import random_weight

INT8, INT4 = Layout("int8"), Layout("int4", 128, split=128)
SHAPES = ((28672, 4096), (4096, 14336), (128256, 4096))
TAKEN = ("int8", "int8, groups", "int4", "int4, groups", "int4, zeros", "int4, groups with zeros")


@pytest.fixture
def hopper(monkeypatch):
    """A Hopper GPU, and a JAX that the kernel is written for."""
    monkeypatch.setattr(mosaic, "JAX", jax.__version_info__[:2])
    monkeypatch.setattr(product, "on_hopper", lambda: True)


def shapes_of(layout: Layout, outputs: int, inputs: int):
    return jax.eval_shape(partial(quantize, layout=layout), jax.ShapeDtypeStruct((outputs, inputs), jnp.float32))


def taken(values: np.ndarray, packing: int, half: int) -> np.ndarray:
    """uint8 -> what the kernel's instructions make of each byte, in float64: nothing here is rounded."""
    part = part_of(packing, half)
    bits = ((values ^ part.flip) & part.mask).astype(np.uint16)
    numbers = bits.view(jnp.bfloat16.dtype).astype(np.float64)
    return numbers * part.unit + part.middle


def test_every_byte_of_int8_is_its_number():
    numbers = np.arange(-128, 128).astype(np.int8)
    np.testing.assert_array_equal(taken(numbers.view(np.uint8), 1, 0) * SMALL, numbers)


def test_the_halves_of_every_byte_are_the_numbers_that_were_packed():
    numbers = np.random.default_rng(0).integers(0, 16, (4, 512), np.uint8)
    packed = np.asarray(pack(jnp.asarray(numbers), 128))
    np.testing.assert_array_equal(unpack(jnp.asarray(packed), 128), numbers)
    runs = packed.reshape(4, -1, 128)
    got = np.stack([taken(runs, 2, half) for half in range(2)], axis=2).reshape(4, 512)
    np.testing.assert_array_equal(got * SMALL, numbers.astype(np.float64) - 8)


@pytest.mark.parametrize("packing", [1, 2])
def test_what_numbers_are_made_with_is_in_bfloat16s_range(packing):
    for half in range(packing):
        part = part_of(packing, half)
        for number in (part.unit * 255, part.middle / 2**100, part.middle):
            assert float(jnp.asarray(number, jnp.bfloat16)) == pytest.approx(number, rel=1 / 128)
            assert np.isfinite(float(jnp.asarray(number, jnp.bfloat16)))


@pytest.mark.parametrize("name", TAKEN)
def test_packed_formats_are_taken(name, hopper):
    assert supports(random_weight(name, 256, 512)) is None


def test_what_is_not_taken_is_named(hopper):
    why = lambda weight: supports(weight) or ""
    assert "minima" in why(random_weight("int4, minima", 256, 512))
    assert "runs of 32" in why(random_weight("int4, short runs", 256, 512))
    assert "fp8" in why(random_weight("fp8", 256, 512)) and "mxfp4" in why(random_weight("mxfp4", 256, 512))
    assert "activations" in why(random_weight("int8, narrow activations", 256, 512))
    assert "256 x 448" in why(random_weight("int8", 256, 448)) and "96 x 512" in why(random_weight("int8", 96, 512))
    assert "groups of 16" in why(quantize(jnp.ones((256, 512)), Layout("int8", 16)))


def test_another_jax_is_not_taken(monkeypatch):
    monkeypatch.setattr(mosaic, "JAX", (0, 1))
    assert "JAX" in (supports(random_weight("int8", 256, 512)) or "")


@pytest.mark.parametrize("layout", [INT8, Layout("int8", 32), INT4, Layout("int4", 32, split=128)])
@pytest.mark.parametrize("tokens", [1, 2, 8, 9, 64])
def test_large_weights_have_a_tile_for_few_tokens(layout, tokens, hopper):
    for outputs, inputs in SHAPES:
        weight = shapes_of(layout, outputs, inputs)
        plan = default_plan(weight, tokens)
        tile = plan.tile
        assert plan.kernel == "hopper_packed" and fits(weight, tile)
        assert tile.rows >= tokens
        assert tile.stages * tile.depth * (tile.columns + 2 * tile.rows * layout.packing) <= mosaic.ROOM
        assert outputs // tile.columns * tile.splits >= 100  # programs: most multiprocessors have one


def test_small_weights_and_many_tokens_have_other_kernels(hopper):
    small, large = shapes_of(INT4, 4096, 4096), shapes_of(INT4, 28672, 4096)
    assert default_plan(small, 1).kernel == "vector" and default_plan(small, 8).kernel == "triton"
    assert default_plan(large, 65).kernel == "triton" and default_plan(large, 2048).kernel == "library"


def test_outputs_that_no_tile_divides_have_another_kernel(hopper):
    weight = shapes_of(INT8, 14400, 4096)
    assert supports(weight) is None and default_tile(weight, 8) is None
    assert default_plan(weight, 8).kernel == "triton"


def test_tiles_that_have_no_room_do_not_fit():
    weight = shapes_of(INT4, 4096, 4096)
    assert fits(weight, Tile(8, 128, 128, 4, 8, 8))
    assert not fits(weight, Tile(64, 256, 128, 1, 8, 4))  # 4 times 64 KiB
    assert not fits(weight, Tile(8, 128, 64, 1, 8, 4))
    assert not fits(weight, Tile(8, 128, 128, 3, 8, 2)) and not fits(weight, Tile(8, 96, 128, 1, 8, 2))
    assert not fits(weight, Tile(24, 128, 128, 1, 8, 2)) and not fits(weight, Tile(8, 128, 128, 1, 4, 2))
    assert not fits(shapes_of(INT4, 4096, 256), Tile(8, 128, 128, 2, 8, 2))  # one turn for two programs


def test_wide_and_narrow_tiles_are_tried(hopper):
    found = tiles_of(shapes_of(INT4, 28672, 4096), 8)
    assert {(tile.columns, tile.warps) for tile in found} == {(128, 8), (256, 8), (256, 16)}


def test_a_tuned_plan_gives_way_to_tokens_that_it_does_not_take(tmp_path, monkeypatch):
    monkeypatch.setattr(tuned, "FOLDER", tmp_path)
    monkeypatch.setattr(product, "multiply", lambda x, weight, dtype, plan: plan)
    weight = random_weight("int8", 256, 512)
    device = jax.local_devices()[0].device_kind.replace(" ", "_")
    entry = {"kernel": "hopper_packed", **Tile(8, 128, 128, 1, 8, 4)._asdict()}
    tuned.write(tmp_path / f"product,N=256,K=512,int8 512x1 none,{device}.json", {8: entry})
    tuned._read.cache_clear()
    monkeypatch.setattr(mosaic, "JAX", jax.__version_info__[:2])
    x = jnp.ones((8, 512), jnp.bfloat16)
    kernel = lambda x: matrix_product(x, weight, x.dtype).kernel  # pyright: ignore[reportAttributeAccessIssue]
    assert kernel(x) == "hopper_packed"
    assert kernel(x.astype(jnp.float16)) == "triton" and kernel(jnp.ones((300, 512), jnp.float16)) == "library"
    monkeypatch.setattr(mosaic, "JAX", (0, 1))
    assert kernel(x) == "triton"


@pytest.mark.skipif(H200 is None, reason="this JAX cannot lower for a GPU that is not there")
@pytest.mark.skipif(mosaic.why_not_this_jax() is not None, reason="the kernel is for another JAX")
@pytest.mark.parametrize("name", TAKEN)
@pytest.mark.parametrize(
    "tile", [Tile(8, 128, 128, 4, 8, 4), Tile(64, 256, 128, 1, 16, 3), Tile(128, 256, 128, 2, 8, 2)]
)
def test_the_kernel_lowers(name, tile):
    weight = jax.eval_shape(lambda: random_weight(name, 1024, 2048))
    x = jax.ShapeDtypeStruct((130, 2048), jnp.bfloat16)
    run = partial(multiply, dtype=jnp.dtype(jnp.bfloat16), plan=Plan("hopper_packed", tile), multiprocessors=132)
    with jax.sharding.use_abstract_mesh(H200):
        assert "mosaic_gpu" in jax.jit(run).trace(x, weight).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.skipif(
    jax.default_backend() != "gpu", reason="needs a Hopper GPU: scripts/check_products.py has more cases"
)
def test_a_product_is_the_references():
    weight = random_weight("int4, zeros", 256, 512)
    weight = replace(weight, scales=weight.scales * 0.01)
    x = jax.random.normal(jax.random.key(0), (7, 512), jnp.bfloat16)
    got = multiply(x, weight, jnp.dtype(jnp.float32), Plan("hopper_packed", Tile(8, 128, 128, 2, 8, 2)))
    wanted = reference(x, weight, jnp.dtype(jnp.float32))
    assert float(jnp.max(jnp.abs(got - wanted)) / jnp.max(jnp.abs(wanted))) < 1e-2
