"""Requests go to the replica that has their prefix, until it has too much to do; all of them come back."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from engine.core import Stats
from engine.replicas import ANSWER_TOKENS, Replicas, Router
from engine.request import RequestError, Update
from tests.engine.fakes import make_request

PAGE = 16


def group(name: str, tokens: list[int], salt: str = "") -> Any:
    return make_request(tokens, 4, name=name, salt=salt).group


def test_requests_without_a_common_prefix_are_spread_evenly():
    router = Router(4, PAGE)
    assert sorted(router.route(group(str(i), [i] * 100)) for i in range(8)) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_a_prefix_draws_requests_to_its_replica():
    router = Router(2, PAGE)
    document = list(range(1000))
    home = router.route(group("a", document))
    other = router.route(group("b", [7] * 1000))
    assert other != home
    router.forget("a")
    router.forget("b")
    assert router.load == [0, 0]
    assert [router.route(group(str(i), [*document, i])) for i in range(3)] == [home] * 3
    assert router.route(group("salted", document, salt="of another tenant")) == other


def test_too_much_load_outweighs_a_prefix():
    router = Router(2, PAGE)
    document = list(range(10 * ANSWER_TOKENS))
    home = router.route(group("first", document))
    chosen = [router.route(group(str(i), document)) for i in range(40)]
    assert set(chosen) == {0, 1}
    assert chosen[:9] == [home] * 9
    assert chosen[-1] != chosen[-2]  # both have it now, and take turns


class FakeCore:
    """Finishes every request in its second step, and needs two looks before a step is ready."""

    def __init__(self):
        self.config = self.model_config = self.tokenizer = None
        self.resolved = SimpleNamespace(page_size=PAGE)
        self.groups: list[Any] = []
        self.looks = self.steps = 0

    def add(self, group: Any) -> None:
        if group.prompt_token_ids == [0]:
            raise RequestError("prompt", "never fits")
        self.groups.append(group)

    def abort(self, request_id: str) -> None:
        self.groups = [group for group in self.groups if group.request_id != request_id]

    def has_unfinished(self) -> bool:
        return bool(self.groups)

    def is_ready(self) -> bool:
        self.looks += 1
        return self.looks % 2 == 0

    def step(self) -> list[Update]:
        self.steps += 1
        if self.steps % 2:
            return []
        groups, self.groups = self.groups, []
        return [Update(group, 0, finish_reason="length") for group in groups]

    def stats(self) -> Stats:
        return Stats(len(self.groups), 0, 0.5, 1, 1, 0, 0, 0, 0)


def test_all_replicas_work_and_every_request_ends_once():
    cores: Any = [FakeCore(), FakeCore(), FakeCore()]
    replicas = Replicas(cores)
    for i in range(9):
        replicas.add(group(str(i), [i + 1] * 20))
    assert [len(core.groups) for core in cores] == [3, 3, 3]
    assert (replicas.stats().num_running, replicas.stats().kv_cache_usage) == (9, 0.5)
    with pytest.raises(RequestError, match="'3' is in use"):
        replicas.add(group("3", [1]))
    replicas.abort("4")
    done = []
    while replicas.has_unfinished():
        done += [update.group.request_id for update in replicas.step()]
    assert sorted(done) == [str(i) for i in range(9) if i != 4]


def test_a_refused_request_leaves_no_load_behind():
    cores: Any = [FakeCore(), FakeCore()]
    replicas = Replicas(cores)
    with pytest.raises(RequestError, match="never fits"):
        replicas.add(group("a", [0]))
    assert replicas.router.load == [0, 0]
