"""What a request asks of its answer, as rules for the tokens, and as what is to be validated. Layer 5."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any

from k2hybrid.chat.constraint import CallableTool, Constraint, Phase, Rules
from k2hybrid.chat.grammar import Grammars
from k2hybrid.chat.markers import Markers
from k2hybrid.chat.prompt import Prompt
from k2hybrid.chat.schema import Schema, admit, admit_all
from k2hybrid.chat.tokenizer import Tokenizer
from k2hybrid.chat.validation import Validator
from k2hybrid.errors import RequestError
from k2hybrid.runtime.guarded import Check, Guard, InvalidCalls
from k2hybrid.runtime.mask import OFFLOAD_FROM, ConstraintMask
from k2hybrid.types import ChatRequest, StopRule

# Of an answer's tokens so many, or a fifth, are kept from the reasoning, unless a request says otherwise.
LEAST_ANSWER = 256
# What a function without declared parameters takes.
_NO_ARGUMENTS: Mapping[str, Any] = {"type": "object", "properties": {}}


def thinking_budget(asked: int | None, max_tokens: int) -> int:
    """Tokens of reasoning at most, so that an answer of `max_tokens` has room for more than that."""
    if asked is None:
        return max(0, max_tokens - max(LEAST_ANSWER, max_tokens // 5))
    return min(asked, max_tokens * 7 // 8)


class Rulebook:
    """Makes masks and guards. Thread-safe; `close` ends its worker process and its thread."""

    def __init__(self, tokenizer: Tokenizer, markers: Markers, stop_ids: frozenset[int]) -> None:
        self._grammars = Grammars(tokenizer)
        self._tokenizer = tokenizer
        self._markers = markers
        self._stop_ids = stop_ids
        self._validator = Validator()
        self._executor: Executor | None = None
        if tokenizer.vocab_size >= OFFLOAD_FROM:
            threads = min(4, os.cpu_count() or 1)
            self._executor = ThreadPoolExecutor(threads, thread_name_prefix="k2hybrid-mask")
        self.invalid_calls = InvalidCalls()

    def close(self) -> None:
        """Use it no more."""
        self._validator.close()
        if self._executor is not None:
            self._executor.shutdown(wait=False, cancel_futures=True)

    def rules(
        self,
        request: ChatRequest,
        prompt: Prompt,
        max_tokens: int,
        stop_after: Callable[[Sequence[int]], StopRule],
    ) -> tuple[Rules, Guard]:
        """The rules of one answer, compiled; and what of it is to be validated.

        Args:
            stop_after: a stop rule of the answer that has read these tokens.

        Raises:
            RequestError: a schema is malformed, too large, or hostile.
        """
        tools, checks = self._tools(request)
        content = content_check = None
        if request.json_schema is not None:
            schema = admit(request.json_schema, "response_format")
            content = self._grammars.of_schema(schema.value)
            content_check = None if content.exact else self._check(schema)
        partial = bool(request.messages) and request.messages[-1].partial
        if partial and content is not None:
            raise RequestError(
                "response_format cannot continue a partial message; leave one of the two out",
                param="response_format",
                code="invalid_value",
            )
        rules = Rules(
            max_tokens=max_tokens,
            thinking_budget=thinking_budget(request.thinking_budget, max_tokens),
            phase=(
                Phase.REASONING
                if prompt.in_reasoning
                else Phase.START
                if request.thinking and not partial
                else Phase.CONTENT
            ),
            tools=tools,
            required=request.tool_choice == "required",
            parallel=request.parallel_tool_calls,
            content=content,
            first_call_index=prompt.first_call_index,
        )
        if not request.constrained:
            checks, content_check = {}, None
        return rules, Guard(checks, content_check, stop_after, self.invalid_calls)

    def is_exact(self, tool: Mapping[str, Any]) -> bool:
        """Whether a grammar holds all that `tool` declares."""
        schema = admit(function_of(tool)[1], "tools[0].function.parameters")
        return self._grammars.of_schema(schema.value).exact

    def mask(self, rules: Rules) -> ConstraintMask:
        """The mask of an answer under `rules`."""
        constraint = Constraint(rules, self._grammars, self._markers, self._stop_ids)
        return ConstraintMask(constraint, self._tokenizer.num_ranks, self._executor)

    def _tools(self, request: ChatRequest) -> tuple[tuple[CallableTool, ...], dict[str, Check]]:
        """The tools that may be called, and how the arguments are validated where a grammar is not enough."""
        if request.tool_choice == "none":
            return (), {}
        declared = [function_of(tool) for tool in request.tools]
        schemas = admit_all(
            [(f"tools[{i}].function.parameters", parameters) for i, (_, parameters) in enumerate(declared)]
        )
        tools: dict[str, CallableTool] = {}
        checks: dict[str, Check] = {}
        for (name, _), schema in zip(declared, schemas, strict=True):
            if name in tools or request.tool_name not in (None, name):
                continue
            grammar = self._grammars.of_schema(schema.value)
            tools[name] = CallableTool(name, grammar)
            if not grammar.exact:
                checks[name] = self._check(schema)
        return tuple(tools.values()), checks

    def _check(self, schema: Schema) -> Callable[[str], str | None]:
        return lambda text: self._validator.check(schema, text)


def function_of(tool: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """Name and parameters of a declared tool; without any, it takes no arguments."""
    function = tool.get("function")
    declaration: Mapping[str, Any] = function if isinstance(function, Mapping) else tool
    parameters = declaration.get("parameters")
    return str(declaration.get("name", "")), parameters if parameters else _NO_ARGUMENTS
