"""Products of rows with the matrix of their own group: the mixture of experts' work, for rows sorted by expert.

XLA expands `jax.lax.ragged_dot` to products of every row with every group's matrix unless its backend knows groups,
as the TPU's does: for 64 groups on a CPU it takes ten times as long as the dense loop over all groups. So CPUs have a
loop over the groups that have rows, and NVIDIA GPUs a kernel of ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from kernels.cuda import grouped as cuda
from kernels.cuda import product
from kernels.product import reference
from kernels.quantized import QuantizedTensor

LARGEST_BLOCK = 32  # rows of one group that a turn of the loop multiplies: more is no faster on a CPU
SMALLEST_BLOCK = 8


def grouped_dot(x: Array, weight: Array | QuantizedTensor, sizes: Array, largest: int) -> Array:
    """Multiply sorted rows by their groups' matrices: x [R, D], weight [E, D, *F], sizes [E] i32 -> [R, *F], x's dtype.

    The first sizes[0] rows belong to group 0, and so on; what comes back for rows behind the last group is undefined.
    `largest`: the most rows that a group can have. A row's result does not depend on the other rows. NVIDIA GPUs
    unpack a quantized weight as they multiply, others group by group.
    """
    block = block_rows(x.shape[0], sizes.shape[0], largest)
    if isinstance(weight, QuantizedTensor):
        groups, *outputs = weight.outputs
        flat = jax.tree.map(lambda part: part.reshape(groups, -1, part.shape[-1]), weight)

        def each(x: Array, weight: QuantizedTensor, sizes: Array) -> Array:
            multiply = lambda rows, member: reference(rows, jax.tree.map(lambda part: part[member], weight), x.dtype)
            return looped(x, multiply, math.prod(outputs), sizes, block)

        on_cuda = product.grouped_product if product.has_groups(flat) else each
        return jax.lax.platform_dependent(x, flat, sizes, cuda=on_cuda, default=each).reshape(-1, *outputs)
    outputs = weight.shape[2:]
    loop = lambda x, weight, sizes: looped(x, lambda rows, member: rows @ weight[member], weight.shape[2], sizes, block)
    flat = weight.reshape(*weight.shape[:2], -1)
    y = jax.lax.platform_dependent(x, flat, sizes, tpu=jax.lax.ragged_dot, cuda=cuda.grouped_dot, default=loop)
    return y.reshape(-1, *outputs)


def num_groups(weight: Array | QuantizedTensor) -> int:
    """-> E."""
    return jax.tree.leaves(weight)[0].shape[0]


def block_rows(rows: int, groups: int, largest: int) -> int:
    """-> rows to multiply at a time: about what a group has on average, and never more than it can have."""
    average = 1 << max(rows // groups, 1).bit_length() - 1
    return min(largest, max(min(average, LARGEST_BLOCK), SMALLEST_BLOCK))


def looped(x: Array, multiply: Callable[[Array, Array], Array], columns: int, sizes: Array, block: int) -> Array:
    """As `grouped_dot`, by a loop over the groups that have rows, and in each over blocks of `block` rows.

    multiply(rows [block, D], group [] i32) -> [block, columns]. A group's last block may reach into the next group's
    rows, which that group then overwrites: groups go in order.
    """
    rows = x.shape[0]
    x = jnp.pad(x, ((0, block), (0, 0)))
    starts = jnp.cumsum(sizes) - sizes
    used = jnp.argsort(sizes == 0, stable=True)

    def group(index: Array, out: Array) -> Array:
        member = used[index]

        def turn(index: Array, out: Array) -> Array:
            start = starts[member] + index * block
            taken = jax.lax.dynamic_slice(x, (start, 0), (block, x.shape[1]))
            return jax.lax.dynamic_update_slice(out, multiply(taken, member), (start, 0))

        return jax.lax.fori_loop(0, -(-sizes[member] // block), turn, out)

    out = jnp.zeros((rows + block, columns), x.dtype)
    return jax.lax.fori_loop(0, jnp.sum(sizes > 0), group, out)[:rows]
