"""When a chat answer ends: at a stop token, or once its content holds a stop string. Runs in the engine."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from k2hybrid.chat.markers import Markers
from k2hybrid.chat.stream import ChatStream
from k2hybrid.chat.tokenizer import Tokenizer


class ChatStopRule:
    """A `types.StopRule`: stateful, one per job.

    Without stop strings it is one set look-up. With them it reads the tokens as `ChatStream` does
    (microseconds a token), so that both agree on which text is content and where it stops.

    Args:
        pauses: asked at the end of every call whether generation is to end here for a while.
    """

    def __init__(
        self,
        markers: Markers,
        tokenizer: Tokenizer,
        stop_ids: Collection[int] | None = None,
        stop: Sequence[str] = (),
        *,
        in_reasoning: bool = False,
        pauses: Callable[[], bool] = lambda: False,
    ) -> None:
        self._pauses = pauses
        self._call_end = markers.call_end
        self._stop_ids = tokenizer.stop_ids if stop_ids is None else frozenset(stop_ids)
        self._stream = (
            ChatStream(markers, tokenizer, stop=stop, in_reasoning=in_reasoning) if any(stop) else None
        )

    @property
    def paused(self) -> bool:
        """Whether generation ended for something to be looked at."""
        return self._pauses()

    def push(self, token: int) -> bool:
        """True if generation ends with `token`."""
        if token in self._stop_ids:
            return True
        if self._stream is not None:
            self._stream.push(token)
            if self._stream.stopped:
                return True
        return token == self._call_end and self._pauses()
