"""Run by tests in a process with 8 CPU devices: a tiny model's answers on one device and on meshes of several.

python -m tests.engine.parallel_program FOLDER TPxPPxDP[e|h]... prints a JSON object by mesh. e: whole experts on
devices; h: longer steps in halves, as they are on GPUs. FOLDER is in tests/data/tiny, or a path; without weights they
are random.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import jax

TINY = Path(__file__).parents[1] / "data" / "tiny"


def answers(folder: str, mesh: str) -> dict:
    from engine import LLM, SamplingParams, layout
    from tests.engine.buckets import few_buckets

    layout.HALF_TOKENS = {"cpu": 4} if mesh.endswith("h") else {}
    tensor, pipeline, data = map(int, mesh.rstrip("eh").split("x"))
    has_weights = (TINY / folder / "model.safetensors").exists()
    with few_buckets(decodes=True):
        llm = LLM(
            model=str(TINY / folder), load_format="auto" if has_weights else "dummy", skip_tokenizer_init=True,
            max_num_seqs=2, max_num_batched_tokens=16, max_model_len=128, num_gpu_blocks_override=24, block_size=16,
            tensor_parallel_size=tensor, pipeline_parallel_size=pipeline, data_parallel_size=data,
            enable_expert_parallel=mesh.endswith("e"),
        )  # fmt: skip
    prompts = json.loads((TINY / folder / "goldens.json").read_text())["prompts"][:3]
    given = [{"prompt_token_ids": prompt} for prompt in [*prompts, prompts[0]]]  # the last finds a prefix
    greedy = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    wishes = SamplingParams(
        temperature=0.9, top_p=0.9, frequency_penalty=0.5, seed=5, max_tokens=4, logprobs=2, prompt_logprobs=1
    )
    tokens = lambda params: [output.outputs[0].token_ids for output in llm.generate(given, params, use_tqdm=False)]
    asked = llm.generate(given, wishes, use_tqdm=False)
    likely = [entry.logprob for o in asked for at in o.prompt_logprobs or [] if at for entry in at.values()]
    vectors = [output.outputs.embedding for output in llm.embed(given[:2], use_tqdm=False)]
    found = {"greedy": tokens(greedy), "drawn": [o.outputs[0].token_ids for o in asked], "likely": likely}
    return found | {"vectors": vectors, "hits": llm.get_metrics().prefix_cache_hits > 0}


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)
    json.dump({mesh: answers(sys.argv[1], mesh) for mesh in sys.argv[2:]}, sys.stdout)
