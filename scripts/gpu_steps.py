"""Compile a step of decodes for an H200 that is not here: its kernels by part, its memory, what it computes twice.

    python scripts/gpu_steps.py [--shape llama-8b] [--quantization fp8_block] [--rows 8] [--pages 30000] [--hlo FILE]
    python scripts/gpu_steps.py --draft-shape qwen3-0.6b --drafts 4

Weights are bfloat16 unless quantized, drafts those of a model, XLA's own choices not tuned, as there is nothing
to tune them on. gpu_compiler.py says what to install. A card full of pages matters: where XLA thinks that they do not
fit, it computes things again. Exit code 1 if it does.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import gpu_compiler

PARTS = ("draft", "verify", "sample")  # named scopes; what is in none of them is the model's own
PIECES = ("attend", "attention", "mlp", "logits", "embed", "rope", "final_norm")
NO_KERNELS = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast")
PAGE = 16


def kernels(hlo: str) -> Counter[tuple[str, str, str]]:
    """-> how many kernels there are of each part, piece of the model and kind, from the program's own computation."""
    found = Counter[tuple[str, str, str]]()
    body = hlo[hlo.index("\nENTRY ") :]
    for line in body[: body.index("\n}")].splitlines():
        operation = re.match(r"\s+(?:ROOT )?%\S+ = .*? ([\w\-]+)\(", line)
        if operation is None or operation[1] in NO_KERNELS:
            continue
        where = re.search(r'op_name="([^"]*)"', line)
        path = where[1].split("/") if where else []
        of = lambda names, path=path: next((name for name in names if name in path), "")
        found[of(PARTS) or "model", of(PIECES), kind_of(line)] += 1
    return found


def kind_of(line: str) -> str:
    """-> product, pallas or fusion, from an operation's line."""
    if re.search(r"__(triton\w*gemm|cublas)", line):
        return "product"
    return "pallas" if "custom-call" in line else "fusion"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-8b")
    parser.add_argument("--quantization", help="a method that quantizes while loading")
    parser.add_argument("--draft-shape", help="of a model that drafts")
    parser.add_argument("--drafts", type=int, default=4)
    parser.add_argument("--layers", type=int, help="of either model, if not all")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--pages", type=int, default=30000, help="pages of 16 tokens")
    parser.add_argument("--max-model-len", type=int, default=4096)
    parser.add_argument("--hlo", type=Path, help="write the compiled program here")
    parser.add_argument("--cuda", default=gpu_compiler.CUDA, help="where ptxas lies, in bin")
    options = parser.parse_args()
    gpu_compiler.choose(options.cuda)

    import jax

    from engine.bench.shapes import SHAPES
    from engine.compiler import ON_GPU, TUNED_TOKENS, UNTUNED
    from engine.layout import StepLayout
    from engine.models.config import ModelConfig
    from engine.models.narrow import online_plan
    from engine.models.read import from_hugging_face
    from engine.speculation.drafter import Drafter
    from engine.speculative_config import SpeculativeConfig
    from engine.step_input import StepShape
    from kernels.attention import BACKENDS

    def shape_of(name: str, **changes: Any) -> ModelConfig:
        model = from_hugging_face(name, SHAPES[name] | changes)[1]
        return replace(model, layers=model.layers[: options.layers], max_model_len=options.max_model_len)

    mesh, abstract = gpu_compiler.h200()
    model, drafter, shape = shape_of(options.shape), None, StepShape(options.rows, options.rows, plain=True)
    if options.draft_shape:
        spec = SpeculativeConfig("draft_model", options.drafts, model=options.draft_shape)
        drafter = Drafter(spec, shape_of(options.draft_shape, vocab_size=model.vocab_size))
        shape = StepShape(options.rows, 2 * options.rows, plain=True, drafts=options.drafts, follows=True)
    here = {"multiprocessors": gpu_compiler.MULTIPROCESSORS}
    triton = BACKENDS["triton"]
    assert triton.attend_product is not None
    backend = triton._replace(
        update_and_attend=partial(triton.update_and_attend, **here),
        attend_product=partial(triton.attend_product, **here),
    )
    plan = online_plan(model, options.quantization, "gpu", "bfloat16") if options.quantization else {}
    layout = StepLayout(model, mesh, plan=plan, drafter=drafter)
    dtypes = ("bfloat16", "bfloat16")
    state = layout.state(backend, options.pages, PAGE, dtypes, options.rows, options.max_model_len)
    step = jax.jit(StepLayout.step, static_argnums=(0, 1, 2, 3), donate_argnums=5)
    with jax.sharding.use_abstract_mesh(abstract):
        traced = step.trace(layout, backend, PAGE, shape, layout.params("bfloat16"), state, layout.flat(shape))
        lowered = traced.lower(lowering_platforms=("cuda",))
    few = shape.tokens <= TUNED_TOKENS * (2 if shape.drafts else 1)  # then the engine lets Triton's products compete
    untuned: dict[str, Any] = {"xla_gpu_autotune_level": 0} if few else UNTUNED
    compiled = lowered.compile(ON_GPU | untuned)
    hlo, memory = compiled.as_text(), compiled.memory_analysis()
    assert hlo is not None and memory is not None
    if options.hlo:
        options.hlo.write_text(hlo)
    for (part, piece, kind), count in sorted(kernels(hlo).items()):
        print(f"{part:8} {piece or 'other':12} {kind:8} {count:6}")
    again = len(re.findall(r"^\s+%\S*\.remat\S* = ", hlo, re.MULTILINE))
    gib = lambda size: f"{size / 2**30:.2f} GiB"
    print(f"{sum(kernels(hlo).values())} kernels; temporaries {gib(memory.temp_size_in_bytes)}, state and weights "
          f"{gib(memory.argument_size_in_bytes)}; {again} operations computed again")  # fmt: skip
    sys.exit(bool(again))


if __name__ == "__main__":
    main()
