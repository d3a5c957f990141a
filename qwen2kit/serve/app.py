"""The HTTP application: routes, and how failures become answers."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp

from qwen2kit.serve.answers import Answer
from qwen2kit.serve.chat import ChatAnswer
from qwen2kit.serve.chat_request import ChatRequest
from qwen2kit.serve.completion_request import CompletionRequest
from qwen2kit.serve.completions import CompletionAnswer
from qwen2kit.serve.dispatcher import Dispatcher
from qwen2kit.serve.errors import ApiError
from qwen2kit.serve.exchange import EventStream, read, while_connected
from qwen2kit.serve.middleware import Counted, HostGuard, KeyGuard, error_response
from qwen2kit.serve.page import page_response
from qwen2kit.serve.service import Service

_LONGEST_PATH = 100
_READING = ["GET", "HEAD"]
PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"


def make_app(service: Service, api_key: str | None = None, *, local: bool = False) -> ASGIApp:
    """The application of one service.

    Args:
        service: the model.
        api_key: what clients must send as bearer token; None asks for none.
        local: only this machine is meant to reach it.
    """
    app = FastAPI(title="qwen2kit", docs_url=None, redoc_url=None, openapi_url=None)
    _add_information(app, service)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        asked = await read(request, ChatRequest, service.limits.max_body)
        return await _respond(request, ChatAnswer(service, asked), streams=bool(asked.stream))

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        asked = await read(request, CompletionRequest, service.limits.max_body)
        answer = CompletionAnswer(service, asked)
        return await _respond(request, answer, streams=bool(asked.stream))

    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(ClientDisconnect, _gone)
    app.add_exception_handler(Exception, _bug)
    guarded = HostGuard(app) if local and api_key is None else KeyGuard(app, api_key)
    return Counted(guarded, service.metrics)


def _add_information(app: FastAPI, service: Service) -> None:
    """The routes that generate nothing."""

    @app.api_route("/", methods=_READING)
    async def page() -> Response:
        return page_response()

    @app.api_route("/v1/models", methods=_READING)
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(service)]}

    @app.api_route("/v1/models/{name:path}", methods=_READING)
    async def model(name: str) -> dict[str, Any]:
        service.check_model(name)
        return _model(service)

    @app.api_route("/health", methods=_READING)
    @app.api_route("/health/ready", methods=_READING)
    async def ready() -> Response:
        dispatcher = service.dispatcher
        return _health("draining" if dispatcher.draining else _life(dispatcher))

    @app.api_route("/health/live", methods=_READING)
    async def live() -> Response:
        return _health(_life(service.dispatcher))

    @app.api_route("/metrics", methods=_READING)
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=PROMETHEUS)


def _life(dispatcher: Dispatcher) -> str:
    if dispatcher.failure is not None:
        return "failed"
    return "stalled" if dispatcher.stalled else "ok"


def _health(status: str) -> Response:
    return JSONResponse({"status": status}, 200 if status == "ok" else 503)


def _model(service: Service) -> dict[str, Any]:
    return {
        "id": service.name,
        "object": "model",
        "created": service.created,
        "owned_by": "qwen2kit",
        "max_model_len": service.capacity,
    }


async def _respond(request: Request, answer: Answer, *, streams: bool) -> Response:
    try:
        await while_connected(request, answer.start())
        if streams:
            return EventStream(answer.stream(), answer.release)
        return JSONResponse(await while_connected(request, answer.whole()))
    except BaseException:
        answer.release()
        raise


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error_response(error)


async def _http_error(request: Request, error: Exception) -> Response:
    """Unknown paths and methods, in the same shape as everything else."""
    assert isinstance(error, HTTPException)
    code = "unknown_url" if error.status_code == 404 else None
    message = f"{request.method} {request.url.path[:_LONGEST_PATH]}: {error.detail}"
    response = error_response(ApiError(error.status_code, message, code=code))
    response.headers.update(error.headers or {})  # which methods are allowed
    return response


async def _gone(request: Request, error: Exception) -> Response:
    """Nobody reads this; the status is for the metrics."""
    return Response(status_code=499)


async def _bug(request: Request, error: Exception) -> Response:
    return error_response(ApiError(500, "internal error", kind="server_error"))
