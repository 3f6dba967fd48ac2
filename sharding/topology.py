"""How the devices are connected, as far as their platform tells, and which mesh that makes for a model."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple


class Topology(NamedTuple):
    """`fast`: devices that are connected by `link` and can share a layer; all together there are `devices`."""

    devices: int
    fast: int
    link: str
    slow_link: str  # between one such group and the next


class Choice(NamedTuple):
    tensor_parallel: int
    pipeline_parallel: int
    data_parallel: int
    reason: str  # one line


def read_topology(devices: Sequence[Any], nvlinks: Callable[[int], int] | None = None) -> Topology:
    """-> what connects these jax.Devices: ICI within a TPU slice, NVLink or PCIe within a host of GPUs.

    `nvlinks` tells how many active NVLinks a GPU of this host has (None: ask its driver).
    """
    first = devices[0]
    if first.platform == "tpu":
        slices = {getattr(device, "slice_index", 0) for device in devices}
        return Topology(len(devices), len(devices) // len(slices), "ICI", "the data centre's network")
    hosts = {device.process_index for device in devices}
    here = len(devices) // len(hosts)
    if first.platform == "gpu":
        if (nvlinks or active_nvlinks)(0):
            return Topology(len(devices), here, "NVLink", "the network")
        return Topology(len(devices), 1, "nothing", "PCIe" if len(hosts) == 1 else "PCIe and the network")
    return Topology(len(devices), here, "the host's memory", "the network")


def choose(topology: Topology, weights: int, memory: int, kv_heads: int, layers: int, processes: int = 1) -> Choice:
    """-> the mesh for a model of `weights` bytes on devices of `memory` bytes each.

    As many devices share a layer as are fast to reach and have KV heads to split, so that no copy of a KV head is
    needed unless the model does not fit otherwise. Half of the memory is left to the KV cache where that is possible.
    What is beyond holds stages if the model needs the room, or else (in one process) replicas.
    """
    room = memory // 2
    needed = max(-(-weights // room), 1)  # devices
    tensor = _largest_divisor(topology.fast, lambda n: n <= kv_heads)
    if tensor < min(needed, topology.fast):
        tensor = _largest_divisor(topology.fast, lambda n: True)
    rest = topology.devices // tensor
    stages = 1
    if tensor < needed or processes > 1:
        wanted = rest if processes > 1 else -(-needed // tensor)
        stages = next((n for n in range(wanted, rest + 1) if rest % n == 0 and n <= layers), 1)
    replicas = rest // stages
    parts = [f"{tensor} devices share a layer, over {topology.link}" if tensor > 1 else "one device has whole layers"]
    if stages > 1:
        parts.append(f"{stages} stages over {topology.slow_link}")
    if replicas > 1:
        parts.append(f"{replicas} replicas, which need no link")
    size = f"{weights / 2**30:.1f} GiB of weights, {memory / 2**30:.1f} GiB a device"
    return Choice(tensor, stages, replicas, f"{size}: {'; '.join(parts)}")


def active_nvlinks(index: int) -> int:
    """-> how many NVLinks of a GPU are up, as its driver's management library says; 0 where there is none."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return 0
    device, state, count = ctypes.c_void_p(), ctypes.c_uint(), 0
    if nvml.nvmlInit_v2() or nvml.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(device)):
        return 0
    while count < 18 and nvml.nvmlDeviceGetNvLinkState(device, count, ctypes.byref(state)) == 0 and state.value:
        count += 1
    return count


def _largest_divisor(count: int, fits: Callable[[int], bool]) -> int:
    return max(n for n in range(1, count + 1) if count % n == 0 and fits(n))
