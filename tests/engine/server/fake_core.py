"""An engine core without a model: it spells the alphabet, as slowly as told, and fails where the prompt says so."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable

import numpy as np
import tokenizers
from tokenizers import decoders, pre_tokenizers

from engine.config import EngineConfig, ResolvedConfig
from engine.request import (
    CompletionOutput,
    Group,
    Logprob,
    Logprobs,
    NoRoom,
    RequestError,
    RequestMetrics,
    SamplingParams,
    Update,
)
from engine.tokenizer import Tokenizer

TEMPLATE = (
    "{% if tools %}[{% for tool in tools %}{{ tool.function.name }}{% endfor %}]{% endif %}"
    "{% for m in messages %}{% if m.role == 'forbidden' %}{{ raise_exception('no such role') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}{% if m.tool_calls %}{{ m.tool_calls[0].function.arguments.city }}{% endif %}"
    "{% endfor %}{% if mood %}({{ mood }}){% endif %}{% if documents %}{{ documents[0].title }}{% endif %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def make_tokenizer() -> Tokenizer:
    """-> a token for each byte, and <s> and </s>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    return Tokenizer(
        backend,
        eos_token_ids=(257,),
        bos_token_id=256,
        chat_template=TEMPLATE,
        special_tokens={"bos_token": "<s>", "eos_token": "</s>"},
    )


class Stats:
    """Counts what the fake does, under the names of engine.core.Stats."""

    def __init__(self, core: FakeCore):
        self.num_running = min(len(core.groups), core.resolved.max_num_seqs)
        self.num_waiting = len(core.groups) - self.num_running
        self.kv_cache_usage = self.num_running / core.resolved.max_num_seqs
        self.prefix_cache_queries, self.prefix_cache_hits, self.num_preemptions = 10, 4, 1
        self.prompt_tokens, self.generation_tokens = core.prompt_tokens, core.generation_tokens
        self.last_iteration_tokens = self.num_running
        self.speculation = None  # it does not speculate
        self.replicas = ()


class FakeCore:
    """EngineCore's interface. Completion i of a prompt is the alphabet from its i-th letter on.

    Words in a prompt make trouble: DIE kills the engine at the first step, NAN fails this request, NOFIT is refused
    when it is added, INF gives logprobs that JSON lacks. `gate` holds every step while it is cleared.
    """

    def __init__(
        self,
        *,
        step_seconds: float = 0.0,
        max_num_seqs: int = 8,
        max_model_len: int = 512,
        policy: str = "fcfs",
        tokenizer: Tokenizer | None = None,
    ):
        self.config = EngineConfig(model="fake-model", scheduling_policy=policy)
        self.resolved = ResolvedConfig("float32", "float32", max_model_len, max_num_seqs, 512, 16)
        self.tokenizer = tokenizer or make_tokenizer()
        self.step_seconds = step_seconds
        self.gate = threading.Event()
        self.gate.set()
        self.groups: dict[str, Group] = {}  # in order of arrival
        self.prepared: list[Group] = []
        self.added: list[str] = []
        self.aborted: list[str] = []
        self.embedded: list[int] = []  # how many prompts each call had
        self.embedded_without_room = 0  # so many calls still find no room
        self.closed = self.profiling = False
        self.prompt_tokens = self.generation_tokens = 0
        self.alphabet = self.tokenizer.encode("abcdefghijklmnopqrstuvwxyz")  # or what a test wants to be said

    def prepare(
        self,
        request_id: str,
        prompt: str | list[int],
        params: SamplingParams,
        *,
        priority: int = 0,
        cache_salt: str = "",
    ) -> Group:
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        if not ids:
            raise RequestError("prompt", "must not be empty")
        for token in ids:
            if type(token) is not int or not 0 <= token < self.tokenizer.vocab_size:
                raise RequestError("prompt", f"token {token} is not in [0, {self.tokenizer.vocab_size})")
        for name in ("logit_bias", "allowed_token_ids", "stop_token_ids"):
            for token in getattr(params, name) or ():
                if token >= self.tokenizer.vocab_size:
                    raise RequestError(name, f"token {token} is not in [0, {self.tokenizer.vocab_size})")
        if len(ids) >= self.resolved.max_model_len:
            raise RequestError("prompt", f"{len(ids)} tokens, max_model_len is {self.resolved.max_model_len}")
        group = Group(request_id, None, ids, params, RequestMetrics(time.time()), priority, cache_salt)
        group.completions = [
            CompletionOutput(i, logprobs=None if params.logprobs is None else []) for i in range(params.n)
        ]
        self.prepared.append(group)
        return group

    def add(self, group: Group) -> None:
        if self._says(group, "NOFIT"):
            raise RequestError("prompt", "needs 9 pages, there are 4")
        self.groups[group.request_id] = group
        self.added.append(group.request_id)
        self.prompt_tokens += len(group.prompt_token_ids)

    def read_embedding_prompt(self, ids: list[int]) -> list[int]:
        if not ids or max(ids) >= self.tokenizer.vocab_size:
            raise RequestError("prompt", f"token ids must be in [0, {self.tokenizer.vocab_size}), at least one")
        if len(ids) > self.resolved.max_model_len:
            raise RequestError("prompt", f"{len(ids)} tokens are more than max_model_len")
        return ids

    def embed(self, prompts: list[list[int]], pooling: str, normalize: bool) -> np.ndarray:
        """-> of each prompt its length, its first token, which pooling it was, and whether it is normalised."""
        self.embedded.append(len(prompts))
        if self.embedded_without_room:
            self.embedded_without_room -= 1
            raise NoRoom
        if any("NAN" in self.tokenizer.decode(ids) for ids in prompts):
            raise ValueError("the model's hidden states were not finite")
        kind = ("last", "mean", "cls").index(pooling)
        return np.array([[len(ids), ids[0], kind, normalize] for ids in prompts], np.float32)

    def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)
        self.groups.pop(request_id, None)

    def failure(self) -> Exception | None:
        return None

    def has_unfinished(self) -> bool:
        return bool(self.groups)

    def reset_prefix_cache(self) -> bool:
        return not self.groups

    def start_profile(self) -> None:
        if self.profiling:
            raise RequestError("start_profile", "a trace is being made")
        self.profiling = True

    def stop_profile(self) -> None:
        if not self.profiling:
            raise RequestError("stop_profile", "no trace is being made")
        self.profiling = False

    def stats(self) -> Stats:
        return Stats(self)

    def close(self) -> None:
        self.closed = True

    def step(self) -> list[Update]:
        time.sleep(self.step_seconds)
        self.gate.wait()
        running = list(self.groups.values())[: self.resolved.max_num_seqs]
        updates = [
            self._advance(group, completion)
            for group in running
            for completion in group.completions
            if completion.finish_reason is None
        ]
        for group in running:
            if group.finished():
                group.metrics.finished_time = time.time()
                del self.groups[group.request_id]
        return updates

    def _advance(self, group: Group, completion: CompletionOutput) -> Update:
        if self._says(group, "DIE"):
            raise RuntimeError("the device has gone")
        update = Update(group, completion.index)
        if self._says(group, "NAN"):
            group.error = "the model's logits were not finite"
            update.finish_reason = completion.finish_reason = "error"
            return update
        now = time.time()
        group.metrics.first_scheduled_time = group.metrics.first_scheduled_time or now
        group.metrics.first_token_time = group.metrics.first_token_time or now
        group.num_cached_tokens = 2
        self.generation_tokens += 1
        odd = self._says(group, "INF")
        if group.params.prompt_logprobs is not None and group.prompt_logprobs is None:
            ids = group.prompt_token_ids
            group.prompt_logprobs = [None, *(self._logprobs(t, group.params.prompt_logprobs, odd) for t in ids[1:])]
        token = self.alphabet[(completion.index + len(completion.token_ids)) % len(self.alphabet)]
        update.token_ids, update.text = [token], self.tokenizer.token_text(token)
        if group.params.logprobs is not None:
            update.logprobs = [self._logprobs(token, group.params.logprobs, odd)]
            completion.logprobs += update.logprobs
        completion.token_ids += update.token_ids
        completion.text += update.text
        if update.text in (group.params.stop or ()):
            update.finish_reason, update.stop_reason = "stop", update.text
        elif len(completion.token_ids) >= (group.params.max_tokens or self.resolved.max_model_len):
            update.finish_reason = "length"
        completion.finish_reason, completion.stop_reason = update.finish_reason, update.stop_reason
        return update

    def _logprobs(self, token: int, count: int, odd: bool) -> Logprobs:
        """-> the token with logprob -0.5, then others that are less likely."""
        entry = {token: Logprob(-math.inf if odd else -0.5, 1, self.tokenizer.token_text(token))}
        for i in range(1, count + 1):
            entry.setdefault((token + i) % 256, Logprob(math.nan if odd else -1.0 - i, i + 1))
        return entry

    def _says(self, group: Group, word: str) -> bool:
        return word in self.tokenizer.decode(group.prompt_token_ids)


def slow_factory(core: FakeCore, loading: threading.Event) -> Callable[[], FakeCore]:
    """-> a factory that loads until `loading` is set."""

    def load() -> FakeCore:
        loading.wait()
        return core

    return load
