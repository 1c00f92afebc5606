"""What holds for any token sequence: nothing leaks, nothing vanishes, and cuts make no difference."""

from __future__ import annotations

import itertools
import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from k2hybrid.chat.holdback import StopScan, Utf8Pieces
from k2hybrid.chat.markers import Markers
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

# A part of an answer: the name of a marker, a whole call opener, or text without braces, colons and digits.
OPENER = "functions.f:0"
MARKERS = (
    "think_begin think_end section_begin section_end call_begin argument_begin call_end opener stray".split()
)
texts = st.text(alphabet="ab é汉👩<|>\n ", min_size=1, max_size=6)
answers = st.lists(
    st.sampled_from(MARKERS).map(lambda name: ("marker", name)) | texts.map(lambda t: ("text", t))
)


def tokens_of(
    answer: list, tokenizer: Tokenizer, markers: Markers, single_bytes: list[int] | None
) -> list[int]:
    ids: list[int] = []
    for kind, value in answer:
        if kind == "text":
            ids += (
                tokenizer.encode(value) if single_bytes is None else [single_bytes[b] for b in value.encode()]
            )
        elif value == "opener":
            ids += [markers.call_begin, *tokenizer.encode(OPENER), markers.argument_begin]
        elif value == "stray":
            ids.append(tokenizer.specials["<|im_user|>"])
        else:
            ids.append(getattr(markers, value))
    return ids


def run(stream: ChatStream, ids: list[int]) -> list[Event]:
    return [event for token in ids for event in stream.push(token)] + stream.finish()


def joined(events: list[Event]) -> list[Event]:
    """Neighbouring pieces of one kind as one event."""
    result: list[Event] = []
    for event in events:
        last = result[-1] if result else None
        match event, last:
            case (Reasoning(text), Reasoning(before)) | (Content(text), Content(before)):
                result[-1] = type(event)(before + text)
            case ToolCallArguments(index, text), ToolCallArguments(_, before):
                result[-1] = ToolCallArguments(index, before + text)
            case _:
                result.append(event)
    return result


@pytest.fixture(scope="module")
def single_bytes(tokenizer: Tokenizer) -> list[int]:
    by_byte = {tokenizer.token_bytes(token): token for token in range(tokenizer.num_ranks)}
    return [by_byte[bytes([byte])] for byte in range(256)]


@settings(max_examples=400, deadline=None)
@given(answer=answers)
def test_nothing_leaks_and_nothing_vanishes(tokenizer: Tokenizer, markers: Markers, answer: list) -> None:
    events = run(ChatStream(markers, tokenizer), tokens_of(answer, tokenizer, markers, None))
    written = "".join(
        value if kind == "text" else OPENER if value == "opener" else "" for kind, value in answer
    )
    read = ""
    for event in events:
        match event:
            case ToolCallStart():
                read += OPENER
            case ToolCallArguments(_, text) if text == "{}":
                pass  # stands for absent arguments
            case Reasoning(text) | Content(text) | ToolCallArguments(_, text) | Malformed(text, _):
                read += text
    assert re.sub(r"\s", "", read) == re.sub(r"\s", "", written)


@settings(max_examples=300, deadline=None)
@given(answer=answers, stop=st.lists(st.text(alphabet="ab <\n", min_size=1, max_size=3), max_size=2))
def test_cuts_make_no_difference(
    tokenizer: Tokenizer, markers: Markers, single_bytes: list[int], answer: list, stop: list[str]
) -> None:
    by_tokens = ChatStream(markers, tokenizer, stop=stop)
    by_bytes = ChatStream(markers, tokenizer, stop=stop)
    events = joined(run(by_tokens, tokens_of(answer, tokenizer, markers, None)))
    assert events == joined(run(by_bytes, tokens_of(answer, tokenizer, markers, single_bytes)))
    assert by_tokens.stopped == by_bytes.stopped


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_random_tokens_make_well_formed_events(tokenizer: Tokenizer, markers: Markers, seed: int) -> None:
    """Uniformly random ids, markers as likely as the rest: calls open and close in order, once each."""
    draw = random.Random(seed)
    control = list(tokenizer.special_names)
    structure = [markers.section_begin, markers.call_begin, markers.argument_begin, markers.call_end]
    ids = [
        draw.choice((draw.choice(structure), draw.choice(control), draw.randrange(tokenizer.num_ranks)))
        for _ in range(draw.randrange(40))
    ]
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    events = run(ChatStream(markers, tokenizer, tools=tools), ids)
    open_call, calls = None, 0
    for event in events:
        match event:
            case ToolCallStart(index, _, _):
                assert open_call is None
                assert index == calls
                open_call, calls = index, calls + 1
            case ToolCallArguments(index, text):
                assert index == open_call
                assert text
            case ToolCallEnd(index):
                assert index == open_call
                open_call = None
            case Reasoning(text) | Content(text):
                assert text
                assert open_call is None
    assert open_call is None


@given(data=st.binary(max_size=40), cuts=st.lists(st.integers(0, 40)))
def test_utf8_pieces_equal_the_whole(data: bytes, cuts: list[int]) -> None:
    decoder = Utf8Pieces()
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    text = "".join(decoder.push(data[a:b]) for a, b in itertools.pairwise(edges)) + decoder.flush()
    assert text == data.decode("utf-8", "replace")


short = st.text(alphabet="abc", min_size=1, max_size=4)


@settings(max_examples=300)
@given(pieces=st.lists(short), stops=st.lists(short, max_size=3))
def test_the_stop_string_that_completes_first_wins(pieces: list[str], stops: list[str]) -> None:
    text = "".join(pieces)
    ends = [(at + len(stop), at) for stop in stops if (at := text.find(stop)) >= 0]
    scan = StopScan(stops)
    passed = "".join(map(scan.push, pieces)) + scan.flush()
    assert passed == (text[: min(ends)[1]] if ends else text)
    assert scan.stopped is bool(ends)
