"""Shapes of known models, to be run with random weights where the models themselves are not at hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SHAPES: dict[str, dict[str, Any]] = {
    "llama-8b": dict(
        architectures=["LlamaForCausalLM"], model_type="llama", hidden_size=4096, intermediate_size=14336,
        num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, head_dim=128, vocab_size=128256,
        rms_norm_eps=1e-5, rope_theta=500000.0, max_position_embeddings=131072, tie_word_embeddings=False,
        hidden_act="silu", torch_dtype="bfloat16", bos_token_id=128000, eos_token_id=128001,
        rope_scaling=dict(
            factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192,
            rope_type="llama3",
        ),
    ),
    "qwen3-0.6b": dict(
        architectures=["Qwen3ForCausalLM"], model_type="qwen3", hidden_size=1024, intermediate_size=3072,
        num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8, head_dim=128, vocab_size=151936,
        rms_norm_eps=1e-6, rope_theta=1000000.0, max_position_embeddings=40960, tie_word_embeddings=True,
        hidden_act="silu", torch_dtype="bfloat16", bos_token_id=151643, eos_token_id=151645, attention_bias=False,
    ),
}  # fmt: skip


def write_shape(name: str, folder: Path) -> dict[str, Any]:
    """Write the shape's config.json. -> the engine's settings that run it from there with random weights."""
    (folder / "config.json").write_text(json.dumps(SHAPES[name]))
    return {"model": str(folder), "load_format": "dummy"}
