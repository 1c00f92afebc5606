"""Answers found again in what clients make of them: the ids of a continued history are those generated."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from k2hybrid.chat.exchanges import Answer, Exchanges, gather
from k2hybrid.chat.markers import Markers
from k2hybrid.chat.stream import ChatStream
from k2hybrid.chat.template import ChatTemplate
from k2hybrid.chat.tokenizer import Tokenizer
from k2hybrid.types import Message, ToolCall

SB, SE = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
CB, AB, CE = "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"
END = "<|im_end|>"

Client = Callable[[Message, int], Message]


@pytest.fixture(scope="module")
def template(golden: Path, tokenizer: Tokenizer) -> Iterator[ChatTemplate]:
    loaded = ChatTemplate.load(golden, tokenizer)
    yield loaded
    loaded.close()


class Chat:
    """A server that remembers, and a client that keeps what `client` leaves of each answer."""

    def __init__(
        self, template: ChatTemplate, markers: Markers, tokenizer: Tokenizer, client: Client, scope: str = ""
    ) -> None:
        self.template, self.markers, self.tokenizer = template, markers, tokenizer
        self.exchanges = Exchanges(markers, tokenizer)
        self.client = client
        self.scope = scope
        self.messages: list[Message] = []
        self.answers = 0

    def spelled(self, text: str) -> list[int]:
        """Ids of `text`, of whose tokens the plain ones are single bytes: as no tokenizer would cut them."""
        ids: list[int] = []
        for token in self.tokenizer.encode_with_specials(text):
            if token < self.tokenizer.num_ranks:
                for byte in self.tokenizer.token_bytes(token):
                    ids += self.tokenizer.encode(chr(byte))
            else:
                ids.append(token)
        return ids

    def prompt(self) -> list[int]:
        """With what is known of earlier turns, as without it."""
        anew = Exchanges(self.markers, self.tokenizer)
        for among in self.exchanges._kept.values():
            for exchange in among.values():
                anew.add(exchange)
        prompt = self.prompt_by(self.exchanges)
        assert prompt == self.prompt_by(anew)
        return prompt

    def prompt_by(self, exchanges: Exchanges) -> list[int]:
        recalled = exchanges.recall(self.scope, self.messages)
        return exchanges.spliced(self.template.render(recalled.messages).ids, recalled)

    def answer(self, text: str, ids: Sequence[int] | None = None) -> list[int]:
        """Generate `text`; returns prompt and answer as the cache holds them."""
        prompt = self.prompt()
        generated = list(ids if ids is not None else self.spelled(text))
        stream = ChatStream(self.markers, self.tokenizer)
        events = [event for token in generated for event in stream.push(token)] + stream.finish()
        before = self.exchanges.recall(self.scope, self.messages)
        said = gather(events)
        name = f"chatcmpl-{self.answers}"
        self.exchanges.add(self.exchanges.made(self.scope, before, said, generated, name))
        message = replace(said.message(), response_id=name)
        self.messages.append(self.client(message, self.answers))
        self.answers += 1
        return prompt + generated

    def results(self, *contents: str) -> None:
        calls = self.messages[-1].tool_calls
        for call, content in zip(calls, contents, strict=True):
            self.messages.append(Message("tool", content, tool_call_id=call.id))


def call(name: str, arguments: str, index: int) -> str:
    return f"{CB}functions.{name}:{index}{AB}{arguments}{CE}"


def echo(message: Message, _: int) -> Message:
    return message


def without_reasoning(message: Message, _: int) -> Message:
    return replace(message, reasoning=None, response_id=None)


def other_ids(message: Message, n: int) -> Message:
    calls = tuple(replace(c, id=f"toolu_{n}_{i}") for i, c in enumerate(message.tool_calls))
    return replace(message, tool_calls=calls, reasoning=None, response_id=None)


def other_json(message: Message, _: int) -> Message:
    calls = tuple(
        ToolCall(c.id, c.name, json.dumps(dict(reversed(json.loads(c.arguments).items())), indent=1))
        for c in message.tool_calls
    )
    return replace(message, tool_calls=calls, reasoning="", response_id=None)


def trimmed(message: Message, _: int) -> Message:
    text = message.content
    assert text is None or isinstance(text, str)
    parts = ({"type": "text", "text": (text or "").strip()},)
    return replace(message, content=parts, reasoning=None, response_id=None)


CLIENTS = [echo, without_reasoning, other_ids, other_json, trimmed]


@pytest.mark.parametrize("client", CLIENTS)
def test_a_run_of_tool_calls_continues_to_the_token(
    template: ChatTemplate, markers: Markers, tokenizer: Tokenizer, client: Client
) -> None:
    chat = Chat(template, markers, tokenizer, client)
    chat.messages.append(Message("user", "Weather in Ulm and Bonn, then mail it."))
    known = chat.answer(
        f"<think>Two places, two calls.</think>I look.\n\n{SB}"
        + call("weather", '{"place": "Ulm", "days": 2}', 0)
        + call("weather", '{"place":"Bonn","days":2}', 1)
        + SE
        + END
    )
    chat.results("rain", "sun")
    prompt = chat.prompt()
    assert prompt[: len(known)] == known
    known = chat.answer(
        f"<think>Now the mail.\n</think>{SB}" + call("mail", '{"text": "rain; sun"}', 2) + SE + END
    )
    chat.results("sent")
    assert chat.prompt()[: len(known)] == known


def test_a_long_history_is_compared_once(
    template: ChatTemplate, markers: Markers, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many its answers are, a turn reads only what it brings."""
    read: list[int] = []
    anew = Exchanges._read
    monkeypatch.setattr(Exchanges, "_read", lambda self, ids: read.append(len(ids)) or anew(self, ids))
    chat = Chat(template, markers, tokenizer, other_json)
    chat.messages.append(Message("user", "Count."))
    for n in range(300):
        arguments = f'{{"b":{n},"a":1}}'
        made = f"<think>.</think>{SB}{call('count', arguments, n)}{SE}{END}"
        generated = tokenizer.encode_with_specials(made)
        before = chat.exchanges.recall("", chat.messages)
        answer = Answer(".", "", (("count", arguments),))
        chat.exchanges.add(chat.exchanges.made("", before, answer, generated, f"r{n}"))
        chat.messages.append(other_json(answer.message(), n))
        chat.results("ok")
    first = chat.prompt_by(chat.exchanges)
    assert len(read) >= 300
    read.clear()
    assert chat.prompt_by(chat.exchanges) == first
    assert not read


# What JavaScript's JSON.stringify(JSON.parse(text)) makes of numbers and their like (from Node).
JAVASCRIPT = {
    "1": "1", "1.0": "1", "1e0": "1", "10e-1": "1", "-1": "-1", "-1.0": "-1",
    "1000": "1000", "1e3": "1000", "1E+3": "1000", "1000.0": "1000",
    "0": "0", "-0": "0", "-0.0": "0", "0e5": "0", "-0e-5": "0", "1e-400": "0",
    "0.1": "0.1", "0.10": "0.1", "1e-1": "0.1", "0.10000000000000001": "0.1",
    "0.10000000000000002": "0.10000000000000002",
    "0.3": "0.3", "0.30000000000000004": "0.30000000000000004",
    "2.5": "2.5", "25e-1": "2.5",
    "1e-7": "1e-7", "0.0000001": "1e-7",
    "9007199254740991": "9007199254740991",
    "9007199254740992": "9007199254740992", "9007199254740993": "9007199254740992",
    "9007199254740994": "9007199254740994",
    "9007199254740995": "9007199254740996", "-9007199254740993": "-9007199254740992",
    "12345678901234567890": "12345678901234567000", "12345678901234567168": "12345678901234567000",
    "18446744073709551615": "18446744073709552000", "18446744073709551616": "18446744073709552000",
    "999999999999999999999": "1e+21", "1000000000000000000000": "1e+21", "1e21": "1e+21",
    "123456789012345678901234567890": "1.2345678901234568e+29",
    "1e23": "1e+23", "9.999999999999999e22": "1e+23",
    "5e-324": "5e-324", "3e-324": "5e-324",
    "1.7976931348623157e308": "1.7976931348623157e+308", "1e400": "null", "-1e400": "null",
    "true": "true", "false": "false", "null": "null", '"1"': '"1"', '"1.0"': '"1.0"', "[1.0]": "[1]",
}  # fmt: skip


def calling(value: str) -> Answer:
    return Answer("", "", (("f", f'{{"x":{value}}}'),))


def test_numbers_mean_what_javascript_makes_of_them(markers: Markers, tokenizer: Tokenizer) -> None:
    spellings = [*JAVASCRIPT, *JAVASCRIPT.values()]
    means = {**{text: text for text in JAVASCRIPT.values()}, **JAVASCRIPT}
    exchanges = Exchanges(markers, tokenizer)
    start = exchanges.recall("", ())
    keys = {text: exchanges.made("", start, calling(text), (), "").message_key for text in spellings}
    for one in spellings:
        for other in spellings:
            alike = means[one] == means[other]
            assert calling(one).same_as(calling(other)) is alike, (one, other)
            assert (keys[one] == keys[other]) is alike, (one, other)


@given(st.floats(allow_nan=False, allow_infinity=False), st.floats(allow_nan=False, allow_infinity=False))
def test_a_double_is_itself_however_it_is_written_and_no_other(one: float, other: float) -> None:
    for text in (repr(one), f"{one:.17g}", f"{one:.25e}", f"{Decimal(one):f}"):
        assert calling(text).same_as(calling(repr(one)))
    assert calling(repr(one)).same_as(calling(repr(other))) is (one == other)


def test_digits_without_end_are_a_number_too() -> None:
    assert calling("1" * 5000).same_as(calling("null"))
    assert calling("0." + "1" * 5000).same_as(calling("0.1111111111111111"))


def test_a_call_that_comes_back_from_javascript_keeps_its_ids(
    template: ChatTemplate, markers: Markers, tokenizer: Tokenizer
) -> None:
    def javascript(message: Message, _: int) -> Message:
        back = '{"x":1,"y":[1000,0,9007199254740992],"z":true}'
        calls = tuple(ToolCall(f"call_{c.id}", c.name, back) for c in message.tool_calls)
        return replace(message, tool_calls=calls, reasoning=None, response_id=None)

    chat = Chat(template, markers, tokenizer, javascript)
    chat.messages.append(Message("user", "Call it."))
    said = call("f", '{"x": 1.0, "y": [1e3, -0, 9007199254740993], "z": true}', 0)
    known = chat.answer(f"<think>Numbers.</think>{SB}{said}{SE}{END}")
    chat.results("done")
    assert chat.prompt()[: len(known)] == known


@pytest.mark.parametrize("client", CLIENTS)
def test_after_a_finished_run_the_template_drops_the_reasoning_and_wins(
    template: ChatTemplate, markers: Markers, tokenizer: Tokenizer, client: Client
) -> None:
    chat = Chat(template, markers, tokenizer, client)
    chat.messages.append(Message("user", "Weather in Ulm?"))
    chat.answer(f"<think>A secret thought.</think>{SB}" + call("weather", '{"place": "Ulm"}', 0) + SE + END)
    chat.results("rain")
    chat.answer(f"<think>Another secret.</think>It rains.{END}")
    chat.messages.append(Message("user", "Thanks."))
    text = tokenizer.decode(chat.prompt())
    assert "secret" not in text
    assert "It rains." in text


def test_a_client_that_sends_other_reasoning_is_obeyed(
    template: ChatTemplate, markers: Markers, tokenizer: Tokenizer
) -> None:
    chat = Chat(template, markers, tokenizer, lambda m, _: replace(m, reasoning="I was told to."))
    chat.messages.append(Message("user", "Weather in Ulm?"))
    chat.answer(f"<think>Mine.</think>{SB}" + call("weather", "{}", 0) + SE + END)
    chat.results("rain")
    text = tokenizer.decode(chat.prompt())
    assert "I was told to." in text
    assert "Mine." not in text


@pytest.mark.parametrize(("carried", "expected"), [("chatcmpl-0", 0), ("chatcmpl-1", 1), (None, 1), ("x", 1)])
def test_of_several_answers_the_carried_id_wins_else_the_latest(
    template: ChatTemplate, markers: Markers, tokenizer: Tokenizer, carried: str | None, expected: int
) -> None:
    chat = Chat(template, markers, tokenizer, lambda m, _: replace(m, reasoning=None, response_id=carried))
    question = Message("user", "Weather in Ulm?")
    known = []
    for thought in ("First.", "Second."):
        chat.messages = [question]
        known.append(chat.answer(f"<think>{thought}</think>{SB}" + call("weather", "{}", 0) + SE + END))
    chat.results("rain")
    assert chat.prompt()[: len(known[expected])] == known[expected]


def test_a_cut_off_answer_keeps_its_reasoning_but_the_template_closes_it(
    template: ChatTemplate, markers: Markers, tokenizer: Tokenizer
) -> None:
    chat = Chat(template, markers, tokenizer, without_reasoning)
    chat.messages.append(Message("user", "Weather in Ulm?"))
    chat.answer("<think>Long thoughts</think>It ra")  # max_tokens came first
    chat.messages.append(Message("tool", "?", tool_call_id="x"))
    text = tokenizer.decode(chat.prompt())
    assert f"It ra{END}" in text


def test_nothing_is_found_in_another_scope_or_after_another_history(
    template: ChatTemplate, markers: Markers, tokenizer: Tokenizer
) -> None:
    chat = Chat(template, markers, tokenizer, without_reasoning, scope="a")
    chat.messages.append(Message("user", "Weather in Ulm?"))
    chat.answer(f"<think>Mine.</think>{SB}" + call("weather", "{}", 0) + SE + END)
    assert chat.exchanges.recall("a", chat.messages).known
    assert not chat.exchanges.recall("b", chat.messages).known
    other = [Message("user", "Weather in Bonn?"), *chat.messages[1:]]
    assert not chat.exchanges.recall("a", other).known


def test_a_template_without_kimis_headers_is_left_alone(markers: Markers, tokenizer: Tokenizer) -> None:
    exchanges = Exchanges(markers, tokenizer)
    messages = [Message("user", "Hi"), Message("assistant", "Hello")]
    ids = tokenizer.encode_with_specials(f"Hello{END}")
    said = gather([])
    exchanges.add(
        exchanges.made("", exchanges.recall("", messages[:1]), replace(said, content="Hello"), ids, "r")
    )
    recalled = exchanges.recall("", messages)
    assert recalled.known
    rendered = tokenizer.encode("USER Hi BOT Hello")
    assert exchanges.spliced(rendered, recalled) == rendered


def test_the_oldest_are_forgotten_first(markers: Markers, tokenizer: Tokenizer) -> None:
    exchanges = Exchanges(markers, tokenizer, max_tokens=300)
    histories = [[Message("user", f"question {n}")] for n in range(10)]
    for n, history in enumerate(histories):
        before = exchanges.recall("", history)
        said = replace(gather([]), content=f"answer {n}")
        exchanges.add(exchanges.made("", before, said, [n] * 30, f"r{n}"))
    assert len(exchanges) == 3
    known = [
        bool(exchanges.recall("", [*history, Message("assistant", f"answer {n}")]).known)
        for n, history in enumerate(histories)
    ]
    assert known == [False] * 7 + [True] * 3


@pytest.mark.parametrize(
    "said",
    [
        f"<think>Mine.</think>{SB}{CB}functions.weather:7{AB}{{}}{CE}{SE}{END}",  # told to the client as :0
        f"<think>Mine.</think>It<|im_user|> rains.{SB}{CB}functions.weather:0{AB}{{}}{CE}{SE}{END}",
    ],
)
def test_what_the_model_must_not_read_again_is_left_as_rendered(
    template: ChatTemplate, markers: Markers, tokenizer: Tokenizer, said: str
) -> None:
    chat = Chat(template, markers, tokenizer, without_reasoning)
    chat.messages.append(Message("user", "Weather in Ulm?"))
    chat.answer(said)
    chat.results("rain")
    text = tokenizer.decode(chat.prompt())
    assert "Mine." in text  # the reasoning is restored all the same
    assert "functions.weather:0" in text
    assert ":7" not in text
    assert text.count("<|im_user|>") == 1


def test_an_edit_of_white_space_inside_a_text_is_obeyed(
    template: ChatTemplate, markers: Markers, tokenizer: Tokenizer
) -> None:
    chat = Chat(template, markers, tokenizer, lambda m, _: replace(m, content="if a:\n    b()\nc()"))
    chat.messages.append(Message("user", "Write it."))
    chat.answer(f"<think></think>if a:\n    b()\n    c(){SB}" + call("run", "{}", 0) + SE + END)
    chat.results("ok")
    assert "b()\nc()" in tokenizer.decode(chat.prompt())


def test_what_must_not_be_stored_says_so_when_it_is_restored(markers: Markers, tokenizer: Tokenizer) -> None:
    exchanges = Exchanges(markers, tokenizer)
    history = [Message("user", "Hi")]
    before = exchanges.recall("", history)
    exchanges.add(exchanges.made("", before, replace(gather([]), content="Hello"), [1], "r", store=False))
    assert before.store
    assert not exchanges.recall("", [*history, Message("assistant", "Hello")]).store


def test_of_many_answers_that_mean_the_same_the_newest_are_kept(
    markers: Markers, tokenizer: Tokenizer
) -> None:
    exchanges = Exchanges(markers, tokenizer)
    before = exchanges.recall("", [Message("user", "Hi")])
    for n in range(100):
        exchanges.add(exchanges.made("", before, replace(gather([]), content="Hello"), [n], f"r{n}"))
    assert len(exchanges) == 8
