"""How many KV-cache pages fit: computed from the device's memory, never tried out."""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from typing import Any

from engine.config import EngineConfig, ResolvedConfig

CPU_SHARE = 0.1  # of RAM, for the KV cache on the CPU, where memory is not ours alone
RESERVE = 256 << 20  # bytes on an accelerator for what its runtime takes beside our arrays
CUDA_BYTES = 1536 << 20  # outside JAX's pool: CUDA's context, code, and the graphs of every step


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes, and the pages that they make room for (page 0 included)."""

    weights: int
    temporaries: int  # the largest step's
    tables: int  # tokens and sampling wishes by slot
    page_bytes: int  # one page, over all layers
    num_pages: int
    page_size: int

    def describe(self, max_model_len: int) -> list[str]:
        """-> lines for the start-up report."""
        tokens = (self.num_pages - 1) * self.page_size
        kv = self.num_pages * self.page_bytes
        sizes = (
            f"weights {_mib(self.weights)}, step temporaries {_mib(self.temporaries)}, slot tables {_mib(self.tables)}"
        )
        pages = f"{self.num_pages - 1} pages of {self.page_size} tokens = {tokens} tokens"
        return [
            f"memory: {sizes}, KV cache {_mib(kv)}",
            f"KV cache: {pages}, {tokens / max_model_len:.1f} sequences of {max_model_len}",
        ]


def plan_memory(
    config: EngineConfig, resolved: ResolvedConfig, device: Any, *,
    in_use: int, weights: int, temporaries: int, tables: int, page_bytes: int,
    free: int | None = None, sharers: int = 1,
) -> MemoryPlan:  # fmt: skip
    """-> the plan. Errors: ValueError with the numbers and the setting to change, if not even one sequence fits.

    All counts are of one device, `device`; `in_use`: bytes that others of this process have of it. `free`: bytes that
    were in one piece after weights were there, where that was measured. `sharers`: CPU devices that have this host's
    memory in common.
    """
    page = resolved.page_size
    least = -(-resolved.max_model_len // page) + 1
    most = resolved.max_num_seqs * (least - 1) + 1  # more could never be used at once
    if config.num_gpu_blocks_override is not None:
        num_pages, source = config.num_gpu_blocks_override + 1, "num_gpu_blocks_override"
    else:
        if config.kv_cache_memory_bytes is not None:
            room, source = config.kv_cache_memory_bytes, "kv_cache_memory_bytes"
        elif device.platform == "cpu":
            room, source = int(ram_bytes() * CPU_SHARE / sharers), "kv_cache_memory_bytes (its default is 10 % of RAM)"
            room = min(room, most * page_bytes)
        else:
            stats = device.memory_stats()
            limit = stats["bytes_limit"]  # on a GPU, the pool that `limit_gpu_pool` has asked for
            share = 1 if device.platform == "gpu" else config.gpu_memory_utilization
            # Temporaries twice: what a step hands out may lie in the middle of what is free, in the next one's way.
            left = int(limit * share) - in_use - weights
            room = (left if free is None else min(free, left)) - 2 * temporaries - tables - RESERVE
            source = f"gpu_memory_utilization {config.gpu_memory_utilization}, which gives {_mib(int(limit * share))}"
        num_pages = max(room, 0) // page_bytes
    plan = MemoryPlan(weights, temporaries, tables, page_bytes, num_pages, page)
    if num_pages < least:
        raise ValueError(
            f"max_model_len: one sequence of {resolved.max_model_len} tokens needs {least} KV-cache pages "
            f"({_mib(least * page_bytes)}), and there is room for {num_pages} after weights {_mib(weights)} and step "
            f"temporaries {_mib(temporaries)}; lower max_model_len or raise {source}"
        )
    return plan


def free_in_one_piece(device: Any) -> int | None:
    """-> bytes of the largest piece that a device's pool has left; None where there is no pool, or one that grows."""
    stats = device.memory_stats() or {}
    return stats["largest_free_block_bytes"] if stats.get("pool_bytes") == stats.get("bytes_limit", -1) else None


def limit_gpu_pool(config: EngineConfig) -> None:
    """Ask JAX's GPU allocator for our share of the card and no more; it reads this variable when a backend starts.

    What CUDA takes for itself counts as ours: the pool is smaller by that.
    """
    share, total = config.gpu_memory_utilization, _gpu_bytes()
    if total is not None:
        share = max(share - CUDA_BYTES / total, 0.01)
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", f"{share:.4f}")


def highest_utilization() -> float | None:
    """-> the most that gpu_memory_utilization can be, in hundredths: what nobody has of the first device's memory yet.

    None where the setting has no meaning, on a CPU. Whether a model fits into it is told when it starts, before it
    allocates. For a process of its own: it touches the device.
    """
    found = _gpu_free_bytes()
    if found is None:
        import jax

        device = jax.devices()[0]
        if device.platform == "cpu":
            return None
        stats = device.memory_stats()
        found = stats["bytes_limit"] - stats["bytes_in_use"], stats["bytes_limit"]
    free, total = found
    return max(int(free / total * 100), 1) / 100


def _gpu_free_bytes() -> tuple[int, int] | None:
    """-> free and total memory of the first NVIDIA GPU, as its driver counts them; None without one."""
    if _gpu_bytes() is None:
        return None
    cuda = ctypes.CDLL("libcuda.so.1")
    context, free, total = ctypes.c_void_p(), ctypes.c_size_t(), ctypes.c_size_t()
    failed = cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0) or cuda.cuCtxSetCurrent(context)
    failed = failed or cuda.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total))
    return None if failed else (free.value, total.value)


def _gpu_bytes() -> int | None:
    """-> memory of the first NVIDIA GPU, asked of its driver so that no backend starts yet; None without one."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, total = ctypes.c_int(), ctypes.c_size_t()
    failed = cuda.cuInit(0) or cuda.cuDeviceGet(ctypes.byref(device), 0)
    failed = failed or cuda.cuDeviceTotalMem_v2(ctypes.byref(total), device)
    return None if failed else total.value


def ram_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _mib(count: int) -> str:
    return f"{count / 2**20:.0f} MiB"
