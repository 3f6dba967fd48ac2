"""`python -m engine.bench throughput` and `latency`: the engine without a server, on the machine where it runs."""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import flags
from tqdm import tqdm

from engine.bench.datasets import Sample, define_dataset_flags, load_samples
from engine.bench.shapes import SHAPES, write_shape
from engine.config import SETTINGS, config_from_flags, define_flags
from engine.request import SamplingParams

if TYPE_CHECKING:  # importing it brings JAX
    from engine.llm import LLM

THROUGHPUT_PURPOSE = "how many requests and tokens a second the engine makes of a set of prompts"
LATENCY_PURPOSE = "how long one batch of prompts of the same length takes"
PERCENTILES = (10, 25, 50, 75, 90, 99)


def define_engine(values: flags.FlagValues) -> None:
    """Define the engine's flags, and --shape for those who have no model at hand."""
    define_flags(values)
    text = "Run a shape with random weights instead of a model."
    flags.DEFINE_enum("shape", None, list(SHAPES), text, flag_values=values)


def define_output(values: flags.FlagValues) -> None:
    """Define where `write_figures` writes."""
    flags.DEFINE_string("output_json", None, "Write the figures here.", flag_values=values)


def engine_settings(values: flags.FlagValues, folder: Path) -> dict[str, Any]:
    """-> arguments for LLM; `folder` is for a shape's files and must outlive it. Errors: ValueError."""
    if values.shape is not None:
        if values.model:
            raise ValueError("shape: stands for a model with random weights; leave --model or it out")
        for name, value in write_shape(values.shape, folder).items():
            values[name].value = value
    elif not values.model:
        raise ValueError("model: name a model with --model, or a --shape")
    config = config_from_flags(values)
    return {s.name: getattr(config, s.name) for s in SETTINGS}


def define_throughput(values: flags.FlagValues) -> None:
    define_engine(values)
    define_dataset_flags(values)
    flags.DEFINE_integer("input_len", None, "Short for --random-input-len.", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("output_len", None, "Short for --random-output-len.", lower_bound=1, flag_values=values)
    _define_common(values)


def define_latency(values: flags.FlagValues) -> None:
    define_engine(values)
    integer = flags.DEFINE_integer
    integer("input_len", 32, "Tokens of each prompt.", lower_bound=1, flag_values=values)
    integer("output_len", 128, "Tokens to generate for each.", lower_bound=1, flag_values=values)
    integer("batch_size", 8, "Prompts at a time.", lower_bound=1, flag_values=values)
    integer("num_iters_warmup", 10, "Batches that do not count.", lower_bound=0, flag_values=values)
    integer("num_iters", 30, "Batches that count.", lower_bound=1, flag_values=values)
    _define_common(values)


def _define_common(values: flags.FlagValues) -> None:
    flags.DEFINE_integer("n", 1, "Completions of each prompt.", lower_bound=1, flag_values=values)
    flags.DEFINE_boolean("profile", False, "Write a profiler trace into --profile-dir.", flag_values=values)
    define_output(values)


def throughput(values: flags.FlagValues) -> None:
    """Run the command. Errors: ValueError."""
    from engine.llm import LLM

    if values.input_len is not None:
        values.random_input_len = values.input_len
    if values.output_len is not None:
        values.random_output_len = values.output_len
    with tempfile.TemporaryDirectory() as scratch:
        llm = LLM(**engine_settings(values, Path(scratch)))
        samples = load_samples(values, llm.core.tokenizer, llm.core.model_config.vocab_size, values.seed)
        _warm_up(llm)
        figures = generate(llm, samples, values.n, profile=values.profile)
    rates = [figures[name] for name in ("requests_per_second", "tokens_per_second", "output_tokens_per_second")]
    print("Throughput: {:.2f} requests/s, {:.2f} total tokens/s, {:.2f} output tokens/s".format(*rates))
    print(f"Total num prompt tokens:  {figures['total_prompt_tokens']}")
    print(f"Total num output tokens:  {figures['total_output_tokens']}")
    write_figures(values, figures)


def generate(llm: LLM, samples: list[Sample], n: int, *, profile: bool = False) -> dict[str, Any]:
    """Generate for all samples at once, each to its full length. -> vLLM's figures, and the two kinds of tokens."""
    params = [_params(sample.output_len, n) for sample in samples]
    prompts: list[Any] = [s.prompt if isinstance(s.prompt, str) else {"prompt_token_ids": s.prompt} for s in samples]
    if profile:
        llm.start_profile()
    started = time.perf_counter()
    outputs = llm.generate(prompts, params)
    elapsed = time.perf_counter() - started
    if profile:
        llm.stop_profile()
    prompt_tokens = sum(len(output.prompt_token_ids) for output in outputs)
    output_tokens = sum(len(completion.token_ids) for output in outputs for completion in output.outputs)
    return {
        "elapsed_time": elapsed,
        "num_requests": len(samples),
        "total_num_tokens": prompt_tokens + output_tokens,
        "requests_per_second": len(samples) / elapsed,
        "tokens_per_second": (prompt_tokens + output_tokens) / elapsed,
        "total_prompt_tokens": prompt_tokens,
        "total_output_tokens": output_tokens,
        "output_tokens_per_second": output_tokens / elapsed,
    }


def latency(values: flags.FlagValues) -> None:
    """Run the command. Errors: ValueError."""
    from engine.llm import LLM

    with tempfile.TemporaryDirectory() as scratch:
        llm = LLM(**engine_settings(values, Path(scratch)))
        random = np.random.default_rng(values.seed)
        shape = values.batch_size, values.input_len
        ids = random.integers(0, llm.core.model_config.vocab_size, shape).tolist()
        batch = [Sample(prompt, values.output_len) for prompt in ids]

        def once() -> float:
            llm.reset_prefix_cache()
            params = _params(values.output_len, values.n)
            started = time.perf_counter()
            llm.generate([{"prompt_token_ids": s.prompt} for s in batch], params, use_tqdm=False)
            return time.perf_counter() - started

        for _ in tqdm(range(values.num_iters_warmup), desc="warm-up", disable=None):
            once()
        if values.profile:
            llm.start_profile()
            once()
            llm.stop_profile()
        latencies = [once() for _ in tqdm(range(values.num_iters), desc="batches", disable=None)]
    percentiles = dict(zip(PERCENTILES, np.percentile(latencies, PERCENTILES).tolist(), strict=True))
    average = float(np.mean(latencies))
    print(f"Avg latency: {average:.4f} seconds")
    for percentile, value in percentiles.items():
        print(f"{percentile}% percentile latency: {value:.4f} seconds")
    write_figures(values, {"avg_latency": average, "latencies": latencies, "percentiles": percentiles})


def _warm_up(llm: LLM) -> None:
    """One small request, so that what happens once is not counted."""
    llm.generate([{"prompt_token_ids": [0, 1]}], _params(2, 1), use_tqdm=False)
    llm.reset_prefix_cache()


def _params(length: int, n: int) -> SamplingParams:
    return SamplingParams(temperature=0 if n == 1 else 1, n=n, max_tokens=length, ignore_eos=True, seed=0)


def write_figures(values: flags.FlagValues, figures: dict[str, Any]) -> None:
    """Write what was measured to --output-json, if it is given."""
    if values.output_json is not None:
        Path(values.output_json).write_text(json.dumps(figures, indent=1))
