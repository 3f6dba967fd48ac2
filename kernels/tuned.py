"""What scripts/tune_kernels.py found: a JSON file for each kernel, shape, dtype and device, an entry for a batch size.

They lie in kernels/tuned and are called "product,N=6144,K=4096,fp8 128x128 token_group,NVIDIA_H200.json". A batch of
another size takes the nearest entry. They are written whole or not at all.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from absl import logging

FOLDER = Path(__file__).parent / "tuned"
BATCH_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 256, 512, 1024, 1536, 2048, 3072, 4096)  # in tokens


def file_name(kernel: str, shape: Mapping[str, int], dtype: str, device: str) -> str:
    """-> the name of a file; a device's name may have spaces and slashes."""
    sizes = ",".join(f"{name}={size}" for name, size in shape.items())
    plain = lambda text: "".join(c if c.isalnum() or c in "._- " else "_" for c in text)
    return f"{kernel},{sizes},{plain(dtype)},{plain(device).replace(' ', '_')}.json"


def found_for(name: str, tokens: int) -> dict[str, Any] | None:
    """-> the entry nearest to so many tokens, or None where there is no file. Errors: ValueError for a broken one."""
    table = _read(FOLDER / name)
    if table is None:
        return None
    return table[min(table, key=lambda size: (abs(size - tokens), size))]


@cache
def _read(path: Path) -> dict[int, dict[str, Any]] | None:
    if not path.exists():
        return None
    table = read(path)
    logging.info("block sizes of %s", path.name)
    return table


def read(path: Path) -> dict[int, dict[str, Any]]:
    """-> entries by batch size. Errors: ValueError that names the file."""
    try:
        raw = json.loads(path.read_text())
        table = {int(size): entry for size, entry in raw.items()}
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path}: no tuned block sizes: {error}; remove it or tune again") from None
    if not table or any(size < 1 or not isinstance(entry, dict) for size, entry in table.items()):
        raise ValueError(f"{path}: entries must be objects by batch size, from 1 on; remove it or tune again")
    return table


def write(path: Path, table: Mapping[int, Mapping[str, Any]]) -> None:
    """Write entries by batch size so that a reader sees the old file or the new one, whatever stops the writer."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({str(size): table[size] for size in sorted(table)}, indent=1) + "\n"
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with aside.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
