"""`python -m engine.batch -i requests.jsonl -o answers.jsonl --model MODEL`."""

from __future__ import annotations

import sys
from pathlib import Path

from absl import flags
from tqdm import tqdm

from engine.batch.journal import Journal, count_lines
from engine.batch.run import Batch
from engine.command_line import parse, usage
from engine.config import config_from_flags, define_flags
from engine.server.tool_calls import PARSERS

PURPOSE = "answers a file of requests in OpenAI's batch format, and goes on where it stopped"


def define(values: flags.FlagValues) -> None:
    """Define the program's flags and the engine's."""
    text = "JSONL of requests: custom_id, method, url and body on each line."
    flags.DEFINE_string("input_file", None, text, short_name="i", flag_values=values)
    text = "JSONL of answers; lines that are answered there already are left out."
    flags.DEFINE_string("output_file", None, text, short_name="o", flag_values=values)
    text = "Write answers in the order of the requests, not as they come."
    flags.DEFINE_boolean("keep_order", False, text, flag_values=values)
    text = "Lines in hand at a time; default: 4 times max_num_seqs."
    flags.DEFINE_integer("window", None, text, lower_bound=1, flag_values=values)
    text = "Name of the model in requests; default: the value of --model."
    flags.DEFINE_string("served_model_name", None, text, flag_values=values)
    text = "How the model writes tool calls; without it they stay text."
    flags.DEFINE_enum("tool_call_parser", None, list(PARSERS), text, flag_values=values)
    define_flags(values)


def run(values: flags.FlagValues) -> int:
    """Answer the file. -> how many lines failed. Errors: ValueError, OSError."""
    for name in ("input_file", "output_file"):
        if values[name].value is None:
            raise ValueError(f"{name}: name it with -{name[0]}")
    source, target = Path(values.input_file), Path(values.output_file)
    if not source.is_file():
        raise ValueError(f"input_file: there is no file {source}")
    if target.exists() and target.samefile(source):
        raise ValueError(f"output_file: {target} is the input")
    config = config_from_flags(values)
    journal = Journal(target)
    try:
        total = count_lines(source)
        if journal.count:
            print(f"quire: {journal.count} of {total} lines are answered in {target}", file=sys.stderr)
        from engine.startup import start  # it brings JAX: what is wrong with the files is known before

        core = start(config)
        failed = 0
        with tqdm(total=total, initial=journal.count, desc="batch", unit="req", smoothing=0.05) as bar:

            def on_row(is_error: bool) -> None:
                nonlocal failed
                failed += is_error
                bar.update()
                if is_error:
                    bar.set_postfix_str(f"{failed} failed", refresh=False)

            Batch(
                core, journal,
                model=values.served_model_name or config.model, parser=values.tool_call_parser,
                keep_order=values.keep_order, window=values.window, on_row=on_row,
            ).run(source)  # fmt: skip
        core.close()
        return failed
    finally:
        journal.close()


def main(argv: list[str]) -> int:
    """-> the exit status: 0 also if lines failed, since their rows say so."""
    values = flags.FlagValues()
    define(values)
    if {"-h", "--help"} & set(argv[1:]):
        print(usage("python -m engine.batch", PURPOSE, values))
        return 0
    try:
        parse(values, argv)
        failed = run(values)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    if failed:
        print(f"quire: {failed} lines failed; their rows in {values.output_file} say why", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
