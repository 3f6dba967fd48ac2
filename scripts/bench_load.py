"""How fast a checkpoint loads, and in how much memory: a synthetic Llama of 2 GB, in the engine's own dtype.

    python scripts/bench_load.py [--gigabytes 2] [--dtypes bfloat16,float32] [--cold]

writes a sharded folder of random weights to a temporary place, reads its files in several ways for comparison (from
the page cache, or with --cold from the disk), and loads it in fresh processes. Peak memory is the process's own, taken
before the load and after; "memory above the parameters" is what loading itself needed.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 2048, 5632, 32, 4, 64, 32000  # TinyLlama's
ITEM = {"bfloat16": ("BF16", 2), "float16": ("F16", 2), "float32": ("F32", 4)}
SHARD_BYTES = 1 << 30
RUNS = 5


def make_folder(folder: Path, dtype: str, nbytes: int) -> int:
    """Write config, index and shards of about `nbytes`. -> bytes of tensors."""
    name, item = ITEM[dtype]
    layer = {
        "input_layernorm": (HIDDEN,), "post_attention_layernorm": (HIDDEN,), "self_attn.q_proj": (2048, HIDDEN),
        "self_attn.k_proj": (KV_HEADS * HEAD_DIM, HIDDEN), "self_attn.v_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
        "self_attn.o_proj": (HIDDEN, 2048), "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
        "mlp.up_proj": (INTERMEDIATE, HIDDEN), "mlp.down_proj": (HIDDEN, INTERMEDIATE),
    }  # fmt: skip
    shapes = {
        "model.embed_tokens.weight": (VOCAB, HIDDEN),
        "lm_head.weight": (VOCAB, HIDDEN),
        "model.norm.weight": (HIDDEN,),
    }
    rest = nbytes // item - sum(map(np.prod, shapes.values()))
    layers = max(1, round(rest / sum(map(np.prod, layer.values()))))
    for i in range(layers):
        shapes |= {f"model.layers.{i}.{part}.weight": shape for part, shape in layer.items()}
    config = dict(
        architectures=["LlamaForCausalLM"], num_hidden_layers=layers, hidden_size=HIDDEN, vocab_size=VOCAB,
        intermediate_size=INTERMEDIATE, num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, head_dim=HEAD_DIM,
        max_position_embeddings=2048, rms_norm_eps=1e-5,
    )  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    noise = np.random.default_rng(0).integers(0, 2**16, 1 << 24, np.uint16) & 0xBFFF  # no infinity, no NaN
    data = memoryview(noise.view(np.uint8))
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for tensor, shape in shapes.items():
        if size > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][tensor] = shape
        size += int(np.prod(shape)) * item
    weight_map = {}
    for n, members in enumerate(shards):
        file = f"model-{n + 1:05}-of-{len(shards):05}.safetensors"
        header, end = {}, 0
        for tensor, shape in members.items():
            start, end = end, end + int(np.prod(shape)) * item
            header[tensor] = {"dtype": name, "shape": shape, "data_offsets": [start, end]}
            weight_map[tensor] = file
        text = json.dumps(header).encode()
        with open(folder / file, "wb") as out:
            out.write(struct.pack("<Q", len(text)) + text)
            for start in range(0, end, len(data)):
                out.write(data[: min(len(data), end - start)])
            out.flush()
            os.fsync(out.fileno())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return sum(int(np.prod(shape)) for shape in shapes.values()) * item


class Took(NamedTuple):
    """Seconds of the clock, and of processors: the latter hardly change when others use the machine too."""

    wall: float
    cpu: float


def cat(files: list[Path]) -> Took:
    """-> what `cat FILES > /dev/null` takes."""
    started, before = time.perf_counter(), os.times()
    subprocess.run(["cat", *map(str, files)], stdout=subprocess.DEVNULL, check=True)
    wall, after = time.perf_counter() - started, os.times()
    return Took(wall, after.children_user + after.children_system - before.children_user - before.children_system)


def read_into_memory(files: list[Path]) -> Took:
    """-> what reading the files into new memory takes, whole and one after another, in a fresh process."""
    code = (
        "import numpy as np, sys, time; started, before = time.perf_counter(), time.process_time(); "
        "kept = [np.fromfile(file, np.uint8) for file in sys.argv[1:]]; "
        "print(time.perf_counter() - started, time.process_time() - before)"
    )
    done = subprocess.run([sys.executable, "-c", code, *map(str, files)], capture_output=True, check=True)
    return Took(*map(float, done.stdout.split()))


def load(folder: Path, dtype: str) -> None:
    """Load the folder in this process; print seconds, bytes and peaks of memory."""
    import jax

    from engine.models.params import num_bytes
    from engine.weights.load import load_params, open_checkpoint

    jax.block_until_ready(jax.device_put(np.zeros(1)))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    started, cpu = time.perf_counter(), time.process_time()
    checkpoint = open_checkpoint(folder)
    params = jax.block_until_ready(load_params(checkpoint, dtype))
    took = time.perf_counter() - started, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"took": took, "params": num_bytes(params), "before": before, "peak": peak}))


def forget(files: list[Path]) -> None:
    """Have the system drop the files from its page cache."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def measure(folder: Path, dtype: str, nbytes: int, cold: bool) -> None:
    files = sorted(folder.glob("*.safetensors"))
    command = [sys.executable, __file__, "--load", str(folder), "--dtypes", dtype]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    runs: dict[str, list[Took]] = {"cat": [], "read into memory": [], "load": []}
    loaded = {}
    for _ in range(RUNS):
        for name, taken in runs.items():
            if cold:
                forget(files)
            else:
                cat(files)  # all of it is in the page cache
            if name == "load":
                loaded = json.loads(subprocess.run(command, env=environment, capture_output=True, check=True).stdout)
                taken.append(Took(*loaded["took"]))
            else:
                taken.append({"cat": cat, "read into memory": read_into_memory}[name](files))
    print(f"{dtype}, {nbytes / 1e9:.2f} GB in {len(files)} files, {'from disk' if cold else 'from the page cache'}:")
    best = {name: Took(*map(min, zip(*taken, strict=True))) for name, taken in runs.items()}
    for name, took in best.items():
        shares = [f"{best[other].wall / took.wall:.0%} of {other}" for other in best if name == "load" != other]
        middle = statistics.median(run.wall for run in runs[name])
        print(
            f"  {name:17} best of {RUNS}: {nbytes / took.wall / 1e9:6.2f} GB/s (median {nbytes / middle / 1e9:.2f}), "
            f"{nbytes / took.cpu / 1e9:6.2f} GB a processor's second   {', '.join(shares)}"
        )
    above = loaded["peak"] - loaded["before"] - loaded["params"]
    print(
        f"  peak memory {loaded['peak'] / 1e9:.2f} GB: parameters {loaded['params'] / 1e9:.2f}, Python and JAX "
        f"{loaded['before'] / 1e9:.2f}, loading {above / 1e6:.0f} MB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--dtypes", default="bfloat16,float32")
    parser.add_argument("--cold", action="store_true", help="from the disk instead of the page cache")
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)  # in the fresh processes
    options = parser.parse_args()
    if options.load:
        load(options.load, options.dtypes)
        return
    for dtype in options.dtypes.split(","):
        with tempfile.TemporaryDirectory() as scratch:
            nbytes = make_folder(Path(scratch), dtype, int(options.gigabytes * 1e9))
            measure(Path(scratch), dtype, nbytes, options.cold)


if __name__ == "__main__":
    main()
