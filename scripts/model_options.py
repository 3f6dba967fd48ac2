"""--model or --shape: what a benchmark runs, a checkpoint or a known shape with random weights."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from engine.bench.shapes import SHAPES, write_shape


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Let the user name one of the two."""
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--model")
    which.add_argument("--shape", choices=SHAPES)


@contextmanager
def model_settings(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yields the settings of an LLM that name the model. A shape's files are there until the end."""
    if options.model:
        yield {"model": options.model}
        return
    with tempfile.TemporaryDirectory() as folder:
        yield write_shape(options.shape, Path(folder))
