"""Writes docs/flags.md, every flag of every program, from the flags themselves. A test sees that it is current.

python scripts/make_flags_docs.py
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from absl import flags

from engine import convert, generate, serve
from engine.batch import __main__ as batch
from engine.bench.__main__ import COMMANDS
from engine.command_line import rows

PAGE = Path(__file__).parents[1] / "docs" / "flags.md"
INTRODUCTION = """# Flags

Every flag of every program, written by `scripts/make_flags_docs.py` from the flags themselves. Dashes and underscores
are alike; a flag that is on or off takes `--no-` before its name. `LLM(...)` takes the engine's settings under the
same names, with underscores.
"""


def programs() -> Iterator[tuple[str, str, Callable[[flags.FlagValues], None]]]:
    """Yields each program's command, what it is for, and what defines its flags."""
    for module in (serve, batch, generate, convert):
        yield f"python -m {module.__name__.removesuffix('.__main__')}", module.PURPOSE, module.define
    for name, command in COMMANDS.items():
        yield f"python -m engine.bench {name}", command.purpose, command.define


def page() -> str:
    """-> the whole page."""
    parts = [INTRODUCTION]
    for command, purpose, define in programs():
        values = flags.FlagValues()
        define(values)
        lines = [f"## `{command}`\n", f"{purpose[0].upper()}{purpose[1:]}.\n", "| flag | default | |", "|---|---|---|"]
        for row in rows(values):
            default = f"`{row.default}`" if row.default else ""
            lines.append(f"| `{row.name}` | {default} | {row.text.replace('|', chr(92) + '|')} |")
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page())
