"""EngineCore: requests in, updates out. Drives scheduler and runner so that the device always has a step to do."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine.config import EngineConfig, ResolvedConfig
from engine.detokenizer import Detokenizer
from engine.hosts.leader import Leader
from engine.models.config import ModelConfig
from engine.pages import PagePool
from engine.pooling import Pooler
from engine.profiler import Profiler
from engine.request import (
    MAX_BAD_WORD_TOKENS,
    MAX_BAD_WORDS,
    CompletionOutput,
    Group,
    Logprob,
    Logprobs,
    Request,
    RequestError,
    RequestMetrics,
    SamplingParams,
    Update,
)
from engine.runner import Launched, Runner, first_tokens
from engine.scheduler import Row, Scheduler
from engine.slots import check_request
from engine.speculation.policy import Policy
from engine.speculation.speculator import SpeculationStats, Speculator
from engine.tokenizer import Tokenizer

Prompt = str | Sequence[int] | Mapping[str, Any]


@dataclass(frozen=True)
class Stats:
    """The engine's gauges and counters. kv_cache_usage is a share, 0 to 1; prefix cache figures are in tokens."""

    num_running: int
    num_waiting: int
    kv_cache_usage: float
    prefix_cache_queries: int
    prefix_cache_hits: int
    num_preemptions: int
    prompt_tokens: int
    generation_tokens: int
    last_iteration_tokens: int
    speculation: SpeculationStats | None = None  # where the engine speculates
    replicas: tuple[Stats, ...] = ()  # of each, where there are several


class EngineCore:
    """The engine without a surface. `prepare` may be called from any thread; everything else from one.

    `tokenizer` may be None: then prompts are token ids, and no text comes back.
    """

    def __init__(
        self,
        config: EngineConfig,
        resolved: ResolvedConfig,
        model_config: ModelConfig,
        tokenizer: Tokenizer | None,
        runner: Runner,
    ):
        self.config, self.resolved, self.model_config = config, resolved, model_config
        self.tokenizer, self.runner = tokenizer, runner
        self.scheduler = Scheduler(
            PagePool(runner.num_pages, resolved.page_size, config.enable_prefix_caching),
            max_num_seqs=resolved.max_num_seqs,
            max_num_batched_tokens=resolved.max_num_batched_tokens,
            max_model_len=resolved.max_model_len,
            policy=config.scheduling_policy,
        )
        self._speculator = None
        if runner.drafter is not None:
            spec = runner.drafter.config
            policy = Policy(runner.shapes, runner.step_seconds, spec.num_speculative_tokens, spec.adaptive)
            self._speculator = Speculator(spec, policy)
        self._pooler = Pooler(runner, self.scheduler.pool, resolved)
        self._random = random.Random(config.seed)
        self._groups: dict[str, Group] = {}
        self._detokenizers: dict[Request, Detokenizer] = {}
        self._in_flight: Launched | None = None
        self._profiler = Profiler(config.profile_dir)
        self._prompt_tokens = self._generation_tokens = self._last_iteration_tokens = 0

    # Requests

    def prepare(
        self, request_id: str, prompt: Prompt, params: SamplingParams, *, priority: int = 0, cache_salt: str = ""
    ) -> Group:
        """-> the request, tokenized and checked. Errors: RequestError that names the field."""
        if isinstance(prompt, Mapping):
            cache_salt = prompt.get("cache_salt", cache_salt)
        if not isinstance(cache_salt, str):
            raise RequestError("cache_salt", f"must be text, got {cache_salt!r:.80}")
        if type(priority) is not int:
            raise RequestError("priority", f"must be an integer, got {priority!r:.80}")
        text, token_ids = self._read_prompt(prompt)
        limit = self.resolved.max_model_len
        if len(token_ids) >= limit:
            raise RequestError(
                "prompt", f"{len(token_ids)} tokens leave no room to answer: max_model_len is {limit} tokens"
            )
        if params.stop:
            self._need_tokenizer("stop")
        group = Group(request_id, text, token_ids, params, RequestMetrics(time.time()), priority, cache_salt)
        seed = self._random.getrandbits(64) if params.seed is None else params.seed
        eos = self.tokenizer.eos_token_ids if self.tokenizer and not params.ignore_eos else ()
        bad_words = self._bad_words(params)
        for index in range(params.n):
            request = Request(
                group, index, params, list(token_ids), len(token_ids),
                max_tokens=min(params.max_tokens or limit, limit - len(token_ids)),
                seed=(seed + index) % 2**64, eos_token_ids=eos,
                stop_token_ids=frozenset(eos) | frozenset(params.stop_token_ids or ()), bad_words=bad_words,
            )  # fmt: skip
            group.requests.append(request)
            group.completions.append(CompletionOutput(index, logprobs=None if params.logprobs is None else []))
        if params.logprobs is not None:
            for completion in group.completions:
                completion.cumulative_logprob = 0.0
        if params.prompt_logprobs is not None:
            group.prompt_logprobs = [None]
        check_request(group.requests[0], self.model_config.vocab_size)
        return group

    def add(self, group: Group) -> None:
        """Queue a prepared request. Errors: RequestError if it can never run, or its id is in use."""
        if group.request_id in self._groups:
            raise RequestError("request_id", f"{group.request_id!r} is in use")
        for request in group.requests:
            self.scheduler.add(request)
            if self.tokenizer is not None and group.params.detokenize:
                self._detokenizers[request] = Detokenizer(self.tokenizer, group.prompt_token_ids, group.params)
        self._groups[group.request_id] = group
        self._prompt_tokens += len(group.prompt_token_ids)

    def read_embedding_prompt(self, prompt: Prompt) -> list[int]:
        """-> the tokens of a prompt to embed, checked; for any thread. Errors: RequestError."""
        _, token_ids = self._read_prompt(prompt)
        if len(token_ids) > self.resolved.max_model_len:
            raise RequestError(
                "prompt", f"{len(token_ids)} tokens are more than max_model_len, {self.resolved.max_model_len} tokens"
            )
        return token_ids

    def embed(self, prompts: Sequence[Sequence[int]], pooling: str, normalize: bool) -> np.ndarray:
        """-> one vector for each prompt [prompts, hidden] float32, at once. Errors: as pooling.Pooler.embed."""
        self._prompt_tokens += sum(map(len, prompts))
        return self._pooler.embed(prompts, pooling, normalize)

    def abort(self, request_id: str) -> None:
        """End a request at once and free its pages; unknown ids are ignored."""
        group = self._groups.pop(request_id, None)
        if group is None:
            return
        for request, completion in zip(group.requests, group.completions, strict=True):
            self.scheduler.finish(request, "abort")
            self._forget(request)
            completion.finish_reason = completion.finish_reason or "abort"
        group.metrics.finished_time = time.time()

    def has_unfinished(self) -> bool:
        return self.scheduler.has_unfinished()

    # Steps

    def failure(self) -> Exception | None:
        """-> why the engine can do nothing more, though its thread may still be waiting for its devices."""
        return self.runner.peers.failure if isinstance(self.runner.peers, Leader) else None

    def is_ready(self) -> bool:
        """-> whether `step` would not wait for the device."""
        return self._in_flight is None or self.runner.is_done(self._in_flight)

    def step(self) -> list[Update]:
        """Launch the next step, then read the one before. -> what that one added."""
        updates = []
        if self._in_flight and self._speculator and self._speculator.must_know(self.scheduler.running):
            updates, self._in_flight = self._commit(self._in_flight), None
        plan = self.scheduler.plan()
        if self._speculator is not None:
            self._speculator.extend(plan, self.scheduler)
        launched = None
        if plan.rows:
            now = time.time()
            for request in plan.admitted:
                request.group.metrics.first_scheduled_time = request.group.metrics.first_scheduled_time or now
            launched = self.runner.launch(plan)
        self._last_iteration_tokens = plan.num_tokens
        previous, self._in_flight = self._in_flight, launched
        return updates + self._commit(previous) if previous else updates

    def _commit(self, launched: Launched) -> list[Update]:
        sampled = self.runner.collect(launched)
        plan = launched.plan
        if launched.output.prompt is not None and any(
            row.request.params.prompt_logprobs is not None for row in plan.rows
        ):
            self._take_prompt_logprobs(launched)
        index_of, candidates = dict[int, int](), None
        if _wants_logprobs(plan.rows):
            index_of = {id(row): first for row, first in zip(plan.rows, first_tokens(plan), strict=True)}
            candidates = _Candidates(launched.output.sampled)
        now = time.time()
        updates = []
        for row, tokens in self.scheduler.commit(plan, sampled):
            logprobs, count = None, row.request.params.logprobs
            if candidates is not None and count is not None:
                first = index_of[id(row)]
                logprobs = [self._logprobs(candidates, first + i, token, count) for i, token in enumerate(tokens)]
            updates.append(self._update(row.request, tokens, logprobs, now))
        if self._speculator is not None and launched.output.runs is not None:
            drafted = np.asarray(launched.output.runs.drafted).tolist()
            for row, tokens, count in zip(plan.rows, sampled, drafted, strict=False):
                self._speculator.observe(row, len(tokens) - 1, count)
        return updates

    def _update(
        self, request: Request, tokens: Sequence[int], logprobs: Sequence[Logprobs] | None, now: float
    ) -> Update:
        """Append tokens to their completion, up to a stop string. -> what changed."""
        group, params = request.group, request.params
        completion = group.completions[request.index]
        update = Update(group, request.index, finish_reason=request.finish_reason)
        if request.finish_reason == "error":
            group.error = "the model's logits were not finite"
        else:
            if group.metrics.first_token_time is None:
                group.metrics.first_token_time = now
            if request.finish_reason == "stop" and tokens[-1] not in request.eos_token_ids:
                update.stop_reason = tokens[-1]
            detokenizer = self._detokenizers.get(request)
            if detokenizer is not None:
                hidden = request.finish_reason == "stop" and not params.include_stop_str_in_output
                before = detokenizer.num_kept
                update.text, stop = detokenizer.append(tokens[:-1] if hidden else tokens)
                if stop is not None:
                    tokens = tokens[: detokenizer.num_kept - before]
                    self.scheduler.finish(request, "stop")
                    request.finish_reason = update.finish_reason = "stop"
                    update.stop_reason = stop
                elif request.finish_reason is not None:
                    update.text += detokenizer.flush()
                completion.text += update.text
            self._generation_tokens += len(tokens)
            update.token_ids += tokens
            completion.token_ids += tokens
            if logprobs is not None:
                update.logprobs = list(logprobs[: len(tokens)])
                completion.logprobs += update.logprobs  # type: ignore[operator]
                for token, entry in zip(tokens, update.logprobs, strict=True):
                    completion.cumulative_logprob += entry[token].logprob  # type: ignore[operator]
        if update.finish_reason is not None:
            completion.finish_reason, completion.stop_reason = update.finish_reason, update.stop_reason
            self._forget(request)
            if group.finished():
                group.metrics.finished_time = now
                self._groups.pop(group.request_id, None)
        return update

    # Log-probabilities

    def _logprobs(self, source: _Candidates, row: int, token: int, count: int) -> Logprobs:
        """-> the token's own entry, then the `count` most likely."""
        entry = {token: self._logprob(token, source.logprob[row], source.rank[row])}
        for rank in range(count):
            candidate = source.top_ids[row, rank].item()
            entry.setdefault(candidate, self._logprob(candidate, source.top_logprobs[row, rank], rank + 1))
        return entry

    def _logprob(self, token: int, logprob: Any, rank: Any) -> Logprob:
        return Logprob(float(logprob), int(rank), self.tokenizer.token_text(token) if self.tokenizer else None)

    def _take_prompt_logprobs(self, launched: Launched) -> None:
        source = _Candidates(launched.output.prompt)
        at = 0
        for row in launched.plan.rows:
            group, count = row.request.group, row.request.params.prompt_logprobs
            if count is not None and group.prompt_logprobs is not None:
                end = min(row.start + row.count, row.request.num_prompt_tokens - 1)
                for position in range(row.start, end):
                    token = group.prompt_token_ids[position + 1]
                    if len(group.prompt_logprobs) == position + 1:  # else known: from a sibling, or before preemption
                        group.prompt_logprobs.append(self._logprobs(source, at + position - row.start, token, count))
            at += row.count

    # Details

    def stats(self) -> Stats:
        s = self.scheduler
        return Stats(
            len(s.running), s.num_waiting, s.pool.usage, s.prefix_cache_queries, s.prefix_cache_hits,
            s.num_preemptions, self._prompt_tokens, self._generation_tokens, self._last_iteration_tokens,
            self._speculator and self._speculator.snapshot(),
        )  # fmt: skip

    def reset_prefix_cache(self) -> bool:
        """Forget all prefixes. -> False, with nothing done, while requests hold pages."""
        return self.scheduler.pool.reset()

    def start_profile(self) -> None:
        """Begin a profiler trace in profile_dir. Errors: RequestError, if there is none or one is being made."""
        self._profiler.start()

    def stop_profile(self) -> None:
        """End the trace, with the steps that are in flight in it. Errors: RequestError, if none is being made."""
        if self._in_flight is not None:
            self.runner.collect(self._in_flight)
        self._profiler.stop()

    def close(self) -> None:
        """Wait for the device; the engine is not used after this."""
        if self._in_flight is not None:
            self.runner.collect(self._in_flight)
            self._in_flight = None
        self.runner.close()

    def _forget(self, request: Request) -> None:
        """A request has ended."""
        self._detokenizers.pop(request, None)
        if self._speculator is not None:
            self._speculator.forget(request)

    def _need_tokenizer(self, field: str) -> Tokenizer:
        if self.tokenizer is None:
            raise RequestError(field, "text needs a tokenizer, and this model was loaded without one")
        return self.tokenizer

    def _read_prompt(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        """-> a prompt's text, if it has one, and its tokens."""
        if isinstance(prompt, Mapping):
            forms = {"prompt", "prompt_token_ids"}
            if set(prompt) - forms - {"cache_salt"} or not forms & set(prompt):
                raise RequestError(
                    "prompt", f"a dictionary holds prompt or prompt_token_ids, and cache_salt; got {sorted(prompt)}"
                )
            text, ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
        else:
            text, ids = (prompt, None) if isinstance(prompt, str) else (None, prompt)
        if ids is None:
            if not isinstance(text, str) or not text:
                raise RequestError("prompt", f"must be non-empty text or token ids, got {text!r:.80}")
            ids = self._need_tokenizer("prompt").encode(text)
        if not isinstance(ids, Sequence) or isinstance(ids, (str, bytes)) or not len(ids):
            raise RequestError("prompt", f"token ids must be a non-empty list of integers, got {ids!r:.80}")
        for token in ids:
            if type(token) is not int or not 0 <= token < self.model_config.vocab_size:
                raise RequestError(
                    "prompt", f"token ids must be integers in [0, {self.model_config.vocab_size}), got {token!r:.80}"
                )
        return text, list(ids)

    def _bad_words(self, params: SamplingParams) -> tuple[tuple[int, ...], ...]:
        """-> each bad word as tokens, as it reads at a text's start and after a space."""
        if not params.bad_words:
            return ()
        tokenizer = self._need_tokenizer("bad_words")
        found: dict[tuple[int, ...], None] = {}
        for word in params.bad_words:
            for text in (word, " " + word.lstrip()):
                ids = tuple(tokenizer.encode(text, add_special_tokens=False))
                if len(ids) > MAX_BAD_WORD_TOKENS:
                    raise RequestError(
                        "bad_words", f"{word!r:.80} is {len(ids)} tokens, of at most {MAX_BAD_WORD_TOKENS}"
                    )
                if ids:
                    found[ids] = None
        if len(found) > MAX_BAD_WORDS:
            raise RequestError("bad_words", f"{len(found)} token sequences, of at most {MAX_BAD_WORDS}")
        return tuple(found)


class _Candidates:
    """One step's log-probabilities on the host: [rows], [rows] and [rows, MAX_LOGPROBS] twice."""

    def __init__(self, source: Any):
        self.logprob, self.rank = np.asarray(source.logprob), np.asarray(source.rank)
        self.top_ids, self.top_logprobs = np.asarray(source.top_ids), np.asarray(source.top_logprobs)


def _wants_logprobs(rows: Sequence[Row]) -> bool:
    return any(row.samples and row.request.params.logprobs is not None for row in rows)
