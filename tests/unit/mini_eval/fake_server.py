"""An HTTP server whose answers are a function of the request, and conversations to play against it."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from k2hybrid.mini_eval.conversation import Call, Conversation, Step, Turn

Answer = tuple[int, bytes]


@contextmanager
def answering(answer: Callable[[str, dict[str, Any]], Answer]) -> Iterator[str]:
    """The URL of a server that says `answer(path, body)`."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status, data = answer(self.path, body)
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def completion(content: str = "", *calls: tuple[str, Any], **more: Any) -> Answer:
    """A chat completion; arguments that are text are sent as they are."""
    message: dict[str, Any] = {"role": "assistant", "content": content, "reasoning_content": "Hm.", **more}
    if calls:
        message["tool_calls"] = [
            {
                "id": f"functions.{name}:{index}",
                "type": "function",
                "function": {"name": name, "arguments": args if isinstance(args, str) else json.dumps(args)},
            }
            for index, (name, args) in enumerate(calls)
        ]
    choice = {"index": 0, "message": message, "finish_reason": "tool_calls" if calls else "stop"}
    return 200, json.dumps({"choices": [choice], "usage": {"completion_tokens": 3}}).encode()


def tool(name: str, **properties: Any) -> dict[str, Any]:
    """A declaration whose parameters are all required."""
    schema = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "function", "function": {"name": name, "description": f"{name}!", "parameters": schema}}


TEXT = {"type": "string"}
TOOLS = (tool("get_code", city=TEXT), tool("get_price", code=TEXT))


def one_call(user: str = 'Get the code of "Oslo".') -> Conversation:
    steps = (Step("", (Call("get_code", {"city": "Oslo"}, '{"code": "a7"}'),)),)
    return Conversation((Turn(user, "The code is a7.", steps=steps, told=("a7",)),), TOOLS)


def two_at_once() -> Conversation:
    calls = (Call("get_code", {"city": "Oslo"}, "river"), Call("get_code", {"city": "Rome"}, "stone"))
    turn = Turn("Oslo and Rome?", "river, stone", steps=(Step("", calls),), told=("river", "stone"))
    return Conversation((turn,), TOOLS)


def chain() -> Conversation:
    steps = (
        Step("", (Call("get_code", {"city": "Oslo"}, '{"code": "a7"}'),)),
        Step("", (Call("get_price", {"code": "a7"}, "moon"),)),
    )
    return Conversation((Turn("The price for Oslo's code?", "moon", steps=steps, told=("moon",)),), TOOLS)


def no_call() -> Conversation:
    return Conversation((Turn("hi", "Hello! How can I help you today?"),), TOOLS)
