"""Pages are computed from bytes: what the device has, less what is taken."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest

from engine.config import EngineConfig
from engine.memory import CPU_SHARE, RESERVE, MemoryPlan, free_in_one_piece, plan_memory

GIB = 1 << 30
PAGE_BYTES = 1 << 20


def plan(
    platform: str = "tpu", total: int = 16 * GIB, in_use: int = 0, free: int | None = None, **settings: Any
) -> MemoryPlan:
    """-> the plan for 2 GiB of weights, 1 GiB of temporaries and pages of 1 MiB and 16 tokens."""
    config = EngineConfig(**{"model": "m", "max_model_len": 1600, "block_size": 16, "max_num_seqs": 100} | settings)
    device = SimpleNamespace(platform=platform, memory_stats=lambda: {"bytes_limit": total})
    resolved = config.resolve(model_max_len=100_000, platform=platform)
    return plan_memory(
        config, resolved, device,
        in_use=in_use, weights=2 * GIB, temporaries=GIB, tables=0, page_bytes=PAGE_BYTES, free=free,
    )  # fmt: skip


def test_an_accelerators_pages_are_its_share_less_weights_and_twice_the_temporaries():
    assert plan(gpu_memory_utilization=0.5).num_pages == (8 * GIB - 2 * GIB - 2 * GIB - RESERVE) // PAGE_BYTES


def test_a_gpus_pool_is_the_share_already():
    assert plan("gpu", total=8 * GIB).num_pages == (8 * GIB - 2 * GIB - 2 * GIB - RESERVE) // PAGE_BYTES


def test_holes_between_weights_are_not_given_out():
    assert plan("gpu", total=8 * GIB, free=5 * GIB).num_pages == (5 * GIB - 2 * GIB - RESERVE) // PAGE_BYTES
    assert plan("gpu", total=8 * GIB, free=7 * GIB).num_pages == plan("gpu", total=8 * GIB).num_pages


@pytest.mark.parametrize(
    ("stats", "free"),
    [
        ({"bytes_limit": 9, "pool_bytes": 9, "largest_free_block_bytes": 5}, 5),
        ({"bytes_limit": 9, "pool_bytes": 4, "largest_free_block_bytes": 1}, None),  # the pool still grows
        (None, None),
    ],
)
def test_the_largest_piece_of_a_pool(stats: dict[str, int] | None, free: int | None):
    assert free_in_one_piece(SimpleNamespace(memory_stats=lambda: stats)) == free


def test_what_others_hold_of_the_device_is_not_given_out_twice():
    assert plan().num_pages - plan(in_use=GIB).num_pages == GIB // PAGE_BYTES


def test_the_cpu_gives_a_share_of_its_memory_and_no_more_than_can_be_used():
    ram = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert plan("cpu", max_num_seqs=2).num_pages == 2 * 100 + 1
    assert plan("cpu", max_num_seqs=500).num_pages == min(int(ram * CPU_SHARE) // PAGE_BYTES, 500 * 100 + 1)


def test_bytes_and_pages_can_be_set():
    assert plan(kv_cache_memory_bytes=300 * PAGE_BYTES).num_pages == 300
    assert plan(num_gpu_blocks_override=150).num_pages == 151, "page 0 is never given out"


def test_too_little_is_an_error_with_the_numbers_and_the_setting():
    with pytest.raises(ValueError, match=r"needs 101 KV-cache pages \(101 MiB\), and there is room for 0") as error:
        plan(total=3 * GIB)
    assert "weights 2048 MiB and step temporaries 1024 MiB" in str(error.value)
    assert "raise gpu_memory_utilization 0.9" in str(error.value)
    with pytest.raises(ValueError, match="lower max_model_len or raise num_gpu_blocks_override"):
        plan(num_gpu_blocks_override=50)
