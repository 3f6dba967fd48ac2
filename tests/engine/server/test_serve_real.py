"""`python -m engine.serve` with the real model, end to end, through the openai client."""

from __future__ import annotations

import signal
import sys
import threading

import openai
import pytest

from tests.engine.server.conftest import Server, process, wait_until

FRANCE = [{"role": "user", "content": "What is the capital of France?"}]
GREEDY = {"model": "smollm2", "temperature": 0.0}


@pytest.fixture(scope="module")
def real(smollm2_gguf):
    flags = ["--model", str(smollm2_gguf), "--max-num-seqs", "4", "--max-model-len", "512", "--port", "0"]
    command = [sys.executable, "-m", "engine.serve", *flags, "--host", "127.0.0.1", "--served-model-name", "smollm2"]
    with process(*command) as (child, server):
        wait_until(lambda: child.poll() is not None or server.is_ready(), 180)
        assert child.poll() is None, "".join(child.log)
        yield server
        child.send_signal(signal.SIGTERM)
        assert child.wait(30) == 0, "".join(child.log)


def test_a_chat_is_answered_whole_and_streamed_alike(real: Server):
    whole = real.openai.chat.completions.create(messages=FRANCE, max_tokens=24, **GREEDY)
    text = whole.choices[0].message.content
    assert text.startswith("The capital of France is Paris.")
    assert whole.choices[0].finish_reason == "stop"
    stream = real.openai.chat.completions.create(messages=FRANCE, max_tokens=24, stream=True, **GREEDY)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == text
    again = real.openai.chat.completions.create(messages=FRANCE, max_tokens=24, **GREEDY)
    assert again.usage.prompt_tokens_details.cached_tokens > 0


def test_a_seed_repeats_itself_among_others(real: Server):
    ask = {"model": "smollm2", "prompt": "Once upon a time", "max_tokens": 12, "seed": 7, "temperature": 1.0}
    alone = real.openai.completions.create(**ask).choices[0].text
    batch = real.openai.completions.create(**{**ask, "prompt": ["Hello", ask["prompt"], "Goodbye"]})
    assert batch.choices[1].text == alone


def test_logprobs_of_a_prompt_are_those_of_generating_it(real: Server):
    made = real.openai.completions.create(prompt="The sky is", max_tokens=4, logprobs=2, **GREEDY).choices[0]
    ids = real.http.post("/tokenize", json={"prompt": "The sky is" + made.text}).json()["tokens"]
    body = {"prompt": [ids], "max_tokens": 1, "echo": True, "logprobs": 1, **GREEDY}
    read = real.openai.completions.create(**body).choices[0].logprobs
    assert read.token_logprobs[0] is None
    assert read.tokens[-5:-1] == made.logprobs.tokens
    assert read.token_logprobs[-5:-1] == pytest.approx(made.logprobs.token_logprobs, abs=2e-3)
    for logprob, top in zip(read.token_logprobs[-5:-1], read.top_logprobs[-5:-1], strict=True):
        assert logprob == max(top.values())


def test_stop_strings_and_limits_end_a_completion(real: Server):
    cut = real.openai.completions.create(prompt="1, 2, 3, 4,", max_tokens=40, stop=["8"], **GREEDY).choices[0]
    assert (cut.finish_reason, cut.model_extra["stop_reason"]) == ("stop", "8")
    assert cut.text.strip().startswith("5, 6, 7")
    assert "8" not in cut.text


def test_bad_requests_leave_it_serving(real: Server):
    for field, value in (("prompt", [10**6]), ("prompt", [1] * 600), ("logit_bias", {"99999": 1}), ("n", 10**9)):
        with pytest.raises(openai.BadRequestError, match=field):
            real.openai.completions.create(**{"model": "smollm2", "prompt": "x", field: value})
    assert real.openai.completions.create(prompt="x", max_tokens=1, **GREEDY).usage.completion_tokens == 1


def test_more_requests_than_slots_are_all_answered_and_one_that_leaves_frees_its_pages(real: Server):
    def ask() -> None:
        done.append(real.openai.completions.create(prompt="Hi", max_tokens=8, **GREEDY).choices[0].text)

    done: list[str] = []
    with real.stream(prompt="Count: 1 2 3", max_tokens=400, ignore_eos=True, temperature=0.0) as stream:
        threads = [threading.Thread(target=ask) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        next(stream.iter_text())
    assert len(done) == 8
    assert len(set(done)) == 1
    wait_until(lambda: "quire:num_requests_running{" in (text := real.http.get("/metrics").text) and (
        'quire:num_requests_running{engine="0",model_name="smollm2"} 0.0' in text
    ))  # fmt: skip
