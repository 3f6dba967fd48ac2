"""Grouped products, each platform's way that runs here, against one product a group."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import grouped
from kernels.cuda import grouped as cuda
from kernels.cuda import product
from kernels.cuda.matrix import Tile
from kernels.product import reference
from tests.kernels.weights import FORMATS, random_weight

ROWS, DEPTH, COLUMNS = 100, 72, 40


def loop(x: jax.Array, weight: jax.Array, sizes: jax.Array, block: int) -> jax.Array:
    return grouped.looped(x, lambda rows, member: rows @ weight[member], COLUMNS, sizes, block)


WAYS: dict[str, Callable[..., jax.Array]] = {
    "chosen": lambda x, weight, sizes: grouped.grouped_dot(x, weight, sizes, ROWS),
    "loop": lambda x, weight, sizes: loop(x, weight, sizes, 8),
    "loop, one row": lambda x, weight, sizes: loop(x, weight, sizes, 1),
    "cuda": partial(cuda.grouped_dot, tile=cuda.Tile(16, 32, 32, 4, 2), interpret=True),
    "cuda, larger than all": partial(cuda.grouped_dot, tile=cuda.Tile(128, 64, 128, 4, 2), interpret=True),
}
SIZES = ((10, 0, 50, 0, 0, 40), (0, 0, 0, 0, 0, 100), (100, 0, 0, 0, 0, 0), (17, 16, 15, 1, 33, 18), (1, 2, 3, 4, 5, 6))

each_way = pytest.mark.parametrize("way", WAYS)


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def multiply(way: str, x: np.ndarray, sizes: tuple[int, ...]) -> np.ndarray:
    weight = random(len(sizes), DEPTH, COLUMNS)
    return np.asarray(jax.jit(WAYS[way])(jnp.asarray(x), jnp.asarray(weight), jnp.asarray(sizes, jnp.int32)))


@each_way
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_each_row_meets_its_own_groups_matrix(way, sizes):
    x, weight = random(ROWS, DEPTH), random(len(sizes), DEPTH, COLUMNS)
    group = np.repeat(np.arange(len(sizes)), sizes)
    expected = np.einsum("rd,rdf->rf", x[: len(group)].astype(np.float64), weight[group])
    assert np.abs(multiply(way, x, sizes)[: len(group)] - expected).max() < 1e-4


@each_way
def test_rows_of_no_group_may_hold_anything_and_no_rows_at_all_are_fine(way):
    x = random(ROWS, DEPTH)
    with_nan = np.where(np.arange(ROWS)[:, None] < 21, x, np.nan)
    np.testing.assert_array_equal(multiply(way, with_nan, SIZES[-1])[:21], multiply(way, x, SIZES[-1])[:21])
    assert multiply(way, with_nan, (0,) * 6).shape == (ROWS, COLUMNS)


@each_way
def test_a_row_gives_the_same_whoever_is_beside_it(way):
    x = random(ROWS, DEPTH)
    alone = multiply(way, x, (0, 0, 1, 0, 0, 0))[0]
    for before, beside in ((0, 50), (10, 1), (37, 60)):
        other = random(ROWS, DEPTH)[::-1].copy()
        other[before] = x[0]
        np.testing.assert_array_equal(multiply(way, other, (before, 0, beside, 0, 0, 3))[before], alone)


WITH_EMPTY, FULL, EXPERTS = (10, 0, 50, 0, 0, 35), (17, 16, 15, 1, 33, 18), 6


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("sizes", "tile"), [(WITH_EMPTY, None), (FULL, Tile(32, 64, 128, stages=2)), ((0,) * 6, None)])
def test_each_row_meets_its_own_groups_quantized_matrix(name: str, sizes: tuple[int, ...], tile: Tile | None):
    outputs, inputs = 128, 512
    x = jnp.asarray(random(ROWS, inputs), jnp.bfloat16)
    stacked = random_weight(name, EXPERTS * outputs, inputs)
    weight = jax.tree.map(lambda part: part.reshape(EXPERTS, -1, part.shape[-1]), stacked)
    assert product.has_groups(weight)
    got = product.grouped_product(x, weight, jnp.asarray(sizes, jnp.int32), tile=tile, interpret=True)
    chosen = grouped.grouped_dot(x, weight, jnp.asarray(sizes, jnp.int32), ROWS)
    assert got.shape == chosen.shape == (ROWS, outputs)
    of_group = lambda group: jax.tree.map(lambda part: part[group], weight)
    for group in np.flatnonzero(sizes):
        rows = slice(sum(sizes[:group]), sum(sizes[: group + 1]))
        expected = np.asarray(reference(x[rows], of_group(group), x.dtype), np.float32)
        limit = 8e-3 * np.abs(expected).max()
        np.testing.assert_allclose(np.asarray(got[rows], np.float32), expected, atol=limit)
        np.testing.assert_allclose(np.asarray(chosen[rows], np.float32), expected, atol=limit)


@pytest.mark.parametrize("name", ["int8, narrow activations", "fp8, blocks", "int4, zeros", "q4_k"])
def test_a_row_gives_the_same_with_quantized_matrices_whoever_is_beside_it(name: str):
    x = random(ROWS, 512)
    stacked = random_weight(name, 2 * 128, 512)
    weight = jax.tree.map(lambda part: part.reshape(2, -1, part.shape[-1]), stacked)
    of = lambda x, *sizes: np.asarray(
        product.grouped_product(jnp.asarray(x, jnp.bfloat16), weight, jnp.asarray(sizes, jnp.int32), interpret=True)
    )
    alone = of(x, 0, 1)[0]
    other = random(ROWS, 512)[::-1].copy()
    other[37] = x[0]
    np.testing.assert_array_equal(of(other, 30, 20)[37], alone)


def test_what_has_no_kernel_is_unpacked_group_by_group():
    weight = random_weight("int4, short runs", 256, 512)
    assert product.has_groups(weight)
    assert not product.has_groups(weight.replace(layout=replace(weight.layout, split=8)))


def test_blocks_are_no_larger_than_a_group_can_be():
    assert [grouped.block_rows(8 * tokens, 64, tokens) for tokens in (1, 2, 8, 64, 256, 4096)] == [1, 2, 8, 8, 32, 32]
