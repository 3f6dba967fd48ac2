"""StopStrings: finds the end of a text that arrives in pieces, and holds back what may begin a stop string."""

from __future__ import annotations

import bisect
from collections.abc import Sequence


class StopStrings:
    """Looks for several stop strings in one growing text.

    The stop string that is complete first wins, of several that end together the longest, so that neither the order of
    the strings nor the way the text was cut into pieces matters. What is kept between pieces is the longest end of the
    text that is the beginning of a stop string: whatever comes before it can be in no match any more.
    """

    def __init__(self, stops: Sequence[str], *, include: bool):
        """include: whether the stop string belongs to the text. Then nothing need be held back."""
        self._stops = sorted(stops)
        self._initials = frozenset(stop[0] for stop in stops)
        self._include = include
        self._open = ""

    @property
    def held(self) -> str:
        """What was added and not given out yet."""
        return "" if self._include else self._open

    def add(self, new: str, *, check: bool = True) -> tuple[str, str | None]:
        """-> (what can be given out, the stop string that was found). With check=False no match may end in `new`.

        Nothing may be added after a match: what follows the stop string is lost.
        """
        if not self._open and self._initials.isdisjoint(new):
            return new, None
        old, given = len(self._open), len(self._open) if self._include else 0
        text = self._open + new
        if check:
            match = self._first_match(text, old)
            if match is not None:
                start, end = match
                self._open = ""
                return text[given : end if self._include else start], text[start:end]
        self._open = self._open_end(text)
        return text[given : len(text) - len(self.held)], None

    def _first_match(self, text: str, old: int) -> tuple[int, int] | None:
        """-> (start, end) of the match that ends first, after text[:old]."""
        best = None
        for stop in self._stops:
            start = text.find(stop, max(0, old - len(stop) + 1))
            if start >= 0 and (best is None or (start + len(stop), start) < (best[1], best[0])):
                best = start, start + len(stop)
        return best

    def _open_end(self, text: str) -> str:
        """-> the longest end of `text` that is a stop string's beginning, but not the whole of it.

        A position that is passed over has left the open end for good: a whole text takes one look-up a character.
        """
        for i, character in enumerate(text):
            if character in self._initials:
                end = text[i:]
                # Strings that begin with `end` stand together in sorted order, right after `end` itself.
                after = bisect.bisect_right(self._stops, end)
                if after < len(self._stops) and self._stops[after].startswith(end):
                    return end
        return ""
