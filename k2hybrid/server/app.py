"""The application: routes, their order, and which error ends how."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from starlette.applications import Starlette
from starlette.convertors import Convertor, register_url_convertor
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from k2hybrid.errors import K2Error
from k2hybrid.server.anthropic import Anthropic
from k2hybrid.server.completions import Completions
from k2hybrid.server.failures import (
    RETRY_AFTER_S,
    HttpError,
    classify,
    failure_response,
    json_response,
)
from k2hybrid.server.guard import LOOPBACK_HOSTS, ApiKeys, Guard, log_unexpected, request_id
from k2hybrid.server.live import LiveRuns
from k2hybrid.server.metrics import Metrics
from k2hybrid.server.models import Models
from k2hybrid.server.openai import OpenAI
from k2hybrid.server.openapi import description
from k2hybrid.server.origin import Origins
from k2hybrid.server.page import STATIC_PATHS, Page
from k2hybrid.server.responses import ResponsesApi
from k2hybrid.server.served import ServedModel
from k2hybrid.server.status import Status
from k2hybrid.server.tokenize import Tokenization


class _Anything(Convertor[str]):
    """A rest of a path as it is: `path` would not take line breaks, and any name means the one model."""

    regex = r"[\s\S]*"

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


register_url_convertor("anything", _Anything())


@dataclass(frozen=True, slots=True)
class Settings:
    """How the model is offered. `hosts` None answers any Host header: for servers bound beyond loopback."""

    name: str | None = None  # None: the model's own
    api_keys: tuple[str, ...] = ()
    hosts: Collection[str] | None = LOOPBACK_HOSTS
    origins: tuple[str, ...] = ()  # of web pages that may use it, beside its own; "*": any


def create_app(model: ServedModel, settings: Settings | None = None, live: LiveRuns | None = None) -> ASGIApp:
    """The ASGI application that serves `model`; `live` knows what it is at, and whether it drains."""
    settings = settings or Settings()
    live = live if live is not None else LiveRuns()
    name = settings.name or model.name
    models = Models(model, name)
    openai = OpenAI(model, name, live)
    anthropic = Anthropic(model, name, live)
    responses = ResponsesApi(model, name, live)
    completions = Completions(model, name, live)
    tokenization = Tokenization(model)
    metrics = Metrics(model)
    status = Status(model, name, live, key_required=bool(settings.api_keys))
    page = Page(name)

    async def described(_request: Request) -> Response:
        return json_response(description())

    async def health(_request: Request) -> Response:
        if live.draining:
            headers = {"Retry-After": str(RETRY_AFTER_S)}
            return json_response({"status": "draining", "model": name}, 503, headers)
        return json_response({"status": "ok", "model": name})

    app = Starlette(
        routes=[
            Route("/", page.root),  # HEAD too: an agent probes with it
            *(Route(path, page.static) for path in STATIC_PATHS),
            Route("/health", health),
            Route("/status", status.answer),
            Route("/metrics", metrics.answer),
            Route("/openapi.json", described),
            Route("/v1/models", models.every),
            Route("/v1/models/{name:anything}", models.one),
            Route("/v1/chat/completions", openai.chat_completions, methods=["POST"]),
            Route("/v1/responses", responses.create, methods=["POST"]),
            Route("/v1/responses/input_tokens", responses.input_tokens, methods=["POST"]),
            Route("/v1/responses/{id}", responses.retrieve),
            Route("/v1/responses/{id}", responses.delete, methods=["DELETE"]),
            Route("/v1/responses/{id}/cancel", responses.cancel, methods=["POST"]),
            Route("/v1/responses/{id}/input_items", responses.input_items),
            Route("/v1/messages", anthropic.messages, methods=["POST"]),
            Route("/v1/messages/count_tokens", anthropic.count_tokens, methods=["POST"]),
            Route("/v1/completions", completions.completions, methods=["POST"]),
            Route("/tokenize", tokenization.tokenize, methods=["POST"]),
            Route("/detokenize", tokenization.detokenize, methods=["POST"]),
        ],
        exception_handlers={
            K2Error: _failed,
            HTTPException: _refused,
            ClientDisconnect: _gone,
            Exception: _failed,
        },
    )
    return Guard(
        app,
        keys=ApiKeys(settings.api_keys),
        hosts=settings.hosts,
        origins=Origins(settings.origins),
        live=live,
    )


async def _failed(request: Request, error: Exception) -> Response:
    log_unexpected(error, request.scope)
    return failure_response(classify(error, request_id(request.scope)), request.scope)


async def _refused(request: Request, error: Exception) -> Response:
    """404 and 405, in the words of the dialect."""
    status = error.status_code if isinstance(error, HTTPException) else 404
    known = {404: "there is no {path}", 405: "{path} does not take {method}"}
    text = known.get(status, "refused").format(path=request.url.path, method=request.method)
    code = {404: "not_found", 405: "method_not_allowed"}.get(status, "refused")
    failure = classify(HttpError(status, text, kind="invalid_request_error", code=code))
    response = failure_response(failure, request.scope)
    if isinstance(error, HTTPException):
        response.headers.update(error.headers or {})
    return response


async def _gone(_request: Request, _error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it
