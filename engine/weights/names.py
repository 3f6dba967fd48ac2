"""What tensors are called: for each part of a parameter, its name in a Hugging Face folder and in a GGUF file."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from engine.models.families import GGUF_ROPE_TENSORS, Family

HF, GGUF = 0, 1  # whose names a checkpoint has

# Part -> (Hugging Face's name, GGUF's name); {} is the layer, a second {} the expert. A family's own names come first.
TENSORS = {
    "embed": ("model.embed_tokens.weight", "token_embd.weight"),
    "final_norm": ("model.norm.weight", "output_norm.weight"),
    "lm_head": ("lm_head.weight", "output.weight"),
    "attn_norm": ("model.layers.{}.input_layernorm.weight", "blk.{}.attn_norm.weight"),
    "q": ("model.layers.{}.self_attn.q_proj.weight", "blk.{}.attn_q.weight"),
    "k": ("model.layers.{}.self_attn.k_proj.weight", "blk.{}.attn_k.weight"),
    "v": ("model.layers.{}.self_attn.v_proj.weight", "blk.{}.attn_v.weight"),
    "q_bias": ("model.layers.{}.self_attn.q_proj.bias", "blk.{}.attn_q.bias"),
    "k_bias": ("model.layers.{}.self_attn.k_proj.bias", "blk.{}.attn_k.bias"),
    "v_bias": ("model.layers.{}.self_attn.v_proj.bias", "blk.{}.attn_v.bias"),
    "q_norm": ("model.layers.{}.self_attn.q_norm.weight", "blk.{}.attn_q_norm.weight"),
    "k_norm": ("model.layers.{}.self_attn.k_norm.weight", "blk.{}.attn_k_norm.weight"),
    "out": ("model.layers.{}.self_attn.o_proj.weight", "blk.{}.attn_output.weight"),
    "out_bias": ("model.layers.{}.self_attn.o_proj.bias", "blk.{}.attn_output.bias"),
    "attn_post_norm": ("", "blk.{}.post_attention_norm.weight"),
    "mlp_norm": ("model.layers.{}.post_attention_layernorm.weight", "blk.{}.ffn_norm.weight"),
    "gate": ("model.layers.{}.mlp.gate_proj.weight", "blk.{}.ffn_gate.weight"),
    "up": ("model.layers.{}.mlp.up_proj.weight", "blk.{}.ffn_up.weight"),
    "down": ("model.layers.{}.mlp.down_proj.weight", "blk.{}.ffn_down.weight"),
    "gate_bias": ("model.layers.{}.mlp.gate_proj.bias", "blk.{}.ffn_gate.bias"),
    "up_bias": ("model.layers.{}.mlp.up_proj.bias", "blk.{}.ffn_up.bias"),
    "down_bias": ("model.layers.{}.mlp.down_proj.bias", "blk.{}.ffn_down.bias"),
    "mlp_post_norm": ("", "blk.{}.post_ffw_norm.weight"),
    "sinks": ("model.layers.{}.self_attn.sinks", "blk.{}.attn_sinks.weight"),
    "q_a": ("model.layers.{}.self_attn.q_a_proj.weight", "blk.{}.attn_q_a.weight"),
    "q_a_norm": ("model.layers.{}.self_attn.q_a_layernorm.weight", "blk.{}.attn_q_a_norm.weight"),
    "q_b": ("model.layers.{}.self_attn.q_b_proj.weight", "blk.{}.attn_q_b.weight"),
    "kv_a": ("model.layers.{}.self_attn.kv_a_proj_with_mqa.weight", "blk.{}.attn_kv_a_mqa.weight"),
    "kv_a_norm": ("model.layers.{}.self_attn.kv_a_layernorm.weight", "blk.{}.attn_kv_a_norm.weight"),
    "kv_b": ("model.layers.{}.self_attn.kv_b_proj.weight", "blk.{}.attn_kv_b.weight"),
    "k_b": ("", "blk.{}.attn_k_b.weight"),
    "v_b": ("", "blk.{}.attn_v_b.weight"),
    "router": ("model.layers.{}.mlp.gate.weight", "blk.{}.ffn_gate_inp.weight"),
    "router_bias": ("", "blk.{}.ffn_gate_inp.bias"),
    "choice_bias": ("model.layers.{}.mlp.gate.e_score_correction_bias", "blk.{}.exp_probs_b.bias"),
    "experts_gate": ("model.layers.{}.mlp.experts.{}.gate_proj.weight", "blk.{}.ffn_gate_exps.weight"),
    "experts_up": ("model.layers.{}.mlp.experts.{}.up_proj.weight", "blk.{}.ffn_up_exps.weight"),
    "experts_down": ("model.layers.{}.mlp.experts.{}.down_proj.weight", "blk.{}.ffn_down_exps.weight"),
    "experts_gate_bias": ("", "blk.{}.ffn_gate_exps.bias"),
    "experts_up_bias": ("", "blk.{}.ffn_up_exps.bias"),
    "experts_down_bias": ("", "blk.{}.ffn_down_exps.bias"),
    "shared_gate": ("model.layers.{}.mlp.shared_experts.gate_proj.weight", "blk.{}.ffn_gate_shexp.weight"),
    "shared_up": ("model.layers.{}.mlp.shared_experts.up_proj.weight", "blk.{}.ffn_up_shexp.weight"),
    "shared_down": ("model.layers.{}.mlp.shared_experts.down_proj.weight", "blk.{}.ffn_down_shexp.weight"),
}


def tensor_name(family: Family, style: int, path: tuple[Any, ...], part: str) -> str:
    """-> the tensor that holds a part of the parameter at `path`, e.g. ("layers", 3, "qkv") and "q".

    An expert's part has its number behind a dot: "experts_up.7".
    """
    part, _, expert = part.partition(".")
    own = (family.names, family.gguf_names)[style]
    name = own.get(part) or TENSORS[part][style]
    return name.format(path[1], expert) if path[0] == "layers" else name


def predictor_layers(names: Iterable[str], count: int) -> tuple[str, ...]:
    """-> what the names of layers begin with that predict further tokens (DeepSeek-V3, section 2.2), behind `count`."""
    found = {match[0] for name in names if (match := re.match(r"model\.layers\.(\d+)\.(?=eh_proj\.)", name))}
    return tuple(prefix for prefix in found if int(prefix.split(".")[2]) >= count)


def is_neutral(name: str, tied: bool, predictors: tuple[str, ...]) -> bool:
    """-> whether a tensor may be there without being used: rope's, which the config has, a tied head's copy, or one of
    the layers that predict further tokens."""
    rope = name.endswith("rotary_emb.inv_freq") or name in GGUF_ROPE_TENSORS
    return rope or (tied and name == "lm_head.weight") or name.startswith(predictors)
