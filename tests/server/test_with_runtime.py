"""The server on the real runtime, with a tiny random model: what a scripted one cannot show."""

from __future__ import annotations

import argparse
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from k2hybrid.runtime import Runtime, load
from k2hybrid.server.options import add_model_options
from tests.server.conftest import Served, serving
from tests.server.test_disconnect import WITHIN_S, send_chat
from tests.server.test_openai_stream import events

# Without control tokens a random model never ends by itself.
ENDLESS = {"logit_bias": {str(token): -100 for token in range(600 - 256, 600)}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}


@pytest.fixture(scope="module")
def runtime(tiny_model: Path) -> Iterator[Runtime]:
    with load(tiny_model, threads=1, latent_bytes=1 << 26) as runtime:
        yield runtime


@pytest.fixture(scope="module")
def real(runtime: Runtime) -> Iterator[Served]:
    with serving(runtime) as served:  # type: ignore[arg-type]
        yield served


def wait_for_running(runtime: Runtime, wanted: int, within_s: float) -> None:
    deadline = time.monotonic() + within_s
    while runtime.engine.metrics.running != wanted:
        assert time.monotonic() < deadline, f"{runtime.engine.metrics.running} run, not {wanted}"
        time.sleep(0.005)


@pytest.mark.parametrize("stream", [True, False])
def test_the_engine_stops_when_the_client_goes(real: Served, runtime: Runtime, stream: bool) -> None:
    connection = send_chat(real.port, stream=stream, n=2, **ENDLESS)
    wait_for_running(runtime, 2, 10)
    connection.close()
    wait_for_running(runtime, 0, WITHIN_S)


def test_a_retry_goes_on_where_the_client_left(real: Served, runtime: Runtime) -> None:
    # Without a seed: only the very same answer begins with the same words.
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 400, "stream": True, **ENDLESS}
    with httpx.stream("POST", f"{real.url}/v1/chat/completions", json=body, timeout=60) as response:
        seen = ""
        for text in response.iter_text():
            seen += text
            if seen.count("\n\n") > 20:
                break
    wait_for_running(runtime, 0, 10)
    complete = seen[: seen.rindex("\n\n")]
    *chunks, last = events(real.chat(**body).text)[:-1]
    assert last["choices"][0]["finish_reason"] == "length"
    assert last["choices"][0]["usage"]["completion_tokens"] == 400
    before = [chunk["choices"][0]["delta"] for chunk in events(complete)]
    assert before == [chunk["choices"][0]["delta"] for chunk in chunks[: len(before)]]


def test_a_retried_text_goes_on_where_the_client_left(real: Served, runtime: Runtime) -> None:
    body = {"prompt": ["hi", "ho"], "n": 2, "max_tokens": 300, "stream": True, **ENDLESS}  # without a seed
    with httpx.stream("POST", f"{real.url}/v1/completions", json=body, timeout=60) as response:
        seen = ""
        for text in response.iter_text():
            seen += text
            if seen.count("\n\n") > 40:
                break
    wait_for_running(runtime, 0, 10)
    before, after = ["", "", "", ""], ["", "", "", ""]
    again = events(real.post("/v1/completions", json=body).text)[:-1]
    for texts, chunks in ((before, events(seen[: seen.rindex("\n\n")])), (after, again)):
        for (choice,) in (chunk["choices"] for chunk in chunks):
            texts[choice["index"]] += choice["text"]
    assert all(before)
    assert [whole[: len(begun)] for begun, whole in zip(before, after, strict=True)] == before


def test_a_seed_gives_the_same_answer_whole_or_streamed_alone_or_in_a_crowd(real: Served) -> None:
    request: dict[str, Any] = {"seed": 5, "max_tokens": 40, "logprobs": True, **ENDLESS}
    alone = real.chat(**request).json()["choices"][0]
    crowd: list[Any] = [None] * 12
    threads = [
        threading.Thread(target=lambda i=i: crowd.__setitem__(i, real.chat(**request).json()["choices"][0]))
        for i in range(len(crowd))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    chunks = events(real.chat(stream=True, **request).text)[:-1]
    content = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert alone["finish_reason"] == "length"
    assert all(answer["message"] == alone["message"] for answer in crowd)
    assert content == alone["message"]["content"]


def test_logprobs_spell_the_content(real: Served) -> None:
    answer = real.chat(max_tokens=30, logprobs=True, top_logprobs=3, seed=1, **ENDLESS).json()["choices"][0]
    entries = answer["logprobs"]["content"]
    spelled = b"".join(bytes(entry["bytes"]) for entry in entries).decode("utf-8", "replace")
    assert spelled.startswith(answer["message"]["content"].rstrip("\ufffd"))
    for entry in entries:
        assert entry["logprob"] <= 0
        best = [top["logprob"] for top in entry["top_logprobs"]]
        assert len(best) == 3
        assert best == sorted(best, reverse=True)
        assert entry["logprob"] <= best[0]


def test_choices_differ_and_share_their_prompt(real: Served) -> None:
    answer = real.chat(n=3, max_tokens=16, seed=1, **ENDLESS).json()
    texts = {choice["message"]["content"] for choice in answer["choices"]}
    assert len(texts) == 3
    assert answer["usage"]["completion_tokens"] == 48


def test_a_second_turn_finds_the_first_in_the_cache(real: Served) -> None:
    text = "the same long beginning " * 40
    first = real.chat(messages=[{"role": "user", "content": text}], max_tokens=1).json()["usage"]
    again = real.chat(messages=[{"role": "user", "content": text}], max_tokens=1).json()["usage"]
    assert first["prompt_tokens"] == again["prompt_tokens"] > 64
    assert again["cached_tokens"] >= 64
    assert again["prompt_tokens_details"]["cached_tokens"] == again["cached_tokens"]


def test_tokenize_counts_what_chat_prefills(real: Served) -> None:
    messages = [{"role": "user", "content": "wörter <|im_end|> und mehr"}]
    counted = real.post("/tokenize", json={"messages": messages, "tools": [TOOL]}).json()
    used = real.chat(messages=messages, tools=[TOOL], max_tokens=1).json()["usage"]
    assert counted["count"] == used["prompt_tokens"]
    text = real.post("/detokenize", json={"tokens": counted["tokens"]}).json()["prompt"]
    assert "wörter <|im_end|> und mehr" in text
    plain = real.post("/tokenize", json={"prompt": "wörter"}).json()["tokens"]
    assert real.post("/detokenize", json={"tokens": plain}).json() == {"prompt": "wörter"}


def test_a_stop_string_ends_it_and_is_not_shown(real: Served) -> None:
    request: dict[str, Any] = {"max_tokens": 60, "seed": 2, **ENDLESS}
    whole = real.chat(**request).json()["choices"][0]["message"]["content"]
    stop = whole[10:12]
    answer = real.chat(stop=[stop], **request).json()["choices"][0]
    assert answer["finish_reason"] == "stop"
    assert answer["message"]["content"] == whole[: whole.index(stop)]


def test_an_answer_that_is_not_constrained_is_the_models_own(real: Served) -> None:
    fields = {"tools": [TOOL], "tool_choice": "required", "max_tokens": 64, "seed": 3, **ENDLESS}
    (held,) = real.chat(**fields).json()["choices"]
    assert held["finish_reason"] == "tool_calls"
    (free,) = real.chat(**fields, constrain=False).json()["choices"]
    assert free["finish_reason"] == "length"  # random weights call nothing


def test_a_text_is_continued_as_it_stands(real: Served) -> None:
    client = real.openai()
    request: dict[str, Any] = {"model": "m", "prompt": "once", "max_tokens": 20, "seed": 4, "logprobs": 2}
    whole = client.completions.create(**request, extra_body=ENDLESS).choices[0]
    assert whole.finish_reason == "length"
    assert len(whole.logprobs.tokens) == len(whole.logprobs.text_offset) <= 20
    assert all(len(top) in (1, 2) for top in whole.logprobs.top_logprobs)
    streamed = client.completions.create(**request, stream=True, extra_body=ENDLESS)
    assert "".join(chunk.choices[0].text for chunk in streamed) == whole.text
    stop = whole.text[5:7]
    stopped = client.completions.create(**request, stop=stop, extra_body=ENDLESS).choices[0]
    assert stopped.finish_reason == "stop"
    assert stopped.text == whole.text[: whole.text.index(stop)]
    ids = real.post("/tokenize", json={"prompt": "once"}).json()["tokens"]
    assert client.completions.create(**{**request, "prompt": ids}, extra_body=ENDLESS).choices[0] == whole


@pytest.mark.parametrize(
    ("begun", "end"),
    [
        ({"content": "Well, "}, "<think></think>Well, "),
        ({"content": None, "reasoning_content": "Let me"}, "<think>Let me"),
        ({"content": "So", "reasoning_content": "Let me"}, "<think>Let me</think>So"),
    ],
)
def test_a_partial_message_is_continued(real: Served, begun: dict[str, Any], end: str) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "partial": True, **begun}]
    tokens = real.post("/tokenize", json={"messages": messages}).json()["tokens"]
    text = real.post("/detokenize", json={"tokens": tokens}).json()["prompt"]
    assert text.endswith(f"<|im_middle|>{end}")
    for more in ({}, {"thinking": {"type": "disabled"}}, {"thinking_budget": 4}):
        choice = real.chat(messages=messages, max_tokens=12, seed=1, **more, **ENDLESS).json()["choices"][0]
        assert choice["finish_reason"] == "length"
        if begun["content"]:
            assert choice["message"]["reasoning_content"] is None


def test_an_over_long_prompt_is_refused_and_a_large_limit_is_not(real: Served, runtime: Runtime) -> None:
    text = "x" * 3 * runtime.context_tokens
    response = real.chat(messages=[{"role": "user", "content": text}])
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "context_length_exceeded"
    stopped = real.chat(max_completion_tokens=10**12, stop="a", seed=3)
    assert stopped.status_code == 200


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"logit_bias": {"999999": 1}}, "logit_bias"),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "nobody"}]}, None),
    ],
)
def test_what_only_the_runtime_can_judge(real: Served, fields: dict[str, Any], param: str | None) -> None:
    response = real.chat(max_tokens=2, **fields)
    if param is None:
        assert response.status_code == 200
    else:
        assert response.status_code == 400
        assert response.json()["error"]["param"] == param
    assert real.chat(max_tokens=1).status_code == 200


def test_a_prompt_beyond_the_latent_pages_is_told_which_option_helps(tiny_model: Path) -> None:
    page_bytes = 2 * 64 * 48 * 2
    with load(tiny_model, threads=1, latent_bytes=3 * page_bytes) as runtime, serving(runtime) as served:  # type: ignore[arg-type]
        error = served.post("/v1/completions", json={"prompt": [5] * 300})
        assert error.status_code == 400
        assert error.json()["error"]["code"] == "context_length_exceeded"
        message = error.json()["error"]["message"]
        assert message.startswith("the prompt is too long: 300 tokens > 191 maximum")
        assert "holds 192 tokens" in message
        assert "context's 65536" in message
        assert "--latent-gb" in message
    parser = argparse.ArgumentParser()
    add_model_options(parser)
    assert parser.parse_args(["--latent-gb", "1"]).latent_gb == 1


def test_a_full_queue_is_429_until_there_is_room_again(tiny_model: Path) -> None:
    with (
        load(tiny_model, threads=1, latent_bytes=1 << 26, max_running=1, max_queue=1) as runtime,
        serving(runtime) as served,  # type: ignore[arg-type]
    ):
        running = send_chat(served.port, stream=True, **ENDLESS)
        wait_for_running(runtime, 1, 10)
        waiting = send_chat(served.port, stream=True, **ENDLESS)
        deadline = time.monotonic() + 10
        while runtime.engine.metrics.waiting != 1:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        response = served.chat(max_tokens=1)
        assert response.status_code == 429
        assert response.json()["error"]["type"] == "rate_limit_error"
        assert int(response.headers["retry-after"]) >= 1
        assert "x-should-retry" not in response.headers
        assert response.json()["error"]["message"] == (
            "the queue is full: 1 requests running, 1 waiting (--max-queue 1); try again later"
        )
        assert served.post("/v1/completions", json={"prompt": "x"}).status_code == 429
        waiting.close()
        running.close()
        wait_for_running(runtime, 0, 10)
        assert served.chat(max_tokens=1).status_code == 200
