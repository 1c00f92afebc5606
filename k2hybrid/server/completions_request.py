"""OpenAI's legacy text completion request → CompletionRequests. Pure.

A prompt is plain text: the spelling of a control token in it is text. With `"special": true`, which is ours,
it means the token, and control tokens show in the answer. Token arrays may hold any id.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from k2hybrid.errors import RequestError
from k2hybrid.server.fields import Fields, wrong_type, wrong_value
from k2hybrid.server.sampling import parse_choices, parse_limit, parse_sampling, parse_stop
from k2hybrid.types import CompletionRequest

MAX_PROMPTS = 8
MAX_LOGPROBS = 5  # OpenAI's own limit here
DEFAULT_TOKENS = 16  # OpenAI's
MAX_TOKEN_ID = 1 << 31


@dataclass(frozen=True, slots=True)
class CompletionCall:
    """A parsed request: what to generate, prompt by prompt, and how the client wants it sent."""

    requests: tuple[CompletionRequest, ...]
    choices: int = 1  # per prompt
    echo: bool = False
    stream: bool = False
    include_usage: bool = False


def parse_completion(body: Mapping[str, Any]) -> CompletionCall:
    """Parse a `/v1/completions` body; RequestError names the field that is wrong."""
    fields = Fields(body)
    choices = parse_choices(fields)
    echo = fields.flag("echo")
    logprobs = fields.integer("logprobs", 0, MAX_LOGPROBS)
    if echo and logprobs is not None:
        raise _unsupported("logprobs", "of the prompt are not computed; leave out logprobs or echo")
    if fields.text("suffix"):
        raise _unsupported("suffix", "cannot be used: this model does not fill in between")
    if (fields.integer("best_of", 1) or choices) != choices:
        raise _unsupported("best_of", f"must equal n ({choices}): all that is generated is returned")
    stream = fields.flag("stream")
    request = CompletionRequest(
        prompt="",
        specials=fields.flag("special"),
        sampling=parse_sampling(fields, logprobs),
        max_tokens=DEFAULT_TOKENS if body.get("max_tokens") is None else parse_limit(fields, "max_tokens"),
        stop=parse_stop(body.get("stop")),
        store=fields.flag("store", default=True),
        reuse=fields.flag("cache_prompt", default=True),
    )
    return CompletionCall(
        tuple(dataclasses.replace(request, prompt=prompt) for prompt in _prompts(body.get("prompt"))),
        choices=choices,
        echo=echo,
        stream=stream,
        include_usage=stream and fields.child("stream_options").flag("include_usage"),
    )


def _unsupported(param: str, problem: str) -> RequestError:
    return RequestError(f"{param} {problem}", param=param, code="unsupported_value")


def _prompts(value: Any) -> list[str | tuple[int, ...]]:
    """A text, several, token ids, or several arrays of them."""
    if value is None:
        raise RequestError("prompt is missing", param="prompt", code="missing_required")
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise wrong_type("prompt", "a string, an array of strings, or token ids", value)
    if not value:
        raise RequestError("prompt holds nothing", param="prompt", code="missing_required")
    if not isinstance(value[0], (str, list)):
        return [_token_ids(value, "prompt")]
    if len(value) > MAX_PROMPTS:
        raise wrong_value("prompt", f"has {len(value)} entries; at most {MAX_PROMPTS}")
    return [_prompt(entry, f"prompt[{i}]") for i, entry in enumerate(value)]


def _prompt(value: Any, path: str) -> str | tuple[int, ...]:
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise wrong_type(path, "a string or an array of token ids", value)
    return _token_ids(value, path)


def _token_ids(values: list[Any], path: str) -> tuple[int, ...]:
    for i, token in enumerate(values):
        if isinstance(token, bool) or not isinstance(token, int):
            raise wrong_type(f"{path}[{i}]", "a token id", token)
        if not 0 <= token < MAX_TOKEN_ID:
            raise wrong_value(f"{path}[{i}]", f"is {token}, which is no token id")
    return tuple(values)
