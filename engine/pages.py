"""The pages of the KV cache: the page-size rule, the pool that hands them out, and the prefix cache over them."""

from __future__ import annotations

import bisect
import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from engine.request import Request

PAGE_SIZES = (8, 16, 32, 64, 128, 256)


def default_page_size(max_model_len: int) -> int:
    """-> tokens in a page: a power of two of the longest model length, clamped to 16..256.

    16 when max_model_len > 8192, else next_power_of_2(max_model_len) // 16 (the rule of vLLM's TPU backend).
    """
    if max_model_len > 8192:
        return 16
    return min(max((1 << (max_model_len - 1).bit_length()) // 16, 16), 256)


def encode_tokens(token_ids: Sequence[int]) -> bytes:
    """-> big-endian 32-bit ids, so that the order of bytes is the order of token lists."""
    words = array("I", token_ids)
    words.byteswap()
    return words.tobytes()


def hash_page(parent: bytes, tokens: bytes) -> bytes:
    """-> the page's link of the chain: sha256 over its parent's hash and its tokens."""
    return hashlib.sha256(parent + tokens).digest()


def root_hash(cache_salt: str) -> bytes:
    """-> the chain's start. Requests with different salts share nothing."""
    return hashlib.sha256(b"quire:" + cache_salt.encode("utf-8", "surrogatepass")).digest()


def common_prefix(a: bytes, b: bytes) -> int:
    """-> how many tokens two encoded lists share at their start."""
    size = min(len(a), len(b)) & ~3
    if a[:size] == b[:size]:
        return size // 4
    low, high = 0, size // 4  # the first `low` tokens agree, the first `high` don't
    while high - low > 1:
        middle = (low + high) // 2
        if a[low * 4 : middle * 4] == b[low * 4 : middle * 4]:
            low = middle
        else:
            high = middle
    return low


@dataclass(slots=True)
class CachedPage:
    """What the prefix cache knows of a full page."""

    hash: bytes
    parent: bytes
    tokens: bytes
    epoch: int  # the plan in which it was registered; its contents exist on the device from the next plan on


@dataclass(slots=True)
class Match:
    """The longest cached prefix: whole pages to share, then `num_copied` tokens of one page to copy."""

    pages: list[int] = field(default_factory=list)
    copy_from: int | None = None
    num_copied: int = 0


class PagePool:
    """Free pages, reference counts, and the index from prefixes to pages.

    Page 0 takes the writes of padding and is never given out. A page that nobody holds stays in the prefix cache until
    it is needed: `free` is in the order of reuse, pages without a hash first, then least recently used first.
    """

    def __init__(self, num_pages: int, page_size: int, enable_prefix_caching: bool = True):
        self.num_pages = num_pages
        self.page_size = page_size
        self.enable_prefix_caching = enable_prefix_caching
        self.epoch = 0
        self.refs = [0] * num_pages
        self.free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, num_pages))
        self.cached: dict[int, CachedPage] = {}
        self.by_hash: dict[bytes, int] = {}
        self.children: dict[bytes, list[tuple[bytes, int]]] = {}  # parent hash -> sorted (tokens, page)

    @property
    def capacity(self) -> int:
        """-> pages that can be given out."""
        return self.num_pages - 1

    @property
    def usage(self) -> float:
        """-> share of the pages that requests hold, 0 to 1."""
        return 1 - len(self.free) / self.capacity

    def pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    # Giving out and taking back

    def allocate(self, count: int) -> list[int] | None:
        """-> `count` pages held once, or None if there are fewer. Takes least recently used cached pages last."""
        if count > len(self.free):
            return None
        pages = []
        for _ in range(count):
            page, _ = self.free.popitem(last=False)
            if page in self.cached:
                self._forget(page)
            self.refs[page] = 1
            pages.append(page)
        return pages

    def share(self, pages: Sequence[int]) -> None:
        """Hold each of these cached pages once more."""
        for page in pages:
            if self.refs[page] == 0:
                del self.free[page]
            self.refs[page] += 1

    def num_idle(self, pages: Sequence[int]) -> int:
        """-> how many of these pages nobody holds: sharing them takes that many from the free ones."""
        return sum(self.refs[page] == 0 for page in pages)

    def release(self, pages: Sequence[int]) -> None:
        """Let go of a sequence's pages. The deepest go first, so that a prefix outlives what follows it."""
        for page in reversed(pages):
            assert self.refs[page] > 0, f"page {page} released twice"
            self.refs[page] -= 1
            if self.refs[page] == 0:
                self.free[page] = None
                if page not in self.cached:
                    self.free.move_to_end(page, last=False)

    # The prefix cache

    def hashes(self, request: Request, num_pages: int) -> list[bytes]:
        """-> the chain over the request's first full pages (its tokens must be known), kept in the request."""
        chain = request.page_hashes
        size = self.page_size
        while len(chain) < num_pages:
            parent = chain[-1] if chain else root_hash(request.group.cache_salt)
            start = len(chain) * size
            chain.append(hash_page(parent, encode_tokens(request.token_ids[start : start + size])))
        return chain

    def match(self, request: Request) -> Match:
        """-> the longest cached prefix of the request's tokens, short of its last one, to the token."""
        match = Match()
        if not self.enable_prefix_caching:
            return match
        limit = len(request.token_ids) - 1
        full = limit // self.page_size
        for digest in self.hashes(request, full):
            page = self.by_hash.get(digest)
            if page is None:
                break
            match.pages.append(page)
        depth = len(match.pages)
        parent = request.page_hashes[depth - 1] if depth else root_hash(request.group.cache_salt)
        siblings = self.children.get(parent)
        if siblings:
            start = depth * self.page_size
            rest = encode_tokens(request.token_ids[start : min(start + self.page_size, limit)])
            at = bisect.bisect_left(siblings, (rest, 0))
            for tokens, page in siblings[max(at - 1, 0) : at + 1]:  # the longest common prefix is next door
                shared = common_prefix(tokens, rest)
                if shared > match.num_copied and self.cached[page].epoch < self.epoch:
                    match.copy_from, match.num_copied = page, shared
        return match

    def register(self, request: Request) -> None:
        """Make the request's full pages findable, as far as its tokens are known and computed or being computed."""
        if not self.enable_prefix_caching:
            return
        full = min(request.num_computed_tokens, len(request.token_ids)) // self.page_size
        if full <= request.num_registered_pages:
            return
        chain = self.hashes(request, full)
        for i in range(request.num_registered_pages, full):
            if chain[i] in self.by_hash:
                continue
            page, parent = request.pages[i], chain[i - 1] if i else root_hash(request.group.cache_salt)
            tokens = encode_tokens(request.token_ids[i * self.page_size : (i + 1) * self.page_size])
            self.cached[page] = CachedPage(chain[i], parent, tokens, self.epoch)
            self.by_hash[chain[i]] = page
            bisect.insort(self.children.setdefault(parent, []), (tokens, page))
        request.num_registered_pages = full

    def forget(self, pages: Sequence[int]) -> None:
        """Drop pages from the prefix cache, whoever holds them: their contents can't be trusted."""
        for page in pages:
            if page in self.cached:
                self._forget(page)

    def reset(self) -> bool:
        """Empty the prefix cache. -> False, with nothing done, while requests hold pages."""
        if len(self.free) != self.capacity:
            return False
        self.forget(list(self.cached))
        return True

    def _forget(self, page: int) -> None:
        entry = self.cached.pop(page)
        del self.by_hash[entry.hash]
        siblings = self.children[entry.parent]
        del siblings[bisect.bisect_left(siblings, (entry.tokens, page))]
        if not siblings:
            del self.children[entry.parent]

    def check(self, holders: Sequence[Request] = ()) -> None:
        """Assert that no page is lost or shared wrongly; `holders` are the requests that hold pages."""
        held = [0] * self.num_pages
        for request in holders:
            assert len(set(request.pages)) == len(request.pages), f"{request.pages} holds a page twice"
            for page in request.pages:
                held[page] += 1
        assert held == self.refs, "reference counts differ from what requests hold"
        assert held[0] == 0, "page 0 was given out"
        free = {page for page in range(1, self.num_pages) if held[page] == 0}
        assert free == set(self.free), "free pages differ from those nobody holds"
        assert {entry.hash: page for page, entry in self.cached.items()} == self.by_hash
        indexed = {page for siblings in self.children.values() for _, page in siblings}
        assert indexed == set(self.cached), "the index of children differs from the cached pages"
