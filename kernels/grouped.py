"""Products of rows with the matrix of their own group: the mixture of experts' work, for rows sorted by expert.

XLA expands `jax.lax.ragged_dot` to products of every row with every group's matrix unless its backend knows groups,
as the TPU's does: for 64 groups on a CPU it takes ten times as long as the dense loop over all groups. So CPUs have a
loop over the groups that have rows, and NVIDIA GPUs a kernel of ours.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from kernels.cuda import grouped as cuda

LARGEST_BLOCK = 32  # rows of one group that a turn of the loop multiplies: more is no faster on a CPU
SMALLEST_BLOCK = 8


def grouped_dot(x: Array, weight: Array, sizes: Array, largest: int) -> Array:
    """Multiply sorted rows by their groups' matrices: x [R, D], weight [E, D, F], sizes [E] i32 -> [R, F], x's dtype.

    The first sizes[0] rows belong to group 0, and so on; what comes back for rows behind the last group is undefined.
    `largest`: the most rows that a group can have. A row's result does not depend on the other rows.
    """
    loop = lambda x, weight, sizes: looped(x, weight, sizes, block_rows(x.shape[0], weight.shape[0], largest))
    return jax.lax.platform_dependent(x, weight, sizes, tpu=jax.lax.ragged_dot, cuda=cuda.grouped_dot, default=loop)


def block_rows(rows: int, groups: int, largest: int) -> int:
    """-> rows to multiply at a time: about what a group has on average, and never more than it can have."""
    average = 1 << max(rows // groups, 1).bit_length() - 1
    return min(largest, max(min(average, LARGEST_BLOCK), SMALLEST_BLOCK))


def looped(x: Array, weight: Array, sizes: Array, block: int) -> Array:
    """As `grouped_dot`, by a loop over the groups that have rows, and in each over blocks of `block` rows.

    A group's last block may reach into the next group's rows, which that group then overwrites: groups go in order.
    """
    rows = x.shape[0]
    x = jnp.pad(x, ((0, block), (0, 0)))
    starts = jnp.cumsum(sizes) - sizes
    used = jnp.argsort(sizes == 0, stable=True)

    def group(index: Array, out: Array) -> Array:
        member = used[index]
        matrix = weight[member]

        def multiply(turn: Array, out: Array) -> Array:
            start = starts[member] + turn * block
            taken = jax.lax.dynamic_slice(x, (start, 0), (block, x.shape[1]))
            return jax.lax.dynamic_update_slice(out, taken @ matrix, (start, 0))

        return jax.lax.fori_loop(0, -(-sizes[member] // block), multiply, out)

    out = jnp.zeros((rows + block, weight.shape[2]), x.dtype)
    return jax.lax.fori_loop(0, jnp.sum(sizes > 0), group, out)[:rows]
