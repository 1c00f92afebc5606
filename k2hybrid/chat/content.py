"""The texts of an answer on their way out: what must wait, and what a marker makes of it.

Three things are held back: the beginning of a possible stop string, white space directly after a marker, and
text that may be a section marker in its singular spelling (see `stream.py`). A reasoning has only the last.
"""

from __future__ import annotations

from collections.abc import Sequence

from k2hybrid.chat.holdback import StopScan

SINGULAR_BEGIN = "<|tool_call_section_begin|>"
SINGULAR_END = "<|tool_call_section_end|>"


class SectionBegin:
    """Holds back text that may be, or is, the singular section begin: the next marker decides."""

    def __init__(self) -> None:
        self._pending = ""

    def push(self, text: str) -> str:
        """The text that can go out now."""
        text = self._pending + text
        at = _singular_start(text)
        self._pending = text[at:]
        return text[:at]

    def leave(self, *, before_call: bool = False) -> str:
        """The text held back, as the text ends; before a call the spelling was the marker."""
        text, self._pending = self._pending, ""
        return "" if before_call and text.startswith(SINGULAR_BEGIN) else text


class ContentText:
    """Text in, text that may go out. `stopped` once a stop string was met."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._scan = StopScan(stop)
        self._space = ""  # directly after a marker: dropped if another marker follows
        self._at_marker = True  # no content yet since the last marker
        self._begin = SectionBegin()
        self._after_call = False  # of a call without a section: its singular end may follow
        self.after_section = False

    @property
    def stopped(self) -> bool:
        return self._scan.stopped

    @property
    def stopped_by(self) -> str | None:
        """The stop string that was met."""
        return self._scan.stopped_by

    def begin(self, *, after_section: bool = False, after_call: bool = False) -> None:
        """Content starts here; `after_call`: after a call that had no section."""
        self._at_marker = True
        self.after_section = after_section
        self._after_call = after_call

    def push(self, text: str) -> str:
        """The text that can go out now."""
        text = self._advance(self._scan.push(text))
        return text + self._rest(keep_space=True) if self.stopped else text

    def leave(self, *, before_call: bool = False) -> str:
        """The text held back, as a marker is here: white space since the last one is dropped."""
        text = self._advance(self._scan.flush())
        return text + self._rest(keep_space=False, before_call=before_call)

    def finish(self) -> str:
        """The text held back, as the answer is over."""
        return self._advance(self._scan.flush()) + self._rest(keep_space=not self.after_section)

    def _advance(self, text: str) -> str:
        if self._at_marker:
            text = self._space + text
            if self._after_call:
                bare = text.lstrip()
                if len(bare) < len(SINGULAR_END) and SINGULAR_END.startswith(bare):
                    self._space = text
                    return ""
                self._after_call = False
                text = bare[len(SINGULAR_END) :] if bare.startswith(SINGULAR_END) else text
            if not text.strip():
                self._space = text
                return ""
            self._space, self._at_marker = "", False
        return self._begin.push(text)

    def _rest(self, *, keep_space: bool, before_call: bool = False) -> str:
        text = self._space if keep_space or self._space.strip() else ""
        self._space, self._at_marker, self._after_call = "", True, False
        return text + self._begin.leave(before_call=before_call)


def _singular_start(text: str) -> int:
    """Where text begins that may be, or is, the singular section begin and white space up to the end."""
    at = text.rfind(SINGULAR_BEGIN)
    if at >= 0 and not text[at + len(SINGULAR_BEGIN) :].strip():
        return at
    for size in range(min(len(text), len(SINGULAR_BEGIN) - 1), 0, -1):
        if text.endswith(SINGULAR_BEGIN[:size]):
            return len(text) - size
    return len(text)
