"""Experts and latent attention as llama.cpp's converter stores them: stacked, taken apart, and said in metadata."""

from __future__ import annotations

import re
from typing import Any

import gguf
import numpy as np

Tensors = dict[str, np.ndarray]


def converted(config: dict[str, Any], tensors: Tensors, fused_latent: bool) -> Tensors:
    """-> the tensors with the shapes that GGUF has, under names that the gguf package knows.

    `fused_latent`: as before 2025-04, when the latent's projections stayed one tensor.
    """
    found: Tensors = {}
    experts: dict[str, list[np.ndarray]] = {}
    for name in sorted(tensors, key=lambda name: [int(n) for n in re.findall(r"\d+", name)]):
        tensor = tensors[name]
        if match := re.fullmatch(r"(.*\.experts)\.\d+(\..*)", name):
            experts.setdefault(match[1] + match[2], []).append(tensor)
        elif "experts.gate_up_proj" in name:  # GPT-OSS: [experts, in, 2 out], gate and up in turn
            kind = "bias" if name.endswith("_bias") else "weight"
            for i, part in enumerate(("gate_proj", "up_proj")):
                half = np.moveaxis(tensor[..., i::2], -1, 1)
                found[f"{name.partition('gate_up_proj')[0]}{part}.{kind}"] = np.ascontiguousarray(half)
        elif name.endswith("experts.down_proj"):
            found[f"{name}.weight"] = np.ascontiguousarray(tensor.transpose(0, 2, 1))
        elif name.endswith("experts.down_proj_bias"):
            found[name.replace("_bias", ".bias")] = tensor
        elif name.endswith("sinks"):
            found[f"{name}.weight"] = tensor
        elif name.endswith("e_score_correction_bias"):
            found[name.replace("_bias", ".bias")] = tensor
        elif "kv_b_proj" in name and not fused_latent:
            heads = tensor.reshape(config["num_attention_heads"], -1, tensor.shape[-1])
            k, v = np.split(heads, [config["qk_nope_head_dim"]], axis=1)
            found[name.replace("kv_b", "k_b")] = np.ascontiguousarray(k.transpose(0, 2, 1))
            found[name.replace("kv_b", "v_b")] = np.ascontiguousarray(v)
        else:
            found[name] = tensor
    return found | {name: np.stack(parts) for name, parts in experts.items()}


def write_mixture(writer: gguf.GGUFWriter, config: dict[str, Any], fused_latent: bool) -> None:
    writer.add_expert_count(config.get("num_local_experts") or config["n_routed_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    if "moe_intermediate_size" in config:
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    if "kv_lora_rank" in config:
        write_deepseek(writer, config, fused_latent)


def write_deepseek(writer: gguf.GGUFWriter, config: dict[str, Any], fused_latent: bool) -> None:
    rank, rope, value = (config[key] for key in ("kv_lora_rank", "qk_rope_head_dim", "v_head_dim"))
    key = config["qk_nope_head_dim"] + rope
    writer.add_leading_dense_block_count(config["first_k_dense_replace"])
    writer.add_expert_shared_count(config["n_shared_experts"])
    writer.add_expert_group_count(config["n_group"])
    writer.add_expert_group_used_count(config["topk_group"])
    writer.add_expert_weights_scale(config["routed_scaling_factor"])
    if config.get("norm_topk_prob"):
        writer.add_expert_weights_norm(True)
    if config["architectures"] == ["DeepseekV3ForCausalLM"]:
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    if config.get("q_lora_rank"):
        writer.add_q_lora_rank(config["q_lora_rank"])
    writer.add_kv_lora_rank(rank)
    writer.add_key_length(key if fused_latent else rank + rope)
    writer.add_value_length(value if fused_latent else rank)
    if not fused_latent:
        writer.add_key_length_mla(key)
        writer.add_value_length_mla(value)
    writer.add_rope_scaling_yarn_log_mul(0.1 * config["rope_parameters"]["mscale_all_dim"])
