"""The server's description of itself: /openapi.json."""

from __future__ import annotations

from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from k2hybrid.hardware.doctor import package_version
from k2hybrid.server.openapi_schemas import EVENT, PARTS, REPLIES, REQUESTS, ref

_TEXT = "text/plain"
_JSON = "application/json"
_EVENTS = "text/event-stream"
# What may happen to any request, and to one with a body.
_ALWAYS = (401, 403, 503)
_WITH_BODY = (400, 408, 413, 415)
_GENERATING = (429, 500, 504)


@dataclass(frozen=True, slots=True)
class _Operation:
    """One method of one path.

    `fails`: statuses beside those that always can be. `open`: needs no key. `text`: the reply is plain text.
    `anthropic`: errors are in its words.
    """

    method: str
    path: str
    summary: str
    reply: str
    request: str | None = None
    streams: bool = False
    fails: tuple[int, ...] = ()
    open: bool = False
    text: bool = False
    anthropic: bool = False
    query: tuple[dict[str, Any], ...] = ()

    def described(self) -> dict[str, Any]:
        """As OpenAPI has it."""
        shape = ref(self.reply)
        error = ref("AnthropicError" if self.anthropic else "Error")
        if self.streams:
            # An answer that takes long has its status before it is known how it ends.
            shape = {"anyOf": [shape, error]}
        content: dict[str, Any] = {_TEXT if self.text else _JSON: {"schema": shape}}
        if self.streams:
            content[_EVENTS] = {"schema": EVENT}
        statuses = {*_ALWAYS, *self.fails, *(_WITH_BODY if self.request else ())}
        failed = {_JSON: {"schema": error}}
        responses = {
            "200": {"description": HTTPStatus.OK.phrase, "content": content},
            **{
                str(status): {"description": HTTPStatus(status).phrase, "content": failed}
                for status in sorted(statuses)
            },
        }
        described: dict[str, Any] = {"summary": self.summary, "responses": responses}
        if self.request:
            described["requestBody"] = {"required": True, "content": {_JSON: {"schema": ref(self.request)}}}
        if self.open:
            described["security"] = []
        parameters = [*self._path_parameters(), *self.query]
        return {**described, "parameters": parameters} if parameters else described

    def _path_parameters(self) -> list[dict[str, Any]]:
        names = [part[1:-1] for part in self.path.split("/") if part.startswith("{")]
        schema = {"type": "string", "minLength": 1}
        return [{"name": name, "in": "path", "required": True, "schema": schema} for name in names]


def _query(name: str, **schema: Any) -> dict[str, Any]:
    return {"name": name, "in": "query", "required": False, "schema": schema}


_OPERATIONS = (
    _Operation("get", "/health", "Whether the server takes requests", "Health", open=True),
    _Operation("get", "/status", "What server and model are at", "Status"),
    _Operation("get", "/metrics", "Figures, as Prometheus reads them", "Metrics", text=True),
    _Operation("get", "/openapi.json", "This description", "Description", open=True),
    _Operation("get", "/v1/models", "The one model", "ModelList", open=True),
    _Operation("get", "/v1/models/{name}", "The one model, whatever name is asked for", "Model"),
    _Operation(
        "post",
        "/v1/chat/completions",
        "Answer a conversation",
        "ChatCompletion",
        "ChatRequest",
        streams=True,
        fails=_GENERATING,
    ),
    _Operation(
        "post",
        "/v1/completions",
        "Continue a text",
        "Completion",
        "CompletionRequest",
        streams=True,
        fails=_GENERATING,
    ),
    _Operation(
        "post",
        "/v1/responses",
        "Answer a conversation, and remember it",
        "Response",
        "ResponsesRequest",
        streams=True,
        fails=_GENERATING,
    ),
    _Operation(
        "post",
        "/v1/responses/input_tokens",
        "How long the prompt of a response would be",
        "ResponseTokens",
        "ResponsesRequest",
        fails=(500,),
    ),
    _Operation("get", "/v1/responses/{id}", "A response that is remembered", "Response", fails=(400, 404)),
    _Operation("delete", "/v1/responses/{id}", "Forget a response", "ResponseDeleted", fails=(404,)),
    _Operation(
        "post", "/v1/responses/{id}/cancel", "Refused: nothing runs unwatched", "Response", fails=(400, 404)
    ),
    _Operation(
        "get",
        "/v1/responses/{id}/input_items",
        "What a response answers",
        "ItemList",
        fails=(400, 404),
        query=(
            _query("limit", type="integer", minimum=1, maximum=100),
            _query("order", type="string", enum=["asc", "desc"]),
            _query("after", type="string"),
        ),
    ),
    _Operation(
        "post",
        "/v1/messages",
        "Answer a conversation",
        "AnthropicMessage",
        "MessagesRequest",
        streams=True,
        fails=_GENERATING,
        anthropic=True,
    ),
    _Operation(
        "post",
        "/v1/messages/count_tokens",
        "How long the prompt of a message would be",
        "AnthropicCount",
        "CountRequest",
        fails=(500,),
        anthropic=True,
    ),
    _Operation(
        "post", "/tokenize", "Text or messages to token ids", "Tokens", "TokenizeRequest", fails=(500,)
    ),
    _Operation("post", "/detokenize", "Token ids to text", "Text", "DetokenizeRequest"),
)


def description() -> dict[str, Any]:
    """The whole document."""
    paths: dict[str, dict[str, Any]] = {}
    for operation in _OPERATIONS:
        paths.setdefault(operation.path, {})[operation.method] = operation.described()
    health = paths["/health"]["get"]["responses"]
    health["503"]["content"][_JSON]["schema"] = ref("Health")
    return {
        "openapi": "3.1.0",
        "info": {"title": "k2hybrid", "version": package_version()},
        "paths": paths,
        "security": [{}, {"bearer": []}, {"key": []}],  # keys are asked for where the server was given some
        "components": {
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
            "schemas": {
                **REQUESTS,
                **PARTS,
                **REPLIES,
                "Description": {"type": "object"},
                "Metrics": {"type": "string"},
            },
        },
    }
