"""What the model said, kept as token ids, and found again in a client's history by its meaning.

Clients do not echo an answer token by token: they drop the reasoning, rename tool-call ids, re-serialise
arguments, trim white space. An exchange is therefore known by what such clients keep: the meaning of the
messages before it (a digest chain) and of its own visible part. A history is then completed and, once
rendered, spliced: where a rendered assistant message means what was generated, the generated ids take its
place, so that the cached latents fit to the last token. Where the template changed it (reasoning is dropped
after a finished run) or the client did (other reasoning), the rendered ids stand.

Pure; imports only layer 0 and this room. Thread-safe.
"""

from __future__ import annotations

import hashlib
import itertools
import threading
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import is_
from typing import Any, TypeVar

from k2hybrid.chat.conversation import exact
from k2hybrid.chat.growing import Held
from k2hybrid.chat.markers import Markers
from k2hybrid.chat.meaning import meaning, plain_text, same_words
from k2hybrid.chat.stream import ChatStream
from k2hybrid.chat.tokenizer import Tokenizer
from k2hybrid.types import (
    Content,
    Event,
    Malformed,
    Message,
    Reasoning,
    ToolCall,
    ToolCallArguments,
    ToolCallStart,
)

MAX_TOKENS = 4 << 20  # of all exchanges together
_OVERHEAD = 64  # tokens that an exchange counts for beside its own
_ALIKE = 8  # answers that mean the same after the same history; the newest are kept
_KEYS = 16_384

_Value = TypeVar("_Value")


@dataclass(frozen=True, slots=True)
class Exchange:
    """One answer: `ids` as generated, the stop token included if there was one."""

    scope: str
    context_key: str  # the meaning of the messages before it
    message_key: str  # the meaning of its visible part
    response_id: str
    session: str  # the response id of the first answer of its history
    reasoning: str
    ids: tuple[int, ...]
    store: bool = True  # False: it must not come to lie on a disk, not by later turns either

    @property
    def size(self) -> int:
        """Tokens that it counts for."""
        return _OVERHEAD + len(self.ids) + len(self.reasoning) // 4


@dataclass(frozen=True, slots=True)
class Recalled:
    """A history whose known answers are completed. `known` maps message positions to exchanges."""

    messages: tuple[Message, ...]
    known: Mapping[int, Exchange] = field(default_factory=dict)
    context_key: str = ""  # of all messages

    @property
    def session(self) -> str:
        """Of the latest known answer; empty if none is known."""
        return self.known[max(self.known)].session if self.known else ""

    @property
    def store(self) -> bool:
        """Whether all that was restored may be written to disk."""
        return all(exchange.store for exchange in self.known.values())


@dataclass(frozen=True, slots=True)
class _History:
    """Messages as a client sent them, what they mean, and what was completed."""

    scope: str
    given: list[Any]  # `exact`
    keys: list[str]
    chain: list[str]  # the meaning of all before each message, and of all
    completed: list[Message]
    chars: list[int]  # before each message, and of all


@dataclass(frozen=True, slots=True)
class _Spliced:
    """Rendered ids; their assistant messages up to `end` are spliced in `ids`, by the exchanges `answers`."""

    rendered: list[int]
    answers: list[Exchange | None]
    end: int
    ids: list[int]


@dataclass(frozen=True, slots=True)
class Answer:
    """What a stream of events says, in one piece."""

    reasoning: str
    content: str
    calls: tuple[tuple[str, str], ...]  # name, arguments
    malformed: bool = False  # it holds what is neither text nor a usable call

    def message(self) -> Message:
        """The answer as a message of the history."""
        calls = tuple(ToolCall(f"call_{i}", name, text) for i, (name, text) in enumerate(self.calls))
        return Message("assistant", self.content, reasoning=self.reasoning or None, tool_calls=calls)

    def same_as(self, other: Answer) -> bool:
        """Whether both mean the same, reasoning included."""
        mine, others = self.message(), other.message()
        return same_words(self.reasoning, other.reasoning) and meaning(mine) == meaning(others)


def gather(events: Sequence[Event]) -> Answer:
    """Join the events of an answer."""
    reasoning, content, calls = [], [], list[tuple[str, list[str]]]()
    for event in events:
        match event:
            case Reasoning(text):
                reasoning.append(text)
            case Content(text):
                content.append(text)
            case ToolCallStart(name=name):
                calls.append((name, []))
            case ToolCallArguments(text=text):
                calls[-1][1].append(text)
            case _:
                pass
    malformed = any(isinstance(event, Malformed) for event in events)
    called = tuple((name, "".join(parts)) for name, parts in calls)
    return Answer("".join(reasoning), "".join(content), called, malformed)


class Exchanges:
    """Answers of the recent past, least recently used out first.

    Args:
        max_tokens: ids kept, of all exchanges together.
    """

    def __init__(self, markers: Markers, tokenizer: Tokenizer, max_tokens: int = MAX_TOKENS) -> None:
        self._markers = markers
        self._tokenizer = tokenizer
        self._max_tokens = max_tokens
        self._tokens = 0
        # Digest of generated and of rendered ids → whether they mean the same: all come back with every turn.
        self._verdicts: OrderedDict[bytes, bool] = OrderedDict()
        self._keys: OrderedDict[bytes, str] = OrderedDict()  # digest of a message → of its meaning
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._histories: Held[_History] = Held()
        self._spliced: Held[_Spliced] = Held()  # by tokens
        # (scope, context, message) → response id → exchange, oldest first in both.
        self._kept: OrderedDict[tuple[str, str, str], dict[str, Exchange]] = OrderedDict()

    def __len__(self) -> int:
        with self._lock:
            return sum(map(len, self._kept.values()))

    def add(self, exchange: Exchange) -> None:
        """Keep `exchange`; one with its response id is replaced."""
        key = (exchange.scope, exchange.context_key, exchange.message_key)
        with self._lock:
            among = self._kept.setdefault(key, {})
            self._kept.move_to_end(key)
            former = among.pop(exchange.response_id, None)
            among[exchange.response_id] = exchange
            self._tokens += exchange.size - (former.size if former else 0)
            while len(among) > _ALIKE:
                self._tokens -= among.pop(next(iter(among))).size
            while self._tokens > self._max_tokens and len(self._kept) > 1:
                _, dropped = self._kept.popitem(last=False)
                self._tokens -= sum(e.size for e in dropped.values())

    def made(
        self,
        scope: str,
        before: Recalled,
        answer: Answer,
        ids: Sequence[int],
        response_id: str,
        *,
        store: bool = True,
    ) -> Exchange:
        """The exchange of `answer`, generated as `ids` after the messages of `before`."""
        return Exchange(
            scope=scope,
            context_key=before.context_key,
            message_key=self._key(answer.message()),
            response_id=response_id,
            session=before.session or response_id,
            reasoning=answer.reasoning,
            ids=tuple(ids),
            store=store,
        )

    def recall(self, scope: str, messages: Sequence[Message]) -> Recalled:
        """Find the answers in `messages`, and give those without reasoning theirs back."""
        given = [exact(message) for message in messages]
        with self._lock:
            number, base, known = self._histories.longest(
                given, lambda history: history.given if history.scope == scope else []
            )
        base = base or _History(scope, [], [], [""], [], [0])
        keys, chain, chars = base.keys[:known], base.chain[: known + 1], base.chars[: known + 1]
        for message in messages[known:]:
            keys.append(self._key(message))
            chain.append(_chained(chain[-1], keys[-1]))
            chars.append(chars[-1] + _chars(message))
        completed = [*base.completed[:known], *messages[known:]]
        found: dict[int, Exchange] = {}
        for at, message in enumerate(messages):
            if message.role != "assistant" or message.partial:
                continue
            exchange = self._find((scope, chain[at], keys[at]), message)
            reasoning = message.reasoning
            if exchange is not None:
                found[at] = exchange
                reasoning = exchange.reasoning or reasoning
            if completed[at].reasoning != reasoning:
                completed[at] = message.with_reasoning(reasoning)
        history = _History(scope, given, keys, chain, completed, chars)
        with self._lock:
            grown = number if known == len(base.given) else None
            self._histories.put(next(self._numbers), history, chars[-1], grown)
        return Recalled(tuple(completed), found, chain[-1])

    def spliced(self, ids: list[int], recalled: Recalled) -> list[int]:
        """Rendered `ids` with the known answers as they were generated, where they mean the same.

        Left alone if the template does not write one assistant header for each assistant message.
        """
        if not recalled.known:
            return ids
        answers = [
            recalled.known.get(i)
            for i, m in enumerate(recalled.messages)
            if m.role == "assistant" and not m.partial
        ]
        number, base = self._begun(ids, answers)
        new = list(_assistant_spans(ids, self._markers, base.end))
        n_spans = len(base.answers) + len(new)
        if n_spans < len(answers):
            return ids
        result, done = list(base.ids), base.end
        for exchange, (start, stop) in zip(answers[len(base.answers) :], new, strict=False):
            if exchange is None or not self._stands_for(exchange, ids[start:stop]):
                continue
            result += ids[done:start]
            result += exchange.ids
            done = stop
        if n_spans == len(answers):  # else it is not known which header is whose
            end = new[-1][1] if new else base.end
            so_far = _Spliced(ids, answers, end, result + ids[done:end])
            with self._lock:
                self._spliced.put(next(self._numbers), so_far, len(ids), number)
        return result + ids[done:]

    def _begun(self, ids: list[int], answers: list[Exchange | None]) -> tuple[int | None, _Spliced]:
        """The newest splicing that goes on with these ids and answers."""
        with self._lock:
            for number, held in self._spliced.newest_first():
                n_answers = len(held.answers)
                # Identity is quick, and an exchange that was replaced is another.
                if (
                    n_answers <= len(answers)
                    and all(map(is_, held.answers, answers))
                    and ids[: held.end] == held.rendered[: held.end]
                ):
                    return number, held
        return None, _Spliced([], [], 0, [])

    def _find(self, key: tuple[str, str, str], message: Message) -> Exchange | None:
        with self._lock:
            among = self._kept.get(key)
            if among is None:
                return None
            self._kept.move_to_end(key)
            candidates = list(among.values())
        given = message.reasoning
        if given and not given.isspace():
            candidates = [e for e in candidates if same_words(e.reasoning, given)]
        named = [e for e in candidates if e.response_id == message.response_id]
        return next(reversed(named or candidates), None)

    def _stands_for(self, exchange: Exchange, rendered: list[int]) -> bool:
        # Without its end token an answer was cut off; what closes it is the template's to say.
        if not exchange.ids or exchange.ids[-1] != rendered[-1]:
            return False
        if list(exchange.ids) == rendered:
            return False  # as it is already
        both = array("I", [len(rendered), *rendered, *exchange.ids])
        digest = hashlib.blake2b(both, digest_size=16).digest()
        with self._lock:
            known = self._verdicts.get(digest)
        if known is None:
            said = self._read(exchange.ids)
            # The model must not read what is malformed, nor other ids of calls than canonical ones.
            known = not said.malformed and self._headers(exchange.ids) == self._headers(rendered)
            known = known and said.same_as(self._read(rendered))
        with self._lock:
            _remember(self._verdicts, digest, known)
        return known

    def _headers(self, ids: Sequence[int]) -> list[str]:
        """The ids of the calls as written."""
        headers = []
        start = None
        for at, token in enumerate(ids):
            if token == self._markers.call_begin:
                start = at + 1
            elif token == self._markers.argument_begin and start is not None:
                headers.append(self._tokenizer.decode(ids[start:at]).strip())
                start = None
        return headers

    def _key(self, message: Message) -> str:
        """Digest of what a message means; remembered by its text's digest, as histories come back."""
        calls = [(call.name, call.arguments) for call in message.tool_calls]
        raw = repr((message.role, plain_text(message.content), calls)).encode("utf-8", "surrogatepass")
        digest = hashlib.blake2b(raw, digest_size=16).digest()
        with self._lock:
            known = self._keys.get(digest)
            if known is not None:
                self._keys.move_to_end(digest)
                return known
        key = hashlib.blake2b(meaning(message).encode(), digest_size=16).hexdigest()
        with self._lock:
            _remember(self._keys, digest, key)
        return key

    def _read(self, ids: Sequence[int]) -> Answer:
        stream = ChatStream(self._markers, self._tokenizer)
        events: list[Event] = []
        for token in ids:
            events += stream.push(token)
        return gather([*events, *stream.finish()])


def _remember(known: OrderedDict[bytes, _Value], digest: bytes, value: _Value) -> None:
    known[digest] = value
    known.move_to_end(digest)
    while len(known) > _KEYS:
        known.popitem(last=False)


def _assistant_spans(ids: list[int], markers: Markers, at: int) -> Iterator[tuple[int, int]]:
    """From behind each assistant header to behind its end token, from `at` on.

    Control tokens are the template's alone.
    """
    try:
        while True:
            start = ids.index(markers.im_middle, ids.index(markers.im_assistant, at)) + 1
            at = ids.index(markers.im_end, start) + 1
            yield start, at
    except ValueError:  # no further header, or the open one of the answer to come
        return


def _chars(message: Message) -> int:
    called = sum([len(call.arguments) for call in message.tool_calls])
    return len(plain_text(message.content)) + len(message.reasoning or "") + called


def _chained(chain: str, key: str) -> str:
    return hashlib.blake2b(f"{chain}{key}".encode(), digest_size=16).hexdigest()
