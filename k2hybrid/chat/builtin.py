"""The rendering used where a checkpoint has no chat template: Kimi-K2-Thinking's own format.

Written as pieces, so that only the control tokens named here by id can ever be control tokens.
"""

from __future__ import annotations

import json
from typing import Any

from k2hybrid.chat.conversation import Conversation, is_image, part_text
from k2hybrid.chat.markers import Markers
from k2hybrid.chat.prompt import Piece, merged, split_specials
from k2hybrid.chat.tokenizer import Tokenizer

DEFAULT_SYSTEM = "You are Kimi, an AI assistant created by Moonshot AI."
_IMAGE = "<|media_start|>image<|media_content|><|media_pad|><|media_end|>\n"  # the first is no special token


class BuiltinRenderer:
    """Tool declarations, default system prompt, messages, generation prompt."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._markers = Markers.from_specials(tokenizer.specials)
        self._image = list(split_specials(_IMAGE, tokenizer))

    def render(self, conversation: Conversation, add_generation_prompt: bool) -> list[Piece]:
        """The conversation as pieces, `merged`; `conversation.partial` is not looked at."""
        pieces: list[Piece] = []
        messages = conversation.messages
        if conversation.tools:
            declared = json.dumps(
                conversation.tools, ensure_ascii=False, separators=(",", ":"), sort_keys=True
            )
            pieces += self._message(self._markers.im_system, "tool_declare", [declared])
        if not messages or messages[0]["role"] != "system":
            pieces += self._message(self._markers.im_system, "system", [DEFAULT_SYSTEM])
        last_answer = max(
            (i for i, m in enumerate(messages) if m["role"] == "assistant" and not m.get("tool_calls")),
            default=-1,
        )
        for i, message in enumerate(messages):
            header = message.get("name") or message["role"]
            if message["role"] == "assistant":
                body = self._assistant(message, keep_reasoning=i > last_answer)
                pieces += self._message(self._markers.im_assistant, header, body)
            elif message["role"] == "user":
                pieces += self._message(self._markers.im_user, header, self._content(message))
            elif message["role"] == "tool":
                title = f"## Return of {message.get('tool_call_id') or ''}\n"
                pieces += self._message(self._markers.im_system, header, [title, *self._content(message)])
            else:
                pieces += self._message(self._markers.im_system, header, self._content(message))
        if add_generation_prompt:
            pieces += [self._markers.im_assistant, "assistant", self._markers.im_middle]
        return merged(pieces)

    def _message(self, opener: int, header: str, body: list[Piece] | list[str]) -> list[Piece]:
        return [opener, header, self._markers.im_middle, *body, self._markers.im_end]

    def _assistant(self, message: dict[str, Any], keep_reasoning: bool) -> list[Piece]:
        markers = self._markers
        reasoning = message.get("reasoning_content") or ""
        body: list[Piece] = [markers.think_begin, reasoning if keep_reasoning else "", markers.think_end]
        body += self._content(message)
        if calls := message.get("tool_calls"):
            body.append(markers.section_begin)
            for call in calls:
                body += [markers.call_begin, call["id"], markers.argument_begin]
                body += [call["function"]["arguments"], markers.call_end]
            body.append(markers.section_end)
        return body

    def _content(self, message: dict[str, Any]) -> list[Piece]:
        content = message["content"]
        if isinstance(content, str):
            return [content]
        pieces: list[Piece] = []
        for part in content:
            pieces += self._image if is_image(part) else [part_text(part)]
        return pieces
