"""The sum over GPUs: its PTX run here, by threads that take turns at random, where it writes, and that it lowers.

scripts/check_all_reduce.py runs it on cards.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from kernels.cuda import all_reduce
from kernels.cuda.all_reduce import AT_ONCE, COUNTS, EMPTY, PLACES, TURNS, WARPS, Link
from tests.kernels.cuda.test_lowering import H200

Table = list[int]  # of a device, addresses
THREADS = 32 * WARPS  # of a program


def tables(devices: int) -> list[Table]:
    """-> each device's own memory, and where it writes at each: as `open_workspace` has them."""
    memory = [(device + 1) << 40 for device in range(devices)]
    return all_reduce.tables(memory).view(np.uint64).tolist()


class Write(NamedTuple):
    thread: Any  # and its device
    address: int
    word: int


class Memory:
    """All devices' memory, in words. What is written arrives later, each word when it likes, but before its thread
    reads that word again, and before its kernel ends."""

    def __init__(self) -> None:
        self.words: dict[int, int] = {}
        self.on_its_way: list[Write] = []

    def read(self, address: int, thread: Any = None) -> int:
        self.arrive_all(lambda write: write[:2] == (thread, address))
        return self.words.get(address, 0 if address % (1 << 40) < COUNTS else EMPTY)

    def write(self, thread: Any, address: int, word: int) -> None:
        assert address % 4 == 0 and address % (1 << 40) < COUNTS + TURNS * 8 * PLACES
        self.on_its_way.append(Write(thread, address, word))

    def arrive(self, at: int) -> None:
        """Let a write arrive, or an earlier one of the same thread to the same address."""
        write = self.on_its_way[at]
        write = next(w for w in self.on_its_way if w[:2] == write[:2])
        self.on_its_way.remove(write)
        is_count, is_own = write.address % (1 << 40) < COUNTS, write.address >> 40 == write.thread[0] + 1
        if not is_count and not (is_own and write.word == EMPTY):
            assert self.read(write.address) == EMPTY, "a word is written over one that was not read"
        self.words[write.address] = write.word

    def arrive_all(self, which: Callable[[Write], bool]) -> None:
        while (at := next((i for i, write in enumerate(self.on_its_way) if which(write)), None)) is not None:
            self.arrive(at)


def run(text: str, operands: list[int], program: int, thread: int, device: int, memory: Memory) -> Iterator[None]:
    """Run a thread's PTX, whose operands are registers of 32 bits. Yields after each access of memory."""
    lines = [line.strip() for line in re.split(r"[;{](?= |$)|(?<=:) ", re.sub(r"^{ | }$", "", text)) if line.strip()]
    labels = {line[:-1]: i for i, line in enumerate(lines) if line.endswith(":")}
    registers: dict[str, Any] = {f"${i}": word for i, word in enumerate(operands)}
    registers |= {"%tid.x": thread, "%ctaid.x": program, "%ntid.x": THREADS}
    value = lambda name: registers[name] if name in registers else int(name, 0)
    number = lambda name: np.uint32(value(name)).view(np.float32)
    bits = lambda x, kind: int(np.asarray(x, kind).view(np.uint32 if kind == np.float32 else np.uint16))
    at = 0
    while at < len(lines):
        line, at = lines[at], at + 1
        if line.startswith(".reg") or line.endswith(":"):
            continue
        if guarded := re.match(r"@p bra (\w+)", line):
            at = labels[guarded[1]] if registers["p"] else at
            continue
        operation, rest = line.split(" ", 1)
        names = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", rest)
        parts = lambda name: re.findall(r"[^{},\s]+", name)
        address = lambda name: sum(value(part) for part in name.strip("[]").split(" + "))
        kind = operation.split(".")
        if kind[0] == "ld":
            for i, name in enumerate(parts(names[0])):
                registers[name] = memory.read(address(names[1]) + 4 * i, (device, program, thread))
            yield
        elif kind[0] == "st":
            for i, name in enumerate(parts(names[1])):
                memory.write((device, program, thread), address(names[0]) + 4 * i, value(name))
            yield
        elif names[0].startswith("{"):
            low, high = parts(names[0])
            registers[low], registers[high] = value(names[1]) & 0xFFFF, value(names[1]) >> 16
        elif operation == "mov.b64":
            low, high = parts(names[1])
            registers[names[0]] = value(low) | value(high) << 32
        elif kind[0] == "mov":
            registers[names[0]] = value(names[1])
        elif operation in ("mad.lo.u32", "mad.wide.u32"):
            registers[names[0]] = value(names[1]) * value(names[2]) + value(names[3])
        elif operation == "mul.wide.u32":
            registers[names[0]] = value(names[1]) * value(names[2])
        elif operation == "add.u64":
            registers[names[0]] = value(names[1]) + value(names[2])
        elif operation == "xor.b32":
            registers[names[0]] = value(names[1]) ^ value(names[2])
        elif operation == "and.b32":
            registers[names[0]] = value(names[1]) & value(names[2])
        elif operation == "shl.b32":
            registers[names[0]] = value(names[1]) << value(names[2]) & 0xFFFFFFFF
        elif operation == "setp.eq.u32":
            registers["p"] = value(names[1]) == value(names[2])
        elif operation == "selp.b32":
            registers[names[0]] = value(names[1]) if registers[names[3]] else value(names[2])
        elif operation == "add.rn.f32":
            registers[names[0]] = bits(number(names[1]) + number(names[2]), np.float32)
        elif operation == "cvt.f32.f16":
            registers[names[0]] = bits(np.uint16(value(names[1])).view(np.float16), np.float32)
        elif kind[0] == "cvt":
            dtype = {"bf16x2": jnp.bfloat16, "f16x2": np.float16}[kind[2]]
            registers[names[0]] = bits(number(names[1]), dtype) << 16 | bits(number(names[2]), dtype)
        else:
            raise AssertionError(line)
    operands[:4] = [registers[f"${i}"] for i in range(4)]


def sums(devices: int, dtype: Any, addends: np.ndarray, seed: int) -> np.ndarray:
    """addends [calls, threads, devices, 4] u32, all of them in a row -> what each gets, alike.

    Devices go on, and words arrive, at random; a device's call begins when all threads have ended the one before.
    """
    choose, memory = random.Random(seed), Memory()
    text = all_reduce._exchange(devices, jnp.dtype(dtype))
    pack = all_reduce.BYTES // jnp.dtype(dtype).itemsize
    threads = [(choose.randrange(AT_ONCE // WARPS), choose.randrange(THREADS)) for _ in range(addends.shape[1])]
    found = np.zeros_like(addends)

    def device(number: int) -> Iterator[None]:
        table = [half for address in tables(devices)[number] for half in (address & 0xFFFFFFFF, address >> 32)]
        for call, given in enumerate(addends[:, :, number]):
            operands = [[0] * 4 + own.tolist() + np.repeat(table, pack).tolist() for own in given]
            running = {i: run(text, operands[i], *threads[i], number, memory) for i in range(len(threads))}
            while running:
                i = choose.choice(list(running))
                if next(running[i], StopIteration) is StopIteration:
                    del running[i]
                yield
            found[call, :, number] = [own[:4] for own in operands]
            memory.arrive_all(lambda write: write.thread[0] == number)

    running = {number: device(number) for number in range(devices)}
    for _ in range(2000 * addends.size):
        if memory.on_its_way and choose.random() < 0.4:
            memory.arrive(max(choose.randrange(len(memory.on_its_way)) for _ in range(4)))  # the later ones sooner
        elif running and next(running[number := choose.choice(list(running))], StopIteration) is StopIteration:
            del running[number]
        if not running:
            return found
    raise AssertionError("somebody waits forever")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize(("devices", "seed"), [(2, 0), (2, 1), (3, 2), (8, 3)])
def test_every_device_gets_every_sum_whoever_is_late(devices: int, seed: int, dtype: str):
    calls, kind = 7, jnp.dtype(dtype)
    numbers = np.random.default_rng(seed).standard_normal((calls, 2, devices, 16 // kind.itemsize)).astype(kind)
    numbers[::2, 0, :, 1] = -0.0
    numbers[1, 1, 0, :4] = [-0.0, -0.0, np.inf, np.nan]
    found = sums(devices, dtype, np.ascontiguousarray(numbers).view(np.uint32), seed).view(kind)
    expected = numbers[:, :, 0].astype(np.float32)
    for device in range(1, devices):
        expected = expected + numbers[:, :, device].astype(np.float32)
    for device in range(devices):
        np.testing.assert_array_equal(found[:, :, device].astype(np.float32), expected.astype(kind).astype(np.float32))


@pytest.mark.parametrize("devices", [2, 8])
def test_no_two_writers_share_a_place(devices: int):
    places = [place for table in tables(devices) for place in table[1:]]
    assert len({*places}) == devices**2
    apart = np.diff(sorted(place for place in places if place >> 40 == 1))
    assert (apart >= PLACES).all()


def test_a_table_says_where_the_devices_memory_is():
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("stage", "model"))
    workspace = all_reduce.open_workspace(mesh, "model")
    own: Any = workspace.memory.addressable_shards[0].data
    np.testing.assert_array_equal(workspace.link.table, all_reduce.tables([own.unsafe_buffer_pointer()]))
    expected = all_reduce.abstract_link(mesh, "model").table
    assert (workspace.link.table.shape, workspace.link.table.dtype) == (expected.shape, expected.dtype)
    words = np.asarray(workspace.memory)[0]
    assert not words[: COUNTS // 4].any() and (words[COUNTS // 4 :] == EMPTY).all()
    assert 4 * words.size == COUNTS + TURNS * PLACES


def test_what_a_link_supports():
    of = lambda devices: Link(jnp.zeros((1, 2 + 2 * devices), jnp.int32))
    assert of(2).supports(jnp.zeros((256, 4096), jnp.bfloat16))
    assert not of(2).supports(jnp.zeros((257, 4096), jnp.bfloat16))
    assert not of(2).supports(jnp.zeros((256, 4096), jnp.float32))
    assert of(2).supports(jnp.zeros((64, 1, 1), jnp.float32))
    assert not of(2).supports(jnp.zeros((64, 4096), jnp.int32))
    assert of(4).supports(jnp.zeros((64, 4096), jnp.bfloat16))
    assert not of(8).supports(jnp.zeros((64, 4096), jnp.bfloat16))  # written to seven others
    assert of(2).supports_norm(jnp.zeros((256, 4096), jnp.bfloat16))
    assert not of(2).supports_norm(jnp.zeros((257, 4096), jnp.bfloat16))
    assert of(2).supports_norm(jnp.zeros((1, 8192), jnp.bfloat16))
    assert not of(2).supports_norm(jnp.zeros((1, 8193), jnp.bfloat16))  # a row is for one program
    assert not of(2).supports_norm(jnp.zeros((8, 16, 8), jnp.bfloat16))


@pytest.mark.skipif(H200 is None, reason="this JAX cannot lower for a GPU that is not there")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("shape", [(64, 4096), (3, 5), (33, 2880), (8, 1, 1)])
def test_it_lowers_for_a_gpu(shape: tuple[int, ...], dtype: str):
    given = jax.ShapeDtypeStruct
    with jax.sharding.use_abstract_mesh(H200):
        traced = jax.jit(all_reduce.all_reduce).trace(given(shape, dtype), given((1, 6), jnp.int32))
        assert "triton" in traced.lower(lowering_platforms=("cuda",)).as_text()
