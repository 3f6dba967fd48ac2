"""`python -m engine.bench memory`: how high --gpu-memory-utilization can be, asked of the device and not tried out."""

from __future__ import annotations

import json
from pathlib import Path

from absl import flags

PURPOSE = "the highest --gpu-memory-utilization that this machine's first device has room for now"


def define(values: flags.FlagValues) -> None:
    flags.DEFINE_string("output_json", None, "Write the figure here.", flag_values=values)


def main(values: flags.FlagValues) -> None:
    """Run the command."""
    from engine.memory import highest_utilization

    share = highest_utilization()
    print("gpu_memory_utilization means nothing on a CPU" if share is None else f"--gpu-memory-utilization {share}")
    if values.output_json is not None:
        Path(values.output_json).write_text(json.dumps({"gpu_memory_utilization": share}))
