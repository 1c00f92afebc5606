"""The golden conversations, in text and ids, by the built-in rendering and by a jinja template."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from k2hybrid.chat import conversation
from k2hybrid.chat.conversation import MAX_DEPTH, MAX_MESSAGES, MAX_TOOLS
from k2hybrid.chat.template import ChatTemplate
from k2hybrid.chat.tokenizer import Tokenizer
from k2hybrid.errors import RequestError, TemplateError
from k2hybrid.types import Message, ToolCall

GOLDEN = Path(__file__).parents[2] / "golden"
CASES = json.loads((GOLDEN / "golden-chat.json").read_text())
HEAD = (
    "<|im_system|>system<|im_middle|>You are Kimi, an AI assistant created by Moonshot AI.<|im_end|>"
    "<|im_user|>user<|im_middle|>hi<|im_end|>"
)
HI = Message("user", "hi")


@pytest.fixture(scope="module", params=["built-in", "jinja"])
def template(request: pytest.FixtureRequest, tokenizer: Tokenizer, golden: Path) -> Iterator[ChatTemplate]:
    source = None if request.param == "built-in" else (golden / "chat_template.jinja").read_text()
    template = ChatTemplate(tokenizer, source)
    yield template
    template.close()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_golden_conversations(template: ChatTemplate, message_of: Callable, case: dict) -> None:
    prompt = template.render(
        [message_of(message) for message in case["messages"]],
        case["tools"] or (),
        add_generation_prompt=case["add_generation_prompt"],
    )
    assert prompt.text == case["text"]
    assert prompt.ids == case["ids"]


@pytest.mark.parametrize(
    ("partial", "ending", "in_reasoning"),
    [
        (Message("assistant", "So", partial=True), "assistant<|im_middle|><think></think>So", False),
        (
            Message("assistant", "So", reasoning="hm", partial=True),
            "assistant<|im_middle|><think>hm</think>So",
            False,
        ),
        (Message("assistant", reasoning="hm", partial=True), "assistant<|im_middle|><think>hm", True),
        (Message("assistant", "", partial=True), "assistant<|im_middle|>", False),
        (
            Message("assistant", ({"type": "text", "text": "So"},), name="Kelsier", partial=True),
            "Kelsier<|im_middle|><think></think>So",
            False,
        ),
    ],
)
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_a_partial_message_is_continued(
    template: ChatTemplate, partial: Message, ending: str, in_reasoning: bool, add_generation_prompt: bool
) -> None:
    prompt = template.render([HI, partial], add_generation_prompt=add_generation_prompt)
    assert prompt.text == HEAD + "<|im_assistant|>" + ending
    assert prompt.in_reasoning is in_reasoning


def test_only_a_last_assistant_message_can_be_partial(template: ChatTemplate) -> None:
    with pytest.raises(RequestError, match="partial"):
        template.render([Message("user", "hi", partial=True)])
    call = ToolCall("0", "f", "{}")
    with pytest.raises(RequestError, match="partial"):
        template.render([HI, Message("assistant", tool_calls=(call,), partial=True)])


def test_ids_in_the_history_become_canonical(template: ChatTemplate) -> None:
    prompt = template.render(
        [
            HI,
            Message("assistant", tool_calls=(ToolCall("call_b", "f", "{}"), ToolCall("call_a", "g", "[1]"))),
            Message("tool", "from g", tool_call_id="call_a"),
            Message("tool", "from f", tool_call_id="call_b"),
        ]
    )
    assert prompt.first_call_index == 2
    assert prompt.text == (
        HEAD + "<|im_assistant|>assistant<|im_middle|><think></think><|tool_calls_section_begin|>"
        "<|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{}<|tool_call_end|>"
        "<|tool_call_begin|>functions.g:1<|tool_call_argument_begin|>[1]<|tool_call_end|>"
        "<|tool_calls_section_end|><|im_end|>"
        "<|im_system|>g<|im_middle|>## Return of functions.g:1\nfrom g<|im_end|>"
        "<|im_system|>f<|im_middle|>## Return of functions.f:0\nfrom f<|im_end|>"
        "<|im_assistant|>assistant<|im_middle|>"
    )


def test_surrogates_and_empty_contents(template: ChatTemplate) -> None:
    prompt = template.render([Message("user", "a\ud800"), Message("user"), Message("user", ())])
    assert prompt.text.count("<|im_user|>user<|im_middle|><|im_end|>") == 2
    assert "<|im_middle|>a\ufffd<|im_end|>" in prompt.text


def test_bounds_on_requests(template: ChatTemplate) -> None:
    with pytest.raises(RequestError, match="messages"):
        template.render([HI] * (MAX_MESSAGES + 1))
    with pytest.raises(RequestError, match="tools"):
        template.render([HI], [{}] * (MAX_TOOLS + 1))
    for leaf in ({}, "text", 1):
        deep: Any = leaf
        for _ in range(MAX_DEPTH - 1):
            deep = {"a": deep}
        template.render([HI], [deep])
        with pytest.raises(RequestError, match="nested"):
            template.render([HI], [{"a": deep}])
    with pytest.raises(RequestError, match="not JSON"):
        template.render([HI], [{"a": object()}])
    with pytest.raises(RequestError, match="digits"):
        template.render([HI], [{"a": 10**5000}])
    with pytest.raises(RequestError, match="not a string"):
        template.render([HI], [{1: 2}])


def test_a_part_without_text_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(RequestError, match="'audio' holds no text"):
        ChatTemplate(tokenizer).render([Message("user", ({"type": "audio"},))])


def test_where_templates_come_from(tokenizer: Tokenizer, tmp_path: Path) -> None:
    assert ChatTemplate.load(tmp_path, tokenizer).source is None
    config = {"chat_template": "from config"}
    other = Tokenizer(tokenizer._plain._mergeable_ranks, tokenizer.specials, config)
    assert ChatTemplate.load(tmp_path, other).source == "from config"
    (tmp_path / "chat_template.jinja").write_text("from file")
    assert ChatTemplate.load(tmp_path, other).source == "from file"
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(TemplateError, match="cannot read"):
        ChatTemplate.load(tmp_path, other)


def test_the_size_of_a_conversation_is_bounded(
    template: ChatTemplate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversation, "MAX_CHARS", 100)
    template.render([HI])
    for messages, tools in (([Message("user", "x" * 101)], ()), ([HI], ({"x" * 101: 1},))):
        with pytest.raises(RequestError, match="more than 100 characters"):
            template.render(messages, tools)


def test_a_template_that_opens_the_reasoning(tokenizer: Tokenizer) -> None:
    template = ChatTemplate(tokenizer, "{% if add_generation_prompt %}<|im_assistant|><think>{% endif %}")
    assert template.render([HI]).in_reasoning
    assert not template.render([HI], add_generation_prompt=False).in_reasoning
    partial = template.render([HI, Message("assistant", "So", reasoning="hm", partial=True)])
    assert (partial.text, partial.in_reasoning) == ("<|im_assistant|><think>hm</think>So", False)
    partial = template.render([HI, Message("assistant", reasoning="hm", partial=True)])
    assert (partial.text, partial.in_reasoning) == ("<|im_assistant|><think>hm", True)
    template.close()
