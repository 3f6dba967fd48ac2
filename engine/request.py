"""What a user asks for and what they get back, and the host's state of one request. No JAX in here.

Names and meanings are vLLM's, so that a script written for it reads the same.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

# The limits of one request. Each is enforced with an error that names it.
MAX_N = 128
MAX_LOGPROBS = 20
MAX_STOP = 64
MAX_STOP_LENGTH = 1024
MAX_LOGIT_EDITS = 1024  # logit_bias + allowed_token_ids + the ids that min_tokens holds back
MAX_BAD_WORDS = 64  # token sequences, after tokenization
MAX_BAD_WORD_TOKENS = 8


class NoRoom(Exception):
    """Running requests hold the KV cache's pages; there will be room when some have ended."""


class RequestError(ValueError):
    """A request that cannot be served as asked. `field` names the parameter at fault."""

    def __init__(self, field: str, message: str):
        super().__init__(f"{field}: {message}")
        self.field = field


def _number(name: str, value: Any, low: float, high: float, *, low_open: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise RequestError(name, f"must be a finite number, got {value!r}")
    if not (low < value if low_open else low <= value) or value > high:
        raise RequestError(name, f"must be in {'(' if low_open else '['}{low}, {high}], got {value}")


def _integer(name: str, value: Any, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise RequestError(name, f"must be an integer, got {value!r}")
    if not low <= value <= high:
        raise RequestError(name, f"must be in [{low}, {high}], got {value}")


def _token_ids(name: str, value: Any, most: int) -> tuple[int, ...]:
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        raise RequestError(name, f"must be a list of token ids, got {value!r:.80}")
    if len(value) > most:
        raise RequestError(name, f"at most {most} entries are supported, got {len(value)}")
    for token in value:
        _integer(name, token, 0, 2**31 - 1)
    return tuple(value)


def _strings(name: str, value: Any, most: int) -> tuple[str, ...]:
    if value is None:
        return ()
    if isinstance(value, str):
        value = (value,)
    if not isinstance(value, Sequence):
        raise RequestError(name, f"must be a string or a list of strings, got {value!r:.80}")
    if len(value) > most:
        raise RequestError(name, f"at most {most} strings are supported, got {len(value)}")
    for text in value:
        if not isinstance(text, str) or not text:
            raise RequestError(name, f"must hold non-empty strings, got {text!r:.80}")
        if len(text) > MAX_STOP_LENGTH:
            raise RequestError(name, f"at most {MAX_STOP_LENGTH} characters each, got {len(text)}")
    return tuple(value)


@dataclass(frozen=True)
class SamplingParams:
    """How to sample one request; every field has vLLM's meaning. Errors: RequestError (a ValueError).

    temperature 0 is greedy. top_k 0 or -1 and top_p 1 are off. `logprobs` counts the most likely tokens reported
    beside the sampled one. `seed` None draws one; a seeded request always yields the same tokens.
    """

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] | None = None

    def __post_init__(self):
        put = lambda name, value: object.__setattr__(self, name, value)
        _integer("n", self.n, 1, MAX_N)
        _number("presence_penalty", self.presence_penalty, -2, 2)
        _number("frequency_penalty", self.frequency_penalty, -2, 2)
        _number("repetition_penalty", self.repetition_penalty, 0, 1e6, low_open=True)
        _number("temperature", self.temperature, 0, 1e6)
        _number("top_p", self.top_p, 0, 1, low_open=True)
        _integer("top_k", self.top_k, -1, 2**31 - 1)
        _number("min_p", self.min_p, 0, 1)
        if self.seed is not None:
            _integer("seed", self.seed, -(2**63), 2**64 - 1)
        put("stop", _strings("stop", self.stop, MAX_STOP))
        put("stop_token_ids", _token_ids("stop_token_ids", self.stop_token_ids or (), MAX_LOGIT_EDITS))
        if self.max_tokens is not None:
            _integer("max_tokens", self.max_tokens, 1, 2**31 - 1)
        _integer("min_tokens", self.min_tokens, 0, 2**31 - 1)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError("min_tokens", f"{self.min_tokens} is more than max_tokens {self.max_tokens}")
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _integer(name, getattr(self, name), 0, MAX_LOGPROBS)
        for name in ("ignore_eos", "detokenize", "skip_special_tokens", "include_stop_str_in_output"):
            if not isinstance(getattr(self, name), bool):
                raise RequestError(name, f"must be true or false, got {getattr(self, name)!r}")
        if self.stop and not self.detokenize:
            raise RequestError("stop", "stop strings need detokenize=True")
        if self.logit_bias is not None:
            if not isinstance(self.logit_bias, dict) or len(self.logit_bias) > MAX_LOGIT_EDITS:
                raise RequestError("logit_bias", f"must map at most {MAX_LOGIT_EDITS} token ids to numbers")
            for token, bias in self.logit_bias.items():
                _integer("logit_bias", token, 0, 2**31 - 1)
                _number("logit_bias", bias, -100, 100)
        if self.allowed_token_ids is not None:
            put("allowed_token_ids", _token_ids("allowed_token_ids", self.allowed_token_ids, MAX_LOGIT_EDITS))
            if not self.allowed_token_ids:
                raise RequestError("allowed_token_ids", "must name at least one token")
        put("bad_words", _strings("bad_words", self.bad_words, MAX_BAD_WORDS))

    def replace(self, **changes: Any) -> SamplingParams:
        """-> a copy with some fields changed, validated anew."""
        return dataclasses.replace(self, **changes)


@dataclass(slots=True)
class Logprob:
    """One candidate at one position: log-probability (natural, before temperature and penalties), rank from 1."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


Logprobs = dict[int, Logprob]  # by token id; the chosen token first, then the most likely in order


@dataclass(slots=True)
class CompletionOutput:
    """One of the n completions of a request, as far as it has come."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[Logprobs] | None = None
    finish_reason: str | None = None  # "stop", "length", "abort" or "error"
    stop_reason: int | str | None = None  # the stop string or stop token id that ended it; None for eos

    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestMetrics:
    """Times in seconds since the epoch, None until reached; and what speculation drafted."""

    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    finished_time: float | None = None
    num_draft_tokens: int = 0  # that were verified, over all completions
    num_accepted_tokens: int = 0


@dataclass(slots=True)
class RequestOutput:
    """What `LLM.generate` returns for one prompt."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[Logprobs | None] | None
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics
    num_cached_tokens: int


@dataclass(slots=True)
class EmbeddingOutput:
    embedding: list[float]


@dataclass(slots=True)
class EmbeddingRequestOutput:
    """The vector of one prompt."""

    request_id: str
    outputs: EmbeddingOutput
    prompt_token_ids: list[int]
    finished: bool = True


@dataclass(slots=True, eq=False)
class Group:
    """One request as it was asked for: a prompt and the n completions that grow from it.

    The engine's part is in its `requests`, one for each completion; users' part in `completions`.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    metrics: RequestMetrics
    priority: int = 0
    cache_salt: str = ""
    requests: list[Request] = field(default_factory=list)
    completions: list[CompletionOutput] = field(default_factory=list)
    prompt_logprobs: list[Logprobs | None] | None = None
    num_cached_tokens: int = 0
    error: str | None = None  # why the engine failed it, when a finish_reason is "error"

    def finished(self) -> bool:
        return all(c.finish_reason is not None for c in self.completions)

    def output(self) -> RequestOutput:
        """-> the request's cumulative output so far; the lists are shared, not copied."""
        return RequestOutput(
            self.request_id, self.prompt, self.prompt_token_ids, self.prompt_logprobs, self.completions,
            self.finished(), self.metrics, self.num_cached_tokens,
        )  # fmt: skip


@dataclass(slots=True)
class Update:
    """What one step added to one completion. Lists hold only what is new; `group` has the whole."""

    group: Group
    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[Logprobs] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass(slots=True, eq=False)
class Request:
    """Host state of one sequence: its tokens, how many of them are in the KV cache, its pages and its slot.

    `num_computed_tokens` counts what launched steps have computed or will have; `num_tokens` counts every token that
    exists, also those sampled by a step whose result the host has not read yet (`num_in_flight` of them). Both count
    no draft: of `num_drafts_in_flight` more tokens the host learns only with a step's result how many there are.
    """

    group: Group
    index: int
    params: SamplingParams
    token_ids: list[int]  # prompt and every output token known to the host
    num_prompt_tokens: int
    max_tokens: int  # params.max_tokens, bounded by the model's length
    seed: int  # 64 bits: params.seed (for completion i of n, folded with i), or drawn
    eos_token_ids: tuple[int, ...] = ()  # the model's, unless it ignores them
    stop_token_ids: frozenset[int] = frozenset()  # every id that ends it: eos_token_ids and params.stop_token_ids
    bad_words: tuple[tuple[int, ...], ...] = ()  # token sequences
    arrival: int = 0  # order of arrival; breaks ties
    num_computed_tokens: int = 0
    num_in_flight: int = 0
    num_drafts_in_flight: int = 0
    pages: list[int] = field(default_factory=list)
    page_hashes: list[bytes] = field(default_factory=list)
    num_registered_pages: int = 0
    slot: int | None = None
    finish_reason: str | None = None
    num_preemptions: int = 0

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids) + self.num_in_flight

    @property
    def num_output_tokens(self) -> int:
        return self.num_tokens - self.num_prompt_tokens

    @property
    def most_computed_tokens(self) -> int:
        """Tokens that are ever computed: all but the last that may be sampled."""
        return self.num_prompt_tokens + self.max_tokens - 1

    @property
    def priority(self) -> tuple[int, int]:
        """Lower runs first."""
        return self.group.priority, self.arrival
