"""From a fused product to attention's operands in one kernel: biases, norms, rope, and the write into the pages.

As XLA's fusions these are seven kernels a layer: a third of a prompt's time where layers are narrow.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from kernels.cuda.tile import Tiles, launch, padded
from kernels.storage import in_range

if TYPE_CHECKING:
    from kernels.attention import AttentionSpec, HeadInputs, RaggedBatch

BLOCK = 16  # tokens of a program, fewer if there are few


def prepare(
    inputs: HeadInputs, cache: Array, batch: RaggedBatch, spec: AttentionSpec, *, kv_scales: Array | None,
    interpret: bool,
) -> tuple[Array, Array]:  # fmt: skip
    """cache [pages, 2, K, page_size, D] -> q [T, K, G, D] as attention takes it, and the cache with k and v written.

    What goes to page 0 is dropped. Values that are not finite become 0 (`HeadInputs` says why).
    """
    T, K, members, D = inputs.qkv.shape
    G, page_size = members - 2, cache.shape[3]
    half = 0 if inputs.rope is None else inputs.rope[0].shape[1]
    block = min(BLOCK, max(padded(T) // 8, 1))
    optional: dict[str, Any] = {
        "cos": None if inputs.rope is None else inputs.rope[0],
        "sin": None if inputs.rope is None else inputs.rope[1],
        "bias": None if inputs.bias is None else inputs.bias.reshape(-1, D),
        "q_norm": None if inputs.q_norm is None else inputs.q_norm[None],
        "k_norm": None if inputs.k_norm is None else inputs.k_norm[None],
        "scales": None if kv_scales is None else kv_scales.reshape(-1),
    }
    optional = {name: x for name, x in optional.items() if x is not None}
    # A head in parts: the two halves that rope turns, and what it leaves alone.
    parts = [(start, size) for start, size in ((0, half), (half, half), (2 * half, D - 2 * half)) if size]

    def prepare_heads(pages: Any, offsets: Any, qkv: Any, old: Any, *refs: Any) -> None:
        given = dict(zip(optional, refs, strict=False))
        q, new = refs[-2:]
        head = pl.program_id(1)
        token = pl.program_id(0) * block + jnp.arange(block, dtype=jnp.int32)
        real = token < T
        page = plgpu.load(pages.at[token], mask=real, other=0)
        offset = plgpu.load(offsets.at[token], mask=real, other=0)

        def place(rows: Array, start: int, size: int) -> tuple[Array, Array, Array]:
            """-> rows and columns of a part's elements, and which of them there are."""
            column = lax.broadcasted_iota(jnp.int32, (block, padded(size)), 1)
            return jnp.broadcast_to(rows[:, None], column.shape), start + column, column < size

        def load(ref: Any, rows: Array, start: int, size: int, there: Array | None = None) -> Array:
            row, column, inside = place(rows, start, size)
            mask = inside if there is None else inside & there[:, None]
            return plgpu.load(ref.at[row, column], mask=mask, other=0).astype(jnp.float32)

        def read(member: int) -> list[Array]:
            x = [load(qkv, (token * K + head) * members + member, *part, real) for part in parts]
            if "bias" in given:
                row = jnp.full(block, head * members + member)
                x = [y + load(given["bias"], row, *part) for y, part in zip(x, parts, strict=True)]
            return x

        def normed(x: list[Array], name: str) -> list[Array]:
            if name not in given:
                return x
            mean = sum(jnp.sum(y * y, axis=1) for y in x) / D
            scale = lax.rsqrt(mean + inputs.norm_eps)[:, None]
            weights = [load(given[name], jnp.zeros(block, jnp.int32), *part) for part in parts]
            return [y * scale * weight for y, weight in zip(x, weights, strict=True)]

        def turned(x: list[Array]) -> list[Array]:
            if not half:
                return x
            cos, sin = (load(given[name], token, 0, half, real) for name in ("cos", "sin"))
            return [x[0] * cos - x[1] * sin, x[1] * cos + x[0] * sin, *x[2:]]

        def store(ref: Any, rows: Array, x: list[Array], keep: Array) -> None:
            for y, part in zip(x, parts, strict=True):
                row, column, inside = place(rows, *part)
                plgpu.store(ref.at[row, column], y.astype(ref.dtype), mask=inside & keep[:, None])

        def write(x: list[Array], part: int) -> None:
            if "scales" in given:
                x = [y / plgpu.load(given["scales"].at[part * K + head]) for y in x]
            rows = ((page * 2 + part) * K + head) * page_size + offset
            store(new, rows, [in_range(y, new.dtype, nearest) for y in x], real & (page > 0))

        for member in range(G):
            store(q, (token * K + head) * G + member, turned(normed(read(member), "q_norm")), real)
        write(turned(normed(read(G), "k_norm")), 0)
        write([jnp.where(jnp.abs(x) < jnp.inf, x, 0.0) for x in read(G + 1)], 1)

    flat = cache.reshape(-1, D)
    outputs = (jax.ShapeDtypeStruct((T * K * G, D), inputs.qkv.dtype), jax.ShapeDtypeStruct(flat.shape, flat.dtype))
    q, flat = launch(
        prepare_heads,
        [batch.write_page, batch.write_offset, inputs.qkv.reshape(-1, D), flat, *optional.values()],
        outputs,
        grid=(pl.cdiv(T, block), K),
        tiles=Tiles(0, 0, 4, 1),
        interpret=interpret,
        aliases={3: 1},
    )
    return q.reshape(T, K, G, D), flat.reshape(cache.shape)


def nearest(x: Array) -> Array:
    """-> x, float32 of less than 2^22, rounded to the nearest integer: Triton has no rounding."""
    shift = jnp.float32(3 << 22)  # where float32's last bit is worth 1
    return (x + shift) - shift
