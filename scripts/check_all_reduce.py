"""Sums over GPUs by the kernel of our own, checked: sums of many sizes in a row, of devices that are late by turns.

    python scripts/check_all_reduce.py --devices 2      # GPUs of this process
    python scripts/check_all_reduce.py --processes 2    # of one GPU, in whose memory each has its part: all but links

Sums must be bit for bit those added up in order, and so must what a norm follows; the norm may round the other way.
Exit code 1 if anything is wrong, or waits for longer than PATIENCE. Processes take turns on a GPU by the millisecond
and each sum waits for a turn or two, unless NVIDIA's MPS runs (`nvidia-cuda-mps-control -d`), which takes a fifth.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import cuda_ipc
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from engine.models.layers import rms_norm
from kernels.cuda import all_reduce
from kernels.cuda.all_reduce import Link

SHAPES = ((64, 4096), (1, 4096), (3, 5), (33, 2880), (128, 4096), (64, 1), (8, 4096), (300, 1000), (256, 4096))
DTYPES = ("bfloat16", "float32", "float16") * 3
SUMS: tuple[Any, ...] = tuple(map(jax.ShapeDtypeStruct, SHAPES, DTYPES))
SHAPES_OF_NORMS, DTYPES_OF_NORMS = ((64, 4096), (3, 2880), (256, 4096), (5, 1024)), ("bfloat16",) * 3 + ("float32",)
NORMS: tuple[Any, ...] = tuple(map(jax.ShapeDtypeStruct, SHAPES_OF_NORMS, DTYPES_OF_NORMS))
SPECIAL = (-0.0, jnp.inf, jnp.nan, 1e-40)
EPS = 1e-5
MOST_ERROR = 2**-6  # of a number in bfloat16, relative: two roundings may fall the other way
PATIENCE = 240  # seconds for all that processes do
EACH = PartitionSpec("model")
ROUNDED: dict[str, Any] = {"xla_allow_excess_precision": False}  # where XLA is told to, and not left out between two


def spread(mesh: Mesh, function: Callable[..., Any], options: dict[str, Any] | None = None) -> Callable[..., Any]:
    """-> the function, jitted, of every device's own part; arrays have the devices as their first axis."""
    own = lambda *arrays: jax.tree.map(lambda x: x[None], function(*(array[0] for array in arrays)))
    every = jax.shard_map(own, mesh=mesh, in_specs=EACH, out_specs=EACH, check_vma=False)
    return jax.jit(every, compiler_options=options)


def in_order(addends: list[Array]) -> Array:
    """-> the sum, added up in float32 one after another and rounded to the addends' dtype."""
    total = addends[0].astype(jnp.float32)
    for one in addends[1:]:
        total = total + one.astype(jnp.float32)
    return total.astype(addends[0].dtype)


def wrong_sums(senders: int, rank: Array | int, table: Array, seed: Array) -> Array:
    """-> how many numbers are not what they should be, of a sum of each shape, on the device of this rank."""

    def addend(kind: Any, key: Array) -> Array:
        numbers, which = jax.random.split(key)
        x, special = jax.random.normal(numbers, kind.shape), jax.random.randint(which, kind.shape, 0, 64)
        for i, value in enumerate(SPECIAL):
            x = jnp.where(special // 8 == i, value, x)
        return x.astype(kind.dtype)

    late, wrong = jnp.float32(1), jnp.int32(0)
    for i, kind in enumerate(filter(Link(table).supports, SUMS)):
        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), i), senders)
        addends = [addend(kind, key) for key in keys]
        spin = jax.random.randint(jax.random.fold_in(keys[0], rank), (), 0, 300)  # another number for each device
        late = jnp.where(wrong > 1 << 30, 0.0, late)  # the spinning waits for the sum before
        late = lax.fori_loop(0, spin, lambda _, value: jnp.sin(value) + 1, late)
        x = jnp.stack(addends)[rank]
        x = jnp.where(late > 1e9, jnp.zeros_like(x), x)  # the sum waits for the spinning
        ours, right = all_reduce.all_reduce(x, table), in_order(addends)
        same = (ours == right) | (jnp.isnan(ours) & jnp.isnan(right))
        wrong += jnp.sum(~same, dtype=jnp.int32)
    return wrong


def wrong_norms(senders: int, rank: Array | int, table: Array) -> tuple[Array, Array]:
    """-> of sums with a norm behind them, how many numbers differ before it, and by what share of itself one behind."""
    wrong, most = jnp.int32(0), jnp.float32(0)
    for i, kind in enumerate(filter(Link(table).supports_norm, NORMS)):
        keys = jax.random.split(jax.random.key(i), senders + 2)
        *addends, residual = (jax.random.normal(key, kind.shape).astype(kind.dtype) for key in keys[:-1])
        weight = jax.random.normal(keys[-1], kind.shape[1:]).astype(kind.dtype)
        right = in_order(addends) + residual
        ours, normed = all_reduce.all_reduce_norm(jnp.stack(addends)[rank], residual, weight, EPS, table)
        expected = rms_norm(right, weight, EPS).astype(jnp.float32)
        error = jnp.abs(normed.astype(jnp.float32) - expected) / jnp.maximum(jnp.abs(expected), 1e-3)
        wrong += jnp.sum(ours != right, dtype=jnp.int32)
        most = jnp.maximum(most, jnp.max(error))
    return wrong, most


def told(who: str, rounds: int, wrong: int, wrong_before: int, most: float) -> bool:
    """Say what was found. -> whether all is right."""
    print(f"{who}, sums: {wrong} numbers differ in {rounds} rounds; with a norm: {wrong_before} differ before it, "
          f"behind it by up to {most:.2%}", flush=True)  # fmt: skip
    return not wrong and not wrong_before and most <= MOST_ERROR


def check_devices(devices: int, rounds: int) -> bool:
    """-> whether this process's GPUs get the right sums."""
    mesh = Mesh(np.array(jax.devices()[:devices]), ("model",))
    workspace = all_reduce.open_workspace(mesh, "model")
    table, each = workspace.link.table, NamedSharding(mesh, EACH)
    rank = lambda: lax.axis_index("model")
    sums = spread(mesh, lambda table, seed: wrong_sums(devices, rank(), table, seed), ROUNDED)
    norms = spread(mesh, lambda table: wrong_norms(devices, rank(), table), ROUNDED)
    seeds = [jax.device_put(np.full(devices, seed, np.int32), each) for seed in range(rounds)]
    wrong = sum(np.asarray(sums(table, seed)).sum() for seed in seeds)
    wrong_before, most = (np.asarray(found) for found in norms(table))
    return told(f"{devices} devices", rounds, wrong, wrong_before.sum(), most.max())


def check_processes(processes: int, rounds: int) -> bool:
    """-> whether processes that share this GPU get the right sums."""
    cuda_ipc.enter()
    handles = [cuda_ipc.allocate(all_reduce.blank(processes)).hex() for _ in range(processes)]
    program = [sys.executable, __file__, "--rounds", str(rounds), "--memory", *handles, "--rank"]
    share = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}  # or the first process has all memory
    running = [subprocess.Popen([*program, str(rank)], env=share) for rank in range(processes)]
    try:
        codes = [process.wait(PATIENCE) for process in running]
        return not any(codes)
    except subprocess.TimeoutExpired:
        print(f"not done after {PATIENCE} s: somebody waits for what never comes")
        return False
    finally:
        for process in running:
            process.kill()


def check_one_of_processes(rank: int, memory: list[str], rounds: int) -> bool:
    """-> whether this process, which has `memory[rank]` of all handles, gets the right sums."""
    cuda_ipc.enter()
    table = jnp.asarray(all_reduce.tables([cuda_ipc.opened(bytes.fromhex(handle)) for handle in memory])[rank])
    sums, norms = (
        jax.jit(partial(check, len(memory), rank), compiler_options=ROUNDED) for check in (wrong_sums, wrong_norms)
    )
    wrong = sum(int(sums(table, jnp.int32(seed))) for seed in range(rounds))
    wrong_before, most = norms(table)
    return told(f"process {rank} of {len(memory)}", rounds, wrong, int(wrong_before), float(most))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("--devices", type=int)
    how.add_argument("--processes", type=int)
    how.add_argument("--rank", type=int, help=argparse.SUPPRESS)  # what the processes themselves are called with
    parser.add_argument("--memory", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    if options.devices:
        right = check_devices(options.devices, options.rounds)
    elif options.processes:
        right = check_processes(options.processes, options.rounds)
    else:
        right = check_one_of_processes(options.rank, options.memory, options.rounds)
    sys.exit(not right)


if __name__ == "__main__":
    main()
