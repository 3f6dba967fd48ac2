"""Paged attention on NVIDIA GPUs: the cache's layout, the write, and the choice of kernels and their tiles.

A layer's cache is one array [pages, 2, kv_heads, page_size, head_dim], keys then values: one scatter writes both, and a
head's part of a page is one piece of memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import Array

from kernels.cuda import hopper
from kernels.cuda.decode import decode, num_splits
from kernels.cuda.prefill import prefill
from kernels.cuda.prepare import prepare
from kernels.cuda.tile import Tiles, padded
from kernels.storage import KV_DTYPES, stored
from kernels.tuned import file_name, found_for

if TYPE_CHECKING:
    from kernels.attention import AttentionSpec, HeadInputs, RaggedBatch

LARGEST_HEAD = 256


def supports(spec: AttentionSpec, page_size: int, kv_dtype: str) -> str | None:
    """See kernels.attention.Backend."""
    if kv_dtype not in KV_DTYPES:
        return f"no KV cache of dtype {kv_dtype}"
    if page_size & (page_size - 1):
        return f"no pages of {page_size} tokens: powers of two only"
    if spec.value_dim is not None:
        return "no values that are parts of their keys"
    if not 16 <= spec.head_dim <= LARGEST_HEAD:
        return f"no heads of {spec.head_dim}: 16 to {LARGEST_HEAD} only"
    return None


def supports_hopper(spec: AttentionSpec, page_size: int, kv_dtype: str) -> str | None:
    """As `supports`, for attention whose prefill kernel is Hopper's own; everything else is shared."""
    return supports(spec, page_size, kv_dtype) or hopper.supports(spec, page_size, kv_dtype)


def cache_spec(spec: AttentionSpec, num_pages: int, page_size: int, kv_dtype: str) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((num_pages, 2, spec.num_kv_heads, page_size, spec.head_dim), kv_dtype)


def decode_tiles(spec: AttentionSpec, dtype: jnp.dtype, kv_dtype: jnp.dtype) -> Tiles:
    """-> the decode kernel's: 16 query rows at least, which is what a tensor core takes.

    With keys and values of one byte it is turns that take time, not bytes: of twice as many, by half as many threads.
    """
    rows = max(padded(spec.group), 16)
    wide = padded(spec.head_dim) * dtype.itemsize
    if kv_dtype.itemsize == 1 and dtype.itemsize == 2 and wide <= 256 and rows == 16:
        return Tiles(rows, 64, 2, 3)
    return Tiles(rows, 32, 4, 3 if wide <= 256 else 2)


def tuned_decode_tiles(spec: AttentionSpec, dtype: jnp.dtype, kv_dtype: jnp.dtype, rows: int, device: str) -> Tiles:
    """-> what scripts/tune_kernels.py found to be best for a device and so many rows, or else `decode_tiles`."""
    tiles, name = decode_tiles(spec, dtype, kv_dtype), decode_file(spec, kv_dtype, device)
    entry = found_for(name, rows)
    if entry is None:
        return tiles
    if not {"context", "warps", "stages"} <= entry.keys():
        raise ValueError(f"kernels/tuned/{name}: {entry} lacks context, warps or stages; remove the file or tune again")
    return Tiles(tiles.queries, entry["context"], entry["warps"], entry["stages"])


def decode_file(spec: AttentionSpec, kv_dtype: jnp.dtype, device: str) -> str:
    """-> the name of the file of the decode kernel's tiles."""
    shape = {"kv_heads": spec.num_kv_heads, "group": spec.group, "head_dim": spec.head_dim}
    return file_name("decode", shape, str(jnp.dtype(kv_dtype)), device)


def prefill_tiles(spec: AttentionSpec, dtype: jnp.dtype) -> Tiles:
    """-> the prefill kernel's: as large as registers and shared memory allow."""
    rows = max(padded(spec.group), 16)
    wide = padded(spec.head_dim) * dtype.itemsize
    if dtype.itemsize == 4:
        return Tiles(max(rows, 32), 32, 4, 2)
    return Tiles(max(rows, 128), 64, 4, 2) if wide <= 256 else Tiles(max(rows, 64), 32, 4, 2)


def update_and_attend(
    q: Array, k: Array, v: Array, cache: Array, batch: RaggedBatch, spec: AttentionSpec, **options: Any
) -> tuple[Array, Array]:
    """See kernels.attention.Backend; options are `attend`'s."""
    cache = write(k, v, cache, batch, options.get("kv_scales"))
    return attend(q, cache, batch, spec, **options), cache


def attend_product(
    inputs: HeadInputs, cache: Array, batch: RaggedBatch, spec: AttentionSpec, **options: Any
) -> tuple[Array, Array]:
    """See kernels.attention.Backend; options are `attend`'s."""
    given = {"kv_scales": options.get("kv_scales"), "interpret": options.get("interpret", False)}
    q, cache = prepare(inputs, cache, batch, spec, **given)
    return attend(q, cache, batch, spec, **options), cache


def attend(
    q: Array,
    cache: Array,
    batch: RaggedBatch,
    spec: AttentionSpec,
    *,
    sinks: Array | None = None,
    kv_scales: Array | None = None,
    interpret: bool = False,
    multiprocessors: int | None = None,
    tiles: tuple[Tiles | None, Tiles | None] = (None, None),
    hopper_prefill: bool = False,
) -> Array:
    """q [T, K, G, D], and a cache that holds the step's keys and values -> [T, K, G, D].

    `multiprocessors`: if not this GPU's; `tiles`: decode's and prefill's. `hopper_prefill`: where supports_hopper; it
    takes queries of the cache's dtype and no kv_scales, the general kernel takes the others.
    """
    tokens, rows, page_size = q.shape[0], batch.page_table.shape[0], cache.shape[3]
    flat = cache.reshape(-1, spec.head_dim)
    options: dict[str, Any] = {
        "page_size": page_size, "interpret": interpret, "sinks": sinks, "kv_scales": kv_scales,
    }  # fmt: skip
    processors: int = multiprocessors or jax.devices("gpu")[0].core_count  # type: ignore[assignment]
    out = None
    if tokens > rows:  # else every row has one token at most
        if hopper_prefill and q.dtype == cache.dtype and kv_scales is None:
            out = hopper.prefill(q, cache, batch, spec, sinks=sinks, multiprocessors=processors, interpret=interpret)
        else:
            out = prefill(q, flat, batch, spec, tiles=tiles[1] or prefill_tiles(spec, q.dtype), **options)
    splits = num_splits(rows, spec.num_kv_heads, batch.page_table.shape[1] * page_size, processors)
    device = jax.local_devices()[0].device_kind
    decoding = tiles[0] or tuned_decode_tiles(spec, q.dtype, cache.dtype, min(rows, tokens), device)
    return decode(q, out, flat, batch, spec, tiles=decoding, splits=splits, **options)


def write(k: Array, v: Array, cache: Array, batch: RaggedBatch, kv_scales: Array | None = None) -> Array:
    """Put k and v [T, K, D] where the batch says, in place if the cache is donated; what goes to page 0 is dropped.

    Rows of head_dim values are scattered over one flat axis: a scatter over two axes that are not next to each other
    may make XLA transpose, and so copy, the whole cache.
    """
    K, page_size, D = cache.shape[2:]
    flat = cache.reshape(-1, D)
    part = jnp.arange(2 * K, dtype=jnp.int32)[None, :]
    rows = (batch.write_page[:, None] * (2 * K) + part) * page_size + batch.write_offset[:, None]
    rows = jnp.where(batch.write_page[:, None] > 0, rows, flat.shape[0])
    scale = None if kv_scales is None else kv_scales.reshape(-1)
    both = stored(jnp.concatenate([k, v], axis=1), scale, cache.dtype)
    return flat.at[rows].set(both, mode="drop", unique_indices=True).reshape(cache.shape)
