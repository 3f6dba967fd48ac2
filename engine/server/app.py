"""The routes: a Starlette application over one driver. Handlers only decode, ask the driver, and answer."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import importlib.resources
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
import numpy as np
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

import engine
from engine.request import Group, NoRoom, RequestError
from engine.server import chat, completions, embeddings, wire
from engine.server.answer import answer
from engine.server.connection import BodyReader
from engine.server.driver import Driver
from engine.server.errors import RETRY_SOON, ApiError
from engine.server.metrics import Metrics
from engine.server.options import ServerOptions
from engine.server.prompts import encode, need_tokenizer
from engine.server.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    TokenizeChatRequest,
    TokenizeRequest,
    decode,
    template_arguments,
)

if TYPE_CHECKING:
    from engine.replicas import Engine

T = TypeVar("T")


def make_app(api: Api) -> Starlette:
    """-> the application. It answers from the start, with 503 until the driver's core is loaded."""
    routes = [
        Route("/", api.page, methods=["GET"]),
        Route("/health", api.health, methods=["GET"]),
        Route("/version", api.version, methods=["GET"]),
        Route("/metrics", api.metrics_text, methods=["GET"]),
        Route("/v1/models", api.models, methods=["GET"]),
        Route("/v1/models/{name:path}", api.model, methods=["GET"]),
        Route("/v1/completions", api.completions, methods=["POST"]),
        Route("/v1/chat/completions", api.chat_completions, methods=["POST"]),
        Route("/v1/embeddings", api.embeddings, methods=["POST"]),
        Route("/tokenize", api.tokenize, methods=["POST"]),
        Route("/detokenize", api.detokenize, methods=["POST"]),
        Route("/tokenizer_info", api.tokenizer_info, methods=["GET"]),
        Route("/reset_prefix_cache", api.reset_prefix_cache, methods=["POST"]),
        Route("/start_profile", api.start_profile, methods=["POST"]),
        Route("/stop_profile", api.stop_profile, methods=["POST"]),
    ]
    return Starlette(
        routes=routes,
        middleware=[Middleware(RequireKey, keys=api.options.api_key)] if api.options.api_key else [],
        exception_handlers={
            ApiError: _answer_error,
            RequestError: _answer_error,
            HTTPException: _answer_error,
            ClientDisconnect: _answer_error,
            MemoryError: _answer_error,
            Exception: _answer_error,
        },
    )


class RequireKey:
    """Middleware: 401 for whoever lacks an API key. Only /health is open."""

    def __init__(self, app: ASGIApp, keys: tuple[str, ...]):
        self.app = app
        self.digests = [_digest(key.encode()) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] == "/health" or self._opens(scope):
            await self.app(scope, receive, send)
            return
        error = ApiError(
            401,
            "give a valid API key: Authorization: Bearer KEY",
            code="invalid_api_key",
            headers={"www-authenticate": "Bearer"},
        )
        await _refusal(error)(scope, receive, send)

    def _opens(self, scope: Scope) -> bool:
        """Compares digests, every one of them, so that the time taken tells nothing about the keys."""
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        scheme, _, key = given[0].partition(b" ") if len(given) == 1 else (b"", b"", b"")
        digest = _digest(key.strip())
        matches = [hmac.compare_digest(digest, known) for known in self.digests]
        return scheme.lower() == b"bearer" and any(matches)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _refusal(error: ApiError) -> Response:
    return Response(error.body(), error.status, error.headers, media_type="application/json")


async def _answer_error(request: Request, error: Exception) -> Response:
    return _refusal(_as_api_error(request, error))


def _as_api_error(request: Request, error: Exception) -> ApiError:
    path = request.url.path
    match error:
        case ApiError():
            return error
        case RequestError():
            return ApiError(400, str(error), param=error.field)
        case HTTPException(status_code=404):
            return ApiError(404, f"there is no {path}", headers=error.headers)
        case HTTPException(status_code=405):
            return ApiError(405, f"{request.method} is not for {path}", headers=error.headers)
        case HTTPException():
            return ApiError(error.status_code, error.detail, headers=error.headers)
        case ClientDisconnect():
            return ApiError(499, "the client has gone")  # for the log: nobody is there to read it
        case MemoryError():
            return ApiError(503, "out of memory", code="out_of_memory")
    return ApiError(500, f"internal error: {type(error).__name__}")


def _json(value: Any) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")


class Api:
    """The handlers, and the threads for what would hold up the event loop."""

    def __init__(self, driver: Driver, metrics: Metrics, options: ServerOptions):
        self.driver = driver
        self.metrics = metrics
        self.options = options
        self.bodies = BodyReader(options)
        self.pool = ThreadPoolExecutor(4, "tokenizer")
        self.templates = ThreadPoolExecutor(4, "template")
        self.started = int(time.time())

    def close(self) -> None:
        """Let the threads end when they have done what they are at."""
        self.pool.shutdown(wait=False, cancel_futures=True)
        self.templates.shutdown(wait=False, cancel_futures=True)

    # -- generation

    async def completions(self, request: Request) -> Response:
        core = self.driver.ready()
        body = decode(CompletionRequest, await self.bodies.read(request))
        self._check(core, body)
        head = wire.new_head("cmpl-", body.model or self.options.served_model_name[0])
        groups = await self._in_pool(lambda: completions.prepare(core, body, head.id))
        form = completions.CompletionFormat(head, body, groups, core)
        return await self._answer(request, body, groups, form)

    async def chat_completions(self, request: Request) -> Response:
        core = self.driver.ready()
        body = decode(ChatRequest, await self.bodies.read(request))
        self._check(core, body)
        head = wire.new_head("chatcmpl-", body.model or self.options.served_model_name[0])
        body.sampling_params()  # refuse what is cheap to refuse before the template runs
        prompt = await self._render(core, template_arguments(body))
        parser = chat.tool_call_parser(body, self.options.tool_call_parser)
        group = await self._in_pool(lambda: chat.prepare(core, body, prompt, head.id, parser))
        return await self._answer(request, body, [group], chat.ChatFormat(head, body, group, core, parser))

    async def embeddings(self, request: Request) -> Response:
        core = self.driver.ready()
        body = decode(EmbeddingRequest, await self.bodies.read(request))
        self._check_model(body.model)
        prompts = await self._in_pool(lambda: embeddings.prepare(core, body))
        pooling, normalize = body.pooling or "last", body.normalize is not False
        vectors: list[np.ndarray] = []
        for portion in embeddings.portions(prompts, core.resolved.max_num_batched_tokens):
            if await request.is_disconnected():
                raise ClientDisconnect
            vectors.extend(await self._embed(portion, pooling, normalize))
        model = body.model or self.options.served_model_name[0]
        return _json(embeddings.answer(body, model, vectors, sum(map(len, prompts))))

    async def _embed(self, prompts: Sequence[list[int]], pooling: str, normalize: bool) -> Iterable[np.ndarray]:
        """-> a vector for each prompt; waits while running requests hold the pages. Errors: ApiError."""

        def embed(core: Engine) -> np.ndarray | Exception:
            try:
                return core.embed(prompts, pooling, normalize)
            except (NoRoom, ValueError) as error:  # what is raised there ends the engine
                return error

        deadline = time.monotonic() + self.options.embedding_timeout
        while isinstance(found := await self.driver.call(embed), NoRoom):
            if time.monotonic() > deadline:
                raise ApiError(503, "the KV cache is full; try again later", code="no_room", headers=RETRY_SOON)
            await asyncio.sleep(0.02)
        if isinstance(found, Exception):
            raise ApiError(500, str(found))
        return found

    async def _answer(
        self, request: Request, body: CompletionRequest | ChatRequest, groups: list[Group], form: wire.Format
    ) -> Response:
        include_usage = body.stream_options and body.stream_options.include_usage
        return await answer(
            request, self.driver, groups, form, pool=self.pool, stream=body.stream, include_usage=include_usage
        )

    def _check(self, core: Engine, body: CompletionRequest | ChatRequest) -> None:
        self._check_model(body.model)
        if body.priority and core.config.scheduling_policy != "priority":
            raise RequestError("priority", "needs a server with --scheduling-policy priority")

    def _check_model(self, name: str | None) -> None:
        if name is not None and name not in self.options.served_model_name:
            known = ", ".join(self.options.served_model_name)
            message = f"model: there is no {name[:200]!r} here; served is {known}"
            raise ApiError(404, message, param="model", code="model_not_found")

    async def _render(self, core: Engine, arguments: dict[str, Any]) -> str:
        """-> the chat as a prompt. Errors: RequestError, also when the template takes too long."""
        tokenizer = need_tokenizer(core)
        loop = asyncio.get_running_loop()
        started = asyncio.Event()

        def render() -> str:
            loop.call_soon_threadsafe(started.set)
            return tokenizer.apply_chat_template(**arguments)

        future = loop.run_in_executor(self.templates, render)
        await started.wait()
        try:
            async with asyncio.timeout(self.options.template_timeout):
                return await future
        except TimeoutError:
            limit = self.options.template_timeout
            raise RequestError("messages", f"the chat template took more than {limit:g} s") from None

    async def _in_pool(self, function: Callable[[], T]) -> T:
        """-> function(), called in a thread. Errors: its own; ApiError 400 for a ValueError, the request's fault."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self.pool, function)
        except RequestError:
            raise
        except ValueError as error:
            raise ApiError(400, str(error)) from error

    # -- the tokenizer

    async def tokenize(self, request: Request) -> Response:
        core = self.driver.ready()
        data = await self.bodies.read(request)
        is_chat = "messages" in decode(dict[str, msgspec.Raw], data)
        body = decode(TokenizeChatRequest if is_chat else TokenizeRequest, data)
        self._check_model(body.model)
        if isinstance(body, TokenizeChatRequest):
            text = await self._render(core, template_arguments(body))
        else:
            text = body.prompt
        add_special_tokens = body.add_special_tokens
        tokens = await self._in_pool(lambda: encode(core, text, add_special_tokens=add_special_tokens))
        backend = need_tokenizer(core).backend
        pieces = [backend.id_to_token(token) for token in tokens] if body.return_token_strs else None
        counted = {"count": len(tokens), "max_model_len": core.resolved.max_model_len, "tokens": tokens}
        return _json({**counted, "token_strs": pieces})

    async def detokenize(self, request: Request) -> Response:
        core = self.driver.ready()
        body = decode(DetokenizeRequest, await self.bodies.read(request))
        self._check_model(body.model)
        tokenizer = need_tokenizer(core)
        size = tokenizer.vocab_size
        for token in body.tokens:
            if not 0 <= token < size:
                raise RequestError("tokens", f"{token} is not in the vocabulary of {size}")
        text = await self._in_pool(lambda: tokenizer.decode(body.tokens, skip_special_tokens=False))
        return _json({"prompt": text})

    async def tokenizer_info(self, request: Request) -> Response:
        core = self.driver.ready()
        tokenizer = need_tokenizer(core)
        names = {"bos_token": None, "eos_token": None, "pad_token": None, **tokenizer.special_tokens}
        about = {"chat_template": tokenizer.chat_template, "model_max_length": core.resolved.max_model_len}
        return _json({"tokenizer_class": "Tokenizer", **names, **about})

    # -- about the server

    async def models(self, request: Request) -> Response:
        core = self.driver.ready()
        return _json({"object": "list", "data": [self._card(core, name) for name in self.options.served_model_name]})

    async def model(self, request: Request) -> Response:
        core = self.driver.ready()
        self._check_model(request.path_params["name"])
        return _json(self._card(core, request.path_params["name"]))

    def _card(self, core: Engine, name: str) -> dict[str, Any]:
        about = {"id": name, "object": "model", "created": self.started, "owned_by": "quire"}
        return {**about, "root": core.config.model, "parent": None, "max_model_len": core.resolved.max_model_len}

    async def health(self, request: Request) -> Response:
        self.driver.ready()
        return _json({"status": "ok"})

    async def version(self, request: Request) -> Response:
        return _json({"version": engine.__version__})

    async def metrics_text(self, request: Request) -> Response:
        self.driver.ready()
        return Response(self.metrics.expose(), headers={"content-type": CONTENT_TYPE_LATEST})

    async def reset_prefix_cache(self, request: Request) -> Response:
        if not await self.driver.call(lambda core: core.reset_prefix_cache()):
            raise ApiError(409, "pages are in use: try again when no request runs", code="pages_in_use")
        return _json({"status": "ok"})

    async def start_profile(self, request: Request) -> Response:
        return await self._profile(lambda core: core.start_profile())

    async def stop_profile(self, request: Request) -> Response:
        return await self._profile(lambda core: core.stop_profile())

    async def _profile(self, function: Callable[[Engine], None]) -> Response:
        def run(core: Engine) -> RequestError | None:
            try:
                function(core)
            except RequestError as error:  # what is raised there ends the engine
                return error
            return None

        if (error := await self.driver.call(run)) is not None:
            raise error
        return _json({"status": "ok"})

    async def page(self, request: Request) -> Response:
        html = importlib.resources.files("engine.server").joinpath("page.html").read_bytes()
        return Response(html, media_type="text/html", headers={"content-security-policy": _PAGE_POLICY})


_PAGE_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"
