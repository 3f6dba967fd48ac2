"""Draws how much of HBM's bandwidth decodes reach, and of peak FLOP/s prompts, by length: docs/tpu_roofline.png.

    pip install matplotlib; python scripts/tpu_roofline.py

For 32/8 heads of 128, bfloat16, pages of 128: from the schedules of the five kernels, which it compiles.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from tpu_compiler import GENERATIONS
from tpu_report import chip_of, compile_case  # before JAX is loaded

from kernels.pallas import prefill  # isort: skip
from tpu_cases import Case, final_call  # isort: skip
from tpu_costs import decode_bytes, decode_row_cycles, hot_loop, turns  # isort: skip

PICTURE = Path(__file__).parents[1] / "docs" / "tpu_roofline.png"
CONTEXTS = (16, 32, 64, 128, 192, 256, 384, 512, 768, 1024, 2048, 4096, 8192, 16384, 32768)
CHUNKS = (16, 32, 64, 96, 128, 192, 256, 384, 512, 1024, 2048, 4096, 8192)


def decode_shares(generation: str) -> list[float]:
    """-> HBM's time over the kernel's, for each context: 1 where HBM is the limit."""
    case, chip = Case(generation, "llama-8b", "bfloat16", 128, "decode"), GENERATIONS[generation]
    call, _ = final_call(case, chip_of(generation))
    schedule = compile_case(case)[1]
    by_memory = [decode_bytes(call, n)[0] / chip.bandwidth for n in CONTEXTS]
    by_core = [decode_row_cycles(call, schedule, n) / chip.clock for n in CONTEXTS]
    return [memory / max(memory, core) for memory, core in zip(by_memory, by_core, strict=True)]


def prefill_shares(generation: str) -> list[float]:
    """-> the share of peak FLOP/s that goes into causal scores and values, for each length of a prompt."""
    case, chip = Case(generation, "llama-8b", "bfloat16", 128, "prefill"), GENERATIONS[generation]
    call, _ = final_call(case, chip_of(generation))
    loop, block = hot_loop(case, call, compile_case(case)[1])
    step, heads = prefill.block_tokens(call), call.spec.num_kv_heads * call.spec.group
    shares = []
    for chunk in CHUNKS:
        blocks = sum(-(-min(first + step, chunk) // block) for first in range(0, chunk, step))
        seconds = loop.bundles * turns(call) * blocks / chip.clock
        shares.append(2 * chunk * (chunk + 1) * heads * call.spec.head_dim / seconds / chip.flops * chip.cores)
    return shares


def draw(panels: list[tuple[str, tuple[int, ...], dict[str, list[float]]]]) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(panels), figsize=(10, 3.6), layout="constrained")
    for axis, (title, lengths, shares) in zip(np.atleast_1d(axes), panels, strict=True):
        for name, values in shares.items():
            axis.plot(lengths, [100 * v for v in values], marker=".", label=name)
        axis.set(title=title, xlabel="tokens", ylabel="%", ylim=(0, 104))
        axis.set_xscale("log", base=2)
        axis.grid(alpha=0.3)
    figure.axes[0].legend()
    figure.savefig(PICTURE, dpi=80)


def main() -> None:
    panels: list[tuple[str, tuple[int, ...], dict[str, Any]]] = [
        ("decode: share of HBM's bandwidth, by context", CONTEXTS, {g: decode_shares(g) for g in GENERATIONS}),
        ("prompt: share of peak FLOP/s, by length", CHUNKS, {g: prefill_shares(g) for g in GENERATIONS}),
    ]
    for title, lengths, shares in panels:
        print(f"{title:48}" + "".join(f"{n:>7}" for n in lengths))
        for generation, values in shares.items():
            print(f"{generation:48}" + "".join(f"{100 * v:6.0f}%" for v in values))
    draw(panels)


if __name__ == "__main__":
    main()
