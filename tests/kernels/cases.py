"""Ragged batches for tests and benchmarks of attention: shuffled pages, decodes and prefill chunks in one batch."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from kernels import reference
from kernels.attention import AttentionSpec, Backend, RaggedBatch


@dataclass(frozen=True)
class Case:
    """`rows` are (tokens in this step, tokens in the cache before it)."""

    name: str
    spec: AttentionSpec
    rows: tuple[tuple[int, int], ...]
    page_size: int = 16


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
    Case("soft cap", _spec(soft_cap=5.0), CHUNKS),
    Case("page 8", _spec(), CHUNKS, page_size=8),
    Case("page 256", _spec(), CHUNKS, page_size=256),
)


def run(case: Case, backend: Backend, dtype: str, *, spare_rows: int = 2, spare_tokens: int = 7, seed: int = 0):
    """-> (what the backend gives, what the reference gives), each [tokens, K, G, D], and the new cache and the old.

    Pages outside the batch hold NaN, so that reading one shows.
    """
    rng, spec, page = np.random.default_rng(seed), case.spec, case.page_size
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
    values = [rand(n, spec.num_kv_heads, spec.head_dim) for n in lens]
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

    # The cache before the step, written through the backend itself so that its layout stays its own.
    cache = jax.tree.map(
        lambda s: jnp.full(s.shape, jnp.nan, s.dtype).at[0].set(0), backend.cache_spec(spec, num_pages, page, dtype)
    )
    befores = lens - counts
    if befores.sum():
        cache = _write_before(backend, spec, cache, table, befores, page, keys, values, dtype)
    # A page that the batch owns may hold stale finite numbers beyond its end, never NaN: the engine sees to that.
    owned = jnp.asarray(np.unique(table))
    clean = jax.tree.map(lambda leaf: leaf.at[owned].set(jnp.nan_to_num(leaf[owned])), cache)
    new_k = padded([k[-n:] for k, n in zip(keys, counts, strict=True)])
    new_v = padded([v[-n:] for v, n in zip(values, counts, strict=True)])
    attend = jax.jit(backend.update_and_attend, static_argnums=5)
    out, after = attend(padded([q]), new_k, new_v, clean, batch, spec)

    rounded = lambda a: np.asarray(jnp.asarray(a, dtype), np.float64)
    wanted = [
        reference.attention(rounded(q[s : s + n]), rounded(k), rounded(v), spec)
        for s, n, k, v in zip(starts, counts, keys, values, strict=False)
    ]
    return np.asarray(out[:total], np.float64), np.concatenate(wanted), after, clean, np.unique(table)


def _write_before(backend, spec, cache, table, befores, page, keys, values, dtype):
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
    return backend.update_and_attend(q, joined(keys), joined(values), cache, batch, spec)[1]
