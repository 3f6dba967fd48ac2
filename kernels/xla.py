"""Paged attention in plain XLA, blocked so that its memory stays small: the CPU's backend, and any device's fallback.

Decodes are one batched loop over chunks of context; rows with more tokens go one by one, block by block. Both keep a
running maximum and sum (Milakov & Gimelshein 2018), and both loops end at the longest context that is there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from kernels.storage import KV_DTYPES, stored

if TYPE_CHECKING:
    from kernels.attention import AttentionSpec, RaggedBatch, Runs

KV_CHUNK = 256  # tokens of a row's context in one turn of a loop
Q_BLOCK = 128  # query tokens of a row in one turn
DECODE_CHUNK = 2048  # tokens of all rows of a decode in one turn, so that what it gathers stays in the cache


class Cache(NamedTuple):
    """One layer's keys and values: each [pages, kv_heads, page_size, head_dim]. No `v` where values are keys' parts."""

    k: Array
    v: Array | None


def supports(spec: AttentionSpec, page_size: int, kv_dtype: str) -> str | None:
    return None if kv_dtype in KV_DTYPES else f"no KV cache of dtype {kv_dtype}"


def cache_spec(spec: AttentionSpec, num_pages: int, page_size: int, kv_dtype: str) -> Cache:
    shape = jax.ShapeDtypeStruct((num_pages, spec.num_kv_heads, page_size, spec.head_dim), kv_dtype)
    return Cache(shape, None if spec.value_dim else shape)  # type: ignore[arg-type]


def update_and_attend(
    q: Array,
    k: Array,
    v: Array | None,
    cache: Cache,
    batch: RaggedBatch,
    spec: AttentionSpec,
    *,
    sinks: Array | None = None,
    kv_scales: Array | None = None,
) -> tuple[Array, Cache]:
    """See kernels.attention.Backend."""
    scales = (None, None) if kv_scales is None else tuple(kv_scales)

    def write(pages: Array, new: Array, scale: Array | None) -> Array:
        return pages.at[batch.write_page, :, batch.write_offset].set(stored(new, scale, pages.dtype))

    values = None if v is None or cache.v is None else write(cache.v, v, scales[1])
    cache = Cache(write(cache.k, k, scales[0]), values)
    context = _Context(cache, kv_scales, q.dtype, spec)
    num_rows = batch.page_table.shape[0]
    if batch.runs is not None:
        return _decode_runs(q, context, batch, batch.runs, sinks), cache
    out = _decode(q[:num_rows], context, batch, sinks)
    if q.shape[0] > num_rows:  # else every row has one token at most
        out = jnp.pad(out, ((0, q.shape[0] - num_rows), (0, 0), (0, 0), (0, 0)))
        out = _prefill(q, out, context, batch, sinks)
    return out, cache


class _Context(NamedTuple):
    """Where keys and values are read from, and as what."""

    cache: Cache
    scales: Array | None
    dtype: jnp.dtype
    spec: AttentionSpec

    @property
    def value_dim(self) -> int:
        return self.spec.value_dim or self.spec.head_dim

    def read(self, table: Array, turn: Array, chunk: int) -> tuple[Array, Array]:
        """-> keys and values of tokens [turn * chunk, (turn + 1) * chunk) of table [..., P]: [..., K, chunk, D]."""

        def part(pages: Array, index: int) -> Array:
            taken = _gather(pages, table, turn, chunk)
            if taken.dtype.itemsize == 1:
                taken = taken.astype(self.dtype)
            if self.scales is None:
                return taken
            scale = self.scales[index].astype(taken.dtype)
            return taken * scale.reshape((1,) * (taken.ndim - 3) + (-1, 1, 1))

        k = part(self.cache.k, 0)
        return k, k[..., : self.value_dim] if self.cache.v is None else part(self.cache.v, 1)


class _Softmax(NamedTuple):
    """A softmax-weighted sum in the making, in float32: maximum [..., 1], sum [..., 1], weighted values [..., D]."""

    maximum: Array
    total: Array
    value: Array


def _start(shape: tuple[int, ...], sinks: Array | None) -> _Softmax:
    """shape [..., K, Q, D]; sinks [K, Q], if given, count as a first key without a value."""
    column = (*shape[:-1], 1)
    if sinks is None:
        return _Softmax(jnp.full(column, -1e30), jnp.zeros(column), jnp.zeros(shape))
    first = sinks.astype(jnp.float32).reshape((1,) * (len(shape) - 3) + (*sinks.shape, 1))
    return _Softmax(jnp.broadcast_to(first, column), jnp.ones(column), jnp.zeros(shape))


def _extend(state: _Softmax, q: Array, k: Array, v: Array, visible: Array, spec: AttentionSpec) -> _Softmax:
    """Take in one chunk of context: q [..., Q, D], k and v [..., L, D], visible broadcastable to [..., Q, L]."""
    scores = jnp.einsum("...qd,...ld->...ql", q, k, preferred_element_type=jnp.float32) * jnp.float32(spec.scale)
    if spec.soft_cap is not None:
        scores = spec.soft_cap * jnp.tanh(scores / spec.soft_cap)
    scores = jnp.where(visible, scores, -jnp.inf)
    maximum = jnp.maximum(state.maximum, scores.max(axis=-1, keepdims=True))
    weights = jnp.exp(scores - maximum)
    keep = jnp.exp(state.maximum - maximum)
    value = jnp.einsum("...ql,...ld->...qd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return _Softmax(maximum, state.total * keep + weights.sum(axis=-1, keepdims=True), state.value * keep + value)


def _finish(state: _Softmax, dtype: jnp.dtype) -> Array:
    return (state.value / jnp.where(state.total > 0, state.total, 1.0)).astype(dtype)


def _gather(pages: Array, table: Array, turn: Array, chunk: int) -> Array:
    """pages [N, K, page_size, D], table [..., P] -> tokens [turn * chunk, (turn + 1) * chunk): [..., K, chunk, D].

    A page is taken whole, or in parts where it is larger than a chunk. What lies beyond the table is any page.
    """
    num_pages, num_heads, page_size, head_dim = pages.shape
    unit = min(page_size, chunk)
    at = turn * (chunk // unit) + jnp.arange(chunk // unit)
    part = at % (page_size // unit)
    page = jnp.take(table, at // (page_size // unit), axis=-1, mode="clip")
    heads = jnp.arange(num_heads).reshape((1,) * (table.ndim - 1) + (-1, 1))
    part = part.reshape((1,) * table.ndim + (-1,))
    taken = pages.reshape(num_pages, num_heads, -1, unit, head_dim)[page[..., None, :], heads, part]
    return taken.reshape(*taken.shape[:-3], chunk, head_dim)


def _decode(q: Array, context: _Context, batch: RaggedBatch, sinks: Array | None) -> Array:
    """q [S, K, G, D], one token a row; rows that are no decodes give zeros."""
    lens = jnp.where(jnp.arange(q.shape[0]) < batch.num_decodes, batch.kv_lens, 0)
    return _attend_rows(q, context, batch.page_table, lens[:, None], sinks)


def _decode_runs(q: Array, context: _Context, batch: RaggedBatch, runs: Runs, sinks: Array | None) -> Array:
    """q [S, K, G, D], one token a row, in runs of up to W that share their pages -> [S, K, G, value_dim]."""
    num_rows, K, G, _ = q.shape
    width, count = runs.longest, runs.first.shape[0]
    rows = jnp.minimum(runs.first[:, None] + jnp.arange(width)[None], num_rows - 1)
    taken = q[rows].transpose(0, 2, 3, 1, 4).reshape(count, K, G * width, -1)
    own_sinks = None if sinks is None else jnp.repeat(sinks, width, axis=1)
    out = _attend_rows(taken, context, batch.page_table[runs.first], batch.kv_lens[rows], own_sinks)
    out = out.reshape(count, K, G, width, -1)
    behind = jnp.clip(jnp.arange(num_rows) - runs.first[runs.run_of], 0, width - 1)
    return out[runs.run_of, :, :, behind]


def _attend_rows(q: Array, context: _Context, table: Array, lens: Array, sinks: Array | None) -> Array:
    """q [R, K, G * W, D], W tokens of each row behind each other, that see lens [R, W] tokens of table [R, P]."""
    spec, group = context.spec, q.shape[2] // lens.shape[1]
    chunk = min(max(1 << (DECODE_CHUNK // q.shape[0]).bit_length() - 1, 16), KV_CHUNK)
    first = jnp.zeros_like(lens) if spec.window is None else jnp.maximum(lens - spec.window, 0)
    begin = jnp.min(jnp.where(lens > 0, first, lens.max())) // chunk
    end = -(-lens.max() // chunk)

    def body(i: Array, state: _Softmax) -> _Softmax:
        k, v = context.read(table, i, chunk)
        at = i * chunk + jnp.arange(chunk)[None, None, :]
        visible = (at < lens[:, :, None]) & (at >= first[:, :, None])
        return _extend(state, q, k, v, jnp.tile(visible, (1, group, 1))[:, None], spec)

    start = _start((*q.shape[:-1], context.value_dim), sinks)
    return _finish(jax.lax.fori_loop(begin, end, body, start), q.dtype)


def _prefill(q: Array, out: Array, context: _Context, batch: RaggedBatch, sinks: Array | None) -> Array:
    """q [T, K, G, D], out [T, K, G, value_dim] -> out with the rows from num_decodes on filled in."""
    num_tokens, K, G, D = q.shape
    spec, value_dim = context.spec, context.value_dim
    block = min(Q_BLOCK, num_tokens)
    room = ((0, block), (0, 0), (0, 0), (0, 0))  # the last block of a row may reach past the last token
    q, out = jnp.pad(q, room), jnp.pad(out, room)

    def attend_block(row: Array, index: Array, out: Array) -> Array:
        start = batch.cu_q_lens[row] + index * block
        behind = batch.cu_q_lens[row + 1] - start  # tokens of the row from here on
        position = batch.kv_lens[row] - behind + jnp.arange(block)
        last = batch.kv_lens[row] - jnp.maximum(behind - block, 0)  # context length of the block's last token
        first = 0 if spec.window is None else jnp.maximum(position[0] - spec.window + 1, 0)
        taken = jax.lax.dynamic_slice(q, (start, 0, 0, 0), (block, K, G, D))
        taken = taken.transpose(1, 2, 0, 3).reshape(K, G * block, D)

        def body(i: Array, state: _Softmax) -> _Softmax:
            k, v = context.read(batch.page_table[row], i, KV_CHUNK)
            at = i * KV_CHUNK + jnp.arange(KV_CHUNK)
            visible = at[None, :] <= position[:, None]
            if spec.window is not None:
                visible &= at[None, :] > position[:, None] - spec.window
            visible = jnp.tile(visible, (G, 1))[None]
            return _extend(state, taken, k, v, visible, spec)

        own_sinks = None if sinks is None else jnp.repeat(sinks, block, axis=1)
        state = _start((K, G * block, value_dim), own_sinks)
        state = jax.lax.fori_loop(first // KV_CHUNK, -(-last // KV_CHUNK), body, state)
        result = _finish(state, q.dtype).reshape(K, G, block, value_dim).transpose(2, 0, 1, 3)
        return jax.lax.dynamic_update_slice(out, result, (start, 0, 0, 0))

    def attend_row(row: Array, out: Array) -> Array:
        blocks = -(-(batch.cu_q_lens[row + 1] - batch.cu_q_lens[row]) // block)
        return jax.lax.fori_loop(0, blocks, lambda index, out: attend_block(row, index, out), out)

    return jax.lax.fori_loop(batch.num_decodes, batch.num_rows, attend_row, out)[:num_tokens]
