"""Batches: every line gets its row, once, whatever happens in between."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
import time
from typing import Any

import pytest

from engine.batch.__main__ import main
from engine.batch.journal import Journal
from engine.batch.run import Batch
from tests.engine.server.fake_core import FakeCore

TINY = pathlib.Path(__file__).parents[2] / "data" / "tiny" / "llama3"


def line(custom_id: Any, url: str = "/v1/completions", method: str = "POST", **body: Any) -> str:
    return json.dumps({"custom_id": custom_id, "method": method, "url": url, "body": body})


def completion(custom_id: str, prompt: str = "x", max_tokens: int = 3, **fields: Any) -> str:
    return line(custom_id, prompt=prompt, max_tokens=max_tokens, **fields)


def run(folder: pathlib.Path, lines: list[str], core: FakeCore | None = None, **options: Any) -> list[dict[str, Any]]:
    """-> the rows of the output, in its order, after the batch has run (on)."""
    source, target = folder / "in.jsonl", folder / "out.jsonl"
    source.write_text("\n".join(lines) + "\n")
    journal = Journal(target)
    try:
        Batch(core or FakeCore(), journal, model="fake", **options).run(source)  # type: ignore[arg-type]
    finally:
        journal.close()
    return [json.loads(row) for row in target.read_text().splitlines()]


def test_each_kind_of_request_is_answered_as_the_server_would(tmp_path):
    chat = line("a", "/v1/chat/completions", model="fake", messages=[{"role": "user", "content": "x"}], max_tokens=3)
    rows = run(tmp_path, [chat, completion("b", n=2), line("c", "/v1/embeddings", input=["hi", "ho!"])])
    found = {row["custom_id"]: row for row in rows}
    assert [found[i]["response"]["status_code"] for i in "abc"] == [200, 200, 200]
    assert [found[i]["error"] for i in "abc"] == [None, None, None]
    body = {i: found[i]["response"]["body"] for i in "abc"}
    assert body["a"]["choices"][0]["message"] == {"role": "assistant", "content": "abc"}
    assert body["a"]["usage"]["completion_tokens"] == 3
    assert [choice["text"] for choice in body["b"]["choices"]] == ["abc", "bcd"]
    assert [entry["embedding"][0] for entry in body["c"]["data"]] == [2, 3]


def test_a_bad_line_becomes_an_error_row_and_the_rest_goes_on(tmp_path):
    bad = [
        ("{", None, "line 1"),
        ('{"custom_id": "id", "method": "POST", "url": "/v1/completions"}', "id", "body"),
        (line(7, prompt="x"), None, "custom_id"),
        (line("get", method="GET", prompt="x"), "get", "method"),
        (line("url", url="/v1/images"), "url", "url"),
        (completion("field", nonsense=1), "field", "nonsense"),
        (completion("stream", stream=True), "stream", "stream"),
        (completion("model", model="other"), "model", "no 'other' here"),
        (completion("long", prompt="x" * 600), "long", "prompt"),
        (completion("pages", prompt="NOFIT"), "pages", "needs 9 pages"),
        (line("empty", "/v1/embeddings", input=[]), "empty", "input"),
        (line("nan", "/v1/embeddings", input="NAN"), "nan", "not finite"),
        (completion("broken", prompt="NAN"), "broken", "not finite"),
        ("[1]", None, "line 14"),
        ("[" * 100_000, None, "line 15"),
    ]
    rows = run(tmp_path, [text for text, _, _ in bad] + [completion("good")], keep_order=True)
    assert len(rows) == len(bad) + 1
    for row, (_, custom_id, told) in zip(rows, bad, strict=False):
        assert row["custom_id"] == custom_id
        assert row["response"]["status_code"] in (400, 500)
        assert told in row["error"]["message"] or told == row["response"]["body"]["error"]["param"]
        assert row["response"]["body"]["error"]["message"] == row["error"]["message"]
    assert rows[-1]["response"]["body"]["choices"][0]["text"] == "abc"


@pytest.mark.parametrize("keep_order", [False, True])
def test_order_is_kept_where_asked_for(tmp_path, keep_order):
    lengths = [20, 3, 9, 1, 14, 2, 5, 8] * 4
    lines = [completion(str(i), max_tokens=n) for i, n in enumerate(lengths)]
    rows = run(tmp_path, lines, keep_order=keep_order)
    order = [int(row["custom_id"]) for row in rows]
    assert sorted(order) == list(range(len(lengths)))
    assert (order == sorted(order)) == keep_order


def test_no_more_lines_are_in_hand_than_the_window(tmp_path):
    class Counting(FakeCore):
        most = 0

        def step(self):
            self.most = max(self.most, len(self.groups))
            return super().step()

    for keep_order in (False, True):
        core = Counting(max_num_seqs=4)
        folder = tmp_path / str(keep_order)
        folder.mkdir()
        rows = run(
            folder, [completion(str(i), max_tokens=1 + i % 9) for i in range(60)], core, keep_order=keep_order, window=6
        )
        assert len(rows) == 60
        assert 4 <= core.most <= 6


def test_a_batch_goes_on_where_it_stopped(tmp_path):
    lines = [completion(str(i)) for i in range(10)]
    run(tmp_path, lines)
    target = tmp_path / "out.jsonl"
    kept = target.read_bytes().splitlines(keepends=True)[:4]
    target.write_bytes(b"".join(kept) + b'{"id": "batch_req_7", "cus')  # as a killed process leaves it
    core = FakeCore()
    rows = run(tmp_path, lines, core)
    assert len(core.added) == 6
    assert sorted(row["custom_id"] for row in rows) == sorted(str(i) for i in range(10))
    assert run(tmp_path, lines, core) == rows
    assert len(core.added) == 6


def test_an_output_that_belongs_to_another_input_is_refused(tmp_path):
    run(tmp_path, [completion("a"), completion("b")])
    before = (tmp_path / "out.jsonl").read_bytes()
    with pytest.raises(ValueError, match=r"line 2 of .* has another custom_id"):
        run(tmp_path, [completion("a"), completion("other")])
    assert (tmp_path / "out.jsonl").read_bytes() == before


@pytest.mark.parametrize("content", ["something else\n", '{"id": "batch_req_x"}\n', '{"custom_id": "a"}\n'])
def test_a_file_that_is_no_output_is_refused_and_left_alone(tmp_path, content):
    (tmp_path / "out.jsonl").write_text(content)
    with pytest.raises(ValueError, match=r"out\.jsonl:1: not a row of a batch"):
        run(tmp_path, [completion("a")])
    assert (tmp_path / "out.jsonl").read_text() == content


def test_two_processes_do_not_write_one_output(tmp_path):
    journal = Journal(tmp_path / "out.jsonl")
    with pytest.raises(ValueError, match="another process"):
        Journal(tmp_path / "out.jsonl")
    journal.close()


def test_three_kills_lose_nothing_and_repeat_nothing(tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    count = 3000
    source.write_text("".join(completion(f"id-{i}", max_tokens=2) + "\n" for i in range(count)))
    command = [sys.executable, "-m", "tests.engine.batch.fake_batch", str(source), str(target)]
    for kill in range(1, 4):
        with subprocess.Popen([*command, "0.01"]) as child:
            while not target.exists() or target.read_bytes().count(b"\n") < kill * 400:
                assert child.poll() is None
                time.sleep(0.002)
            child.kill()
    assert target.read_bytes().count(b"\n") < count
    subprocess.run(command, check=True)
    ids = [json.loads(row)["custom_id"] for row in target.read_text().splitlines()]
    assert len(ids) == count
    assert set(ids) == {f"id-{i}" for i in range(count)}


def test_the_program_answers_with_a_model(tmp_path, capsys):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(line("a", prompt=[5, 6, 7], max_tokens=4, temperature=0, ignore_eos=True) + "\n{}\n")
    command = ["batch", "-i", str(source), "-o", str(target), "--model", str(TINY), "--skip-tokenizer-init"]
    assert main([*command, "--max-num-seqs=1", "--max-num-batched-tokens=16", "--max-model-len=32"]) == 0
    rows = [json.loads(row) for row in target.read_text().splitlines()]
    assert {row["custom_id"]: row["response"]["status_code"] for row in rows} == {"a": 200, None: 400}
    answered = next(row for row in rows if row["custom_id"] == "a")
    assert answered["response"]["body"]["usage"]["completion_tokens"] == 4
    assert "1 lines failed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["-o", "out"], "input_file: name it with -i"),
        (["-i", "/no/such", "-o", "out"], "input_file: there is no file /no/such"),
        (["-i", __file__, "-o", __file__, "--model=x"], "is the input"),
        (["-i", __file__, "-o", "/no/such/folder/out", "--model=x"], "/no/such/folder"),
    ],
)
def test_wrong_files_are_told_before_a_model_is_loaded(arguments, told, capsys):
    assert main(["batch", *arguments]) == 1
    assert told in capsys.readouterr().err
