"""/v1/chat/completions, through a real connection."""

from __future__ import annotations

import threading

import pytest

from tests.engine.server.conftest import Server, events, serving
from tests.engine.server.fake_core import FakeCore, make_tokenizer

HELLO = [{"role": "user", "content": "hello"}]
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


def prompt_of(server: Server) -> str:
    """-> the text that the engine was last asked to go on with."""
    return server.core.tokenizer.decode(server.core.prepared[-1].prompt_token_ids)


def chat(server: Server, messages=HELLO, **fields):
    return server.http.post("/v1/chat/completions", json={"messages": messages, **fields})


def test_the_openai_client_gets_a_message_and_usage(server: Server):
    answer = server.openai.chat.completions.create(model="fake", messages=HELLO, max_completion_tokens=4, n=2)
    assert [(c.index, c.message.role, c.message.content) for c in answer.choices] == [
        (0, "assistant", "abcd"),
        (1, "assistant", "bcde"),
    ]
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 8
    assert prompt_of(server) == "<user>hello<assistant>"


def test_without_a_limit_the_model_may_go_on(server: Server):
    chat(server, stop=["c"])
    assert server.core.prepared[-1].params.max_tokens is None


def test_the_template_gets_tools_and_arguments(server: Server):
    chat(server, tools=[WEATHER], chat_template_kwargs={"mood": "glad"}, add_generation_prompt=False, max_tokens=1)
    assert prompt_of(server) == "[weather]<user>hello(glad)"
    chat(server, tools=[WEATHER], tool_choice="none", max_tokens=1)
    assert prompt_of(server) == "<user>hello<assistant>"


def test_the_template_gets_documents(server: Server):
    sea = [{"title": "Sea", "text": "wet"}]
    chat(server, documents=sea, max_tokens=1)
    assert prompt_of(server) == "<user>helloSea<assistant>"
    chat(server, chat_template_kwargs={"documents": sea}, max_tokens=1)
    assert prompt_of(server) == "<user>helloSea<assistant>"
    twice = chat(server, documents=sea, chat_template_kwargs={"documents": sea})
    assert (twice.status_code, twice.json()["error"]["param"]) == (400, "chat_template_kwargs")


CALL = '{"name": "weather", "arguments": {"city": "Ulm"}}'
ANSWER = f"I look. <tool_call>{CALL}</tool_call>\n<tool_call>{CALL}</tool_call>\x03"  # the last character ends it


def saying(text: str) -> FakeCore:
    core = FakeCore()
    core.alphabet = core.tokenizer.encode(text)
    return core


def test_tool_calls_are_told_from_text_where_the_server_has_a_parser():
    with serving(lambda: saying(ANSWER), tool_call_parser="hermes") as server:
        ask = lambda **fields: server.openai.chat.completions.create(model="fake", messages=HELLO, **fields)
        (choice,) = ask(tools=[WEATHER], stop=["\x03"]).choices
        assert (choice.message.content, choice.finish_reason) == ("I look.\x03", "tool_calls")
        first, second = choice.message.tool_calls
        assert (first.type, first.function.name, first.function.arguments) == (
            "function",
            "weather",
            '{"city": "Ulm"}',
        )
        assert first.id != second.id
        cut = ask(tools=[WEATHER], max_tokens=len(ANSWER.encode()) - 1).choices[0]
        assert (cut.message.content, len(cut.message.tool_calls), cut.finish_reason) == ("I look.", 2, "length")
        assert ask(max_tokens=20).choices[0].message.content == ANSWER[:20]
        assert ask(tools=[WEATHER], tool_choice="none", max_tokens=20).choices[0].message.tool_calls is None


def test_a_stream_tells_each_tool_call_when_it_is_complete():
    with serving(lambda: saying(ANSWER), tool_call_parser="hermes") as server:
        stream = server.openai.chat.completions.create(
            model="fake", messages=HELLO, tools=[WEATHER], stop=["\x03"], stream=True
        )
        choices = [chunk.choices[0] for chunk in stream]
    calls = [call for choice in choices for call in choice.delta.tool_calls or ()]
    assert "".join(choice.delta.content or "" for choice in choices) == "I look.\x03"
    assert [(call.index, call.function.name, call.function.arguments) for call in calls] == [
        (0, "weather", '{"city": "Ulm"}'),
        (1, "weather", '{"city": "Ulm"}'),
    ]
    assert choices[-1].finish_reason == "tool_calls"


def test_an_answer_of_calls_alone_has_no_content_and_marks_that_are_special_tokens_are_seen():
    with serving(lambda: saying(f"[TOOL_CALLS][{CALL}]"), tool_call_parser="mistral") as server:
        answer = chat(server, tools=[WEATHER], max_tokens=len(f"[TOOL_CALLS][{CALL}]".encode())).json()
        assert answer["choices"][0]["message"]["content"] is None
        assert len(answer["choices"][0]["message"]["tool_calls"]) == 1
        assert server.core.prepared[-1].params.skip_special_tokens is False
        assert "tool_calls" not in chat(server, max_tokens=5).json()["choices"][0]["message"]
        assert server.core.prepared[-1].params.skip_special_tokens is True


def test_a_conversation_with_tool_calls_can_be_sent_back(server: Server):
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Ulm"}'}}
    empty = {"refusal": None, "annotations": [], "audio": None, "function_call": None}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "is it"}, {"type": "text", "text": "raining?"}]},
        {"role": "assistant", "content": None, "tool_calls": [call], **empty},
        {"role": "tool", "content": "yes", "tool_call_id": "1"},
    ]
    assert chat(server, messages, max_tokens=1).status_code == 200
    assert prompt_of(server) == "<user>is it\nraining?<assistant>Ulm<tool>yes<assistant>"


def test_what_the_template_refuses_is_told(server: Server):
    refused = chat(server, [{"role": "forbidden", "content": ""}])
    assert refused.status_code == 400
    assert "no such role" in refused.json()["error"]["message"]


def test_logprobs_name_bytes_and_the_most_likely(server: Server):
    answer = server.openai.chat.completions.create(
        model="fake", messages=HELLO, max_tokens=2, logprobs=True, top_logprobs=2
    )
    first, second = answer.choices[0].logprobs.content
    assert (first.token, first.logprob, first.bytes) == ("a", -0.5, [97])
    assert [(top.token, top.logprob) for top in second.top_logprobs] == [("b", -0.5), ("c", -2.0)]
    plain = chat(server, max_tokens=1, logprobs=True).json()["choices"][0]["logprobs"]["content"][0]
    assert plain["top_logprobs"] == []
    odd = chat(server, [{"role": "user", "content": "INF"}], max_tokens=1, logprobs=True, top_logprobs=1).json()
    assert odd["choices"][0]["logprobs"]["content"][0]["top_logprobs"][0]["logprob"] == -9999.0


def test_a_stream_begins_with_the_role_and_ends_with_usage(server: Server):
    stream = list(
        server.openai.chat.completions.create(
            model="fake",
            messages=HELLO,
            max_tokens=3,
            n=2,
            logprobs=True,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    for index, text in enumerate(["abc", "bcd"]):
        mine = [c.choices[0] for c in stream if c.choices and c.choices[0].index == index]
        assert [c.delta.role for c in mine] == ["assistant", None, None, None]
        assert "".join(c.delta.content or "" for c in mine) == text
        assert "".join(entry.token for c in mine if c.logprobs for entry in c.logprobs.content) == text
        assert [c.finish_reason for c in mine] == [None, None, None, "length"]
    assert stream[-1].usage.completion_tokens == 6


def test_a_failed_stream_tells_why(server: Server):
    answer = chat(server, [{"role": "user", "content": "NAN"}], stream=True)
    if answer.status_code == 500:  # it failed before its stream began
        assert "not finite" in answer.json()["error"]["message"]
        return
    *_, error, done = events(answer.text)
    assert answer.status_code == 200 and "not finite" in error["error"]["message"]
    assert done == "[DONE]"


@pytest.mark.parametrize("reserved", ["messages", "self", "chat_template", "tokenize"])
def test_arguments_for_the_template_cannot_replace_its_inputs(server: Server, reserved):
    refused = chat(server, chat_template_kwargs={reserved: "x"})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "chat_template_kwargs")


def test_a_template_that_takes_too_long_is_given_up():
    release = threading.Event()
    tokenizer = make_tokenizer()
    tokenizer.apply_chat_template = lambda *args, **kwargs: release.wait(20) and "late"
    with serving(lambda: FakeCore(tokenizer=tokenizer), template_timeout=0.2) as server:
        refused = chat(server)
        release.set()
        assert refused.status_code == 400
        assert "0.2 s" in refused.json()["error"]["message"]
        assert server.is_serving()


def test_answers_stay_whole_when_other_dialects_share_the_engine(server: Server):
    texts = {}

    def ask(i: int) -> None:
        path = "/v1/chat/completions" if i % 2 else "/v1/completions"
        body = {"messages": HELLO} if i % 2 else {"prompt": "x"}
        texts[i] = server.http.post(path, json={**body, "max_tokens": 5}).json()["usage"]["completion_tokens"]

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(texts.values()) == [5] * 20
