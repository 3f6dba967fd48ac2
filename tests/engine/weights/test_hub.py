"""Models from the hub, against a server on this machine that plays it: what is fetched, resumed, and refused."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import pathlib
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from engine.weights.hub import locate

ROOT = pathlib.Path(__file__).parents[3]
COMMIT = "a" * 40
WEIGHTS = bytes(range(256)) * 100_000  # more than two of the 10 MB that the hub's client writes at a time
INDEX = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
REPOSITORIES = {
    "org/single": {
        "config.json": b"{}", "tokenizer.json": b"[]", "README.md": b"no", "model.safetensors": WEIGHTS,
        "pytorch_model.bin": b"a pickle", "consolidated.safetensors": b"no", "original/model.safetensors": b"no",
        "tokenizer/tokenizer.json": b"no",
    },
    "org/sharded": {
        "config.json": b"{}", "model.safetensors.index.json": json.dumps(INDEX).encode(), "other.safetensors": b"no",
        "model-1.safetensors": b"one", "model-2.safetensors": b"two",
    },
    "org/gguf": {"q4.gguf": b"four", "sub/q8.gguf": b"eight"},
    "org/no-weights": {"config.json": b"{}", "pytorch_model.bin": b"a pickle"},
}  # fmt: skip

# Calls locate for each (arguments, keywords) it is given; prints what came of each, and the files that are there then.
CLIENT = """
import json, os, sys
from engine.weights.hub import locate
answers = []
for arguments, keywords in json.loads(sys.argv[1]):
    try:
        path = str(locate(*arguments, **keywords))
        folder = path if os.path.isdir(path) else os.path.dirname(path)
        files = sorted(os.path.relpath(os.path.join(r, f), folder) for r, _, fs in os.walk(folder) for f in fs)
        answers.append({"path": path, "files": files})
    except ValueError as error:
        answers.append({"error": str(error)})
print(json.dumps(answers))
"""


class Hub(http.server.ThreadingHTTPServer):
    """Answers as the hub does. `cut` is how often the weights' answer still breaks off half-way."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.log: list[tuple[str, str, str | None]] = []
        self.cut = 0

    def ask(self, cache: pathlib.Path, *calls: tuple, endpoint: str | None = None) -> list[dict]:
        environment = {
            "HF_ENDPOINT": endpoint or f"http://127.0.0.1:{self.server_address[1]}", "HF_HOME": str(cache),
            "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1",
        }  # fmt: skip
        asked = [[arguments, keywords] for *arguments, keywords in calls]
        command = [sys.executable, "-c", CLIENT, json.dumps(asked)]
        done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, timeout=60)
        assert done.returncode == 0, done.stderr.decode()
        return json.loads(done.stdout)


class Handler(http.server.BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path, wanted = self.path.partition("?")[0], self.headers["Range"]
        self.server.log.append((self.command, path, wanted))
        body, headers = self.find(path)
        if body is None:
            self.send_response(404)
            self.send_header("X-Error-Code", headers["X-Error-Code"])
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        start = int(wanted.removeprefix("bytes=").partition("-")[0]) if wanted else 0
        self.send_response(206 if wanted else 200)
        if wanted:
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        for name, value in {**headers, "Content-Length": str(len(body) - start)}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            end = len(body)
            if body is WEIGHTS and self.server.cut:
                self.server.cut -= 1
                end = (start + end) // 2
            self.wfile.write(body[start:end])
            self.close_connection = end < len(body)

    def find(self, path: str) -> tuple[bytes | None, dict[str, str]]:
        for name, files in REPOSITORIES.items():
            if path.startswith(f"/api/models/{name}/tree/"):
                entries = [
                    {"type": "file", "path": file, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                    for file, data in files.items()
                ]
                return json.dumps(entries).encode(), {}
            if path in (f"/api/models/{name}", *(f"/api/models/{name}/revision/{r}" for r in ("main", "v1", COMMIT))):
                about = {"id": name, "sha": COMMIT, "siblings": [{"rfilename": file} for file in files]}
                return json.dumps(about).encode(), {}
            if path.startswith(f"/api/models/{name}/"):
                return None, {"X-Error-Code": "RevisionNotFound"}
            file = path.removeprefix(f"/{name}/resolve/{COMMIT}/")
            if file in files:
                return files[file], {"ETag": f'"{hashlib.sha1(files[file]).hexdigest()}"', "X-Repo-Commit": COMMIT}
        return None, {"X-Error-Code": "RepoNotFound"}

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_only_what_loading_needs_is_fetched_and_a_cached_model_needs_no_network(hub, tmp_path):
    calls = (
        ("org/single", {}), ("org/sharded", {"revision": "v1"}), ("org/gguf:sub/q8.gguf", {}),
        ("org/no-weights", {"weights": False}),
    )  # fmt: skip
    single, sharded, file, config = hub.ask(tmp_path, *calls)
    assert single["files"] == ["config.json", "model.safetensors", "tokenizer.json"]
    assert pathlib.Path(single["path"], "model.safetensors").read_bytes() == WEIGHTS
    assert sharded["files"] == [
        "config.json", "model-1.safetensors", "model-2.safetensors", "model.safetensors.index.json"
    ]  # fmt: skip
    assert pathlib.Path(file["path"]).read_bytes() == b"eight"
    assert config["files"] == ["config.json"]
    assert hub.ask(tmp_path, *calls, endpoint="http://127.0.0.1:9") == [single, sharded, file, config]


def test_a_download_that_breaks_off_goes_on_where_it_ended(hub, tmp_path):
    hub.cut = 1
    (answer,) = hub.ask(tmp_path, ("org/single", {}))
    assert pathlib.Path(answer["path"], "model.safetensors").read_bytes() == WEIGHTS
    ranges = [wanted for command, path, wanted in hub.log if command == "GET" and path.endswith("/model.safetensors")]
    assert ranges == [None, "bytes=10485760-"]


def test_what_the_hub_cannot_give_is_one_clear_error(hub, tmp_path):
    calls = {
        (
            "org/unknown",
            None,
        ): "org/unknown is no path here and cannot be had from the hub: there is no such repository",
        (
            "org/single",
            "v9",
        ): "model: org/single at revision v9 is no path here and cannot be had from the hub: it has",
        (
            "org/gguf",
            None,
        ): "no config.json; name one of its files, as org/gguf:q4.gguf (of 2: q4.gguf, sub/q8.gguf)",
        ("org/gguf:q2.gguf", None): "model: org/gguf on the hub has no q2.gguf",
        ("org/no-weights", None): "model: org/no-weights on the hub has no model.safetensors",
    }
    answers = hub.ask(tmp_path, *((model, {"revision": revision}) for model, revision in calls))
    for answer, message in zip(answers, calls.values(), strict=True):
        assert message in answer["error"]
    (offline,) = hub.ask(tmp_path, ("org/unknown", {}), endpoint="http://127.0.0.1:9")
    assert "the hub cannot be reached, and it is not in the cache" in offline["error"]


def test_a_path_is_taken_before_the_hub(tmp_path):
    assert locate(str(tmp_path)) == tmp_path
    with pytest.raises(ValueError, match="revision: is for models from the hub"):
        locate(str(tmp_path), "main")


@pytest.mark.parametrize(
    "name", ["no-such-model", "a/b/c", "../x/y", "org/name:../x.gguf", "org/name:file.bin", "/a/b"]
)
def test_what_is_neither_a_path_nor_a_hub_id_says_so(name):
    with pytest.raises(ValueError, match="tokenizer: .* does not exist here, and is no hub id either"):
        locate(name, setting="tokenizer")
