"""Decode attention as scripts/tune_kernels.py measures it: its tiles, what they need, and how long they take."""

from __future__ import annotations

import threading
from functools import partial
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
from bench_kernels import make_batch
from machine import seconds
from product_cases import LIMIT, relative_error

from kernels.attention import AttentionSpec
from kernels.cuda.attention import cache_spec, decode_tiles, update_and_attend
from kernels.cuda.matrix import SHARED_MEMORY
from kernels.cuda.tile import Tiles, padded

CONTEXT, MOST_TOKENS, PAGE = 2048, 1 << 20, 16  # of each row; of all rows; of a page
CHAIN = 4  # calls in one launch
DTYPE = jnp.dtype(jnp.bfloat16)


def tiles_to_try(spec: AttentionSpec) -> list[Tiles]:
    """-> the default, and other tiles whose stages of keys and values have room."""
    default = decode_tiles(spec, DTYPE, DTYPE)
    found = [Tiles(default.queries, *sizes) for sizes in product((16, 32, 64, 128), (2, 4, 8), (2, 3, 4))]
    fits = lambda t: 2 * t.stages * t.context * padded(spec.head_dim) * DTYPE.itemsize <= SHARED_MEMORY
    return list(dict.fromkeys([default, *filter(fits, found)]))


def find_tiles(spec: AttentionSpec, rows: int, device: Any, stop: threading.Event) -> dict[str, Any]:
    """-> the best tiles of `rows` decodes, as an entry of a file."""
    with jax.default_device(device):
        length = min(CONTEXT, MOST_TOKENS // rows)
        batch, pages = make_batch(rows, length, 1, PAGE)
        keys = jax.random.split(jax.random.key(0), 4)
        random = lambda key, *shape: jax.random.normal(key, shape, DTYPE)
        state = random(keys[0], *cache_spec(spec, pages, PAGE, str(DTYPE)).shape)
        q = random(keys[1], rows, spec.num_kv_heads, spec.group, spec.head_dim)
        k, v = (random(key, rows, spec.num_kv_heads, spec.head_dim) for key in keys[2:])
        times: dict[Tiles, float] = {}
        default, *others = tiles_to_try(spec)
        expected = None
        for tiles in (default, *others):
            if stop.is_set():
                raise InterruptedError("stopped")
            step = partial(update_and_attend, batch=batch, spec=spec, tiles=(tiles, None))

            def chain(q: Any, cache: Any, step: Any = step) -> Any:
                for _ in range(CHAIN):
                    q, cache = step(q, k, v, cache)
                return q

            try:
                out = jax.jit(lambda q, cache, step=step: step(q, k, v, cache)[0])(q, state)
                expected = out.astype(jnp.float32) if expected is None else expected
                if relative_error(out, expected) < LIMIT:
                    times[tiles] = seconds(jax.jit(chain), q, state, repeat=5) / CHAIN
            except jax.errors.JaxRuntimeError:
                if tiles is default:
                    raise
    best = min(times, key=times.__getitem__)
    best = best if times[best] < 0.99 * times[default] else default
    took = {"us": times[best] * 1e6, "default_us": times[default] * 1e6}
    return {"context": best.context, "warps": best.warps, "stages": best.stages, **took}
