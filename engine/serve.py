"""`python -m engine.serve --model PATH`: the HTTP server with OpenAI's interface. Flags have vLLM's names."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from absl import app, flags

from engine.config import config_from_flags, define_flags
from engine.server import ServerOptions, run
from engine.server.tool_calls import PARSERS

FLAGS = flags.FLAGS

define_flags()
flags.DEFINE_string("host", "0.0.0.0", "Address to listen on.")
flags.DEFINE_integer("port", 8000, "Port to listen on; 0 takes a free one.")
flags.DEFINE_multi_string("api_key", [], "Ask every client for this key; repeat the flag for several.")
flags.DEFINE_multi_string("served_model_name", [], "Name of the model in requests; default: the value of --model.")
flags.DEFINE_integer("max_queue", 1024, "Completions that may wait beyond --max-num-seqs; more are told 429.")
flags.DEFINE_integer("max_queue_tokens", 1 << 22, "Prompt tokens that may wait; more are told 429.")
flags.DEFINE_enum(
    "tool_call_parser", None, list(PARSERS), "How the model writes tool calls; without it they stay text."
)
flags.DEFINE_float("shutdown_timeout", 20.0, "Seconds that running requests get after SIGTERM.")
flags.DEFINE_integer("timeout_keep_alive", 5, "Seconds for which an idle connection is kept.")
flags.DEFINE_integer("max_connections", 4096, "Open connections; more are told 503, or cut.")
flags.DEFINE_enum(
    "uvicorn_log_level", "info", ["critical", "error", "warning", "info", "debug"], "Log level of the HTTP server."
)
_SERVER_FLAGS = (
    "host", "port", "max_queue", "max_queue_tokens", "shutdown_timeout", "timeout_keep_alive", "max_connections",
    "uvicorn_log_level", "tool_call_parser",
)  # fmt: skip


def normalize(argv: Sequence[str], values: flags.FlagValues = FLAGS) -> list[str]:
    """-> argv with --max-num-seqs as --max_num_seqs, and --no-enable-x as absl's --noenable_x."""
    normal = []
    for i, argument in enumerate(argv):
        if argument == "--":
            return [*normal, *argv[i:]]
        if argument.startswith("--"):
            name, equals, value = argument[2:].partition("=")
            name = name.replace("-", "_")
            if name.startswith("no_") and name not in values and name[3:] in values:
                name = "no" + name[3:]
            argument = f"--{name}{equals}{value}"
        normal.append(argument)
    return normal


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}; every setting is a flag")
    server_settings: dict[str, Any] = {name: FLAGS[name].value for name in _SERVER_FLAGS}
    try:
        config = config_from_flags()
        options = ServerOptions(
            served_model_name=tuple(FLAGS.served_model_name) or (config.model,),
            api_key=tuple(FLAGS.api_key),
            **server_settings,
        )
    except ValueError as error:
        raise app.UsageError(str(error)) from None

    def load():
        from engine.startup import start  # it brings JAX: the port opens first

        return start(config)

    if config.process_id:  # not the first: it serves no requests
        load()
    sys.exit(run(load, options))


if __name__ == "__main__":
    app.run(main, argv=normalize(sys.argv))
