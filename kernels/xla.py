"""Paged attention in plain XLA, blocked so that its memory stays small: the CPU's backend, and any device's fallback.

Decodes are one batched loop over chunks of context; rows with more tokens go one by one, block by block. Both keep a
running maximum and sum (Milakov & Gimelshein 2018), and both loops end at the longest context that is there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

if TYPE_CHECKING:
    from kernels.attention import AttentionSpec, RaggedBatch

KV_CHUNK = 256  # tokens of a row's context in one turn of a loop
Q_BLOCK = 128  # query tokens of a row in one turn
DECODE_CHUNK = 2048  # tokens of all rows of a decode in one turn, so that what it gathers stays in the cache


class Cache(NamedTuple):
    """One layer's keys and values: each [pages, kv_heads, page_size, head_dim]."""

    k: Array
    v: Array


def supports(spec: AttentionSpec, page_size: int, kv_dtype: str) -> str | None:
    return None if kv_dtype in ("float32", "bfloat16", "float16") else f"no KV cache of dtype {kv_dtype}"


def cache_spec(spec: AttentionSpec, num_pages: int, page_size: int, kv_dtype: str) -> Cache:
    shape = jax.ShapeDtypeStruct((num_pages, spec.num_kv_heads, page_size, spec.head_dim), kv_dtype)
    return Cache(shape, shape)  # type: ignore[arg-type]


def update_and_attend(
    q: Array, k: Array, v: Array, cache: Cache, batch: RaggedBatch, spec: AttentionSpec
) -> tuple[Array, Cache]:
    """See kernels.attention.Backend."""
    cache = Cache(
        cache.k.at[batch.write_page, :, batch.write_offset].set(k.astype(cache.k.dtype)),
        cache.v.at[batch.write_page, :, batch.write_offset].set(v.astype(cache.v.dtype)),
    )
    num_rows = batch.page_table.shape[0]
    out = _decode(q[:num_rows], cache, batch, spec)
    if q.shape[0] > num_rows:  # else every row has one token at most
        out = jnp.pad(out, ((0, q.shape[0] - num_rows), (0, 0), (0, 0), (0, 0)))
        out = _prefill(q, out, cache, batch, spec)
    return out, cache


class _Softmax(NamedTuple):
    """A softmax-weighted sum in the making, in float32: maximum [..., 1], sum [..., 1], weighted values [..., D]."""

    maximum: Array
    total: Array
    value: Array


def _start(shape: tuple[int, ...]) -> _Softmax:
    column = (*shape[:-1], 1)
    return _Softmax(jnp.full(column, -1e30), jnp.zeros(column), jnp.zeros(shape))


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


def _decode(q: Array, cache: Cache, batch: RaggedBatch, spec: AttentionSpec) -> Array:
    """q [S, K, G, D], one token a row; rows that are no decodes give zeros."""
    num_rows = q.shape[0]
    chunk = min(max(1 << (DECODE_CHUNK // num_rows).bit_length() - 1, 16), KV_CHUNK)
    lens = jnp.where(jnp.arange(num_rows) < batch.num_decodes, batch.kv_lens, 0)
    first = jnp.zeros_like(lens) if spec.window is None else jnp.maximum(lens - spec.window, 0)
    begin = jnp.min(jnp.where(lens > 0, first, lens.max())) // chunk
    end = -(-lens.max() // chunk)

    def body(i: Array, state: _Softmax) -> _Softmax:
        k, v = (_gather(pages, batch.page_table, i, chunk) for pages in cache)
        at = i * chunk + jnp.arange(chunk)[None, :]
        visible = (at < lens[:, None]) & (at >= first[:, None])
        return _extend(state, q, k, v, visible[:, None, None, :], spec)

    return _finish(jax.lax.fori_loop(begin, end, body, _start(q.shape)), q.dtype)


def _prefill(q: Array, out: Array, cache: Cache, batch: RaggedBatch, spec: AttentionSpec) -> Array:
    """q, out [T, K, G, D] -> out with the rows from num_decodes on filled in."""
    num_tokens, K, G, D = q.shape
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
            k, v = (_gather(pages, batch.page_table[row], i, KV_CHUNK) for pages in cache)
            at = i * KV_CHUNK + jnp.arange(KV_CHUNK)
            visible = at[None, :] <= position[:, None]
            if spec.window is not None:
                visible &= at[None, :] > position[:, None] - spec.window
            visible = jnp.tile(visible, (G, 1))[None]
            return _extend(state, taken, k, v, visible, spec)

        state = jax.lax.fori_loop(first // KV_CHUNK, -(-last // KV_CHUNK), body, _start(taken.shape))
        result = _finish(state, q.dtype).reshape(K, G, block, D).transpose(2, 0, 1, 3)
        return jax.lax.dynamic_update_slice(out, result, (start, 0, 0, 0))

    def attend_row(row: Array, out: Array) -> Array:
        blocks = -(-(batch.cu_q_lens[row + 1] - batch.cu_q_lens[row]) // block)
        return jax.lax.fori_loop(0, blocks, lambda index, out: attend_block(row, index, out), out)

    return jax.lax.fori_loop(batch.num_decodes, batch.num_rows, attend_row, out)[:num_tokens]
