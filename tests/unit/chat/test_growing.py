"""Histories that come back longer: whatever is held of them, the prompt is that of the whole."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import pytest

from k2hybrid.chat.growing import MAX_HELD, Held, alike
from k2hybrid.chat.prompt import Assembler
from k2hybrid.chat.render_worker import TemplateProgram, _Answers
from k2hybrid.chat.template import ChatTemplate
from k2hybrid.chat.tokenizer import Tokenizer
from k2hybrid.errors import TemplateError
from k2hybrid.types import Message, ToolCall

TOOLS = ({"type": "function", "function": {"name": "f"}},)
SHOWS_ALL = "{{ tools | tojson }}{% for m in messages %}<|im_user|>{{ m.content | tojson }}{% endfor %}"


@pytest.fixture
def template(tokenizer: Tokenizer, golden: Path) -> Iterator[ChatTemplate]:
    template = ChatTemplate(tokenizer, (golden / "chat_template.jinja").read_text())
    yield template
    template.close()


def test_alike_is_the_common_beginning() -> None:
    assert alike([], [1]) == 0
    assert alike([1, 2], [1, 2, 3]) == alike([1, 2, 3], [1, 2]) == 2
    assert alike([1, 2, 3], [1, 5, 3]) == 1
    assert alike([0], [1]) == 0


def test_held_are_the_newest_and_what_goes_on_takes_the_place_of_what_it_goes_on_from() -> None:
    held: Held[str] = Held(most=2, max_chars=10)
    held.put(1, "a", 1)
    held.put(2, "b", 1)
    held.put(3, "aa", 2, instead_of=1)
    assert [number for number, _ in held.newest_first()] == [3, 2]
    held.put(4, "c", 1)
    assert held.get(2) is None
    assert (held.get(3), held.get(4), held.get(None)) == ("aa", "c", None)
    held.put(5, "long", 9)
    assert [number for number, _ in held.newest_first()] == [5, 4], "their characters count together"
    held.put(6, "too long", 11, instead_of=4)
    assert [number for number, _ in held.newest_first()] == [5], "what is too long drops nothing else"
    held.put(7, "d", 10)
    assert [number for number, _ in held.newest_first()] == [7], "what was dropped counts no more"


def turn(rng: random.Random, number: int) -> list[Message]:
    call = ToolCall(f"call_{number}", rng.choice("fg"), f'{{"a": {rng.randrange(9)}}}')
    made: list[list[Message]] = [
        [Message("user", f"question {number}")],
        [
            Message("user", ({"type": "text", "text": f"part {rng.randrange(3)}"},)),
            Message("assistant", "said"),
        ],
        [
            Message("assistant", "", reasoning=f"thought {rng.randrange(3)}", tool_calls=(call,)),
            Message("tool", f"result ø <|im_end|> {rng.randrange(3)}", tool_call_id=call.id),
        ],
    ]
    return rng.choice(made)


def test_grown_cut_and_changed_histories_are_rendered_as_by_who_remembers_nothing(
    template: ChatTemplate, tokenizer: Tokenizer
) -> None:
    """The built-in rendering, which has no process, writes what the template writes."""
    rng = random.Random(5)
    tools: list[tuple[dict[str, Any], ...]] = [
        (),
        ({"function": {"name": "f"}},),
        ({"function": {"name": "g"}},),
    ]
    histories: list[tuple[list[Message], tuple[dict[str, Any], ...]]] = [
        ([], rng.choice(tools)) for _ in range(12)
    ]
    for number in range(120):
        at = rng.randrange(len(histories))
        history, declared = histories[at]
        history = history[: rng.randint(0, len(history)) if rng.random() < 0.2 else None]
        if history and rng.random() < 0.2:
            history[rng.randrange(len(history))] = Message("user", f"changed {number}")
        if rng.random() < 0.1:
            declared = rng.choice(tools)
        history = [*history, *turn(rng, number)]
        histories[at] = history, declared
        prompt = template.render(history, declared)
        assert prompt == ChatTemplate(tokenizer).render(history, declared)


def test_only_what_is_new_goes_to_the_process_and_comes_back(template: ChatTemplate) -> None:
    assert template._jinja is not None
    worker = template._jinja._worker
    sent: list[tuple[int, int]] = []
    exchange = worker.exchange

    def watched(request: bytes, timeout_s: float, max_answer_bytes: int) -> dict[str, Any]:
        answer = exchange(request, timeout_s, max_answer_bytes)
        sent.append((len(request), len(str(answer))))
        return answer

    worker.exchange = watched  # type: ignore[method-assign]
    history = [Message("user", "word " * 20_000)]
    for number in range(4):
        template.render(history, TOOLS)
        history = [*history, Message("assistant", f"said {number}"), Message("user", f"asked {number}")]
    assert len(sent) == 4
    assert min(sent[0]) > 100_000
    assert max(max(sizes) for sizes in sent[1:]) < 1000


def test_threads_render_their_conversations_beside_each_other(
    template: ChatTemplate, tokenizer: Tokenizer
) -> None:
    def converse(number: int) -> None:
        rng = random.Random(number)
        history: list[Message] = [Message("system", "the same for all")] * (number % 2)
        for at in range(12):
            history = [*history, *turn(rng, at)]
            assert template.render(history) == ChatTemplate(tokenizer).render(history)

    with ThreadPoolExecutor(6) as threads:
        list(threads.map(converse, range(6)))


def test_what_is_held_gives_way_where_memory_does_not_suffice_for_both() -> None:
    class Program:
        left = 3

        def render(self, context: dict[str, Any], max_chars: int) -> list[str | int]:
            self.left -= 1
            if self.left in (1, -1, -2):
                raise MemoryError
            return [str(len(context["messages"]))]

    answers = _Answers(cast(TemplateProgram, Program()))
    request = {"tools": [], "add_generation_prompt": True, "max_chars": 99, "chars": 9}
    first = {**request, "number": 0, "base": None, "known": 0, "messages": ["a"]}
    assert answers(first) == {"known": 0, "pieces": ["1"]}
    second = {**request, "number": 1, "base": 0, "known": 1, "messages": ["b"]}
    assert answers(second) == {"known": 0, "pieces": ["2"]}, "tried again with nothing held"
    assert answers({**second, "number": 2}) == {"forgotten": True}
    answers._held = Held()
    with pytest.raises(MemoryError):
        answers({**first, "number": 3})


def test_true_is_not_one_and_one_is_not_a_decimal(tokenizer: Tokenizer) -> None:
    """Python calls them equal; the template may write them out."""
    template = ChatTemplate(tokenizer, SHOWS_ALL)
    seen = set()
    for value in (1, True, 1.0):
        part = {"type": "text", "text": "a", "number": value}
        seen.add(template.render([Message("user", (part,))], [{"minimum": 0}]).text)
        seen.add(template.render([Message("user", "a")], [{"minimum": value}]).text)
    template.close()
    assert len(seen) == 6


def test_the_ids_handed_out_may_be_changed(template: ChatTemplate) -> None:
    history = [Message("user", "hi")]
    ids = template.render(history).ids
    kept = list(ids)
    ids.clear()
    assert template.render(history).ids == kept


@pytest.mark.parametrize("assembled", [["a", 7, "b"], ["a", 7, "b", 7], ["a", 7], ["a"], [7], []])
def test_assembled_from_what_is_held_or_anew(tokenizer: Tokenizer, assembled: list[str | int]) -> None:
    special = next(iter(tokenizer.special_names))
    pieces = [special if piece == 7 else piece for piece in assembled]
    assembler = Assembler(tokenizer)
    for before in ([], ["a", special, "b", special, "c"], ["a", special], ["b"]):
        assembler.assemble(before)
        ids, text = assembler.assemble(pieces)
        assert (ids, text) == Assembler(tokenizer).assemble(pieces)
        assert text == "".join(tokenizer.special_names.get(piece, piece) for piece in pieces)  # type: ignore[misc,arg-type]


def test_a_process_that_was_replaced_is_told_all_again(template: ChatTemplate) -> None:
    history = [Message("user", "first"), Message("assistant", "said")]
    before = template.render(history).text
    assert template._jinja is not None
    pid = template._jinja.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    while os.path.exists(f"/proc/{pid}") and "Z" not in Path(f"/proc/{pid}/stat").read_text():
        time.sleep(0.01)
    after = template.render([*history, Message("user", "second")]).text
    assert template._jinja.pid != pid
    head = before.removesuffix("<|im_assistant|>assistant<|im_middle|>")
    assert after.startswith(head)
    assert "second" in after


def test_many_conversations_by_turns(template: ChatTemplate) -> None:
    """More than are held: each turn is right all the same."""
    histories = [[Message("user", f"conversation {i}")] for i in range(MAX_HELD + 3)]
    for round_ in range(3):
        for i, history in enumerate(histories):
            text = template.render(history).text
            assert f"conversation {i}<|im_end|>" in text
            assert text.count("<|im_user|>") == round_ + 1
            history.append(Message("user", f"round {round_}"))


def test_a_rendering_that_failed_is_not_gone_on_from(tokenizer: Tokenizer) -> None:
    source = "{% for m in messages %}<|im_user|>{{ m.content }}{{ 1 // 0 if m.content == 'bad' }}{% endfor %}"
    template = ChatTemplate(tokenizer, source)
    good = [Message("user", "good")]
    assert template.render(good).text == "<|im_user|>good"
    with pytest.raises(TemplateError, match="ZeroDivisionError"):
        template.render([*good, Message("user", "bad")])
    assert template.render([*good, Message("user", "fine")]).text == "<|im_user|>good<|im_user|>fine"
    template.close()
