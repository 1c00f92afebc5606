"""The conversation of an Anthropic messages request → messages. Pure.

A user turn's tool results become tool messages, in order, and its text a user message behind them: the
model reads results directly after the calls. Of what is no text a line says that it was left out; only an
image in the newest user message is refused, since whoever just sent it expects it to be seen. Blocks of tools
that ran elsewhere (`server_tool_use`, `web_search_tool_result`, …) leave what text they hold.

Texts of one turn are joined by blank lines; those of an assistant, whose blocks may be one answer cut up, and
its reasoning, by nothing.
"""

from __future__ import annotations

from collections.abc import Iterable

import orjson

from k2hybrid.errors import RequestError
from k2hybrid.server.fields import Fields, wrong_type, wrong_value
from k2hybrid.server.parts import omitted
from k2hybrid.server.sealed import Unsealing
from k2hybrid.types import Message, ToolCall

# Begins a line that an agent puts before its system prompt. It changes from request to request in some
# releases, and would part the prompt from everything known.
_BILLING = "x-anthropic-billing-header"


def parse_history(fields: Fields) -> tuple[Message, ...]:
    """`system` and `messages`, of which there must be one. A last assistant message is to be continued."""
    entries = fields.objects("messages")
    if not entries:
        raise RequestError(
            "messages must hold at least one message", param="messages", code="missing_required"
        )
    roles = [entry.required_text("role") for entry in entries]
    last = len(entries) - 1
    newest = max((i for i, role in enumerate(roles) if role == "user"), default=-1)
    unsealing = Unsealing()
    messages = _system(fields)
    for i, (role, entry) in enumerate(zip(roles, entries, strict=True)):
        if role == "user":
            messages += _user(entry, refuse_images=i == newest)
        elif role == "assistant":
            messages.append(_assistant(entry, unsealing, last=i == last))
        elif role in ("system", "developer"):
            messages.append(Message("system", _joined(map(_readable, _blocks(entry, "content")))))
        else:
            raise wrong_value(
                entry.name("role"), f"{role[:40]!r} is unknown; one of user, assistant, system, developer"
            )
    return tuple(messages)


def _system(fields: Fields) -> list[Message]:
    texts = [_readable(block) for block in _blocks(fields, "system")]
    if texts and texts[0].startswith(_BILLING):
        texts[0] = texts[0].partition("\n")[2].lstrip("\n")
    text = _joined(texts)
    return [Message("system", text)] if text else []


def _user(entry: Fields, *, refuse_images: bool) -> list[Message]:
    results: list[Message] = []
    texts: list[str] = []
    for block in _blocks(entry, "content"):
        if block.text("type") == "tool_result":
            results.append(_tool_result(block))
        else:
            texts.append(_readable(block, refuse_images=refuse_images))
    text = _joined(texts)
    return [*results, Message("user", text)] if text or not results else results


def _tool_result(block: Fields) -> Message:
    text = _joined(map(_readable, _blocks(block, "content")))
    if block.flag("is_error") and not text.lstrip().lower().startswith("error"):
        text = f"Error: {text}" if text else "Error"
    return Message("tool", text, tool_call_id=block.text("tool_use_id"))


def _assistant(entry: Fields, unsealing: Unsealing, *, last: bool) -> Message:
    reasoning: list[str] = []
    texts: list[str] = []
    calls: list[ToolCall] = []
    for block in _blocks(entry, "content"):
        match block.required_text("type"):
            case "thinking":
                reasoning.append(block.text("thinking") or unsealing.text(block.text("signature")))
            case "redacted_thinking":
                reasoning.append(unsealing.text(block.text("data")))
            case "tool_use":
                calls.append(_tool_call(block))
            case "text":
                texts.append(_text(block))
            case _:
                texts.append(_held_text(block))
    return Message(
        "assistant",
        "".join(texts),
        reasoning="".join(reasoning) or None,
        tool_calls=tuple(calls),
        partial=last and not calls,
    )


def _tool_call(block: Fields) -> ToolCall:
    given = block.value.get("input")
    if given is None or isinstance(given, dict):
        arguments = orjson.dumps(given or {}).decode()
    elif isinstance(given, str):  # of clients that keep the pieces of a stream as they came
        arguments = given
    else:
        raise wrong_type(block.name("input"), "an object", given)
    return ToolCall(block.text("id") or "", block.required_text("name"), arguments)


# --- blocks ---------------------------------------------------------------------------------------


def _blocks(fields: Fields, key: str) -> list[Fields]:
    """The blocks under `key`; a string is one of text, and null or an absent field is none."""
    value = fields.value.get(key)
    if value is None:
        return []
    if isinstance(value, str):
        return [_text_block(value, fields.name(key))]
    if not isinstance(value, list):
        raise wrong_type(fields.name(key), "a string or an array of blocks", value)
    paths = (f"{fields.name(key)}[{i}]" for i in range(len(value)))
    return [
        _text_block(item, path) if isinstance(item, str) else Fields.of(item, path)
        for item, path in zip(value, paths, strict=True)
    ]


def _text_block(text: str, path: str) -> Fields:
    return Fields({"type": "text", "text": text}, path)


def _joined(texts: Iterable[str]) -> str:
    return "\n\n".join(text for text in texts if text)


def _text(block: Fields) -> str:
    text = block.text("text")
    if text is None:
        raise RequestError(
            f"{block.name('text')} is missing", param=block.name("text"), code="missing_required"
        )
    return text


def _readable(block: Fields, *, refuse_images: bool = False) -> str:
    """What the model reads of a block that is not an assistant's."""
    kind = block.required_text("type")
    if kind == "text":
        return _text(block)
    if kind == "image":
        if refuse_images:
            raise RequestError(
                f"{block.path} is an image: this model reads text only",
                param=block.path,
                code="unsupported_content",
            )
        return omitted("image")
    if kind == "document":
        source = block.child("source")
        text = source.text("data") if source.text("type") == "text" else _held_text(source)
        return _joined([block.text("title") or "", block.text("context") or "", text or omitted(kind)])
    if kind == "search_result":
        return _joined([block.text("title") or "", block.text("source") or "", _held_text(block)])
    if kind == "tool_reference":  # all declared tools are, from the beginning
        return f"The tool {block.text('tool_name') or ''} is ready for use."
    return _held_text(block) or omitted(kind[:40])


def _held_text(block: Fields) -> str:
    """The text in a block of any kind: its own, or that of the blocks in its content."""
    own, content = block.value.get("text"), block.value.get("content")
    if isinstance(own, str):
        return own
    if isinstance(content, dict):  # the one result of a tool that ran elsewhere
        return _held_text(Fields(content, block.name("content")))
    if isinstance(content, str | list):
        return _joined(
            _readable(inner) if inner.text("type") in ("text", "image") else _held_text(inner)
            for inner in _blocks(block, "content")
        )
    return ""
