"""Small tokenizers, one of each kind of decoder, that need no file."""

from __future__ import annotations

from collections.abc import Mapping

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from engine import tokenizer

WORDS = ("Ġhello", "Ġworld", "ello", "ĠðŁĺ", "<tool>")
CHAT_TEMPLATE = """{{ bos_token }}{% for message in messages %}
    {{- '[' + message.role + '] ' + message.content + '\\n' }}
{%- endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"""


def byte_level_backend() -> Tokenizer:
    """-> ids 0..255 are the single bytes in the alphabet's order, then WORDS, then special <s> and </s>, then a plain
    added token. "Ġ" is a space, "ĠðŁĺ" a space and three of the four bytes of an emoji.
    """
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *WORDS]
    merges = [("Ġ", "h"), ("Ġh", "e"), ("Ġhe", "l"), ("Ġhel", "l"), ("Ġhell", "o")]
    tokens += [a + b for a, b in merges[:-1]]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    backend.add_tokens([AddedToken("<a b>", normalized=False)])
    start = backend.token_to_id("<s>")
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", start)])
    return backend


def sentencepiece_backend() -> Tokenizer:
    """-> a vocabulary with ▁ for spaces and byte fallback, whose decoder drops the first space of a text."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdehlorw"]
    merges = [("▁", "h"), ("▁h", "e"), ("▁", "w"), ("▁w", "o")]
    tokens += [a + b for a, b in merges]
    model = models.BPE(
        {t: i for i, t in enumerate(tokens)}, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True
    )
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return backend


def wrap(backend: Tokenizer, chat_template: str | Mapping[str, str] | None = None) -> tokenizer.Tokenizer:
    """-> our Tokenizer around a backend that has <s> and </s>."""
    bos, eos = backend.token_to_id("<s>"), backend.token_to_id("</s>")
    assert bos is not None and eos is not None
    return tokenizer.Tokenizer(
        backend,
        eos_token_ids=(eos,),
        bos_token_id=bos,
        chat_template=chat_template,
        special_tokens={"bos_token": "<s>", "eos_token": "</s>"},
    )
