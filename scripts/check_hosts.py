"""Serve a tiny model from several processes on this machine, and see that it answers as one, and what ends it.

python scripts/check_hosts.py [--processes 2] [--requests 200] [--scenarios same,drafts,follower,leader,...]

drafts: with random weights, and drafts by an EAGLE-3 head, an MTP layer and a draft model, against one process without.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "tests/data/tiny/llama3"
SCENARIOS = "same,drafts,follower,leader,mismatch,drop,sigterm"
SMALL = "--skip-tokenizer-init --max-num-seqs 2 --max-num-batched-tokens 16 --max-model-len 128 --block-size 16"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


class Servers:
    """The processes of one engine: their output goes to files of a folder."""

    def __init__(
        self, folder: Path, count: int, *, shared: Sequence[str] = (), extra: dict[int, str] | None = None,
        proxied: int | None = None,
    ):  # fmt: skip
        """`shared`: further flags of all processes, `extra`: of some; `proxied`: which one's connection can be cut."""
        secret = folder / "secret"
        secret.write_text(secrets.token_hex())
        self.port, coordinator, control, proxy = (free_port() for _ in range(4))
        self.url, self.proxy = f"http://127.0.0.1:{self.port}", None
        if proxied is not None:
            self.proxy = Proxy(proxy, control)
        self.children: list[subprocess.Popen] = []
        self.logs = [folder / f"{count}-{i}.log" for i in range(count)]
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
        for i in range(count):
            command = [sys.executable, "-m", "engine.serve", "--model", str(MODEL), *SMALL.split()]
            command += ["--host", "127.0.0.1", "--port", str(self.port), "--num-gpu-blocks-override", "24", *shared]
            if count > 1:
                here = proxy if i == proxied else control
                command += f"--tensor-parallel-size {count} --num-processes {count} --process-id {i}".split()
                command += ["--coordinator-address", f"127.0.0.1:{coordinator}", "--secret-file", str(secret)]
                command += ["--control-address", f"127.0.0.1:{here}", *(extra or {}).get(i, "").split()]
            output = self.logs[i].open("w")
            self.children.append(subprocess.Popen(command, env=environment, stdout=output, stderr=output))

    def wait_until_ready(self) -> None:
        while all(child.poll() is None for child in self.children):
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(self.url + "/health").status_code == 200:
                    return
            time.sleep(0.2)
        raise SystemExit("a process has ended:\n" + "\n".join(self.last_lines()))

    def ask(self, prompt: list[int], count: int = 12) -> httpx.Response:
        body = {"model": str(MODEL), "prompt": prompt, "max_tokens": count, "temperature": 0, "ignore_eos": True}
        body |= {"logprobs": 0}  # they name the tokens
        return httpx.post(self.url + "/v1/completions", json=body, timeout=120)

    def ended(self, since: float, limit: float = 30.0) -> tuple[list[int | None], float]:
        """-> every process's status once all have ended, and the seconds it took."""
        while time.monotonic() - since < limit and any(child.poll() is None for child in self.children):
            time.sleep(0.05)
        return [child.poll() for child in self.children], time.monotonic() - since

    def last_lines(self) -> list[str]:
        """-> what each process said last of its end."""
        lines = [log.read_text().splitlines() for log in self.logs]
        said = [
            [line for line in of if line.startswith("quire:") and ("ends" in line or "failed" in line)] for of in lines
        ]
        return [of[-1] if of else "-" for of in said]

    def close(self) -> None:
        for child in self.children:
            with contextlib.suppress(ProcessLookupError):
                child.kill()
            child.wait()


class Proxy:
    """Hands bytes on between one follower and the leader, until it is cut."""

    def __init__(self, port: int, target: int):
        self.target, self.sockets = target, []
        self.listener = socket.create_server(("127.0.0.1", port))
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        for one in self.sockets:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        while True:
            one, _ = self.listener.accept()
            try:
                other = socket.create_connection(("127.0.0.1", self.target))
            except OSError:
                one.close()
                continue
            self.sockets = [one, other]
            for a, b in ((one, other), (other, one)):
                threading.Thread(target=self._pump, args=(a, b), daemon=True).start()

    @staticmethod
    def _pump(a: socket.socket, b: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := a.recv(1 << 16):
                b.sendall(data)
            b.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def servers(folder: Path, count: int, **options) -> Iterator[Servers]:
    made = Servers(folder, count, **options)
    try:
        yield made
    finally:
        made.close()


def answers(folder: Path, count: int, prompts: list[list[int]], **options: Any) -> tuple[list[str], str]:
    """-> what so many processes answer to all prompts, eight of which are asked at a time, and their /metrics."""
    with servers(folder, count, **options) as group:
        group.wait_until_ready()
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(group.ask, prompts))
        failed = [response.text for response in found if response.status_code != 200]
        assert not failed, failed[0]
        told = httpx.get(group.url + "/metrics").text
        return [str(response.json()["choices"][0]["logprobs"]["tokens"]) for response in found], told


def drafters(folder: Path) -> dict[str, dict[str, Any]]:
    """-> settings of each method that drafts with parameters of its own; a head's config.json is in the folder."""
    head = json.loads((MODEL / "config.json").read_text())
    head |= dict(architectures=["LlamaForCausalLMEagle3"], num_hidden_layers=1, draft_vocab_size=100)
    head |= dict(eagle_config={"eagle_aux_hidden_state_layer_ids": [0, 1, 2]})
    (folder / "eagle3").mkdir()
    (folder / "eagle3" / "config.json").write_text(json.dumps(head))
    methods: dict[str, dict[str, Any]] = {"eagle3": {"model": str(folder / "eagle3")}, "mtp": {}}
    return methods | {"draft_model": {"model": str(MODEL)}}


def with_drafts(folder: Path, count: int, prompts: list[list[int]]) -> Iterator[str]:
    """Yields what comes of each method."""
    dummy = ["--load-format", "dummy"]
    one, _ = answers(folder, 1, prompts, shared=dummy)
    for method, own in drafters(folder).items():
        config = dict(method=method, num_speculative_tokens=3, adaptive=False) | own
        found, told = answers(folder, count, prompts, shared=[*dummy, "--speculative-config", json.dumps(config)])
        same = sum(a == b for a, b in zip(one, found, strict=True))
        counted = [sum_of(told, f"spec_decode_num_{name}_tokens_total") for name in ("accepted", "draft")]
        yield f"{method}: {same} of {len(prompts)} alike, {counted[0]:.0f} of {counted[1]:.0f} drafts right"


def sum_of(metrics: str, name: str) -> float:
    return sum(float(line.split()[-1]) for line in metrics.splitlines() if line.startswith(f"quire:{name}"))


def disturbed(folder: Path, count: int, disturb: Callable[[Servers], None], **options) -> str:
    """-> what comes of a disturbance while requests run: statuses of clients and processes, and their last lines."""
    with servers(folder, count, **options) as group, ThreadPoolExecutor(8) as pool:
        group.wait_until_ready()
        group.ask([1, 2, 3])
        running = [pool.submit(lambda i=i: outcome(group, [i + 1, 2, 3])) for i in range(40)]
        time.sleep(0.3)
        since = time.monotonic()
        disturb(group)
        statuses, seconds = group.ended(since)
        told = sorted({future.result() for future in running})
        return f"clients {told}, processes {statuses} in {seconds:.1f} s\n    " + "\n    ".join(group.last_lines())


def outcome(group: Servers, prompt: list[int]) -> str:
    try:
        response = group.ask(prompt, 100)
    except httpx.HTTPError as error:
        return type(error).__name__
    wait = response.headers.get("retry-after")
    return f"{response.status_code}" + (f" Retry-After {wait}" if wait else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--scenarios", default=SCENARIOS)
    options = parser.parse_args()
    count, wanted = options.processes, options.scenarios.split(",")
    draw = random.Random(7)
    prompts = [[draw.randrange(160) for _ in range(draw.randrange(2, 60))] for _ in range(options.requests)]
    kill = lambda i, number=signal.SIGKILL: lambda group: group.children[i].send_signal(number)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if "same" in wanted:
            (one, _), (found, _) = answers(folder, 1, prompts), answers(folder, count, prompts)
            same = sum(a == b for a, b in zip(one, found, strict=True))
            print(f"{count} processes: {same} of {len(prompts)} answers are those of one process", flush=True)
        if "drafts" in wanted:
            for line in with_drafts(folder, count, prompts):
                print(f"{count} processes, drafts by {line}", flush=True)
        if "follower" in wanted:
            print("a follower is killed:", disturbed(folder, count, kill(count - 1)), flush=True)
        if "leader" in wanted:
            print("the leader is killed:", disturbed(folder, count, kill(0)), flush=True)
        if "drop" in wanted:
            cut = lambda group: group.proxy.cut()
            print("a connection is dropped:", disturbed(folder, count, cut, proxied=1), flush=True)
        if "sigterm" in wanted:
            everybody = lambda group: [child.terminate() for child in group.children]
            print("all get SIGTERM:", disturbed(folder, count, everybody), flush=True)
        if "mismatch" in wanted:
            with servers(folder, count, extra={1: "--seed 1"}) as group:
                statuses, seconds = group.ended(time.monotonic(), 60)
                print(
                    f"a flag differs: {statuses} in {seconds:.1f} s\n    " + "\n    ".join(group.last_lines()),
                    flush=True,
                )


if __name__ == "__main__":
    main()
