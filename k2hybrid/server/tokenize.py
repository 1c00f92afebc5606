"""/tokenize and /detokenize, in vLLM's shapes. Rendering and encoding run in a thread."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from k2hybrid.errors import RequestError
from k2hybrid.server.body import read_object
from k2hybrid.server.chat_request import parse_messages
from k2hybrid.server.chat_tools import parse_tools
from k2hybrid.server.failures import json_response
from k2hybrid.server.fields import Fields, wrong_type, wrong_value
from k2hybrid.server.served import ServedModel


class Tokenization:
    """The two handlers.

    A `prompt` is what a rendered conversation looks like: spellings of control tokens in it become their ids,
    so that /detokenize's text comes back as the same ids (in `messages` they stay text). `add_special_tokens`
    is accepted and changes nothing, since this vocabulary adds none by itself.
    """

    def __init__(self, model: ServedModel) -> None:
        self._model = model

    async def tokenize(self, request: Request) -> Response:
        """`{prompt}` or `{messages, tools}` → `{count, max_model_len, tokens, token_strs}`."""
        body = await read_object(request)
        return json_response(await run_in_threadpool(self._tokenize, body))

    async def detokenize(self, request: Request) -> Response:
        """`{tokens}` → `{prompt}`."""
        body = await read_object(request)
        return json_response(await run_in_threadpool(self._detokenize, body))

    def _tokenize(self, body: Mapping[str, Any]) -> dict[str, Any]:
        fields = Fields(body)
        fields.flag("add_special_tokens")
        prompt = fields.text("prompt")
        if (prompt is None) == (body.get("messages") is None):
            raise RequestError("send either prompt or messages", param="prompt", code="missing_required")
        if prompt is not None:
            tokens = self._model.tokenizer.encode_with_specials(prompt)
        else:
            tokens = self._model.template.render(
                parse_messages(fields),
                parse_tools(fields),
                add_generation_prompt=fields.flag("add_generation_prompt", default=True),
            ).ids
        return {
            "count": len(tokens),
            "max_model_len": self._model.context_tokens,
            "tokens": tokens,
            "token_strs": self._strings(tokens) if fields.flag("return_token_strs") else None,
        }

    def _strings(self, tokens: list[int]) -> list[str]:
        return [self._model.tokenizer.token_bytes(token).decode("utf-8", "replace") for token in tokens]

    def _detokenize(self, body: Mapping[str, Any]) -> dict[str, Any]:
        fields = Fields(body)
        if body.get("tokens") is None:
            raise RequestError("tokens is missing", param="tokens", code="missing_required")
        size = self._model.tokenizer.vocab_size
        tokens = fields.array("tokens")
        for i, token in enumerate(tokens):
            if isinstance(token, bool) or not isinstance(token, int):
                raise wrong_type(f"tokens[{i}]", "an integer", token)
            if not 0 <= token < size:
                raise wrong_value(f"tokens[{i}]", f"is {token}; the vocabulary has the ids 0 to {size - 1}")
        return {"prompt": self._model.tokenizer.decode(tokens)}
