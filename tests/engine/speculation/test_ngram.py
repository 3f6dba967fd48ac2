"""Prompt lookup: which continuation is drafted."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engine.speculation.ngram import propose

propose_jitted = jax.jit(propose, static_argnums=(2, 3, 4))


def drafts(*texts: str, count: int = 4, shortest: int = 2, longest: int = 4, room: int = 40) -> list[str]:
    """-> what is drafted behind each text, a letter being a token; what lies behind a text's end is not looked at."""
    table = np.full((len(texts), room), ord("!"), np.int32)
    for row, text in enumerate(texts):
        table[row, : len(text)] = list(map(ord, text))
    lengths = jnp.asarray([len(text) for text in texts], jnp.int32)
    tokens, valid = propose_jitted(jnp.asarray(table), lengths, count, shortest, longest)
    return ["".join(map(chr, row[:n])) for row, n in zip(tokens.tolist(), valid.tolist(), strict=True)]


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("abcdefgh-ab", "cdef"),  # what followed
        ("abcd-abXY-ab", "XY-a"),  # of equals, the last
        ("zabcd-yabXY-zab", "cd-y"),  # the longest match before a later one
        ("wxyz", ""),  # nothing has occurred before
        ("a-b-a", ""),  # one token in common is less than the shortest match
        ("abab", "abab"),  # a match next to the end goes round
        ("xyaaa", "aaaa"),
        ("a", ""),
        ("", ""),
    ],
)
def test_what_followed_the_longest_match_is_drafted(text: str, want: str):
    assert drafts(text) == [want]


def test_rows_of_one_batch_do_not_see_each_other():
    assert drafts("abcdefgh-ab", "", "xyxy", "abcq-ab") == ["cdef", "", "xyxy", "cq-a"]


def test_a_table_that_is_full_is_searched_to_its_end():
    text = "abcdefgh" * 5
    assert drafts(text, room=len(text)) == ["abcd"]


def test_the_shortest_match_is_a_limit():
    assert drafts("abcde-abcf-xbc", shortest=2, longest=3) == ["f-xb"]
    assert drafts("abcde-abcf-xbc", shortest=3, longest=3) == [""]
