"""The offline API: `LLM` generates for a list of prompts, in their order. Names and shapes are vLLM's."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from tqdm import tqdm

from engine.config import make_config
from engine.core import EngineCore, Prompt, Stats
from engine.hosts.calls import Calls
from engine.pooling import MAX_ROWS, POOLINGS
from engine.request import (
    EmbeddingOutput,
    EmbeddingRequestOutput,
    Group,
    RequestError,
    RequestOutput,
    SamplingParams,
    Update,
)
from engine.startup import start
from engine.tokenizer import Tokenizer

Message = Mapping[str, Any]
T = TypeVar("T")


class LLM:
    """A model, ready to generate. Arguments are EngineConfig's settings; an unknown one is a ValueError.

    >>> llm = LLM(model="model.gguf")
    >>> llm.generate("Hello")[0].outputs[0].text

    With num_processes, every process runs the same program, makes the same calls and gets the same results. Only
    `get_tokenizer`, `chat_prompt` and the profiler's calls are a process's own.
    """

    def __init__(self, model: str, **settings: Any):
        config = make_config(model=str(model), **settings)
        self.core = start(config, together=True)
        self._ids = itertools.count()
        self._calls: Calls | None = None
        if isinstance(self.core, EngineCore) and self.core.runner.peers is not None:
            self._calls = Calls(self.core.runner.peers, self.core.runner.execute)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        priority: Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """-> one output for each prompt, in order. Prompts: text, token ids, {"prompt": …} or {"prompt_token_ids": …}.

        Errors: RequestError (a ValueError) that names the field; then nothing has been queued.
        """
        groups = self._prepare(prompts, sampling_params, priority)
        asked = [(g.request_id, g.prompt_token_ids, g.params, g.priority, g.cache_salt) for g in groups]
        return self._everywhere("generate", asked, RequestOutput, lambda: self._generate(groups, use_tqdm))

    def _generate(self, groups: Sequence[Group], use_tqdm: bool) -> list[RequestOutput]:
        wanted = sum(group.params.n for group in groups)
        with tqdm(total=wanted, desc="generating", unit="seq", disable=None if use_tqdm else True) as bar:
            tokens = 0
            for update in self._run(groups):
                tokens += len(update.token_ids)
                if update.finish_reason is not None:
                    elapsed = bar.format_dict["elapsed"]
                    if elapsed:
                        rate = f"{tokens / elapsed:.0f} tokens/s"
                        bar.set_postfix_str(rate + _acceptance(groups), refresh=False)
                    bar.update()
        return [group.output() for group in groups]

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        tools: list[dict[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """-> the answers to one conversation or to a list of them. Errors: as generate.

        `chat_template` is Jinja, or the name of one of the model's templates; `chat_template_kwargs` are further
        variables for it, such as `documents`.
        """
        options = {"chat_template": chat_template, "add_generation_prompt": add_generation_prompt, "tools": tools}
        kwargs = chat_template_kwargs or {}
        if taken := sorted(options.keys() & kwargs.keys()):
            raise RequestError("chat_template_kwargs", f"must not contain {', '.join(taken)}; they have arguments here")
        conversations: Any = [messages] if messages and isinstance(messages[0], Mapping) else messages
        prompts = [self.chat_prompt(conversation, **options, **kwargs) for conversation in conversations]
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm)

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        pooling: str = "last",
        normalize: bool = True,
        use_tqdm: bool = True,
    ) -> list[EmbeddingRequestOutput]:
        """-> one vector for each prompt, in order: hidden states after the final norm, of the "last" token, the "mean"
        of all, or the first ("cls"); with `normalize`, of length 1. Errors: RequestError; then nothing was computed.
        """
        if pooling not in POOLINGS:
            raise RequestError("pooling", f"must be one of {POOLINGS}, got {pooling!r:.80}")
        tokens = [self.core.read_embedding_prompt(prompt) for prompt in _batch(prompts)]
        ids = [str(next(self._ids)) for _ in tokens]
        work = lambda: self._embed(ids, tokens, pooling, normalize, use_tqdm)
        return self._everywhere("embed", (tokens, pooling, normalize), EmbeddingRequestOutput, work)

    def _embed(
        self, ids: Sequence[str], tokens: Sequence[list[int]], pooling: str, normalize: bool, use_tqdm: bool
    ) -> list[EmbeddingRequestOutput]:
        outputs = []
        with tqdm(total=len(tokens), desc="embedding", unit="seq", disable=None if use_tqdm else True) as bar:
            for start in range(0, len(tokens), MAX_ROWS):
                for vector in self.core.embed(tokens[start : start + MAX_ROWS], pooling, normalize):
                    at, output = len(outputs), EmbeddingOutput(vector.tolist())
                    outputs.append(EmbeddingRequestOutput(ids[at], output, tokens[at]))
                    bar.update()
        return outputs

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Iterator[Update]:
        """-> what each step adds to the answer to one prompt, as it comes. Closing the iterator aborts the request.

        Errors: as generate; ValueError in one of several processes, which would have to take each step at one time.
        """
        if self._calls is not None:
            raise ValueError("stream: is for one process, and num_processes are several; use generate, or a server")
        return self._run(self._prepare([prompt], sampling_params, None))

    def chat_prompt(self, messages: Sequence[Message], **options: Any) -> dict[str, Any]:
        """-> a conversation as a prompt for `generate` or `stream`. Options: Tokenizer.apply_chat_template's."""
        tokenizer = self.get_tokenizer()
        text = tokenizer.apply_chat_template(messages, **options)
        return {"prompt": text, "prompt_token_ids": tokenizer.encode(text, add_special_tokens=False)}

    def get_tokenizer(self) -> Tokenizer:
        if self.core.tokenizer is None:
            raise ValueError("tokenizer: this model was loaded without one")
        return self.core.tokenizer

    def reset_prefix_cache(self) -> bool:
        """Forget all cached prefixes. -> whether it was possible: False while requests run."""
        return self._everywhere("reset_prefix_cache", None, bool, lambda: [self.core.reset_prefix_cache()])[0]

    def start_profile(self) -> None:
        """Begin a profiler trace in the folder of the setting profile_dir. Errors: RequestError."""
        self.core.start_profile()

    def stop_profile(self) -> None:
        """Write the trace. Errors: RequestError, if none was begun."""
        self.core.stop_profile()

    def get_metrics(self) -> Stats:
        return self._everywhere("get_metrics", None, Stats, lambda: [self.core.stats()])[0]

    def _everywhere(self, name: str, arguments: Any, kind: type[T], work: Callable[[], list[T]]) -> list[T]:
        """-> what `work` makes here or, of several processes, in the first."""
        return work() if self._calls is None else self._calls.call(name, arguments, kind, work)

    def _prepare(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None,
        priority: Sequence[int] | None,
    ) -> list[Group]:
        batch = _batch(prompts)
        count = len(batch)
        each = [params or SamplingParams()] * count if params is None or isinstance(params, SamplingParams) else params
        for name, values in (("sampling_params", each), ("priority", priority or [0] * count)):
            if len(values) != count:
                raise ValueError(f"{name}: {len(values)} for {count} prompts")
        return [
            self.core.prepare(str(next(self._ids)), prompt, each[i], priority=priority[i] if priority else 0)
            for i, prompt in enumerate(batch)
        ]

    def _run(self, groups: Sequence[Group]) -> Iterator[Update]:
        """Queue the groups and step until they are done; whatever is left when the caller stops is aborted."""
        try:
            for group in groups:
                self.core.add(group)
            left = sum(group.params.n for group in groups)
            while left:
                for update in self.core.step():
                    left -= update.finish_reason is not None
                    yield update
        finally:
            for group in groups:
                if not group.finished():
                    self.core.abort(group.request_id)


def _acceptance(groups: Sequence[Group]) -> str:
    """-> what became of these requests' drafts, for the progress bar; nothing where there were none."""
    drafted = sum(group.metrics.num_draft_tokens for group in groups)
    kept = sum(group.metrics.num_accepted_tokens for group in groups)
    return f", {kept} of {drafted} drafts right" if drafted else ""


def _batch(prompts: Prompt | Sequence[Prompt]) -> Sequence[Any]:
    """-> the prompts as a list, also if there is one alone."""
    one = isinstance(prompts, (str, Mapping)) or (len(prompts) > 0 and isinstance(prompts[0], int))
    return [prompts] if one else prompts  # type: ignore[return-value]
