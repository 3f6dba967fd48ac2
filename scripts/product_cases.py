"""Products that scripts measure: shapes, random weights of every format, and how long one takes on a device."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from machine import seconds

sys.path.insert(0, str(Path(__file__).parents[1]))
from kernels.product import reference
from kernels.quantized import Layout, QuantizedTensor, quantize, split_of

LLAMA_8B = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))  # qkv, out, gate and up, down: [N, K]
LAYOUTS = {
    "fp8_block": Layout("fp8", 128, 128, "token_group"),
    "fp8": Layout("fp8", activations="token"),
    "int8_w8a8": Layout("int8", activations="token"),
    "int8": Layout("int8"),
    "q8_0": Layout("int8", 32),
    "int4": Layout("int4", 128, split=128),
    "int4_32": Layout("int4", 32, split=128),
}
FORMATS = (*LAYOUTS, "mxfp4", "q4_k", "q6_k")
READ = 64 << 20  # bytes of weights that are read in turn: more than the second-level cache has
PRODUCTS = 32  # of one launch
LIMIT = 1e-2  # of the relative error in bfloat16

Run = Callable[[jax.Array, Any], jax.Array]  # x, weight -> product


def random_weight(name: str, N: int, K: int) -> QuantizedTensor:
    """-> a weight of one of FORMATS."""
    if name in LAYOUTS:
        return jax.jit(quantize, static_argnums=1)(jax.random.normal(jax.random.key(1), (N, K)), LAYOUTS[name])
    bits = lambda i, *shape: jax.random.bits(jax.random.key(i), shape, jnp.uint8)
    half = lambda i, *shape: jax.random.uniform(jax.random.key(i), shape, minval=1e-3, maxval=2e-3).astype(jnp.float16)
    values = bits(2, N, K // 2)
    if name == "mxfp4":
        return QuantizedTensor(Layout(name, 32, split=split_of(K)), values, bits(3, N, K // 32) // 16 + 104)
    supers = half(4, N, K // 256)
    if name == "q4_k":
        minima = {"minima": bits(5, N, K // 32) // 4, "super_minima": half(6, N, K // 256)}
        layout = Layout(name, 32, split=128)
        return QuantizedTensor(layout, values, bits(7, N, K // 32) // 4, super_scales=supers, **minima)
    scales = bits(8, N, K // 16).astype(jnp.int8)
    return QuantizedTensor(Layout("q6_k", 16, split=128), values, scales, high=bits(9, N, K // 4), super_scales=supers)


def copies_of(weight: Any) -> list[Any]:
    """-> so many copies of a weight that reading them in turn finds none in the cache."""
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(weight))
    return [weight, *(jax.tree.map(jnp.copy, weight) for _ in range(max(1, min(7, READ // size))))]


def tokens_of(M: int, K: int) -> list[jax.Array]:
    """-> tokens [M, K] for each of PRODUCTS products."""
    draw = lambda key: jax.random.normal(key, (M, K), jnp.bfloat16)
    return list(map(jax.jit(draw), jax.random.split(jax.random.key(M), PRODUCTS)))


def compiled(run: Run, tokens: list[jax.Array], copies: list[Any], options: dict[str, Any] | None = None) -> Any:
    """-> an executable (tokens, copies) -> products of each with the next copy in turn, after turns_of(M) rounds.

    A round is one graph of kernels, in which no launch waits for the host. None has the tokens of another, and each
    comes after the one before, so that the compiler leaves none out, nor what makes activations narrow.
    """
    one = jax.jit(run)  # traced and lowered once
    wait = jax.lax.optimization_barrier

    def rounds(tokens: list[jax.Array], copies: list[Any]) -> list[jax.Array]:
        def each(_: Any, ys: list[jax.Array]) -> list[jax.Array]:
            last, found = ys[-1], []
            for i, x in enumerate(tokens):
                x, last = wait((x, last))
                found.append(last := one(x, copies[i % len(copies)]))
            return found

        y = jax.eval_shape(run, tokens[0], copies[0])
        return jax.lax.fori_loop(0, turns_of(len(tokens[0])), each, [jnp.zeros(y.shape, y.dtype)] * len(tokens))

    return jax.jit(rounds).lower(tokens, copies).compile(options)


def turns_of(M: int) -> int:
    """-> rounds of products of M tokens: many of short ones, so that starting them counts for nothing."""
    return max(1, 1024 // (M + 63))


def wanted(x: jax.Array, weight: QuantizedTensor) -> jax.Array:
    """-> the reference's product. Step by step, since XLA may leave out that numbers were narrow in between."""
    return reference(x, weight, jnp.dtype(jnp.float32))


def relative_error(got: jax.Array, expected: jax.Array) -> float:
    return float(jnp.max(jnp.abs(got.astype(jnp.float32) - expected)) / jnp.max(jnp.abs(expected)))


def time_of(executable: Any, tokens: list[jax.Array], copies: list[Any]) -> float:
    """-> seconds of one product."""
    return seconds(executable, tokens, copies, repeat=3, rounds=3) / (turns_of(len(tokens[0])) * len(tokens))
