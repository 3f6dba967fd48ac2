"""Six offline workloads: tokens a second, and how close the device's own limit is.

    python scripts/bench_offline.py --model FOLDER | --shape llama-8b [--out offline.json] [--only decode_b64 ...]

Prompts are random token ids, outputs are forced to their full length, decoding is greedy. --shape takes random weights.
The limit of a workload is the time that its weights and KV cache take at the measured copy bandwidth, step after step,
plus the time that its prompts' products take at the measured bf16 rate.

With --draft-shape a model of that shape and random weights drafts --drafts tokens in every step. Random weights agree
on nothing, so --forced-acceptance says which share of the drafts is accepted, whatever the model says: only speed means
something then, and the limit that is printed, of one step for each token, is none.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
from machine import copy_bandwidth, matmul_rate
from model_options import add_model_options, model_settings

from engine import LLM, SamplingParams
from engine.bench.shapes import SHAPES
from engine.config import make_config
from engine.memory import limit_gpu_pool


@dataclasses.dataclass(frozen=True)
class Workload:
    """Prompts as token ids, and how many tokens to generate for each."""

    prompts: list[list[int]]
    lengths: list[int]
    shared: int = 0  # tokens of a prefix that all prompts have in common


def workloads(vocab_size: int) -> dict[str, Workload]:
    """-> every workload, by name. Each draws from a generator of its own, so that one can be run without the others."""

    def drawing() -> Any:
        source = random.Random(0)
        return source, lambda n: [source.randrange(1000, min(vocab_size, 100000)) for _ in range(n)]

    def same(count: int, prompt: int, output: int) -> Workload:
        _, ids = drawing()
        return Workload([ids(prompt) for _ in range(count)], [output] * count)

    def spread() -> Workload:
        """Lengths as in conversations: log-normal."""
        source, ids = drawing()
        prompts, lengths = [], []
        for _ in range(512):
            prompt = max(8, min(2000, int(source.lognormvariate(5.0, 1.0))))
            lengths.append(max(8, min(1000, int(source.lognormvariate(5.0, 0.8)))))
            prompts.append(ids(prompt))
        return Workload(prompts, lengths)

    def prefix() -> Workload:
        _, ids = drawing()
        shared = ids(1900)
        return Workload([shared + ids(100) for _ in range(64)], [32] * 64, shared=1900)

    return {
        "latency_b1": same(1, 128, 256),
        "decode_b64": same(64, 128, 256),
        "decode_b256": same(256, 128, 256),
        "prefill_32x2k": same(32, 2048, 1),
        "mixed_512": spread(),
        "prefix_64x(1900+100)": prefix(),
    }


def least_seconds(work: Workload, llm: LLM, bandwidth: float, rate: float) -> float:
    """-> the time below which no engine comes: bytes over bandwidth for decodes, FLOPs over rate for prompts."""
    model, resolved = llm.core.model_config, llm.core.resolved
    weights = llm.core.runner.memory.weights
    embedding = 0 if model.tie_embeddings else model.vocab_size * model.hidden_size * 2
    heads = model.num_kv_heads * model.head_dim
    kv = 2 * heads * 2 * len(model.layers)  # bytes a token
    steps = max(max(work.lengths) - 1, -(-sum(n - 1 for n in work.lengths) // resolved.max_num_seqs))
    read = sum(
        (n - 1) * (len(prompt) + n / 2) * kv for prompt, n in zip(work.prompts, work.lengths, strict=True)
    ) + steps * (weights - embedding)  # fmt: skip
    products = weights / 2 - model.vocab_size * model.hidden_size * (1 if model.tie_embeddings else 2)
    prompts = sum(len(prompt) for prompt in work.prompts) - work.shared * (len(work.prompts) - 1)
    square = sum(len(prompt) ** 2 - work.shared**2 for prompt in work.prompts)
    flops = 2 * products * prompts + 2 * square * heads * model.group * len(model.layers)
    return read / bandwidth + flops / rate


def run(llm: LLM, work: Workload) -> float:
    """-> seconds. Errors: AssertionError if an output is not what was asked for."""
    prompts = [{"prompt_token_ids": ids} for ids in work.prompts]
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True, detokenize=False) for n in work.lengths]
    llm.reset_prefix_cache()
    started = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    elapsed = time.perf_counter() - started
    for output, wanted in zip(outputs, work.lengths, strict=True):
        tokens = output.outputs[0].token_ids
        assert len(tokens) == wanted, (len(tokens), wanted)
        assert all(0 <= token < llm.core.model_config.vocab_size for token in tokens)
    return elapsed


def drafting(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """-> speculative_config; `folder` gets the config of a model of --draft-shape with the vocabulary of --shape."""
    draft = SHAPES[options.draft_shape] | {"vocab_size": SHAPES[options.shape]["vocab_size"]}
    (folder / "config.json").write_text(json.dumps(draft))
    return dict(
        method="draft_model", model=str(folder), num_speculative_tokens=options.drafts, adaptive=False,
        benchmark_forced_acceptance=options.forced_acceptance,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_model_options(parser)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--profile", type=Path, help="write a profiler trace of one more run of each workload here")
    parser.add_argument("--draft-shape", choices=SHAPES, help="speculate with a model of this shape; needs --shape")
    parser.add_argument("--drafts", type=int, default=4, help="tokens that it drafts in every step")
    parser.add_argument("--forced-acceptance", type=float, default=0.7, help="share of drafts that count as right")
    parser.add_argument("--settings", default="{}", help="JSON: more of EngineConfig's settings")
    options = parser.parse_args()
    if options.draft_shape and not options.shape:
        parser.error("--draft-shape needs --shape")
    settings = dict(max_model_len=4096) | json.loads(options.settings)
    limit_gpu_pool(make_config(model=options.model or options.shape, **settings))  # before anything touches the GPU
    bandwidth, rate = copy_bandwidth(), matmul_rate()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch, model_settings(options) as model:
        if options.draft_shape:
            settings["speculative_config"] = drafting(options, Path(scratch))
        llm = LLM(**model, **settings)
    ready = time.perf_counter() - started
    report: dict[str, Any] = {
        "model": options.shape or options.model, "attention": llm.core.runner.backend.name, "startup_s": ready,
        "copy_bytes_per_s": bandwidth, "bf16_flop_per_s": rate, "runs": {},
    }  # fmt: skip
    print(f"ready in {ready:.1f} s; copy {bandwidth / 1e12:.2f} TB/s, bf16 {rate / 1e12:.0f} TFLOP/s", flush=True)
    for name, work in workloads(llm.core.model_config.vocab_size).items():
        if options.only and name not in options.only:
            continue
        elapsed = min(run(llm, work) for _ in range(options.repeat))
        tokens_in, tokens_out = sum(map(len, work.prompts)), sum(work.lengths)
        share = least_seconds(work, llm, bandwidth, rate) / elapsed
        figures = dict(
            seconds=elapsed, in_tok_s=tokens_in / elapsed, out_tok_s=tokens_out / elapsed, share_of_limit=share
        )
        report["runs"][name] = figures
        speculation = llm.get_metrics().speculation
        if speculation is not None:
            figures["drafts"] = vars(speculation)
        shown = f"{elapsed:8.3f} s {figures['in_tok_s']:10.0f} in/s {figures['out_tok_s']:9.0f} out/s"
        print(f"{name:22}{shown} {share:6.1%} of the limit", flush=True)
        if options.profile:
            with jax.profiler.trace(str(options.profile / name)):
                run(llm, work)
        if options.out:
            options.out.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
