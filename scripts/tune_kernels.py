"""Find what is best for products with quantized weights and for decode attention, on all GPUs of this machine.

    python scripts/tune_kernels.py --model DIR [--tp N] [--format fp8_block] [--attention] [--tokens 1,8,64]
    python scripts/tune_kernels.py --shapes 6144x4096,4096x4096 --format int4

A device takes batch size after batch size. Each begins with the engine's default and one plan of every other kernel,
and changes one size after the other while that helps; what cannot fit is not compiled, and what differs from the
reference is not timed. Results go to kernels/tuned, a file a shape; Ctrl-C loses none. TPU attention has
scripts/tune_tpu_attention.py.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

sys.path.insert(0, str(Path(__file__).parents[1]))
from attention_cases import DTYPE, find_tiles
from product_cases import FORMATS, LIMIT, compiled, copies_of, random_weight, relative_error, time_of, tokens_of, wanted
from product_plans import FIELDS, neighbours, starts
from tuning import Found, Job, search

from engine.models.config import ModelConfig
from engine.models.narrow import INPUTS, VOCABULARY, outputs_of
from engine.models.params import ParamSpec, map_specs, param_specs
from engine.weights.load import read_config
from kernels import tuned
from kernels.attention import AttentionSpec
from kernels.cuda.attention import decode_file
from kernels.cuda.product import Plan, default_plan, dtype_name, multiply
from kernels.quantized import QuantizedTensor
from sharding.rules import partition_spec

GAIN = 0.99  # of the default's time that another plan must stay below


def shapes_of(config: ModelConfig, parts: int) -> list[tuple[int, int]]:
    """-> [N, K] of a model's products on one of `parts` devices that share its tensors. Errors: ValueError."""
    found: set[tuple[int, int]] = set()

    def one(path: tuple[Any, ...], spec: ParamSpec) -> None:
        name = path[-1]
        if name not in INPUTS or name in VOCABULARY or name.startswith("experts"):
            return
        shape = list(spec.shape)
        for axis, split in enumerate(partition_spec(spec.axes)):
            if split == "model":
                if shape[axis] % parts:
                    raise ValueError(f"--tp: {shape[axis]} of {name} cannot be split in {parts}")
                shape[axis] //= parts
        outputs, inputs = outputs_of(name, tuple(shape))
        found.add((math.prod(outputs), inputs))

    map_specs(one, param_specs(config))
    return sorted(found)


def attention_of(config: ModelConfig, parts: int) -> AttentionSpec:
    """-> a model's heads on one of `parts` devices; windows and the like share their tiles."""
    if config.num_kv_heads % parts:
        raise ValueError(f"--tp: {config.num_kv_heads} KV heads cannot be split in {parts}")
    return AttentionSpec(config.num_kv_heads // parts, config.group, config.head_dim, config.head_dim**-0.5)


class Search:
    """Finds a job's best plan on a device. Weights are made once for a device and file."""

    def __init__(self, compilers: int, trials: Path | None = None):
        self.pool = ThreadPoolExecutor(compilers)
        self.trials = trials  # a file for every plan's time, a line each
        self.made: dict[Any, tuple[str, list[QuantizedTensor]]] = {}

    def find(self, job: Job, device: Any, stop: threading.Event) -> Found:
        """-> what is best, its time and the default's, in microseconds."""
        if isinstance(job.about, AttentionSpec):
            return find_tiles(job.about, job.tokens, device, stop)
        with jax.default_device(device):
            if self.made.get(device, ("", []))[0] != job.file:
                self.made.pop(device, None)
                self.made[device] = job.file, copies_of(random_weight(*job.about))
            copies = self.made[device][1]
            weight, M = copies[0], job.tokens
            tokens = tokens_of(M, weight.inputs)
            expected = wanted(tokens[0], weight)
            default = default_plan(weight, M)
            times: dict[Plan, float] = {}

            def measure(plans: Iterable[Plan]) -> None:
                new = [plan for plan in plans if plan not in times]
                compile_one = partial(self.compile_one, device, tokens, copies)
                for plan, run in zip(new, self.pool.map(compile_one, new), strict=True):
                    if stop.is_set():
                        raise InterruptedError("stopped")
                    right = not isinstance(run, Exception) and relative_error(run(tokens, copies)[0], expected) < LIMIT
                    times[plan] = time_of(run, tokens, copies) if right else math.inf
                    if self.trials:
                        why = str(run)[:300] if isinstance(run, Exception) else "" if right else "not the reference's"
                        line = [job.file, M, plan.kernel, *plan.tile, times[plan] * 1e6, why]
                        with self.trials.open("a") as file:
                            file.write(json.dumps(line) + "\n")

            measure(starts(weight, M, default))
            best = min(times, key=times.__getitem__)
            for field in FIELDS:
                measure(neighbours(best, field, weight))
                best = min(times, key=times.__getitem__)
        if math.isinf(times[best]):
            raise ValueError(f"no plan gives the reference's product of {M} tokens")
        if times[best] > GAIN * times[default]:
            best = default
        return {
            "kernel": best.kernel,
            **best.tile._asdict(),
            "us": times[best] * 1e6,
            "default_us": times[default] * 1e6,
        }

    @staticmethod
    def compile_one(device: Any, tokens: list[jax.Array], copies: list[QuantizedTensor], plan: Plan) -> Any:
        """-> an executable, or why there is none: a tile may need more registers than there are."""
        try:
            with jax.default_device(device):
                return compiled(lambda x, w: multiply(x, w, jnp.dtype(jnp.bfloat16), plan), tokens, copies)
        except Exception as error:
            return error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a folder with a config.json")
    parser.add_argument("--tp", type=int, default=1, help="devices that share each tensor")
    parser.add_argument("--shapes", default="", help="outputs x inputs, instead of a model's")
    parser.add_argument("--format", default="fp8_block", choices=FORMATS)
    parser.add_argument("--attention", action="store_true", help="the model's decode attention, too")
    parser.add_argument(
        "--tokens", default=",".join(map(str, tuned.BATCH_SIZES)),
        help="batch sizes; a file appears when it has all that are the default",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=tuned.FOLDER)
    parser.add_argument("--trials", type=Path, help="a file to which every plan's time is added")
    options = parser.parse_args()
    if bool(options.model) == bool(options.shapes):
        parser.error("give either --model or --shapes")
    shapes = [tuple(map(int, shape.split("x"))) for shape in options.shapes.split(",") if shape]
    config = read_config(options.model) if options.model else None
    if config:
        shapes = shapes_of(config, options.tp)
    devices = jax.local_devices()
    if devices[0].platform != "gpu":
        parser.error(f"--format {options.format}: its kernels are for GPUs, and this is a {devices[0].platform}")
    tokens = sorted(map(int, options.tokens.split(",")))
    jobs = []
    for N, K in shapes:
        weight = jax.eval_shape(partial(random_weight, options.format, N, K))
        name = tuned.file_name("product", {"N": N, "K": K}, dtype_name(weight), devices[0].device_kind)
        jobs += [Job(name, M, (options.format, N, K)) for M in tokens]
    if options.attention and config:
        spec = attention_of(config, options.tp)
        jobs += [Job(decode_file(spec, DTYPE, devices[0].device_kind), rows, spec) for rows in tokens]
    print(f"{len(jobs)} batches, {len(devices)} devices; results in {options.out}", flush=True)
    worker = Search(max((os.cpu_count() or 1) - len(devices), 1), options.trials)
    outcome = search(jobs, devices, worker.find, options.out)
    for (name, M), why in outcome.failures.items():
        print(f"{name}, {M} tokens: {why}", file=sys.stderr)
    gains = []
    for name in outcome.complete:
        table = tuned.read(options.out / name)
        gains += [entry["default_us"] / entry["us"] for entry in table.values()]
        print(f"{name}: " + ", ".join(f"{size}: {entry['us']:.1f} us" for size, entry in table.items()))
    if gains:
        print(f"over the defaults: {math.exp(sum(map(math.log, gains)) / len(gains)):.2f}x, at least {min(gains):.2f}x")
    sys.exit(130 if outcome.stopped else bool(outcome.failures))


if __name__ == "__main__":
    main()
