"""The routes of the server, as an ASGI application."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from qwen_moe_jax.server.chat import chat_completions
from qwen_moe_jax.server.completions import completions
from qwen_moe_jax.server.embeddings import embeddings
from qwen_moe_jax.server.errors import ApiError
from qwen_moe_jax.server.http import CLIENT_GONE, Gate
from qwen_moe_jax.server.service import Service

Handler = Callable[[Service, Request], Awaitable[Response]]


def make_app(service: Service) -> Starlette:
    """The application that serves a model."""

    def bound(handler: Handler) -> Callable[[Request], Awaitable[Response]]:
        async def handle(request: Request) -> Response:
            return await handler(service, request)

        return handle

    routes = [
        Route("/v1/completions", bound(completions), methods=["POST"]),
        Route("/v1/chat/completions", bound(chat_completions), methods=["POST"]),
        Route("/v1/embeddings", bound(embeddings), methods=["POST"]),
        Route("/v1/models", bound(_models), methods=["GET"]),
        Route("/v1/models/{name:path}", bound(_model), methods=["GET"]),
        Route("/health", bound(_health), methods=["GET"]),
        Route("/metrics", bound(_metrics), methods=["GET"]),
    ]
    known = {route.path for route in routes}

    def observe(path: str, status: int) -> None:
        service.metrics.answered(path if path in known else "other", status)

    gate = Middleware(Gate, life=service.life, keys=service.keys, observe=observe)
    handlers: Any = {ApiError: _refused, HTTPException: _unrouted, ClientDisconnect: _gone, Exception: _broken}
    return Starlette(routes=routes, middleware=[gate], exception_handlers=handlers)


async def _models(service: Service, request: Request) -> Response:
    return JSONResponse({"object": "list", "data": [_described(service, name) for name in _names(service)]})


async def _model(service: Service, request: Request) -> Response:
    name = request.path_params["name"]
    service.adapter_of(name)
    return JSONResponse(_described(service, name))


def _names(service: Service) -> list[str]:
    return [service.name, *service.adapters]


def _described(service: Service, name: str) -> dict[str, Any]:
    """A model in OpenAI's form; `parent` and `max_model_len` are vLLM's."""
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "qwen_moe_jax",
        "parent": None if name == service.name else service.name,
        "max_model_len": service.limits.max_length,
    }


async def _health(service: Service, request: Request) -> Response:
    life = service.life
    content = {"status": life.state, "detail": life.detail, "active_requests": life.active}
    return JSONResponse(content, status_code=200 if life.state == "ready" else 503)


async def _metrics(service: Service, request: Request) -> Response:
    text = await asyncio.to_thread(service.metrics.text)  # waits for the devices
    return Response(text, media_type=service.metrics.content_type)


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _unrouted(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    paths = ", ".join(route.path for route in request.app.routes if "{" not in route.path)
    text = {
        404: f"there is no such path; expected one of {paths}",
        405: f"the method {request.method} is not allowed here",
    }
    message = f"{request.url.path}: {text.get(error.status_code, error.detail)}."
    return ApiError(error.status_code, message).response()


async def _gone(request: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_GONE)


async def _broken(request: Request, error: Exception) -> Response:
    return ApiError(500, f"an error of the server ({type(error).__name__}), which is in its log.").response()
