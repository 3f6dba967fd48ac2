"""`python -m engine.bench throughput | latency | serve | startup | memory`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NamedTuple

from absl import flags

from engine.bench import memory, offline, serve, startup
from engine.command_line import parse, usage


class Command(NamedTuple):
    """A subcommand: what it is for, its flags, those that take several values, and what it does."""

    purpose: str
    define: Callable[[flags.FlagValues], None]
    several: tuple[str, ...]
    main: Callable[[flags.FlagValues], None]


COMMANDS = {
    "throughput": Command(offline.THROUGHPUT_PURPOSE, offline.define_throughput, (), offline.throughput),
    "latency": Command(offline.LATENCY_PURPOSE, offline.define_latency, (), offline.latency),
    "serve": Command(serve.PURPOSE, serve.define, serve.SEVERAL, serve.main),
    "startup": Command(startup.PURPOSE, startup.define, (), startup.main),
    "memory": Command(memory.PURPOSE, memory.define, (), memory.main),
}


def main(argv: list[str]) -> int:
    """-> the exit status."""
    name = argv[1] if len(argv) > 1 else ""
    if name not in COMMANDS:
        lines = "\n".join(f"  {name:12}{command.purpose}" for name, command in COMMANDS.items())
        print(f"python -m engine.bench COMMAND [flags]; COMMAND --help shows the flags\n\n{lines}")
        return 0 if name in ("-h", "--help") else 2
    command, values = COMMANDS[name], flags.FlagValues()
    command.define(values)
    if {"-h", "--help"} & set(argv[2:]):
        print(usage(f"python -m engine.bench {name}", command.purpose, values))
        return 0
    try:
        parse(values, argv[1:], command.several)
        command.main(values)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
