"""One script with an `LLM` in two processes: the same results in both, and a clear end if they do not do the same."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.engine.processes import ENVIRONMENT, ROOT

TINY = ROOT / "tests" / "data" / "tiny" / "llama3"


def run(folder: Path, case: str, *, processes: int = 2, **more: Any) -> list[tuple[int, str, str]]:
    """-> status, output and errors of every process, with a model of one layer. `more`: settings."""
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(2)]
        coordinator, control = (f"127.0.0.1:{server.getsockname()[1]}" for server in held)
    (folder / "secret").write_text("sixteen bytes at the least")
    (folder / "model").mkdir(exist_ok=True)
    shape = json.loads((TINY / "config.json").read_text()) | {"num_hidden_layers": 1}
    (folder / "model" / "config.json").write_text(json.dumps(shape))
    shared = dict(coordinator_address=coordinator, control_address=control, secret_file=str(folder / "secret"))
    children = []
    for number in range(processes):
        own = dict(num_processes=processes, process_id=number, tensor_parallel_size=processes)
        settings = dict(model=str(folder / "model")) | more | (shared | own if processes > 1 else {})
        command = [sys.executable, "-m", "tests.engine.hosts.llm_program", json.dumps(settings), case]
        pipes: Any = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        children.append(subprocess.Popen(command, cwd=ROOT, env=os.environ | ENVIRONMENT, **pipes))
    try:
        said = [child.communicate(timeout=120) for child in children]
    finally:
        for child in children:
            child.kill()
    return [(child.returncode, *texts) for child, texts in zip(children, said, strict=True)]


def test_every_process_gets_the_same_results_which_are_those_of_one(tmp_path):
    drafts = {"method": "mtp", "num_speculative_tokens": 2, "adaptive": False}  # a head, whole in each
    several = run(tmp_path, "alike", speculative_config=drafts)
    ran = [*several, *run(tmp_path, "alike", processes=1)]
    assert [status for status, _, _ in ran] == [0, 0, 0], "\n".join(errors[-2000:] for _, _, errors in ran)
    leader, follower, alone = (json.loads(output.splitlines()[-1]) for _, output, _ in ran)  # Gloo speaks, too
    assert follower == leader
    assert leader["greedy"] == leader["after"] == alone["greedy"]
    tokens = lambda found: [[c["token_ids"] for c in output["outputs"]] for output in found["drawn"]]
    assert tokens(leader) == tokens(alone)
    assert [(name, field) for name, _, field in leader["errors"]] == [
        ("RequestError", "prompt"), ("RequestError", "priority"), ("ValueError", None),
    ]  # fmt: skip
    assert leader["errors"][:2] == alone["errors"]
    assert leader["errors"][2][1].startswith("stream: is for one process")
    assert leader["metrics"]["generation_tokens"] == alone["metrics"]["generation_tokens"] > 0
    assert leader["metrics"]["speculation"]["num_draft_tokens"] > 0
    assert leader["reset"]


def test_processes_whose_calls_differ_end_with_the_difference(tmp_path):
    leader, follower = run(tmp_path, "apart")
    assert leader[0] != 0
    assert follower[0] == 1
    difference = "process 1 differs in the arguments of generate: "
    assert difference in leader[2]
    assert f"process 1 ends: {difference}" in follower[2]


def test_a_process_that_ends_early_ends_the_others(tmp_path):
    leader, follower = run(tmp_path, "short")
    assert leader[0] != 0
    assert follower[0] == 1
    assert "field: of process 1 alone" in follower[2]
    assert "process 1 differs in its call: the end of the program, and process 0 has generate" in leader[2]
