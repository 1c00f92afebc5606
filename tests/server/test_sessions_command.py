"""`k2hybrid sessions`: lists what a journal holds, also beside a server, and deletes it."""

from __future__ import annotations

from pathlib import Path

import pytest

from k2hybrid.cache.journal import Journal
from k2hybrid.cache.page_keys import page_keys
from k2hybrid.cache.session_log import Exchange
from k2hybrid.cli.sessions import add_sessions_options, sessions
from k2hybrid.errors import ConfigError
from k2hybrid.server.options import USAGE, Parser

FINGERPRINTS = ("0123456789abcdef", "fedcba9876543210")


def run(*argv: str) -> int:
    parser = Parser(prog="k2hybrid sessions")
    add_sessions_options(parser)
    return sessions(parser.parse_args(argv))


def fill(folder: Path, fingerprint: str, *names: str) -> Journal:
    journal = Journal(folder, fingerprint, 4096)
    for name in names:
        ids = [1, 2, 3, 4, len(name), ord(name[0])]
        pages = page_keys("s", ids, 4)
        for page in pages:
            assert journal.write_page(page.key, page.parent, ids[page.start : page.stop], bytes(4096))
        journal.append(Exchange(name, "r", "s", "c", "m", (1,), "", 0, pages[-1].key.hex(), 12345))
    return journal


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    folder = tmp_path / "j"
    fill(folder, FINGERPRINTS[0], "apple", "pear").close()
    fill(folder, FINGERPRINTS[1], "fig").close()
    return folder


def test_list_shows_all_fingerprints(journal: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("list", "--journal", str(journal)) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == ["SESSION", "ANSWERS", "TOKENS", "SIZE", "CREATED", "LAST", "USED", "MODEL"]
    cells = [row.split() for row in rows]
    assert sorted((row[0], row[-1]) for row in cells) == [
        ("apple", FINGERPRINTS[0][:8]),
        ("fig", FINGERPRINTS[1][:8]),
        ("pear", FINGERPRINTS[0][:8]),
    ]
    assert cells[0][1:3] == ["1", "12,345"]
    assert cells[0][4] == "KiB"
    assert [row.rindex(FINGERPRINTS[0][:8]) for row in rows if FINGERPRINTS[0][:8] in row] == [
        head.index("MODEL")
    ] * 2


def test_list_beside_a_server_changes_nothing(journal: Path, capsys: pytest.CaptureFixture[str]) -> None:
    running = fill(journal, FINGERPRINTS[0], "plum")
    torn = journal / FINGERPRINTS[0] / "sessions" / "apple.log"
    torn.write_bytes(torn.read_bytes() + b"\0\1\2")
    (journal / FINGERPRINTS[0] / "pages" / "half.tmp").write_bytes(b"half")
    next(journal.rglob("*.page")).write_bytes(b"bad")
    before = {path: path.read_bytes() for path in journal.rglob("*") if path.is_file()}
    assert run("list", "--journal", str(journal)) == 0
    assert "plum" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in journal.rglob("*") if path.is_file()} == before
    running.close()


def test_delete_takes_what_is_theirs_alone(journal: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("delete", "apple", "fig", "--journal", str(journal)) == 0
    assert "deleted 2 sessions" in capsys.readouterr().err
    left = sorted(path.name for path in journal.rglob("*.log"))
    assert left == ["pear.log"]
    assert len(list(journal.rglob("*.page"))) == 2
    assert run("delete", "--journal", str(journal), "pear") == 0
    assert list(journal.rglob("*.page")) == []
    capsys.readouterr()
    assert run("list", "--journal", str(journal)) == 0
    assert capsys.readouterr().out == "no sessions\n"


def test_delete_takes_what_was_interrupted_under_another_fingerprint(journal: Path) -> None:
    other = Journal(journal, FINGERPRINTS[1], 4096)
    ids = [1, 2, 3, 4, 77]
    for page in page_keys("s", ids, 4):
        other.write_page(page.key, page.parent, ids[page.start : page.stop], bytes(4096))
    other.close()
    assert len(list((journal / FINGERPRINTS[1]).rglob("*.page"))) == 3
    assert run("delete", "apple", "--journal", str(journal)) == 0
    left = {path.stem for path in (journal / FINGERPRINTS[1]).rglob("*.page")}
    assert page_keys("s", ids, 4)[1].key.hex() not in left
    assert len(left) == 2


def test_delete_all(journal: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("delete", "--all", "--journal", str(journal)) == 0
    assert "everything" in capsys.readouterr().err
    assert [path.name for path in journal.iterdir()] == ["lock"]


def test_an_unknown_session_deletes_nothing(journal: Path) -> None:
    with pytest.raises(ConfigError, match="no session grape; nothing is deleted"):
        run("delete", "apple", "grape", "--journal", str(journal))
    assert len(list(journal.rglob("*.log"))) == 3


def test_delete_beside_a_server_is_refused(journal: Path) -> None:
    running = fill(journal, FINGERPRINTS[0])
    for what in ("apple", "--all"):
        with pytest.raises(ConfigError, match="in use by the process"):
            run("delete", what, "--journal", str(journal))
    assert len(list(journal.rglob("*.log"))) == 3
    running.close()


def test_unreachable_pages_are_told(journal: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in journal.rglob("*.log"):
        path.unlink()
    assert run("list", "--journal", str(journal)) == 0
    said = capsys.readouterr().out
    assert "no sessions" in said
    assert "20.3 KiB of requests that still run, or were interrupted" in said


@pytest.mark.parametrize("action", ["list", "delete"])
def test_a_journal_that_is_not_there_is_not_made(tmp_path: Path, action: str) -> None:
    with pytest.raises(ConfigError, match="no such folder"):
        run(action, "--journal", str(tmp_path / "j"), *(["--all"] if action == "delete" else []))
    assert list(tmp_path.iterdir()) == []


def test_a_journal_open_to_others_is_refused(journal: Path) -> None:
    journal.chmod(0o755)
    with pytest.raises(ConfigError, match="chmod 700"):
        run("list", "--journal", str(journal))


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "ACTION"),
        (["list"], "--journal"),
        (["delete", "--journal", "j"], "name the sessions to delete, or give --all"),
        (["delete", "--journal", "j", "--all", "apple"], "name the sessions to delete, or give --all"),
        (["list", "--journal", "j", "apple"], "unknown argument apple"),
        (["list", "--journals", "j"], "--journal"),
        (["delete", "--journal", "j", "--al"], "did you mean --all?"),
    ],
)
def test_wrong_command_lines(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    argv: list[str],
    said: str,
) -> None:
    (tmp_path / "j").mkdir(0o700)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        run(*argv)
    assert caught.value.code == USAGE
    assert said in capsys.readouterr().err
