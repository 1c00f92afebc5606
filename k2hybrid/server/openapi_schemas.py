"""JSON schemas of what is sent to and from the endpoints, as the parsers and replies have it.

Fields that the schemas do not name are ignored by the parsers, and null counts as absent wherever a field
may be absent.
"""

from __future__ import annotations

from typing import Any

from k2hybrid.server import sampling
from k2hybrid.server.chat_request import ROLES
from k2hybrid.server.chat_tools import MAX_TOOLS
from k2hybrid.server.completions_request import MAX_LOGPROBS, MAX_PROMPTS, MAX_TOKEN_ID
from k2hybrid.server.thinking import EFFORTS

Schema = dict[str, Any]

_TOOL_NAME = r"^[A-Za-z0-9_.\-]{1,256}$"


def ref(name: str) -> Schema:
    """The schema `name` of this document."""
    return {"$ref": f"#/components/schemas/{name}"}


def _text(*words: str) -> Schema:
    return {"type": "string", "enum": list(words)} if words else {"type": "string"}


def _integer(low: int | None = None, high: int | None = None) -> Schema:
    bounds = {"minimum": low, "maximum": high}
    return {"type": "integer", **{key: bound for key, bound in bounds.items() if bound is not None}}


def _number(low: float, high: float) -> Schema:
    return {"type": "number", "minimum": low, "maximum": high}


def _array(items: Schema, least: int | None = None, most: int | None = None) -> Schema:
    bounds = {"minItems": least, "maxItems": most}
    return {
        "type": "array",
        "items": items,
        **{key: bound for key, bound in bounds.items() if bound is not None},
    }


def _any(*schemas: Schema) -> Schema:
    return {"anyOf": list(schemas)}


def _or_null(schema: Schema) -> Schema:
    return _any(schema, {"type": "null"})


def _object(required: dict[str, Schema], optional: dict[str, Schema] | None = None) -> Schema:
    """An object that may hold more."""
    properties = {**required, **{key: _or_null(schema) for key, schema in (optional or {}).items()}}
    return {"type": "object", "properties": properties, "required": list(required)}


FLAG: Schema = {"type": "boolean"}
TEXT = _text()
NAME: Schema = {"type": "string", "minLength": 1}
ANY_OBJECT: Schema = {"type": "object"}
COUNT = _integer(0)
AMOUNT: Schema = {"type": "number", "minimum": 0}
_LIMIT = _any(_integer(1), {"type": "integer", "const": -1})
_STOP_TEXT: Schema = {"type": "string", "maxLength": sampling.MAX_STOP_CHARS}
_STOP = _any(_STOP_TEXT, _array(_STOP_TEXT, most=sampling.MAX_STOP))
_CONTENT = _any(TEXT, _array(_any(TEXT, ref("Part"))), {"type": "null"})

_SAMPLING: dict[str, Schema] = {
    "temperature": _number(0, sampling.MAX_TEMPERATURE),
    "top_p": _number(0, 1),
    "top_k": _integer(-1),
    "min_p": _number(0, 1),
    "seed": _integer(),
    "presence_penalty": _number(-sampling.MAX_PENALTY, sampling.MAX_PENALTY),
    "frequency_penalty": _number(-sampling.MAX_PENALTY, sampling.MAX_PENALTY),
    "repetition_penalty": _number(sampling.MIN_REPETITION, sampling.MAX_REPETITION),
    "logit_bias": {
        "type": "object",
        "propertyNames": {"pattern": "^[0-9]{1,9}$"},
        "additionalProperties": _or_null(_number(-sampling.MAX_BIAS, sampling.MAX_BIAS)),
    },
}
_COMMON: dict[str, Schema] = {
    "model": {},  # any: there is one
    "stream": FLAG,
    "store": FLAG,
    "cache_prompt": FLAG,
}
_STREAM_OPTIONS: dict[str, Schema] = {"stream_options": _object({}, {"include_usage": FLAG})}
_THINKING: dict[str, Schema] = {
    "thinking": _any(
        FLAG,
        _object({}, {"type": _text("enabled", "adaptive", "auto", "disabled"), "budget_tokens": _integer(0)}),
    ),
    "thinking_budget": _integer(0),
}
_EFFORT = _text(*EFFORTS)
_FUNCTION = _object(
    {"name": {"type": "string", "pattern": _TOOL_NAME}}, {"description": TEXT, "parameters": ANY_OBJECT}
)
_CHOICES = _integer(1, sampling.MAX_CHOICES)
_MESSAGES = _array(ref("Message"), least=1)
_TOOLS = _array(ref("Tool"), most=MAX_TOOLS)
_TOKEN_IDS = _array(_integer(0, MAX_TOKEN_ID - 1))

REQUESTS: dict[str, Schema] = {
    "ChatRequest": _object(
        {"messages": _MESSAGES},
        {
            **_COMMON,
            **_SAMPLING,
            **_STREAM_OPTIONS,
            **_THINKING,
            "max_tokens": _LIMIT,
            "max_completion_tokens": _LIMIT,
            "n": _CHOICES,
            "stop": _STOP,
            "logprobs": FLAG,
            "top_logprobs": _integer(0, sampling.MAX_TOP_LOGPROBS),
            "tools": _TOOLS,
            "tool_choice": _any(
                _text("auto", "none", "required"), _object({"function": _object({"name": NAME})})
            ),
            "parallel_tool_calls": FLAG,
            "functions": _array(_FUNCTION, most=MAX_TOOLS),
            "function_call": _any(_text("auto", "none"), _object({"name": NAME})),
            "response_format": _any(
                _object({"type": _text("text", "json_object")}),
                _object({"type": _text("json_schema"), "json_schema": _object({"schema": ANY_OBJECT})}),
            ),
            "reasoning_effort": _EFFORT,
            "reasoning": _object(
                {}, {"enabled": FLAG, "effort": _EFFORT, "max_tokens": _integer(0), "exclude": FLAG}
            ),
            "chat_template_kwargs": _object({}, {"thinking": FLAG, "enable_thinking": FLAG}),
            "constrain": FLAG,
            "return_progress": FLAG,
        },
    ),
    "CompletionRequest": _object(
        {
            "prompt": _any(
                TEXT,
                {**_TOKEN_IDS, "minItems": 1},
                _array(_any(TEXT, _TOKEN_IDS), least=1, most=MAX_PROMPTS),
            )
        },
        {
            **_COMMON,
            **_SAMPLING,
            **_STREAM_OPTIONS,
            "max_tokens": _LIMIT,
            "n": _CHOICES,
            "best_of": _CHOICES,
            "echo": FLAG,
            "logprobs": _integer(0, MAX_LOGPROBS),
            "stop": _STOP,
            "suffix": {"type": "string", "maxLength": 0},
            "special": FLAG,
        },
    ),
    "ResponsesRequest": _object(
        {},
        {
            **_COMMON,
            **_SAMPLING,
            **_THINKING,
            "input": _any(TEXT, _array(ref("InputItem"))),
            "instructions": _any(TEXT, _array(ref("InputItem"))),
            "previous_response_id": TEXT,
            "max_output_tokens": _LIMIT,
            "stop": _STOP,
            "top_logprobs": _integer(0, sampling.MAX_TOP_LOGPROBS),
            "include": _array(TEXT),
            "tools": _array(ANY_OBJECT, most=MAX_TOOLS),
            "tool_choice": _any(_text("auto", "none", "required"), _object({"type": NAME})),
            "parallel_tool_calls": FLAG,
            "reasoning": _object({}, {"effort": _EFFORT, "summary": TEXT}),
            "text": _object({}, {"format": _object({}, {"type": TEXT, "schema": ANY_OBJECT})}),
            "metadata": {"type": "object", "additionalProperties": _or_null(TEXT)},
            "return_progress": FLAG,
        },
    ),
    "MessagesRequest": _object(
        {"messages": _array(ref("Turn"), least=1), "max_tokens": _integer(1)},
        {
            **_COMMON,
            **_SAMPLING,
            **_THINKING,
            "system": _any(TEXT, _array(_any(TEXT, ref("Block")))),
            "stop_sequences": _STOP,
            "tools": _array(ref("OwnTool"), most=MAX_TOOLS),
            "tool_choice": _object(
                {},
                {
                    "type": _text("auto", "any", "tool", "none"),
                    "name": NAME,
                    "disable_parallel_tool_use": FLAG,
                },
            ),
            "output_config": _object({}, {"effort": _EFFORT, "format": ANY_OBJECT}),
        },
    ),
    "TokenizeRequest": _any(
        _object({"prompt": TEXT}, {"return_token_strs": FLAG, "add_special_tokens": FLAG}),
        _object(
            {"messages": _MESSAGES},
            {"tools": _TOOLS, "add_generation_prompt": FLAG, "return_token_strs": FLAG},
        ),
    ),
    "DetokenizeRequest": _object({"tokens": _TOKEN_IDS}),
}
REQUESTS["CountRequest"] = {**REQUESTS["MessagesRequest"], "required": ["messages"]}

PARTS: dict[str, Schema] = {
    "Part": _any(
        _object({"type": _text("text", "input_text", "output_text"), "text": TEXT}),
        _object({"type": _text("refusal"), "refusal": TEXT}),
        _object({"type": _text("image_url", "input_audio", "file")}),
    ),
    "Message": _object(
        {"role": _text(*ROLES)},
        {
            "content": _CONTENT,
            "name": TEXT,
            "reasoning_content": TEXT,
            "reasoning": TEXT,
            "tool_calls": _array(
                _object({"function": _object({"name": NAME}, {"arguments": _any(TEXT, ANY_OBJECT)})})
            ),
            "tool_call_id": TEXT,
            "partial": FLAG,
            "tools": _TOOLS,
        },
    ),
    "Tool": _any(
        _object({"type": _text("function"), "function": _FUNCTION}),
        _object({"type": _text("builtin_function", "web_search")}),
    ),
    "InputItem": _any(
        _object({"role": _text("system", "developer", "user", "assistant")}, {"content": _CONTENT}),
        _object(
            {"type": _text("function_call"), "call_id": TEXT, "name": NAME, "arguments": TEXT},
        ),
        _object({"type": _text("function_call_output"), "call_id": TEXT, "output": TEXT}),
        _object({"type": _text("reasoning")}, {"summary": _array(ref("Part")), "encrypted_content": TEXT}),
    ),
    "Turn": _object(
        {"role": _text("user", "assistant", "system", "developer")},
        {"content": _any(TEXT, _array(_any(TEXT, ref("Block"))))},
    ),
    "Block": _any(
        _object({"type": _text("text"), "text": TEXT}),
        _object({"type": _text("thinking"), "thinking": TEXT}, {"signature": TEXT}),
        _object({"type": _text("tool_use"), "name": NAME, "input": ANY_OBJECT}, {"id": TEXT}),
        _object(
            {"type": _text("tool_result")},
            {"tool_use_id": TEXT, "content": _any(TEXT, _array(ref("Block"))), "is_error": FLAG},
        ),
        _object({"type": _text("image"), "source": ANY_OBJECT}),
    ),
    "OwnTool": _object(
        {"name": {"type": "string", "pattern": _TOOL_NAME}, "input_schema": ANY_OBJECT},
        {"type": _text("custom"), "description": TEXT},
    ),
}

_USAGE = _object({"prompt_tokens": COUNT, "completion_tokens": COUNT, "total_tokens": COUNT})
_FINISH = _text("stop", "length", "tool_calls", "function_call")
_ANSWER: dict[str, Schema] = {"id": NAME, "created": COUNT, "model": NAME, "usage": _USAGE}

_STATUS = _object(
    {
        "server": _object(
            {
                "name": NAME,
                "version": NAME,
                "model": NAME,
                "context_tokens": COUNT,
                "key_required": FLAG,
                "uptime_s": AMOUNT,
                "draining": FLAG,
                "answers": COUNT,
            }
        ),
        "engine": _object(
            {
                "running": COUNT,
                "waiting": COUNT,
                "steps": COUNT,
                "failed_steps": COUNT,
                "put_back": COUNT,
                "integrity_errors": COUNT,
                "prompt_tokens": COUNT,
                "cached_tokens": COUNT,
                "completion_tokens": COUNT,
                **dict.fromkeys(("pages_to_ram", "bytes_to_ram", "pages_from_ram", "bytes_from_ram"), COUNT),
                **dict.fromkeys(("page_copy_errors", "cached_ram_tokens", "cached_journal_tokens"), COUNT),
                "ram_pages": COUNT,
                "finished": {"type": "object", "additionalProperties": COUNT},
                "recent_steps": COUNT,
                "recent_tokens_per_s": AMOUNT,
                "recent_gb_s": AMOUNT,
                "decode_tokens_per_s": AMOUNT,
                "prefill_tokens_per_s": AMOUNT,
                "busy": _number(0, 1),
            },
            {"read_gb_s": AMOUNT},
        ),
        "latents": _object(
            {"rows": NAME, **dict.fromkeys(("page_tokens", "pages", "used", "kept", "free"), COUNT)}
        ),
        "experts": _object(
            {"place": NAME},
            {
                **dict.fromkeys(("experts", "expert_bytes", "slots", "filled", "bytes_read"), COUNT),
                **dict.fromkeys(("to_fill", "fill_done", "fill_failed", "hits", "misses", "lost"), COUNT),
                "filling": FLAG,
                "hit_rate": _number(0, 1),
            },
        ),
        "device": _object(
            {"name": NAME},
            {
                "signal": NAME,
                "holds": {"type": "object", "additionalProperties": COUNT},
                **dict.fromkeys(("chunk", "handed_rows", "hot_slots", "hot_experts", "locked_bytes"), COUNT),
                "recorded": _array(COUNT),
                "hot_found": _number(0, 1),
            },
        ),
        "weights": _object({"lost_files": _array(NAME)}),
        "memory": _object(
            {"private_bytes": COUNT, "mapped_bytes": COUNT}, {"total_bytes": COUNT, "available_bytes": COUNT}
        ),
        "journal": _object({"enabled": FLAG}, {"writing": FLAG, "last_error": TEXT, "bytes": COUNT}),
    }
)

EVENT = _object({"data": TEXT}, {"event": TEXT})  # one of a stream

REPLIES: dict[str, Schema] = {
    "ChatCompletion": _object(
        {
            **_ANSWER,
            "object": _text("chat.completion"),
            "choices": _array(
                _object(
                    {
                        "index": COUNT,
                        "finish_reason": _FINISH,
                        "message": _object(
                            {"role": _text("assistant"), "content": _or_null(TEXT)},
                            {"reasoning_content": TEXT, "tool_calls": _array(ANY_OBJECT)},
                        ),
                    },
                    {"logprobs": ANY_OBJECT},
                ),
                least=1,
            ),
        }
    ),
    "Completion": _object(
        {
            **_ANSWER,
            "object": _text("text_completion"),
            "choices": _array(
                _object(
                    {"index": COUNT, "finish_reason": _text("stop", "length"), "text": TEXT},
                    {"logprobs": ANY_OBJECT},
                ),
                least=1,
            ),
        }
    ),
    "Response": _object(
        {
            "id": NAME,
            "object": _text("response"),
            "status": _text("completed", "incomplete", "failed", "in_progress"),
            "output": _array(_object({"type": NAME})),
        },
        {"usage": _object({"input_tokens": COUNT, "output_tokens": COUNT, "total_tokens": COUNT})},
    ),
    "ResponseTokens": _object({"object": _text("response.input_tokens"), "input_tokens": COUNT}),
    "ResponseDeleted": _object({"id": NAME, "object": _text("response"), "deleted": FLAG}),
    "ItemList": _object({"object": _text("list"), "data": _array(ANY_OBJECT), "has_more": FLAG}),
    "AnthropicMessage": _object(
        {
            "id": NAME,
            "type": _text("message"),
            "role": _text("assistant"),
            "model": NAME,
            "content": _array(_object({"type": _text("text", "thinking", "tool_use")})),
            "stop_reason": _text(
                "end_turn", "max_tokens", "stop_sequence", "tool_use", "model_context_window_exceeded"
            ),
            "usage": _object({"input_tokens": COUNT, "output_tokens": COUNT}),
        },
        {"stop_sequence": TEXT},
    ),
    "AnthropicCount": _object({"input_tokens": COUNT}),
    "Model": _object({"id": NAME}),
    "ModelList": _object({"data": _array(ref("Model"), least=1)}),
    "Tokens": _object(
        {"count": COUNT, "max_model_len": COUNT, "tokens": _array(COUNT)}, {"token_strs": _array(TEXT)}
    ),
    "Text": _object({"prompt": TEXT}),
    "Health": _object({"status": _text("ok", "draining"), "model": NAME}),
    "Status": _STATUS,
    "Error": _object({"error": _object({"message": TEXT, "type": NAME}, {"param": TEXT, "code": TEXT})}),
    "AnthropicError": _object(
        {
            "type": _text("error"),
            "error": _object({"type": NAME, "message": TEXT}),
            "request_id": NAME,
        }
    ),
}
