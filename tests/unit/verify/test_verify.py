"""`k2hybrid verify --tools`, against a small endpoint whose answers are a function of the request."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from k2hybrid.cli import main as k2hybrid
from k2hybrid.errors import EvaluationError
from k2hybrid.verify.command import main
from k2hybrid.verify.samples import read_samples
from k2hybrid.verify.schemas import Arguments, UnusableSchemaError

EXAMPLES = Path(__file__).parents[3] / "examples" / "verify-tools.jsonl"
SECRET = "what only the prompt says"

Body = dict[str, Any]
Answer = tuple[int, bytes] | tuple[int, bytes, dict[str, str]]


@contextmanager
def answering(answer: Callable[[Body, dict[str, str]], Answer]) -> Iterator[str]:
    """The URL of an endpoint that says `answer(body, headers)`."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert self.path == "/v1/chat/completions"
            self.say(*answer(body, dict(self.headers)))

        def do_GET(self) -> None:
            assert self.path == "/v1/models"
            self.say(200, json.dumps({"data": [{"id": "first"}, {"id": "second"}]}).encode())

        def say(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
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


def whole(*calls: tuple[str, str], finish: str | None = None, **more: Any) -> Answer:
    functions = [{"name": name, "arguments": arguments} for name, arguments in calls]
    message: Body = {"role": "assistant", "content": None if calls else "Hello.", **more}
    if calls:
        message["tool_calls"] = [{"id": "x", "type": "function", "function": f} for f in functions]
    finish = finish or ("tool_calls" if calls else "stop")
    return 200, json.dumps({"choices": [{"message": message, "finish_reason": finish}]}).encode()


def streamed(*deltas: Body, finish: str | None = "tool_calls", done: bool = True) -> Answer:
    choices: list[Body] = [{"delta": delta} for delta in deltas]
    if finish:
        choices.append({"delta": {}, "finish_reason": finish})
    frames = [f"data: {json.dumps({'choices': [choice]})}\n\n" for choice in choices]
    frames.insert(0, ": keep-alive\n\n")
    frames.append('data: {"choices": []}\n\n')
    return 200, ("".join(frames) + ("data: [DONE]\n\n" if done else "")).encode()


def opener(index: int, name: str, arguments: str = "") -> Body:
    part = {"index": index, "id": "x", "type": "function", "function": {"name": name, "arguments": arguments}}
    return {"tool_calls": [part]}


def more(index: int, arguments: str) -> Body:
    return {"tool_calls": [{"index": index, "function": {"arguments": arguments}}]}


WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city"],
    "additionalProperties": False,
}


def sample(text: str = SECRET, schema: Any = WEATHER, name: str = "get_weather", **fields: Any) -> Body:
    tool = {"type": "function", "function": {"name": name, "parameters": schema}}
    return {"messages": [{"role": "user", "content": text}], "tools": [tool], **fields}


Run = Callable[..., tuple[int, Body, str]]


@pytest.fixture
def verify(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command; its exit code, what it wrote as JSON, and what it printed."""

    def run(
        answer: Callable[[Body, dict[str, str]], Answer], *samples: Body, options: tuple[str, ...] = ()
    ) -> tuple[int, Body, str]:
        file, out = tmp_path / "samples.jsonl", tmp_path / "out.json"
        file.write_text("\n".join(json.dumps(each) for each in samples or [sample()]) + "\n")
        with answering(answer) as url:
            argv = ["--tools", str(file), "--url", url, "--json", str(out), *options]
            code = main(argv)
        return code, json.loads(out.read_text()), capsys.readouterr().out

    return run


def test_right_calls(verify: Run) -> None:
    call = ("get_weather", '{"city": "Oslo", "days": 2}')
    code, written, printed = verify(lambda *_: whole(call, call), sample(), sample())
    assert code == 0
    assert written["summary"] == {
        "requests": 2,
        "answered": 2,
        "finish_reasons": {"tool_calls": 2},
        "answers_with_calls": 2,
        "answers_all_right": 2,
        "calls": 4,
        "calls_right": 4,
        "schema_accuracy": 1.0,
        "unreadable": 0,
        "failures": [],
    }
    assert "schema accuracy      100.00 %" in printed


@pytest.mark.parametrize(
    ("name", "arguments", "reason"),
    [
        ("get_whether", '{"city": "Oslo"}', "'get_whether': no such tool is declared"),
        ("get_weather", '{"city": "Oslo"', "the arguments are not JSON"),
        ("get_weather", "", "the arguments are not JSON"),
        ("get_weather", '{"city": "Oslo", "days": NaN}', "the arguments are not JSON"),
        ("get_weather", "[" * 100_000, "the arguments are not JSON"),
        ("get_weather", '{"city": "Oslo", "days": 1e999}', "the arguments are not JSON"),
        ("get_weather", "[]", 'at /type: … is not of type "object"'),
        ("get_weather", "{}", 'at /required: "city" is a required property'),
        ("get_weather", f'{{"city": "x", "days": "{SECRET}"}}', 'days/type: … is not of type "integer"'),
        ("get_weather", f'{{"city": "x", "{SECRET}": 1}}', "at /additionalProperties"),
    ],
)
def test_wrong_calls_are_named_without_what_they_say(
    verify: Run, name: str, arguments: str, reason: str
) -> None:
    right = ("get_weather", '{"city": "Oslo"}')
    code, written, printed = verify(lambda *_: whole(right, (name, arguments)))
    assert code == 1
    (line,) = written["summary"]["failures"]
    assert line.startswith("line 1: call 2, ")
    assert reason in line
    assert line in printed
    assert SECRET not in printed + json.dumps(written)
    assert written["summary"]["schema_accuracy"] == 0.5
    assert written["summary"]["answers_all_right"] == 0


def test_answers_without_calls_are_no_wrong_calls(verify: Run) -> None:
    code, written, printed = verify(lambda *_: whole())
    assert code == 1
    assert written["summary"]["finish_reasons"] == {"stop": 1}
    assert written["summary"]["schema_accuracy"] is None
    assert "no calls" in printed


def test_a_call_that_was_cut_off_is_not_judged(verify: Run) -> None:
    calls = ("get_weather", '{"city": "Oslo"}'), ("get_weather", '{"ci')
    _, written, _ = verify(lambda *_: whole(*calls, finish="length"))
    assert (written["summary"]["calls"], written["summary"]["calls_right"]) == (1, 1)


def test_what_could_not_be_read_is_counted(verify: Run) -> None:
    told = {"k2hybrid": {"malformed": [{"text": SECRET, "reason": "…"}]}}
    _, written, printed = verify(lambda *_: whole(**told))
    assert written["summary"]["unreadable"] == 1
    assert "line 1: 1 times neither text nor a call" in printed


def test_streams_are_put_together(verify: Run) -> None:
    deltas = (
        {"role": "assistant", "content": ""},
        {"reasoning_content": "hm"},
        opener(0, "get_weather"),
        more(0, '{"city":'),
        more(0, ' "Oslo"}'),
        opener(1, "get_weather", '{"city": 3}'),
    )
    asked: list[Body] = []

    def answer(body: Body, _: Any) -> Answer:
        asked.append(body)
        return streamed(*deltas)

    code, written, _ = verify(answer, options=("--stream",))
    assert code == 1
    assert asked[0]["stream"] is True
    assert (written["summary"]["calls"], written["summary"]["calls_right"]) == (2, 1)
    assert written["summary"]["finish_reasons"] == {"tool_calls": 1}


BROKEN_FRAME = b'data: {"error": {"type": "server_error", "message": "%s"}}\n\n' % SECRET.encode()


@pytest.mark.parametrize(
    ("answer", "reason", "options"),
    [
        ((400, b'{"error": {"type": "invalid_request_error", "code": "bad", "message": "%s"}}' %
          SECRET.encode()), "HTTP 400 invalid_request_error bad", ()),
        ((404, b"<html>"), "HTTP 404", ()),
        ((200, b"<html>"), "the answer is no chat completion", ()),
        ((200, b'{"choices": []}'), "the answer is no chat completion", ()),
        ((200, b"[1]"), "the answer is no chat completion", ()),
        ((200, b'{"error": {"type": "server_error"}}'), "an error for an answer: server_error", ()),
        ((200, BROKEN_FRAME), "an error in the stream: server_error", ("--stream",)),
        (streamed(opener(0, "get_weather"), finish=None, done=False), "without a finish_reason",
         ("--stream",)),
        (streamed(opener(4, "get_weather")), "the answer is no chat completion", ("--stream",)),
        ((200, b"data: {oops\n\n"), "the answer is no chat completion", ("--stream",)),
    ],
)  # fmt: skip
def test_failed_requests_are_named(
    verify: Run, answer: Answer, reason: str, options: tuple[str, ...]
) -> None:
    code, written, printed = verify(lambda *_: answer, options=options)
    assert code == 1
    assert written["summary"]["answered"] == 0
    assert len(written["summary"]["failures"]) == 1
    assert reason in written["summary"]["failures"][0]
    assert SECRET not in printed + json.dumps(written)


def test_busy_endpoints_are_asked_again(verify: Run) -> None:
    answers = [(429, b"", {"Retry-After": "0"}), (503, b"", {"Retry-After": "0"}), whole()]
    _, written, _ = verify(lambda *_: answers.pop(0))
    assert written["summary"]["answered"] == 1
    forever: Answer = (429, b"", {"Retry-After": "0"})
    _, written, _ = verify(lambda *_: forever, options=("--retries", "1"))
    assert written["summary"]["failures"] == ["line 1: HTTP 429"]


def test_no_server(tmp_path: Path) -> None:
    with answering(lambda *_: whole()) as url:
        pass
    file = tmp_path / "samples.jsonl"
    file.write_text(json.dumps(sample()))
    with pytest.raises(EvaluationError, match=r"lists no models: .* name one with --model"):
        main(["--tools", str(file), "--url", url])
    assert main(["--tools", str(file), "--url", url, "--model", "x"]) == 1


def test_requests_go_out_as_written_with_the_options_in_place(verify: Run, tmp_path: Path) -> None:
    asked: list[tuple[Body, dict[str, str]]] = []

    def answer(body: Body, headers: dict[str, str]) -> Answer:
        asked.append((body, headers))
        return whole()

    given = sample(temperature=0.3, max_tokens=9, extra="kept", stream=True)
    verify(answer, given)
    assert asked[0][0] == {**given, "model": "first", "stream": False}
    assert "Authorization" not in asked[0][1]

    key = tmp_path / "key"
    key.write_text("sk-1\n")
    options = ("--model", "m", "--seed", "7", "--temperature", "0.6", "--top-p", "0.9", "--max-tokens", "50")
    _, written, _ = verify(answer, given, options=(*options, "--api-key-file", str(key)))
    changed = {"model": "m", "seed": 7, "temperature": 0.6, "top_p": 0.9, "max_tokens": 50, "stream": False}
    assert asked[1][0] == {**given, **changed}
    assert asked[1][1]["Authorization"] == "Bearer sk-1"
    assert changed.items() <= written["conditions"].items()
    assert "sk-1" not in json.dumps(written)


def test_only_the_first_requests(verify: Run) -> None:
    _, written, _ = verify(
        lambda *_: whole(), *[sample()] * 5, options=("--limit", "2", "--concurrency", "1")
    )
    assert written["summary"]["requests"] == 2


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "http://127.0.0.1:9/schema.json"},
        {"$ref": "file:///etc/passwd"},
        {"$schema": "http://127.0.0.1:9/meta"},
        {"$ref": "#/nowhere"},
        {"type": "nothing"},
        {"pattern": "("},
        7,
    ],
)
def test_a_request_with_an_unusable_schema_is_skipped_aloud(verify: Run, schema: Any) -> None:
    code, written, printed = verify(
        lambda *_: whole(("get_weather", '{"city": "x"}')), sample(schema=schema), sample()
    )
    assert code == 0
    assert written["summary"]["requests"] == 1
    (skipped,) = written["conditions"]["skipped"]
    assert skipped.startswith("line 1: its schema cannot be used: ")
    assert skipped in printed


def test_schemas_are_hostile_input() -> None:
    catastrophic = Arguments({"properties": {"p": {"type": "string", "pattern": r"^(\w+\s?)*\1$"}}})
    assert catastrophic.misfit(json.dumps({"p": "a" * 60 + "!"})) is not None
    recursive = Arguments({"$ref": "#/$defs/n", "$defs": {"n": {"properties": {"n": {"$ref": "#/$defs/n"}}}}})
    assert recursive.misfit('{"n":' * 50 + "{}" + "}" * 50) is None
    with pytest.raises(UnusableSchemaError):
        Arguments({"$ref": "http://127.0.0.1:9/"})


def test_half_a_character_is_told() -> None:
    assert "cannot be validated" in str(Arguments({"enum": ["x"]}).misfit('"\\ud800"'))


@pytest.mark.parametrize("schema", [None, {}, True])
def test_a_tool_that_asks_for_nothing_takes_any_json(schema: Any) -> None:
    assert Arguments(schema).misfit('{"a": [1, null]}') is None
    assert Arguments(schema).misfit("{") is not None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no request"),
        ("{oops", "line 1: no JSON"),
        ("[]", "line 1: a request is an object with `messages`"),
        ('\n{"tools": []}', "line 2: a request is an object with `messages`"),
        ('{"messages": [], "tools": [{"name": "x"}]}', "line 1: each tool"),
    ],
)
def test_files_that_are_none(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "samples.jsonl"
    file.write_text(text)
    with pytest.raises(EvaluationError, match=message):
        read_samples(file)
    with pytest.raises(EvaluationError, match="cannot read"):
        read_samples(tmp_path / "absent")


def test_what_is_wrong_with_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        k2hybrid(["verify"])
    assert ended.value.code == 2
    assert "--tools FILE" in capsys.readouterr().err
    file = tmp_path / "samples.jsonl"
    file.write_text(json.dumps(sample()))
    assert k2hybrid(["verify", "--tools", str(file), "--url", "ftp://x"]) != 0
    assert "is no address of a server" in capsys.readouterr().err
    assert k2hybrid(["verify", "--tools", str(file), "--url", "http://x:y"]) != 0


def test_the_shipped_requests_can_be_judged() -> None:
    read = read_samples(EXAMPLES)
    assert not read.skipped
    assert len(read.samples) >= 40
    texts = [json.dumps(sample.body["messages"]) for sample in read.samples]
    assert len(set(texts)) == len(texts)
