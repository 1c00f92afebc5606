"""Text continued as it stands, on a model that says what the tests tell it to."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from k2hybrid.errors import ContextLengthError, EngineError, RequestError
from k2hybrid.runtime import Runtime
from k2hybrid.types import CompletionRequest, SamplingParams
from tests.unit.runtime.scripted import ScriptedModel, scripted_runtime


@pytest.fixture(scope="module")
def scripted(checkpoint: Path) -> Iterator[tuple[Runtime, ScriptedModel]]:
    runtime, model = scripted_runtime(checkpoint)
    with runtime:
        yield runtime, model


def said(
    scripted: tuple[Runtime, ScriptedModel], script: list[int], **fields: object
) -> tuple[list[str], str | None, str | None]:
    """The pieces of text, why it ended, and the stop string that did it."""
    runtime, model = scripted
    model.play(script)
    request = CompletionRequest(**{"prompt": "once", "sampling": SamplingParams(temperature=0), **fields})  # type: ignore[arg-type]
    run = runtime.complete(request)
    return [delta.text for delta in run], run.finish_reason, run.stop_sequence


def test_it_ends_at_an_end_token_which_is_no_text(scripted: tuple[Runtime, ScriptedModel]) -> None:
    tokenizer = scripted[0].tokenizer
    end = tokenizer.specials["<|im_end|>"]
    script = [*tokenizer.encode("ab"), end]
    for specials in (False, True):
        pieces, reason, stopped_by = said(scripted, script, specials=specials)
        assert "".join(pieces) == "ab"
        assert (reason, stopped_by) == ("stop", None)


def test_control_tokens_show_if_asked_for(scripted: tuple[Runtime, ScriptedModel]) -> None:
    specials = scripted[0].tokenizer.specials
    script = [*scripted[0].tokenizer.encode("a"), specials["</think>"], *scripted[0].tokenizer.encode("b")]
    script.append(specials["<|im_end|>"])
    assert "".join(said(scripted, script)[0]) == "ab"
    assert "".join(said(scripted, script, specials=True)[0]) == "a</think>b"


def test_half_characters_wait_and_are_told_if_their_rest_never_comes(
    scripted: tuple[Runtime, ScriptedModel],
) -> None:
    tokenizer = scripted[0].tokenizer
    byte = {tokenizer.token_bytes(token): token for token in range(tokenizer.num_ranks)}
    first, second = byte[b"\xc3"], byte[b"\xa9"]
    assert said(scripted, [first, second], max_tokens=2)[0] == ["", "é"]
    assert said(scripted, [first], max_tokens=1)[0] == ["", "\ufffd"]


def test_a_stop_string_ends_it_wherever_tokens_divide_it(scripted: tuple[Runtime, ScriptedModel]) -> None:
    encode = scripted[0].tokenizer.encode
    script = [*encode("a"), *encode("b"), *encode("c"), *encode("d")]
    pieces, reason, stopped_by = said(scripted, script, stop=("bc",))
    assert "".join(pieces) == "a"
    assert (reason, stopped_by) == ("stop", "bc")
    pieces, reason, _ = said(scripted, script, stop=("bx",), max_tokens=2)
    assert "".join(pieces) == "ab"  # what was held back comes at the end
    assert reason == "length"


def test_spellings_in_a_prompt_are_text_unless_asked_for(scripted: tuple[Runtime, ScriptedModel]) -> None:
    runtime, _ = scripted
    lengths = []
    for specials in (False, True):
        run = runtime.complete(CompletionRequest("<|im_end|>", specials=specials, max_tokens=1))
        lengths.append(run.prompt_tokens)
        run.cancel()
    assert lengths[0] > 1
    assert lengths[1] == 1
    run = runtime.complete(CompletionRequest((3, runtime.tokenizer.specials["<|im_end|>"]), max_tokens=1))
    assert run.prompt_tokens == 2
    run.cancel()


def test_nothing_is_the_beginning_of_a_document(scripted: tuple[Runtime, ScriptedModel]) -> None:
    run = scripted[0].complete(CompletionRequest("", max_tokens=2))
    assert len(list(run)) == 2
    assert run.prompt_tokens == 1


def spelled(runtime: Runtime, text: str) -> list[int]:
    return [token for letter in text for token in runtime.tokenizer.encode(letter)]


@pytest.mark.parametrize("left_after", [0, 2, 9])
def test_a_parked_text_is_given_again_and_goes_on(
    scripted: tuple[Runtime, ScriptedModel], left_after: int
) -> None:
    runtime, model = scripted
    asked = CompletionRequest(
        "once", sampling=SamplingParams(temperature=0), stop=("here",), retry_key=f"k{left_after}"
    )
    model.play(spelled(runtime, "a" * 900))
    run = runtime.complete(asked)
    deltas = iter(run)
    for _ in range(left_after):
        next(deltas)
    run.park()
    deltas.close()
    deadline = time.monotonic() + 10
    while not runtime.engine.idle:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    said: list[str] = []
    # Whoever takes it up may go as well, after the end too: then it is given again as it is.
    for continuation in (" so far, and here it ends", "never said"):
        model.play(spelled(runtime, continuation))
        again = runtime.complete(asked)
        said.append("".join(delta.text for delta in again))
        assert (again.finish_reason, again.stop_sequence) == ("stop", "here")
        assert (again.prompt_tokens, again.max_tokens) == (run.prompt_tokens, run.max_tokens)
        again.park()
    assert said[0] == said[1]
    kept = said[0].removesuffix(" so far, and ")
    assert left_after <= len(kept) < 900
    assert kept == "a" * len(kept)
    model.play(spelled(runtime, "b"))
    other = runtime.complete(dataclasses.replace(asked, retry_key="another", max_tokens=1))
    assert "".join(delta.text for delta in other) == "b"


@pytest.mark.parametrize("key", ["", "failed"])
def test_what_failed_or_has_no_key_is_not_parked(
    scripted: tuple[Runtime, ScriptedModel], monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    runtime, model = scripted
    asked = CompletionRequest("once", sampling=SamplingParams(temperature=0), max_tokens=1, retry_key=key)
    model.play(runtime.tokenizer.encode("a"))
    run = runtime.complete(asked)
    if key:

        def fail() -> None:
            raise EngineError("the step failed")

        monkeypatch.setattr(model, "before_step", fail)
        run.cancel()
        run = runtime.complete(asked)
        with pytest.raises(EngineError):
            list(run)
        monkeypatch.undo()
    else:
        list(run)
    run.park()
    model.play(runtime.tokenizer.encode("b"))
    assert [delta.text for delta in runtime.complete(asked)] == ["b"]


def test_logprobs_and_usage(scripted: tuple[Runtime, ScriptedModel]) -> None:
    runtime, model = scripted
    model.play([])

    async def collect() -> list[object]:
        request = CompletionRequest("x", sampling=SamplingParams(logprobs=2), max_tokens=3)
        run = runtime.complete(request)
        deltas = [delta async for delta in run]
        assert run.usage.completion_tokens == run.max_tokens == 3
        return [len(delta.logprob.top) for delta in deltas if delta.logprob]

    assert asyncio.run(collect()) == [2, 2, 2]


def test_what_is_refused(scripted: tuple[Runtime, ScriptedModel], checkpoint: Path) -> None:
    runtime, _ = scripted
    with pytest.raises(ContextLengthError) as caught:
        runtime.complete(CompletionRequest("x" * 9000))
    assert caught.value.param == "prompt"
    with pytest.raises(RequestError):
        runtime.complete(CompletionRequest((10**6,)))
    closed, _ = scripted_runtime(checkpoint)
    closed.close()
    with pytest.raises(EngineError):
        closed.complete(CompletionRequest("x"))
