"""Paged attention on the GPU: decode as a share of the copy bandwidth, prefill in TFLOP/s next to cuDNN's.

    python scripts/bench_kernels.py [--backend auto] [--kv bfloat16,float8_e4m3fn] [--out kernels.json] [--sweep]

Each figure is of the whole update_and_attend, the write of new keys and values included. --sweep tries other tiles.
"""

from __future__ import annotations

import argparse
import itertools
import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from machine import copy_bandwidth, matmul_rate, seconds

from kernels.attention import AttentionSpec, Backend, RaggedBatch, choose_backend
from kernels.cuda.tile import Tiles

SPEC = AttentionSpec(num_kv_heads=8, group=4, head_dim=128, scale=128**-0.5)
DECODES = ((64, 2048), (256, 1024), (8, 8192), (64, 8192), (1, 512))
PREFILLS = ((8, 2048), (2, 8192))
CHAIN = 8  # calls in one launch, each fed with the one before


def make_batch(rows: int, length: int, count: int, page_size: int) -> tuple[RaggedBatch, int]:
    """-> rows of `length` tokens of which the last `count` are new, on shuffled pages, and the number of pages."""
    per_row = -(-length // page_size)
    pages = rows * per_row + 1
    table = np.random.default_rng(0).permutation(np.arange(1, pages)).reshape(rows, per_row).astype(np.int32)
    at = np.tile(np.arange(length - count, length), (rows, 1))
    decodes = rows if count == 1 else 0
    arrays = (
        table, np.full(rows, length), np.arange(rows + 1) * count, rows, decodes,
        np.take_along_axis(table, at // page_size, 1).reshape(-1), (at % page_size).reshape(-1),
    )  # fmt: skip
    return RaggedBatch(*(jnp.asarray(a, jnp.int32) for a in arrays)), pages


def measure(
    backend: Backend, spec: AttentionSpec, rows: int, length: int, count: int, page_size: int, kv: str = "bfloat16"
) -> float:
    """-> seconds of one update_and_attend with a cache of dtype `kv`, whose narrow kinds have scales."""
    batch, pages = make_batch(rows, length, count, page_size)
    leaves, tree = jax.tree.flatten(backend.cache_spec(spec, pages, page_size, kv))
    keys = iter(jax.random.split(jax.random.key(0), len(leaves) + 3))
    random = lambda *shape: jax.random.normal(next(keys), shape, jnp.bfloat16)
    cache = jax.tree.unflatten(tree, [random(*leaf.shape).astype(leaf.dtype) for leaf in leaves])
    scales = jnp.ones((2, spec.num_kv_heads), jnp.float32) if kv != "bfloat16" else None
    q = random(rows * count, spec.num_kv_heads, spec.group, spec.head_dim)
    k, v = (random(rows * count, spec.num_kv_heads, spec.head_dim) for _ in range(2))

    @partial(jax.jit, donate_argnums=1)
    def chain(q: Any, cache: Any) -> Any:
        for _ in range(CHAIN):
            q, cache = backend.update_and_attend(q, k, v, cache, batch, spec, kv_scales=scales)
        return q, cache

    state = [q, cache]

    def run() -> Any:
        _, state[1] = chain(q, state[1])
        return state[1]

    return seconds(run, repeat=5) / CHAIN


def cudnn(rows: int, length: int) -> float:
    heads = SPEC.num_kv_heads * SPEC.group
    q = jax.random.normal(jax.random.key(0), (rows, length, heads, SPEC.head_dim), jnp.bfloat16)
    kv = jax.random.normal(jax.random.key(1), (2, rows, length, SPEC.num_kv_heads, SPEC.head_dim), jnp.bfloat16)
    run = jax.jit(lambda q, kv: jax.nn.dot_product_attention(q, kv[0], kv[1], is_causal=True, implementation="cudnn"))
    return seconds(run, q, kv)


def with_tiles(backend: Backend, decode: Tiles | None, prefill: Tiles | None) -> Backend:
    return backend._replace(update_and_attend=partial(backend.update_and_attend, tiles=(decode, prefill)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--kv", default="bfloat16", help="dtypes of the cache in decodes")
    parser.add_argument("--only-decode", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--sweep", action="store_true")
    options = parser.parse_args()
    backend = choose_backend(options.backend, jax.devices()[0].platform, {SPEC}, 16, "bfloat16")
    limit, rate = copy_bandwidth(), matmul_rate()
    results: list[dict[str, Any]] = []
    device = jax.devices()[0].device_kind
    print(f"attention: {backend.name}")
    print(f"{device}: copy {limit / 1e12:.2f} TB/s, bf16 product {rate / 1e12:.0f} TFLOP/s", flush=True)

    def record(**figures: Any) -> None:
        results.append(figures)
        print("  ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in figures.items()), flush=True)
        if options.out:
            machine = {"device": device, "copy_bytes_per_s": limit, "bf16_flop_per_s": rate}
            options.out.write_text(json.dumps({"machine": machine, "results": results}, indent=1))

    def decode(rows: int, length: int, page: int, tiles: Tiles | None = None, kv: str = "bfloat16") -> None:
        time = measure(with_tiles(backend, tiles, None) if tiles else backend, SPEC, rows, length, 1, page, kv)
        moved = 2 * rows * length * SPEC.num_kv_heads * SPEC.head_dim * jnp.dtype(kv).itemsize
        record(
            what=f"decode {rows} x {length}, page {page}, {kv}", tiles=str(tiles and tuple(tiles)), us=time * 1e6,
            TB_per_s=moved / time / 1e12, share=moved / time / limit,
        )  # fmt: skip

    def flops(rows: int, length: int) -> float:
        return 2 * rows * length**2 * SPEC.num_kv_heads * SPEC.group * SPEC.head_dim

    def prefill(rows: int, length: int, page: int, tiles: Tiles | None = None) -> None:
        time = measure(with_tiles(backend, None, tiles) if tiles else backend, SPEC, rows, length, length, page)
        record(
            what=f"prefill {rows} x {length}, page {page}", tiles=str(tiles and tuple(tiles)), us=time * 1e6,
            TFLOP_per_s=flops(rows, length) / time / 1e12,
        )  # fmt: skip

    for (rows, length), page, kv in itertools.product(DECODES, (16, 64), options.kv.split(",")):
        decode(rows, length, page, kv=kv)
    for rows, length in () if options.only_decode else PREFILLS:
        prefill(rows, length, 16)
        rate_there = flops(rows, length) / cudnn(rows, length) / 1e12
        record(what=f"prefill {rows} x {length}, cuDNN, no pages", TFLOP_per_s=rate_there)
    if options.sweep:
        for size, warps, stages in itertools.product((32, 64, 128), (2, 4), (2, 3, 4)):
            attempt(decode, 64, 2048, 16, Tiles(16, size, warps, stages))
        for queries, size, warps, stages in itertools.product((64, 128), (64, 128), (4, 8), (2, 3)):
            attempt(prefill, 8, 2048, 16, Tiles(queries, size, warps, stages))


def attempt(run: Any, *arguments: Any) -> None:
    """Tiles may need more shared memory than there is."""
    try:
        run(*arguments)
    except jax.errors.JaxRuntimeError as error:
        print(f"{arguments}: {str(error)[:120]}", flush=True)


if __name__ == "__main__":
    main()
