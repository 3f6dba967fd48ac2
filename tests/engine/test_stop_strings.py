"""Stop strings against an oracle that looks at the whole text after every character."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from engine.stop_strings import StopStrings

stop_lists = st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=4)
piece_lists = st.lists(st.text("abc", max_size=4), max_size=12)


def first_stop(text: str, stops: list[str], unchecked: int) -> tuple[int, int] | None:
    """-> (start, end) of the match that ends first behind text[:unchecked], the longest of those that end there."""
    for end in range(unchecked + 1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return end - max(map(len, found)), end
    return None


@given(piece_lists, stop_lists, st.booleans(), st.integers(0, 4))
def test_any_cut_of_a_text_ends_where_the_whole_text_does(
    pieces: list[str], stops: list[str], include: bool, unchecked: int
):
    text = "".join(pieces)
    match = first_stop(text, stops, len("".join(pieces[:unchecked])))
    finder, given_out, found = StopStrings(stops, include=include), "", None
    for i, piece in enumerate(pieces):
        new, found = finder.add(piece, check=i >= unchecked)
        given_out += new
        if found is not None:
            break
    if match is None:
        assert found is None
        assert given_out + finder.held == text
    else:
        start, end = match
        assert found == text[start:end]
        assert given_out == text[: end if include else start]
        assert finder.held == ""


@given(piece_lists, stop_lists)
def test_exactly_what_may_begin_a_stop_string_is_held_back(pieces: list[str], stops: list[str]):
    finder, text = StopStrings(stops, include=False), ""
    for piece in pieces:
        text += piece
        if finder.add(piece)[1] is not None:
            return
        beginnings = {stop[:n] for stop in stops for n in range(len(stop))}
        assert finder.held == max((b for b in beginnings if text.endswith(b)), key=len)


@given(piece_lists, stop_lists)
def test_nothing_is_held_back_when_the_stop_string_belongs_to_the_text(pieces: list[str], stops: list[str]):
    finder = StopStrings(stops, include=True)
    for piece in pieces:
        new, found = finder.add(piece)
        if found is not None:
            return
        assert new == piece


def test_the_order_of_the_stop_strings_does_not_matter():
    for stops in (["END", "\n"], ["\n", "END"]):
        assert StopStrings(stops, include=False).add("a\nEND") == ("a", "\n")
    for stops in (["the end", "end"], ["end", "the end"]):
        assert StopStrings(stops, include=False).add("this is the end.") == ("this is ", "the end")


def test_long_stop_strings_cost_a_bounded_number_of_comparisons():
    class Counted(str):
        """A stop string that counts how often it is compared with."""

        comparisons = 0

        def __gt__(self, other: str) -> bool:
            Counted.comparisons += 1
            return str.__gt__(self, other)

    # Every "b" breaks off an almost complete stop string, so that each shorter beginning has to be tried.
    stops = [Counted("a" * 1000 + f"{i:024}") for i in range(64)]
    finder = StopStrings(stops, include=False)
    text = ("a" * 1000 + "b") * 5
    Counted.comparisons = 0
    for character in text:
        assert finder.add(character)[1] is None
    assert 0 < Counted.comparisons <= 2 * len(text) * 7  # bisecting 64 strings takes 7 comparisons at most
