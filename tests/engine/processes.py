"""Programs that tests run in processes of their own, since JAX cannot be given more CPU devices once it has started."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
# Nearly all of their time goes into compiling what then runs for milliseconds.
ENVIRONMENT = {"XLA_FLAGS": "--xla_backend_optimization_level=0", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'scripts'}"}


def run_module(name: str, *arguments: str, given: Any = None) -> Any:
    """Run `python -m name arguments` with JSON of `given` as its input. -> what it prints, as JSON."""
    done = subprocess.run(
        [sys.executable, "-m", name, *arguments], cwd=ROOT, env=os.environ | ENVIRONMENT, input=json.dumps(given),
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)
