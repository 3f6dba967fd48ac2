"""Command lines: absl's flags, spelled as people type them, for programs with several sets of flags."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

from absl import flags


class FlagRow(NamedTuple):
    """One flag as help and docs show it."""

    name: str  # with its dashes
    default: str
    text: str


def normalize(argv: Sequence[str], values: flags.FlagValues) -> list[str]:
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


def spread(argv: Sequence[str], names: Collection[str]) -> list[str]:
    """-> normalized argv with `--name a b` as `--name=a --name=b`, for the flags that take several values."""
    result, current = [], None
    for argument in argv:
        if argument.startswith("-"):
            current = argument if argument.removeprefix("--") in names else None
            if current is None:
                result.append(argument)
        elif current is not None:
            result.append(f"{current}={argument}")
        else:
            result.append(argument)
    return result


def parse(values: flags.FlagValues, argv: Sequence[str], several: Collection[str] = ()) -> None:
    """Read argv[1:] into `values`; flags named in `several` (multi_string ones) take one value or more.

    Errors: ValueError, in words for the user.
    """
    try:
        rest = values(spread(normalize(argv, values), several))
    except flags.Error as error:
        raise ValueError(str(error)) from None
    if len(rest) > 1:
        raise ValueError(f"unexpected argument {rest[1]!r}; every setting is a flag")


def rows(values: flags.FlagValues) -> Iterator[FlagRow]:
    """Yields the flags in the order in which they were defined."""
    for name in values:
        flag = values[name]
        if name != flag.name:  # its short name
            continue
        text, kinds = flag.help, getattr(flag.parser, "enum_values", None)
        if kinds:  # absl puts them before the text, with bars between
            text = f"{text.partition('>: ')[2]} One of {', '.join(kinds)}."
        spelled = "--" + name.replace("_", "-") + (f", -{flag.short_name}" if flag.short_name else "")
        yield FlagRow(spelled, "" if flag.default in (None, []) else str(flag.default), text)


def usage(command: str, purpose: str, values: flags.FlagValues) -> str:
    """-> what --help prints."""
    lines = [f"{command}: {purpose}", ""]
    for row in rows(values):
        lines.append(f"  {row.name}" + (f" (default: {row.default})" if row.default else ""))
        lines.append(f"      {row.text}")
    return "\n".join(lines)
