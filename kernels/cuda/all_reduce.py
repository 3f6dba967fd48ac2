"""Sums over the GPUs of one process whose latency counts: one kernel pushes, waits and adds, within a CUDA graph.

Every device writes its addend to the memory of all others, over NVLink, and adds up what the others wrote to its own:
one shot, without flags or barriers, after TensorRT-LLM's "Lamport" all-reduce (NCCL's LL has a flag beside every
word instead). An empty place holds EMPTY, which no addend has, so a word's arrival is the word itself.

Each thread has a partner on each device, the one of the same number, and nothing to do with any other thread. Its
places are two for each sender, which its sums take turns with; which one is next is counted in memory, by each thread
for itself. In a turn it

1. writes its 16 bytes of the addend to the turn's place at every partner, itself included;
2. reads its own places until all are full, adds them up in the order of the devices, so that all get the same sum;
3. empties them.

**Why a place is empty when it is written to.** A writes to its place at B in turns t and t + 2. Between the two, A has
finished turn t + 1, so it has read what B wrote in turn t + 1, which B did after turn t, with the emptying at its end:
a kernel makes one turn, kernels of a stream run one after another, and what one has written is in memory before the
next begins. **Why nothing waits forever**: a turn's writes wait for nothing, and all programs of a grid are on the
device at once (AT_ONCE), so none waits for one that cannot start. All devices must make the same sums in the same
order, as those of one XLA program do, and each device one at a time: its sums depend on one another, or XLA has them in
one stream, which it does unless it is told to overlap (`Axes.is_overlapped`).

**Addresses.** The devices of a process share one address space, and XLA lets each write to all others' memory where the
links can. The workspace is an array that no XLA program sees; steps get a table of addresses instead.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kernels.cuda.tile import Tiles, launch, padded

BYTES = 16  # of an addend that a thread has
WARPS = 8  # of a program that only adds
MOST_WARPS = 32  # of a program
AT_ONCE = 4096  # warps of all programs, for which a device has room at once
MULTIPROCESSORS = 114  # for that: those of the smallest Hopper with NVLinks but the H20, which has 78
MOST_DEVICES = 2  # as many as it was run on
CAPABILITY = 9.0  # Hopper's, likewise
EMPTY = 0x80008000  # two negative zeros of 16 bits, or a denormal number: what an addend has of it becomes 0
TURNS = 2
PLACES = 32 * AT_ONCE * BYTES  # bytes of all threads' places for one sender in one turn
COUNTS = 32 * AT_ONCE * 4  # bytes of all threads' counts


class Link(NamedTuple):
    """What a device knows of the workspace: where its own memory is, then where it writes for each of the devices it
    sums with, itself included. Addresses of 64 bits, the lower half first."""

    table: Array  # [1, 2 + 2 * devices] i32; outside of `jax.shard_map` of all devices, along the first axis

    def supports(self, x: Array) -> bool:
        """-> whether `sum` takes x [T, ...]: floats of 16 or 32 bits, few enough to be sent to all at once."""
        return x.dtype.name in _CONVERSIONS and self._has_room(WARPS * _pieces(x))

    def sum(self, x: Array) -> Array:
        return all_reduce(x, self.table)

    def supports_norm(self, x: Array) -> bool:
        """-> whether `sum_and_norm` takes x [T, D]: what `sum` does, if a program holds a row."""
        if x.ndim != 2 or x.dtype.name not in _CONVERSIONS:
            return False
        warps = _warps_of_row(x)
        return 1 <= warps <= MOST_WARPS and self._has_room(warps * x.shape[0])

    def sum_and_norm(self, x: Array, residual: Array, weight: Array, eps: float) -> tuple[Array, Array]:
        return all_reduce_norm(x, residual, weight, eps, self.table)

    def _has_room(self, warps: int) -> bool:
        return warps * (_senders(self.table) - 1) <= AT_ONCE


class Workspace(NamedTuple):
    """Each device's counts and places, [device, words] u32, for their addresses alone. To be kept while `link` is."""

    memory: Array
    link: Link


def runs_on(device: Any) -> bool:
    """-> whether a GPU is of the kind that this was written for, and has room for all programs at once."""
    return float(device.compute_capability) >= CAPABILITY and device.core_count >= MULTIPROCESSORS


def abstract_link(mesh: Mesh, axis: str) -> Link:
    """-> the shape and dtype of a link, of all devices of a mesh that sum along an axis."""
    return Link(jax.ShapeDtypeStruct((mesh.size, 2 + 2 * mesh.shape[axis]), jnp.int32))  # type: ignore[arg-type]


def open_workspace(mesh: Mesh, axis: str) -> Workspace:
    """-> for sums along an axis of a mesh whose devices are of this process and can write to each other's memory."""
    senders = mesh.shape[axis]
    each = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    words, counts = zip(*blank(senders), strict=True)
    new = np.repeat(np.array(words, np.uint32), counts)[None]
    memory = jax.make_array_from_callback((mesh.size, new.size), each, lambda _: new)
    jax.block_until_ready(memory)  # before anyone writes to it
    own: dict[Any, Any] = {shard.device: shard.data for shard in memory.addressable_shards}
    rows = {}
    for group in np.moveaxis(mesh.devices, mesh.axis_names.index(axis), -1).reshape(-1, senders):
        rows |= dict(zip(group, tables([own[device].unsafe_buffer_pointer() for device in group]), strict=True))
    table = np.stack([rows[device] for device in mesh.devices.flat])
    return Workspace(memory, Link(jax.device_put(table, each)))


def blank(senders: int) -> list[tuple[int, int]]:
    """-> what a device's memory holds before the first sum: words, and how many times each."""
    return [(0, COUNTS // 4), (EMPTY, TURNS * senders * PLACES // 4)]


def tables(memory: list[int]) -> np.ndarray:
    """memory: where that of each device of a group begins -> each device's row of `Link.table`, [device, word] i32."""
    rows = [[own, *(other + COUNTS + rank * PLACES for other in memory)] for rank, own in enumerate(memory)]
    return np.array(rows, np.uint64).view(np.int32)


def all_reduce(x: Array, table: Array) -> Array:
    """x [T, ...], another on each device, and this device's row of `Link.table` -> the devices' sum of x.

    Added up in float32 and in the order of the devices. Inside of `jax.shard_map`, by all devices of the table alike.
    x: as `Link.supports` says.
    """
    assert Link(table).supports(x), (x.shape, x.dtype)  # others would be written past the places
    rows = x.reshape(x.shape[0], -1)  # no flat array: XLA would not find what follows, a norm, to be one kernel
    count = _numbers(WARPS, x)
    return launch(
        partial(_all_reduce, count, _senders(table)), [rows, table.reshape(-1)],
        jax.ShapeDtypeStruct(rows.shape, x.dtype),
        grid=(_pieces(x),), tiles=Tiles(count, 1, WARPS, 1), interpret=False,
    ).reshape(x.shape)  # fmt: skip


def all_reduce_norm(x: Array, residual: Array, weight: Array, eps: float, table: Array) -> tuple[Array, Array]:
    """x and residual [T, D], weight [D] -> the devices' sum of x and the residual, and its RMS norm, both [T, D].

    As `all_reduce`, an addition and `rms_norm` (engine.models.layers), rounded where they are, in one kernel.
    x: as `Link.supports_norm` says.
    """
    assert Link(table).supports_norm(x), (x.shape, x.dtype)
    warps = _warps_of_row(x)
    out = jax.ShapeDtypeStruct(x.shape, x.dtype)
    count = _numbers(warps, x)
    return launch(
        partial(_all_reduce_norm, count, _senders(table), eps),
        [x, table.reshape(-1), residual, weight], (out, out),
        grid=(x.shape[0],), tiles=Tiles(count, 1, warps, 1), interpret=False,
    )  # fmt: skip


def _senders(table: Array) -> int:
    """-> how many devices write to each, itself included."""
    return table.shape[-1] // 2 - 1


def _numbers(warps: int, x: Array) -> int:
    """-> of x, how many a program of so many warps has."""
    return 32 * warps * BYTES // x.dtype.itemsize


def _pieces(x: Array) -> int:
    """-> how many programs add up x [T, ...], each a part of one row."""
    return x.shape[0] * pl.cdiv(math.prod(x.shape[1:]), _numbers(WARPS, x))


def _warps_of_row(x: Array) -> int:
    return padded(x.shape[1]) * x.dtype.itemsize // (32 * BYTES)


def _all_reduce(count: int, senders: int, x: Any, table: Any, out: Any) -> None:
    each = pl.cdiv(x.shape[1], count)
    column = lax.rem(pl.program_id(0), each) * count + jnp.arange(count, dtype=jnp.int32)
    at, inside = (jnp.full_like(column, lax.div(pl.program_id(0), each)), column), column < x.shape[1]
    plgpu.store(out.at[at], _sum(senders, x, table, at, inside), mask=inside)


def _all_reduce_norm(
    count: int, senders: int, eps: float, x: Any, table: Any, residual: Any, weight: Any, out: Any, normed: Any
) -> None:
    float32, width = jnp.float32, x.shape[1]
    column = jnp.arange(count, dtype=jnp.int32)
    at, inside = (jnp.full_like(column, pl.program_id(0)), column), column < width
    scale = plgpu.load(weight.at[column], mask=inside, other=0.0)
    before = plgpu.load(residual.at[at], mask=inside, other=0.0).astype(float32)
    y = (_sum(senders, x, table, at, inside).astype(float32) + before).astype(x.dtype)
    plgpu.store(out.at[at], y, mask=inside)
    y = y.astype(float32)
    y = y * lax.rsqrt(jnp.sum(y * y) / width + eps)
    product = y.astype(scale.dtype).astype(float32) * scale.astype(float32)
    plgpu.store(normed.at[at], product.astype(scale.dtype).astype(x.dtype), mask=inside)


def _sum(senders: int, x: Any, table: Any, at: tuple[Array, Array], inside: Array) -> Array:
    """-> the devices' sum of what x has `at` [count], 16 bytes for each thread of the program."""
    addend, pack = plgpu.load(x.at[at], mask=inside, other=0.0), BYTES // x.dtype.itemsize
    words = [jnp.full(inside.shape, plgpu.load(table.at[i]), jnp.int32) for i in range(2 * senders + 2)]
    return plgpu.elementwise_inline_asm(
        _exchange(senders, x.dtype),
        args=[addend, *words],
        constraints=",".join(["=&r"] * 4 + ["r"] * (4 + pack * len(words))),
        pack=pack,
        result_shape_dtypes=[jax.ShapeDtypeStruct(inside.shape, x.dtype)],
    )[0]


def _exchange(senders: int, dtype: jnp.dtype) -> str:
    """-> what a thread does: its 16 bytes of an addend become the sum, in PTX.

    Registers: 4 of the sum, 4 of the addend, then each word of the table, as often as there are numbers in 16 bytes.
    """
    pack = BYTES // dtype.itemsize
    address = lambda i: f"{{${8 + 2 * i * pack}, ${8 + (2 * i + 1) * pack}}}"
    unpacked, packed = _CONVERSIONS[dtype.name]
    lines = [
        ".reg .pred p;",
        ".reg .b16 low, high;",
        ".reg .b32 thread, turn, next, empty, w0, w1, w2, w3;",
        f".reg .f32 {', '.join(f'{name}{i}' for name in 'xs' for i in range(pack))};",
        ".reg .b64 own, place, offset;",
        f"mov.b32 empty, {EMPTY};",
        "mov.u32 thread, %tid.x;",
        "mov.u32 turn, %ctaid.x;",
        "mov.u32 next, %ntid.x;",
        "mad.lo.u32 thread, turn, next, thread;",
        f"mov.b64 own, {address(0)};",
        "mad.wide.u32 place, thread, 4, own;",
        "ld.volatile.global.u32 turn, [place];",
        "xor.b32 next, turn, 1;",
        "st.volatile.global.u32 [place], next;",
        f"mul.wide.u32 offset, turn, {senders * PLACES};",
        f"mad.wide.u32 offset, thread, {BYTES}, offset;",
        "add.u64 own, own, offset;",
    ]
    for i in range(4):
        lines += [f"setp.eq.u32 p, ${4 + i}, empty;", f"selp.b32 w{i}, 0, ${4 + i}, p;"]
    for peer in range(senders):
        lines += [
            f"mov.b64 place, {address(1 + peer)};",
            "add.u64 place, place, offset;",
            "st.relaxed.sys.global.v4.b32 [place], {w0, w1, w2, w3};",
        ]
    for sender in range(senders):
        place = f"[own + {COUNTS + sender * PLACES}]"
        lines += [f"wait{sender}:", f"ld.relaxed.sys.global.v4.b32 {{w0, w1, w2, w3}}, {place};"]
        for i in range(4):
            lines += [f"setp.eq.u32 p, w{i}, empty;", f"@p bra wait{sender};"]
        lines.append(f"st.relaxed.sys.global.v4.b32 {place}, {{empty, empty, empty, empty}};")
        per_word, name = pack // 4, "x" if sender else "s"
        for i in range(4):
            lines.append(unpacked.format(f"w{i}", *(f"{name}{per_word * i + j}" for j in range(per_word))))
        if sender:
            lines += [f"add.rn.f32 s{i}, s{i}, x{i};" for i in range(pack)]
    lines += [packed.format(f"${i}", *(f"s{pack // 4 * i + j}" for j in range(pack // 4))) for i in range(4)]
    return "{ " + " ".join(lines) + " }"


# PTX that makes the numbers {1} and {2} in float32 of a word {0}, and the word of the numbers.
_CONVERSIONS = {
    "bfloat16": ("shl.b32 {1}, {0}, 16; and.b32 {2}, {0}, 0xFFFF0000;", "cvt.rn.bf16x2.f32 {0}, {2}, {1};"),
    "float16": (
        "mov.b32 {{low, high}}, {0}; cvt.f32.f16 {1}, low; cvt.f32.f16 {2}, high;",
        "cvt.rn.f16x2.f32 {0}, {2}, {1};",
    ),
    "float32": ("mov.b32 {1}, {0};", "mov.b32 {0}, {1};"),
}
