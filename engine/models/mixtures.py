"""What a checkpoint says of its experts and its latent attention, family by family, in config.json's words."""

from __future__ import annotations

from engine.models.config import LatentSpec, MoeSpec
from engine.models.fields import Fields

MAX_EXPERTS = 4096
CLAMPED_SLOPE = 1.702  # of GPT-OSS's activation: a sigmoid that resembles the GELU

# What GGUF files call these keys, after the architecture's name and a dot.
GGUF_EXPERT_KEYS = {
    "expert_count": "num_local_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
}
GGUF_DEEPSEEK_KEYS = {
    "expert_count": "n_routed_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_count": "n_shared_experts",
    "expert_group_count": "n_group",
    "expert_group_used_count": "topk_group",
    "expert_weights_scale": "routed_scaling_factor",
    "expert_weights_norm": "norm_topk_prob",
    "expert_gating_func": "expert_gating_func",
    "leading_dense_block_count": "first_k_dense_replace",
    "attention.q_lora_rank": "q_lora_rank",
    "attention.kv_lora_rank": "kv_lora_rank",
    "attention.value_length": "value_length",
    "attention.key_length_mla": "key_length_mla",
    "attention.value_length_mla": "value_length_mla",
    "rope.dimension_count": "qk_rope_head_dim",
}
GGUF_SCORING = {1: "softmax", 2: "sigmoid"}  # expert_gating_func


def mixtral(get: Fields, index: int) -> MoeSpec | None:
    """-> every layer's experts, if the model has any."""
    if get("num_local_experts", int, 0, low=-1) == 0:
        return None
    return _checked(get, MoeSpec(*_counts(get), get("intermediate_size", int)))


def qwen3(get: Fields, index: int) -> MoeSpec | None:
    """-> a layer's experts: every n-th layer has some, but for those that are named."""
    plain = get("mlp_only_layers", list, [])
    if index in plain or (index + 1) % get("decoder_sparse_step", int, 1):
        return None
    return _checked(
        get, MoeSpec(*_counts(get), get("moe_intermediate_size", int), renormalize=get("norm_topk_prob", bool, False))
    )


def gpt_oss(get: Fields, index: int) -> MoeSpec | None:
    """-> every layer's experts. The softmax of the chosen logits is the softmax of all, renormalised."""
    if get("swiglu_alpha", float, CLAMPED_SLOPE) != CLAMPED_SLOPE:
        raise get.error("swiglu_alpha", f"is not supported other than as {CLAMPED_SLOPE}")
    return _checked(
        get,
        MoeSpec(
            *_counts(get), get("intermediate_size", int),
            router_bias=True, expert_bias=True, clamp=get("swiglu_limit", float, 7.0),
        ),
    )  # fmt: skip


def deepseek(get: Fields, index: int) -> MoeSpec | None:
    """-> a layer's experts: none for the first layers. DeepSeek-V2 and V3 (arXiv 2405.04434, 2412.19437)."""
    experts = get("n_routed_experts", int, 0, low=-1, high=MAX_EXPERTS)
    if not experts or index < get("first_k_dense_replace", int, 0, low=-1) or index % get("moe_layer_freq", int, 1):
        return None
    scoring = get("scoring_func", str, None) or _gguf_scoring(get)
    if scoring not in ("softmax", "sigmoid"):
        raise get.error("scoring_func", f"{scoring!r:.80} is not supported; softmax and sigmoid are")
    groups, top_groups = get("n_group", int, 1), get("topk_group", int, 1)
    method = get("topk_method", str, "noaux_tc" if scoring == "sigmoid" else "group_limited_greedy")
    if method not in ("greedy", "group_limited_greedy", "noaux_tc"):
        raise get.error(
            "topk_method", f"{method!r:.80} is not supported; greedy, group_limited_greedy and noaux_tc are"
        )
    if method == "greedy":
        groups = top_groups = 1
    renormalize = get("norm_topk_prob", bool, False)
    if renormalize and method != "noaux_tc":
        raise get.error("norm_topk_prob", f"is not supported with topk_method {method}")
    size = get("moe_intermediate_size", int)
    return _checked(
        get,
        MoeSpec(
            experts, get("num_experts_per_tok", int), size, get("n_shared_experts", int, 0, low=-1) * size,
            scoring=scoring,
            renormalize=renormalize,
            scale=get("routed_scaling_factor", float, 1.0),
            num_groups=groups,
            top_groups=top_groups,
            group_score_top=2 if method == "noaux_tc" and groups > 1 else 1,
            choice_bias=method == "noaux_tc",
        ),
    )  # fmt: skip


def deepseek_latent(get: Fields) -> LatentSpec:
    """-> the sizes of latent attention. Older GGUF files give those of a head's key and value, newer ones both."""
    if get("attention_bias", bool, False):
        raise get.error("attention_bias", "is not supported with latent attention")
    if not get("rope_interleave", bool, True):
        raise get.error("rope_interleave", "must be true: rope pairs that are not side by side are not supported")
    rope_dim = get("qk_rope_head_dim", int)
    key_dim = get("key_length_mla", int, None) or get("head_dim", int, 0, low=-1)
    value_dim = get("value_length_mla", int, None) or get("value_length", int, None)
    spec = LatentSpec(
        kv_rank=get("kv_lora_rank", int),
        nope_dim=get("qk_nope_head_dim", int, key_dim - rope_dim, low=0),
        rope_dim=rope_dim,
        value_dim=get("v_head_dim", int, value_dim or ...),
        q_rank=get("q_lora_rank", int, None),
    )
    if spec.rope_dim % 2 or spec.nope_dim % 2 or spec.nope_dim < 1:
        raise get.error("qk_nope_head_dim", f"and qk_rope_head_dim must be even, got {spec.nope_dim} and {rope_dim}")
    return spec


def _counts(get: Fields) -> tuple[int, int]:
    """-> experts, and how many of them a token goes to."""
    key = "num_local_experts" if get("num_experts", int, None) is None else "num_experts"
    return get(key, int, high=MAX_EXPERTS), get("num_experts_per_tok", int)


def _gguf_scoring(get: Fields) -> str:
    """-> what a GGUF file's number stands for; files from before it was written are of softmax models."""
    number = get("expert_gating_func", int, 1)
    if number not in GGUF_SCORING:
        raise get.error("expert_gating_func", f"{number} is not one of {GGUF_SCORING}")
    return GGUF_SCORING[number]


def _checked(get: Fields, spec: MoeSpec) -> MoeSpec:
    size, rest = divmod(spec.num_experts, spec.num_groups)
    eligible = size * spec.top_groups
    if rest or size < spec.group_score_top or spec.top_groups > spec.num_groups:
        groups = f"{spec.num_groups}, of which {spec.top_groups} count"
        raise get.error("n_group", f"{groups}, does not fit {spec.num_experts} experts")
    if spec.top_k > eligible:
        raise get.error("num_experts_per_tok", f"is {spec.top_k}, but only {eligible} experts are eligible")
    return spec
