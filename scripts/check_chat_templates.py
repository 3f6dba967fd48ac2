"""Check that real models' chat templates give the same prompts here as in transformers. Exits with 1 on a difference.

    python scripts/check_chat_templates.py

The templates are those that llama.cpp keeps for its own tests; see check_tokenizers.py for where they come from. A
template that both refuse counts as equal, since which chats a template takes is its own affair; the table counts them.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path
from typing import Any

import tokenizers
from check_tokenizers import fetch_goldens

from engine.request import RequestError
from engine.tokenizer import Tokenizer
from engine.weights.default_model import cache_folder

ARGUMENTS = {"city": "Köln", "days": 2}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "Where"}, "days": {"type": "integer"}},
            "required": ["city"],
        },
    },
}
SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "Hello <b>"}
ASSISTANT = {"role": "assistant", "content": "Hi."}
RESULT = {"role": "tool", "content": "rain", "tool_call_id": "call00001", "name": "weather"}


def calling(arguments: Any) -> dict[str, Any]:
    function = {"name": "weather", "arguments": arguments}
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "call00001", "type": "function", "function": function}],
    }


def chats(arguments: Any) -> dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]] | None]]:
    return {
        "plain": ([USER], None),
        "system": ([SYSTEM, USER, ASSISTANT, USER], None),
        "tools": ([USER], [TOOL]),
        "call": ([USER, calling(arguments), RESULT], [TOOL]),
        "thought": ([USER, {**ASSISTANT, "reasoning_content": "hmm"}, USER], None),
    }


def ours(template: str, chat: str, generate: bool) -> str | None:
    """-> the prompt; None for a chat that the template refuses. Arguments of calls are JSON, as OpenAI's are."""
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer = Tokenizer(backend, eos_token_ids=(), bos_token_id=None, chat_template=template, special_tokens=names)
    messages, tools = chats(json.dumps(ARGUMENTS))[chat]
    try:
        return tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=generate)
    except RequestError:
        return None


def theirs(template: str, chat: str, generate: bool) -> str | None:
    """-> the same by transformers, which wants the arguments of calls as objects."""
    from transformers.utils.chat_template_utils import render_jinja_template

    messages, tools = chats(ARGUMENTS)[chat]
    options: dict[str, Any] = {"tools": tools, "chat_template": template, "add_generation_prompt": generate}
    try:
        prompts, _ = render_jinja_template([messages], **options, bos_token="<s>", eos_token="</s>")
    except Exception:  # a template may raise anything
        return None
    return prompts[0]


def main() -> None:
    parser = argparse.ArgumentParser(description="Check chat templates against transformers.")
    parser.add_argument("--folder", type=Path, default=cache_folder().parent / "tokenizers", help="keeps the files")
    args = parser.parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    count = refused = different = 0
    files = sorted(fetch_goldens(args.folder).glob("*.jinja"))
    for file in files:
        template = file.read_text()
        for chat in chats(ARGUMENTS):
            for generate in (True, False):
                prompt = ours(template, chat, generate)
                count += 1
                refused += prompt is None
                if prompt != theirs(template, chat, generate):
                    different += 1
                    print(f"DIFFERENT {file.name}, chat {chat!r}, add_generation_prompt={generate}")
    print(f"{len(files)} templates, {count} prompts: {different} different, {refused} refused by both")
    sys.exit(different > 0 or not files)


if __name__ == "__main__":
    main()
