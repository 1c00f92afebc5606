"""A model of random weights calls thousands of varied tools: nearly all calls finish, and all fit."""

from __future__ import annotations

import json
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from k2hybrid.chat.exchanges import gather
from k2hybrid.checkpoint.synth import synthesize
from k2hybrid.runtime import Runtime, load
from k2hybrid.types import ChatRequest, Malformed, Message, SamplingParams
from tests.schemas import ToolSchema, tool_schemas
from tests.unit.runtime.conftest import SIZES

TOOLS = 2000  # with --slow; else the first of them
FIRST = 300
# The weights know no end of a string; so that texts stay short, what ends something is a little more likely.
ENDS = {'"': 6.0, "}": 6.0, "]": 6.0, ",": 2.0}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("models") / "random"
    synthesize(out, overrides={**SIZES, "positions": 16384}, seed=3)
    return out


def lean(value: Any) -> Any:
    """A declaration without prose, which the model would only have to read."""
    if isinstance(value, dict):
        prose = ("description", "title")
        return {k: lean(v) for k, v in value.items() if not (k in prose and isinstance(v, str))}
    return [lean(item) for item in value] if isinstance(value, list) else value


def drafted(schema: Any) -> Any:
    """`schema` without OpenAPI's `nullable`, which jsonschema does not know: null is one more alternative."""
    if isinstance(schema, list):
        return [drafted(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    plain = {key: drafted(value) for key, value in schema.items() if key != "nullable" or value is not True}
    return plain if len(plain) == len(schema) else {"anyOf": [plain, {"type": "null"}]}


def fits(parameters: dict[str, Any] | None, arguments: str) -> bool:
    """By jsonschema, in decimals: in binary 0.3 is no multiple of 0.1."""
    schema = json.loads(json.dumps(drafted(parameters or {})), parse_float=Decimal)
    value = json.loads(arguments, parse_float=Decimal)
    return jsonschema.Draft202012Validator(schema).is_valid(value)


def outcome(runtime: Runtime, number: int, declared: ToolSchema, bias: dict[int, float]) -> str:
    request = ChatRequest(
        (Message("user", "go"),),
        tools=(lean(declared.tool),),
        tool_choice="required",
        thinking=False,
        parallel_tool_calls=False,
        max_tokens=1024,
        sampling=SamplingParams(seed=number, logit_bias=bias),
    )
    run = runtime.chat(request)
    events = [event for delta in run for event in delta.events]
    calls = gather(events).calls
    assert {name for name, _ in calls} <= {declared.name}
    if run.finish_reason != "tool_calls" or any(isinstance(event, Malformed) for event in events):
        return "unfinished"
    if all(fits(declared.parameters, arguments) for _, arguments in calls):
        return "valid"
    return f"invalid: {calls} for {declared.tool}"


@pytest.mark.parametrize("count", [FIRST, pytest.param(TOOLS, marks=pytest.mark.slow)])
def test_calls_of_a_model_of_random_weights(
    model: Path, capsys: pytest.CaptureFixture[str], count: int
) -> None:
    tools = tool_schemas(11, count)
    with load(model, latent_bytes=64 << 20, max_step_tokens=256, max_running=16, threads=2) as runtime:
        bias = {runtime.tokenizer.encode(text)[0]: value for text, value in ENDS.items()}

        def one(number: int) -> str:
            return outcome(runtime, number, tools[number], bias)

        with ThreadPoolExecutor(16) as threads:
            found = Counter(threads.map(one, range(count)))
        counts = runtime.invalid_calls
        inexact = sum(not runtime.is_exact(declared.tool) for declared in tools)
    with capsys.disabled():
        print(
            f"\n{count} tools: {found['valid']} calls finished and fit, {found['unfinished']} did not "
            f"finish; {inexact} needed validation, {counts.retried} tries were generated again, "
            f"{counts.given_up} given up",
            file=sys.stderr,
        )
    assert not [text for text in found if text.startswith("invalid")]
    assert found["valid"] >= 0.95 * count
