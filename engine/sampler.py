"""From logits to tokens, inside the jitted step: logit edits, penalties, truncation, Gumbel-max, logprobs.

Everything is one executable. What no row of a batch asks for is skipped by `lax.cond` on a scalar, so that a greedy
batch pays for an argmax and no more; on a GPU, whose host waits for each condition, steps are plain or do it all.
Meanings and order are vLLM's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array, lax

from engine.request import MAX_BAD_WORD_TOKENS
from kernels.cuda.draw import keep_or_redraw

# Bits of SamplingInput.flags.
ACTIVE = 1  # the row samples at all
USES_EDITS = 2  # its slot has logit edits
USES_BAD_WORDS = 4  # its slot has bad words
WANTS_LOGPROBS = 8

GREEDY_BELOW = 1e-5  # temperatures below this are greedy
TOP_CHUNK = 64  # tokens whose maximum stands for them where the most likely tokens are looked for
_COUNT_CHUNK = 1024  # tokens of each sequence that one pass of the penalties counts


@struct.dataclass
class SamplingInput:
    """How each of R rows samples. Rows without ACTIVE cost nothing, whatever else they hold."""

    temperature: Array  # f32[R]; below GREEDY_BELOW: the most likely token
    top_k: Array  # i32[R]; 0 or less: off
    top_p: Array  # f32[R]; 1: off
    min_p: Array  # f32[R]; 0: off
    repetition_penalty: Array  # f32[R]; 1: off
    frequency_penalty: Array  # f32[R]; 0: off
    presence_penalty: Array  # f32[R]; 0: off
    seed: Array  # u32[R, 2]
    position: Array  # i32[R]; index in its sequence of the token to sample
    prompt_len: Array  # i32[R]
    slot: Array  # i32[R]; the row of SlotTables, read only if the row has penalties, edits or bad words
    flags: Array  # i32[R]; ACTIVE | USES_EDITS | USES_BAD_WORDS | WANTS_LOGPROBS


@struct.dataclass
class SlotTables:
    """What some requests need beside their row of SamplingInput, by slot. `slots.slot_row` makes one slot's part.

    Edits are added to logits, -inf bans. With `edit_allow` only tokens named by an edit that applies survive; one that
    bans them still wins for as long as it lasts.
    """

    tokens: Array  # i32[slots, max_model_len]; prompt and outputs, valid below SamplingInput.position
    edit_ids: Array  # i32[slots, MAX_LOGIT_EDITS]; the vocabulary's size where unused
    edit_values: Array  # f32[slots, MAX_LOGIT_EDITS]
    edit_until: Array  # i32[slots, MAX_LOGIT_EDITS]; the edit applies at positions below
    edit_allow: Array  # bool[slots]
    bad_words: Array  # i32[slots, MAX_BAD_WORDS, MAX_BAD_WORD_TOKENS]; each right-aligned, -1 on its left


@struct.dataclass
class SampleOutput:
    """Logprobs are natural logarithms of the raw softmax, before any edit; zeros unless an active row wants them, and
    None where the whole step is plain."""

    token: Array  # i32[R]; -1: inactive, or no token can be told (NaN, +inf, nothing finite): fail that request alone
    logprob: Array | None  # f32[R], of the token
    rank: Array | None  # i32[R]; 1 + how many tokens have a larger raw logprob
    top_ids: Array | None  # i32[R, num_logprobs], the most likely first
    top_logprobs: Array | None  # f32[R, num_logprobs]


def sample(
    logits: Array, inp: SamplingInput, tables: SlotTables, *, num_logprobs: int = 20, plain: bool = False
) -> SampleOutput:
    """One token for each row.

    logits: f32[R, V]. A row's token depends on its own logits, parameters, seed and position alone: not on where in
    which batch it is. Random rows take the argmax of filtered logits + Gumbel noise, which draws from their softmax.
    `plain`: every row's request `is_plain`; what that rules out is not even compiled.
    """
    active = _has(inp, ACTIVE)
    edited = logits if plain else edited_logits(logits, inp, tables)
    # XLA's maximum may drop a NaN: what no token can be told of counts as +inf.
    best = jnp.max(jnp.where(logits < jnp.inf, edited, jnp.inf), axis=1)
    sound = jnp.isfinite(best)
    token = lax.platform_dependent(edited, best, inp, cuda=_draw_and_check, default=_draw)
    if plain:
        return SampleOutput(jnp.where(active & sound, token, -1), None, None, None, None)

    wanted = jnp.any(active & _has(inp, WANTS_LOGPROBS))
    compute = lambda logits, token: raw_logprobs(logits, token, num_logprobs)
    nothing = lambda logits, token: jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(compute, logits, token)
    )
    where_wanted = lambda logits, token: lax.cond(wanted, compute, nothing, logits, token)
    logprobs = lax.platform_dependent(logits, token, cuda=compute, default=where_wanted)
    return SampleOutput(jnp.where(active & sound, token, -1), *logprobs)


def _draw(edited: Array, best: Array, inp: SamplingInput) -> Array:
    """-> i32[R]: a token of each row, from edited f32[R, V] and its maximum f32[R]; any, where that is not finite."""
    score = lambda: filtered_logits(edited, inp) + _noise(inp, edited.shape[1])
    choose = lambda: _first_highest(score())
    return lax.cond(jnp.any(_is_random(inp)), choose, lambda: _first_index(edited == best[:, None]))


def _draw_and_check(edited: Array, best: Array, inp: SamplingInput) -> Array:
    """As `_draw`, for a GPU, whose host would have to wait for every condition: drawn from all tokens first."""
    token = lax.argmax(_scaled(edited, best, inp) + _noise(inp, edited.shape[1]), 1, jnp.int32)
    keys = _noise_keys(inp.seed, inp.position)
    return keep_or_redraw(
        edited, token, best, _temperature(inp), inp.top_k, inp.top_p, inp.min_p, keys, _is_cut(inp), noise=_gumbel
    )


def _noise(inp: SamplingInput, vocab_size: int) -> Array:
    return jnp.where(_is_random(inp)[:, None], gumbel(inp.seed, inp.position, vocab_size), 0.0)


def edited_logits(logits: Array, inp: SamplingInput, tables: SlotTables) -> Array:
    """-> f32[R, V]: what greedy decoding takes the argmax of; edits, bad words, then penalties applied to f32[R, V]."""
    active = _has(inp, ACTIVE)
    penalised = (inp.repetition_penalty != 1) | (inp.frequency_penalty != 0) | (inp.presence_penalty != 0)
    steps = (
        (_apply_edits, active & _has(inp, USES_EDITS)),
        (_ban_bad_words, active & _has(inp, USES_BAD_WORDS)),
        (partial(_penalise, chunk=_COUNT_CHUNK), active & penalised),
    )

    def where_wanted(logits: Array) -> Array:
        for step, rows in steps:
            apply = lambda x, step=step, rows=rows: step(x, rows, inp, tables)
            logits = lax.cond(jnp.any(rows), apply, lambda x: x, logits)
        return logits

    def default(logits: Array) -> Array:
        wanted = steps[0][1] | steps[1][1] | steps[2][1]
        return lax.cond(jnp.any(wanted), where_wanted, lambda x: x, logits)

    def cuda(logits: Array) -> Array:  # without conditions and loops of unknown length: the host would wait for each
        logits = _ban_bad_words(_apply_edits(logits, steps[0][1], inp, tables), steps[1][1], inp, tables)
        return _penalise(logits, steps[2][1], inp, tables, chunk=tables.tokens.shape[1])

    return lax.platform_dependent(logits, cuda=cuda, default=default)


def filtered_logits(edited: Array, inp: SamplingInput) -> Array:
    """-> f32[R, V]: logits of the distribution that random rows draw from, -inf where min_p, top_k or top_p cut.

    edited: f32[R, V]. The result is edited / temperature, shifted so that each row's best token has 0, which keeps
    float32 precise where it matters. Greedy rows are shifted only.
    """
    scaled = _scaled(edited, jnp.max(edited, axis=1), inp)
    cut = _is_cut(inp)
    return lax.cond(jnp.any(cut), lambda x: _truncate(x, cut, inp), lambda x: x, scaled)


def _scaled(edited: Array, best: Array, inp: SamplingInput) -> Array:
    """-> f32[R, V]: logits over temperature, each row's best f32[R] at 0."""
    return (edited - best[:, None]) / _temperature(inp)[:, None]


def _temperature(inp: SamplingInput) -> Array:
    """-> f32[R]: 1 for greedy rows."""
    return jnp.where(_is_random(inp), inp.temperature, 1.0)


def raw_logprobs(logits: Array, token: Array, num_logprobs: int) -> tuple[Array, Array, Array, Array]:
    """-> logprob f32[R] and rank i32[R] of token i32[R], ids i32[R, n] and logprobs f32[R, n] of the n most likely."""
    log_sum = jax.nn.logsumexp(logits, axis=1, keepdims=True)
    logprobs = logits - log_sum
    chosen = jnp.take_along_axis(logprobs, token[:, None], axis=1)
    rank = 1 + jnp.sum(logprobs > chosen, axis=1, dtype=jnp.int32)
    top, top_ids = _top_k(logits, num_logprobs)
    return chosen[:, 0], rank, top_ids, top - log_sum


def _top_k(x: Array, k: int) -> tuple[Array, Array]:
    """As lax.top_k, x f32[R, V], without sorting rows: the k largest lie in the k chunks with the largest maxima.

    So do the first of equal ones: a chunk that comes later for its maximum is behind k tokens as large, each earlier.
    """
    rows, columns = x.shape
    if columns <= 4 * k * TOP_CHUNK:
        return lax.top_k(x, k)
    chunks = jnp.pad(x, ((0, 0), (0, -columns % TOP_CHUNK)), constant_values=-jnp.inf).reshape(rows, -1, TOP_CHUNK)
    _, best = lax.top_k(jnp.max(chunks, axis=2), k)
    best = jnp.sort(best, axis=1)  # then candidates are in the order of their columns
    candidates = jnp.take_along_axis(chunks, best[:, :, None], axis=1).reshape(rows, -1)
    top, at = lax.top_k(candidates, k)
    return top, jnp.take_along_axis(best, at // TOP_CHUNK, axis=1) * TOP_CHUNK + at % TOP_CHUNK


def prompt_logprobs(
    hidden_to_logits: Callable[[Array], Array],
    hidden: Array,
    next_tokens: Array,
    *,
    num_logprobs: int,
    chunk: int = 64,
) -> tuple[Array, Array, Array, Array]:
    """Raw logprobs of a prompt's tokens, in memory for the logits of `chunk` rows at a time.

    hidden_to_logits: [C, D] -> f32[C, V]. hidden: [T, D]. next_tokens: i32[T], the token that follows each row.
    -> logprob f32[T], rank i32[T], top_ids i32[T, num_logprobs], top_logprobs f32[T, num_logprobs].
    """
    rows = hidden.shape[0]
    chunk = min(chunk, rows)
    pad = -rows % chunk
    hidden = jnp.pad(hidden, ((0, pad), (0, 0))).reshape(-1, chunk, hidden.shape[1])
    next_tokens = jnp.pad(next_tokens, (0, pad)).reshape(-1, chunk)
    out = lax.map(lambda x: raw_logprobs(hidden_to_logits(x[0]), x[1], num_logprobs), (hidden, next_tokens))
    logprob, rank, top_ids, top_logprobs = (x.reshape(-1, *x.shape[2:])[:rows] for x in out)
    return logprob, rank, top_ids, top_logprobs


def gumbel(seed: Array, position: Array, vocab_size: int) -> Array:
    """-> f32[R, V]: standard Gumbel noise, a pure function of (seed u32[R, 2], position i32[R], token id).

    A threefry key is made from seed and position; a token's bits are its id, mixed with one half of the key after
    the other. That is a fifth of the work of threefry for each token, and tests find nothing but noise in it.
    """
    first, second = jnp.split(_noise_keys(seed, position), 2, axis=1)
    return _gumbel(first, second, lax.broadcasted_iota(jnp.uint32, (seed.shape[0], vocab_size), 1))


def _noise_keys(seed: Array, position: Array) -> Array:
    """-> u32[R, 2], from seed u32[R, 2] and position i32[R]."""
    keys = jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(seed, impl="threefry2x32"), position)
    return jax.random.key_data(keys)


def _gumbel(first: Array, second: Array, token: Array) -> Array:
    """-> f32 like token, u32; the halves of a key, u32, broadcast to it."""
    bits = _mix(_mix(token ^ first) + second)
    # The smallest exponentials win, so uniforms are finest near 0: multiples of 2^-32, at its middle, never 0 or 1.
    uniform = jnp.minimum((bits.astype(jnp.float32) + 0.5) * 2.0**-32, 1 - 2.0**-24)
    return -jnp.log(-jnp.log1p(-uniform))


def _mix(x: Array) -> Array:
    """A bijection of u32 whose output bits each depend on all input bits: "lowbias32" of Chris Wellons' search for
    integer hashes (github.com/skeeto/hash-prospector)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def _has(inp: SamplingInput, flag: int) -> Array:
    return (inp.flags & flag) != 0


def _is_random(inp: SamplingInput) -> Array:
    return _has(inp, ACTIVE) & (inp.temperature >= GREEDY_BELOW)


def _is_cut(inp: SamplingInput) -> Array:
    return _is_random(inp) & ((inp.top_k > 0) | (inp.top_p < 1) | (inp.min_p > 0))


def _first_highest(scores: Array) -> Array:
    return _first_index(scores == jnp.max(scores, axis=1, keepdims=True))


def _first_index(mask: Array) -> Array:
    """-> i32[R]: the first true column; the last column where none is. Many times faster than argmax on a CPU, where
    XLA vectorizes the minimum of one array but not that of value and index."""
    last = mask.shape[1] - 1
    assert last < 2**24  # what float32 holds exactly: its minimum is faster than that of integers
    columns = lax.broadcasted_iota(jnp.int32, mask.shape, 1).astype(jnp.float32)
    return jnp.min(jnp.where(mask, columns, float(last)), axis=1).astype(jnp.int32)


def _row_ids(ids: Array) -> Array:
    return lax.broadcasted_iota(jnp.int32, ids.shape, 0)


def _apply_edits(logits: Array, on: Array, inp: SamplingInput, tables: SlotTables) -> Array:
    applies = on[:, None] & (inp.position[:, None] < tables.edit_until[inp.slot])
    ids = jnp.where(applies, tables.edit_ids[inp.slot], logits.shape[1])  # which is no id: dropped
    rows = _row_ids(ids)
    kept = jnp.broadcast_to(~(on & tables.edit_allow[inp.slot])[:, None], logits.shape)
    kept = kept.at[rows, ids].set(True, mode="drop")
    return jnp.where(kept, logits, -jnp.inf).at[rows, ids].add(tables.edit_values[inp.slot], mode="drop")


def _ban_bad_words(logits: Array, on: Array, inp: SamplingInput, tables: SlotTables) -> Array:
    words = tables.bad_words[inp.slot]
    prefixes, last = words[..., :-1], words[..., -1]
    columns = inp.position[:, None] + jnp.arange(1 - MAX_BAD_WORD_TOKENS, 0)[None]
    recent = tables.tokens[inp.slot[:, None], jnp.maximum(columns, 0)]
    recent = jnp.where(columns >= inp.prompt_len[:, None], recent, -2)[:, None]  # the prompt's equal no token
    complete = on[:, None] & (last >= 0) & jnp.all((prefixes < 0) | (prefixes == recent), axis=2)
    ids = jnp.where(complete, last, logits.shape[1])
    return logits.at[_row_ids(ids), ids].set(-jnp.inf, mode="drop")


def _penalise(logits: Array, on: Array, inp: SamplingInput, tables: SlotTables, *, chunk: int) -> Array:
    vocab_size, max_len = logits.shape[1], tables.tokens.shape[1]
    chunk = min(chunk, max_len)

    def count(i: Array | int, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        seen, outputs = carry
        columns = (i * chunk + jnp.arange(chunk))[None]
        tokens = tables.tokens[inp.slot[:, None], jnp.minimum(columns, max_len - 1)]
        tokens = jnp.where(on[:, None] & (columns < inp.position[:, None]), tokens, vocab_size)
        sampled = jnp.where(columns >= inp.prompt_len[:, None], tokens, vocab_size)
        rows = _row_ids(tokens)
        return seen.at[rows, tokens].set(True, mode="drop"), outputs.at[rows, sampled].add(1.0, mode="drop")

    none = jnp.zeros(logits.shape, bool), jnp.zeros(logits.shape, jnp.float32)
    if chunk == max_len:
        seen, outputs = count(0, none)
    else:  # as many passes as the longest sequence concerned needs, however long one may become
        longest = jnp.max(jnp.where(on, inp.position, 0))
        seen, outputs = lax.fori_loop(0, (longest + chunk - 1) // chunk, count, none)

    repetition = inp.repetition_penalty[:, None]
    logits = jnp.where(seen, jnp.where(logits > 0, logits / repetition, logits * repetition), logits)
    logits = logits - inp.frequency_penalty[:, None] * outputs
    return logits - inp.presence_penalty[:, None] * (outputs > 0).astype(jnp.float32)


def _truncate(scaled: Array, on: Array, inp: SamplingInput) -> Array:
    """scaled: f32[R, V], the best token of a row at 0. Each limit keeps the tokens above a threshold of the row's own,
    ties included, so that no sort is needed: thresholds are found by bisection."""
    vocab_size = scaled.shape[1]
    k = jnp.where(on & (inp.top_k > 0), jnp.minimum(inp.top_k, vocab_size), vocab_size)[:, None].astype(jnp.float32)
    min_p = jnp.where(on, inp.min_p, 0.0)[:, None]
    top_p = jnp.where(on, inp.top_p, 1.0)[:, None]
    everything = jnp.full(k.shape, -jnp.inf)

    def kth_largest() -> Array:
        reaches_k = lambda at: jnp.sum(jnp.where(scaled >= at, 1.0, 0.0), axis=1, keepdims=True) >= k
        return _largest(reaches_k, scaled.shape[0], -math.inf, 0.0)

    least = lax.cond(jnp.any(k < vocab_size), kth_largest, lambda: everything)
    odds = jnp.exp(scaled)  # to those of the best token, which stays even where exp(0) is not quite 1
    kept = (scaled >= least) & ((odds >= min_p) | (scaled == 0))
    # One array of odds for search and cut: computed twice, they could differ by a rounding.
    odds = lax.optimization_barrier(jnp.where(kept, odds, 0.0))

    def nucleus() -> Array:
        mass = lambda at: jnp.sum(jnp.where(odds >= at, odds, 0.0), axis=1, keepdims=True)
        target = top_p * mass(jnp.zeros(k.shape))
        return jnp.where(top_p < 1, _largest(lambda at: mass(at) >= target, scaled.shape[0], 0.0, 1.0), 0.0)

    least = lax.cond(jnp.any(top_p < 1), nucleus, lambda: jnp.zeros(k.shape))
    return jnp.where(kept & (odds >= least), scaled, -jnp.inf)


def _largest(reached: Callable[[Array], Array], rows: int, low: float, high: float) -> Array:
    """-> f32[rows, 1]: the largest number in [low, high] that is `reached` (bool[rows, 1]), if all below it are too.

    Bisects the numbers' images as unsigned integers, which are ordered as the numbers are: about 30 calls are exact.
    """
    start, stop = _image(low), _image(high) + 1

    def halve(_, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        inside, outside = bounds
        middle = inside + (outside - inside) // 2
        is_inside = reached(lax.optimization_barrier(_number(middle)))
        return jnp.where(is_inside, middle, inside), jnp.where(is_inside, outside, middle)

    bounds = jnp.full((rows, 1), start, jnp.uint32), jnp.full((rows, 1), stop, jnp.uint32)
    return _number(lax.fori_loop(0, (stop - start - 1).bit_length(), halve, bounds)[0])


def _image(number: float) -> int:
    """-> the float32's bits, flipped so that their order as u32 is that of the numbers."""
    bits = int(np.float32(number).view(np.uint32))
    return bits ^ (0xFFFFFFFF if bits >> 31 else 0x80000000)


def _number(image: Array) -> Array:
    """-> the f32 whose `_image` this u32 is."""
    bits = image ^ jnp.where(image >> 31 == 1, jnp.uint32(0x80000000), jnp.uint32(0xFFFFFFFF))
    return lax.bitcast_convert_type(bits, jnp.float32)
