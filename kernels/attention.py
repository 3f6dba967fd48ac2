"""The attention interface: what a model asks for, what a ragged batch is, and the table of backends.

A backend owns the KV cache's layout, its writes and its reads. It is chosen once, at start; an explicit choice that is
not supported is an error, never a silent fallback.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
from flax import struct
from jax import Array

from kernels import xla
from kernels.cuda import attention as triton
from kernels.pallas import attention as pallas


@dataclass(frozen=True)
class AttentionSpec:
    """What one layer asks for. Each KV head serves `group` query heads; `scale` multiplies q.k.

    `window`: a token sees itself and window - 1 tokens before it. `soft_cap`: scores s become cap * tanh(s / cap).
    `value_dim`: a token's value is the first value_dim entries of its key, and only keys are stored (multi-head latent
    attention with absorbed projections, DeepSeek-V2 section 2.1); None: values are arrays of their own, of head_dim.
    """

    num_kv_heads: int
    group: int
    head_dim: int
    scale: float
    window: int | None = None
    soft_cap: float | None = None
    value_dim: int | None = None


@struct.dataclass
class Runs:
    """Which decodes of a batch follow each other in one sequence, for a backend that reads its pages once for all."""

    first: Array  # [R] i32: the first row of each run; runs may be of padding
    run_of: Array  # [S] i32: the run that a row belongs to
    longest: int = struct.field(pytree_node=False)  # rows of a run, at most


@struct.dataclass
class RaggedBatch:
    """T tokens of up to S sequences, row after row; rows with one token ("decodes") come first. All int32.

    A row may read pages that a row before it writes in the same step. Padding tokens write to page 0. With `runs`,
    which a backend may ignore, every row is a decode.
    """

    page_table: Array  # [S, P] the row's pages, in order; 0 beyond its end
    kv_lens: Array  # [S] tokens in the cache once this step has written its own; 0 for padding rows
    cu_q_lens: Array  # [S + 1] where each row's tokens start; the last is the number of tokens
    num_rows: Array  # [] rows that are no padding
    num_decodes: Array  # [] rows with one token
    write_page: Array  # [T] page that each token's key and value go to
    write_offset: Array  # [T] and its place in that page
    runs: Runs | None = None


@struct.dataclass
class HeadInputs:
    """What becomes q, k and v: a fused product [T, K, G + 2, D], of each KV head its queries, then its key and value.

    In this order: + bias; q and k times norm weights over their root mean square (Zhang & Sennrich 2019); rope's
    halves as pairs (Su et al. 2021). A value that is not finite becomes 0: a masked value still meets a weight of 0,
    and 0 * NaN is NaN, so one bad row would reach others through pages.
    """

    qkv: Array
    bias: Array | None = None  # [K, G + 2, D]
    q_norm: Array | None = None  # [D]
    k_norm: Array | None = None  # [D]
    rope: tuple[Array, Array] | None = None  # cos and sin, each [T, R] float32, for the first 2 R dimensions
    norm_eps: float = struct.field(pytree_node=False, default=1e-6)


class Backend(NamedTuple):
    """One implementation of paged attention.

    supports(spec, page_size, kv_dtype) -> None, or why not.
    cache_spec(spec, num_pages, page_size, kv_dtype) -> tree of ShapeDtypeStruct; pages are every leaf's first axis.
    update_and_attend(q [T, K, G, D], k [T, K, D], v [T, K, D], cache, batch, spec, *, sinks, kv_scales)
        -> (out [T, K, G, D], cache): writes k and v into their pages, then attends causally from each token to its
        sequence so far. With spec.value_dim, v is None and out [T, K, G, value_dim].
        sinks [K, G] float32 or None: the logit of one more key without a value in each head's softmax (GPT-OSS).
        kv_scales [2, K] float32 or None: what a head's stored keys and values are multiplied by when read; they are
        divided by it, and kept within the dtype's range, when written.
    attend_product(HeadInputs, cache, batch, spec, *, sinks, kv_scales) -> the same, from the fused product; None where
        a backend leaves that to the model.
    lesser: a backend for the same cache whose kernels compile in less time, for steps that matter less; None: itself.
    """

    name: str
    platforms: tuple[str, ...]  # where "auto" takes it
    supports: Callable[[AttentionSpec, int, str], str | None]
    cache_spec: Callable[[AttentionSpec, int, int, str], Any]
    update_and_attend: Callable[..., tuple[Array, Any]]
    attend_product: Callable[..., tuple[Array, Any]] | None = None
    lesser: Backend | None = None


_triton = Backend(
    "triton", ("gpu",), triton.supports, triton.cache_spec, triton.update_and_attend, triton.attend_product
)
_hopper = Backend(
    "hopper",
    ("gpu",),
    triton.supports_hopper,
    triton.cache_spec,
    partial(triton.update_and_attend, hopper_prefill=True),
    partial(triton.attend_product, hopper_prefill=True),
    lesser=_triton,
)
BACKENDS = {  # in the order in which "auto" tries them
    "hopper": _hopper,
    "triton": _triton,
    "tpu": Backend("tpu", ("tpu",), pallas.supports, pallas.cache_spec, pallas.update_and_attend),
    "xla": Backend("xla", ("cpu", "gpu", "tpu"), xla.supports, xla.cache_spec, xla.update_and_attend),
}


def choose_backend(name: str, platform: str, specs: set[AttentionSpec], page_size: int, kv_dtype: str) -> Backend:
    """-> the backend of that name, or for "auto" the first of the platform's that supports every layer.

    Errors: ValueError that says why, if the named one (or, for "auto", none) does.
    """
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"attention_backend: {name!r} is not one of {sorted(BACKENDS)}")
    reasons = []
    for backend in BACKENDS.values():
        if name == backend.name or (name == "auto" and platform in backend.platforms):
            problems = [why for spec in specs if (why := backend.supports(spec, page_size, kv_dtype))]
            if not problems:
                return backend
            reasons.append(f"{backend.name}: {problems[0]}")
    raise ValueError(f"attention_backend: none fits on {platform}: {'; '.join(reasons)}")


def copy_pages(caches: Any, sources: Array, destinations: Array) -> Any:
    """Copy whole pages in every layer; all reads come before all writes. sources, destinations: [C] i32."""
    return jax.tree.map(lambda pages: pages.at[destinations].set(pages[sources]), caches)
