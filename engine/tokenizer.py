"""Tokenizer: text to token ids and back, and a chat to its prompt, over a `tokenizers.Tokenizer`."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers
from tokenizers import decoders

from engine.chat_messages import check_messages, check_tools
from engine.request import RequestError


def _byte_of_character() -> dict[str, int]:
    """-> the byte that each character stands for in a byte-level vocabulary.

    GPT-2 writes a printable Latin-1 byte as the character of that code and the others, in order, from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_of_character()


class _TokenBytes(dict[int, bytes]):
    """The bytes of each token of a byte-level vocabulary, found when first asked for; b"" for ids without a token."""

    def __init__(self, backend: tokenizers.Tokenizer, silent: frozenset[int]):
        super().__init__(dict.fromkeys(silent, b""))
        self._backend = backend

    def __missing__(self, token_id: int) -> bytes:
        token = self._backend.id_to_token(token_id) or ""
        try:
            data = bytes([_BYTE_OF_CHARACTER[character] for character in token])
        except KeyError:  # an added token, in plain text
            data = token.encode()
        self[token_id] = data
        return data


class Tokenizer:
    """A model's tokenizer with its special ids and chat template. All methods may be called from several threads.

    `chat_template`: Jinja, or several by name, of which "default" is used, or "tool_use" for a chat with tools.
    `special_tokens` are the texts that chat templates know by name: {"bos_token": "<s>", "eos_token": "</s>", ...}.
    Truncation and padding that the backend's file asks for are turned off: a prompt is never cut silently.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        eos_token_ids: tuple[int, ...],
        bos_token_id: int | None,
        chat_template: str | Mapping[str, str] | None,
        special_tokens: dict[str, str],
    ):
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.eos_token_ids = eos_token_ids
        self.bos_token_id = bos_token_id
        named = {"default": chat_template} if isinstance(chat_template, str) else chat_template or {}
        self.chat_templates = dict(named)
        self.special_tokens = special_tokens
        self.special_ids = frozenset(i for i, token in backend.get_added_tokens_decoder().items() if token.special)
        self._anchor = backend.encode("a", add_special_tokens=False).ids[-1:]
        self._anchor_text = backend.decode(self._anchor)
        self._texts: dict[int, str] = {}
        self._bytes: dict[bool, _TokenBytes] = {
            False: _TokenBytes(backend, frozenset()),
            True: _TokenBytes(backend, self.special_ids),
        }

    @functools.cached_property
    def vocab_size(self) -> int:
        """Every token's id is less than this. Some ids below it may have no token."""
        return max(self.backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """-> token ids. add_special_tokens adds what the model's post-processor adds, such as a leading bos.

        Errors: RequestError("prompt") for lone surrogates, which no tokenizer can represent.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            bad = f"U+{ord(text[error.start]):04X} at character {error.start}"
            raise RequestError("prompt", f"must be valid Unicode, got a lone surrogate {bad}; remove it") from None
        # Unlike `encode`, this one lets other threads run meanwhile, and computes no offsets.
        (encoding,) = self.backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return encoding.ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """-> text. Ids without a token count as empty; bytes that are not UTF-8 become U+FFFD."""
        return self.backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def token_text(self, token_id: int) -> str:
        """-> the text of one token as it reads inside a text, special tokens too; "" for an id without a token."""
        text = self._texts.get(token_id)
        if text is None:
            # Decoders of the SentencePiece kind drop the space before a text's first word: let another token be first.
            text = self.backend.decode([*self._anchor, token_id], skip_special_tokens=False)
            if text.startswith(self._anchor_text):
                text = text[len(self._anchor_text) :]
            else:
                text = self.backend.decode([token_id], skip_special_tokens=False)
            self._texts[token_id] = text
        return text

    def token_bytes(self, *, skip_special_tokens: bool) -> Mapping[int, bytes] | None:
        """-> the bytes of every token id, whose concatenation is a text's UTF-8; None unless the vocabulary is
        byte-level. With skip_special_tokens, special tokens are empty.
        """
        return self._bytes[skip_special_tokens] if isinstance(self.backend.decoder, decoders.ByteLevel) else None

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        **kwargs: Any,
    ) -> str:
        """-> the prompt of a chat; encode it with add_special_tokens=False, since templates write their own bos.

        messages: [{"role": ..., "content": text or [{"type": "text", "text": ...}, ...], ...}, ...]; the texts of a
        list are joined by newlines, as in vLLM. `chat_template` is used instead of the model's: Jinja, or the name of
        one of `chat_templates`. `kwargs` are further variables for it, such as `documents`.
        Errors: RequestError naming "messages", "tools" or "chat_template".
        """
        from engine import chat_template as chat  # brings jinja2, which start-up need not wait for

        template = self._choose_template(chat_template, with_tools=bool(tools))
        variables = {
            **self.special_tokens,
            "documents": None,
            **kwargs,
            "messages": check_messages(messages),
            "tools": check_tools(tools),
            "add_generation_prompt": add_generation_prompt,
        }
        return chat.render(self._compiled(template), variables)

    @property
    def chat_template(self) -> str | None:
        """The model's own template for chats without tools; None if it has none."""
        return self.chat_templates.get("default")

    def use_chat_template(self, wanted: str) -> None:
        """Let every chat use one template: a file, Jinja itself, or one of the model's by name. Errors: ValueError."""
        from engine import chat_template as chat

        self.chat_templates = {"default": self.chat_templates.get(wanted) or chat.template_from_setting(wanted)}

    def _choose_template(self, wanted: str | None, *, with_tools: bool) -> str:
        templates = self.chat_templates
        if wanted is not None:
            return templates.get(wanted, wanted) if isinstance(wanted, str) else wanted
        name = "tool_use" if with_tools and "tool_use" in templates else "default"
        if name not in templates:
            names = f"none named 'default', but {', '.join(map(repr, templates))}" if templates else "none"
            raise RequestError("chat_template", f"the model has {names}; pass chat_template")
        return templates[name]

    @functools.cached_property
    def _compiled(self):
        from engine import chat_template as chat

        return functools.lru_cache(maxsize=16)(chat.compile_template)
