"""Detokenizer: the text of one completion while its tokens arrive, up to a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Mapping, Sequence

from engine.request import SamplingParams
from engine.stop_strings import StopStrings
from engine.tokenizer import Tokenizer

# Tokens of the prompt that are decoded together with the output, since decoders treat the start of a text differently.
PROMPT_TOKENS = 8
MAX_CHARACTER_BYTES = 4  # of UTF-8; each may be a token
# What is incomplete after so many tokens is not the beginning of a character.
MAX_PENDING_TOKENS = 2 * MAX_CHARACTER_BYTES
# Tokens that are decoded again with each new one; shortening the window costs as much as two tokens.
MAX_WINDOW_TOKENS = 8

REPLACEMENT = "\ufffd"


class _ByteStream:
    """Text from the bytes of a byte-level vocabulary's tokens."""

    def __init__(self, token_bytes: Mapping[int, bytes], prompt_token_ids: Sequence[int]):
        self._token_bytes = token_bytes
        self._pending = b""
        for token_id in prompt_token_ids[-PROMPT_TOKENS:]:
            self.push(token_id)  # a character that the prompt leaves incomplete is completed by the output

    def push(self, token_id: int) -> str:
        data = self._pending + self._token_bytes[token_id]
        text, used = codecs.utf_8_decode(data, "replace", False)
        self._pending = data[used:]
        return text

    def flush(self) -> str:
        text, self._pending = self._pending.decode(errors="replace"), b""
        return text


class _WindowStream:
    """Text from any tokenizer: what a window over the last tokens decodes to, less what was given out of it before.

    The window starts where a character was complete, and always with a token that has text, since many decoders drop
    the space before the first word.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int], skip_special_tokens: bool):
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._window: list[int] = []
        self._given = ""  # the beginning of the window's text that was given out
        self._complete = 0  # tokens of the window at whose end the text was complete
        self._start([i for i in prompt_token_ids[-2 * PROMPT_TOKENS :] if i not in self._skipped])

    def _start(self, prompt: list[int]) -> None:
        """Take the prompt's last tokens into the window, from the start of a character, given out up to its end."""
        for end in range(len(prompt), max(len(prompt) - MAX_CHARACTER_BYTES, -1), -1):
            for start in range(max(end - PROMPT_TOKENS, 0), max(end - PROMPT_TOKENS - MAX_CHARACTER_BYTES, -1), -1):
                text = self._decode(prompt[start:end])
                if REPLACEMENT not in text:
                    self._window, self._given, self._complete = prompt[start:], text, end - start
                    return
        self._window, self._given, self._complete = prompt, self._decode(prompt), len(prompt)  # it holds no plain text

    def push(self, token_id: int) -> str:
        if token_id in self._skipped:
            return ""
        self._window.append(token_id)
        return self._advance(final=len(self._window) - self._complete > MAX_PENDING_TOKENS)

    def flush(self) -> str:
        return self._advance(final=True)

    def _advance(self, final: bool) -> str:
        """-> what is new in the window's text. Unless it is final, the end may be the beginning of a character."""
        text = self._decode(self._window)
        if not text.startswith(self._given):
            if text.endswith(REPLACEMENT) and not final:
                return ""
            # Some decoders, at a byte that fits nowhere, give up the whole run of bytes before it: that is given out.
            del self._window[: self._complete]
            self._given, self._complete = "", 0
            text = self._decode(self._window)
        end = len(text if final else text.rstrip(REPLACEMENT))
        new = text[len(self._given) : end]
        self._given += new
        if final or (new and end == len(text)):
            if len(self._window) > MAX_WINDOW_TOKENS:
                del self._window[: self._complete]
                self._given = self._decode(self._window)
            self._complete = len(self._window)
        return new

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=False)


class Detokenizer:
    """Text of one completion, token by token. What may still change is held back: a character whose bytes are not
    complete, and what may be the beginning of a stop string.

    Of several stop strings the one that is complete first ends the text, of those that end together the longest. A
    stop string counts if it ends in the text of a token after the first `params.min_tokens`.
    """

    num_kept: int
    """After a stop string was found: the number of appended tokens up to the one that completed it."""

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int], params: SamplingParams):
        self.num_kept = 0
        self._min_tokens = params.min_tokens
        self._stops = StopStrings(params.stop, include=params.include_stop_str_in_output) if params.stop else None
        self._stream = None
        if params.detokenize:
            skip = params.skip_special_tokens
            token_bytes = tokenizer.token_bytes(skip_special_tokens=skip)
            if token_bytes is not None:
                self._stream = _ByteStream(token_bytes, prompt_token_ids)
            else:
                self._stream = _WindowStream(tokenizer, prompt_token_ids, skip)

    def append(self, token_ids: Sequence[int]) -> tuple[str, str | None]:
        """-> (text that can be given out, the stop string that ends the completion).

        After a stop string there is no more text. Without `params.detokenize` there is none at all.
        """
        if self._stream is None:
            return "", None
        if self._stops is None:
            return "".join([self._stream.push(token_id) for token_id in token_ids]), None
        text = ""
        for token_id in token_ids:
            self.num_kept += 1
            new, stop = self._stops.add(self._stream.push(token_id), check=self.num_kept > self._min_tokens)
            text += new
            if stop is not None:
                self._stream = self._stops = None
                return text, stop
        return text, None

    def flush(self) -> str:
        """-> what was held back, for a completion that ends without a stop string. Incomplete bytes become U+FFFD."""
        if self._stream is None:
            return ""
        return (self._stops.held if self._stops is not None else "") + self._stream.flush()
