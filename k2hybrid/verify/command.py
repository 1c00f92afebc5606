"""`k2hybrid verify --tools FILE`: how many of a model's tool calls are valid, asked of any endpoint.

FILE holds a chat request on each line, as the vendor's verifier of third-party deployments has them:
{"messages": […], "tools": […]}; other fields are sent along. A call is right if it names a declared tool, and
its arguments are JSON and fit that tool's schema. The share of those is the schema accuracy.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from k2hybrid.errors import EvaluationError
from k2hybrid.hardware.doctor import package_version
from k2hybrid.verify.endpoint import Endpoint, RequestFailedError
from k2hybrid.verify.judging import Summary, Verdict, judged, summary
from k2hybrid.verify.samples import Sample, read_samples

T = TypeVar("T")
R = TypeVar("R")


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    made = argparse.ArgumentParser(
        prog="k2hybrid verify",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.add_argument("--tools", type=Path, metavar="FILE", help="requests, one JSON object a line")
    made.add_argument(
        "--url", default="http://127.0.0.1:8000", help="of the endpoint (default: http://127.0.0.1:8000)"
    )
    made.add_argument("--model", metavar="NAME", help="what is asked for (default: the endpoint's first)")
    made.add_argument("--api-key-file", type=Path, metavar="FILE", help="holds the key, and nothing else")
    made.add_argument(
        "-n", "--n", "--limit", dest="limit", type=_count, metavar="N", help="only the first N requests"
    )
    made.add_argument(
        "--concurrency", type=_count, default=8, metavar="N", help="requests at once (default: 8)"
    )
    made.add_argument(
        "--stream",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="ask for streams (default: whole answers)",
    )
    made.add_argument("--seed", type=int, help="sent along with every request")
    made.add_argument("--temperature", type=float, help="in place of what FILE says")
    made.add_argument("--top-p", type=float, metavar="P", help="in place of what FILE says")
    made.add_argument("--max-tokens", type=_count, metavar="N", help="in place of what FILE says")
    made.add_argument(
        "--timeout", type=_count, default=600, metavar="S", help="longest silence in seconds (default: 600)"
    )
    made.add_argument(
        "--retries",
        type=int,
        default=3,
        metavar="N",
        help="after 429 and 5xx, with a pause as the endpoint asks for (default: 3)",
    )
    made.add_argument("--json", type=Path, metavar="FILE", help='write {"conditions": …, "summary": …}')
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Verify; 0 if all requests were answered and all their calls are right, else 1. EvaluationError."""
    options = parser()
    given = options.parse_args(argv)
    if given.tools is None:
        options.error(
            "say what to verify; there is --tools FILE: the tool calls of a running endpoint "
            "(`k2hybrid inspect DIR` checks a checkpoint's files)"
        )
    key = _key(given.api_key_file)
    endpoint = Endpoint(given.url, key, given.timeout, max(given.retries, 0))
    read = read_samples(given.tools)
    samples = read.samples[: given.limit]
    model = given.model or endpoint.model()
    fields = {
        "model": model,
        "stream": given.stream,
        "seed": given.seed,
        "temperature": given.temperature,
        "top_p": given.top_p,
        "max_tokens": given.max_tokens,
    }
    overriding = {name: value for name, value in fields.items() if value is not None}

    def verdict(sample: Sample) -> Verdict:
        try:
            return judged(sample, endpoint.chat({**sample.body, **overriding}))
        except RequestFailedError as error:
            return Verdict(sample.line, None, failure=str(error))

    result = summary(_at_once(verdict, samples, given.concurrency))
    conditions = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "k2hybrid": package_version("k2hybrid"),
        "url": given.url,
        "file": given.tools.name,
        "skipped": list(read.skipped),
        **overriding,
    }
    _print(result, read.skipped)
    if given.json:
        written = {"conditions": conditions, "summary": result.as_json()}
        given.json.write_text(json.dumps(written, indent=1, ensure_ascii=False) + "\n", "utf-8")
    return 0 if result.perfect else 1


def _key(path: Path | None) -> str | None:
    if path is None:
        return None
    try:
        return path.read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(f"cannot read the key: {error}") from error


def _at_once(function: Callable[[T], R], items: Sequence[T], concurrency: int) -> Iterable[R]:
    """`function` of all items, results in order; a bar where someone watches."""
    bar = tqdm(total=len(items), desc="verify", leave=False, disable=not sys.stderr.isatty())
    pool = ThreadPoolExecutor(concurrency)
    try:
        for result in pool.map(function, items):
            yield result
            bar.update()
    finally:
        # After an interruption nobody wants the rest.
        pool.shutdown(wait=False, cancel_futures=True)
        bar.close()


def _print(result: Summary, skipped: Sequence[str]) -> None:
    for line in result.failures:
        print(line)
    for line in skipped:
        print(f"skipped: {line}")
    reasons = ", ".join(f"{reason} {count}" for reason, count in result.finish_reasons.items())
    accuracy = "no calls" if result.accuracy is None else f"{100 * result.accuracy:.2f} %"
    rows: list[tuple[str, Any]] = [
        ("requests", result.requests),
        ("answered", result.answered),
        ("finish_reason", reasons or "none"),
        ("answers with calls", result.with_calls),
        ("  all of them right", result.all_right),
        ("calls", result.calls),
        ("  right", result.right),
        ("schema accuracy", accuracy),
    ]
    if result.unreadable:
        rows.append(("neither text nor call", result.unreadable))
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit()) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 1 or more")
    return int(text)
