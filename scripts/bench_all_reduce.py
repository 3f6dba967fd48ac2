"""How long a sum over the GPUs of one process takes, by `psum` and by the kernel of our own, among products.

    python scripts/bench_all_reduce.py [--devices 2] [--rows 1 8 64 256]

64 products, each with a sum of its output, [rows, 4096] bfloat16, which is added to the residual, and a norm, as a step
of Llama-8B has, in one program; the sum's part is what they take beyond the same without it.
scripts/check_all_reduce.py says whether the sums are right.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from check_all_reduce import EACH, spread
from jax import Array, lax
from jax.sharding import Mesh, NamedSharding
from machine import seconds

from engine.models.layers import rms_norm
from kernels.cuda.all_reduce import Link, all_reduce, all_reduce_norm, open_workspace

PAIRS, WIDTH, INPUTS = 64, 4096, 2048  # of a product, whose weight is not what takes the time
EPS = 1e-5
Add = Callable[[Array, Array, Array, Array], tuple[Array, Array]]  # product, residual, weight, table -> residual, norm


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
NEEDS = {"kernel": Link.supports, "with the norm": Link.supports_norm}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 64, 256])
    options = parser.parse_args()
    mesh = Mesh(np.array(jax.devices()[: options.devices]), ("model",))
    workspace = open_workspace(mesh, "model")
    table, each = workspace.link.table, NamedSharding(mesh, EACH)
    random = lambda *shape: jax.device_put(
        np.random.default_rng(0).normal(size=(mesh.size, *shape)).astype(jnp.bfloat16) * 0.02, each
    )
    w = random(INPUTS, WIDTH)
    for rows in options.rows:
        x = random(rows, WIDTH)
        took, result = {}, {}
        for name, add in WAYS.items():
            if name in NEEDS and not NEEDS[name](workspace.link, x[0]):
                continue
            run = partial(spread(mesh, partial(pairs, add)), table, x, w)
            took[name] = seconds(run, repeat=20) * 1e6
            result[name] = np.asarray(run(), np.float32)
        print(f"{rows:4} rows, {rows * WIDTH * 2 >> 10} KiB, {PAIRS} products, sums, additions and norms:", flush=True)
        for name, us in took.items():
            far = np.abs(result[name] - result["psum"]).max()
            print(f"    {name:13} {us:7.0f} us, a sum {(us - took['none']) / PAIRS:6.2f} us; {far:.3f} from psum's")


if __name__ == "__main__":
    main()
