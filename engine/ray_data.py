"""A Ray Data batch job: `python -m engine.ray_data --model PATH --input prompts.jsonl --output FOLDER --workers 2`.

Each worker is a process with an engine of its own. Ray gives a batch whose worker has died to another, so that every
prompt is answered once. Needs the `[ray]` extra.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from absl import app, flags

from engine.command_line import normalize
from engine.config import config_from_flags, define_flags

FLAGS = flags.FLAGS


def define_job_flags(values: flags.FlagValues) -> None:
    """Define the engine's flags and the job's."""
    define_flags(values)
    flags.DEFINE_string(
        "input", None, "JSON lines with `prompt` or `prompt_token_ids`, a file or a folder.", flag_values=values
    )
    flags.DEFINE_string(
        "output", None, "Folder for JSON lines: the input's, with `token_ids` and `text`.", flag_values=values
    )
    flags.DEFINE_string("sampling", "{}", "SamplingParams as a JSON object.", flag_values=values)
    flags.DEFINE_integer("workers", 1, "Engines to run at a time.", lower_bound=1, flag_values=values)
    flags.DEFINE_integer(
        "batch_size", 256, "Prompts that an engine takes at a time.", lower_bound=1, flag_values=values
    )
    flags.DEFINE_float("accelerators", 0, "Of the resource below, for each worker.", lower_bound=0, flag_values=values)
    flags.DEFINE_string("resource", "GPU", "What Ray calls the accelerators: GPU or TPU.", flag_values=values)


class Worker:
    """An engine in a Ray actor, which answers batches of rows."""

    def __init__(self, settings: Mapping[str, Any], sampling: Mapping[str, Any]):
        from engine import LLM, SamplingParams

        self.llm, self.params = LLM(**settings), SamplingParams(**sampling)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Columns of rows with `prompt` or `prompt_token_ids` -> the same with `token_ids` and `text`."""
        ids = "prompt_token_ids" in batch
        given = batch["prompt_token_ids" if ids else "prompt"]
        prompts: Sequence[Any] = [{"prompt_token_ids": [int(t) for t in row]} if ids else str(row) for row in given]
        outputs = self.llm.generate(prompts, self.params, use_tqdm=False)
        batch["token_ids"] = [output.outputs[0].token_ids for output in outputs]
        batch["text"] = [output.outputs[0].text for output in outputs]
        return batch


def answer(
    rows: Any,
    settings: Mapping[str, Any],
    sampling: Mapping[str, Any],
    *,
    workers: int = 1,
    batch_size: int = 256,
    resources: Mapping[str, float] | None = None,
) -> Any:
    """A ray.data.Dataset with `prompt` or `prompt_token_ids` -> one with `token_ids` and `text` beside them.

    `settings` are EngineConfig's, `sampling` SamplingParams'; `resources`: what Ray reserves for a worker.
    """
    given = dict(resources or {})
    gpus = given.pop("GPU", None)
    return rows.map_batches(
        Worker, fn_constructor_args=(dict(settings), dict(sampling)), concurrency=workers, batch_size=batch_size,
        num_gpus=gpus or None, resources=given or None,
        max_restarts=-1, max_task_retries=-1,  # a worker's death costs its batch's time, and nothing else
    )  # fmt: skip


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1 or not FLAGS.input or not FLAGS.output:
        raise app.UsageError("name --input and --output; every setting is a flag")
    import ray.data  # pyright: ignore[reportMissingImports]  an extra

    settings, sampling = dataclasses.asdict(config_from_flags(FLAGS)), json.loads(FLAGS.sampling)
    resources = {FLAGS.resource: FLAGS.accelerators} if FLAGS.accelerators else None
    answered = answer(
        ray.data.read_json(FLAGS.input, lines=True), settings, sampling,
        workers=FLAGS.workers, batch_size=FLAGS.batch_size, resources=resources,
    )  # fmt: skip
    answered.write_json(FLAGS.output)


if __name__ == "__main__":
    define_job_flags(FLAGS)
    app.run(main, argv=normalize(sys.argv, FLAGS))
