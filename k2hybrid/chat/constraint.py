"""Which tokens an answer may go on with: thinking, content, tool calls. A machine over tokens.

Free text stays free. What it guarantees: reasoning ends within its budget; control tokens come only where the
format has them; a tool section holds calls of declared tools with canonical ids and arguments that their
grammar allows, or JSON content that its grammar allows; and what is open is closed before the last token, as
long as an ending is known that fits. What the grammar determines is appended at once.

`chat` knows no tensors: `Allowed` says what is allowed, and `runtime/mask.py` writes it into logits.
"""

from __future__ import annotations

import codecs
import enum
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from llguidance import LLMatcher

from k2hybrid.chat.closing import Quotes, after
from k2hybrid.chat.grammar import Grammar, Grammars
from k2hybrid.chat.markers import Markers
from k2hybrid.chat.toolcall import canonical_id

MAX_CALLS = 128  # of one answer
_SPARE = 64  # tokens: how much before an ending would no longer fit endings are looked for
_SEARCH_S = 5e-3  # for one ending, and for all of an answer together: other answers wait meanwhile
_SEARCHES_S = 0.5
_CHARACTER = 3  # tokens that a character may still take after the reasoning's last


class Phase(enum.Enum):
    """Where in an answer one stands."""

    START = enum.auto()  # nothing yet; reasoning may begin
    REASONING = enum.auto()
    CONTENT = enum.auto()
    JSON = enum.auto()  # content under a grammar
    SECTION = enum.auto()  # of tool calls, between two
    HEADER = enum.auto()  # a call's id
    ARGUMENTS = enum.auto()
    OVER = enum.auto()  # behind the section: nothing but the end


@dataclass(frozen=True, slots=True)
class CallableTool:
    """A declared tool and the grammar of its arguments."""

    name: str
    arguments: Grammar


@dataclass(frozen=True, slots=True)
class Rules:
    """What is asked of one answer.

    Attributes:
        tools: those that may be called; without any, no tool section can begin.
        required: at least one call.
        parallel: more than one call may be made.
        content: the content's grammar; None: free text.
        first_call_index: of the conversation.
        phase: where the prompt ends: START, REASONING or CONTENT.
        thinking_budget: tokens of reasoning at most.
        max_tokens: of the answer.
    """

    max_tokens: int
    thinking_budget: int
    phase: Phase = Phase.START
    tools: tuple[CallableTool, ...] = ()
    required: bool = False
    parallel: bool = True
    content: Grammar | None = None
    first_call_index: int = 0


@dataclass(frozen=True, slots=True)
class Allowed:
    """Tokens that may come next: `specials` by id; plain ones all, none, or those whose bit is set in `bits`
    (one bit per id, lowest first).
    """

    specials: tuple[int, ...]
    text: bool = False
    bits: bytes | None = None


@dataclass(slots=True)
class _State:
    phase: Phase
    matcher: LLMatcher | None = None
    begun: bool = False  # the matcher has read something
    quotes: Quotes = "outside"
    header: str = ""  # of the open call, as far as it is written
    tool: CallableTool | None = None  # whose arguments are open
    calls: int = 0  # begun
    thought: int = 0  # tokens of reasoning
    generated: int = 0  # tokens of the answer

    def copy(self) -> _State:
        return replace(self, matcher=None if self.matcher is None else self.matcher.deep_copy())


class Constraint:
    """One answer's. Not thread-safe: one caller at a time.

    `paused` after the end of a call whose arguments its grammar does not hold to the letter: they are to be
    validated; then `resume`, or `rewind`. `broken`: the grammar met a limit of its own; they are not valid.
    """

    def __init__(self, rules: Rules, grammars: Grammars, markers: Markers, stop_ids: Collection[int]) -> None:
        self._rules = rules
        self._grammars = grammars
        self._tokenizer = grammars.tokenizer
        self._markers = markers
        self._stop_ids = tuple(sorted(stop_ids))
        self._tools = {canonical_id(tool.name, 0)[:-1]: tool for tool in rules.tools}  # by header
        self._least_call = self._least_call_tokens()
        endings = [tool.arguments.end for tool in rules.tools]
        if rules.content is not None:
            endings.append(rules.content.end)
        longest = max((len(end) for end in endings if end is not None), default=0)
        self._near = 4 * longest + self._least_call + _SPARE
        self._ending: list[int] | None = None  # of the present state, where the end is near
        self._search_s = _SEARCHES_S
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self.paused = False
        self.broken = False
        self._state = _State(Phase.START)
        self._enter(rules.phase)

    @property
    def calls(self) -> int:
        """Calls begun so far."""
        return self._state.calls

    @property
    def needs_grammar(self) -> bool:
        """Whether `allowed` has to ask a grammar, which takes a while."""
        return self._state.matcher is not None

    def allowed(self) -> Allowed:
        """What may come next."""
        rules, markers, phase = self._rules, self._markers, self._state.phase
        section = (markers.section_begin,) if self._may_begin_section() else ()
        match phase:
            case Phase.START:
                if rules.required:
                    return Allowed((markers.think_begin, *section))
                if rules.content is not None:
                    return self._of_grammar((markers.think_begin, *section))
                return Allowed((markers.think_begin, *section, *self._stop_ids), text=True)
            case Phase.REASONING:
                if self._thought_out():
                    return Allowed((markers.think_end,))
                return Allowed((markers.think_end, *section), text=True)
            case Phase.CONTENT:
                if rules.required and section:
                    return Allowed(section)
                return Allowed((*section, *self._stop_ids), text=True)
            case Phase.JSON:
                if rules.required and section and not self._state.begun:
                    return Allowed(section)
                return self._of_grammar(() if self._state.begun else section, end=markers.im_end)
            case Phase.SECTION:
                more = self._state.calls == 0 or self._may_call_again()
                begin = (markers.call_begin,) if more else ()
                return Allowed((*begin, *((markers.section_end,) if self._state.calls else ())))
            case Phase.HEADER:
                return self._of_grammar((), end=markers.argument_begin)
            case Phase.ARGUMENTS:
                return self._of_grammar((), end=markers.call_end)
            case Phase.OVER:
                return Allowed((markers.im_end,))

    def accept(self, token: int) -> list[int]:
        """`token` was chosen. Returns what goes into the answer: it and what must follow; or, where after it
        nothing could be closed in time, an ending instead.
        """
        before = self._state.copy() if self._ending is not None else None
        out = self._take_all([token])
        if not self._structured():
            self._ending = None
            return out
        left = self._left()
        if left <= self._near:
            kept = self._ending
            if kept is not None and out == kept[: len(out)]:
                self._ending = kept[len(out) :]
                return out
            ending = self._find_ending()
            if ending is not None and len(ending) <= left:
                self._ending = ending
            elif before is not None and kept is not None:
                self._state, self._ending = before, None
                self.paused = self.broken = False
                return self._take_all(kept)
        return out

    def resume(self) -> None:
        """What was paused for is valid."""
        self.paused = False

    def rewind(self, generated: int) -> None:
        """Back to the beginning of the call, or of the JSON content, that was written last.

        Args:
            generated: tokens of the answer up to there.
        """
        self.paused = self.broken = False
        self._ending = None
        self._state.generated = generated
        if self._rules.content is not None and not self._state.calls:
            self._enter(Phase.JSON)
        else:
            self._state.calls -= 1
            self._enter(Phase.HEADER)

    # --- steps ------------------------------------------------------------------------------------

    def _take_all(self, tokens: list[int]) -> list[int]:
        """Take `tokens`, and then what must follow."""
        out: list[int] = []
        while tokens:
            for token in tokens:
                self._take(token)
                out.append(token)
                if self.paused or token in self._stop_ids or self._left() <= 0:
                    return out
            tokens = self._forced()
        return out

    def _take(self, token: int) -> None:
        state, markers = self._state, self._markers
        state.generated += 1
        if state.phase is Phase.JSON and token in self._stop_ids:
            self.broken = state.matcher is None or state.matcher.is_error()
        elif state.phase is Phase.ARGUMENTS and token == markers.call_end:
            self.broken = state.matcher is None or state.matcher.is_error()
            self.paused = self.broken or state.tool is None or not state.tool.arguments.exact
            self._enter(Phase.SECTION)
        elif token == markers.think_begin:
            self._enter(Phase.REASONING)
        elif token == markers.think_end:
            self._enter(Phase.CONTENT)
        elif token == markers.section_begin:
            self._enter(Phase.SECTION)
        elif token == markers.section_end:
            self._enter(Phase.OVER)
        elif token == markers.call_begin:
            self._enter(Phase.HEADER)
        elif token == markers.argument_begin:
            self._open_arguments()
        elif token < self._tokenizer.num_ranks:
            self._take_text(token)

    def _take_text(self, token: int) -> None:
        state = self._state
        data = self._tokenizer.token_bytes(token)
        match state.phase:
            case Phase.REASONING:
                state.thought += 1
                self._utf8.decode(data)
            case Phase.START:
                if self._rules.content is None:
                    self._enter(Phase.CONTENT)
                else:
                    state.phase = Phase.JSON
                    self._read(token, data)
            case Phase.HEADER:
                state.header += data.decode("utf-8", "replace")
                self._read(token, data)
            case Phase.JSON | Phase.ARGUMENTS:
                self._read(token, data)
            case _:
                pass

    def _read(self, token: int, data: bytes) -> None:
        state = self._state
        if state.matcher is not None and not (state.phase is Phase.HEADER and state.matcher.is_stopped()):
            state.matcher.consume_token(token)
            state.begun = True
            state.quotes = after(state.quotes, data)

    def _enter(self, phase: Phase) -> None:
        state, rules = self._state, self._rules
        if phase is Phase.CONTENT and rules.content is not None:
            phase = Phase.JSON
        state.phase, state.matcher, state.begun, state.quotes = phase, None, False, "outside"
        if phase is Phase.HEADER:
            state.calls += 1
            state.header = ""
            state.matcher = self._grammars.of_choices(tuple(self._tools)).begun()
        elif rules.content is not None and phase in (Phase.START, Phase.JSON):
            state.matcher = rules.content.begun()

    def _open_arguments(self) -> None:
        state = self._state
        state.tool = self._tools[state.header.rpartition(":")[0] + ":"]
        state.phase, state.begun, state.quotes = Phase.ARGUMENTS, False, "outside"
        state.matcher = state.tool.arguments.begun()

    def _forced(self) -> list[int]:
        """What must come next, if only one thing can."""
        state, markers = self._state, self._markers
        match state.phase:
            case Phase.REASONING if self._thought_out():
                return [markers.think_end]
            case Phase.CONTENT if self._rules.required and self._may_begin_section():
                return [markers.section_begin]
            case Phase.SECTION if not state.calls:
                return [markers.call_begin]
            case Phase.SECTION if not self._may_call_again():
                return [markers.section_end]
            case Phase.OVER:
                return [markers.im_end]
            case Phase.JSON if not state.begun and self._may_begin_section():
                return [markers.section_begin] if self._rules.required else []
            case Phase.HEADER if state.matcher is not None and state.matcher.is_stopped():
                return [*self._index_tokens(), markers.argument_begin]
            case Phase.JSON | Phase.HEADER | Phase.ARGUMENTS if state.matcher is not None:
                if state.matcher.is_stopped():
                    return [markers.im_end if state.phase is Phase.JSON else markers.call_end]
                return list(state.matcher.compute_ff_tokens())[: self._left()]
            case _:
                return []

    # --- what is asked ----------------------------------------------------------------------------

    def _of_grammar(self, specials: Sequence[int], end: int | None = None) -> Allowed:
        matcher = self._state.matcher
        assert matcher is not None
        bits = matcher.compute_bitmask()
        if end is not None and (matcher.is_error() or matcher.is_accepting()):
            specials = (*specials, end)
        return Allowed(tuple(specials), bits=None if matcher.is_error() else bits)

    def _structured(self) -> bool:
        return self._state.phase in (Phase.JSON, Phase.SECTION, Phase.HEADER, Phase.ARGUMENTS)

    def _thought_out(self) -> bool:
        over = self._state.thought - self._rules.thinking_budget
        return over >= 0 and (not self._utf8.getstate()[0] or over > _CHARACTER)

    def _may_begin_section(self) -> bool:
        return bool(self._rules.tools) and not self._state.calls and self._left() > self._least_call

    def _may_call_again(self) -> bool:
        roomy = self._left() > self._least_call
        return self._rules.parallel and self._state.calls < MAX_CALLS and roomy

    def _left(self) -> int:
        return self._rules.max_tokens - self._state.generated

    def _index_tokens(self) -> list[int]:
        """The open call's number, as it stands behind its name."""
        return self._tokenizer.encode(str(self._rules.first_call_index + self._state.calls - 1))

    # --- endings ----------------------------------------------------------------------------------

    def _least_call_tokens(self) -> int:
        """Tokens of a section with the shortest call."""
        lengths = [
            len(self._tokenizer.encode(header)) + len(tool.arguments.end or ())
            for header, tool in self._tools.items()
        ]
        return min(lengths) + 12 if lengths else 0  # markers, the end, and the call's number

    def _find_ending(self) -> list[int] | None:
        """Tokens from here to the end of the answer; None if none are found."""
        state, markers = self._state, self._markers
        if self.paused:
            return [markers.section_end, markers.im_end]
        tail = [markers.call_end, markers.section_end, markers.im_end]
        match state.phase:
            case Phase.SECTION:
                return tail[1:]
            case Phase.HEADER:
                return self._header_ending(tail)
            case Phase.ARGUMENTS if state.tool is not None:
                return self._text_ending(state.tool.arguments, tail)
            case Phase.JSON if self._rules.content is not None:
                return self._text_ending(self._rules.content, [markers.im_end])
            case _:
                return None

    def _text_ending(self, grammar: Grammar, tail: list[int]) -> list[int] | None:
        if self._state.matcher is None:
            return None
        if not self._state.begun:
            return None if grammar.end is None else [*grammar.end, *tail]
        started = time.monotonic()
        seconds = min(_SEARCH_S, self._search_s)
        end = self._grammars.closer.shortest_end(
            self._state.matcher, self._state.quotes, grammar.keys, grammar.pieces, seconds=seconds
        )
        self._search_s -= time.monotonic() - started
        return None if end is None else [*end, *tail]

    def _header_ending(self, tail: list[int]) -> list[int] | None:
        state = self._state
        best: list[int] | None = None
        for header, tool in self._tools.items():
            if tool.arguments.end is None or not header.startswith(state.header) or state.matcher is None:
                continue
            rest = self._tokenizer.encode(header[len(state.header) :])
            if state.matcher.validate_tokens(rest) != len(rest):
                continue
            ending = [*rest, *self._index_tokens(), self._markers.argument_begin, *tool.arguments.end, *tail]
            if best is None or len(ending) < len(best):
                best = ending
        return best
