"""Legacy text completions: prompts in every form, echo, log-probabilities, streams, and what is refused."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from k2hybrid.errors import EngineError
from k2hybrid.types import CompletionRequest, Content, SamplingParams, TokenLogprob
from tests.server.conftest import Served
from tests.server.scripted import Script, Step
from tests.server.test_openai_stream import events


def complete(server: Served, prompt: Any = "Once", **fields: Any) -> httpx.Response:
    return server.post("/v1/completions", json={"prompt": prompt, **fields})


def test_a_whole_completion_through_the_sdk(server: Served) -> None:
    answer = server.openai().completions.create(model="m", prompt="Once")
    assert answer.object == "text_completion"
    assert answer.id.startswith("cmpl-")
    (choice,) = answer.choices
    assert (choice.text, choice.finish_reason, choice.logprobs, choice.index) == ("Hello.", "stop", None, 0)
    assert answer.usage.model_dump(include={"prompt_tokens", "completion_tokens", "total_tokens"}) == {
        "prompt_tokens": 4,
        "completion_tokens": 2,
        "total_tokens": 6,
    }
    assert server.model.completions[0].max_tokens == 16


def test_a_stream_through_the_sdk(server: Served) -> None:
    chunks = list(
        server.openai().completions.create(
            model="m", prompt="x", stream=True, stream_options={"include_usage": True}
        )
    )
    assert [chunk.choices[0].text for chunk in chunks[:-1]] == ["Hello", ".", ""]
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None, None, "stop"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 2


def test_on_the_wire(server: Served) -> None:
    *chunks, done = events(complete(server, stream=True, echo=True).text)
    assert done == "[DONE]"
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["Once", "Hello", ".", ""]
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}
    assert all("usage" not in chunk for chunk in chunks)


@pytest.mark.parametrize(
    ("prompt", "seen"),
    [
        ("x", ["x"]),
        ("", [""]),
        (["x", "y"], ["x", "y"]),
        ([104, 105], [(104, 105)]),
        ([[104], [105, 256]], [(104,), (105, 256)]),
        (["x", [104]], ["x", (104,)]),
    ],
)
def test_a_prompt_has_many_forms(server: Served, prompt: Any, seen: list[Any]) -> None:
    choices = complete(server, prompt, n=2).json()["choices"]
    assert [request.prompt for request in server.model.completions] == [one for one in seen for _ in "ab"]
    assert [choice["index"] for choice in choices] == list(range(2 * len(seen)))


def test_usage_counts_each_prompt_once(server: Served) -> None:
    usage = complete(server, ["abc", "de"], n=2).json()["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (5, 8, 13)
    assert usage["prompt_tokens_details"] == {"cached_tokens": 0}


def test_every_field_arrives(server: Served) -> None:
    complete(
        server,
        max_tokens=5,
        temperature=0.5,
        top_p=0.9,
        seed=3,
        presence_penalty=1,
        frequency_penalty=-1,
        logit_bias={"5": -100},
        logprobs=2,
        stop=["a", ""],
        special=True,
        n=2,
        best_of=2,
        suffix="",
        user="me",
        store=False,
        cache_prompt=False,
    )
    one, two = server.model.completions
    assert one == CompletionRequest(
        "Once",
        specials=True,
        sampling=SamplingParams(
            0.5, 0.9, seed=3, presence_penalty=1.0, frequency_penalty=-1.0, logit_bias={5: -100.0}, logprobs=2
        ),
        max_tokens=5,
        stop=("a",),
        request_id=one.request_id,
        store=False,
        reuse=False,
    )
    assert one.request_id.startswith("req_")
    assert two.sampling.seed == 4


def test_echo_repeats_the_prompt(server: Served) -> None:
    assert complete(server, echo=True).json()["choices"][0]["text"] == "OnceHello."
    ids = [104, 256, 105]
    assert complete(server, ids, echo=True).json()["choices"][0]["text"] == "hiHello."
    shown = complete(server, ids, echo=True, special=True).json()["choices"][0]["text"]
    assert shown == "h<|im_end|>iHello."


def test_logprobs_are_four_lists(server: Served) -> None:
    def step(token: int, *text: str) -> Step:
        top = ((token, -0.5), (66, float("-inf")))
        return Step(tuple(map(Content, text)), TokenLogprob(token, -0.5, top))

    server.model.play(Script([step(65, "A"), step(0xC3), step(0xA9, "é"), step(256), step(67, "C")]))
    answer = complete(server, logprobs=2).json()["choices"][0]
    expected = {
        "tokens": ["A", "bytes:\\xc3", "bytes:\\xa9", "C"],
        "token_logprobs": [-0.5] * 4,
        "top_logprobs": [
            {"A": -0.5, "B": -9999.0},
            {"bytes:\\xc3": -0.5, "B": -9999.0},
            {"bytes:\\xa9": -0.5, "B": -9999.0},
            {"C": -0.5, "B": -9999.0},
        ],
        "text_offset": [0, 1, 1, 2],
    }
    assert answer["text"] == "AéC"
    assert answer["logprobs"] == expected
    streamed: dict[str, list[Any]] = {key: [] for key in expected}
    for chunk in events(complete(server, logprobs=2, stream=True).text)[:-1]:
        for key, values in (chunk["choices"][0]["logprobs"] or {}).items():
            streamed[key] += values
    assert streamed == expected
    shown = complete(server, logprobs=0, special=True).json()["choices"][0]["logprobs"]
    assert shown["tokens"] == ["A", "bytes:\\xc3", "bytes:\\xa9", "<|im_end|>", "C"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["x"] * 9}, "prompt"),
        ({"prompt": ["x", 5]}, "prompt[1]"),
        ({"prompt": [5, "x"]}, "prompt[1]"),
        ({"prompt": [True]}, "prompt[0]"),
        ({"prompt": [None]}, "prompt[0]"),
        ({"prompt": [-1]}, "prompt[0]"),
        ({"prompt": [2**63]}, "prompt[0]"),
        ({"prompt": [["x"]]}, "prompt[0][0]"),
        ({"prompt": [258]}, "prompt"),
        ({"prompt": "x" * 5000}, "prompt"),
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 2}, "best_of"),
        ({"n": 2, "best_of": 1}, "best_of"),
        ({"echo": True, "logprobs": 0}, "logprobs"),
        ({"logprobs": 6}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"n": 9}, "n"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"special": "yes"}, "special"),
        ({"temperature": -1}, "temperature"),
    ],
)
def test_a_wrong_field_is_named(server: Served, fields: dict[str, Any], param: str) -> None:
    response = complete(server, **fields)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


def test_an_error_in_the_middle(server: Served) -> None:
    server.model.play(Script([Step((Content("a"),)), Step(error=EngineError("the step failed"))]))
    *_, text, error, done = events(complete(server, stream=True).text)
    assert text["choices"][0]["text"] == "a"
    assert error["error"]["code"] == "engine_error"
    assert done == "[DONE]"
    response = complete(server)
    assert response.status_code == 500
    assert response.json()["error"]["message"] == "the step failed"


def test_if_one_of_a_batch_is_refused_the_others_end(server: Served) -> None:
    assert complete(server, ["x", "x" * 5000]).status_code == 400
    (run,) = server.model.runs
    assert run.cancelled.is_set()


def test_a_client_that_goes_ends_it(server: Served) -> None:
    server.model.play(Script(Step((Content("x"),), delay_s=0.01) for _ in range(10_000)))
    body = {"prompt": "x", "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=20) as response:
        next(response.iter_text())
    assert server.model.runs[0].cancelled.wait(10)
