"""Drafts from texts that were generated before."""

from __future__ import annotations

from engine.speculation.suffix import Corpus, Suffixes
from engine.speculative_config import SpeculativeConfig
from tests.engine.fakes import make_request


def suffixes(**options) -> Suffixes:
    return Suffixes(SpeculativeConfig("suffix", 4, **options))


def letters(text: str) -> list[int]:
    return list(map(ord, text))


def finish(store: Suffixes, *outputs: str) -> None:
    for output in outputs:
        request = make_request(letters("?"), 99)
        request.token_ids += letters(output)
        store.end(request)


def draft(store: Suffixes, text: str, count: int = 4) -> str:
    return "".join(map(chr, store.propose(make_request(letters(text), 99), count)))


def test_what_another_request_has_generated_is_drafted():
    store = suffixes()
    assert draft(store, "the c") == ""
    finish(store, "the cat sat")
    assert draft(store, "see the c") == "at s"
    assert draft(store, "see the c", count=2) == "at"


def test_a_sequence_repeats_itself():
    assert draft(suffixes(), "abcdef-ab") == "cdef"


def test_the_longest_context_wins_and_then_the_most_frequent_continuation():
    store = suffixes()
    finish(store, "xabC", "yabD", "yabE", "yabE")
    assert draft(store, "..xab", count=1) == "C"
    assert draft(store, "..yab", count=1) == "E"


def test_unlikely_continuations_are_not_drafted():
    store = suffixes(suffix_decoding_min_token_prob=0.6)
    finish(store, "abCx", "abDx", "abCy")
    assert draft(store, "-ab") == "C"


def test_nothing_is_drafted_over_the_end_of_a_text():
    store = suffixes()
    finish(store, "abc", "xyz")
    assert draft(store, "-ab") == "c"


def test_a_growing_request_is_looked_at_token_by_token():
    store, request = suffixes(), make_request(letters("ab"), 99)
    for token in letters("cdab"):
        assert store.propose(request, 4) == []
        request.token_ids.append(token)
    assert store.propose(request, 4) == letters("cdab")[:4]


def test_memory_is_bounded():
    store = suffixes(suffix_decoding_max_cached_tokens=100)
    finish(store, *(f"{i:03}ab{i % 10}" for i in range(200)))
    assert len(store._finished.tokens) <= 100
    assert draft(store, "199ab") == "9"
    nothing = suffixes(suffix_decoding_max_cached_tokens=0)
    finish(nothing, "abc")
    assert draft(nothing, "-ab") == ""


def test_common_tokens_are_counted_backwards_up_to_a_limit():
    text = Corpus()
    text.extend(letters("abcdeabcd"))
    assert text.common(4, letters("zbcd"), 24) == 3
    assert text.common(4, letters("abcd"), 2) == 2
    assert text.common(4, letters("abcd"), 24) == 4
