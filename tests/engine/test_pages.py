"""The page-size rule, and the pool's own promises; the scheduler's tests prove the rest."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.pages import PagePool, common_prefix, default_page_size, encode_tokens
from tests.engine.fakes import make_request


@pytest.mark.parametrize(
    ("max_model_len", "page"),
    [
        (1, 16),
        (256, 16),
        (257, 32),
        (512, 32),
        (1024, 64),
        (2000, 128),
        (2048, 128),
        (4096, 256),
        (8192, 256),
        (8193, 16),
    ],
)
def test_page_size_follows_the_model_length(max_model_len: int, page: int):
    assert default_page_size(max_model_len) == page


@given(st.lists(st.integers(0, 3), max_size=9), st.lists(st.integers(0, 3), max_size=9))
def test_common_prefix_counts_tokens_and_bytes_sort_as_token_lists(a: list[int], b: list[int]):
    naive = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    assert common_prefix(encode_tokens(a), encode_tokens(b)) == naive
    assert (encode_tokens(a) < encode_tokens(b)) == (a < b)


def _fill(pool: PagePool, tokens: list[int]) -> list[int]:
    """-> the pages of a sequence that was computed, registered and let go."""
    request = make_request(tokens, 1)
    pages = pool.allocate(pool.pages_for(len(tokens)))
    assert pages is not None
    request.pages, request.num_computed_tokens = pages, len(tokens)
    pool.register(request)
    pool.release(pages)
    return pages


def test_cached_pages_are_taken_last_and_least_recently_used_first():
    pool = PagePool(num_pages=7, page_size=2)
    old, new = _fill(pool, [1, 2, 3, 4]), _fill(pool, [5, 6])
    pool.share([old[0]])  # used again, so that new[0] is now the older
    pool.release([old[0]])
    taken = pool.allocate(6)
    assert taken is not None
    assert taken[:3] == [4, 5, 6], "pages without a hash come first"
    assert taken[3:] == [old[1], new[0], old[0]], "the deepest page of a prefix goes before its start"


def test_page_zero_is_never_given_out():
    assert PagePool(num_pages=4, page_size=2).allocate(3) == [1, 2, 3]
    assert PagePool(num_pages=4, page_size=2).allocate(4) is None


def test_reset_is_refused_while_pages_are_held():
    pool = PagePool(num_pages=4, page_size=2)
    pages = pool.allocate(1)
    assert pages is not None and not pool.reset()
    pool.release(pages)
    assert pool.reset()


def test_check_notices_a_lost_page():
    pool = PagePool(num_pages=4, page_size=2)
    pool.allocate(1)
    with pytest.raises(AssertionError, match="reference counts"):
        pool.check()
