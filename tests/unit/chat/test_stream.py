"""The stream machine, case by case; a reader should be able to learn the format from here."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from k2hybrid.chat.markers import Markers
from k2hybrid.chat.stop import ChatStopRule
from k2hybrid.chat.stream import ChatStream
from k2hybrid.chat.tokenizer import Tokenizer
from k2hybrid.types import (
    Content,
    Event,
    Malformed,
    Reasoning,
    StopRule,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallStart,
)

SB, SE = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
CB, AB, CE = "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"
END = "<|im_end|>"

Call = tuple[str, str]


def tool(name: str, *required: str, optional: tuple[str, ...] = ()) -> dict:
    properties = {key: {} for key in (*required, *optional)}
    schema = {"type": "object", "required": list(required), "properties": properties}
    return {"type": "function", "function": {"name": name, "parameters": schema}}


WEATHER, SEARCH = tool("get_weather", "city"), tool("web-search", "query", optional=("limit",))


def summary(events: list[Event]) -> dict:
    """Reasoning, content, calls as (id, arguments), and malformed texts, checked for order on the way."""
    result: dict = {"reasoning": "", "content": "", "calls": [], "malformed": []}
    open_call: int | None = None
    for event in events:
        match event:
            case Reasoning(text):
                result["reasoning"] += text
            case Content(text):
                result["content"] += text
            case Malformed(text, reason):
                assert reason
                if text:
                    result["malformed"].append(text)
            case ToolCallStart(index, call_id, name):
                assert open_call is None
                assert index == len(result["calls"])
                assert f".{name}:" in call_id
                result["calls"].append((call_id, ""))
                open_call = index
            case ToolCallArguments(index, text):
                assert index == open_call
                result["calls"][index] = (result["calls"][index][0], result["calls"][index][1] + text)
            case ToolCallEnd(index):
                assert index == open_call
                open_call = None
    assert open_call is None
    return {key: value for key, value in result.items() if value}


@pytest.fixture
def read(events_of: Callable[..., list[Event]]) -> Callable[..., dict]:
    return lambda text, **options: summary(events_of(text, **options))


def call(header: str, arguments: str) -> str:
    return f"{CB}{header}{AB}{arguments}{CE}"


F0, G1, H2 = ("functions.f:0", "{}"), ("functions.g:1", '{"a": 1}'), ("functions.h:2", "{}")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {}),
        ("hello", {"content": "hello"}),
        (f"hello {END}", {"content": "hello "}),
        ("<think>why</think>because", {"reasoning": "why", "content": "because"}),
        ("<think></think>\n\nyes\n", {"content": "\n\nyes\n"}),
        ("<think>a</think>b<think>c</think>d", {"reasoning": "ac", "content": "bd"}),
        ("<think><think>a</think></think>b", {"reasoning": "a", "content": "b"}),
        ("<think></think>\n<think>a</think> b", {"reasoning": "a", "content": " b"}),
        ("<think>never closed", {"reasoning": "never closed"}),
        ("no think</think> at all", {"content": "no think at all"}),
        (" ", {"content": " "}),
        ("a lone trailing <", {"content": "a lone trailing <"}),
        ("a <|tool", {"content": "a <|tool"}),
    ],
)
def test_reasoning_and_content(read: Callable[..., dict], text: str, expected: dict) -> None:
    assert read(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # 1: white space around every marker, and none; parallel calls; sections
        (f"{SB}{call('functions.f:0', '{}')}{SE}", {"calls": [F0]}),
        (f"\n{SB} \n{CB} functions.f:0\n{AB}\t{{}} {CE} {SE}\n{END}", {"calls": [F0]}),
        (
            SB
            + call("functions.f:0", "{}")
            + call("functions.g:1", G1[1])
            + call("functions.h:2", "{}")
            + SE,
            {"calls": [F0, G1, H2]},
        ),
        (
            f"a{SB}{call('functions.f:0', '{}')}{SE}b{SB}{call('functions.g:1', G1[1])}{SE}c",
            {"content": "abc", "calls": [F0, G1]},
        ),
        (f"a{SB}{SE}b", {"content": "ab"}),
        (f"a{SB} \n {SE}{END}", {"content": "a"}),
        # 2: content before and after is kept exactly, text within the section is not content
        (f" a \n{SB}{call('functions.f:0', '{}')}{SE}\n b ", {"content": " a \n\n b ", "calls": [F0]}),
        (
            f"{SB}so: {call('functions.f:0', '{}')} and {call('functions.g:1', G1[1])}{SE}",
            {"calls": [F0, G1], "malformed": ["so: ", " and "]},
        ),
        # 3: arguments
        (f"{SB}{CB}functions.f:0{CE}{SE}", {"calls": [F0]}),
        (f"{SB}{CB}functions.f:0{AB}{CE}{SE}", {"calls": [F0]}),
        (f"{SB}{CB}functions.f:0{AB} \n {CE}{SE}", {"calls": [F0]}),
        (f'{SB}{CB}functions.f:0{{"a": 1}}{CE}{SE}', {"calls": [("functions.f:0", '{"a": 1}')]}),
        (
            SB + call("functions.f:0", '{ "a":\n  "x  y" }') + SE,
            {"calls": [("functions.f:0", '{ "a":\n  "x  y" }')]},
        ),
        (f"{SB}{call('functions.f:0', '[1]')}{SE}", {"calls": [("functions.f:0", "[1]")]}),
        (
            f"{SB}{call('functions.f:0', '{oops')}{call('functions.g:1', G1[1])}{SE}",
            {"calls": [("functions.f:0", "{oops"), G1]},
        ),
        # 5: something is missing, doubled or out of place
        (f"{SB}{CB}functions.f:0{AB}{{}}{END}", {"calls": [F0]}),
        (f"{SB}{CB}functions.f:0{END}", {"calls": [F0]}),
        (f"{SB}{CB}functions.f:0", {"malformed": ["functions.f:0"]}),
        (f'{SB}{CB}functions.f:0{AB}{{"a', {"calls": [("functions.f:0", '{"a')]}),
        (f"{SB}{CB}functions.f:0{AB}{{}}{SE}after", {"calls": [F0], "content": "after"}),
        (
            f"{SB}{CB}functions.f:0{AB}{{}}{CB}functions.g:1{AB}{G1[1]}{CE}{SE}",
            {"calls": [F0, G1]},
        ),
        (f"{SB}{call('functions.f:0', '{}')}", {"calls": [F0]}),
        (f"a{call('functions.f:0', '{}')}{SE}b", {"content": "ab", "calls": [F0]}),
        (f"a{call('functions.f:0', '{}')}b", {"content": "ab", "calls": [F0]}),
        (f"{SB}{CB}{CB}functions.f:0{AB}{{}}{CE}{SE}", {"calls": [F0]}),
        (f"{SB}{CB}junk{CB}functions.f:0{AB}{{}}{CE}{SE}", {"calls": [F0], "malformed": ["junk"]}),
        (f"{SB}functions.f:0{AB}{{}}{CE}{SE}", {"calls": [F0]}),
        (f"{SB}{CB}functions.f:0{AB}{{{AB}}}{CE}{SE}", {"calls": [F0]}),
        (f"a{CE}b{SE}c{AB}d", {"content": "abcd"}),
        (f"{SB}{SB}{call('functions.f:0', '{}')}{SE}{SE}", {"calls": [F0]}),
        (f"{SB}{call('functions.f:0', '{}')}{CE}{SE}", {"calls": [F0]}),
        ("a<|im_user|>b[PAD]c<|reserved_token_163600|>d", {"content": "abcd"}),
        (f"{SB}{call('functions.f:0', '<think>{}</think>')}{SE}", {"calls": [F0]}),
        # 9: a section inside the reasoning ends it
        (
            f"<think>hm{SB}{call('functions.f:0', '{}')}{SE}done",
            {"reasoning": "hm", "calls": [F0], "content": "done"},
        ),
        (f"<think>hm{call('functions.f:0', '{}')}", {"reasoning": "hm", "calls": [F0]}),
    ],
)
def test_tool_calls(read: Callable[..., dict], text: str, expected: dict) -> None:
    assert read(text) == expected


@pytest.mark.parametrize(
    ("header", "tools", "name"),
    [
        ("functions.get_weather:0", [WEATHER], "get_weather"),
        ("functions.get_weather:17", [], "get_weather"),
        ("get_weather:0", [WEATHER], "get_weather"),
        ("get_weather:0", [], "get_weather"),
        ("functions.get_weather", [], "get_weather"),
        ("get_weather", [WEATHER], "get_weather"),
        ("functions_get_weather_0", [WEATHER, SEARCH], "get_weather"),
        ("functions.web-search:3", [SEARCH], "web-search"),
        ("functions.a.b.c:0", [], "a.b.c"),
        ("functions.mcp__server__do:0", [], "mcp__server__do"),
        ("functions.functions.x:0", [tool("functions.x")], "functions.x"),
        ("functions.undeclared:0", [WEATHER], "undeclared"),
        ("functions.2fa:0", [], "2fa"),
        ("0", [WEATHER], "get_weather"),
        ("call_3", [WEATHER, SEARCH], "get_weather"),
        ("functions.:0", [WEATHER], "get_weather"),
    ],
)
def test_call_ids(read: Callable[..., dict], header: str, tools: list, name: str) -> None:
    text = f'{SB}{call(header, """{"city": "x"}""")}{SE}'
    assert read(text, tools=tools) == {"calls": [(f"functions.{name}:0", '{"city": "x"}')]}


@pytest.mark.parametrize(
    ("header", "arguments"),
    [
        ("0", '{"town": "x"}'),  # fits no tool
        ("0", "{}"),
        ("0", "[]"),
        ("0", "{oops"),
        ("call_3", '{"query": "x", "city": "y"}'),
        ("get_time", '{"city": "x"}'),  # incomplete and not declared
        ("!?", '{"city": "x"}'),
        ("functions.a b:0", "{}"),
        ("x" * 300 + ":0", "{}"),
    ],
)
def test_junk_ids_are_skipped_visibly(read: Callable[..., dict], header: str, arguments: str) -> None:
    text = f"{SB}{call(header, arguments)}{call('functions.get_weather:1', '{}')}{SE}ok"
    assert read(text, tools=[WEATHER, SEARCH]) == {
        "calls": [("functions.get_weather:0", "{}")],
        "malformed": [header + arguments],
        "content": "ok",
    }


def test_a_bare_id_that_fits_two_tools_is_not_guessed(read: Callable[..., dict]) -> None:
    text = f'{SB}{call("0", """{"city": "x"}""")}{SE}'
    assert read(text, tools=[WEATHER, tool("get_time", "city")]) == {"malformed": ['0{"city": "x"}']}


def test_indices_continue_the_conversation(read: Callable[..., dict]) -> None:
    text = f"{SB}{call('functions.f:0', '{}')}{call('functions.f:0', '{}')}{SE}"
    assert read(text, first_call_index=7)["calls"] == [("functions.f:7", "{}"), ("functions.f:8", "{}")]


def test_an_open_think_in_the_prompt(read: Callable[..., dict]) -> None:
    assert read("hm</think>so", in_reasoning=True) == {"reasoning": "hm", "content": "so"}
    assert read("<think>hm</think>so", in_reasoning=True) == {"reasoning": "hm", "content": "so"}


# --- text that merely looks like a marker ---------------------------------------------------------


def test_spelled_markers_are_text(tokenizer: Tokenizer, markers: Markers) -> None:
    text = f"<think>a</think>{SB}{call('functions.f:0', '{}')}{SE}{END} and <"
    stream = ChatStream(markers, tokenizer)
    events = [event for token in tokenizer.encode(text) for event in stream.push(token)] + stream.finish()
    assert summary(events) == {"content": text}


def test_spelled_markers_in_arguments_are_text(tokenizer: Tokenizer, markers: Markers) -> None:
    arguments = f'{{"a": "{CE}{SE}{END}</think> <"}}'
    ids = [markers.section_begin, markers.call_begin, *tokenizer.encode("functions.f:0")]
    ids += [markers.argument_begin, *tokenizer.encode(arguments), markers.call_end, markers.section_end]
    stream = ChatStream(markers, tokenizer)
    events = [event for token in ids for event in stream.push(token)] + stream.finish()
    assert summary(events) == {"calls": [("functions.f:0", arguments)]}


SINGULAR_BEGIN, SINGULAR_END = "<|tool_call_section_begin|>", "<|tool_call_section_end|>"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            f"a{SINGULAR_BEGIN}{call('functions.f:0', '{}')}{SINGULAR_END}b",
            {"content": "ab", "calls": [F0]},
        ),
        (f"a{SINGULAR_BEGIN} \n{call('functions.f:0', '{}')}{SE}b", {"content": "ab", "calls": [F0]}),
        (
            f"{SB}{call('functions.f:0', '{}')} {SINGULAR_END}b{END}",
            {"content": "b", "calls": [F0]},
        ),
        (
            f"a{SINGULAR_BEGIN}b{call('functions.f:0', '{}')}",
            {"content": f"a{SINGULAR_BEGIN}b", "calls": [F0]},
        ),
        (
            f"a{call('functions.f:0', '{}')} <|tool_call_sec",
            {"content": "a <|tool_call_sec", "calls": [F0]},
        ),
        (f"say {SINGULAR_BEGIN}", {"content": f"say {SINGULAR_BEGIN}"}),
        (f"say {SINGULAR_BEGIN} {SINGULAR_BEGIN} x", {"content": f"say {SINGULAR_BEGIN} {SINGULAR_BEGIN} x"}),
        (f"say {SINGULAR_END}", {"content": f"say {SINGULAR_END}"}),
    ],
)
def test_singular_spellings(read: Callable[..., dict], text: str, expected: dict) -> None:
    assert read(text) == expected


# --- UTF-8, stop strings, the end -----------------------------------------------------------------


def single_bytes(tokenizer: Tokenizer, data: bytes) -> list[int]:
    """One token for each byte."""
    by_byte = {tokenizer.token_bytes(token): token for token in range(tokenizer.num_ranks)}
    return [by_byte[bytes([byte])] for byte in data]


def test_utf8_over_tokens_waits_until_complete(tokenizer: Tokenizer, markers: Markers) -> None:
    ids = single_bytes(tokenizer, "é汉👩".encode())
    stream = ChatStream(markers, tokenizer)
    assert [stream.push(token) for token in ids] == [
        [], [Content("é")], [], [], [Content("汉")], [], [], [], [Content("👩")]
    ]  # fmt: skip
    assert stream.finish() == []


def test_bytes_that_never_become_text(tokenizer: Tokenizer, markers: Markers) -> None:
    stream = ChatStream(markers, tokenizer)
    start, *rest = single_bytes(tokenizer, b"\xe6\xff\xe6")
    ids = [start, markers.think_begin, *rest]
    events = [event for token in ids for event in stream.push(token)] + stream.finish()
    assert summary(events) == {"content": "\ufffd", "reasoning": "\ufffd\ufffd"}


@pytest.mark.parametrize(
    ("text", "stop", "content", "stopped"),
    [
        ("one two three", ["two"], "one ", True),
        ("one two three", ["four", "e two"], "on", True),
        ("one two three", ["two three", "two"], "one ", True),
        ("aaab", ["ab"], "aa", True),
        ("abab abac", ["abac"], "abab ", True),
        ("one tw", ["two"], "one tw", False),
        ("one", [""], "one", False),
        ("<think>stop</think>go", ["stop"], "go", False),
        ("<think></think>\n\ngo", ["\n\n"], "", True),
        ("a <", ["<"], "a ", True),
        ("汉字", ["字"], "汉", True),
        (f"ST{SB}{SE}OP", ["STOP"], "STOP", False),
        (SB + call("functions.f:0", '{"a": "STOP"}') + SE + "x", ["STOP"], "x", False),
    ],
)
def test_stop_strings(
    tokenizer: Tokenizer, markers: Markers, text: str, stop: list[str], content: str, stopped: bool
) -> None:
    stream = ChatStream(markers, tokenizer, stop=stop)
    rule = ChatStopRule(markers, tokenizer, stop=stop)
    assert isinstance(rule, StopRule)
    events: list[Event] = []
    for token in tokenizer.encode_with_specials(text):
        before = stream.stopped
        events += stream.push(token)
        if not before:
            assert rule.push(token) is stream.stopped  # at the very token
    events += stream.finish()
    assert summary(events).get("content", "") == content
    assert stream.stopped is stopped


def test_the_stop_rule_ends_at_stop_tokens(tokenizer: Tokenizer, markers: Markers) -> None:
    for stop in ((), ("x",)):
        rule = ChatStopRule(markers, tokenizer, stop=stop)
        assert [rule.push(token) for token in (9, markers.think_begin, markers.im_end)] == [
            False,
            False,
            True,
        ]
        rule = ChatStopRule(markers, tokenizer, {9}, stop)
        assert rule.push(9)
        assert not rule.push(markers.im_end)


def test_nothing_comes_after_the_end(tokenizer: Tokenizer, markers: Markers) -> None:
    stream = ChatStream(markers, tokenizer)
    word = tokenizer.encode("hello")[0]
    assert stream.push(word) == [Content(tokenizer.decode([word]))]
    assert stream.push(markers.im_end) == []
    assert stream.push(word) == []
    assert stream.finish() == []
    assert stream.finish() == []


def test_an_end_inside_a_call_is_told(events_of: Callable[..., list[Event]]) -> None:
    events = events_of(f'{SB}{call("functions.f:0", "{}")}{CB}functions.g:1{AB}{{"a": ')
    assert events[-2:] == [ToolCallEnd(1, cut=True), Malformed("", "the answer ended inside a tool call")]
    assert [event for event in events if isinstance(event, Malformed)] == events[-1:]


def test_arguments_stream_as_they_come(tokenizer: Tokenizer, markers: Markers) -> None:
    stream = ChatStream(markers, tokenizer)
    assert not stream.has_tool_calls
    for token in tokenizer.encode_with_specials(f"{SB}{CB}functions.f:0"):
        assert stream.push(token) == []
    assert stream.push(markers.argument_begin) == [ToolCallStart(0, "functions.f:0", "f")]
    assert stream.has_tool_calls
    text = "".join(
        event.text
        for token in tokenizer.encode('{"a": "b c"}')
        for event in stream.push(token)
        if isinstance(event, ToolCallArguments)
    )
    assert text == '{"a": "b c"}'


def test_huge_arguments(read: Callable[..., dict]) -> None:
    arguments = '{"text": "' + "line < | > of text\\n" * 20_000 + '"}'
    assert read(SB + call("functions.f:0", arguments) + SE) == {"calls": [("functions.f:0", arguments)]}
