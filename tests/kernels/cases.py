"""Ragged batches for tests and benchmarks of attention: shuffled pages, decodes and prefill chunks in one batch."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from kernels import reference
from kernels.attention import AttentionSpec, Backend, RaggedBatch
from kernels.storage import stored


@dataclass(frozen=True)
class Case:
    """`rows` are (tokens in this step, tokens in the cache before it)."""

    name: str
    spec: AttentionSpec
    rows: tuple[tuple[int, int], ...]
    page_size: int = 16
    sinks: bool = False
    kv_dtype: str | None = None  # the query's, unless given
    kv_scales: bool = False
    largest_value: float = np.inf  # to which values are cut; keys and queries are not


def _spec(kv_heads: int = 2, group: int = 3, head_dim: int = 64, **options) -> AttentionSpec:
    return AttentionSpec(kv_heads, group, head_dim, head_dim**-0.5, **options)


DECODES = ((1, 0), (1, 15), (1, 16), (1, 300), (1, 511), (1, 64))
CHUNKS = ((1, 40), (1, 257), (5, 0), (64, 3), (130, 256), (70, 30))
CASES = (
    Case("decode", _spec(), DECODES),
    Case("mixed", _spec(), CHUNKS),
    Case("prefill", _spec(), ((129, 0), (33, 0))),
    Case("mqa", _spec(kv_heads=1, group=4), CHUNKS),
    Case("mha", _spec(kv_heads=4, group=1), CHUNKS),
    Case("head 80", _spec(head_dim=80), CHUNKS),
    Case("head 128", _spec(head_dim=128), CHUNKS),
    Case("window", _spec(window=50), CHUNKS),
    Case("window, decode", _spec(window=300), DECODES),
    Case("window, many masked", _spec(kv_heads=1, group=1, window=50), ((130, 256),)),
    Case("soft cap", _spec(soft_cap=5.0), CHUNKS),
    Case("page 8", _spec(), CHUNKS, page_size=8),
    Case("page 256", _spec(), CHUNKS, page_size=256),
    Case("sinks", _spec(), CHUNKS, sinks=True),
    Case("sinks, window", _spec(window=50), CHUNKS, sinks=True),
    Case("e4m3", _spec(), CHUNKS, kv_dtype="float8_e4m3fn"),
    Case("e4m3, scales", _spec(), CHUNKS, kv_dtype="float8_e4m3fn", kv_scales=True),
    Case("e5m2", _spec(), CHUNKS, kv_dtype="float8_e5m2"),
    Case("int8, scales", _spec(), CHUNKS, kv_dtype="int8", kv_scales=True),
    Case("latent", _spec(kv_heads=1, group=6, head_dim=96, value_dim=64), CHUNKS),
)


def run(
    case: Case, backend: Backend, dtype: str, *, spare_rows: int = 2, spare_tokens: int = 7, seed: int = 0, fill=None
):
    """-> (what the backend gives, what the reference gives), each [tokens, K, G, D], and the new cache and the old.

    Pages outside the batch hold NaN, so that reading one shows. The reference sees keys and values as they are stored.
    fill(spec, cache, table, befores, keys, values, dtype, kv_scales) -> cache with each row's tokens before this step;
    without it, the backend writes them itself.
    """
    rng, spec, page = np.random.default_rng(seed), case.spec, case.page_size
    kv_dtype = case.kv_dtype or dtype
    assert [n == 1 for n, _ in case.rows] == sorted((n == 1 for n, _ in case.rows), reverse=True)
    counts = np.array([n for n, _ in case.rows])
    lens = np.array([n + before for n, before in case.rows])
    per_row = -(-lens // page)
    width = int(per_row.max()) + 1
    num_pages = int(per_row.sum()) + 3
    order = iter(rng.permutation(np.arange(1, num_pages)))
    table = np.zeros((len(counts) + spare_rows, width), np.int32)
    for i, n in enumerate(per_row):
        table[i, :n] = [next(order) for _ in range(n)]

    rand = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    keys = [rand(n, spec.num_kv_heads, spec.head_dim) for n in lens]
    values = [rand(n, spec.num_kv_heads, spec.head_dim).clip(-case.largest_value, case.largest_value) for n in lens]
    total = int(counts.sum())
    q = rand(total, spec.num_kv_heads, spec.group, spec.head_dim)
    tokens = total + (spare_tokens if max(counts) > 1 else spare_rows)

    def padded(parts: list[np.ndarray]) -> jax.Array:
        joined = np.concatenate(parts)
        return jnp.asarray(np.concatenate([joined, rand(tokens - total, *joined.shape[1:])]), dtype)

    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    row_of = np.repeat(np.arange(len(counts)), counts)
    positions = np.arange(total) - starts[row_of] + (lens - counts)[row_of]
    write_page, write_offset = np.zeros((2, tokens), np.int32)
    write_page[:total], write_offset[:total] = table[row_of, positions // page], positions % page
    grow = lambda a, fill: np.concatenate([a, np.full(spare_rows, fill)]).astype(np.int32)
    batch = RaggedBatch(
        *map(jnp.asarray, (table, grow(lens, 0), grow(starts, total))),
        jnp.int32(len(counts)), jnp.int32(int((counts == 1).sum())), jnp.asarray(write_page), jnp.asarray(write_offset),
    )  # fmt: skip

    sinks = jnp.asarray(rand(spec.num_kv_heads, spec.group)) if case.sinks else None
    step = 4.0 / 127 if kv_dtype == "int8" else 0.25
    scales = jnp.asarray(step * (1 + rng.random((2, spec.num_kv_heads), np.float32))) if case.kv_scales else None
    options = {"sinks": sinks, "kv_scales": scales}

    # The cache before the step, written through the backend itself so that its layout stays its own.
    cache = jax.tree.map(lambda s: _poisoned(s.shape, s.dtype), backend.cache_spec(spec, num_pages, page, kv_dtype))
    befores = lens - counts
    if fill is not None:
        cache = fill(spec, cache, table, befores, keys, values, dtype, scales)
    elif befores.sum():
        cache = _write_before(backend, spec, cache, table, befores, page, keys, values, dtype, options)
    # A page that the batch owns may hold stale finite numbers beyond its end, never NaN: the engine sees to that.
    owned = jnp.asarray(np.unique(table))
    clean = jax.tree.map(lambda leaf: leaf.at[owned].set(_finite(leaf[owned])), cache)
    new_k = padded([k[-n:] for k, n in zip(keys, counts, strict=True)])
    new_v = None if spec.value_dim else padded([v[-n:] for v, n in zip(values, counts, strict=True)])
    attend = jax.jit(backend.update_and_attend, static_argnums=5)
    out, after = attend(padded([q]), new_k, new_v, clean, batch, spec, **options)

    rounded = lambda a: np.asarray(jnp.asarray(a, dtype), np.float64)
    read = lambda a, index: _as_read(jnp.asarray(a, dtype), None if scales is None else scales[index], kv_dtype)
    wanted = [
        reference.attention(
            rounded(q[s : s + n]), read(k, 0), read(v, 1), spec, None if sinks is None else np.asarray(sinks)
        )
        for s, n, k, v in zip(starts, counts, keys, values, strict=False)
    ]
    return np.asarray(out[:total], np.float64), np.concatenate(wanted), after, clean, np.unique(table)


def _poisoned(shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    """-> NaN everywhere but in page 0, or the largest number where the dtype has none."""
    worst = jnp.iinfo(dtype).max if jnp.issubdtype(dtype, jnp.integer) else jnp.nan
    return jnp.full(shape, worst, dtype).at[0].set(0)


def _finite(pages: jax.Array) -> jax.Array:
    return pages if jnp.issubdtype(pages.dtype, jnp.integer) else jnp.where(jnp.isnan(pages), 0, pages)


def _as_read(x: jax.Array, scale: jax.Array | None, kv_dtype: str) -> np.ndarray:
    """-> x [L, K, D] after a way through the cache."""
    kept = np.asarray(stored(x, scale, jnp.dtype(kv_dtype)), np.float64)
    return kept if scale is None else kept * np.asarray(scale, np.float64)[:, None]


def _write_before(backend, spec, cache, table, befores, page, keys, values, dtype, options):
    """Fill the cache with each row's tokens before this step, as one batch of prefill chunks."""
    total = int(befores.sum())
    row_of = np.repeat(np.arange(len(befores)), befores)
    starts = np.concatenate([[0], np.cumsum(befores)])
    positions = np.arange(total) - starts[row_of]
    joined = lambda parts: jnp.asarray(np.concatenate([p[:n] for p, n in zip(parts, befores, strict=True)]), dtype)
    nothing = jnp.zeros(len(befores) + 1, jnp.int32)
    batch = RaggedBatch(
        jnp.asarray(table[: len(befores)]), nothing[:-1], nothing, jnp.int32(0), jnp.int32(0),
        jnp.asarray(table[row_of, positions // page]), jnp.asarray(positions % page, jnp.int32),
    )  # fmt: skip
    q = jnp.zeros((total, spec.num_kv_heads, spec.group, spec.head_dim), dtype)
    v = None if spec.value_dim else joined(values)
    return backend.update_and_attend(q, joined(keys), v, cache, batch, spec, **options)[1]
