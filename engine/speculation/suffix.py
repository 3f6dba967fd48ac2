"""Drafts from texts that were generated before: what followed a sequence's last tokens most often, there or in itself.

After SuffixDecoding (Oliaro et al. 2024), with an index of pairs of tokens in place of a suffix tree: Python keeps few
large objects better than many small ones. It works on the host, and so only with all of a sequence's tokens known.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence

from engine.request import Request
from engine.speculative_config import SpeculativeConfig

KEY = 2  # tokens that must agree for a place to be looked at
PLACES = 16  # latest places that are remembered for each of those
END = -1  # between texts


class Corpus:
    """A text that grows, and where each pair of its tokens was followed by another."""

    def __init__(self):
        self.tokens: list[int] = []
        self.places: dict[tuple[int, ...], deque[int]] = {}

    def extend(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            at = len(self.tokens)
            if at >= KEY and token != END:
                self.places.setdefault(tuple(self.tokens[-KEY:]), deque(maxlen=PLACES)).append(at)
            self.tokens.append(token)

    def common(self, at: int, tokens: Sequence[int], most: int) -> int:
        """-> how many tokens before place `at` are the last of `tokens`, up to `most`."""
        most = min(most, at, len(tokens))
        return next((n for n in range(most) if self.tokens[at - 1 - n] != tokens[-1 - n]), most)


class Suffixes:
    """What finished requests have generated, and the running ones' own texts."""

    def __init__(self, config: SpeculativeConfig):
        self._config = config
        self._finished = Corpus()
        self._own: dict[Request, Corpus] = {}

    def propose(self, request: Request, count: int) -> list[int]:
        """-> up to `count` tokens to follow those that are known of the request.

        Of all places with the most tokens before them in common, each votes for what follows it; a draft ends where
        the share of those that agree with all of it falls below `suffix_decoding_min_token_prob`.
        """
        tokens, own = request.token_ids, self._own.setdefault(request, Corpus())
        own.extend(tokens[len(own.tokens) :])
        key, depth = tuple(tokens[-KEY:]), self._config.suffix_decoding_max_tree_depth
        found = [(text, at) for text in (own, self._finished) for at in text.places.get(key, ())]
        shared = [text.common(at, tokens, depth) for text, at in found]
        alive = [place for place, n in zip(found, shared, strict=True) if n == max(shared)]
        drafts, least = list[int](), self._config.suffix_decoding_min_token_prob * len(alive)
        while alive and len(drafts) < count:
            votes = Counter(text.tokens[at] for text, at in alive if at < len(text.tokens) and text.tokens[at] != END)
            if not votes:
                break
            token, agreeing = votes.most_common(1)[0]
            if agreeing < least:
                break
            drafts.append(token)
            alive = [(text, at + 1) for text, at in alive if at < len(text.tokens) and text.tokens[at] == token]
        return drafts

    def end(self, request: Request) -> None:
        """Remember what a request has generated, and forget the oldest of what is too much."""
        self._own.pop(request, None)
        most = self._config.suffix_decoding_max_cached_tokens
        output = request.token_ids[request.num_prompt_tokens :]
        self._finished.extend([*output[:most], END] if most else [])
        if len(self._finished.tokens) > most:
            kept, self._finished = self._finished.tokens[-(most // 2) :] if most > 1 else [], Corpus()
            self._finished.extend(kept)
