"""Messages and tools → prompt, by the checkpoint's chat template or, where it has none, the built-in
rendering.

Whatever the template does, only its own text can become control tokens: see `render_worker.py`. Templates
come from the checkpoint alone; nothing in a request can bring one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from k2hybrid.chat.builtin import BuiltinRenderer
from k2hybrid.chat.conversation import Conversation, Preparation, text_of
from k2hybrid.chat.jinja import JinjaRenderer
from k2hybrid.chat.markers import Markers
from k2hybrid.chat.prompt import Assembler, Piece, Prompt, merged
from k2hybrid.chat.tokenizer import Tokenizer
from k2hybrid.errors import TemplateError
from k2hybrid.types import Message

TEMPLATE_FILE = "chat_template.jinja"
_MAX_TEMPLATE_BYTES = 1 << 20


class Renderer(Protocol):
    """A conversation → pieces of text and control tokens."""

    def render(self, conversation: Conversation, add_generation_prompt: bool) -> list[Piece]:
        """No two texts are neighbours. `conversation.partial` is not looked at. Raises TemplateError or
        RequestError.
        """


class ChatTemplate:
    """Renders conversations for one tokenizer. Thread-safe.

    `source` is the jinja text in use, None for the built-in rendering.
    """

    def __init__(self, tokenizer: Tokenizer, source: str | None = None, *, timeout_s: float = 10.0) -> None:
        self.source = source
        self._preparation = Preparation()
        self._assembler = Assembler(tokenizer)
        self._markers = Markers.from_specials(tokenizer.specials)
        self._jinja = None if source is None else JinjaRenderer(source, tokenizer, timeout_s=timeout_s)
        self._renderer: Renderer = BuiltinRenderer(tokenizer) if self._jinja is None else self._jinja

    @classmethod
    def load(cls, model_dir: str | Path, tokenizer: Tokenizer) -> ChatTemplate:
        """`chat_template.jinja`, else `chat_template` of tokenizer_config.json, else the built-in one."""
        path = Path(model_dir) / TEMPLATE_FILE
        if not path.exists():
            return cls(tokenizer, _template_in_config(tokenizer.config))
        try:
            if path.stat().st_size > _MAX_TEMPLATE_BYTES:
                raise TemplateError(f"{path} is larger than {_MAX_TEMPLATE_BYTES} bytes")
            return cls(tokenizer, path.read_text("utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise TemplateError(f"cannot read {path}: {error}") from error

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] = (),
        *,
        add_generation_prompt: bool = True,
    ) -> Prompt:
        """The prompt for a conversation.

        Tool-call ids in the history become canonical. A last assistant message with `partial` is continued:
        its text ends the prompt, whatever `add_generation_prompt` says.
        Raises RequestError where the messages are at fault, TemplateError where the template is.
        """
        conversation = self._preparation.prepare(messages, tools)
        partial = conversation.partial
        pieces = self._renderer.render(conversation, add_generation_prompt or partial is not None)
        in_reasoning = False
        if partial is not None:
            pieces, in_reasoning = continuation(partial, pieces, self._markers)
            pieces = merged(pieces)
        elif add_generation_prompt:
            in_reasoning = pieces[-1:] == [self._markers.think_begin]
        ids, text = self._assembler.assemble(pieces)
        return Prompt(ids, text, conversation.calls, in_reasoning)

    def close(self) -> None:
        """End the rendering process, if one runs. The next `render` starts another."""
        if self._jinja is not None:
            self._jinja.close()


def continuation(partial: dict[str, Any], pieces: list[Piece], markers: Markers) -> tuple[list[Piece], bool]:
    """Pieces that end in a generation prompt, continued with a partial assistant message.

    Returns the pieces and whether reasoning is left open: it is where there is reasoning but no content yet.
    A `name` replaces "assistant" in the header, where the generation prompt has Kimi's form.
    """
    reasoning = partial.get("reasoning_content") or ""
    content = text_of(partial["content"])
    name = partial.get("name")
    is_header = len(pieces) > 2 and (pieces[-3], pieces[-1]) == (markers.im_assistant, markers.im_middle)
    if name and is_header and isinstance(pieces[-2], str):
        pieces = [*pieces[:-2], name, pieces[-1]]
    if not reasoning and not content:
        return pieces, False
    if (
        pieces and pieces[-1] == markers.think_begin
    ):  # some templates open the reasoning in the generation prompt
        pieces = pieces[:-1]
    pieces = [*pieces, markers.think_begin, reasoning]
    if content:
        pieces += [markers.think_end, content]
    return pieces, not content


def _template_in_config(config: Mapping[str, Any]) -> str | None:
    """The `chat_template` key: a text, or a list of named ones, of which "default" counts."""
    value = config.get("chat_template")
    if isinstance(value, list):
        named = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}
        value = named.get("default")
        if value is None:
            raise TemplateError("tokenizer_config.json: chat_template lists no template named 'default'")
    if value is not None and not isinstance(value, str):
        raise TemplateError("tokenizer_config.json: chat_template is not a string")
    if value is not None and len(value) > _MAX_TEMPLATE_BYTES:
        raise TemplateError(f"tokenizer_config.json: chat_template is longer than {_MAX_TEMPLATE_BYTES}")
    return value
