"""What telling a step's plan to followers costs the leader: 256 sequences, loopback, median and 99th percentile.

python scripts/bench_hosts.py [--followers 16] [--sequences 256] [--steps 500]
"""

from __future__ import annotations

import argparse
import multiprocessing
import socket
import time

import numpy as np

from engine.hosts.follower import Follower
from engine.hosts.join import decode, encode
from engine.hosts.leader import Leader
from engine.step_input import StepShape, flat_size

SECRET = b"of a benchmark, known to all"


def follow(address: tuple[str, int], number: int) -> None:
    follower = Follower(address, SECRET, number, lambda error: None)
    while (message := follower.next()) is not None:
        decode(message)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--followers", type=int, default=16)
    parser.add_argument("--sequences", type=int, default=256)
    parser.add_argument("--steps", type=int, default=500)
    options = parser.parse_args()
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()[:2]
    spawn = multiprocessing.get_context("spawn")
    children = [spawn.Process(target=follow, args=(address, i + 1), daemon=True) for i in range(options.followers)]
    for child in children:
        child.start()
    leader = Leader(address, SECRET, options.followers, print)
    rows = options.sequences
    shape = np.array([rows, rows, True], np.int32)
    flat = np.random.default_rng(0).integers(0, 1 << 17, flat_size(StepShape(rows, rows, True)), np.int32)
    seconds = []
    for _ in range(options.steps):
        began = time.perf_counter()
        leader.send(encode("step", (shape, flat)))
        seconds.append(time.perf_counter() - began)
        time.sleep(0.005)  # as a step takes
    leader.is_ready = True
    leader.close()
    for child in children:
        child.join()
    p50, p99 = np.percentile(np.array(seconds) * 1e3, [50, 99])
    print(f"{flat.nbytes} bytes to {options.followers} followers: p50 {p50:.3f} ms, p99 {p99:.3f} ms")


if __name__ == "__main__":
    main()
