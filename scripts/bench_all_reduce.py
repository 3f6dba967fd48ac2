"""Sums over the GPUs of one process: the kernel against `psum`, checked, and timed among products in one graph.

    python scripts/bench_all_reduce.py [--devices 2] [--rows 1 8 64 256] [--rounds 100]

Checked: sums of many sizes in a row, from devices that are late by turns, are bit for bit those added up in order.
Timed: 64 products, each with a sum of its output, [rows, 4096] bfloat16, which is added to the residual, and a norm,
as a step of Llama-8B has; the sum's part is what they take beyond the same without it. Exit code 1 if a sum differs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from machine import seconds

from engine.models.layers import rms_norm
from kernels.cuda.all_reduce import all_reduce, all_reduce_norm, open_workspace

PAIRS, WIDTH, INPUTS = 64, 4096, 2048  # of a product, whose weight is not what takes the time
SHAPES = ((64, 4096), (1, 4096), (3, 5), (33, 2880), (128, 4096), (64, 1), (8, 4096))
DTYPES = ("bfloat16", "float32", "float16")
NORMS = (((64, 4096), "bfloat16"), ((3, 2880), "bfloat16"), ((5, 1024), "float32"), ((16, 8192), "bfloat16"))
EPS = 1e-5
MOST_ERROR = 0.07  # of numbers up to 16 in bfloat16, that were rounded twice
EACH = PartitionSpec("model")
Add = Callable[[Array, Array, Array, Array], tuple[Array, Array]]  # product, residual, weight, table -> residual, norm


def spread(mesh: Mesh, function: Callable[..., Any]) -> Callable[..., Any]:
    """-> the function, jitted, of every device's own part; arrays have the devices as their first axis."""
    own = lambda *arrays: jax.tree.map(lambda x: x[None], function(*(array[0] for array in arrays)))
    return jax.jit(jax.shard_map(own, mesh=mesh, in_specs=EACH, out_specs=EACH, check_vma=False))


def in_order(x: Array) -> Array:
    """-> the devices' sum, added up in float32 one after another."""
    every = lax.all_gather(x, "model").astype(jnp.float32)
    total = every[0]
    for one in every[1:]:
        total = total + one
    return total.astype(x.dtype)


def wrong_sums(mesh: Mesh, table: Array, rounds: int) -> int:
    """-> how many numbers are not what they should be, of `rounds` programs of a sum of each shape."""
    devices = mesh.size

    def sums(table: Array, seed: Array) -> Array:
        late, wrong = jnp.float32(1), jnp.int32(0)
        for i, shape in enumerate(SHAPES):
            keys = jax.random.split(jax.random.fold_in(jax.random.key(seed[0]), i * devices + lax.axis_index("model")))
            spin = jax.random.randint(keys[0], (), 0, 300)  # of which each device has another number
            late = jnp.where(wrong > 1 << 30, 0.0, late)  # the spinning waits for the sum before
            late = lax.fori_loop(0, spin, lambda _, value: jnp.sin(value) + 1, late)
            dtype = jnp.dtype(DTYPES[i % len(DTYPES)])
            x = jax.random.normal(keys[1], shape).astype(dtype)
            special = jax.random.randint(keys[0], shape, 0, 64)
            for j, value in enumerate((-0.0, jnp.inf, jnp.nan, 1e-40)):
                x = jnp.where(special // 8 == j, jnp.asarray(value, dtype), x)
            x = jnp.where(late > 1e9, jnp.zeros_like(x), x)  # the sum waits for the spinning
            ours, right = all_reduce(x, table), in_order(x)
            same = (ours == right) | (jnp.isnan(ours) & jnp.isnan(right))
            wrong += jnp.sum(~same, dtype=jnp.int32)
        return wrong

    run = spread(mesh, sums)
    each = NamedSharding(mesh, EACH)
    seeds = [jax.device_put(np.full((devices, 1), i, np.int32), each) for i in range(rounds)]
    return int(sum(np.asarray(run(table, seed)).sum() for seed in seeds))


def wrong_norms(mesh: Mesh, table: Array) -> tuple[int, float]:
    """-> of sums with a norm behind them, how many numbers differ before it, and by how much any does behind it."""

    def norms(table: Array) -> tuple[Array, Array]:
        wrong, most = jnp.int32(0), jnp.float32(0)
        for i, (shape, dtype) in enumerate(NORMS):
            keys = jax.random.split(jax.random.fold_in(jax.random.key(i), lax.axis_index("model")))
            x = jax.random.normal(keys[0], shape).astype(dtype)
            residual, weight = (jax.random.normal(jax.random.key(99 + j), s) for j, s in enumerate((shape, shape[1:])))
            residual, weight = residual.astype(dtype), weight.astype(dtype)
            right = in_order(x) + residual
            ours, normed = all_reduce_norm(x, residual, weight, EPS, table)
            error = jnp.abs(normed.astype(jnp.float32) - rms_norm(right, weight, EPS).astype(jnp.float32))
            wrong += jnp.sum(ours != right, dtype=jnp.int32)
            most = jnp.maximum(most, jnp.max(error))
        return wrong, most

    wrong, most = spread(mesh, norms)(table)
    return int(np.asarray(wrong).sum()), float(np.asarray(most).max())


def pairs(add: Add, table: Array, x: Array, w: Array) -> Array:
    """x [R, WIDTH], w [INPUTS, WIDTH] -> x after PAIRS products, whose sums are added to what they were made of."""
    weight, normed = jnp.ones(WIDTH, x.dtype), x
    for _ in range(PAIRS):
        x, normed = add(normed[:, :INPUTS] @ w, x, weight, table)
    return normed


def behind(sum_of: Callable[[Array, Array], Array]) -> Add:
    """-> a sum, an addition and a norm, one after another."""

    def add(y: Array, x: Array, weight: Array, table: Array) -> tuple[Array, Array]:
        x = x + sum_of(y, table)
        return x, rms_norm(x, weight, EPS)

    return add


WAYS: dict[str, Add] = {
    "psum": behind(lambda y, _: lax.psum(y, "model")),
    "kernel": behind(all_reduce),
    "with the norm": lambda y, x, weight, table: all_reduce_norm(y, x, weight, EPS, table),
    "none": behind(lambda y, _: y),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 64, 128, 256])
    parser.add_argument("--rounds", type=int, default=100)
    options = parser.parse_args()
    mesh = Mesh(np.array(jax.devices()[: options.devices]), ("model",))
    workspace = open_workspace(mesh, "model")
    table = workspace.link.table
    wrong = wrong_sums(mesh, table, options.rounds)
    print(f"{options.rounds} x {len(SHAPES)} sums of {mesh.size} devices: {wrong} numbers differ", flush=True)
    wrong_before, most = wrong_norms(mesh, table)
    print(f"{len(NORMS)} sums with a norm: {wrong_before} numbers differ before it, behind it by up to {most:.1e}")

    each = NamedSharding(mesh, EACH)
    random = lambda *shape: jax.device_put(
        np.random.default_rng(0).normal(size=(mesh.size, *shape)).astype(jnp.bfloat16) * 0.02, each
    )
    w = random(INPUTS, WIDTH)
    for rows in options.rows:
        x = random(rows, WIDTH)
        took, result = {}, {}
        for name, add in WAYS.items():
            if name == "with the norm" and not workspace.link.supports_norm(x[0]):
                continue
            run = partial(spread(mesh, partial(pairs, add)), table, x, w)
            took[name] = seconds(run, repeat=20) * 1e6
            result[name] = np.asarray(run(), np.float32)
        print(f"{rows:4} rows, {rows * WIDTH * 2 >> 10} KiB, {PAIRS} products, sums, additions and norms:", flush=True)
        for name, us in took.items():
            far = np.abs(result[name] - result["psum"]).max()
            print(f"    {name:13} {us:7.0f} us, a sum {(us - took['none']) / PAIRS:6.2f} us; {far:.3f} from psum's")
    sys.exit(bool(wrong or wrong_before or most > MOST_ERROR))


if __name__ == "__main__":
    main()
