"""Block sizes that were found to be better than the computed ones: kernels/tuned/tpu_<generation>.json.

Each file maps a shape to fields of Blocks; what is not in it is computed. scripts/tune_tpu_attention.py writes them.
"""

from __future__ import annotations

import json
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from typing import Any

from kernels.pallas.blocks import Blocks
from kernels.pallas.call import Call

FOLDER = Path(__file__).parents[1] / "tuned"


def shape_key(call: Call) -> str:
    """-> the name of a call's shape in the files."""
    spec = call.spec
    heads = f"{spec.num_kv_heads} KV heads x {spec.group}, {spec.head_dim} wide"
    window = "" if spec.window is None else f", window {spec.window}"
    return f"{heads}, {call.kv_dtype}, page {call.page_size}{window}"


def tuned(blocks: Blocks, call: Call, generation: str) -> Blocks:
    """-> the blocks with what was found for this shape. Errors: ValueError if the file names no field of Blocks."""
    found = _read(FOLDER / f"tpu_{generation}.json").get(shape_key(call), {})
    if unknown := found.keys() - {field.name for field in fields(Blocks)}:
        raise ValueError(f"kernels/tuned/tpu_{generation}.json: {sorted(unknown)} are no sizes of blocks: remove them")
    return replace(blocks, **found)


@cache
def _read(path: Path) -> dict[str, dict[str, Any]]:
    return json.loads(path.read_text()) if path.exists() else {}
