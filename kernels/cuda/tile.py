"""What the GPU kernels share: loads of rows through the page table, one turn of a running softmax, and their launch."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

if TYPE_CHECKING:
    from kernels.attention import AttentionSpec

# Before each operation of Triton's dialect that JAX writes, MLIR's Python looks for a module of that dialect, by names
# that none has: JAX's lies elsewhere. One that is there, if empty, ends a search that takes a third of lowering.
sys.modules.setdefault("jaxlib.mlir.dialects.tt", ModuleType("jaxlib.mlir.dialects.tt"))
# JAX 0.11 deprecates this backend of Pallas; it says so when a kernel is lowered, long after it was called.
warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated", DeprecationWarning)

LOG2_E = math.log2(math.e)
NOTHING = -1e30  # the maximum of no scores: finite, so that a difference of two stays a number


class Tiles(NamedTuple):
    """A kernel's shape: rows of queries, tokens of context in a turn, warps of a program, stages of its pipeline."""

    queries: int
    context: int
    warps: int
    stages: int


class Softmax(NamedTuple):
    """A weighted sum in the making, in float32 and powers of 2: maximum [Q], sum [Q], weighted values [Q, D]."""

    maximum: Array
    total: Array
    value: Array


def launch(
    kernel: Callable[..., None],
    inputs: Sequence[Array],
    outputs: Any,
    *,
    grid: tuple[int, ...],
    tiles: Tiles,
    interpret: bool,
    aliases: dict[int, int] | None = None,
) -> Any:
    """Run a kernel over a grid. -> arrays like `outputs`, ShapeDtypeStructs. `aliases`: inputs that become outputs."""
    return pl.pallas_call(
        kernel,
        outputs,
        grid=grid,
        input_output_aliases=aliases or {},
        compiler_params=plgpu.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        interpret=interpret,
    )(*inputs)


def padded(size: int) -> int:
    """-> the power of two that holds `size`: Triton's arrays have no other sizes."""
    return pl.next_power_of_2(size)


def load_rows(ref: Any, rows: Array) -> Array:
    """ref [N, D], rows [R] -> [R, padded(D)], zeros beyond D."""
    at, columns = _elements(ref, rows)
    if padded(ref.shape[1]) == ref.shape[1]:
        return plgpu.load(at)
    zero = 0 if jnp.issubdtype(ref.dtype, jnp.integer) else 0.0  # Triton has no cast from integers to one-byte floats
    return plgpu.load(at, mask=columns < ref.shape[1], other=zero)


def store_rows(ref: Any, rows: Array, value: Array, keep: Array) -> None:
    """Write value [R, padded(D)] to the rows [R] of ref [N, D] that `keep` [R] names."""
    at, columns = _elements(ref, jnp.where(keep, rows, ref.shape[0]))
    plgpu.store(at, value, mask=keep[:, None] & (columns < ref.shape[1]))


def _elements(ref: Any, rows: Array) -> tuple[Any, Array]:
    """-> a view of ref [N, D] at its rows, [R, padded(D)], and the column of each element."""
    columns = lax.broadcasted_iota(jnp.int32, (rows.shape[0], padded(ref.shape[1])), 1)
    return ref.at[jnp.broadcast_to(rows[:, None], columns.shape), columns], columns


def exp2(x: Array, interpret: bool) -> Array:
    """The GPU's own instruction: what XLA takes for exp2 spends more on denormal numbers, zeros to a softmax."""
    if interpret:
        return jnp.exp2(x)
    out = jax.ShapeDtypeStruct(x.shape, x.dtype)
    asm = "ex2.approx.ftz.f32 $0, $1;"
    return plgpu.elementwise_inline_asm(asm, args=[x], constraints="=f,f", pack=1, result_shape_dtypes=[out])[0]


def options_of(sinks: Array | None, kv_scales: Array | None) -> list[Array]:
    """-> the arrays among a kernel's inputs that only some models have; `Options.take` finds them again."""
    return [x.reshape(-1) for x in (sinks, kv_scales) if x is not None]


class Options(NamedTuple):
    """What `options_of` passed on, seen from within a kernel: references to flat arrays, or None."""

    sinks: Any  # [K * G]
    scales: Any  # [2 * K]

    @staticmethod
    def take(refs: list[Any], sinks: Array | None, kv_scales: Array | None) -> Options:
        return Options(None if sinks is None else refs.pop(0), None if kv_scales is None else refs.pop(0))

    def scale_of(self, part: int, head: Array, kv_heads: int) -> Array | None:
        """-> what multiplies a head's stored keys (part 0) or values (part 1)."""
        return None if self.scales is None else plgpu.load(self.scales.at[part * kv_heads + head])

    def sinks_of(self, heads: Array) -> Array | None:
        return None if self.sinks is None else plgpu.load(self.sinks.at[heads])


def start(queries: int, head_dim: int) -> Softmax:
    zeros = jnp.zeros(queries, jnp.float32)
    return Softmax(zeros + NOTHING, zeros, jnp.zeros((queries, head_dim), jnp.float32))


def finish(state: Softmax, interpret: bool, sinks: Array | None = None, value_scale: Array | None = None) -> Array:
    """-> the weighted mean [Q, D] of the values. sinks [Q]: logits of a last key that has none."""
    maximum, total, value = state
    if sinks is not None:
        sinks = sinks.astype(jnp.float32) * LOG2_E
        highest = jnp.maximum(maximum, sinks)
        keep = exp2(maximum - highest, interpret)
        total, value = total * keep + exp2(sinks - highest, interpret), value * keep[:, None]
    mean = value / jnp.where(total > 0, total, 1.0)[:, None]
    return mean if value_scale is None else mean * value_scale


def attend(
    state: Softmax,
    q: Array,
    cache: Any,
    pages_of: Callable[[Array], Array],
    head: Array,
    spec: AttentionSpec,
    page_size: int,
    block: int,
    bounds: tuple[Any, Any, Any],
    visible: Callable[[Array], Array] | None,
    interpret: bool,
    key_scale: Array | None = None,
) -> Softmax:
    """Take in the context from bounds[0] on, turns bounds[1] to bounds[2] of `block` tokens each.

    q [Q, D]; cache [rows, D]; pages_of(positions [N]) -> their pages [N], for any position >= 0; visible(positions)
    -> what masks scores, broadcastable to [Q, N], or None where all is visible; key_scale []: multiplies stored keys.
    """
    first, begin, end = bounds
    shift = page_size.bit_length() - 1
    precision = lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    if cache.dtype.itemsize == 1 and q.dtype == jnp.bfloat16:  # which become float16 in half as many instructions
        largest = float(jnp.finfo(jnp.float16).max)
        q = jnp.clip(q.astype(jnp.float32), -largest, largest).astype(jnp.float16)
    raw: Any = spec.scale if key_scale is None else spec.scale * key_scale
    scale = raw * LOG2_E if spec.soft_cap is None else 1.0
    positions = lambda i: first + i * block + jnp.arange(block, dtype=jnp.int32)

    def dot(a: Array, b: Array, contract: int) -> Array:
        dims = (((1,), (contract,)), ((), ()))
        return lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)

    def turn(i: Array, carry: tuple[Softmax, Array]) -> tuple[Softmax, Array]:
        state, pages = carry
        at = positions(i)
        rows = ((pages * (2 * spec.num_kv_heads) + head) << shift) + (at & (page_size - 1))
        pages = pages_of(positions(i + 1))  # a turn early: keys and values wait for no load of the page table
        k = load_rows(cache, rows).astype(q.dtype)
        v = load_rows(cache, rows + spec.num_kv_heads * page_size).astype(q.dtype)
        scores = dot(q, k, 1)
        if spec.soft_cap is not None:  # tanh(x) is 1 - 2 / (exp(2 x) + 1)
            power = exp2(scores * (raw * (2 * LOG2_E / spec.soft_cap)), interpret)
            scores = (spec.soft_cap * LOG2_E) * (1.0 - 2.0 / (power + 1.0))
        if visible is not None:
            scores = jnp.where(visible(at), scores, -jnp.inf)  # the maximum stays finite: it starts at NOTHING
        maximum = jnp.maximum(state.maximum, jnp.max(scores, axis=1) * scale)
        weights = exp2(scores * scale - maximum[:, None], interpret)
        keep = exp2(state.maximum - maximum, interpret)
        total = state.total * keep + jnp.sum(weights, axis=1)
        value = state.value * keep[:, None] + dot(weights.astype(q.dtype), v, 0)
        return Softmax(maximum, total, value), pages

    return lax.fori_loop(begin, end, turn, (state, pages_of(positions(begin))))[0]
