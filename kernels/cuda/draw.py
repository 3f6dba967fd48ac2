"""Sampling from a cut distribution on NVIDIA GPUs: top_k, top_p and min_p without a sort, in one launch.

A token is drawn as the argmax of scaled logits + noise. The argmax over all tokens is nearly always among those that
the limits keep; then it is the argmax over them, too. So it is taken first, by whoever calls, and here each row only
finds out whether it may stay. Where not, everything at most as likely is out as well, and the next best is asked:
what comes out is exactly the argmax over the kept tokens (the pivots of Ye et al. 2024, "FlashInfer", section on
sampling; with noise that is fixed, a rejected token costs a turn and no new random numbers).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from kernels.cuda.tile import Tiles, launch

BLOCK = 2048  # tokens of a turn
WAYS = 8  # parts that a search cuts its interval into with each pass over a row
LOWEST, ZERO = 0x007FFFFF, 0x80000000  # the images (`_number`) of -inf and 0

Noise = Callable[[Array, Array, Array], Array]  # (key u32[], key u32[], token ids u32[N]) -> f32[N]


def keep_or_redraw(
    logits: Array, token: Array, best: Array, temperature: Array, top_k: Array, top_p: Array, min_p: Array,
    keys: Array, cut: Array, *, noise: Noise, interpret: bool = False,
) -> Array:  # fmt: skip
    """-> i32[R]: each row's `token` if its limits keep it, else what is drawn from those that they keep.

    logits f32[R, V]; token i32[R]: the argmax of (logits - best) / temperature + noise; best f32[R]: the largest
    logit; temperature f32[R], above 0; top_k i32[R], top_p f32[R], min_p f32[R]: as SamplingParams', 0, 1 and 0 are
    off; keys u32[R, 2]: for `noise`; cut bool[R]: rows without it keep their token, whatever else they hold, and so do
    those whose best logit is not finite.
    """
    rows, vocab = logits.shape

    def draw(
        logits: Any, token: Any, best: Any, temperature: Any, top_k: Any, top_p: Any, min_p: Any, keys: Any, cut: Any,
        out: Any,
    ) -> None:  # fmt: skip
        row = pl.program_id(0)
        token, best, temperature, top_k, top_p, min_p, cut = (
            plgpu.load(ref.at[row]) for ref in (token, best, temperature, top_k, top_p, min_p, cut)
        )
        first, second = (plgpu.load(keys.at[row * 2 + i]) for i in range(2))
        cut = jnp.where(jnp.abs(best) < jnp.inf, cut, 0)
        k = jnp.where((top_k > 0) & (top_k < vocab), top_k, vocab)
        by_k, by_p = (cut > 0) & (k < vocab), (cut > 0) & (top_p < 1)
        wanted = k.astype(jnp.float32)
        turns = lambda needed: jnp.where(needed, jnp.int32(pl.cdiv(vocab, BLOCK)), jnp.int32(0))

        def scaled(at: Array) -> Array:
            x = plgpu.load(logits.at[row * vocab + at], mask=at < vocab, other=-jnp.inf)
            return (x - best) / temperature

        def over(needed: Array, turn: Callable[[Array, Array, Any], Any], *start: float) -> list[Array]:
            """One pass over the row's scaled logits x and ids: turn(x, ids, carry), element by element."""
            lanes = jnp.arange(BLOCK, dtype=jnp.int32)
            body = lambda i, carry: turn(scaled(i * BLOCK + lanes), i * BLOCK + lanes, carry)
            return lax.fori_loop(0, turns(needed), body, [jnp.full(BLOCK, value, jnp.float32) for value in start])

        def sums(needed: Array, values: Callable[[Array], list[Array]], count: int) -> list[Array]:
            turn = lambda x, ids, carry: [total + value for total, value in zip(carry, values(x), strict=True)]
            return [jnp.sum(total) for total in over(needed, turn, *[0.0] * count)]

        def value_of(token: Array) -> Array:
            return (plgpu.load(logits.at[row * vocab + token]) - best) / temperature

        def kth_largest(needed: Array) -> Array:
            """-> a number that k tokens reach: between bounds of which the lower is reached by k or more."""

            def narrow(bounds: tuple[Array, Array]) -> tuple[Array, Array]:
                low, high = bounds
                width = jnp.maximum((high - low) // jnp.uint32(WAYS), jnp.uint32(1))
                marks = [jnp.minimum(low + width * jnp.uint32(i), high) for i in range(1, WAYS)]
                numbers = [_number(mark) for mark in marks]
                counts = sums(high > low, lambda x: [jnp.where(x >= n, 1.0, 0.0) for n in numbers], len(marks))
                for mark, count in zip(marks, counts, strict=True):
                    low = jnp.where(count >= wanted, mark, low)
                for mark, count in zip(marks[::-1], counts[::-1], strict=True):
                    high = jnp.where(count < wanted, mark, high)
                    high = jnp.where(count == wanted, low + jnp.uint32(1), high)  # exactly k reach the new low
                return low, high

            start = jnp.uint32(LOWEST), jnp.where(needed, jnp.uint32(ZERO + 1), jnp.uint32(LOWEST + 1))
            low, _ = lax.while_loop(lambda bounds: bounds[1] - bounds[0] > 1, narrow, start)
            return _number(low)

        x = value_of(token)
        (above,) = sums(by_k, lambda y: [jnp.where(y > x, 1.0, 0.0)], 1)
        search = by_k & (by_p | (above >= wanted))
        least = jnp.where(search, kth_largest(search), -jnp.inf)
        kept = lambda y: (y >= least) & ((jnp.exp(y) >= min_p) | (y == 0))
        mass = lambda y: jnp.where(kept(y), jnp.exp(y), 0.0)

        def may_stay(token: Array, total: Array) -> Array:
            """Whether the tokens that are likelier hold less than top_p of the kept ones' probability."""
            x = value_of(token)
            (likelier,) = sums(by_p, lambda y: [jnp.where(jnp.exp(y) > jnp.exp(x), mass(y), 0.0)], 1)
            return jnp.logical_not(by_p) | (likelier == 0) | (likelier < top_p * total)

        def redraw(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            _, _, floor = state

            def turn(y: Array, ids: Array, carry: list[Array]) -> list[Array]:
                highest, holder = carry
                score = y + noise(first, second, ids.astype(jnp.uint32))
                better = kept(y) & (y > floor) & (score > highest)
                return [jnp.where(better, score, highest), jnp.where(better, ids.astype(jnp.float32), holder)]

            highest, holder = over(cut > 0, turn, -jnp.inf, float(vocab - 1))
            top = highest == jnp.max(highest)
            token = jnp.min(jnp.where(top, holder, float(vocab - 1))).astype(jnp.int32)
            return token, may_stay(token, total), value_of(token)

        (total,) = sums(by_p, lambda y: [mass(y)], 1)
        stays = jnp.logical_not(cut > 0) | (kept(x) & may_stay(token, total))
        floor = jnp.where(kept(x), x, -jnp.inf)
        token, _, _ = lax.while_loop(lambda state: jnp.logical_not(state[1]), redraw, (token, stays, floor))
        plgpu.store(out.at[row], token)

    assert vocab < 2**24 and rows * vocab < 2**31  # token ids that float32 holds, offsets that int32 holds
    inputs = (logits, token, best, temperature, top_k, top_p, min_p, keys, cut.astype(jnp.int32))
    return launch(
        draw, [x.reshape(-1) for x in inputs], jax.ShapeDtypeStruct((rows,), jnp.int32),
        grid=(rows,), tiles=Tiles(0, 0, 8, 1), interpret=interpret,
    )  # fmt: skip


def _number(image: Array) -> Array:
    """u32 -> the float32 of that rank among all: the order of images is that of the numbers."""
    bits = image ^ jnp.where(image >= jnp.uint32(ZERO), jnp.uint32(ZERO), jnp.uint32(0xFFFFFFFF))
    return lax.bitcast_convert_type(bits, jnp.float32)
