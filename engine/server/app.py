"""The routes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from importlib.metadata import version

from fastapi import FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel

from ..async_engine import AsyncEngine, DeadError
from ..engine import InferenceEngine
from . import responses as out
from .chat import complete_chat
from .completions import complete
from .description import describe, events
from .errors import APIError, ErrorBody, add_handlers, documented
from .events import ClientLeft
from .generate import generate, generate_stream
from .guard import Guard
from .metrics import Metrics
from .page_files import page_router
from .protocol import ChatRequest, CompletionRequest, DetokenizeRequest, GenerateRequest, TokenizeRequest
from .served_model import ServedModel
from .view import view_body

ASKED = documented(400, 404, 413, 429, 503)
"""What every request with a body may be answered with."""


def make_app(
    engine: InferenceEngine,
    names: Sequence[str],
    *,
    api_keys: Sequence[str] = (),
    allowed_origins: Sequence[str] = (),
    max_waiting: int = 1024,
) -> FastAPI:
    """The server of one engine, which it runs from its start-up to its shutdown; `state.engine` is its AsyncEngine.

    names:            what clients may call the model
    api_keys:         one must come with every request but those that Guard names; without any, none is asked for
    allowed_origins:  whose web pages may call it from a browser; "*" is all
    max_waiting:      requests taken in beyond those that can run at once
    """
    metrics = Metrics(names[0], max_model_len=engine.max_model_len, cache=_cache_config(engine))
    running = AsyncEngine(engine, max_waiting=max_waiting, listener=metrics.record)
    served = ServedModel(running, names)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        running.start()
        yield
        await running.stop()

    app = FastAPI(
        title="micro-vllm",
        version=version("micro-vllm"),
        lifespan=lifespan,
        responses=documented(401, 500),
    )
    app.state.engine = running
    app.add_middleware(Guard, api_keys=api_keys)
    if allowed_origins:  # around the guard: a browser asks first, without the key
        app.add_middleware(CORSMiddleware, allow_origins=allowed_origins, allow_methods=["*"], allow_headers=["*"])
    add_handlers(app)

    @app.exception_handler(ClientLeft)
    async def client_left(request: Request, error: ClientLeft) -> Response:
        return Response(status_code=499)  # nobody reads it; nginx's number for this

    @app.post(
        "/v1/completions",
        response_model=out.Completion,
        responses={**ASKED, 200: events("With `stream`, an event a token.", out.Completion, ErrorBody)},
    )
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """OpenAI's completions."""
        return _answer(await complete(body, served, request.receive))

    @app.post(
        "/v1/chat/completions",
        response_model=out.ChatCompletion,
        responses={**ASKED, 200: events("With `stream`, an event a token.", out.ChatChunk, ErrorBody)},
    )
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """OpenAI's chat completions."""
        return _answer(await complete_chat(body, served, request.receive))

    @app.post("/generate", response_model=out.Generated | out.GeneratedList, responses=ASKED)
    async def generate_whole(body: GenerateRequest, request: Request) -> Response:
        """A completion with the engine's own defaults: greedy, 256 tokens. Several `prompts` are answered in a list."""
        return _answer(await generate(body, served, request.receive))

    @app.post(
        "/generate_stream",
        response_class=Response,
        responses={**ASKED, 200: events("An event a token.", out.GeneratedToken, out.GeneratedEnd, ErrorBody)},
    )
    async def generate_events(body: GenerateRequest) -> Response:
        """The same as server-sent events: one a token, each prompt's last one with the usage, then [DONE]."""
        return await generate_stream(body, served)

    @app.get("/v1/models")
    async def models() -> out.ModelList:
        return out.ModelList(object="list", data=[_card(name) for name in names])

    @app.get("/v1/models/{name:path}", responses=documented(404))
    async def model(name: str) -> out.ModelCard:
        served.check_name(name)
        return _card(name)

    def _card(name: str) -> out.ModelCard:
        return out.ModelCard(
            id=name, object="model", created=served.created, owned_by="micro-vllm", max_model_len=engine.max_model_len
        )

    @app.post("/tokenize", responses=documented(400, 404, 413))
    async def tokenize(body: TokenizeRequest) -> out.Tokenized:
        served.check_name(body.model)
        prompt = body.text_or_chat()
        try:
            tokens = await running.encode(prompt, add_special_tokens=body.add_special_tokens is not False)
        except ValueError as error:
            raise APIError.of(error, "prompt" if isinstance(prompt, str) else "messages") from None
        return out.Tokenized(count=len(tokens), max_model_len=engine.max_model_len, tokens=tokens)

    @app.post("/detokenize", responses=documented(400, 404, 413))
    async def detokenize(body: DetokenizeRequest) -> out.Detokenized:
        body.refuse_unsupported()
        served.check_name(body.model)
        try:
            return out.Detokenized(prompt=await running.decode(body.tokens))
        except ValueError as error:
            raise APIError.of(error, "tokens") from None

    @app.get("/tokenizer_info")
    async def tokenizer_info() -> out.TokenizerInfo:
        """The special tokens' texts: with them and /tokenize, lm-eval needs no tokenizer of its own."""
        tokenizer = engine.tokenizer
        if tokenizer is None:
            return out.TokenizerInfo(bos_token=None, eos_token=None, pad_token=None)
        return out.TokenizerInfo(**tokenizer.special_tokens)

    @app.get("/version")
    async def show_version() -> out.Version:
        return out.Version(version=version("micro-vllm"))

    @app.get("/health", response_class=PlainTextResponse, responses=documented(503))
    async def health() -> str:
        if running.error is not None:
            raise APIError.of(running.error)
        return ""

    @app.get("/metrics", response_class=PlainTextResponse)
    async def show_metrics() -> Response:
        return Response(metrics.text(running.stats), media_type=CONTENT_TYPE_LATEST)

    @app.get("/view", response_model=out.EngineView, responses=documented(503))
    async def view() -> Response:
        """The engine between two steps: its requests and, block by block, its cache."""
        try:
            body = await asyncio.to_thread(view_body, await running.snapshot())
        except DeadError as error:
            raise APIError.of(error) from None
        return Response(body.model_dump_json(), media_type="application/json", headers={"Cache-Control": "no-store"})

    app.include_router(page_router())
    describe(app, names, [ErrorBody, out.ChatChunk, out.GeneratedToken, out.GeneratedEnd], keys=bool(api_keys))
    return app


def _cache_config(engine: InferenceEngine) -> dict[str, object]:
    """Under vLLM's names."""
    config, cache = engine.config, engine.cache_manager
    return {
        "block_size": cache.block_size,
        "num_gpu_blocks": cache.num_blocks,
        "gpu_memory_utilization": config.gpu_memory_utilization,
        "enable_prefix_caching": config.enable_prefix_caching,
    }


def _answer(answer: Response | BaseModel) -> Response:
    """A body that was just made is not validated again."""
    return answer if isinstance(answer, Response) else Response(answer.model_dump_json(), media_type="application/json")
