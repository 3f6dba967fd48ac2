"""Make tests/data/tiny: a tiny model of every family with random weights, and what transformers says of it.

    OTHER/python scripts/make_tiny_models.py [NAME ...]      ("ropes": the frequencies of scaled ropes)

needs torch and transformers, which are no dependencies of the project. Each model is a folder as transformers saves it,
with goldens beside its weights: three prompts, the log-probability of each of their tokens but the first, and the
greedy tokens that follow, all in float32. Norms and biases are drawn too, so that leaving one out shows. A second
goldens file, if there is one, is of the same weights with another longest sequence.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

TINY = Path(__file__).parents[1] / "tests" / "data" / "tiny"
SIZES = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=160,
    max_position_embeddings=256,
    initializer_range=0.3,
)
LLAMA3_ROPE = dict(
    rope_type="llama3",
    rope_theta=10000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
YARN_ROPE = dict(
    rope_type="yarn", rope_theta=10000.0, factor=8.0, original_max_position_embeddings=32, beta_fast=8.0, beta_slow=1.0
)
DYNAMIC_ROPE = dict(rope_type="dynamic", rope_theta=500.0, factor=8.0)
LINEAR_ROPE = dict(rope_type="linear", rope_theta=10000.0, factor=4.0)
LONG_ROPE = dict(
    rope_type="longrope",
    rope_theta=500.0,
    short_factor=[1.0, 1.1, 1.5],
    long_factor=[1.2, 2.5, 6.0],
    original_max_position_embeddings=24,
)
DEEPSEEK = SIZES | dict(
    num_key_value_heads=4, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=12, v_head_dim=10,
    n_routed_experts=8, num_experts_per_tok=3, moe_intermediate_size=16, n_shared_experts=2, n_group=4, topk_group=2,
    first_k_dense_replace=1,
)  # fmt: skip
WINDOWS = ["sliding_attention", "sliding_attention", "full_attention"]
CONFIGS = {
    "llama3": transformers.LlamaConfig(**SIZES, rope_parameters=LLAMA3_ROPE),
    "llama-biased": transformers.LlamaConfig(
        **SIZES, attention_bias=True, mlp_bias=True, tie_word_embeddings=True, rope_parameters=LINEAR_ROPE
    ),
    "mistral": transformers.MistralConfig(
        **SIZES | dict(max_position_embeddings=32), sliding_window=9, head_dim=16, rope_parameters=DYNAMIC_ROPE
    ),
    "smollm3": transformers.SmolLM3Config(
        **SIZES | dict(num_hidden_layers=4), pad_token_id=0,
        rope_parameters=dict(rope_type="default", rope_theta=500.0),
    ),
    "qwen2": transformers.Qwen2Config(**SIZES),
    "qwen3": transformers.Qwen3Config(**SIZES, head_dim=16, rope_parameters=YARN_ROPE),
    "gemma2": transformers.Gemma2Config(
        **SIZES, head_dim=16, query_pre_attn_scalar=24, sliding_window=9,
        attn_logit_softcapping=3.0, final_logit_softcapping=8.0,
    ),
    "gemma3": transformers.Gemma3TextConfig(
        **SIZES, head_dim=16, query_pre_attn_scalar=16, sliding_window=9, layer_types=WINDOWS,
        rope_parameters=dict(
            full_attention=LINEAR_ROPE, sliding_attention=dict(rope_type="default", rope_theta=500.0)
        ),
    ),
    "phi3": transformers.Phi3Config(
        **SIZES, pad_token_id=0, sliding_window=40, original_max_position_embeddings=24,
        rope_parameters=LONG_ROPE | dict(partial_rotary_factor=0.75),
    ),
    "olmo2": transformers.Olmo2Config(**SIZES, rope_parameters=dict(rope_type="default", rope_theta=500.0)),
    "mixtral": transformers.MixtralConfig(
        **SIZES | dict(intermediate_size=24), num_local_experts=6, num_experts_per_tok=2, sliding_window=None
    ),
    "qwen3-moe": transformers.Qwen3MoeConfig(
        **SIZES, head_dim=16, num_experts=8, num_experts_per_tok=3, moe_intermediate_size=16, norm_topk_prob=True
    ),
    "gpt-oss": transformers.GptOssConfig(
        **SIZES | dict(intermediate_size=32, initializer_range=0.8),  # so that its activation meets its limits
        head_dim=16, num_local_experts=4, num_experts_per_tok=2, sliding_window=9,
        rope_parameters=YARN_ROPE | dict(truncate=False),
    ),
    "deepseek-v2": transformers.DeepseekV2Config(
        **DEEPSEEK, q_lora_rank=None, topk_method="group_limited_greedy", routed_scaling_factor=1.5,
        rope_parameters=YARN_ROPE | dict(mscale=0.7, mscale_all_dim=0.7),
    ),
    "deepseek-v3": transformers.DeepseekV3Config(
        **DEEPSEEK, q_lora_rank=20, routed_scaling_factor=2.5,
        rope_parameters=YARN_ROPE | dict(mscale=1.0, mscale_all_dim=1.0),
    ),
}  # fmt: skip
LENGTHS, OUTPUT_LEN = (70, 45, 33), 32
# Prompts and answers that stay within the original length, where longrope has other frequencies.
SHORT = {"phi3": dict(max_model_len=24, lengths=(13, 9, 4), output_len=8)}
# Options of scaled ropes that no tiny model has.
ROPES = [
    YARN_ROPE | dict(truncate=False, original_max_position_embeddings=4096),
    YARN_ROPE | dict(attention_factor=1.25),
    YARN_ROPE | dict(mscale=0.7, mscale_all_dim=1.3),
    YARN_ROPE | dict(factor=None, beta_fast=None),
    YARN_ROPE | dict(partial_rotary_factor=0.5, rope_theta=5e5),
    LONG_ROPE | dict(short_factor=[1.5] * 4, long_factor=[2.5, 3, 4, 5], factor=6.0),
    LONG_ROPE | dict(short_factor=[1.5] * 4, long_factor=[2.5, 3, 4, 5], attention_factor=1.1),
    LLAMA3_ROPE | dict(partial_rotary_factor=0.5, factor=32.0, high_freq_factor=8.0),
    LINEAR_ROPE | dict(partial_rotary_factor=0.75),
]
MIN_MARGIN = 1e-3  # between the two most likely tokens, so that rounding doesn't decide


def main() -> None:
    for name in sys.argv[1:] or ["ropes", *CONFIGS]:
        if name == "ropes":
            write(TINY.parent / "rope_frequencies.json", rope_frequencies())
            continue
        model = make_model(CONFIGS[name])
        folder = TINY / name
        model.save_pretrained(folder)
        (folder / "generation_config.json").unlink(missing_ok=True)
        write(folder / "goldens.json", goldens(model, LENGTHS, OUTPUT_LEN))
        if name in SHORT:
            short = dict(SHORT[name])
            limit = dict(max_model_len=short.pop("max_model_len"))
            write(folder / "goldens_short.json", limit | goldens(model, **short))


def rope_frequencies() -> list[dict]:
    """-> each of ROPES, and what transformers computes of it for a short and a long sequence."""
    found = []
    for parameters in ROPES:
        config = transformers.LlamaConfig(**SIZES, rope_parameters=dict(parameters))
        compute = ROPE_INIT_FUNCTIONS[parameters["rope_type"]]
        results = {length: compute(config, None, seq_len=length) for length in (16, 256)}
        found.append(
            dict(
                rope_parameters=parameters,
                frequencies={length: frequencies.tolist() for length, (frequencies, _) in results.items()},
                attention_factor=results[16][1],
            )
        )
    return found


def make_model(config: transformers.PreTrainedConfig) -> transformers.PreTrainedModel:
    """-> the model with random weights, everything that starts as a constant included."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for name, values in [*model.named_parameters(), *model.named_buffers()]:
        if any(part in name for part in ("norm", "bias", "sinks")):
            values.data += 0.3 * torch.randn_like(values)
    if config.rope_parameters and config.rope_parameters.get("rope_type") == "dynamic":
        # Frequencies grow with the longest sequence seen, and stay; ours are those of the longest possible.
        longest = int(config.max_position_embeddings * config.rope_parameters["factor"])
        model(torch.zeros(1, longest, dtype=torch.long))
    return model


@torch.no_grad()
def goldens(model: transformers.PreTrainedModel, lengths: tuple[int, ...], output_len: int) -> dict:
    """-> prompts of these lengths, and what the model says of them."""
    prompts, logprobs, answers, spread = [], [], [], 0.0
    for length in lengths:
        while True:
            tokens = torch.randint(3, model.config.vocab_size, (1, length))
            logits = model(tokens).logits[0].double()
            answer = greedy(model, tokens, output_len)
            if answer is not None:
                break
        ids = tokens[0].tolist()
        scores = torch.log_softmax(logits, -1)
        prompts.append(ids)
        answers.append(answer)
        logprobs.append([round(scores[i, ids[i + 1]].item(), 6) for i in range(length - 1)])
        spread = max(spread, (logits.max() - logits.min()).item())
    return {
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "prompts": prompts,
        "logprobs": logprobs,
        "spread": round(spread, 3),
        "answers": answers,
    }


def greedy(model: transformers.PreTrainedModel, tokens: torch.Tensor, output_len: int) -> list[int] | None:
    """-> the most likely tokens, or None if one of them is so by less than MIN_MARGIN."""
    answer = []
    for _ in range(output_len):
        best = model(tokens).logits[0, -1].topk(2)
        if best.values[0] - best.values[1] < MIN_MARGIN:
            return None
        answer.append(best.indices[0].item())
        tokens = torch.cat([tokens, best.indices[:1].reshape(1, 1)], dim=1)
    return answer


def write(path: Path, values: dict | list) -> None:
    path.write_text(json.dumps(values) + "\n")


if __name__ == "__main__":
    main()
