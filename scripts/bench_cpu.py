"""Speed of SmolLM2-135M on this machine's CPU: at batch 1, for 32 short and 32 longer prompts at once, and of prefill.

    python scripts/bench_cpu.py                              # Quire alone: a minute, and what compiling takes
    python scripts/bench_cpu.py --transformers OTHER/python  # after transformers in float32, run by a Python with torch
    python scripts/bench_cpu.py --packed                     # only decodes of batch 1, in turns with packed weights

Every time is the best of `--repeats` runs of `LLM.generate`, greedy, on prompts of random tokens, with an empty prefix
cache. "decode" leaves the first tokens out: it counts the rest, in the time of a run less that of one that ends after
them. The machine's limits are measured in the same run: how fast memory is read, and float32 matrices are multiplied.
A figure's share is of the rate at which its bytes (the weights once a step, each row's KV cache) or its operations,
whichever take longer, would leave the machine busy all the time.

--packed: once with the weights expanded to float32 and once in the file's own few bits (`quantization="gguf"`), run by
run, so that what else the machine does slows both.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import random
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from engine import LLM, SamplingParams
from engine.models.params import num_bytes, param_specs
from engine.weights.default_model import default_model

QUESTION, ANSWER = "What is the capital of France?", "The capital of France is Paris."
PEER = Path(__file__).with_name("bench_transformers.py")
PACKED = ("dequantize", "gguf")  # settings `quantization`
WAYS = ("one by one", "batched")  # how transformers may run a workload


@dataclass(frozen=True)
class Workload:
    """`count` prompts of `input_len` tokens, and `output_len` tokens to sample for each."""

    count: int
    input_len: int
    output_len: int

    def prompts(self) -> list[list[int]]:
        """-> random ordinary tokens, the same each time."""
        draw = random.Random(0)
        return [[draw.randrange(1_000, 30_000) for _ in range(self.input_len)] for _ in range(self.count)]

    def rates(self, seconds: float, seconds_to_first: float) -> dict[str, float]:
        """-> tokens a second, by what they count."""
        if self.output_len == 1:
            return {"": self.count * self.input_len / seconds}
        return {
            "": self.count * self.output_len / seconds,
            ", decode": self.count * (self.output_len - 1) / (seconds - seconds_to_first),
        }


WORKLOADS = {
    "batch 1": Workload(1, 128, 128),
    "32 questions": Workload(32, 32, 128),
    "32 requests": Workload(32, 128, 128),
    "prefill": Workload(8, 512, 1),
}


# The machine


@dataclass(frozen=True)
class Machine:
    """What the CPU can do: bytes read from memory, and float32 operations, each in a second."""

    name: str
    cores: int
    read_bytes: float
    float32_ops: float

    def seconds(self, read_bytes: float, ops: float) -> float:
        return max(read_bytes / self.read_bytes, ops / self.float32_ops)


def measure_machine() -> Machine:
    """Take the better of NumPy and JAX, for reading 1 GiB and for the product of two 2048 x 2048 matrices."""
    large, vector = np.ones((2**14, 2**14), np.float32), np.ones(2**14, np.float32)
    total, large_on_device = jax.jit(jnp.sum), jnp.asarray(large)
    reads = (lambda: large @ vector, lambda: total(large_on_device).block_until_ready())

    square = np.random.default_rng(0).random((2**11, 2**11), np.float32)
    product, square_on_device = jax.jit(jnp.matmul), jnp.asarray(square)
    products = (lambda: square @ square, lambda: product(square_on_device, square_on_device).block_until_ready())
    return Machine(
        name=cpu_name(),
        cores=os.cpu_count() or 1,
        read_bytes=large.nbytes / min(map(fastest, reads)),
        float32_ops=2 * len(square) ** 3 / min(map(fastest, products)),
    )


def fastest(function: Callable[[], Any], repeats: int = 8) -> float:
    """-> seconds."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return min(times)


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


# What a workload costs at least


@dataclass(frozen=True)
class Costs:
    """A model's costs, from its shapes. Operations count a multiplication and an addition as two."""

    weight_bytes: int  # as they lie in memory
    layer_weights: int  # numbers in the layers' matrices
    head_weights: int
    kv_bytes: int  # of a token, over all layers
    attention_ops: int  # for a query and a key, over all layers

    def limit_rates(self, workload: Workload, machine: Machine) -> dict[str, float]:
        """-> the rates of an engine that the machine alone holds back."""
        rows, length = workload.count, workload.input_len
        token_ops = 2 * self.layer_weights + self.attention_ops * length / 2  # a token sees half the prompt on average
        prefill = machine.seconds(self.weight_bytes, rows * (length * token_ops + 2 * self.head_weights))
        decode = 0.0
        for context in range(length + 1, length + workload.output_len):
            row_ops = 2 * (self.layer_weights + self.head_weights) + self.attention_ops * context
            decode += machine.seconds(self.weight_bytes + rows * context * self.kv_bytes, rows * row_ops)
        return workload.rates(prefill + decode, prefill)


def model_costs(llm: LLM) -> Costs:
    model, specs = llm.core.model_config, param_specs(llm.core.model_config)
    matrices = [spec.shape for spec in jax.tree.leaves(specs["layers"]) if len(spec.shape) > 1]
    kv_itemsize = jnp.dtype(llm.core.resolved.kv_cache_dtype).itemsize
    return Costs(
        weight_bytes=num_bytes(llm.core.runner.params),
        layer_weights=sum(int(np.prod(shape)) for shape in matrices),
        head_weights=model.vocab_size * model.hidden_size,
        kv_bytes=2 * len(model.layers) * model.num_kv_heads * model.head_dim * kv_itemsize,
        attention_ops=4 * len(model.layers) * model.num_heads * model.head_dim,
    )


# Quire


def run(llm: LLM, workload: Workload, repeats: int) -> tuple[float, list[list[int]]]:
    """-> (seconds of the fastest run, tokens of the last). Errors: SystemExit if tokens are too few or no tokens."""
    params = SamplingParams(temperature=0, max_tokens=workload.output_len, ignore_eos=True, detokenize=False)
    prompts = [{"prompt_token_ids": ids} for ids in workload.prompts()]
    vocab_size, times, tokens = llm.core.model_config.vocab_size, [], []
    for _ in range(repeats):
        llm.reset_prefix_cache()
        started = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        times.append(time.perf_counter() - started)
        tokens = [output.outputs[0].token_ids for output in outputs]
        for ids in tokens:
            if len(ids) != workload.output_len or not all(0 <= token < vocab_size for token in ids):
                raise SystemExit(f"wanted {workload.output_len} tokens below {vocab_size}, got {ids}")
    return min(times), tokens


def check_answer(llm: LLM) -> None:
    """Errors: SystemExit if what would be measured gives wrong answers."""
    question = [{"role": "user", "content": QUESTION}]
    answer = llm.chat(question, SamplingParams(temperature=0, max_tokens=20), use_tqdm=False)[0].outputs[0].text
    if answer != ANSWER:
        raise SystemExit(f"{QUESTION!r}: got {answer!r}, want {ANSWER!r}")


def compare_packed(gguf: Path, repeats: int) -> dict[str, Any]:
    """-> bytes of weights and seconds of a decoded token at batch 1, the fastest of each, by setting `quantization`."""
    workload = WORKLOADS["batch 1"]
    both = {kind: LLM(model=str(gguf), max_model_len=1024, max_num_seqs=1, quantization=kind) for kind in PACKED}
    found = {kind: {"weight_bytes": num_bytes(llm.core.runner.params), "runs": []} for kind, llm in both.items()}
    for llm in both.values():
        check_answer(llm)
    for _ in range(repeats):
        for kind, llm in both.items():
            to_first, _ = run(llm, dataclasses.replace(workload, output_len=1), 1)
            seconds, _ = run(llm, workload, 1)
            found[kind]["runs"].append((seconds - to_first) / (workload.output_len - 1))
    for kind, result in found.items():
        size, token = result["weight_bytes"] / 1e6, min(result["runs"])
        print(f"{kind + ':':21}{size:7.1f} MB of weights, {token * 1e3:.2f} ms a token decoded at batch 1")
    wide, packed = (found[kind]["runs"] for kind in PACKED)
    ratios = sorted(a / b for a, b in zip(wide, packed, strict=True))
    print(f"packed weights decode {ratios[len(ratios) // 2]:.2f} x as fast ({ratios[0]:.2f} to {ratios[-1]:.2f})")
    return found


# transformers


def run_transformers(python: str, gguf: Path, repeats: int) -> dict[str, Any]:
    """-> what bench_transformers.py prints; its runs are called "workload/way/output_len"."""
    plan = {}
    for name, workload in WORKLOADS.items():
        for way in WAYS[: workload.count]:
            for output_len in {workload.output_len, 1}:
                plan[f"{name}/{way}/{output_len}"] = {
                    "prompts": workload.prompts(),
                    "output_len": output_len,
                    "batched": way == "batched",
                    "repeats": repeats,
                }
    command = [python, str(PEER), str(gguf), "--threads", str(os.cpu_count())]
    done = subprocess.run(command, input=json.dumps(plan), stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"--transformers: {' '.join(command)} failed; does that Python have what it needs?")
    return json.loads(done.stdout)


def transformers_rates(name: str, workload: Workload, results: dict[str, Any]) -> dict[str, dict[str, float]]:
    """-> rates by way."""
    seconds = {run: result["seconds"] for run, result in results.items()}
    return {
        way: workload.rates(seconds[f"{name}/{way}/{workload.output_len}"], seconds[f"{name}/{way}/1"])
        for way in WAYS[: workload.count]
    }


def same_start(ours: list[int], theirs: list[int]) -> int:
    """-> how many tokens agree before the first that differs."""
    return next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), len(ours))


# The report


@dataclass(frozen=True)
class Figure:
    """A rate in tokens a second, its share of the machine's limit, and how many times those of transformers it is."""

    name: str
    tokens_per_s: float
    limit_tokens_per_s: float
    limit_share: float
    transformers_tokens_per_s: dict[str, float]
    times_transformers: dict[str, float]

    def __str__(self) -> str:
        peers = "".join(
            f"; {self.times_transformers[way]:.2f} x transformers {way} ({rate:.1f})"
            for way, rate in self.transformers_tokens_per_s.items()
        )
        limit = f"{self.limit_share:.0%} of {self.limit_tokens_per_s:.0f}"
        return f"{self.name + ':':21}{self.tokens_per_s:7.1f} tokens/s, {limit}{peers}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="the GGUF file of SmolLM2-135M-Instruct, if not to be fetched")
    parser.add_argument("--transformers", metavar="PYTHON", help="one with torch, transformers, gguf and accelerate")
    parser.add_argument("--packed", action="store_true", help="compare decodes of packed weights and of float32")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("build/bench_cpu.json"))
    args = parser.parse_args()
    gguf = args.model or default_model()
    if args.packed:
        write(args.output, compare_packed(gguf, args.repeats))
        return

    machine = measure_machine()
    rates = f"{machine.read_bytes / 1e9:.1f} GB/s read, {machine.float32_ops / 1e9:.0f} GFLOP/s in float32"
    print(f"{machine.name}, {machine.cores} cores: {rates}", flush=True)
    peer = run_transformers(args.transformers, gguf, args.repeats) if args.transformers else None
    llm = LLM(model=str(gguf), max_model_len=1024, max_num_seqs=32)
    check_answer(llm)
    costs = model_costs(llm)

    figures, agreement = [], {}
    for name, workload in WORKLOADS.items():
        to_first, _ = run(llm, dataclasses.replace(workload, output_len=1), args.repeats)
        seconds, tokens = run(llm, workload, args.repeats)
        limits = costs.limit_rates(workload, machine)
        theirs = transformers_rates(name, workload, peer["results"]) if peer else {}
        for what, rate in workload.rates(seconds, to_first).items():
            by_way = {way: peer_rates[what] for way, peer_rates in theirs.items()}
            ratios = {way: rate / peer_rate for way, peer_rate in by_way.items()}
            figures.append(Figure(name + what, rate, limits[what], rate / limits[what], by_way, ratios))
            print(figures[-1], flush=True)
        if peer:
            expected = peer["results"][f"{name}/one by one/{workload.output_len}"]["token_ids"]
            agreement[name] = sum(map(same_start, tokens, expected)) / (workload.count * workload.output_len)
            print(f"{name + ':':21}{agreement[name]:7.0%} of the tokens come before the first that is not the same")

    versions = {package: metadata.version(package) for package in ("jax", "jaxlib", "numpy")}
    report = {
        "machine": dataclasses.asdict(machine),
        "versions": {"python": platform.python_version()} | versions | (peer["versions"] if peer else {}),
        "model": {"file": gguf.name, "dtype": llm.core.resolved.dtype} | dataclasses.asdict(costs),
        "workloads": {name: dataclasses.asdict(workload) for name, workload in WORKLOADS.items()},
        "repeats": args.repeats,
        "figures": [dataclasses.asdict(figure) for figure in figures],
        "agreement_with_transformers": agreement,
    }
    write(args.output, report)


def write(file: Path, report: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(f"written to {file}")


if __name__ == "__main__":
    main()
