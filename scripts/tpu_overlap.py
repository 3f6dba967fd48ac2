"""What a compiled TPU step does while devices exchange, by compiler options: a large model's layers, ahead of time.

python scripts/tpu_overlap.py [--case llama-70b-v6e-2x4] [--layers 4] [--step decode] [--halves] [--options default]

A row for each set of options: how many collectives are asynchronous, and the estimated cycles of what is scheduled
between their starts and ends; how many are not; the bytes that are on their way from HBM into VMEM during either; the
estimated cycles of the whole step, to which the compiler adds none for collectives.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import replace
from typing import Any, NamedTuple

from collectives import KINDS, size_of
from jax.experimental import topologies
from tpu_parallel import CASES, LARGE, STEPS
from tpu_steps import compile_step, from_hugging_face

from engine import layout
from sharding.mesh import replica_meshes

OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "no latency hiding": {"xla_tpu_enable_latency_hiding_scheduler": False},
    "asynchronous": {"xla_enable_async_all_reduce": True, "xla_enable_async_all_gather": True},
    "fused": {
        "xla_enable_async_all_reduce": True, "xla_tpu_enable_async_collective_fusion": True,
        "xla_tpu_enable_async_collective_fusion_fuse_all_reduce": True,
        "xla_tpu_enable_async_collective_fusion_multiple_steps": True, "xla_tpu_overlap_compute_collective_tc": True,
    },
    "sparse core": {
        "xla_enable_async_all_reduce": True, "xla_tpu_enable_sparse_core_collective_offload_all_reduce": True,
        "xla_tpu_sparse_core_all_reduce_offload_min_size_in_bytes": 0,
    },
    "sparse core, uncombined": {  # for halves, whose sums are made one otherwise
        "xla_enable_async_all_reduce": True, "xla_tpu_enable_sparse_core_collective_offload_all_reduce": True,
        "xla_tpu_sparse_core_all_reduce_offload_min_size_in_bytes": 0, "xla_jf_crs_combiner_threshold_in_bytes": 0,
    },
    "collective matmul": {
        "xla_tpu_enable_all_reduce_native_decomposition": True, "xla_tpu_decompose_einsum_reduce_scatter": True,
        "xla_tpu_decompose_all_gather_einsum": True, "xla_tpu_enable_windowed_einsum_for_reduce_scatter": True,
        "xla_tpu_enable_windowed_einsum_for_all_gather": True, "xla_jf_spmd_threshold_for_windowed_einsum_mib": 0,
    },
}  # fmt: skip


class Overlap(NamedTuple):
    """`bytes_meanwhile`: of copies that begin before a collective, or its start, and end behind it."""

    asynchronous: int
    hidden_cycles: int
    synchronous: int
    bytes_meanwhile: int
    cycles: int


def overlap(text: str) -> Overlap:
    """-> what the compiled text, whose entry is in the order of its schedule, has beside its collectives."""
    exchanging: set[str] = set()  # asynchronous collectives that have started and not ended
    copies: dict[str, tuple[int, int]] = {}  # the same of copies: bytes, and the collectives before
    found = dict.fromkeys(Overlap._fields, 0)
    for line in text[text.index("\nENTRY") :].splitlines():
        match = re.match(r" *(?:ROOT )?%([\w.-]+) = (.*?) ([\w-]+)\(", line)
        if match is None:
            continue
        name, kind, operation = match.groups()
        estimated = re.search(r'"estimated_cycles":"(\d+)"', line)
        cycles = int(estimated[1]) if estimated else 0
        found["cycles"] += cycles
        found["hidden_cycles"] += cycles if exchanging else 0
        exchanges = re.search(KINDS, f"{name} {operation}" if operation.endswith("-start") else operation)
        collectives = found["synchronous"] + found["asynchronous"]
        ended = re.search(r"-done\(.*?%([\w.-]+)", line)
        if operation.endswith("-start") and exchanges:
            exchanging.add(name)
            found["asynchronous"] += 1
        elif operation.endswith("-start"):
            copies[name] = into_vmem(operation, kind), collectives
        elif ended:
            exchanging.discard(ended[1])
            size, before = copies.pop(ended[1], (0, 0))
            found["bytes_meanwhile"] += size if before < collectives else 0
        elif exchanges:
            found["synchronous"] += 1
    return Overlap(**found)


def into_vmem(operation: str, kind: str) -> int:
    """-> bytes that a copy-start or a slice-start of this type brings into VMEM, which is memory space 1."""
    shapes = re.findall(r"(\w+)\[([\d,]*)\](\{[^}]*\})?", kind)
    if operation == "copy-start":  # (destination, source, ...)
        shapes = shapes[:1]
    return sum(size_of(f"{dtype}[{axes}]") for dtype, axes, layout in shapes if "S(1)" in layout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, default="llama-70b-v6e-2x4")
    parser.add_argument("--step", choices=STEPS, nargs="+", default=list(STEPS))
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--options", choices=OPTIONS, nargs="+", default=list(OPTIONS))
    parser.add_argument("--halves", action="store_true", help="cut steps in two, as on GPUs")
    parser.add_argument("--text", help="where to put the compiled steps: a prefix")
    given = parser.parse_args()
    case = CASES[given.case]
    if given.halves:
        layout.HALF_TOKENS = {"tpu": 128}
    topology = topologies.get_topology_desc(platform="tpu", topology_name=case.topology)
    (mesh,) = replica_meshes(topology.devices, len(topology.devices) // case.stages, case.stages)
    _, config = from_hugging_face(case.model, LARGE[case.model])
    config = replace(config, layers=config.layers[: given.layers])
    names = "| step | options | asynchronous | cycles within them | synchronous | MiB meanwhile | cycles | seconds |"
    print(names + "\n" + "|---" * 8 + "|", flush=True)
    for step in given.step:
        for name in given.options:
            compiled, seconds = compile_step(config, mesh, STEPS[step], case.experts, OPTIONS[name])
            text = compiled.as_text()
            if given.text:
                with open(f"{given.text}-{step}-{name.replace(' ', '-')}.txt", "w") as file:
                    file.write(text)
            row = overlap(text)
            mib = row.bytes_meanwhile / 2**20
            print(
                f"| {step} | {name} | {row.asynchronous} | {row.hidden_cycles} | {row.synchronous} | {mib:.0f} | "
                f"{row.cycles} | {seconds:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
