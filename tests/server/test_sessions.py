"""Sessions of a real server: who shares what, and what comes back after a kill."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI

from k2hybrid.cache.page_files import PageFile, PageFiles
from k2hybrid.cache.page_keys import unpack_ids
from k2hybrid.chat.tokenizer import Tokenizer
from k2hybrid.config import MINI_MODEL
from tests.server.process import command, listening

QUESTION = "Please remember this: " + " ".join(f"box {n} holds {n * n} nails;" for n in range(40))
FOLLOWING = "What does box 3 hold?"


@contextmanager
def served(*options: object, key: str = "none") -> Iterator[tuple[OpenAI, subprocess.Popen[str]]]:
    argv = [
        part
        for part in command("--port", 0, *options)
        if part != "--no-journal" or "--journal" not in options
    ]
    with (
        listening(argv) as (process, url, _),
        OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0) as client,
    ):
        yield client, process


def with_journal(argv: list[str]) -> list[str]:
    """Commands of tests have no journal unless they name one."""
    return [part for part in argv if part != "--no-journal"] if "--journal" in argv else argv


def ask(client: OpenAI, messages: list[dict[str, Any]], **options: Any) -> tuple[str, int, int]:
    """What was said, prompt tokens, and those of them that were cached."""
    given = {"temperature": 0, "max_tokens": 24, **options}
    done = client.chat.completions.create(model="k2", messages=messages, **given)  # type: ignore[call-overload]
    usage = done.usage
    cached = usage.prompt_tokens_details.cached_tokens
    said = done.choices[0].message
    return f"{said.reasoning_content}|{said.content}", usage.prompt_tokens, cached


def turns(answer: str) -> list[dict[str, Any]]:
    return [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": FOLLOWING},
    ]


def test_a_client_may_ask_for_no_reuse() -> None:
    with served() as (client, _):
        ask(client, turns("")[:1])
        assert ask(client, turns("")[:1], extra_body={"cache_prompt": False})[2] == 0


def test_keys_share_nothing(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("one\ntwo\n")
    with served("--api-key-file", keys, key="one") as (client, _):
        ask(client, turns("")[:1])
        assert ask(client, turns("")[:1])[2] > 0
        other = client.with_options(api_key="two")
        assert ask(other, turns("")[:1])[2] == 0


def test_a_killed_server_goes_on_without_prefilling(tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    with served("--no-idle-prefill") as (client, _):
        answer, _, _ = ask(client, turns("")[:1])
        undisturbed = ask(client, turns(answer))
    with served("--journal", journal, "--no-idle-prefill") as (client, process):
        assert ask(client, turns("")[:1])[0] == answer
        wait_for_pages(journal)
        process.kill()
        process.wait()
    with served("--journal", journal, "--no-idle-prefill") as (client, _):
        after = ask(client, turns(answer))
    assert after == undisturbed  # the answer, and what was prefilled


def test_what_is_not_to_be_stored_is_not_written(tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    with served("--journal", journal) as (client, process):
        ask(client, turns("")[:1], store=False)
        time.sleep(0.5)
        process.terminate()
        assert process.wait() == 0
    assert not [path for path in journal.glob("*/*/**/*") if path.is_file()]


def test_a_second_server_on_one_journal_is_a_clear_error(tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    with served("--journal", journal):
        argv = with_journal(command("--port", 0, "--journal", journal))
        second = subprocess.run(argv, capture_output=True, text=True, timeout=120)
    assert second.returncode == 1
    assert f"the journal {journal} is in use by the process" in second.stderr


def test_sessions_are_listed_and_deleted(tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    with served("--journal", journal) as (client, process):
        ask(client, turns("")[:1])
        process.terminate()
        assert process.wait() == 0
    listed = sessions("list", "--journal", journal)
    assert listed.returncode == 0
    (line,) = [row for row in listed.stdout.splitlines() if row.startswith("chatcmpl-")]
    deleted = sessions("delete", "--journal", journal, line.split()[0])
    assert deleted.returncode == 0
    assert "chatcmpl-" not in sessions("list", "--journal", journal).stdout


def test_a_deleted_session_leaves_no_words(tmp_path: Path) -> None:
    """Neither in its own pages, nor in those computed ahead, which branch from a page that both share."""
    journal = tmp_path / "journal"
    rules = " ".join(f"Rule {n}: box {n} holds {n * n} nails." for n in range(30))
    system = {"role": "system", "content": f"You are a helpful assistant. {rules}"}
    with served("--journal", journal) as (client, process):
        for question in ("What is the capital of Zanzibar?", "Please name a fruit."):
            ask(client, [system, {"role": "user", "content": question}], max_tokens=600)
        wait_for_pages(journal)
        process.terminate()
        assert process.wait() == 0
    before = texts(journal)
    pages_with = [text for text in before if "Zanzibar" in text]
    assert len(pages_with) >= 2, "the answer's, and what was computed ahead"
    assert all("Rule 29" in text for text in pages_with), "both follow a page that is shared"
    named = [row.split() for row in sessions("list", "--journal", journal).stdout.splitlines()]
    first, second = sorted(
        (row for row in named if row[0].startswith("chatcmpl-")), key=lambda row: -int(row[2])
    )
    assert sessions("delete", "--journal", journal, first[0]).returncode == 0
    after = texts(journal)
    assert not [text for text in after if "Zanzibar" in text]
    assert [text for text in after if "name a fruit" in text]
    assert sum("box" in text for text in after) >= len(after) - 1 > 5, "what is shared stays"
    assert second[0] in sessions("list", "--journal", journal).stdout


def texts(journal: Path) -> list[str]:
    """Of all pages on disk."""
    tokenizer = Tokenizer.load(Path(MINI_MODEL))
    return [
        tokenizer.decode(unpack_ids(page.packed))
        for folder in journal.glob("*/pages")
        for _, _, page in PageFiles(folder, None, create=False).scan(time.time())
        if isinstance(page, PageFile)
    ]


def sessions(*argv: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "k2hybrid", "sessions", *map(str, argv)],
        capture_output=True, text=True, timeout=60, env=os.environ,
    )  # fmt: skip


def wait_for_pages(journal: Path) -> None:
    """Until nothing new has been written for a while."""
    before: set[Path] = set()
    for _ in range(100):
        time.sleep(0.3)
        now = {path for path in journal.rglob("*") if path.is_file()}
        if now == before and len(now) > 2:
            return
        before = now
    pytest.fail("nothing was written")
