"""A mixture of experts' step, sorted and grouped, beside the dense loop over all experts: times and the same result.

    python scripts/bench_moe.py [--tokens 1,8,64,256,2048] [--experts 64] [--top-k 8] [--format mxfp4] [--out FILE]
                                [--ragged] [--sweep]

Times are of routing and experts. "weights" is how fast the chosen experts' weights were read, if each was read once: at
few tokens that is the limit, at many the products are. With --format weights are stored so, and beside them are,
instead of the dense loop, the same expanded. --ragged also times the same with jax.lax.ragged_dot, --sweep other tiles
of the GPU's kernel.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from machine import copy_bandwidth, matmul_rate, seconds
from product_cases import FORMATS, random_weight

sys.path.insert(0, str(Path(__file__).parents[1]))
from engine.models.config import MoeSpec
from engine.models.moe import gated, mixture, route
from engine.models.params import Params
from kernels.cuda import grouped as cuda
from kernels.cuda import product
from kernels.cuda.matrix import Tile
from kernels.quantized import QuantizedTensor, dequantize

SWEEP = tuple(itertools.product((16, 64, 128), (64, 128), (64, 128), (4, 8), (2, 3, 4)))  # cuda.Tile's fields
SWEEP_QUANTIZED = tuple(  # matrix.Tile's
    itertools.product((16, 64, 128), (32, 64, 128), (128,), (1,), (4, 8), (2, 3, 5))
)


def routed(x: Array, p: Params, spec: MoeSpec) -> tuple[Array, Array]:
    """-> weights and experts of each token, by a product in full float32 as the engine's own: TF32 chooses others."""
    return route(jnp.matmul(x.astype(jnp.float32), p["router"], precision=jax.lax.Precision.HIGHEST), spec)


def dense_loop(x: Array, p: Params, spec: MoeSpec, activation: str) -> Array:
    """x [T, D] -> [T, D]: every token through every expert, weighted, most of them by zero."""
    tokens, hidden = x.shape
    chosen, experts = routed(x, p, spec)
    weights = jnp.zeros((tokens, spec.num_experts)).at[jnp.arange(tokens)[:, None], experts].set(chosen)

    def one(expert: Array, out: Array) -> Array:
        y = (x @ p["experts_gate_up"][expert].reshape(hidden, -1)).reshape(tokens, 2, -1)
        y = gated(y, spec, activation) @ p["experts_down"][expert]
        return out + weights[:, expert, None].astype(x.dtype) * y

    return jax.lax.fori_loop(0, spec.num_experts, one, jnp.zeros_like(x))


def ragged(x: Array, p: Params, spec: MoeSpec, activation: str) -> Array:
    """x [T, D] -> [T, D]: sorted by expert as ours, multiplied by what XLA makes of ragged_dot."""
    tokens, hidden = x.shape
    weights, experts = routed(x, p, spec)
    order = jnp.argsort(experts.reshape(-1))
    sizes = jnp.bincount(experts.reshape(-1), length=spec.num_experts).astype(jnp.int32)
    gate_up = p["experts_gate_up"].reshape(spec.num_experts, hidden, -1)
    y = jax.lax.ragged_dot(x[order // spec.top_k], gate_up, sizes)
    y = gated(y.reshape(tokens * spec.top_k, 2, -1), spec, activation)
    y = jax.lax.ragged_dot(y, p["experts_down"], sizes)[jnp.argsort(order)].reshape(tokens, spec.top_k, hidden)
    return (weights[..., None].astype(x.dtype) * y).sum(axis=1)


def parameters(spec: MoeSpec, hidden: int, dtype: str, stored: str | None = None) -> Params:
    """-> random ones, and their experts as they are stored."""
    keys = iter(jax.random.split(jax.random.key(0), 3))
    draw = lambda shape, fan_in, kind: jax.random.normal(next(keys), shape, kind) * jnp.asarray(fan_in**-0.5, kind)
    E, F = spec.num_experts, spec.expert_size
    router = {"router": draw((hidden, E), hidden, "float32")}
    if stored is not None:
        experts = {"experts_gate_up": ((E, 2, F), hidden), "experts_down": ((E, hidden), F)}
        of = lambda outputs, inputs: jax.tree.map(
            lambda part: part.reshape(*outputs[:-1], -1, part.shape[-1]),
            random_weight(stored, int(np.prod(outputs)), inputs),
        )
        return router | {name: of(*shape) for name, shape in experts.items()}
    return router | {
        "experts_gate_up": draw((E, hidden, 2, F), hidden, dtype),
        "experts_down": draw((E, F, hidden), F, dtype),
    }


def expanded(p: Params, dtype: str) -> Params:
    """-> the same with experts in `dtype`."""
    inputs_inside = lambda w: jnp.moveaxis(w, -1, 1)  # as the model sees them: [E, in, *out]
    plain = lambda weight: inputs_inside(jax.jit(dequantize, static_argnums=1)(weight, dtype))
    return {name: plain(weight) if isinstance(weight, QuantizedTensor) else weight for name, weight in p.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--hidden", type=int)
    parser.add_argument("--size", type=int)
    parser.add_argument("--tokens", default="1,8,64,256,2048")
    parser.add_argument("--format", choices=FORMATS, help="how weights are stored; left out: as wide ones")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--ragged", action="store_true")
    parser.add_argument("--sweep", action="store_true")
    options = parser.parse_args()
    gpu = jax.default_backend() == "gpu"
    hidden, size = options.hidden or (2048 if gpu else 1024), options.size or (1024 if gpu else 512)
    dtype = "bfloat16" if gpu else "float32"
    spec = MoeSpec(options.experts, options.top_k, size, renormalize=True)
    p = parameters(spec, hidden, dtype, options.format)
    wide = expanded(p, dtype)
    size_of = sum(leaf.nbytes for leaf in jax.tree.leaves(p)) - p["router"].nbytes
    limits = f"; copy {copy_bandwidth() / 1e9:.0f} GB/s, product {matmul_rate() / 1e12:.0f} TFLOP/s" if gpu else ""
    what = f"{spec.num_experts} experts of {hidden} x {size}, top {spec.top_k}"
    print(f"{jax.devices()[0].device_kind}, {options.format or dtype}: {what}{limits}", flush=True)
    other = "wide" if options.format else "dense"
    print(f" tokens  ours, ms  {other}, ms  faster  weights GB/s  TFLOP/s    error")
    results: list[dict[str, float]] = []
    for tokens in map(int, options.tokens.split(",")):
        x = jax.random.normal(jax.random.key(tokens), (tokens, hidden), dtype)
        valid = jnp.ones(tokens, bool)
        ours: Callable[..., Array] = jax.jit(lambda x, p, valid: mixture(x, p, spec, "silu", valid))
        dense: Callable[..., Array] = jax.jit(lambda x, p, _: dense_loop(x, p, spec, "silu"))
        beside = ours if options.format else dense
        error = _error(ours(x, p, valid), beside(x, wide, valid))
        time, slow = seconds(ours, x, p, valid), seconds(beside, x, wide, valid)
        _, experts = routed(x, p, spec)
        read = len(np.unique(np.asarray(experts))) * size_of / spec.num_experts
        flops = tokens * spec.top_k * 6 * hidden * size
        figures = dict(
            tokens=tokens, ms=time * 1e3, other_ms=slow * 1e3, faster=slow / time, weights_GB_per_s=read / time / 1e9,
            TFLOP_per_s=flops / time / 1e12, relative_error=error,
        )  # fmt: skip
        results.append(figures)
        formats = ("7", "9.3f", "10.3f", "7.1f", "13.0f", "8.2f", "8.1e")
        print(*(f"{value:{form}}" for value, form in zip(figures.values(), formats, strict=True)), flush=True)
        if options.out:
            machine = {"device": jax.devices()[0].device_kind, "dtype": dtype, "what": what}
            options.out.write_text(json.dumps({"machine": machine, "results": results}, indent=1))
        if options.ragged:
            plain: Callable[..., Array] = jax.jit(lambda x, p: ragged(x, p, spec, "silu"))
            print(f"        with jax.lax.ragged_dot: {seconds(plain, x, wide, repeat=1) * 1e3:.3f} ms", flush=True)
        if options.sweep and gpu:
            sweep(x, p, spec)


def _error(ours: Array, dense: Array) -> float:
    """-> the largest difference, as a share of the largest value."""
    a, b = (np.asarray(y.astype(jnp.float32)) for y in (ours, dense))
    return float(np.abs(a - b).max() / np.abs(b).max())


def sweep(x: Array, p: Params, spec: MoeSpec) -> None:
    """Print the five fastest tiles of each of the two products."""
    _, experts = routed(x, p, spec)
    flat = experts.reshape(-1)
    order, sizes = jnp.argsort(flat), jnp.bincount(flat, length=spec.num_experts).astype(jnp.int32)
    narrow = jax.random.normal(jax.random.key(1), (flat.shape[0], spec.expert_size), x.dtype)
    for name, rows in (("gate_up", x[order // spec.top_k]), ("down", narrow)):
        weight, run, tiles = p[f"experts_{name}"], cuda.grouped_dot, list(itertools.starmap(cuda.Tile, SWEEP))
        if isinstance(weight, QuantizedTensor):
            weight = jax.tree.map(lambda part: part.reshape(spec.num_experts, -1, part.shape[-1]), weight)
            run, tiles = product.grouped_product, list(itertools.starmap(Tile, SWEEP_QUANTIZED))
        else:
            weight = weight.reshape(*weight.shape[:2], -1)
        times = {}
        for tile in tiles:
            try:
                times[tile] = seconds(jax.jit(partial(run, tile=tile)), rows, weight, sizes)
            except jax.errors.JaxRuntimeError:  # more shared memory or registers than there are
                continue
        for tile in sorted(times, key=lambda tile: times[tile])[:5]:
            print(f"        {name}: {times[tile] * 1e6:.0f} us with {tuple(tile)}", flush=True)


if __name__ == "__main__":
    main()
