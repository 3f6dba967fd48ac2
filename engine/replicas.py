"""Several engines behind one: each replica has its own devices, scheduler and pages, and requests are routed to one.

A request goes where least is to be computed for it: a replica's load, in tokens, and what of its own prompt no request
before it has left in that replica's prefix cache.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import numpy as np

from engine.core import EngineCore, Prompt, Stats
from engine.pages import encode_tokens, hash_page, root_hash
from engine.request import Group, RequestError, SamplingParams, Update
from engine.speculation.speculator import in_all

ANSWER_TOKENS = 64  # prompt tokens that answering for one completion counts as: nobody knows how long it gets
KNOWN_PAGES = 1 << 16  # pages of prompts whose replicas are remembered
POLL_SECONDS = 1e-4


class ReplicaFailed(RuntimeError):
    """One of several engines has failed, and so have all: its requests were in its devices' memory."""


class Router:
    """Chooses a replica for each request, and keeps count of what each has to do."""

    def __init__(self, replicas: int, page_size: int):
        self.page_size = page_size
        self.load = [0] * replicas  # tokens
        self._pages: OrderedDict[bytes, int] = OrderedDict()  # hash -> replicas that have computed it, as bits
        self._routed: dict[str, tuple[int, int]] = {}  # request id -> replica, tokens

    def route(self, group: Group) -> int:
        """-> the replica that the group is for, from now on part of its load."""
        digests = self._digests(group)
        known = [self._known(digests, 1 << replica) for replica in range(len(self.load))]
        left = [len(group.prompt_token_ids) - pages * self.page_size for pages in known]
        # What is left is waited for, and it is work that another replica would be spared: so it counts twice.
        chosen = min(range(len(self.load)), key=lambda replica: (self.load[replica] + 2 * left[replica], replica))
        for digest in digests:
            self._pages[digest] = self._pages.pop(digest, 0) | 1 << chosen
        while len(self._pages) > KNOWN_PAGES:
            self._pages.popitem(last=False)
        tokens = left[chosen] + ANSWER_TOKENS * group.params.n
        self.load[chosen] += tokens
        self._routed[group.request_id] = chosen, tokens
        return chosen

    def replica_of(self, request_id: str) -> int | None:
        routed = self._routed.get(request_id)
        return None if routed is None else routed[0]

    def forget(self, request_id: str) -> None:
        """The request has ended; unknown ids are ignored."""
        replica, tokens = self._routed.pop(request_id, (0, 0))
        self.load[replica] -= tokens

    def _digests(self, group: Group) -> list[bytes]:
        chain, size = [root_hash(group.cache_salt)], self.page_size
        for start in range(0, len(group.prompt_token_ids) - size + 1, size):
            chain.append(hash_page(chain[-1], encode_tokens(group.prompt_token_ids[start : start + size])))
        return chain[1:]

    def _known(self, digests: list[bytes], bit: int) -> int:
        """-> how many pages, from the first on, the replica of this bit has seen."""
        return next((i for i, digest in enumerate(digests) if not self._pages.get(digest, 0) & bit), len(digests))


class Replicas:
    """The interface of EngineCore over several of them."""

    def __init__(self, cores: Sequence[EngineCore]):
        self.cores = list(cores)
        first = self.cores[0]
        self.config, self.resolved, self.model_config = first.config, first.resolved, first.model_config
        self.tokenizer = first.tokenizer
        self.router = Router(len(self.cores), self.resolved.page_size)
        self._stepped: list[EngineCore] = []  # by the last `step`

    def prepare(
        self, request_id: str, prompt: Prompt, params: SamplingParams, *, priority: int = 0, cache_salt: str = ""
    ) -> Group:
        """As EngineCore.prepare: replicas are alike, so that any of them may say what a request is."""
        return self.cores[0].prepare(request_id, prompt, params, priority=priority, cache_salt=cache_salt)

    def add(self, group: Group) -> None:
        """Queue a prepared request at one of the replicas. Errors: as EngineCore.add."""
        if self.router.replica_of(group.request_id) is not None:
            raise RequestError("request_id", f"{group.request_id!r} is in use")
        replica = self.router.route(group)
        try:
            self.cores[replica].add(group)
        except RequestError:
            self.router.forget(group.request_id)
            raise

    def read_embedding_prompt(self, prompt: Prompt) -> list[int]:
        return self.cores[0].read_embedding_prompt(prompt)

    def embed(self, prompts: Sequence[Sequence[int]], pooling: str, normalize: bool) -> np.ndarray:
        """As EngineCore.embed, by the replica that has least to do."""
        load = self.router.load
        return self.cores[load.index(min(load))].embed(prompts, pooling, normalize)

    def abort(self, request_id: str) -> None:
        replica = self.router.replica_of(request_id)
        if replica is not None:
            self.cores[replica].abort(request_id)
            self.router.forget(request_id)

    def has_unfinished(self) -> bool:
        return any(core.has_unfinished() for core in self.cores)

    def step(self) -> list[Update]:
        """A step of every replica that need not wait for its devices, at least of one. -> what they added.

        Errors: ReplicaFailed.
        """
        busy = [core for core in self.cores if core.has_unfinished()]
        while not (ready := [core for core in busy if core.is_ready()]) and busy:
            time.sleep(POLL_SECONDS)
        self._stepped, updates = ready, list[Update]()
        for core in ready:
            try:
                updates += core.step()
            except Exception as error:
                which = f"replica {self.cores.index(core)} of {len(self.cores)}"
                raise ReplicaFailed(f"{which}: {type(error).__name__}: {error}") from error
        for update in updates:
            if update.group.finished():
                self.router.forget(update.group.request_id)
        return updates

    def failure(self) -> Exception | None:
        return next((failure for core in self.cores if (failure := core.failure()) is not None), None)

    def stats(self) -> Stats:
        """-> sums over the replicas; of kv_cache_usage, the mean; of the last iteration, those that made a step.

        `replicas` has each one's own.
        """
        each = [core.stats() for core in self.cores]
        names = [f.name for f in fields(Stats) if f.name not in ("speculation", "replicas")]
        total: dict[str, Any] = {name: sum(getattr(stats, name) for stats in each) for name in names}
        total["speculation"] = in_all([stats.speculation for stats in each if stats.speculation is not None])
        total["kv_cache_usage"] /= len(each)
        total["last_iteration_tokens"] = sum(core.stats().last_iteration_tokens for core in self._stepped)
        return Stats(**total, replicas=tuple(each))

    def reset_prefix_cache(self) -> bool:
        """Forget all prefixes. -> False if a replica could not, since its requests hold pages."""
        done = [core.reset_prefix_cache() for core in self.cores]
        return all(done)

    def start_profile(self) -> None:
        """As EngineCore.start_profile: a trace is of the whole process."""
        self.cores[0].start_profile()

    def stop_profile(self) -> None:
        self.cores[0].stop_profile()

    def close(self) -> None:
        for core in self.cores:
            core.close()


Engine = EngineCore | Replicas
