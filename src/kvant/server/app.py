"""The routes. Each is a line: what is done is in the module that it names."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, Response

from kvant import __version__
from kvant.server import schema
from kvant.server.chat import chat
from kvant.server.completions import complete
from kvant.server.errors import ApiError, add_handlers
from kvant.server.gate import Gate, Guard
from kvant.server.generate import detokenize, generate, tokenize
from kvant.server.service import Service

if TYPE_CHECKING:
    from starlette.types import ASGIApp

__all__ = ["create_app"]

_PAGE = Path(str(files("kvant.server"))) / "page"
_PAGE_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}
_EVENTS = {"text/event-stream": {"schema": {"description": "with stream=true: events with pieces"}}}
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": schema.ErrorAnswer, "description": text}
    for status, text in {
        400: "a value is wrong or not supported",
        401: "the API key is missing or wrong",
        404: "the model is not served here",
        408: "the body came too slowly",
        413: "the body is too large",
        429: "the queue is full; Retry-After has seconds",
        500: "the request or the engine failed",
        503: "the server is starting or shutting down",
    }.items()
}


_REPORT_ERRORS: dict[int | str, dict[str, Any]] = {
    status: _ERRORS[status] for status in (401, 408, 413, 500)
}
_TEXT = {"schema": {"type": "string"}}
_METRICS = {"content": {"text/plain": _TEXT, "application/openmetrics-text": _TEXT}}


def _answers(model: type[Any]) -> dict[int | str, dict[str, Any]]:
    return {200: {"model": model, "content": _EVENTS}, **_ERRORS}


def create_app(service: Service) -> Gate:
    """The application of a service, which it starts and closes."""

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await service.close()

    app = FastAPI(
        title="kvant",
        version=__version__,
        summary="LLM inference with a quantized KV cache, behind OpenAI's API",
        lifespan=life,
    )
    add_handlers(app)
    _add_openai(app, service)
    _add_tokens(app, service)
    _add_reports(app, service)
    _add_page(app)
    _document(app, with_keys=bool(service.config.api_keys))
    guarded: ASGIApp = Guard(app, service.config, service.metrics)
    if service.config.allow_origins:  # outside, so that pages may read what the guard says
        guarded = CORSMiddleware(
            guarded,
            allow_origins=list(service.config.allow_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["X-Request-Id", "Retry-After"],
        )
    return Gate(guarded, service.config, service.metrics)


def _add_openai(app: FastAPI, service: Service) -> None:
    @app.post(
        "/v1/chat/completions",
        tags=["OpenAI"],
        response_model=None,
        responses=_answers(schema.ChatCompletion),
    )
    async def create_chat_completion(body: schema.ChatRequest, http: Request) -> Response:
        """Answer a conversation."""
        return await chat(service, body, http)

    @app.post(
        "/v1/completions",
        tags=["OpenAI"],
        response_model=None,
        responses=_answers(schema.Completion),
    )
    async def create_completion(body: schema.CompletionRequest, http: Request) -> Response:
        """Continue prompts as they are."""
        return await complete(service, body, http)

    def model() -> dict[str, Any]:
        facts = service.facts
        return {
            "id": service.model_name,
            "object": "model",
            "created": service.created,
            "owned_by": "kvant",
            "max_model_len": facts.session_len if facts else None,
        }

    @app.get("/v1/models", tags=["OpenAI"], response_model=schema.Models, responses=_ERRORS)
    async def list_models() -> dict[str, Any]:
        """The model that is served."""
        return {"object": "list", "data": [model()]}

    # A model's name may have slashes.
    @app.get(
        "/v1/models/{name:path}", tags=["OpenAI"], response_model=schema.Model, responses=_ERRORS
    )
    async def retrieve_model(name: str) -> dict[str, Any]:
        """The model of this name."""
        service.check_model(name)
        return model()


def _add_tokens(app: FastAPI, service: Service) -> None:
    @app.post(
        "/generate", tags=["tokens"], response_model=None, responses=_answers(schema.Generated)
    )
    async def generate_tokens(body: schema.GenerateRequest, http: Request) -> Response:
        """Continue text or token ids; text and token ids come back."""
        return await generate(service, body, http)

    @app.post("/tokenize", tags=["tokens"], response_model=schema.Tokens, responses=_ERRORS)
    async def tokenize_text(body: schema.TokenizeRequest) -> dict[str, Any]:
        """Token ids of a prompt or of messages."""
        return await tokenize(service, body)

    @app.post("/detokenize", tags=["tokens"], response_model=schema.Text, responses=_ERRORS)
    async def detokenize_tokens(body: schema.DetokenizeRequest) -> dict[str, Any]:
        """The text of token ids."""
        return await detokenize(service, body)


def _add_reports(app: FastAPI, service: Service) -> None:
    @app.get(
        "/health",
        tags=["reports"],
        responses={
            200: {"model": schema.Health},
            **_REPORT_ERRORS,
            503: {"model": schema.Health, "description": "the engine does not answer"},
        },
    )
    async def health() -> Response:
        """Whether the engine answers: 200, or 503 with the reason."""
        good, found = await service.health()
        return JSONResponse(found, 200 if good else 503)

    @app.get(
        "/ready",
        tags=["reports"],
        responses={
            200: {"model": schema.Ready},
            **_REPORT_ERRORS,
            503: {"model": schema.Ready, "description": "it is starting, draining or failed"},
        },
    )
    async def ready() -> Response:
        """Whether requests are taken: 200, else 503."""
        state = service.state
        return JSONResponse({"status": state}, 200 if state == "ready" else 503)

    @app.get(
        "/metrics",
        tags=["reports"],
        response_class=PlainTextResponse,
        responses={200: _METRICS, **_REPORT_ERRORS},
    )
    async def metrics(http: Request) -> Response:
        """For Prometheus; docs/metrics.md has the names."""
        body, kind = service.metrics.render(http.headers.get("accept"))
        return Response(body, headers={"Content-Type": kind})

    @app.get("/kv", tags=["reports"], responses=_REPORT_ERRORS)
    async def kv() -> dict[str, Any]:
        """Who holds which pages of the KV cache; docs/server.md has the fields."""
        return await service.snapshot()


def _document(app: FastAPI, *, with_keys: bool) -> None:
    """Make the OpenAPI document. FastAPI writes of answers 422, which nobody gets: they are 400."""
    document = app.openapi()
    for path in document["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)
    parts = document["components"]
    for name in ("HTTPValidationError", "ValidationError"):
        parts["schemas"].pop(name, None)
    if with_keys:
        parts["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}]


def _add_page(app: FastAPI) -> None:
    parts = {path.name for path in _PAGE.iterdir() if path.is_file()}

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return FileResponse(_PAGE / "index.html", headers=_PAGE_HEADERS)

    @app.get("/page/{name}", include_in_schema=False)
    async def part_of_page(name: str) -> Response:
        if name not in parts:
            raise ApiError(404, f'the page has no part "{ascii(name)[1:80]}"')
        return FileResponse(_PAGE / name, headers=_PAGE_HEADERS)
