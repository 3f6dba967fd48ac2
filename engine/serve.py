"""`python -m engine.serve --model PATH`: the HTTP server with OpenAI's interface. Flags have vLLM's names."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from absl import app, flags

from engine.command_line import normalize
from engine.config import config_from_flags, define_flags
from engine.server import ServerOptions, run
from engine.server.tool_calls import PARSERS

FLAGS = flags.FLAGS

PURPOSE = "the HTTP server with OpenAI's interface"
_LEVELS = ["critical", "error", "warning", "info", "debug"]
_SERVER_FLAGS = (
    "host", "port", "max_queue", "max_queue_tokens", "shutdown_timeout", "timeout_keep_alive", "max_connections",
    "uvicorn_log_level", "tool_call_parser",
)  # fmt: skip


def define(values: flags.FlagValues) -> None:
    """Define the engine's flags and the server's."""
    define_flags(values)
    string, integer, strings = flags.DEFINE_string, flags.DEFINE_integer, flags.DEFINE_multi_string
    at: Any = {"flag_values": values}
    string("host", "0.0.0.0", "Address to listen on.", **at)
    integer("port", 8000, "Port to listen on; 0 takes a free one.", **at)
    strings("api_key", [], "Ask every client for this key; repeat the flag for several.", **at)
    strings("served_model_name", [], "Name of the model in requests; default: the value of --model.", **at)
    integer("max_queue", 1024, "Completions that may wait beyond --max-num-seqs; more are told 429.", **at)
    integer("max_queue_tokens", 1 << 22, "Prompt tokens that may wait; more are told 429.", **at)
    text = "How the model writes tool calls; without it they stay text."
    flags.DEFINE_enum("tool_call_parser", None, list(PARSERS), text, **at)
    flags.DEFINE_float("shutdown_timeout", 20.0, "Seconds that running requests get after SIGTERM.", **at)
    integer("timeout_keep_alive", 5, "Seconds for which an idle connection is kept.", **at)
    integer("max_connections", 4096, "Open connections; more are told 503, or cut.", **at)
    flags.DEFINE_enum("uvicorn_log_level", "info", _LEVELS, "Log level of the HTTP server.", **at)


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
    define(FLAGS)
    app.run(main, argv=normalize(sys.argv, FLAGS))
