"""Are models' answers on meshes of virtual CPU devices those of one device? Greedy, float32, one row for each mesh.

python scripts/check_parallel.py [--model PATH ...] [--meshes 2x1x1 2x2x1 ...] [--tokens 32] [--quantization int8]
python scripts/check_parallel.py --model tests/data/tiny/gemma2 tests/data/tiny/qwen3-moe --layers 4

A mesh is TPxPPxDP, with an e behind it for whole experts on devices. Folders without a tokenizer are asked with token
ids; with --layers, a model has so many, and random weights. Ends with status 1 if any answer differs.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax

from engine import LLM, SamplingParams
from engine.weights.default_model import default_model

ONE = "1x1x1"
MESHES = ["2x1x1", "4x1x1", "8x1x1", "1x2x1", "1x4x1", "1x1x2", "2x2x1", "2x4x1", "4x2x1", "2x1x2", "1x2x2", "2x2x2"]
STORY = (
    "Once upon a time there was a small village at the foot of a mountain, where a clockmaker kept one clock for each "
    "of the houses. Every evening he climbed the hill to the church, wound the great clock in its tower, and listened "
    "until it struck. "
)
PROMPTS = [
    "The", "Water boils at", "1, 1, 2, 3, 5, 8,", "def is_prime(n: int) -> bool:\n", "The capital of France is",
    "Translate into French: good morning, my dear friend.", "Roses are red, violets are blue,",
    '{"name": "Ann", "age": 31, "children": [', "A short history of the printing press begins in the city of Mainz, ",
    STORY + "One evening it struck thirteen.", STORY + "Nobody knew his name.", STORY * 3 + "In the end,",
]  # fmt: skip
VOCABULARY = 160  # of the models in tests/data/tiny, which have no tokenizer
_draw = random.Random(7)
NUMBERS = [[_draw.randrange(VOCABULARY) for _ in range(length)] for length in (1, 2, 3, 8, 15, 16, 17, 40, 70, 130)]
NUMBERS += [NUMBERS[-1][:100], [*NUMBERS[-2], 5, 6]]  # which find a prefix


def answers(model: Path, mesh: str, tokens: int, settings: dict[str, Any]) -> list[list[int]]:
    """-> the tokens that follow each prompt."""
    tensor, pipeline, data = map(int, mesh.rstrip("e").split("x"))
    has_words = model.is_file() or any(model.glob("tokenizer*"))
    prompts: Any = PROMPTS if has_words else NUMBERS
    rows, most = (4, 64) if has_words else (2, 16)
    with tempfile.TemporaryDirectory() as cache:
        llm = LLM(
            model=str(model), dtype="float32", max_num_seqs=rows, max_num_batched_tokens=most, max_model_len=256,
            block_size=16, num_gpu_blocks_override=120, skip_tokenizer_init=not has_words, compilation_cache_dir=cache,
            tensor_parallel_size=tensor, pipeline_parallel_size=pipeline, data_parallel_size=data,
            enable_expert_parallel=mesh.endswith("e"), **settings,
        )  # fmt: skip
        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        return [list(output.outputs[0].token_ids) for output in llm.generate(prompts, params, use_tqdm=False)]


def deeper(model: Path, layers: int, folder: Path) -> Path:
    """-> a folder with the model's config.json, but for the number of layers, whose kinds go on as the last two."""
    config = json.loads((model / "config.json").read_text())
    kinds = config.get("layer_types", [])
    while 0 < len(kinds) < layers:
        kinds.append(kinds[-2])
    folder = folder / model.name
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": layers}))
    return folder


def first_difference(ours: list[list[int]], theirs: list[list[int]]) -> str:
    for i, (own, other) in enumerate(zip(ours, theirs, strict=True)):
        for at, (a, b) in enumerate(zip(own, other, strict=True)):
            if a != b:
                return f"prompt {i}, token {at}: {b} instead of {a}"
    return "-"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, nargs="+", help="default: SmolLM2-135M-Instruct")
    parser.add_argument("--meshes", nargs="+", default=MESHES)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--quantization", help="the setting of that name")
    parser.add_argument("--layers", type=int, help="with random weights, for folders")
    options = parser.parse_args()
    sizes = [math.prod(map(int, mesh.rstrip("e").split("x"))) for mesh in options.meshes]
    jax.config.update("jax_num_cpu_devices", max(sizes))
    settings = {"quantization": options.quantization} if options.quantization else {}
    if options.layers:
        settings["load_format"] = "dummy"
    wrong = 0
    print("| model | TP x PP x DP | prompts answered alike | first difference | seconds |", flush=True)
    print("|---|---|---|---|---|", flush=True)
    for given in options.model or [default_model()]:
        with tempfile.TemporaryDirectory() as folder:
            model = deeper(given, options.layers, Path(folder)) if options.layers else given
            one = answers(model, ONE, options.tokens, settings)
            for mesh in options.meshes:
                gc.collect()
                began = time.monotonic()
                found = answers(model, mesh, options.tokens, settings)
                same = sum(a == b for a, b in zip(one, found, strict=True))
                wrong += same < len(one)
                difference, seconds = first_difference(one, found), time.monotonic() - began
                alike = f"{same} of {len(one)}"
                print(f"| {model.name} | {mesh} | {alike} | {difference} | {seconds:.0f} |", flush=True)
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main())
