"""Prefill attention for Hopper GPUs, in Pallas-Mosaic-GPU: one warpgroup fetches pages while two others multiply.

A program per multiprocessor takes work after work: a block of queries of one KV head against all that they see, in
tiles of the context. The fetching warpgroup copies queries and tiles to shared memory, as far ahead as stages are free.
The multiplying ones have half of the block each, and one multiplies while the other takes its softmax: its turn is the
values of a tile together with the scores of the next (FlashAttention-3, Shah et al. 2024).
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels.cuda.blocks import ALIGNED, aligned_blocks
from kernels.cuda.mosaic import why_not_this_jax
from kernels.cuda.tile import LOG2_E, NOTHING

if TYPE_CHECKING:
    from kernels.attention import AttentionSpec, RaggedBatch

ROWS = 64  # of queries in one warpgroup: what its matrix instruction takes
GROUPS = 2  # warpgroups that multiply; the next one fetches
QUEUES = 2  # places for a work's queries: the next work's come while these are used
CONTEXT = 128  # tokens in a tile of keys or values
RING = 1 << 17  # bytes of shared memory for tiles
NEAR = 1 << 25  # bytes of keys and values that stay in the second-level cache while their rows' blocks are taken
REGISTERS = (240, 24)  # of a thread that multiplies, and of one that fetches


class Plan(NamedTuple):
    """What a kernel is compiled for. A warpgroup's rows are `each` queries of `together` heads, head by head."""

    spec: AttentionSpec
    page_size: int
    context: int
    stages: int  # places for a tile
    programs: int
    interpret: bool = False

    @property
    def together(self) -> int:
        return heads_together(self.spec.group)

    @property
    def each(self) -> int:
        return ROWS // self.together // ALIGNED * ALIGNED

    @property
    def units(self) -> int:
        """Works that a block of queries makes, over heads."""
        return self.spec.num_kv_heads * self.spec.group // self.together

    @property
    def piece(self) -> int:
        """Tokens of a tile that one copy brings."""
        return min(self.page_size, self.context)

    @property
    def pieces(self) -> int:
        return self.context // self.piece

    @property
    def shares(self) -> int:
        """Warps that copy keys; as many others copy values."""
        return min(2, self.pieces)


class Work(NamedTuple):
    """A block of queries of some heads; positions and tokens are those of its first query, `skipped` or not."""

    row: Any
    token: Any
    position: Any
    count: Any
    skipped: Any  # of the queries, the first that are not this row's
    head: Any
    kv_head: Any
    first: Any  # tile
    end: Any  # tile after the last


class Shared(NamedTuple):
    """What the warpgroups share: tiles, and a barrier for each that says that it has come, and that it may go."""

    q: Any
    k: Any
    v: Any
    out: Any
    q_ready: Any
    q_free: Any
    k_ready: Any
    k_free: Any
    v_ready: Any
    v_free: Any
    turn: Any


def supports(spec: AttentionSpec, page_size: int, kv_dtype: str) -> str | None:
    """-> None, or why this GPU or this JAX cannot run the kernel, or the kernel that attention."""
    device = jax.local_devices()[0]
    if device.platform != "gpu" or not str(device.compute_capability).startswith("9."):
        return "no GPU of compute capability 9 here"
    if why := why_not_this_jax():
        return why
    if kv_dtype not in ("bfloat16", "float16"):
        return f"no KV cache of dtype {kv_dtype}"
    if spec.head_dim not in (64, 128):
        return f"no heads of {spec.head_dim}: 64 and 128 only"
    if page_size < ALIGNED:
        return f"no pages of {page_size} tokens: {ALIGNED} at least"
    return None


def heads_together(group: int) -> int:
    """-> how many of a KV head's query heads share a warpgroup, which has 8 rows for each at least."""
    return max(n for n in range(1, ROWS // ALIGNED + 1) if group % n == 0)


# Compiled by itself, it is traced and lowered once for all layers of a step.
@partial(jax.jit, static_argnames=("spec", "multiprocessors", "context", "interpret"))
def prefill(
    q: Array,
    cache: Array,
    batch: RaggedBatch,
    spec: AttentionSpec,
    *,
    multiprocessors: int,
    sinks: Array | None = None,
    context: int = CONTEXT,
    interpret: bool = False,
) -> Array:
    """q [T, K, G, D], cache [pages, 2, K, page_size, D] of the same dtype, sinks [K, G] -> [T, K, G, D].

    Undefined where a token's row is not from num_decodes on.
    """
    T, K, G, D = q.shape
    stages = RING // (2 * context * D * cache.dtype.itemsize)
    plan = Plan(spec, cache.shape[3], context, stages, multiprocessors, interpret)
    near = max(NEAR // (2 * K * D * cache.dtype.itemsize), 1)
    blocks = aligned_blocks(batch, T, GROUPS * plan.each, near)
    works = jnp.sum(blocks[3] > 0, dtype=jnp.int32)[None] * plan.units
    plan = plan._replace(programs=min(multiprocessors, blocks.shape[1] * plan.units))
    queries = jnp.pad(q.reshape(T, K * G, D), ((0, -T % ALIGNED), (0, 0), (0, 0)))

    def prefill_works(works: Any, blocks: Any, table: Any, queries: Any, cache: Any, *rest: Any) -> None:
        sinks_ref, (out, *scratch) = (None, rest) if sinks is None else (rest[0], rest[1:])
        shared = Shared(*scratch)
        program, group = lax.axis_index("program"), lax.axis_index("group")
        for_each = partial(for_each_work, plan, works, blocks, program)

        @pl.when(group == GROUPS)
        def _fetch() -> None:
            plgpu.set_max_registers(REGISTERS[1], action="decrease")

            @plgpu.warp_map
            def _warp(index: Any) -> None:
                for warp in range(2 * plan.shares):
                    part, share = divmod(warp, plan.shares)
                    mine = partial(fetch, plan, shared, part, share, table, queries, cache)

                    @pl.when(index == warp)
                    def _one(mine: Any = mine, part: int = part) -> None:
                        for_each(mine)
                        for barrier in frees(plan, shared, part):
                            plgpu.barrier_wait(barrier)

        @pl.when(group < GROUPS)
        def _multiply() -> None:
            plgpu.set_max_registers(REGISTERS[0], action="increase")
            for barrier in frees(plan, shared, 0) + frees(plan, shared, 1):
                plgpu.barrier_arrive(barrier)
            pl.when(group == 1)(lambda: plgpu.barrier_arrive(shared.turn.at[0]))
            done = for_each(partial(multiply, plan, shared, group, sinks_ref, out))
            plgpu.wait_smem_to_gmem(0)
            pl.when(done > 0)(lambda: plgpu.barrier_arrive(shared.q_free.at[lax.rem(done - 1, QUEUES)]))
            pl.when(group == 0)(lambda: plgpu.barrier_wait(shared.turn.at[0]))

    run = plgpu.kernel(
        prefill_works,
        out_type=jax.ShapeDtypeStruct(queries.shape, q.dtype),
        grid=(plan.programs,),
        grid_names=("program",),
        num_threads=GROUPS + 1,
        thread_name="group",
        scratch_types=scratch_types(plan, q.dtype),
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            unsafe_no_auto_barriers=True,  # nobody reads what it wrote to shared memory
        ),
        interpret=plgpu.InterpretGPUParams() if interpret else None,  # type: ignore[attr-defined]
    )
    given = [] if sinks is None else [sinks.reshape(-1).astype(jnp.float32)]
    return run(works, blocks, batch.page_table, queries, cache, *given)[:T].reshape(q.shape)


def scratch_types(plan: Plan, dtype: jnp.dtype) -> list[Any]:
    """-> those of Shared."""
    D, context, stages = plan.spec.head_dim, plan.context, plan.stages
    tiled: dict[str, Any] = {"transforms": (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))}
    tile = plgpu.SMEM((stages, context, D), dtype, **tiled)
    copied = plgpu.Barrier(num_arrivals=plan.pieces, num_barriers=stages)
    used = plgpu.Barrier(num_arrivals=GROUPS, num_barriers=stages)
    return [
        plgpu.SMEM((QUEUES, GROUPS, ROWS, D), dtype, **tiled),
        tile,
        tile,
        plgpu.SMEM((GROUPS, ROWS, D), dtype),  # plain, so that any number of rows can be copied from any on
        plgpu.Barrier(num_arrivals=GROUPS * plan.together, num_barriers=QUEUES),
        plgpu.Barrier(num_arrivals=GROUPS, num_barriers=QUEUES),
        copied,
        used,
        copied,
        used,
        plgpu.Barrier(num_barriers=GROUPS),
    ]


def frees(plan: Plan, shared: Shared, part: int) -> list[Any]:
    """-> the barriers of what may be overwritten: queries and keys, or values."""
    if part:
        return [shared.v_free.at[slot] for slot in range(plan.stages)]
    queues = [shared.q_free.at[queue] for queue in range(QUEUES)]
    return [*queues, *(shared.k_free.at[slot] for slot in range(plan.stages))]


def for_each_work(plan: Plan, works: Any, blocks: Any, program: Any, do: Any) -> Any:
    """do(work, i, step) -> step, for each of a program's works; `step` counts tiles from its start on.

    -> how many works those were.
    """
    P, total = plan.programs, works[0]
    rounds = lax.div(total, P)
    # Works come in order of their length: every other round goes backwards, for equal sums.
    place = lambda i: i * P + jnp.where(i & 1 == 0, program, P - 1 - program)

    def described(i: Any) -> Any:
        block = jnp.minimum(lax.div(place(i), plan.units), blocks.shape[1] - 1)
        return tuple(blocks[part, block] for part in range(5))

    def turn(i: Any, carry: Any) -> Any:
        step, (row, token, position, count, skipped) = carry
        following = described(i + 1)  # a work early: nothing waits for it
        token = lax.div(token, ALIGNED) * ALIGNED  # so that the compiler sees it
        head = lax.rem(place(i), plan.units) * plan.together
        window = plan.spec.window
        first = jnp.int32(0)
        if window is not None:
            first = lax.div(jnp.maximum(position + skipped - window + 1, 0), plan.context)
        end = lax.div(position + count + plan.context - 1, plan.context)
        work = Work(row, token, position, count, skipped, head, lax.div(head, plan.spec.group), first, end)
        return do(work, i, step), following

    mine = rounds + jnp.clip(total - place(rounds), 0, 1)
    lax.fori_loop(0, mine, turn, (jnp.int32(0), described(0)))
    return mine


def fetch(
    plan: Plan, shared: Shared, part: int, share: int, table: Any, queries: Any, cache: Any,
    work: Work, i: Any, step: Any,
) -> Any:  # fmt: skip
    """Copy a share of a work's queries and keys, part 0, or of its values, part 1. -> the next step."""
    shift = plan.page_size.bit_length() - 1
    last_page = (work.position + work.count - 1) >> shift
    into, ready, free = (shared.v, shared.v_ready, shared.v_free) if part else (shared.k, shared.k_ready, shared.k_free)
    mine = range(share, plan.pieces, plan.shares)

    def tile(j: Any, step: Any) -> Any:
        slot, begin = lax.rem(step, plan.stages), j * plan.context
        pages = [table[work.row, jnp.minimum((begin + i * plan.piece) >> shift, last_page)] for i in mine]
        inside = begin & (plan.page_size - 1) if plan.pieces == 1 else 0
        plgpu.barrier_wait(free.at[slot])
        for i, page in zip(mine, pages, strict=True):
            source = cache.at[page, part, work.kv_head, pl.ds(inside, plan.piece)]
            plgpu.copy_gmem_to_smem(source, into.at[slot, pl.ds(i * plan.piece, plan.piece)], ready.at[slot])
        return step + 1

    if part == 0:
        queue = lax.rem(i, QUEUES)
        plgpu.barrier_wait(shared.q_free.at[queue])
        for group in range(share, GROUPS, plan.shares):
            for head in range(plan.together):
                source = queries.at[pl.ds(work.token + group * plan.each, plan.each), work.head + head]
                target = shared.q.at[queue, group, pl.ds(head * plan.each, plan.each)]
                plgpu.copy_gmem_to_smem(source, target, shared.q_ready.at[queue])
    return lax.fori_loop(work.first, work.end, tile, step)


def multiply(plan: Plan, shared: Shared, group: Any, sinks: Any, out: Any, work: Work, i: Any, step: Any) -> Any:
    """A warpgroup's half of a work: its scores, their softmax and the weighted values, to `out`. -> the next step."""
    spec, D, context, stages = plan.spec, plan.spec.head_dim, plan.context, plan.stages
    dtype, queue = shared.q.dtype, lax.rem(i, QUEUES)
    scale = LOG2_E * (spec.scale if spec.soft_cap is None else 1.0)
    by_row = plgpu.Layout.WGMMA.reduce(1)
    full = lambda value: plgpu.layout_cast(jnp.full((ROWS,), value, jnp.float32), by_row)
    spread = lambda x, width: lax.broadcast_in_dim(x, (ROWS, width), (0,))
    lane = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=by_row)
    position = work.position + group * plan.each + lax.rem(lane, plan.each)

    def softmax(scores: Array, state: tuple[Array, Array], j: Any, masked: bool) -> Any:
        """-> weights, what the sums so far keep, and the maximum and the sum of weights, in powers of 2."""
        maximum, total = state
        if spec.soft_cap is not None:  # tanh(x) is 1 - 2 / (exp(2 x) + 1)
            power = jnp.exp2(scores * (2 * LOG2_E * spec.scale / spec.soft_cap))
            scores = spec.soft_cap * (1.0 - 2.0 / (power + 1.0))
        if masked:
            key = plgpu.broadcasted_iota(jnp.int32, (ROWS, context), 1, layout=plgpu.Layout.WGMMA)
            limit = spread(position - j * context, context)
            seen = key <= limit
            if spec.window is not None:
                seen &= key > limit - spec.window
            scores = jnp.where(seen, scores, NOTHING)
        new = jnp.maximum(maximum, jnp.max(scores, axis=1) * scale)
        keep = jnp.exp2(maximum - new)
        weights = jnp.exp2(scores * scale - spread(new, context))
        return weights, keep, (new, total * keep + jnp.sum(weights, axis=1))

    def scores_into(acc: Any, slot: Any) -> None:
        plgpu.wgmma(acc, shared.q.at[queue, group], shared.k.at[slot].transpose((1, 0)))

    def values_into(acc: Any, weights: Array, slot: Any) -> Any:
        """Add weighted values to acc; the interpreter, which lacks such an operand, gives them as an array."""
        if not plan.interpret:
            plgpu.wgmma(acc, weights, shared.v.at[slot])
            return ()
        product = jnp.dot(weights, shared.v[slot], preferred_element_type=jnp.float32)
        plgpu.commit_smem()
        return product

    my_turn = lambda: plgpu.barrier_wait(shared.turn.at[group])
    your_turn = lambda: plgpu.barrier_arrive(shared.turn.at[1 - group])

    def body(acc: Any) -> Any:
        def first_tile(ref: Any) -> Array:
            my_turn()
            scores_into(ref, lax.rem(step, stages))
            your_turn()
            return ref[...]

        def tile(masked: bool, j: Any, carry: Any) -> Any:
            """Scores of tile j and values of the one before it."""
            weights, state, step, value = carry
            slot, next_slot = lax.rem(step, stages), lax.rem(step + 1, stages)
            plgpu.barrier_wait(shared.k_ready.at[next_slot])
            plgpu.barrier_wait(shared.v_ready.at[slot])
            my_turn()

            def products(ref: Any) -> Any:
                scores_into(ref, next_slot)
                more = values_into(acc, weights, slot)
                your_turn()
                scores = plgpu.wgmma_accumulator_load(ref, wait_n=1)
                plgpu.barrier_arrive(shared.k_free.at[next_slot])
                found = softmax(scores, state, j, masked)
                plgpu.wgmma_wait(0)  # until then the product reads the registers that the next weights go to
                return found[0].astype(dtype), *found[1:], more

            weights, keep, state, more = pl.run_scoped(
                products, plgpu.WGMMAAccumulatorRef((ROWS, context), jnp.float32)
            )
            plgpu.barrier_arrive(shared.v_free.at[slot])
            if plan.interpret:
                value = (value + more) * spread(keep, D)
            else:
                acc[...] = acc[...] * spread(keep, D)
            return weights, state, step + 1, value

        plgpu.barrier_wait(shared.k_ready.at[lax.rem(step, stages)])
        plgpu.barrier_wait(shared.q_ready.at[queue])
        scores = pl.run_scoped(first_tile, plgpu.WGMMAAccumulatorRef((ROWS, context), jnp.float32))
        plgpu.barrier_arrive(shared.k_free.at[lax.rem(step, stages)])
        # The first maximum lies above what is masked, so that a tile of nothing else weighs nothing.
        weights, _, state = softmax(scores, (full(NOTHING * scale / 2), full(0.0)), work.first, masked=True)
        # By now the work before this has left its queries' place.
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        pl.when(i > 0)(lambda: plgpu.barrier_arrive(shared.q_free.at[lax.rem(i - 1, QUEUES)]))
        value = jnp.zeros((ROWS, D), jnp.float32) if plan.interpret else ()
        carry = weights.astype(dtype), state, step, value
        begin = work.first + 1
        # Up to here every query sees every token; then comes the diagonal.
        whole = begin if spec.window is not None else lax.div(work.position + work.skipped + 1, context)
        whole = jnp.clip(whole, begin, jnp.maximum(work.end, begin))
        carry = lax.fori_loop(begin, whole, partial(tile, False), carry)
        weights, state, last, value = lax.fori_loop(whole, work.end, partial(tile, True), carry)
        plgpu.barrier_wait(shared.v_ready.at[lax.rem(last, stages)])
        my_turn()
        more = values_into(acc, weights, lax.rem(last, stages))
        your_turn()
        value = value + more if plan.interpret else acc[...]
        plgpu.barrier_arrive(shared.v_free.at[lax.rem(last, stages)])
        return value, *state, last + 1

    value, maximum, total, step = pl.run_scoped(body, plgpu.WGMMAAccumulatorRef((ROWS, D), jnp.float32))
    if sinks is not None:
        sink = full(NOTHING)
        for head in range(plan.together):
            sink = jnp.where(lax.div(lane, plan.each) == head, sinks[work.head + head], sink)
        total += jnp.exp2(sink * LOG2_E - maximum)
    store(plan, shared, group, queue, (value * spread(1.0 / total, D)).astype(dtype), out, work)
    return step


def store(plan: Plan, shared: Shared, group: Any, queue: Any, value: Array, out: Any, work: Work) -> None:
    """Write a warpgroup's rows of the queries that are the work's, through the place of these queries if all are."""
    begin = group * plan.each
    done = jnp.clip(work.skipped - begin, 0, plan.each)
    left = jnp.clip(work.count - begin, 0, plan.each) - done

    @pl.when(left == plan.each)
    def _all() -> None:
        place = shared.q.at[queue, group]
        place[...] = value
        plgpu.commit_smem()
        for head in range(plan.together):
            target = out.at[pl.ds(work.token + begin, plan.each), work.head + head]
            plgpu.copy_smem_to_gmem(place.at[pl.ds(head * plan.each, plan.each)], target)

    @pl.when(left < plan.each)
    def _some() -> None:
        """Copies of 2^n of them, as their number says."""
        shared.out[group] = value
        plgpu.commit_smem()
        length, at = plan.each, done
        while length := length // 2:

            def copy(at: Any = at, length: int = length) -> None:
                for head in range(plan.together):
                    target = out.at[pl.ds(work.token + begin + at, length), work.head + head]
                    plgpu.copy_smem_to_gmem(shared.out.at[group, pl.ds(head * plan.each + at, length)], target)

            lax.switch(left & length, [lambda: None, copy])  # an index past the end is the last
            at += left & length
