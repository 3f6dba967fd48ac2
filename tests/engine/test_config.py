"""Settings: their checks, their defaults by device, and their flags."""

from __future__ import annotations

import pytest
from absl import flags

from engine.config import SETTINGS, EngineConfig, config_from_flags, define_flags


def test_every_setting_is_a_flag_with_the_same_default():
    values = flags.FlagValues()
    define_flags(values)
    values(["program", "--model=m.gguf", "--max_num_seqs=7", "--noenable_prefix_caching", "--dtype=bfloat16"])
    assert set(values) >= {setting.name for setting in SETTINGS}
    assert config_from_flags(values) == EngineConfig(
        model="m.gguf", max_num_seqs=7, enable_prefix_caching=False, dtype="bfloat16"
    )


def test_defaults_follow_the_platform_and_the_model():
    config = EngineConfig(model="m")
    cpu, gpu, tpu = (config.resolve(model_max_len=2048, platform=p) for p in ("cpu", "gpu", "tpu"))
    assert (cpu.dtype, cpu.max_num_seqs, cpu.max_num_batched_tokens, cpu.page_size) == ("float32", 32, 512, 128)
    assert (gpu.dtype, gpu.max_num_seqs, gpu.page_size) == ("bfloat16", 256, 16)
    assert (tpu.kv_cache_dtype, tpu.page_size, tpu.max_model_len) == ("bfloat16", 128, 2048)


def test_a_large_max_num_seqs_raises_the_token_budget_with_it():
    config = EngineConfig(model="m", max_num_seqs=600)
    assert config.resolve(model_max_len=2048, platform="cpu").max_num_batched_tokens == 600


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "model: name a GGUF file"),
        ({"model": 3}, "model: must be of type str"),
        ({"model": "m", "max_num_seqs": 0}, "max_num_seqs: must be at least 1, got 0"),
        ({"model": "m", "max_num_seqs": True}, "max_num_seqs: must be of type int, got True"),
        ({"model": "m", "gpu_memory_utilization": float("nan")}, "gpu_memory_utilization: must be at least 0"),
        ({"model": "m", "scheduling_policy": "lifo"}, "scheduling_policy: must be one of"),
        ({"model": "m", "speculative_config": {"method": "x"}}, "speculative_config: method must be one of"),
    ],
)
def test_a_setting_out_of_range_is_named(settings: dict, message: str):
    with pytest.raises(ValueError, match=message):
        EngineConfig(**settings)
