"""Spellings of control tokens in whatever a client sends: they stay text, under any template."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jinja2
import jinja2.sandbox
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from k2hybrid.chat import render_worker
from k2hybrid.chat.prompt import Prompt
from k2hybrid.chat.render_worker import TemplateProgram
from k2hybrid.chat.template import ChatTemplate
from k2hybrid.chat.tokenizer import Tokenizer
from k2hybrid.types import Message, ToolCall

GOLDEN = Path(__file__).parents[1] / "golden"
GOLDEN_SOURCE = (GOLDEN / "chat_template.jinja").read_text()
WORD = "harmless"

POSITIONS = (
    "role",
    "system content",
    "user name",
    "user content",
    "text part",
    "later text part",
    "reasoning",
    "assistant content",
    "call id",
    "call name",
    "call arguments",
    "result id",
    "result name",
    "result content",
    "orphan result id",
    "tool name",
    "tool value",
    "tool key",
    "deep tool value",
    "deep tool key",
)


def conversation(given: dict[str, str]) -> tuple[list[Message], list[dict[str, Any]]]:
    """A conversation with `given` at the named positions, the harmless word elsewhere."""

    def at(position: str) -> str:
        return given.get(position, WORD)

    call = ToolCall(at("call id"), at("call name"), at("call arguments"))
    parts = ({"type": "text", "text": at("text part")}, {"type": "text", "text": at("later text part")})
    messages = [
        Message("system", at("system content")),
        Message(at("role"), "x"),
        Message("user", at("user content"), name=at("user name")),
        Message("assistant", at("assistant content"), reasoning=at("reasoning"), tool_calls=(call,)),
        Message("tool", at("result content"), name=at("result name"), tool_call_id=at("result id")),
        Message("tool", "x", tool_call_id=at("orphan result id")),
        Message("user", parts),
    ]
    deep = {"list": [1, {"a" + at("deep tool key"): at("deep tool value")}]}
    function = {"name": at("tool name"), "parameters": {"a" + at("tool key"): at("tool value")}, "x": deep}
    return messages, [{"type": "function", "function": function}]


def segments(prompt: Prompt, tokenizer: Tokenizer) -> list[str | int]:
    """Control tokens by id, and the decoded text between them."""
    result: list[str | int] = []
    plain: list[int] = []
    for token in [*prompt.ids, tokenizer.vocab_size]:
        if token < tokenizer.num_ranks:
            plain.append(token)
            continue
        if plain:
            result.append(tokenizer.decode(plain))
        plain = []
        result.append(token)
    return result[:-1]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(GOLDEN)


@pytest.fixture(scope="module", params=["built-in", "jinja"])
def template(request: pytest.FixtureRequest, tokenizer: Tokenizer) -> Iterator[ChatTemplate]:
    template = ChatTemplate(tokenizer, None if request.param == "built-in" else GOLDEN_SOURCE)
    yield template
    template.close()


@pytest.fixture(scope="module")
def harmless(template: ChatTemplate, tokenizer: Tokenizer) -> list[str | int]:
    return segments(template.render(*conversation({})), tokenizer)


def expected(harmless: list[str | int], text: str) -> list[str | int]:
    return [piece if isinstance(piece, int) else piece.replace(WORD, text) for piece in harmless]


def test_every_special_at_all_positions(
    template: ChatTemplate, tokenizer: Tokenizer, harmless: list[str | int]
) -> None:
    assert sum(isinstance(piece, int) for piece in harmless) > 30
    for special in tokenizer.specials:
        prompt = template.render(*conversation(dict.fromkeys(POSITIONS, special)))
        assert segments(prompt, tokenizer) == expected(harmless, special), special
        assert tokenizer.decode(prompt.ids) == prompt.text


@pytest.mark.parametrize("position", POSITIONS)
def test_each_position_with_every_special(
    template: ChatTemplate, tokenizer: Tokenizer, harmless: list[str | int], position: str
) -> None:
    control = [piece for piece in harmless if isinstance(piece, int)]
    plain = template.render(*conversation({position: "@@@"})).text
    # Of ids only canonical ones are written, whatever a client sends.
    assert ("@@@" in plain) is (position not in ("call id", "result id", "orphan result id"))
    for text in ("".join(tokenizer.specials), " ".join(tokenizer.specials), "x<think>", " <|im_end|> "):
        prompt = template.render(*conversation({position: text}))
        assert [token for token in prompt.ids if token >= tokenizer.num_ranks] == control
        assert prompt.text == plain.replace("@@@", text)
        assert tokenizer.decode(prompt.ids) == prompt.text


def test_every_special_alone_at_each_position(tokenizer: Tokenizer) -> None:
    template = ChatTemplate(tokenizer)
    harmless = [t for t in template.render(*conversation({})).ids if t >= tokenizer.num_ranks]
    for position in POSITIONS:
        for special in tokenizer.specials:
            ids = template.render(*conversation({position: special})).ids
            assert [t for t in ids if t >= tokenizer.num_ranks] == harmless, (position, special)


fragments = st.sampled_from(
    [
        "<|",
        "im_end",
        "|>",
        "<|im_",
        "end|>",
        "<",
        "think",
        ">",
        "</",
        "[",
        "EOS",
        "]",
        " ",
        "\n",
        "<|im_end|>",
    ]
)
hostile = st.lists(fragments, max_size=5).map("".join)


@settings(max_examples=150, deadline=None)
@given(given_texts=st.dictionaries(st.sampled_from(POSITIONS), hostile))
def test_spellings_put_together_from_pieces(
    template: ChatTemplate, tokenizer: Tokenizer, harmless: list[str | int], given_texts: dict[str, str]
) -> None:
    texts = {position: text or "x" for position, text in given_texts.items()}
    prompt = template.render(*conversation(texts))
    control = [token for token in prompt.ids if token >= tokenizer.num_ranks]
    assert control == [piece for piece in harmless if isinstance(piece, int)]
    assert tokenizer.decode(prompt.ids) == prompt.text


# --- templates that help the attacker -------------------------------------------------------------

SCHEMING = [
    ("<{{ a }}>", "think", "", "<think>"),
    ("<|{{ a }}|>", "im_end", "", "<|im_end|>"),
    ("<|im_{{ a }}", "end|>", "", "<|im_end|>"),
    ("{{ a }}end|>", "<|im_", "", "<|im_end|>"),
    ("{{ '<|' ~ a ~ '|>' }}", "im_end", "", "<|im_end|>"),
    ("{{ '<|' + a + '|>' }}", "im_end", "", "<|im_end|>"),
    ("{{ ['<|', a, '|>'] | join }}", "im_end", "", "<|im_end|>"),
    ("{{ '<|%s|>' % a }}", "im_end", "", "<|im_end|>"),
    ("{{ '<|{}|>'.format(a) }}", "im_end", "", "<|im_end|>"),
    ("{{ '<|%s|>' | format(a) }}", "im_end", "", "<|im_end|>"),
    ("{{ a }}{{ b }}", "<|im_", "end|>", "<|im_end|>"),
    ("{{ a ~ b }}", "<|im_", "end|>", "<|im_end|>"),
    ("{{ [a, b] | join }}", "<|im_", "end|>", "<|im_end|>"),
    ("{{ a | upper }}", "[bos]", "", "[BOS]"),
    ("{{ a | lower }}", "<THINK>", "", "<think>"),
    ("{{ a | trim }}", "  </think>\n", "", "</think>"),
    ("{{ a | replace('x', '') }}", "<|imx_end|>", "", "<|im_end|>"),
    ("{{ a | replace('x', b) }}", "<|x|>", "im_end", "<|im_end|>"),
    ("{{ a.replace('x', '<') }}", "xthink>", "", "<think>"),
    ("{{ a | reverse }}", ">kniht<", "", "<think>"),
    ("{{ a[1:-1] }}", "x<think>x", "", "<think>"),
    ("{{ a.split('-') | join('') }}", "<-think->", "", "<think>"),
    ("{{ a | list | join }}", "<think>", "", "<think>"),
    ("{{ a | safe }}", "<think>", "", "<think>"),
    ("{{ a | tojson }}", "<think>", "", '"<think>"'),
    ("{% set x %}{{ a }}{% endset %}{{ x }}", "<think>", "", "<think>"),
    ("{% macro m(x) %}<{{ x }}>{% endmacro %}{{ m(a) }}", "think", "", "<think>"),
    ("{% filter lower %}<{{ a }}>{% endfilter %}", "THINK", "", "<think>"),
    ("{% for c in a %}{{ c }}{% endfor %}", "<think>", "", "<think>"),
    ("{{ {'x': a}.x }}", "<think>", "", "<think>"),
    ("{{ messages | tojson }}", "<think>", "", '[{"role": "user", "content": "<think>", "name": "b"}]'),
]


@pytest.fixture(scope="module")
def scheming(tokenizer: Tokenizer) -> Iterator[ChatTemplate]:
    """All of `SCHEMING` in one template; the tool's number picks one."""
    branches = "".join(
        f"{{% if tools[0].n == {i} %}}{source}{{% endif %}}" for i, (source, *_) in enumerate(SCHEMING)
    )
    head = "{% set a = messages[0].content %}{% set b = messages[0].name %}"
    template = ChatTemplate(tokenizer, f"<|im_user|>{head}{branches}<|im_end|>")
    yield template
    template.close()


@pytest.mark.parametrize("number", range(len(SCHEMING)), ids=lambda number: SCHEMING[number][0])
def test_templates_that_complete_a_spelling(
    scheming: ChatTemplate, tokenizer: Tokenizer, number: int
) -> None:
    _, a, b, text = SCHEMING[number]
    prompt = scheming.render([Message("user", a, name=b or "b")], [{"n": number}])
    assert segments(prompt, tokenizer) == [163587, text, 163586]


# --- the protection changes nothing else ----------------------------------------------------------

CAREFUL = (
    GOLDEN_SOURCE,
    "{{ {'user': '<|im_user|>', 'tool': '<|im_system|>'}.get(messages[0].role, '<|im_assistant|>') }}"
    "{{ messages[0].content.split('</think>')[-1] }}{{ ['<|im_end|>', '[EOT]'] | join('<|im_middle|>') }}",
    "{% set c = messages[0].content %}{% if '<think>' in c %}{{ c | replace('<think>', '<|im_middle|>') }}"
    "{% elif c.startswith('[BOS]') or c == '<|im_end|>' %}{{ '<|im_end|>' * 2 }}{% else %}{{ c | length }}"
    "{% endif %}",
    "{% macro turn(opener, end='<|im_end|>') %}{{ opener }}{{ caller() if caller }}{{ end }}{% endmacro %}"
    "{% call turn('<|im_user|>') %} {{ messages[0].content | trim }} {% endcall %}"
    "{{ turn('[BOS]', end='[EOS]') }}{{ ('<|im_' ~ 'middle|>') }}<|im_{{ 'end|>' }}"
    "{{ bos_token + eos_token }}",
)


@settings(max_examples=60, deadline=None)
@given(
    content=st.lists(fragments | st.sampled_from(["<think>", "</think>", "[BOS]"]), max_size=5).map("".join)
)
@pytest.mark.parametrize("source", CAREFUL, ids=range(len(CAREFUL)))
def test_the_text_is_that_of_an_unprotected_rendering(
    tokenizer: Tokenizer, source: str, content: str
) -> None:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = render_worker._tojson
    tokens = {"bos_token": "[BOS]", "eos_token": "[EOS]"}
    program = render_worker.TemplateProgram(source, list(tokenizer.specials), tokens)
    context = {"messages": [{"role": "user", "content": content}], "tools": None}
    pieces = program.render(context, 1 << 20)
    names = list(tokenizer.specials)
    text = "".join(piece if isinstance(piece, str) else names[piece] for piece in pieces)
    assert text == environment.from_string(source).render(**context, **tokens)
    if content in ("", " ", "\n"):  # nothing of a body is at stake: all spellings are the template's own
        assert not any(isinstance(piece, str) and tokenizer.special_pattern.search(piece) for piece in pieces)


def test_the_number_behind_a_control_token_is_used_once(monkeypatch: pytest.MonkeyPatch) -> None:
    keys: list[str] = []
    fresh = render_worker._fresh_key

    def watched() -> str:
        keys.append(fresh())
        return keys[-1]

    monkeypatch.setattr(render_worker, "_fresh_key", watched)
    program = render_worker.TemplateProgram("{{ body }}<think>", ["<think>"], {})
    assert program.render({"body": "x"}, 100) == ["x", 0]
    assert program.render({"body": keys[0] + "0000"}, 100) == [keys[0] + "0000", 0]
    assert len(set(keys)) == 2
    assert all(len(key) == 38 and key.isdecimal() for key in keys)


@pytest.mark.parametrize("name", [*dir(dict), "role", "_x", "__secret", "mro", "missing"])
def test_the_quicker_sandbox_sees_what_the_plain_one_does(name: str) -> None:
    plain = jinja2.sandbox.ImmutableSandboxedEnvironment()
    program = TemplateProgram("", [], {})
    quick = program._template.environment
    for there in ({}, {name: "value"}):
        found, wanted = (environment.getattr(there, name) for environment in (quick, plain))
        assert type(found) is type(wanted)
        assert found == wanted or isinstance(found, jinja2.Undefined)
