"""What the processes of one engine say to each other: authenticated, numbered, checked, and over once one is lost."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from engine.config import EngineConfig
from engine.hosts import leader as leader_module
from engine.hosts.follower import Follower
from engine.hosts.join import checkpoint_hash, decode, encode, follow, identity
from engine.hosts.leader import Leader, first_difference
from engine.hosts.wire import HEADER, Channel, HostLost, parse_address, prove, read_secret
from engine.runner import Runner

SECRET = b"sixteen bytes at the least"


def free_address() -> tuple[str, int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[:2]


def wait_for(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def pair() -> Iterator[Callable[[], tuple[socket.socket, socket.socket]]]:
    """Makes pairs of connected sockets, and closes them."""
    with ExitStack() as stack:

        def make() -> tuple[socket.socket, socket.socket]:
            one, other = socket.socketpair()
            return stack.enter_context(one), stack.enter_context(other)

        yield make


class Group:
    """A leader and its followers in one process; `lost` has what each follower was told when it lost its leader."""

    def __init__(self, count: int, secrets: tuple[bytes, ...] = ()):
        self.lost: dict[int, Exception] = {}
        self.followers: dict[int, Follower] = {}
        self.said: list[str] = []
        address = free_address()

        def follow(number: int, secret: bytes) -> None:
            try:
                self.followers[number] = Follower(address, secret, number, partial(self.lose, number))
            except HostLost as error:
                self.lost[number] = error

        def arrive() -> None:
            for secret in secrets:  # before the last of the others, so that the leader still listens
                follow(9, secret)
            for number in range(1, count + 1):
                follow(number, SECRET)

        arriving = threading.Thread(target=arrive, daemon=True)
        arriving.start()
        self.leader = Leader(address, SECRET, count, self.said.append)
        arriving.join(10)

    def lose(self, number: int, error: Exception) -> None:
        self.lost.setdefault(number, error)


@contextmanager
def joined(monkeypatch: pytest.MonkeyPatch, count: int, secrets: tuple[bytes, ...] = ()) -> Iterator[Group]:
    monkeypatch.setattr(leader_module, "END_SECONDS", 3600)  # or this process would end
    monkeypatch.setattr(leader_module, "BEAT_SECONDS", 0.05)
    group = Group(count, secrets)
    try:
        yield group
    finally:
        group.leader.close()


def test_every_follower_hears_every_message_in_order(monkeypatch):
    with joined(monkeypatch, 3) as group:
        for i in range(50):
            group.leader.send(encode("step", (np.arange(i, dtype=np.int32), np.float32(i))))
        for follower in group.followers.values():
            for i in range(50):
                name, (first, second) = decode(follower.next())
                assert name == "step"
                np.testing.assert_array_equal(first, np.arange(i))
                assert (second.shape, second.dtype, second) == ((), np.float32, i)
        group.leader.is_ready = True
        group.leader.close()
        assert [follower.next() for follower in group.followers.values()] == [None] * 3
        assert not group.lost


def test_all_agree_on_the_least(monkeypatch):
    with joined(monkeypatch, 2) as group:
        found: list[int] = []
        threads = [
            threading.Thread(target=lambda f=follower, n=number: found.append(f.agree(10 * n)))
            for number, follower in group.followers.items()
        ]
        for thread in threads:
            thread.start()
        assert group.leader.agree(15) == 10
        for thread in threads:
            thread.join(10)
        assert found == [10, 10]


def test_a_stranger_is_refused_and_the_others_are_welcome(monkeypatch):
    with joined(monkeypatch, 1, secrets=(b"another secret of some length",)) as group:
        assert list(group.followers) == [1]
        assert "does not know the secret" in group.said[0]
        assert "does not know the secret" in str(group.lost[9]) or "closed the connection" in str(group.lost[9])


def test_processes_that_differ_are_refused_with_the_name_of_the_difference(monkeypatch):
    with joined(monkeypatch, 2) as group:
        errors: list[str] = []

        def compare(number: int) -> None:
            try:
                group.followers[number].compare({"jax": "0.10.2", "max_model_len": str(100 * number)})
            except HostLost as error:
                errors.append(str(error))

        threads = [threading.Thread(target=compare, args=(number,), daemon=True) for number in group.followers]
        for thread in threads:
            thread.start()
        message = "process 2 differs in max_model_len: 200, and process 0 has 100"
        with pytest.raises(HostLost, match=message):
            group.leader.compare({"jax": "0.10.2", "max_model_len": "100"})
        for thread in threads:
            thread.join(10)
        assert errors == [message] * 2


def test_a_lost_follower_is_the_leaders_failure_and_ends_the_others(monkeypatch):
    with joined(monkeypatch, 2) as group:
        group.followers[2]._channel.close()
        wait_for(lambda: group.leader.failure)
        assert "process 2 (127.0.0.1) has closed the connection" in str(group.leader.failure)
        with pytest.raises(HostLost, match="process 2"):
            group.leader.send("anything")
        with pytest.raises(HostLost, match="process 2"):
            group.leader.wait(lambda: False)
        wait_for(lambda: 1 in group.lost)
        assert "process 0 has closed the connection" in str(group.lost[1])


def test_work_that_never_ends_is_a_failure(monkeypatch):
    monkeypatch.setattr(leader_module, "STUCK_SECONDS", 0.2)
    with joined(monkeypatch, 1) as group:
        group.leader.began(lambda: True)
        time.sleep(0.5)
        assert group.leader.failure is None
        group.leader.began(lambda: False)
        wait_for(lambda: group.leader.failure)
        assert "a step has not ended within 0.2 s" in str(group.leader.failure)


def test_preparing_waits_for_all_and_may_take_longer_than_work_on_the_devices(monkeypatch):
    monkeypatch.setattr(leader_module, "STUCK_SECONDS", 0.1)
    done: list[tuple[int, str, int]] = []

    def prepare(number: int) -> Callable[[str, list[np.ndarray]], None]:
        def execute(name: str, arrays: list[np.ndarray]) -> None:
            time.sleep(0.15 * (1 + number))
            done.append((number, name, arrays[0].size))

        return execute

    with joined(monkeypatch, 2) as group:
        threads = [
            threading.Thread(target=follow, args=(follower, prepare(number)))
            for number, follower in group.followers.items()
        ]
        for thread in threads:
            thread.start()
        leader: Any = SimpleNamespace(peers=group.leader, execute=prepare(0))
        Runner.prepare(leader, "compile", np.zeros(3, np.int32))
        assert done == [(number, "compile", 3) for number in range(3)]
        assert group.leader.failure is None
        group.leader.is_ready = True
        group.leader.close()
        for thread in threads:
            thread.join(10)


def test_a_process_that_is_silent_is_lost(pair):
    one, other = pair()
    channel = Channel(one, "process 7")
    one.settimeout(0.1)
    with pytest.raises(HostLost, match="process 7 has said nothing for 0.1 s"):
        channel.receive()
    other.close()
    with pytest.raises(HostLost, match="process 7 has closed the connection"):
        channel.receive()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda frame: frame[:-1] + bytes([frame[-1] ^ 1]), "damaged frame"),
        (lambda frame: frame[:8] + struct.pack("!Q", 2) + frame[16:], "damaged frame, number 2 where 1 was expected"),
        (lambda frame: HEADER.pack(1 << 30, 0, 1), "a frame of 1073741824 bytes"),
    ],
)
def test_a_damaged_frame_is_refused(pair, damage: Callable[[bytes], bytes], message: str):
    one, other = pair()
    Channel(one, "a").send({"tokens": [1, 2, 3]})
    frame = other.recv(1 << 16)
    third, fourth = pair()
    third.sendall(damage(frame))
    with pytest.raises(HostLost, match=message):
        Channel(fourth, "b").receive()


def test_the_proof_of_a_leader_is_no_proof_of_a_follower(pair):
    """Who reflects what he is sent, without the secret, is not believed."""
    one, other = pair()

    def reflect() -> None:
        try:
            while data := other.recv(1 << 10):
                other.sendall(data)
        except OSError:
            pass  # cut off, as it should be

    threading.Thread(target=reflect, daemon=True).start()
    with pytest.raises(HostLost, match="does not know the secret"):
        prove(one, SECRET, "leader", 0, 5.0, "a mirror")
    other.close()


def test_settings_that_differ_between_hosts_on_purpose_are_not_compared(tmp_path):
    (tmp_path / "secret").write_bytes(SECRET)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_bytes(b"w" * 100)
    given = dict(coordinator_address="a:1", num_processes=2, secret_file=str(tmp_path / "secret"))
    configs = [
        EngineConfig(model="m", process_id=i, control_address=f"host{i}:2", **given)  # pyright: ignore
        for i in range(2)
    ]
    one, other = (identity(config, tmp_path / "model", together=True) for config in configs)
    assert first_difference(one, other) is None
    (tmp_path / "model" / "weights").write_bytes(b"w" * 99 + b"x")
    assert first_difference(one, identity(configs[1], tmp_path / "model", together=True))[0] == "the checkpoint"  # pyright: ignore


def test_a_checkpoints_hash_sees_names_sizes_and_both_ends(tmp_path):
    file = tmp_path / "weights"
    file.write_bytes(b"a" * (3 << 20))
    before = checkpoint_hash(tmp_path)
    assert checkpoint_hash(file) != before
    file.rename(tmp_path / "renamed")
    assert checkpoint_hash(tmp_path) != before
    (tmp_path / "renamed").rename(file)
    assert checkpoint_hash(tmp_path) == before
    file.write_bytes(b"a" * (3 << 20) + b"b")
    assert checkpoint_hash(tmp_path) != before


def test_addresses_and_secrets_are_checked(tmp_path):
    assert parse_address("control_address", "[::1]:80") == ("::1", 80)
    for wrong in ("host", ":80", "host:0", "host:x"):
        with pytest.raises(ValueError, match="control_address: must be HOST:PORT"):
            parse_address("control_address", wrong)
    (tmp_path / "short").write_bytes(b"short\n")
    with pytest.raises(ValueError, match="holds 5 bytes, of at least 16"):
        read_secret(str(tmp_path / "short"))
    with pytest.raises(ValueError, match="secret_file: cannot read"):
        read_secret(str(tmp_path / "absent"))


@pytest.mark.parametrize(
    "message", [None, ["step"], ["step", [["<i4", [3], b"12"]]], ["step", [["O", [1], b"12345678"]]]]
)
def test_what_is_no_command_is_refused(message: Any):
    with pytest.raises(HostLost, match="sent no command"):
        decode(message)
