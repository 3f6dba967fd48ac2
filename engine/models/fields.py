"""Typed look-up in what a checkpoint says of its model: every value is checked before it is believed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class Fields:
    """Values by key. Errors: ValueError that names the source and the key.

    `shown` maps a key to what the source calls it, where that is something else.
    """

    def __init__(self, source: str, values: Mapping[str, Any], shown: Mapping[str, str] | None = None):
        self.source, self.values, self.shown = source, values, shown or {}

    def __call__(self, key: str, kind: type, default: Any = ..., *, low: float = 0, high: float = 2**40) -> Any:
        """-> the value, of that type, low < value <= high for numbers. An int will do for a float; null is absent."""
        value = self.values.get(key)
        if value is None:
            if default is ...:
                raise self.error(key, "is missing")
            return default
        if isinstance(value, int) and not isinstance(value, bool) and kind is float:
            value = float(value)
        if not isinstance(value, kind) or isinstance(value, bool) != (kind is bool):
            raise self.error(key, f"must be of type {kind.__name__}, got {value!r:.80}")
        if kind in (int, float) and not low < value <= high:
            raise self.error(key, f"is out of range: {value}")
        return value

    def list_of(self, key: str, kind: type, count: int, *, low: float = 0) -> tuple[Any, ...]:
        """-> a list's values, each of which must be as a single one must, exactly `count` of them."""
        values = self(key, list)
        if len(values) != count:
            raise self.error(key, f"must have {count} entries, got {len(values)}")
        each = Fields(self.source, {f"{key}[{i}]": value for i, value in enumerate(values)})
        return tuple(each(name, kind, low=low) for name in each.values)

    def nested(self, key: str) -> Fields:
        """-> the fields of an object, none if it is absent."""
        return Fields(f"{self.source}: {self.shown.get(key, key)}", self(key, dict, {}), self.shown)

    def error(self, key: str, problem: str) -> ValueError:
        """-> the error that says what is wrong with a key."""
        return ValueError(f"{self.source}: {self.shown.get(key, key)} {problem}")
