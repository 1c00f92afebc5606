"""Schemas and texts that reach out, recurse, multiply, swell or crash: refused or bounded, never fatal."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from k2hybrid.chat.schema import MAX_REACH, Schema, admit, admit_all
from k2hybrid.chat.validation import Validator
from k2hybrid.errors import RequestError

HONEST = admit({"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}, "p")
# Asks each item twice, and so on: 2^levels steps, if nobody remembers.
TWICE = admit({"allOf": [{"items": {"$ref": "#"}}, {"items": {"$ref": "#"}}]}, "p")
DEEP = "[" * 100 + "]" * 100
LONG_S = 60.0  # for what takes milliseconds


@pytest.fixture
def validator() -> Iterator[Validator]:
    made = Validator(timeout_s=LONG_S)
    yield made
    made.close()


@pytest.fixture
def hasty() -> Iterator[Validator]:
    made = Validator(timeout_s=1.0)
    yield made
    made.close()


def works(validator: Validator) -> bool:
    return validator.check(HONEST, '{"n":1}') is None and validator.check(HONEST, '{"n":"1"}') is not None


def refused(schema: Any) -> None:
    with pytest.raises(RequestError) as caught:
        admit(schema, "tools")
    assert caught.value.code == "invalid_schema"
    assert len(str(caught.value)) < 1000


# --- reaching out ---------------------------------------------------------------------------------

REMOTE = [
    "http://127.0.0.1:{port}/schema.json",
    "http://127.0.0.1:{port}/schema.json#/$defs/a",
    "//127.0.0.1:{port}/schema.json",
    "file:///etc/passwd",
    "schema.json",
    "urn:example:a",
]


@pytest.mark.parametrize("reference", REMOTE)
@pytest.mark.parametrize("key", ["$ref", "$dynamicRef", "$recursiveRef", "$schema", "$id"])
def test_nothing_is_fetched(validator: Validator, key: str, reference: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        target = reference.format(port=server.getsockname()[1])
        schema = {"properties": {"a": {key: target}}, "type": "object"}
        if key == "$ref":
            refused(schema)
        else:
            assert target not in admit(schema, "p").text
        # Nor does the process that validates, if one got through.
        assert "could not" in (validator.check(Schema({"$ref": target}), "1") or "")
        with pytest.raises(BlockingIOError):
            server.accept()
    assert works(validator)


# --- recursing ------------------------------------------------------------------------------------


def chain(count: int, link: Any) -> dict[str, Any]:
    definitions: dict[str, Any] = {"d0": {"type": "string"}}
    for i in range(count):
        definitions[f"d{i + 1}"] = link({"$ref": f"#/$defs/d{i}"})
    return {"$defs": definitions, "$ref": f"#/$defs/d{count}"}


LINKS = [
    lambda link: link,
    lambda link: {"allOf": [link]},
    lambda link: {"not": link},
    lambda link: {"items": link},
    lambda link: {"properties": {"a": link}},
    lambda link: {"anyOf": [{"type": "null"}, {"additionalProperties": link}]},
]


@pytest.mark.parametrize("link", LINKS)
def test_long_chains_of_references(validator: Validator, link: Any) -> None:
    refused(chain(5_000, link))
    refused(chain(MAX_REACH, link))
    short = admit(chain(MAX_REACH // 4, link), "p")
    assert "could not" not in (validator.check(short, "[1]") or "")
    # Where a longer one got through, its process may die of it, but nothing else.
    validator.check(Schema(chain(20_000, link)), DEEP)
    assert works(validator)


def test_a_ring_of_references_counts_as_long() -> None:
    count = MAX_REACH
    ring = {f"d{i}": {"properties": {"a": {"$ref": f"#/$defs/d{(i + 1) % count}"}}} for i in range(count)}
    refused({"$defs": ring, "$ref": "#/$defs/d0"})


@pytest.mark.parametrize("levels", [65, 1_000, 100_000])
@pytest.mark.parametrize("key", ["items", "allOf", "properties", "const", "enum", "default", "x-unknown"])
def test_deep_schemas(key: str, levels: int) -> None:
    schema: Any = {}
    for _ in range(levels):
        schema = {key: [schema]} if key in ("allOf", "enum") else {key: {"a": schema}}
    refused(schema)


def test_a_schema_that_holds_itself() -> None:
    schema: dict[str, Any] = {"type": "array"}
    schema["items"] = schema
    refused(schema)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "[" * 100_000 + "]" * 100_000])
def test_deep_texts(validator: Validator, text: str) -> None:
    for schema in (HONEST, TWICE):
        assert "levels deep" in (validator.check(schema, text) or "")
    assert works(validator)


def test_deep_schema_on_deep_text(validator: Validator) -> None:
    inner: Any = {"items": {"$ref": "#"}}
    for _ in range(25):
        inner = {"allOf": [inner]}
    validator.check(admit(inner, "p"), DEEP)
    assert works(validator)


# --- multiplying ----------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["allOf", "anyOf", "oneOf"])
def test_branches_that_double_with_every_level(key: str) -> None:
    definitions: dict[str, Any] = {"d0": {"type": "string"}}
    for i in range(60):
        definitions[f"d{i + 1}"] = {key: [{"$ref": f"#/$defs/d{i}"}, {"$ref": f"#/$defs/d{i}"}]}
    refused({"$defs": definitions, "$ref": "#/$defs/d60"})
    refused({"$defs": definitions, "properties": {"a": {"items": {"$ref": "#/$defs/d60"}}}})


def test_definitions_in_definitions_are_not_copied_without_end() -> None:
    inner: Any = {"enum": ["x" * 1_000] * 500}
    links = []
    for i in range(30):
        inner = {"items": inner}
        links.append({"$ref": "#/$defs/a" + "/items" * i})
    refused({"$defs": {"a": inner}, "prefixItems": links})


def test_texts_that_take_exponential_time(validator: Validator) -> None:
    validator.check(TWICE, DEEP)
    assert works(validator)


def test_texts_that_take_too_long(hasty: Validator) -> None:
    choices = [{"anyOf": [{"const": 40 * i + j} for j in range(36)]} for i in range(256)]
    slow = admit({"items": {"anyOf": choices}}, "p")
    assert (
        hasty.check(slow, "[" + "10235," * 1_000_000 + "0]")
        == "could not be validated: it took more than 1 s"
    )
    assert works(hasty)


PATTERNS = ["(a+)+$", "^(a|a)*$", "^(a|aa)+$", "(.*a){12}$", "^(([a-z])+.)+[A-Z]([a-z])+$", "(a?){30}a{30}"]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_catastrophic_patterns(validator: Validator, pattern: str) -> None:
    schema = admit({"pattern": pattern, "type": "string"}, "p")
    assert schema.dropped == ()
    for length in (30, 10_000):
        assert "took" not in (validator.check(schema, json.dumps("a" * length + "!")) or "")
    names = admit({"patternProperties": {pattern: {"type": "null"}}}, "p")
    assert "took" not in (validator.check(names, json.dumps({"a" * 5_000 + "!": 1})) or "")


@pytest.mark.parametrize(
    "pattern",
    ["a{1000000}", "((a{1000}){1000}){1000}", r"\p{L}" * 800, r"(\p{L}{30}){30}", "(?=" * 1_000],
)
def test_patterns_that_swell_are_left_out(pattern: str) -> None:
    assert admit({"properties": {"a": {"pattern": pattern}}}, "p").dropped


@pytest.mark.parametrize(
    "pattern",
    [
        "(" * 4_000,
        "[" * 4_000,
        "(?:" * 1_000 + ")" * 1_000,
        "a" * 5_000,
        "*",
        "a{2}{2}",
        "a{99999999999}",
    ],
)
def test_patterns_that_nest_or_are_none(pattern: str) -> None:
    refused({"properties": {"a": {"pattern": pattern}}})


# --- swelling -------------------------------------------------------------------------------------


def test_large_schemas() -> None:
    refused({"enum": ["x" * 1_000] * 10_000})
    refused({"enum": list(range(100_000))})
    refused({"properties": {f"p{i}": {"type": "string"} for i in range(100_000)}})
    refused({"allOf": [{}] * 100_000})
    refused({"description": "x" * 10_000_000})
    refused({"x" * 2_000_000: {"type": 5}})
    for _ in range(2):
        with pytest.raises(RequestError, match="together"):
            admit_all([("tools", {"items": [{"const": i} for i in range(256)]})] * 2_000)


def test_names_in_messages_are_cut() -> None:
    inner: Any = {"type": 5}
    for _ in range(30):
        inner = {"properties": {"x" * 10_000: inner}}
    refused(inner)


@pytest.mark.parametrize(
    "text",
    [
        json.dumps([[]] * 1_000_000),
        json.dumps(["x" * 1_000_000] * 8),
        json.dumps({str(i): i for i in range(200_000)}),
        "1" * 4_000,
        "1e" + "9" * 1_000_000,
        "[" + ",".join(["1e308"] * 500_000) + "]",
    ],
    ids=["arrays", "texts", "members", "digits", "exponent", "numbers"],
)
def test_large_texts(validator: Validator, text: str) -> None:
    everything = {
        "uniqueItems": True,
        "items": {"not": {"const": 1}},
        "additionalProperties": {"type": "null"},
    }
    reason = validator.check(admit(everything, "p"), text)
    assert reason is None or len(reason) < 500
    assert works(validator)


def test_a_process_out_of_memory_is_replaced(validator: Validator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("k2hybrid.chat.validation._MEMORY_BYTES", 160 << 20)
    small = Validator(timeout_s=LONG_S)
    try:
        assert works(small)
        reason = small.check(HONEST, json.dumps([{str(i): [i]} for i in range(300_000)]))
        assert "could not be validated" in (reason or "")
        assert works(small)
    finally:
        small.close()


# --- the process ----------------------------------------------------------------------------------


def wait_for_death(pid: int) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z":
            return
        time.sleep(0.01)


def test_a_process_killed_between_checks_is_replaced(validator: Validator) -> None:
    assert works(validator)
    pid = validator.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    wait_for_death(pid)
    assert works(validator)
    assert validator.pid not in (None, pid)
    assert not os.path.exists(f"/proc/{pid}")


def test_a_process_killed_in_mid_check_is_replaced(validator: Validator) -> None:
    assert works(validator)
    pid = validator.pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)  # so that the check is under way when it dies
    killing = threading.Timer(0.5, os.kill, (pid, signal.SIGKILL))
    killing.start()
    assert "died" in (validator.check(HONEST, '{"n":1}') or "")
    killing.join()
    assert works(validator)


def test_a_process_that_hangs_is_replaced(hasty: Validator) -> None:
    assert works(hasty)
    pid = hasty.pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    assert "more than 1 s" in (hasty.check(HONEST, '{"n":1}') or "")
    assert not os.path.exists(f"/proc/{pid}")
    assert works(hasty)


def test_threads_take_turns(validator: Validator) -> None:
    def work(number: int) -> int:
        schema = admit({"const": number}, "p")
        return sum(
            (validator.check(schema, str(number)) is None) + (validator.check(schema, str(i)) is not None)
            for i in range(1_000, 1_050)
        )

    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(work, range(8))) == [100] * 8


def test_closing_ends_what_is_under_way() -> None:
    validator = Validator(timeout_s=LONG_S)
    with ThreadPoolExecutor(4) as threads:
        waiting = [threads.submit(validator.check, HONEST, '{"n":1}') for _ in range(200)]
        waiting[5].result()
        validator.close()
        for check in waiting:
            assert check.result() is None or "ending" in (check.result() or "")
    assert validator.pid is None


def test_the_process_sees_no_secrets(validator: Validator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "secret")
    assert works(validator)
    assert b"secret" not in Path(f"/proc/{validator.pid}/environ").read_bytes()
