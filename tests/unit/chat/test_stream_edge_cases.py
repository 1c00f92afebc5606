"""The edge cases that parsers of this format are known to fail, item by item, and what holds for all of them.

Every answer is read one byte a token, in the vocabulary's own merged tokens, and cut at random; the joined
events must be the same each time, and exactly those that are written here.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from k2hybrid.chat.exchanges import gather
from k2hybrid.chat.markers import Markers
from k2hybrid.chat.prompt import split_specials
from k2hybrid.chat.stop import ChatStopRule
from k2hybrid.chat.stream import ChatStream
from k2hybrid.chat.tokenizer import Tokenizer
from k2hybrid.types import (
    Content,
    Event,
    Malformed,
    Reasoning,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallStart,
)

SB, SE = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
CB, AB, CE = "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"
END = "<|im_end|>"
ONE_SB, ONE_SE = "<|tool_call_section_begin|>", "<|tool_call_section_end|>"  # no tokens: always text

CUT = Malformed("", "the answer ended inside a tool call")
NO_CALL_TO_END = Malformed("", "a tool call ends that never began")
NO_SECTION_TO_END = Malformed("", "a tool section ends that never began")
NO_CALL_FOR_ARGUMENTS = Malformed("", "<|tool_call_argument_begin|> outside a call")


class Plain(str):
    """Text whose spellings of control tokens are text."""


Part = str | Plain


def between(text: str) -> Malformed:
    return Malformed(text, "text between tool calls")


def unfit(header: str, rest: str = "") -> Malformed:
    return Malformed(header + rest, f"no tool fits the call id {header!r}")


def called(index: int, name: str, arguments: str = "{}", *, cut: bool = False) -> list[Event]:
    """The joined events of a call: a whole one, or one that the answer's end `cut`."""
    start = ToolCallStart(index, f"functions.{name}:{index}", name)
    return [start, ToolCallArguments(index, arguments), ToolCallEnd(index, cut)]


def call(header: str, arguments: str = "{}") -> str:
    return f"{CB}{header}{AB}{arguments}{CE}"


def tool(name: str, *required: str, optional: Sequence[str] = ()) -> dict:
    properties = {key: {} for key in (*required, *optional)}
    schema = {"type": "object", "required": list(required), "properties": properties}
    return {"type": "function", "function": {"name": name, "parameters": schema}}


TOOLS = [tool("get_weather", "city"), tool("web-search", "query", optional=["limit"])]


def joined(events: Sequence[Event]) -> list[Event]:
    """Neighbouring pieces of one kind as one event, after a look at their order."""
    result: list[Event] = []
    open_call: int | None = None
    calls = 0
    for event in events:
        last = result[-1] if result else None
        match event, last:
            case (ToolCallStart(index, _, _), _):
                assert (open_call, index) == (None, calls)
                open_call, calls = index, calls + 1
            case (ToolCallArguments(index, _), _) | (ToolCallEnd(index), _):
                assert index == open_call
                open_call = None if isinstance(event, ToolCallEnd) else index
            case (Reasoning() | Content(), _):
                assert open_call is None
        if isinstance(event, Reasoning | Content | ToolCallArguments):
            assert event.text
        match event, last:
            case (Reasoning(text), Reasoning(before)) | (Content(text), Content(before)):
                result[-1] = type(event)(before + text)
            case ToolCallArguments(index, text), ToolCallArguments(_, before):
                result[-1] = ToolCallArguments(index, before + text)
            case _:
                result.append(event)
    assert open_call is None
    return result


def run(stream: ChatStream, ids: Sequence[int]) -> list[Event]:
    events = [event for token in ids for event in stream.push(token)]
    events += stream.finish()
    assert stream.finish() == []
    assert stream.push(ids[0] if ids else 0) == []
    return events


@dataclass(frozen=True)
class Cutter:
    """Texts as tokens, cut in every way."""

    tokenizer: Tokenizer
    single_bytes: tuple[int, ...]

    def pieces(self, answer: Sequence[Part]) -> list[str | int]:
        """Plain texts and the ids of control tokens."""
        result: list[str | int] = []
        for part in answer:
            result += [part] if isinstance(part, Plain) else split_specials(part, self.tokenizer)
        return result

    def merged(self, pieces: Sequence[str | int]) -> list[int]:
        return self._ids(pieces, self.tokenizer.encode)

    def by_bytes(self, pieces: Sequence[str | int]) -> list[int]:
        return self._ids(pieces, self._bytes)

    def at_random(self, pieces: Sequence[str | int], draw: random.Random) -> list[int]:
        def cut(text: str) -> list[int]:
            ids: list[int] = []
            while text:
                size = draw.randint(1, 12)
                encode = draw.choice((self.tokenizer.encode, self._bytes))
                ids += encode(text[:size])
                text = text[size:]
            return ids

        return self._ids(pieces, cut)

    def ways(self, pieces: Sequence[str | int], cuts: int = 4) -> list[list[int]]:
        draw = random.Random(len(pieces))
        random_ways = [self.at_random(pieces, draw) for _ in range(cuts)]
        return [self.merged(pieces), self.by_bytes(pieces), *random_ways]

    def _ids(self, pieces: Sequence[str | int], encode: Callable[[str], list[int]]) -> list[int]:
        ids: list[int] = []
        for piece in pieces:
            ids += encode(piece) if isinstance(piece, str) else [piece]
        return ids

    def _bytes(self, text: str) -> list[int]:
        return [self.single_bytes[byte] for byte in text.encode()]


@pytest.fixture(scope="module")
def cutter(tokenizer: Tokenizer) -> Cutter:
    by_byte = {tokenizer.token_bytes(token): token for token in range(tokenizer.num_ranks)}
    return Cutter(tokenizer, tuple(by_byte[bytes([byte])] for byte in range(256)))


@pytest.fixture
def read(tokenizer: Tokenizer, markers: Markers, cutter: Cutter) -> Callable[..., list[Event]]:
    """The joined events of an answer, the same for every way to cut it."""

    def read(*answer: Part, **options: object) -> list[Event]:
        results = [
            joined(run(ChatStream(markers, tokenizer, **options), ids))  # type: ignore[arg-type]
            for ids in cutter.ways(cutter.pieces(answer))
        ]
        assert all(result == results[0] for result in results)
        return results[0]

    return read


Case = tuple[str, Sequence[Part], list[Event]]


def table(*cases: Case) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        ("answer", "expected"), [pytest.param(answer, events, id=name) for name, answer, events in cases]
    )


# --- 1: white space, several calls, several sections ----------------------------------------------


@table(
    ("none at all", [SB, call("functions.f:0"), SE, END], called(0, "f")),
    (
        "around every marker",
        [f"\n{SB} \n{CB} functions.f:0\n{AB}\t{{}} {CE} \n {SE}\n{END}"],
        called(0, "f"),
    ),
    (
        "between calls",
        [SB, call("functions.f:0"), " \n\t", call("functions.g:1"), "\n", SE],
        called(0, "f") + called(1, "g"),
    ),
    (
        "none between calls",
        [SB, call("functions.f:0"), call("functions.g:1"), SE],
        called(0, "f") + called(1, "g"),
    ),
    ("within an id's ends", [SB, call(" \n functions.f:0 \t"), SE], called(0, "f")),
    ("of other scripts", [SB, "\u00a0\u3000", call("\u2003functions.f:0", "\u00a0{}"), SE], called(0, "f")),
    (
        "after the reasoning",
        ["<think>a</think>\n\n", SB, call("functions.f:0"), SE],
        [Reasoning("a"), *called(0, "f")],
    ),
)
def test_1_white_space(read: Callable[..., list[Event]], answer: list[Part], expected: list[Event]) -> None:
    assert read(*answer) == expected


@table(
    (
        "three parallel calls",
        [SB, *(call(f"functions.f:{i}", f'{{"n": {i}}}') for i in range(3)), SE],
        [event for i in range(3) for event in called(i, "f", f'{{"n": {i}}}')],
    ),
    (
        "thirty parallel calls",
        [SB, *(call(f"functions.f{i}:{i}") for i in range(30)), SE],
        [event for i in range(30) for event in called(i, f"f{i}")],
    ),
    (
        "several sections",
        ["a", SB, call("functions.f:0"), SE, "b", SB, call("functions.g:1"), SE, "c"],
        [Content("a"), *called(0, "f"), Content("b"), *called(1, "g"), Content("c")],
    ),
    (
        "sections side by side",
        [SB, call("functions.f:0"), SE, SB, call("functions.g:1"), SE],
        called(0, "f") + called(1, "g"),
    ),
    ("an empty section", ["a", SB, SE, "b"], [Content("ab")]),
    ("a section of white space", ["a", SB, " \n", SE, END], [Content("a")]),
    ("an empty section, then calls", [SB, SE, SB, call("functions.f:0"), SE], called(0, "f")),
    ("an empty section that is all", [SB, SE], []),
)
def test_1_calls_and_sections(
    read: Callable[..., list[Event]], answer: list[Part], expected: list[Event]
) -> None:
    assert read(*answer) == expected


# --- 2: text before, in and after the section -----------------------------------------------------


@table(
    (
        "content before is kept exactly",
        ["  a\n\n b \n", SB, call("functions.f:0"), SE],
        [Content("  a\n\n b \n"), *called(0, "f")],
    ),
    (
        "text between section and call is no content",
        [SB, "I call: ", call("functions.f:0"), SE],
        [between("I call: "), *called(0, "f")],
    ),
    (
        "nor text between calls, nor after the last",
        [SB, call("functions.f:0"), " and ", call("functions.g:1"), "\nso", SE],
        [*called(0, "f"), between(" and "), *called(1, "g"), between("\nso")],
    ),
    ("text after the section is kept", [SB, call("functions.f:0"), SE, "\n b "],
     [*called(0, "f"), Content("\n b ")]),
    ("text in a section without calls", ["a", SB, "what", SE, "b"],
     [Content("a"), between("what"), Content("b")]),
    ("text in a section that does not end", [SB, "what"], [between("what")]),
)  # fmt: skip
def test_2_text_around_calls(
    read: Callable[..., list[Event]], answer: list[Part], expected: list[Event]
) -> None:
    assert read(*answer) == expected


# --- 3: arguments ---------------------------------------------------------------------------------

HUGE = '{"text": "' + "a line < | > é汉 of text\\n" * 2_000 + '"}'
LOOK_ALIKES = f'{{"a": "{CB}x{AB}y{CE}{SB}{SE}{END}<think></think>{ONE_SB}{ONE_SE} <|im_end"}}'


@pytest.mark.parametrize(
    ("written", "arguments"),
    [
        pytest.param("{}", "{}", id="an empty object"),
        pytest.param("", "{}", id="absent"),
        pytest.param(" \n ", "{}", id="blank"),
        pytest.param('{\n  "a":\n\t"x  y"\n}', '{\n  "a":\n\t"x  y"\n}', id="multi-line, kept exactly"),
        pytest.param(HUGE, HUGE, id="huge"),
        pytest.param('{"a": "1 < 2 <"}', '{"a": "1 < 2 <"}', id="a lesser-than sign"),
        pytest.param("{<", "{<", id="a lesser-than sign at the end"),
        pytest.param(Plain(LOOK_ALIKES), LOOK_ALIKES, id="marker look-alikes"),
        pytest.param("[1, 2]", "[1, 2]", id="a list"),
        pytest.param("3", "3", id="a number"),
        pytest.param('"text"', '"text"', id="a string"),
        pytest.param("null", "null", id="null"),
        pytest.param('{"a": oops', '{"a": oops', id="malformed"),
        pytest.param('{"a": 1}}', '{"a": 1}}', id="a brace too many"),
        pytest.param('{"a": "é汉👩\u200d🚀"}', '{"a": "é汉👩\u200d🚀"}', id="all of Unicode"),
    ],
)
def test_3_arguments_are_passed_on_as_written(
    read: Callable[..., list[Event]], written: Part, arguments: str
) -> None:
    answer = [SB, CB, "functions.f:0", AB, written, CE, call("functions.g:1", '{"b": 1}'), SE]
    assert read(*answer) == called(0, "f", arguments) + called(1, "g", '{"b": 1}')


@table(
    ("without a marker before them", [SB, CB, 'functions.f:0{"a": "{b"}', CE, SE],
     called(0, "f", '{"a": "{b"}')),
    ("neither marker nor arguments", [SB, CB, "functions.f:0", CE, SE], called(0, "f")),
    ("begun twice", [SB, CB, "functions.f:0", AB, AB, "{}", CE, SE],
     [ToolCallStart(0, "functions.f:0", "f"), NO_CALL_FOR_ARGUMENTS,
      ToolCallArguments(0, "{}"), ToolCallEnd(0)]),
    ("with a think marker in them", [SB, CB, "functions.f:0", AB, "{<think>}", CE, SE],
     [ToolCallStart(0, "functions.f:0", "f"), ToolCallArguments(0, "{"),
      Malformed("", "<think> inside a tool call"), ToolCallArguments(0, "}"), ToolCallEnd(0)]),
)  # fmt: skip
def test_3_markers_of_arguments(
    read: Callable[..., list[Event]], answer: list[Part], expected: list[Event]
) -> None:
    assert read(*answer) == expected


# --- 4: a lone lesser-than sign -------------------------------------------------------------------


@pytest.mark.parametrize("text", ["a <", "<", "a <|", "a <|tool_call", "a <think", f"a {ONE_SB[:-1]}", "<<<"])
@pytest.mark.parametrize("end", ["", END])
def test_4_the_beginning_of_a_marker_at_the_end_is_text(
    read: Callable[..., list[Event]], text: str, end: str
) -> None:
    assert read(text, end) == [Content(text)]
    assert read("<think>", text, end) == [Reasoning(text)]
    assert read("<think>", text, "</think>", text, end) == [Reasoning(text), Content(text)]
    assert read(text, SB, call("functions.f:0"), SE, text, end) == [
        Content(text),
        *called(0, "f"),
        Content(text),
    ]
    assert read(SB, text, end) == [between(text)]
    assert read(text, end, stop=["<|x", "<<<<"]) == [Content(text)]


# --- 5: what is missing, doubled, or out of place -------------------------------------------------

F_CUT = [*called(0, "f", '{"a', cut=True), CUT]


@table(
    ("in the section", [SB], []),
    ("after the call's begin", [SB, CB], [Malformed("", "the answer ended inside a call's id")]),
    ("in the id", [SB, CB, "functions.f"], [Malformed("functions.f", "the answer ended inside a call's id")]),
    ("before the arguments", [SB, CB, "functions.f:0", AB],
     [ToolCallStart(0, "functions.f:0", "f"), ToolCallEnd(0, cut=True), CUT]),
    ("in the arguments", [SB, CB, "functions.f:0", AB, '{"a'], F_CUT),
    ("in the arguments, without a section", [CB, "functions.f:0", AB, '{"a'], F_CUT),
    ("in the second call", [SB, call("functions.f:0"), CB, "functions.g:1", AB, "{"],
     [*called(0, "f"), *called(1, "g", "{", cut=True), CUT]),
    ("in the arguments of a call without a name", [SB, CB, "0", AB, '{"city": "x"}'],
     [Malformed('0{"city": "x"}', "the answer ended inside a tool call")]),
)  # fmt: skip
def test_5_the_text_ends_inside_a_call(
    read: Callable[..., list[Event]], answer: list[Part], expected: list[Event]
) -> None:
    """Nothing is made up for a call that was cut off, least of all arguments."""
    assert read(*answer, tools=TOOLS) == expected


@table(
    ("call end, at a stop token", [SB, CB, "functions.f:0", AB, "{}", END], called(0, "f")),
    ("call end, at the section's end", [SB, CB, "functions.f:0", AB, "{}", SE, "b"],
     [*called(0, "f"), Content("b")]),
    ("call end, at the next call", [SB, CB, "functions.f:0", AB, "{}", call("functions.g:1"), SE],
     called(0, "f") + called(1, "g")),
    ("call end, at the next section", [SB, CB, "functions.f:0", AB, "{}", SB, call("functions.g:1"), SE],
     called(0, "f") + called(1, "g")),
    ("arguments and all after", [SB, CB, "functions.f:0", END], called(0, "f")),
    ("section end", [SB, call("functions.f:0")], called(0, "f")),
    ("section end, at a stop token", [SB, call("functions.f:0"), END], called(0, "f")),
    ("section end, before a thought", [SB, call("functions.f:0"), "<think>hm</think>b"],
     [*called(0, "f"), Reasoning("hm"), Content("b")]),
    ("section begin", ["a", call("functions.f:0"), SE, "b"], [Content("a"), *called(0, "f"), Content("b")]),
    ("both of the section", ["a", call("functions.f:0"), " ", call("functions.g:1"), "b"],
     [Content("a"), *called(0, "f"), *called(1, "g"), Content("b")]),
    ("call begin", [SB, "functions.f:0", AB, "{}", CE, SE], called(0, "f")),
    ("call begin of the second", [SB, call("functions.f:0"), "\nfunctions.g:1", AB, "{}", CE, SE],
     called(0, "f") + called(1, "g")),
    ("call begin, and no id but junk", [SB, "so!", AB, "{}", CE, SE], [unfit("so!", "{}")]),
)  # fmt: skip
def test_5_missing_markers(
    read: Callable[..., list[Event]], answer: list[Part], expected: list[Event]
) -> None:
    assert read(*answer) == expected


REPEATED = "a call began again before its arguments"


@table(
    ("call begin", [SB, CB, CB, "functions.f:0", AB, "{}", CE, SE], called(0, "f")),
    ("call begin, with white space", [SB, CB, " \n", CB, "functions.f:0", AB, "{}", CE, SE], called(0, "f")),
    ("call begin with its id", [SB, CB, "functions.f:0", CB, "functions.f:0", AB, "{}", CE, SE],
     [Malformed("functions.f:0", REPEATED), *called(0, "f")]),
    ("call begin after junk", [SB, CB, "junk", CB, "functions.f:0", AB, "{}", CE, SE],
     [Malformed("junk", REPEATED), *called(0, "f")]),
    ("call end", [SB, call("functions.f:0"), CE, SE], [*called(0, "f"), NO_CALL_TO_END]),
    ("section begin", [SB, SB, call("functions.f:0"), SE], called(0, "f")),
    ("section end", [SB, call("functions.f:0"), SE, SE, "b"], [*called(0, "f"), Content("b")]),
)  # fmt: skip
def test_5_repeated_markers(
    read: Callable[..., list[Event]], answer: list[Part], expected: list[Event]
) -> None:
    assert read(*answer) == expected


@table(
    ("call end", ["a", CE, "b"], [Content("a"), NO_CALL_TO_END, Content("b")]),
    ("section end", ["a", SE, "b"], [Content("a"), NO_SECTION_TO_END, Content("b")]),
    ("section end in the reasoning", ["<think>a", SE, "b"],
     [Reasoning("a"), NO_SECTION_TO_END, Reasoning("b")]),
    ("section end in a later reasoning", [SB, call("functions.f:0"), SE, "<think>a", SE],
     [*called(0, "f"), Reasoning("a"), NO_SECTION_TO_END]),
    ("argument begin", ["a", AB, "b"], [Content("a"), NO_CALL_FOR_ARGUMENTS, Content("b")]),
    ("argument begin in a section", [SB, AB, SE], [NO_CALL_FOR_ARGUMENTS]),
    ("an empty call", [SB, CB, CE, call("functions.f:0"), SE], [unfit(""), *called(0, "f")]),
    ("a call of white space", [SB, CB, " ", AB, "\n", CE, SE], [Malformed("\n", unfit("").reason)]),
    ("think end in a section", [SB, "</think>", call("functions.f:0"), SE],
     [Malformed("", "</think> inside a tool section"), *called(0, "f")]),
    ("another control token", ["a<|im_user|>b"],
     [Content("a"), Malformed("", "<|im_user|> does not belong in an answer"), Content("b")]),
    ("an unnamed control token", ["a<|reserved_token_163600|>"],
     [Content("a"), Malformed("", "<|reserved_token_163600|> does not belong in an answer")]),
)  # fmt: skip
def test_5_orphans_are_stripped_and_told(
    read: Callable[..., list[Event]], answer: list[Part], expected: list[Event]
) -> None:
    assert read(*answer) == expected


# --- 6: the singular spellings --------------------------------------------------------------------


@table(
    ("around a call", ["a", ONE_SB, call("functions.f:0"), ONE_SE, "b"],
     [Content("a"), *called(0, "f"), Content("b")]),
    ("around two calls", [ONE_SB, call("functions.f:0"), "\n", call("functions.g:1"), ONE_SE],
     called(0, "f") + called(1, "g")),
    ("with white space", ["a\n", ONE_SB, "\n", call("functions.f:0"), "\n", ONE_SE, "\nb"],
     [Content("a\n"), *called(0, "f"), Content("\nb")]),
    ("the begin alone", [ONE_SB, call("functions.f:0"), SE, "b"], [*called(0, "f"), Content("b")]),
    ("the end alone", [SB, call("functions.f:0"), ONE_SE, "b"], [*called(0, "f"), Content("b")]),
    ("two sections", [ONE_SB, call("functions.f:0"), ONE_SE, "b", ONE_SB, call("functions.g:1"), ONE_SE],
     [*called(0, "f"), Content("b"), *called(1, "g")]),
    ("two sections side by side",
     [SB, call("functions.f:0"), ONE_SE, ONE_SB, call("functions.g:1"), ONE_SE],
     called(0, "f") + called(1, "g")),
    ("in a section", [SB, ONE_SB, "\n", call("functions.f:0"), SE], called(0, "f")),
    ("after words in a section", [SB, "so ", ONE_SB, call("functions.f:0"), SE],
     [between("so "), *called(0, "f")]),
    ("ends the reasoning", ["<think>hm", ONE_SB, call("functions.f:0"), ONE_SE, "b"],
     [Reasoning("hm"), *called(0, "f"), Content("b")]),
    ("as words before a call", ["a", ONE_SB, "b", call("functions.f:0")],
     [Content(f"a{ONE_SB}b"), *called(0, "f")]),
    ("as words after a call", [call("functions.f:0"), "b", ONE_SE], [*called(0, "f"), Content(f"b{ONE_SE}")]),
    ("as words", ["say ", ONE_SB, " or ", ONE_SE], [Content(f"say {ONE_SB} or {ONE_SE}")]),
    ("as a thought", ["<think>say ", ONE_SB, "</think>", ONE_SE],
     [Reasoning(f"say {ONE_SB}"), Content(ONE_SE)]),
    ("in an id", [SB, call(ONE_SB + "functions.f:0"), SE], [unfit(ONE_SB + "functions.f:0", "{}")]),
    ("cut off", [call("functions.f:0"), ONE_SE[:-2]], [*called(0, "f"), Content(ONE_SE[:-2])]),
)  # fmt: skip
def test_6_singular_spellings(
    read: Callable[..., list[Event]], answer: list[Part], expected: list[Event]
) -> None:
    assert read(*answer) == expected


def test_6_content_after_a_singular_end_streams(
    tokenizer: Tokenizer, markers: Markers, cutter: Cutter
) -> None:
    stream = ChatStream(markers, tokenizer, stop=["STOP"])
    for token in cutter.merged(cutter.pieces([SB, call("functions.f:0"), ONE_SE])):
        stream.push(token)
    assert [stream.push(token) for token in cutter.by_bytes(["bc"])] == [[Content("b")], [Content("c")]]
    for token in cutter.by_bytes([" STOP"]):
        stream.push(token)
    assert stream.stopped_by == "STOP"


# --- 7: ids ---------------------------------------------------------------------------------------

CITY = '{"city": "x"}'


@pytest.mark.parametrize(
    ("header", "name"),
    [
        pytest.param("get_weather:0", "get_weather", id="without functions."),
        pytest.param("get_weather", "get_weather", id="the mere name"),
        pytest.param("functions.get_weather", "get_weather", id="without a number"),
        pytest.param("functions.get_weather:12", "get_weather", id="another number"),
        pytest.param("functions_get_weather_0", "get_weather", id="as clients rewrite it"),
        pytest.param("functions.web-search:0", "web-search", id="with hyphens"),
        pytest.param("web-search:0", "web-search", id="with hyphens, without functions."),
        pytest.param("functions.a.b.c:0", "a.b.c", id="with dots"),
        pytest.param("functions.mcp__server__do:0", "mcp__server__do", id="with double underscores"),
        pytest.param("functions.mcp__a-b.c__d_1:0", "mcp__a-b.c__d_1", id="with all of them"),
        pytest.param("functions.nobody_declared:0", "nobody_declared", id="of no declared tool"),
        pytest.param("0", "get_weather", id="a bare number"),
        pytest.param("call_3", "get_weather", id="call_3"),
        pytest.param("functions.:0", "get_weather", id="without a name"),
        pytest.param("functions.0", "get_weather", id="functions. and a number"),
        pytest.param("call_9fA3x", "get_weather", id="another dialect's"),
    ],
)
def test_7_ids(read: Callable[..., list[Event]], header: str, name: str) -> None:
    answer = [SB, call(header, CITY), call("functions.get_weather:1", CITY), SE]
    assert read(*answer, tools=TOOLS) == called(0, name, CITY) + called(1, "get_weather", CITY)


@pytest.mark.parametrize(
    ("header", "arguments"),
    [
        pytest.param("0", "{}", id="a number that fits no tool"),
        pytest.param("0", "[1]", id="a number with a list"),
        pytest.param("0", "{oops", id="a number with malformed arguments"),
        pytest.param("call_3", '{"query": "x", "city": "y"}', id="arguments of two tools"),
        pytest.param("get_time", CITY, id="a mere name of no tool"),
        pytest.param("!?", CITY, id="junk"),
        pytest.param("functions.get weather:0", CITY, id="a space in the name"),
        pytest.param("functions.get_weather:x", CITY, id="a word for a number"),
        pytest.param("functions.get_weather:0 or so", CITY, id="words after it"),
        pytest.param("功能" * 200, CITY, id="very long"),
        pytest.param("", CITY, id="none"),
    ],
)
def test_7_junk_ids_are_skipped_visibly(
    read: Callable[..., list[Event]], header: str, arguments: str
) -> None:
    answer = [SB, call(header, arguments), call("functions.get_weather:1", CITY), SE, "ok"]
    skipped = Malformed(header + arguments, f"no tool fits the call id {header[:80]!r}")
    assert read(*answer, tools=TOOLS) == [skipped, *called(0, "get_weather", CITY), Content("ok")]


def test_7_a_number_is_never_guessed_between_two_tools(read: Callable[..., list[Event]]) -> None:
    two = [tool("a", "city"), tool("b", "city")]
    assert read(SB, call("0", CITY), SE, tools=two) == [unfit("0", CITY)]
    assert read(SB, call("0", CITY), SE) == [unfit("0", CITY)]


def test_7_numbers_count_over_the_conversation(read: Callable[..., list[Event]]) -> None:
    events = read(SB, call("functions.f:0"), call("!"), call("functions.f:0"), SE, first_call_index=7)
    assert [event.id for event in events if isinstance(event, ToolCallStart)] == [
        "functions.f:7",
        "functions.f:8",
    ]


# --- 8: pieces and errors -------------------------------------------------------------------------


def test_8_characters_split_over_tokens(
    tokenizer: Tokenizer, markers: Markers, cutter: Cutter, read: Callable[..., list[Event]]
) -> None:
    text = "é汉👩\u200d🚀"
    arguments = f'{{"{text}": "{text}"}}'
    answer = ["<think>", text, "</think>", text, SB, text, call(f"functions.{'é汉'}:0", arguments), SE, text]
    assert read(*answer) == [
        Reasoning(text),
        Content(text),
        between(text),
        *called(0, "é汉", arguments),
        Content(text),
    ]


@pytest.mark.parametrize("half", ["é".encode()[:1], "汉".encode()[:2], "👩".encode()[:3], b"\xff"])
def test_8_a_character_cut_short_by_a_marker(
    tokenizer: Tokenizer, markers: Markers, cutter: Cutter, half: bytes
) -> None:
    ids = [cutter.single_bytes[byte] for byte in half]
    control = [markers.section_begin, markers.call_begin, *tokenizer.encode("functions.f:0")]
    whole = [markers.think_begin, *ids, markers.think_end, *ids, *control, markers.argument_begin]
    whole += [*ids, markers.call_end, *ids, markers.section_end, *ids]
    assert joined(run(ChatStream(markers, tokenizer), whole)) == [
        Reasoning("\ufffd"),
        Content("\ufffd"),
        *called(0, "f", "\ufffd"),
        between("\ufffd"),
        Content("\ufffd"),
    ]


def test_8_content_and_calls_in_one_delta(tokenizer: Tokenizer, markers: Markers, cutter: Cutter) -> None:
    """Whoever joins all that several tokens made hears the same."""
    pieces = cutter.pieces(["<think>a</think>b <", SB, call("functions.f:0", CITY), SE, "c"])
    for ids in cutter.ways(pieces):
        answer = gather(run(ChatStream(markers, tokenizer), ids))
        assert (answer.reasoning, answer.content, answer.calls) == ("a", "b <c", (("f", CITY),))
        assert not answer.malformed


def test_8_an_error_keeps_the_calls_already_finished(
    tokenizer: Tokenizer, markers: Markers, cutter: Cutter
) -> None:
    """What went out before generation failed is whole: no event of it waits for the end."""
    pieces = cutter.pieces(["a", SB, call("functions.f:0", CITY), CB, "functions.g:1", AB, '{"a'])
    for ids in cutter.ways(pieces):
        stream = ChatStream(markers, tokenizer)
        sent = [event for token in ids for event in stream.push(token)]
        assert joined([*sent, ToolCallEnd(1)])[:4] == [Content("a"), *called(0, "f", CITY)]


# --- 9: reasoning ---------------------------------------------------------------------------------


@table(
    ("a section ends it", ["<think>hm", SB, call("functions.f:0"), SE, "b"],
     [Reasoning("hm"), *called(0, "f"), Content("b")]),
    ("a call ends it", ["<think>hm", call("functions.f:0"), "b"],
     [Reasoning("hm"), *called(0, "f"), Content("b")]),
    ("a section, and its end comes late", ["<think>hm", SB, call("functions.f:0"), SE, "</think>b"],
     [Reasoning("hm"), *called(0, "f"), Content("b")]),
    ("none at all", ["b"], [Content("b")]),
    ("none at all, with calls", [SB, call("functions.f:0"), SE], called(0, "f")),
    ("an end alone", ["a</think>b"], [Content("ab")]),
    ("an empty one", ["<think></think>b"], [Content("b")]),
    ("an empty one and no content", ["<think></think>", END], []),
    ("one of white space", ["<think>\n</think>b"], [Reasoning("\n"), Content("b")]),
    ("several", ["<think>a</think>b<think>c</think>d"],
     [Reasoning("a"), Content("b"), Reasoning("c"), Content("d")]),
    ("several side by side", ["<think>a</think>\n<think>c</think>d"], [Reasoning("ac"), Content("d")]),
    ("one in another", ["<think><think>a</think></think>b"], [Reasoning("a"), Content("b")]),
    ("between calls", [SB, call("functions.f:0"), "<think>a</think>", call("functions.g:1"), SE],
     [*called(0, "f"), Reasoning("a"), *called(1, "g"), ]),
    ("after the section", [SB, call("functions.f:0"), SE, "<think>a</think>b"],
     [*called(0, "f"), Reasoning("a"), Content("b")]),
    ("never ended", ["<think>a ", END], [Reasoning("a ")]),
    ("white space is kept", ["<think> a\n</think>\n\nb\n"], [Reasoning(" a\n"), Content("\n\nb\n")]),
)  # fmt: skip
def test_9_reasoning(read: Callable[..., list[Event]], answer: list[Part], expected: list[Event]) -> None:
    assert read(*answer) == expected


@table(
    ("", ["a</think>b"], [Reasoning("a"), Content("b")]),
    ("begun once more", ["<think>a</think>b"], [Reasoning("a"), Content("b")]),
    ("a section ends it", ["a", SB, call("functions.f:0"), SE], [Reasoning("a"), *called(0, "f")]),
)
def test_9_reasoning_begun_in_the_prompt(
    read: Callable[..., list[Event]], answer: list[Part], expected: list[Event]
) -> None:
    assert read(*answer, in_reasoning=True) == expected


# --- what holds for any answer --------------------------------------------------------------------

MARKERS = (SB, SE, CB, AB, CE, "<think>", "</think>")
STRAYS = ("<|im_user|>", "<|im_middle|>", "[PAD]", "<|media_begin|>", "<|reserved_token_163600|>")
JUNK = (
    "<",
    "<|",
    "<|tool_call",
    "|>",
    "{",
    "}",
    '"',
    ":",
    "0",
    "call_1",
    " ",
    "\n",
    "\u3000",
    ONE_SB,
    ONE_SE,
)
# Letters of which each comes once in an answer, so that it can be followed through the machine.
LETTERS = string.ascii_uppercase + "äöüßéàñçøåæœđłšž汉字語言文本中日月👩🚀🎉"

parts = st.one_of(
    *(st.sampled_from(MARKERS) for _ in range(3)),
    st.sampled_from(["letter", "header", "header", "call"]),
    st.sampled_from(JUNK),
    st.sampled_from(STRAYS),
)
answers = st.lists(parts, max_size=24)


def written(answer: Sequence[str]) -> tuple[list[Part], str]:
    """The answer, with a letter of its own in each place for one, and those letters."""
    letters = iter(LETTERS)
    used = ""
    result: list[Part] = []
    for part in answer:
        if part in ("letter", "header", "call"):
            letter = next(letters)
            used += letter
            result += {
                "letter": [letter],
                "header": [CB, f"functions.f{letter}:0"],
                "call": [call(f"functions.f{letter}:0")],
            }[part]
        else:
            result.append(Plain(part) if part in JUNK else part)
    return result, used


def texts(events: Sequence[Event]) -> list[str]:
    return [
        event.name if isinstance(event, ToolCallStart) else getattr(event, "text", "") for event in events
    ]


@settings(max_examples=300, deadline=None)
@given(answer=answers, with_tools=st.booleans())
def test_nothing_leaks_nothing_vanishes_and_cuts_make_no_difference(
    tokenizer: Tokenizer, markers: Markers, cutter: Cutter, answer: list[str], with_tools: bool
) -> None:
    answer, letters = written(answer)
    results = [
        joined(run(ChatStream(markers, tokenizer, tools=TOOLS if with_tools else ()), ids))
        for ids in cutter.ways(cutter.pieces(answer), cuts=2)
    ]
    assert all(result == results[0] for result in results)
    read = "".join(texts(results[0]))
    assert "".join(letter for letter in read if letter in letters) == letters  # once each, and in order
    assert not any(marker in read for marker in (*MARKERS, *STRAYS))
    for event in results[0]:
        if isinstance(event, Malformed):
            assert event.reason


@settings(max_examples=200, deadline=None)
@given(
    answer=answers,
    stop=st.lists(st.text(alphabet='ab <|{":\n', min_size=1, max_size=3), min_size=1, max_size=2),
    seed=st.integers(0, 99),
)
def test_the_stop_rule_and_the_stream_stop_at_the_same_token(
    tokenizer: Tokenizer, markers: Markers, cutter: Cutter, answer: list[str], stop: list[str], seed: int
) -> None:
    """The engine's rule knows no tools; what a tool's name changes must not change what is content."""
    pieces = cutter.pieces(written(answer)[0])
    whole = ChatStream(markers, tokenizer, stop=stop, tools=TOOLS)
    expected = joined(run(whole, cutter.merged(pieces)))
    rule = ChatStopRule(markers, tokenizer, stop=stop)
    stream = ChatStream(markers, tokenizer, stop=stop, tools=TOOLS)
    events: list[Event] = []
    for token in cutter.at_random(pieces, random.Random(seed)):
        events += stream.push(token)
        stopped = rule.push(token)
        assert stopped is stream.stopped
        if stopped:
            break
    assert joined(events + stream.finish()) == expected
    assert stream.stopped_by == whole.stopped_by


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_any_token_ids_make_well_formed_events(tokenizer: Tokenizer, markers: Markers, seed: int) -> None:
    draw = random.Random(seed)
    structure = [tokenizer.specials[marker] for marker in MARKERS]
    control = [token for token in tokenizer.special_names if token not in tokenizer.stop_ids]
    unknown = [-1, tokenizer.num_ranks + 256, 1 << 40]
    ids = [
        draw.choice(draw.choice((structure, structure, control, unknown, range(tokenizer.num_ranks))))
        for _ in range(draw.randrange(60))
    ]
    stop = ["e"] if draw.random() < 0.3 else []
    joined(run(ChatStream(markers, tokenizer, tools=TOOLS, stop=stop), ids))
