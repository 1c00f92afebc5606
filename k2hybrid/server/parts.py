"""The content of a message: text, or parts of which only text can be read. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from k2hybrid.errors import RequestError
from k2hybrid.server.fields import Fields, wrong_type

_TEXT_KEYS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
_MEDIA = {
    "image": "image",
    "image_url": "image",
    "input_image": "image",
    "audio": "audio",
    "audio_url": "audio",
    "input_audio": "audio",
    "video": "video",
    "video_url": "video",
    "file": "file",
    "input_file": "file",
    "document": "file",
}


def omitted(kind: str) -> str:
    """What stands in the prompt for a part that the model cannot read."""
    return f"[{kind} omitted: this model reads text only]"


def parse_content(fields: Fields, *, refuse_media: bool) -> str | tuple[Mapping[str, Any], ...] | None:
    """The `content` of a message.

    An image, a sound or a file is refused with `refuse_media`: whoever just sent it expects it to be seen.
    Elsewhere (in what a tool returned, in older turns) a line says that it was left out, and work goes on.
    """
    value = fields.value.get("content")
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise wrong_type(fields.name("content"), "a string or an array of parts", value)
    parts = (_part(part, f"{fields.name('content')}[{i}]", refuse_media) for i, part in enumerate(value))
    return tuple({"type": "text", "text": text} for text in parts)


def _part(value: Any, path: str, refuse_media: bool) -> str:
    if isinstance(value, str):
        return value
    part = Fields.of(value, path)
    kind = part.required_text("type")
    if kind in _MEDIA and not refuse_media:
        return omitted(_MEDIA[kind])
    if kind not in _TEXT_KEYS:
        raise RequestError(
            f"{path}.type {kind[:40]!r} cannot be read: this model takes text parts only",
            param=f"{path}.type",
            code="unsupported_content",
        )
    key = _TEXT_KEYS[kind]
    text = part.text(key)
    if text is None:
        raise RequestError(f"{path}.{key} is missing", param=f"{path}.{key}", code="missing_required")
    return text
