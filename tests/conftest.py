"""What every test stands on: JAX strict and on the CPU, and the real model that some tests read."""

from __future__ import annotations

import os
import pathlib

import pytest

# JAX reads these once, when it is first imported; processes that tests start inherit them. Not importing it here keeps
# the tests of host-only modules quick to collect.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["JAX_NUMPY_DTYPE_PROMOTION"] = "strict"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
# Tests are run after every change of a source, so JAX's cache, which looks at what comes of it, serves them better.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(pathlib.Path.home() / ".cache" / "quire" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")


@pytest.fixture(scope="session")
def smollm2_gguf() -> pathlib.Path:
    """The default model's GGUF file, fetched on first use."""
    from engine.weights.default_model import default_model

    return default_model()
