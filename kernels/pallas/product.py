"""Products with quantized weights on TPUs: blocks of the weight are unpacked in VMEM, if the MXU does not take them.

What the MXU multiplies is the weight's own type where this generation has it and activations are as narrow, else
bfloat16. Numbers stay whole until then: sums are scaled, at each group of inputs or at the end.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.pallas.blocks import Chip, padded_bytes, this_chip
from kernels.pallas.layout import LANES, ceil_to
from kernels.quantized import QuantizedTensor, quantize_activations

FP8, INT8 = jnp.dtype(jnp.float8_e4m3fn), jnp.dtype(jnp.int8)
NARROW = {"v5e": (INT8,), "v5p": (INT8,), "v6e": (INT8,), "v7x": (FP8,)}  # what each generation's MXU takes
ROWS = 32  # tokens are padded to these: the rows of a tile of one-byte numbers
RUN = 2 * LANES  # inputs of a run of packed bytes
SHARE = 0.3  # of VMEM for blocks, each of which is there twice


class Blocks(NamedTuple):
    """Of one turn: tokens, outputs and inputs."""

    rows: int
    columns: int
    depth: int


class Kind(NamedTuple):
    """What a kernel is compiled for."""

    packed: bool  # two numbers in a byte, 0 to 15
    grouped: bool  # sums are scaled at each LANES inputs, else at the end
    together: int  # outputs that share a scale
    narrow: bool  # activations are as narrow as the weight
    less: int  # what is subtracted from each number


def supports(weight: QuantizedTensor) -> str | None:
    """-> None, or why the kernel cannot multiply a weight [N, K]."""
    layout, inputs, groups = weight.layout, weight.inputs, weight.scales.shape[-1]
    if layout.format not in ("int8", "fp8", "int4"):
        return f"no {layout.format}"
    if weight.minima is not None or weight.zeros is not None:
        return "no zeros or minima"
    if inputs % (LANES * layout.packing) or (layout.packing == 2 and layout.split != LANES):
        return f"no {inputs} inputs: multiples of {LANES * layout.packing} only, packed in runs of {LANES} bytes"
    if groups > 1 and inputs // groups != LANES:
        return f"no groups of {inputs // groups} inputs: {LANES} only"
    if layout.rows not in (1, LANES) and groups > 1:
        return f"no blocks of {layout.rows} outputs: 1 or {LANES} only"
    return None


def stays_narrow(weight: QuantizedTensor, chip: Chip | None = None) -> bool:
    """-> whether the MXU multiplies a weight's own type with activations as narrow."""
    generation = (chip or this_chip()).generation
    return weight.layout.activations != "none" and weight.values.dtype in NARROW.get(generation, ())


def choose_blocks(rows: int, columns: int, inputs: int, packing: int, chip: Chip) -> Blocks:
    """-> what fits: for few tokens as much of the weight as possible, for many as much of their product."""
    fits = lambda b: vmem_bytes(b, packing, inputs) <= SHARE * chip.vmem
    few = min(ceil_to(rows, ROWS), 512)
    depths = [d for d in range(RUN, inputs + 1, RUN) if inputs % d == 0 and d <= 4096] or [inputs]
    found = [Blocks(few, n, d) for n in (1024, 512, 256, 128) for d in reversed(depths) if n <= ceil_to(columns, LANES)]
    fitting = [b for b in found if fits(b)] or found[-1:]
    return max(fitting, key=lambda b: b.columns * b.depth)


def vmem_bytes(blocks: Blocks, packing: int, inputs: int) -> int:
    """-> bytes of a turn's blocks, twice, of the sums and of an unpacked weight."""
    rows, columns, depth = blocks
    weight = padded_bytes((columns, depth // packing), jnp.int8)
    scales = 2 * padded_bytes((columns, inputs // LANES), jnp.float32)
    ends = padded_bytes((rows, depth), jnp.bfloat16) + padded_bytes((rows, columns), jnp.float32)
    return 2 * (weight + scales + ends) + 4 * rows * columns + 2 * columns * depth


def matrix_product(
    x: Array,
    weight: QuantizedTensor,
    dtype: jnp.dtype,
    *,
    blocks: Blocks | None = None,
    chip: Chip | None = None,
    interpret: Any = False,
) -> Array:
    """x [M, K], weight [N, K] that `supports` takes -> [M, N] in `dtype`.

    Activations are made narrow where the layout says so and the MXU takes them; elsewhere they stay wide, which is
    nearer to the weight's own meaning. `blocks`, `chip`: if not those that are computed, and this one.
    """
    chip = chip or this_chip()
    layout, (M, K), N = weight.layout, x.shape, weight.values.shape[0]
    narrow = stays_narrow(weight, chip)
    groups = weight.scales.shape[1]
    kind = Kind(layout.packing == 2, groups > 1, layout.rows, narrow, 8 if layout.format == "int4" else 0)
    blocks = blocks or choose_blocks(M, N, K, layout.packing, chip)
    if narrow:
        values, x_scales = quantize_activations(x, layout)
    else:
        values, x_scales = x.astype(jnp.bfloat16), None
    rows = ceil_to(M, blocks.rows)
    more = lambda a: jnp.pad(a, ((0, rows - M), (0, 0)))
    scales = weight.scales.astype(jnp.float32)
    if not kind.grouped:  # by output, as a row
        scales = jnp.repeat(scales[:, 0], layout.rows, total_repeat_length=N)[None]
    given = [more(values), *([] if x_scales is None else [more(x_scales)]), weight.values, scales]
    vmem = min(int(2.5 * vmem_bytes(blocks, layout.packing, K)) + (8 << 20), int(0.9 * chip.vmem))
    return _launch(kind, blocks, given, N, K, jnp.dtype(dtype), vmem, interpret)[:M]


def _launch(
    kind: Kind, blocks: Blocks, given: list[Array], N: int, K: int, dtype: Any, vmem: int, interpret: Any
) -> Array:
    rows, columns, depth = blocks
    exact = kind.narrow and given[0].dtype == INT8 and not kind.grouped
    sums = jnp.dtype(jnp.int32 if exact else jnp.float32)
    grid = (given[0].shape[0] // rows, pl.cdiv(N, columns), K // depth)
    per_block = depth // LANES
    specs = [pl.BlockSpec((rows, depth), lambda m, n, k: (m, k))]
    if kind.narrow:
        specs.append(pl.BlockSpec((rows, given[1].shape[1]), lambda m, n, k: (m, 0)))
    specs.append(pl.BlockSpec((columns, depth // (1 + kind.packed)), lambda m, n, k: (n, k)))
    scratch = [pltpu.VMEM((rows, columns), sums)]
    if not kind.grouped:
        specs.append(pl.BlockSpec((1, columns), lambda m, n, k: (0, n)))
    elif kind.together > 1:
        specs.append(pl.BlockSpec(memory_space=pltpu.SMEM))
    else:
        specs.append(pl.BlockSpec((columns, K // LANES), lambda m, n, k: (n, 0)))
        scratch.append(pltpu.VMEM((K // LANES, columns), jnp.float32))

    def kernel(x: Any, *refs: Any) -> None:
        *of_x, weight, scales, out, total = refs[: len(refs) - len(scratch) + 1]
        by_group = refs[-1]  # scales turned round, where each output has its own
        n, k = pl.program_id(1), pl.program_id(2)

        @pl.when(k == 0)
        def _start() -> None:
            total[...] = jnp.zeros_like(total)
            if kind.grouped and kind.together == 1:
                by_group[...] = scales[...].T

        def of_group(at: Array) -> Array:
            """-> the scales of a group of inputs, [1, columns]."""
            if kind.together == 1:
                return by_group[pl.ds(at, 1), :]
            pieces = columns // kind.together
            last = N // kind.together - 1  # blocks past the end are multiplied with anything
            each = [scales[jnp.minimum(n * pieces + i, last), at] for i in range(pieces)]
            return jnp.concatenate([jnp.full((1, kind.together), scale) for scale in each], axis=1)

        for group in range(per_block if kind.grouped or kind.packed else 1):
            width = LANES if kind.grouped or kind.packed else depth
            part = dot(x[:, pl.ds(group * width, width)], numbers(kind, weight, group, width, x.dtype), sums)
            if not kind.grouped:
                total[...] += part
                continue
            at = k * per_block + group
            part = part * of_group(at)
            total[...] += part * lane(of_x[0][...], at) if of_x else part

        @pl.when(k == grid[2] - 1)
        def _end() -> None:
            y = total[...].astype(jnp.float32)
            if not kind.grouped:
                y = y * scales[...]
                if of_x:
                    y = y * of_x[0][...]
            out[...] = y.astype(out.dtype)

    return pl.pallas_call(
        kernel,
        name="quantized_product",
        out_shape=jax.ShapeDtypeStruct((given[0].shape[0], N), dtype),
        grid=grid,
        in_specs=specs,
        out_specs=pl.BlockSpec((rows, columns), lambda m, n, k: (m, n)),
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=vmem
        ),
        interpret=interpret,
    )(*given)


def numbers(kind: Kind, weight: Any, group: int, width: int, dtype: Any) -> Array:
    """-> a group of a block's inputs as the MXU takes them, [columns, width]."""
    if not kind.packed:
        values = weight[:, pl.ds(group * width, width)]
        return values if values.dtype == dtype else values.astype(jnp.float32).astype(dtype)
    packed = weight[:, pl.ds(group // 2 * LANES, LANES)].astype(jnp.int32)
    values = packed >> 4 if group % 2 else packed & 15
    return (values - kind.less).astype(jnp.float32).astype(dtype)


def dot(x: Array, weight: Array, sums: Any) -> Array:
    """x [M, D], weight [N, D] -> [M, N]."""
    return jax.lax.dot_general(x, weight, (((1,), (1,)), ((), ())), preferred_element_type=sums)


def lane(x: Array, index: Array) -> Array:
    """-> column `index` of x [R, n] float32: [R, 1]. A sum of one number and zeros, since lanes have no index."""
    here = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1) == index
    return jnp.sum(jnp.where(here, x, 0.0), axis=1, keepdims=True)
