"""Chat templates that loop, swell, pry or break: a named error each time, and the next conversation works."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from k2hybrid.chat.jinja import JinjaRenderer
from k2hybrid.chat.template import ChatTemplate
from k2hybrid.chat.tokenizer import Tokenizer
from k2hybrid.errors import RequestError, TemplateError
from k2hybrid.types import Message

HI = [Message("user", "hi")]
GOLDEN = Path(__file__).parents[1] / "golden"
# Renders the content, unless the content asks for trouble.
SWITCH = "{% if messages[0].content == 'attack' %}ATTACK{% endif %}{{ messages[0].content }}<|im_end|>"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(GOLDEN)


@pytest.fixture
def make(tokenizer: Tokenizer) -> Iterator[Callable[..., ChatTemplate]]:
    made: list[ChatTemplate] = []

    def build(source: str, timeout_s: float = 10.0) -> ChatTemplate:
        made.append(ChatTemplate(tokenizer, source, timeout_s=timeout_s))
        return made[-1]

    yield build
    for template in made:
        template.close()


def worker_pid(template: ChatTemplate) -> int | None:
    assert isinstance(template._jinja, JinjaRenderer)
    return template._jinja.pid


FORBIDDEN = [
    "{{ ''.__class__.__mro__ }}",
    "{{ messages.__class__ }}",
    "{{ ''['__class__'].__subclasses__() }}",
    "{{ ''|attr('__class__') }}{{ (''|attr('__class__')).mro() }}",
    "{{ lipsum.__globals__['os'].popen('id').read() }}",
    "{{ cycler.__init__.__globals__.os.system('id') }}",
    "{{ self.__init__.__globals__ }}",
    "{{ self._TemplateReference__context }}{{ self._TemplateReference__context.environment.x() }}",
    "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__globals__['__builtins__'] }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(raise_exception) }}",
    "{{ ('{0.__class__}'|format)(1) }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os }}",
    "{% extends 'base' %}",
    "{{ messages.append(1) }}",
    "{% set _ = messages[0].update({'role': 'x'}) %}{{ _ }}",
    "{% set _ = dict.update(messages[0], {'content': 'changed'}) %}{{ messages[0].content }}",
    "{% set _ = dict.pop(messages[0], 'content') %}{{ _ }}",
]


@pytest.mark.parametrize("source", FORBIDDEN)
def test_reaching_for_what_is_not_there(make: Callable[..., ChatTemplate], source: str) -> None:
    template = make(SWITCH.replace("ATTACK", source))
    try:
        prompt = template.render([Message("user", "attack")])
    except TemplateError:
        pass  # the usual end; jinja2 makes of some attributes an undefined value, which renders as nothing
    else:
        leaked = prompt.text.removesuffix("attack<|im_end|>")
        assert leaked == "", leaked
    assert template.render(HI).text == "hi<|im_end|>"


def test_one_conversation_cannot_be_written_into_another(make: Callable[..., ChatTemplate]) -> None:
    """What is held of a history is what the next one is rendered from."""
    template = make(
        "{% set _ = dict.update(messages[0], {'content': messages[-1].content}) %}"
        "{% for m in messages %}{{ m.content }};{% endfor %}"
    )
    shared = Message("system", "shared")
    with pytest.raises(TemplateError, match="forbidden"):
        template.render([shared, Message("user", "secret")])
    with pytest.raises(TemplateError, match="forbidden"):
        template.render([shared, Message("user", "other")])


ENDLESS = [
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{{ 9 ** (9 ** 9) }}",
    "{% macro f() %}{% for i in range(99) %}{{ f() }}{% endfor %}{% endmacro %}{{ f() }}",
    "{{ range(99999)|list|string|length }}" * 400,
]


@pytest.mark.parametrize("source", ENDLESS)
def test_endless_templates_are_ended(make: Callable[..., ChatTemplate], source: str) -> None:
    template = make(SWITCH.replace("ATTACK", source), timeout_s=1.0)
    assert template.render(HI).text == "hi<|im_end|>"
    started = time.monotonic()
    with pytest.raises(TemplateError):
        template.render([Message("user", "attack")])
    assert time.monotonic() - started < 30  # the bound is one second; the rest is a busy machine's
    assert template.render(HI).text == "hi<|im_end|>"


SWELLING = [
    "{{ 'x' * 10 ** 10 }}",
    "{{ ['x' * 1000] * 10 ** 9 }}",
    "{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}",
    "{{ '%1000000000d' % 1 }}",
    "{{ 'x'|center(10 ** 10) }}",
]


@pytest.mark.parametrize("source", SWELLING)
def test_swelling_templates_are_ended(make: Callable[..., ChatTemplate], source: str) -> None:
    template = make(SWITCH.replace("ATTACK", source))
    with pytest.raises(TemplateError):
        template.render([Message("user", "attack")])
    assert template.render(HI).text == "hi<|im_end|>"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% if %}", "line 1"),
        ("{{ messages[0].content", "line 1"),
        ("{% generation %}", "line 1"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ messages[7].content }}", "Undefined"),
        ("{{ nothing.at.all }}", "undefined"),
        ("{{ 'x'.no_such_method() }}", "no attribute"),
        ("(" * 100_000, None),
        ("{{ " + "(" * 20_000 + ")" * 20_000 + " }}", "recursion"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ '<|im_end|>'[:-1] }}", "cut a control token"),
    ],
)
def test_broken_templates_are_named(
    make: Callable[..., ChatTemplate], source: str, message: str | None
) -> None:
    template = make(source)
    if message is None:
        assert template.render(HI).text == source
        return
    with pytest.raises(TemplateError, match=message):
        template.render(HI)


def test_a_template_may_refuse_messages(make: Callable[..., ChatTemplate]) -> None:
    template = make("{{ raise_exception('no <|im_end|> for ' ~ messages[0].role) }}")
    with pytest.raises(RequestError, match=r"no <\|im_end\|> for user"):
        template.render(HI)
    assert worker_pid(template) is not None  # that is no reason to end it


def test_what_templates_may_use(make: Callable[..., ChatTemplate]) -> None:
    source = (
        "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{% generation %}{{ m.content }}"
        "{% endgeneration %}{% endfor %}|{{ strftime_now('%Y') | length }}|{{ bos_token }}{{ eos_token }}|"
        "{{ tools | tojson }}|{{ tools | tojson(indent=1) }}|{{ [1] | tojson(separators=(',', ':')) }}|"
        "{{ {'b': 'é<>&', 'a': 1} | tojson(sort_keys=true, ensure_ascii=true) }}"
    )
    tools = [{"b": "é<>&'", "a": [1, None]}]
    rendered = make(source).render([*HI, *HI], tools)
    sorted_tools = [{"a": [1, None], "b": "é<>&'"}]
    assert rendered.text == (
        f"hi|4|[BOS][EOS]|{json.dumps(sorted_tools, ensure_ascii=False)}|"
        f"{json.dumps(sorted_tools, ensure_ascii=False, indent=1)}|[1]|"
        '{"a": 1, "b": "\\u00e9<>&"}'
    )
    assert rendered.ids.count(163584) == rendered.ids.count(163585) == 1


def test_the_worker_dies_with_its_bound_and_leaves_no_zombie(make: Callable[..., ChatTemplate]) -> None:
    template = make(SWITCH.replace("ATTACK", ENDLESS[0]), timeout_s=1.0)
    assert worker_pid(template) is None  # started by the first rendering
    template.render(HI)
    pid = worker_pid(template)
    assert pid is not None
    with pytest.raises(TemplateError, match="more than 1 s"):
        template.render([Message("user", "attack")])
    assert not os.path.exists(f"/proc/{pid}")  # reaped
    template.render(HI)
    again = worker_pid(template)
    assert again not in (None, pid)
    template.close()
    assert not os.path.exists(f"/proc/{again}")


def test_a_worker_killed_from_outside_is_replaced(make: Callable[..., ChatTemplate]) -> None:
    template = make("{{ messages[0].content }}")
    template.render(HI)
    pid = worker_pid(template)
    assert pid is not None
    os.kill(pid, 9)
    deadline = time.monotonic() + 30
    while Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z" and time.monotonic() < deadline:
        time.sleep(0.01)
    assert template.render(HI).text == "hi"


def test_the_worker_sees_no_secrets(
    make: Callable[..., ChatTemplate], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_API_KEY", "secret")
    template = make("{{ messages[0].content }}")
    template.render(HI)
    assert b"secret" not in Path(f"/proc/{worker_pid(template)}/environ").read_bytes()


def test_threads_take_turns(make: Callable[..., ChatTemplate]) -> None:
    template = make("{{ messages[0].content }}<|im_end|>")
    wrong: list[str] = []

    def work(name: str) -> None:
        for i in range(50):
            text = f"{name} {i} " + name * (i * 97)
            if template.render([Message("user", text)]).text != text + "<|im_end|>":
                wrong.append(text)

    threads = [threading.Thread(target=work, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_megabytes_go_through(make: Callable[..., ChatTemplate]) -> None:
    text = "wörd <|im_end|> " * 250_000
    rendered = make("{{ messages[0].content }}<|im_end|>").render([Message("user", text)])
    assert rendered.text == text + "<|im_end|>"
    assert rendered.ids.count(163586) == 1


def test_a_template_in_a_request_is_only_text(make: Callable[..., ChatTemplate]) -> None:
    attack = "{{ 7 * 7 }}{% for i in range(99999) %}{% endfor %}"
    message = Message("user", attack, name=attack, reasoning=attack)
    assert make("{{ messages[0].content }}").render([message]).text == attack
