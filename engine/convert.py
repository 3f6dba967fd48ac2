"""`python -m engine.convert SRC DST`: write a model as an Orbax checkpoint in the engine's own layout and dtype."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from absl import app, flags

FLAGS = flags.FLAGS


PURPOSE = "a model as an Orbax checkpoint in the engine's own layout and dtype"


def define(values: flags.FlagValues) -> None:
    """Define the program's flags."""
    kinds, text = ["float32", "bfloat16", "float16"], "Of the parameters that are written."
    flags.DEFINE_enum("dtype", "bfloat16", kinds, text, flag_values=values)
    text = "Branch, tag or commit of a model on the hub; default: its main branch."
    flags.DEFINE_string("revision", None, text, flag_values=values)


def convert(source: str, destination: Path, dtype: str, revision: str | None = None) -> int:
    """Convert a .gguf file, a folder or a model of the hub. It is held in the host's memory once.

    -> bytes of the parameters. Errors: ValueError that names the file, tensor or setting at fault; OSError.
    """
    import jax
    from jax.sharding import SingleDeviceSharding

    from engine.models.placement import whole
    from engine.weights.hub import locate
    from engine.weights.load import load_params, open_checkpoint
    from engine.weights.orbax import check_free, save

    check_free(destination)
    path = locate(source, revision)
    checkpoint = open_checkpoint(path)
    host = SingleDeviceSharding(jax.devices("cpu")[0])
    params = load_params(checkpoint, dtype, whole(checkpoint.config, lambda path, spec: host))
    return save(params, checkpoint.config, path, destination)


def main(arguments: list[str]) -> None:
    if len(arguments) != 3:
        raise app.UsageError("name a source and a destination: python -m engine.convert SRC DST")
    import jax

    jax.config.update("jax_platforms", "cpu")  # an accelerator may be too small for what it will have a part of
    started = time.perf_counter()
    try:
        count = convert(arguments[1], Path(arguments[2]), FLAGS.dtype, FLAGS.revision)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    seconds = time.perf_counter() - started
    print(f"{arguments[2]}: {count / 1e9:.3f} GB of {FLAGS.dtype} in {seconds:.1f} s", file=sys.stderr)


if __name__ == "__main__":
    define(FLAGS)
    app.run(main)
