"""The kernel's formats: lists of ids, sizes, fields; and what is none."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from k2hybrid.hardware.sysfs import (
    field,
    format_ids,
    kb_field,
    numbered,
    parse_ids,
    parse_size,
    read_int,
    read_text,
)


@given(st.sets(st.integers(0, 300)))
def test_lists_of_ids_there_and_back(ids: set[int]) -> None:
    ordered = tuple(sorted(ids))
    text = format_ids(ordered)
    assert parse_ids(text) == ordered
    # The shortest form: no two neighbouring parts could be one.
    ends = [tuple(map(int, part.split("-"))) for part in text.split(",") if part]
    assert all(right[0] > left[-1] + 1 for left, right in itertools.pairwise(ends))


@given(st.text(max_size=30))
def test_any_text_is_a_list_or_none(text: str) -> None:
    found = parse_ids(text)
    assert found is None or found == tuple(sorted(set(found)))


@pytest.mark.parametrize(
    "text", ["-", "1-", "-1", "3-1", "1,,2", "1 2", "0-65536", "9999999999", "²", "0x3", "1.5"]
)
def test_garbled_lists(text: str) -> None:
    assert parse_ids(text) is None


def test_fields() -> None:
    text = "MemTotal:       100 kB\nNode 0 MemFree:   7 kB\nNode x Bad: 5 kB\n"
    text += "model name\t: Big CPU \nflags\t\t:\n"
    assert kb_field(text, "MemTotal") == 102400
    assert kb_field(text, "MemFree") == 7168
    assert kb_field(text, "Bad") is None
    assert field(text, "model name") == "Big CPU"
    assert field(text, "flags") == field(text, "nothing") == ""
    assert [parse_size(word) for word in ("32768K", "1M", "64")] == [1 << 25, 1 << 20, 64]
    assert [parse_size(word) for word in ("", "K", "1T", "-1K")] == [None] * 4


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "n").write_bytes(b"\xff\xfe12")
    assert read_int(tmp_path / "n") is None
    assert read_text(tmp_path) == read_text(tmp_path / "missing") == read_text(tmp_path / "a\0b") == ""
    for name in ("cpu10", "cpu2", "cpufreq", "cpu-1", "cpu99999999", "node0"):
        (tmp_path / name).mkdir()
    assert list(numbered(tmp_path, "cpu")) == [2, 10]
    assert numbered(tmp_path / "missing", "cpu") == {}
