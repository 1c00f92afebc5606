"""/tokenize and /detokenize in vLLM's shapes."""

from __future__ import annotations

from typing import Any

import pytest

from tests.server.conftest import Served

MESSAGES = [{"role": "user", "content": "hi"}]
TOOL = {"type": "function", "function": {"name": "f"}}


def test_text(server: Served) -> None:
    answer = server.post("/tokenize", json={"model": "x", "prompt": "hé", "add_special_tokens": True}).json()
    assert answer == {"count": 3, "max_model_len": 4096, "tokens": [104, 195, 169], "token_strs": None}


def test_token_strings_on_request(server: Served) -> None:
    answer = server.post("/tokenize", json={"prompt": "hi<|im_end|>", "return_token_strs": True}).json()
    assert answer["tokens"] == [104, 105, 256]
    assert answer["token_strs"] == ["h", "i", "<|im_end|>"]


def test_messages_count_what_chat_would_prefill(server: Served) -> None:
    answer = server.post("/tokenize", json={"messages": MESSAGES, "tools": [TOOL]}).json()
    assert answer["count"] == server.chat(tools=[TOOL]).json()["usage"]["prompt_tokens"]
    without = server.post("/tokenize", json={"messages": MESSAGES, "add_generation_prompt": False}).json()
    assert bytes(without["tokens"]) == b"user:hi"


def test_there_and_back(server: Served) -> None:
    tokens = server.post("/tokenize", json={"prompt": "naïve<|im_end|> 中"}).json()["tokens"]
    assert server.post("/detokenize", json={"tokens": tokens}).json() == {"prompt": "naïve<|im_end|> 中"}
    assert server.post("/detokenize", json={"tokens": []}).json() == {"prompt": ""}
    assert server.post("/tokenize", json={"prompt": ""}).json()["count"] == 0


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "x", "messages": MESSAGES}, "prompt"),
        ("/tokenize", {"prompt": ["x"]}, "prompt"),
        ("/tokenize", {"messages": "x"}, "messages"),
        ("/tokenize", {"prompt": "x", "return_token_strs": "yes"}, "return_token_strs"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": "x"}, "tokens"),
        ("/detokenize", {"tokens": [1, "x"]}, "tokens[1]"),
        ("/detokenize", {"tokens": [True]}, "tokens[0]"),
        ("/detokenize", {"tokens": [258]}, "tokens[0]"),
        ("/detokenize", {"tokens": [-1]}, "tokens[0]"),
    ],
)
def test_wrong_fields_are_named(server: Served, path: str, body: dict[str, Any], param: str) -> None:
    response = server.post(path, json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
