"""Writes a model folder as llama.cpp's converter would: with the names of the `gguf` package, and its changes."""

from __future__ import annotations

import json
import math
import pathlib
from typing import Any

import gguf
import numpy as np
import safetensors.numpy

from tests.engine.models.gguf_mixtures import converted, write_mixture

ARCHITECTURES = {
    "LlamaForCausalLM": gguf.MODEL_ARCH.LLAMA,
    "SmolLM3ForCausalLM": gguf.MODEL_ARCH.SMOLLM3,
    "Qwen2ForCausalLM": gguf.MODEL_ARCH.QWEN2,
    "Qwen3ForCausalLM": gguf.MODEL_ARCH.QWEN3,
    "Gemma2ForCausalLM": gguf.MODEL_ARCH.GEMMA2,
    "Gemma3ForCausalLM": gguf.MODEL_ARCH.GEMMA3,
    "Phi3ForCausalLM": gguf.MODEL_ARCH.PHI3,
    "Olmo2ForCausalLM": gguf.MODEL_ARCH.OLMO2,
    "MixtralForCausalLM": gguf.MODEL_ARCH.LLAMA,
    "Qwen3MoeForCausalLM": gguf.MODEL_ARCH.QWEN3MOE,
    "GptOssForCausalLM": gguf.MODEL_ARCH.GPT_OSS,
    "DeepseekV2ForCausalLM": gguf.MODEL_ARCH.DEEPSEEK2,
    "DeepseekV3ForCausalLM": gguf.MODEL_ARCH.DEEPSEEK2,
}
PERMUTED = ("LlamaForCausalLM", "SmolLM3ForCausalLM", "MixtralForCausalLM")  # rope pairs side by side


def write_gguf(folder: pathlib.Path, path: pathlib.Path, *, fused_latent: bool = False) -> pathlib.Path:
    """Write the folder's config.json and weights as a GGUF file. -> its path"""
    config = json.loads((folder / "config.json").read_text())
    config = {key: value for key, value in config.items() if value is not None}
    architecture = ARCHITECTURES[config["architectures"][0]]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture])
    write_sizes(writer, config)
    write_rope(writer, config)
    if "num_experts_per_tok" in config:
        write_mixture(writer, config, fused_latent)
    names = gguf.get_tensor_name_map(architecture, config["num_hidden_layers"])
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    for name, tensor in converted(config, tensors, fused_latent).items():
        gguf_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert gguf_name is not None, name
        writer.add_tensor(gguf_name, changed(config, name, tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def changed(config: dict[str, Any], name: str, tensor: np.ndarray) -> np.ndarray:
    """-> the tensor as the converter stores it."""
    if config["architectures"][0].startswith("Gemma") and name.endswith("norm.weight"):
        return tensor + np.float32(1)
    for part, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
        if part in name and config["architectures"][0] in PERMUTED:
            halves = tensor.reshape(config[heads], 2, -1, *tensor.shape[1:])
            return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(tensor.shape)
    return tensor


def write_sizes(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    latent = "kv_lora_rank" in config
    writer.add_head_count_kv(1 if latent else config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    if "head_dim" in config and not latent:
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
    if config.get("attn_logit_softcapping"):
        writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
    if config.get("final_logit_softcapping"):
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    if config.get("sliding_window"):
        writer.add_sliding_window(config["sliding_window"])
        if "layer_types" in config:
            writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config["layer_types"]])


def write_rope(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    parameters = config["rope_parameters"]
    if "sliding_attention" in parameters:
        writer.add_rope_freq_base_swa(parameters["sliding_attention"]["rope_theta"])
        parameters = parameters["full_attention"]
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    dim = config.get("qk_rope_head_dim") or int(head_dim * parameters.get("partial_rotary_factor", 1))
    writer.add_rope_dimension_count(dim)
    writer.add_rope_freq_base(parameters["rope_theta"])
    kind, original = parameters["rope_type"], parameters.get("original_max_position_embeddings")
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(parameters["factor"])
    if kind in ("yarn", "longrope"):
        writer.add_rope_scaling_orig_ctx_len(original)
    if kind == "yarn":
        writer.add_rope_scaling_yarn_beta_fast(parameters["beta_fast"])
        writer.add_rope_scaling_yarn_beta_slow(parameters["beta_slow"])
    if kind == "longrope":
        stretch = config["max_position_embeddings"] / original
        writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(stretch) / math.log(original)))
        writer.add_tensor("rope_factors_long.weight", np.array(parameters["long_factor"], np.float32))
        writer.add_tensor("rope_factors_short.weight", np.array(parameters["short_factor"], np.float32))
    if kind == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_factors(parameters, dim))


def llama3_factors(parameters: dict[str, Any], dim: int) -> np.ndarray:
    """-> what llama3's scaling divides each frequency by. float32 [dim / 2]"""
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    factors = []
    for i in range(0, dim, 2):
        length = 2 * math.pi * parameters["rope_theta"] ** (i / dim)
        turns = parameters["original_max_position_embeddings"] / length
        smooth = min(max((turns - low) / (high - low), 0), 1)
        factors.append(1 / ((1 - smooth) / parameters["factor"] + smooth))
    return np.array(factors, np.float32)
