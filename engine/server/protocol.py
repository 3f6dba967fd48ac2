"""What clients send: strict request types, and their way to SamplingParams.

A field that is accepted has its effect, or is said here to be neutral. Any other is refused by name.
"""

from __future__ import annotations

import functools
import re
from typing import Any, Literal, TypeVar

import msgspec

from engine.chat_messages import parse_arguments
from engine.request import MAX_LOGPROBS, RequestError, SamplingParams

MAX_COMPLETIONS = 1024  # n times prompts of one HTTP request
MAX_EMBEDDINGS = 2048  # texts of one HTTP request
MAX_MESSAGES = 4096  # of a chat, its tools, its documents: templates may loop over them in loops
MAX_DEPTH = 64  # of nested JSON

T = TypeVar("T")

# Fields of the OpenAI and vLLM interfaces that aren't supported. Those values mean what leaving the field out means,
# as null does, and are let through.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "chat_template": (),  # a template is code: the operator's is used
    "continue_final_message": (False,),
    "dimensions": (),
    "early_stopping": (False,),
    "echo": (False,),
    "function_call": ("none",),
    "functions": ([],),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "kv_transfer_params": (),
    "length_penalty": (1,),
    "logits_processors": ([],),
    "max_completion_tokens": (),
    "messages": (),
    "mm_processor_kwargs": ({},),
    "modalities": (["text"],),
    "parallel_tool_calls": (True,),
    "prediction": (),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "spaces_between_special_tokens": (True,),
    "structural_tag": (),
    "structured_outputs": (),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "verbosity": (),
    "web_search_options": (),
}


class _Strict(msgspec.Struct, forbid_unknown_fields=True):
    """An object in a request's body."""


class StreamOptions(_Strict):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class _Generation(_Strict, kw_only=True):
    """What both kinds of completion take. Null is the same as leaving a field out."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    logit_bias: dict[int, float] | None = None  # JSON has strings for keys
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    add_special_tokens: bool | None = None
    priority: int | None = None
    cache_salt: str | None = None
    # Neutral: they are the client's own book-keeping.
    user: str | None = None
    store: bool | None = None
    metadata: dict[str, str] | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    def __post_init__(self):
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options", "is for stream=true")
        if self.prompt_logprobs is not None and self.stream:
            raise RequestError("prompt_logprobs", "is not available with stream=true")
        if self.cache_salt == "":
            raise RequestError("cache_salt", "must not be empty")
        if self.priority is not None and not -(2**31) <= self.priority < 2**31:
            raise RequestError("priority", f"must fit into 32 bits, got {self.priority}")

    def _sampling(self) -> dict[str, Any]:
        return {name: value for name in _SAMPLING if (value := getattr(self, name)) is not None}


_SAMPLING = tuple(f for f in _Generation.__struct_fields__ if f in SamplingParams.__dataclass_fields__)


class CompletionRequest(_Generation, kw_only=True):
    """POST /v1/completions."""

    prompt: str | list[Any]
    echo: bool | None = None
    logprobs: int | None = None

    def prompts(self) -> list[str | list[int]]:
        """-> one entry for each prompt. Errors: RequestError."""
        prompts = _prompts("prompt", self.prompt)
        if len(prompts) * (self.n or 1) > MAX_COMPLETIONS:
            raise RequestError(
                "prompt", f"{len(prompts)} prompts with n={self.n or 1}: at most {MAX_COMPLETIONS} completions together"
            )
        return prompts

    @property
    def only_echo(self) -> bool:
        """max_tokens 0: nothing is wanted but the prompt, say for its logprobs."""
        return self.max_tokens == 0

    def sampling_params(self) -> SamplingParams:
        """-> what the engine is asked for: with echo, logprobs are those of the prompt too. Errors: RequestError."""
        options = self._sampling()
        if self.only_echo:
            if not self.echo:
                raise RequestError("max_tokens", "0 needs echo=true")
            options["max_tokens"] = 1  # the engine always generates; the token is dropped
        if self.logprobs is not None:
            options["logprobs"] = self.logprobs
            if self.echo:
                options["prompt_logprobs"] = max(self.logprobs, self.prompt_logprobs or 0)
        return SamplingParams(**options)


class EmbeddingRequest(_Strict, kw_only=True):
    """POST /v1/embeddings."""

    input: str | list[Any]
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    pooling: Literal["last", "mean", "cls"] | None = None
    normalize: bool | None = None
    add_special_tokens: bool | None = None
    user: str | None = None  # neutral

    def inputs(self) -> list[str | list[int]]:
        """-> one entry for each text. Errors: RequestError."""
        inputs = _prompts("input", self.input)
        if len(inputs) > MAX_EMBEDDINGS:
            raise RequestError("input", f"at most {MAX_EMBEDDINGS} texts together, got {len(inputs)}")
        return inputs


def _prompts(field: str, value: str | list[Any]) -> list[str | list[int]]:
    """-> one entry for each prompt of text, token ids, or a list of either. Errors: RequestError."""
    if isinstance(value, str):
        return [value]
    kinds = set(map(type, value))
    if kinds == {int}:
        return [value]
    if not value:
        raise RequestError(field, "must not be empty")
    if kinds != {str} and kinds != {list}:
        raise RequestError(field, "must be text, token ids, a list of texts or a list of lists of token ids")
    for ids in value:
        if kinds == {list} and set(map(type, ids)) != {int}:
            raise RequestError(field, "each inner list must hold token ids, at least one")
    return value


class TextPart(_Strict):
    type: Literal["text"]
    text: str


class Message(_Strict):
    """One message of a chat. The fields that must be null come back from clients that send our answers again."""

    role: str
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    refusal: None = None
    annotations: list[None] | None = None
    audio: None = None
    function_call: None = None

    def for_template(self) -> dict[str, Any]:
        """-> the form that chat templates know: text as one string, a tool call's arguments as an object."""
        message: dict[str, Any] = {"role": self.role, "content": self._text()}
        for name in ("name", "tool_call_id", "reasoning_content", "reasoning"):
            if (value := getattr(self, name)) is not None:
                message[name] = value
        if self.tool_calls:
            message["tool_calls"] = [_with_arguments(call) for call in self.tool_calls]
        return message

    def _text(self) -> str:
        if isinstance(self.content, list):
            return "\n".join(part.text for part in self.content)
        return self.content or ""


def _with_arguments(call: dict[str, Any]) -> dict[str, Any]:
    check_depth("messages", call)
    parsed = parse_arguments(call)
    check_depth("messages", parsed)
    return parsed


class Tool(_Strict):
    type: Literal["function"]
    function: dict[str, Any]


class ChatRequest(_Generation, kw_only=True):
    """POST /v1/chat/completions."""

    messages: list[Message]
    tools: list[Tool] | None = None
    documents: list[dict[str, Any]] | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tool_choice: str | dict[str, Any] | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None

    def sampling_params(self) -> SamplingParams:
        """-> what the engine is asked for; without a limit it may fill the model's length. Errors: RequestError."""
        options = {"max_tokens": None, **self._sampling()}
        if self.max_completion_tokens is not None:
            if self.max_tokens not in (None, self.max_completion_tokens):
                raise RequestError("max_completion_tokens", f"{self.max_completion_tokens} contradicts max_tokens")
            if self.max_completion_tokens < 1:
                raise RequestError("max_completion_tokens", f"must be at least 1, got {self.max_completion_tokens}")
            options["max_tokens"] = self.max_completion_tokens
        if self.top_logprobs and not self.logprobs:
            raise RequestError("top_logprobs", "needs logprobs=true")
        if not 0 <= (self.top_logprobs or 0) <= MAX_LOGPROBS:
            raise RequestError("top_logprobs", f"must be in [0, {MAX_LOGPROBS}], got {self.top_logprobs}")
        if self.logprobs:
            options["logprobs"] = self.top_logprobs or 0
        return SamplingParams(**options)


class TokenizeChatRequest(_Strict, kw_only=True):
    """POST /tokenize of a chat."""

    messages: list[Message]
    tools: list[Tool] | None = None
    documents: list[dict[str, Any]] | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tool_choice: str | None = None
    model: str | None = None
    add_special_tokens: bool = False
    return_token_strs: bool | None = None


_NOT_FOR_TEMPLATES = frozenset(
    ("self", "messages", "tools", "add_generation_prompt", "chat_template", "continue_final_message", "tokenize")
)


def template_arguments(request: ChatRequest | TokenizeChatRequest) -> dict[str, Any]:
    """-> arguments of Tokenizer.apply_chat_template. Errors: RequestError."""
    if not request.messages:
        raise RequestError("messages", "must not be empty")
    documents = request.documents or ()
    for name, entries in (("messages", request.messages), ("tools", request.tools or ()), ("documents", documents)):
        if len(entries) > MAX_MESSAGES:
            raise RequestError(name, f"at most {MAX_MESSAGES} are supported, got {len(entries)}")
    if request.tool_choice not in (None, "none", "auto"):
        raise RequestError("tool_choice", "only none and auto are supported")
    kwargs = request.chat_template_kwargs or {}
    taken = sorted(name for name in kwargs if name in _NOT_FOR_TEMPLATES or (name == "documents" and documents))
    if taken:
        raise RequestError("chat_template_kwargs", f"must not contain {', '.join(taken)}")
    check_depth("chat_template_kwargs", kwargs)
    tools = [] if request.tool_choice == "none" else [msgspec.to_builtins(tool) for tool in request.tools or ()]
    check_depth("tools", tools)
    check_depth("documents", list(documents))
    return {
        "messages": [message.for_template() for message in request.messages],
        "add_generation_prompt": request.add_generation_prompt is not False,
        "tools": tools or None,
        **({"documents": documents} if documents else {}),
        **kwargs,
    }


class TokenizeRequest(_Strict):
    """POST /tokenize of a text."""

    prompt: str
    model: str | None = None
    add_special_tokens: bool = True
    return_token_strs: bool | None = None


class DetokenizeRequest(_Strict):
    """POST /detokenize."""

    tokens: list[int]
    model: str | None = None


@functools.cache
def _decoder(kind: Any) -> msgspec.json.Decoder[Any]:
    return msgspec.json.Decoder(kind)


def decode(kind: type[T], body: bytes) -> T:
    """-> the body as `kind`. Errors: RequestError that names the field, or "body" where it isn't JSON at all."""
    try:
        try:
            return _decoder(kind).decode(body)
        except msgspec.ValidationError as error:
            if not str(error).startswith("Object contains unknown field") or " - at `$" in str(error):
                raise
            return _decoder(kind).decode(_without_neutral(kind, body))
    except msgspec.ValidationError as error:
        if isinstance(error.__cause__, RequestError):  # from a __post_init__
            raise error.__cause__ from None
        raise _named(error) from None
    except RecursionError:
        raise RequestError("body", f"is nested more than {MAX_DEPTH} levels deep") from None
    except (msgspec.MsgspecError, UnicodeError) as error:
        raise RequestError("body", f"is not JSON: {error}") from None


def _without_neutral(kind: type, body: bytes) -> bytes:
    """-> the body without the unsupported fields that ask for nothing. Errors: RequestError for one that does."""
    fields = _decoder(dict[str, msgspec.Raw]).decode(body)
    for name in [name for name in fields if name not in kind.__struct_fields__]:
        if name not in UNSUPPORTED:
            raise RequestError(name[:200], "unknown field")
        raw = fields.pop(name)
        if len(raw) > 100 or msgspec.json.decode(raw) not in (None, *UNSUPPORTED[name]):
            raise RequestError(name, "is not supported here; leave it out")
    return msgspec.json.encode(fields)


_PLACE = re.compile(r"(?: - at `(?:key` in `|value` in `)?\$\.?(\w*).*)$", re.DOTALL)
_QUOTED = re.compile(r"field `(\w{1,200})`")


def _named(error: msgspec.ValidationError) -> RequestError:
    """-> the same in our words, under the field's name, which msgspec puts at the end: "... - at `$.stop[0]`"."""
    text = str(error)
    place = _PLACE.search(text)
    quoted = _QUOTED.search(text)
    field = (place and place[1]) or (quoted and quoted[1]) or "body"
    return RequestError(field, text[:500])


def check_depth(name: str, value: Any) -> None:
    """Refuse JSON nested more than MAX_DEPTH levels: templates and encoders recurse. Errors: RequestError."""
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for outer in level
            if isinstance(outer, (dict, list))
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return
    raise RequestError(name, f"is nested more than {MAX_DEPTH} levels deep")
