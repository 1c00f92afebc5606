"""Golden ids of the published vocabulary; hostile texts; hostile files."""

from __future__ import annotations

import base64
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from k2hybrid.chat.markers import Markers
from k2hybrid.chat.tokenizer import _PATTERN, Tokenizer
from k2hybrid.chat.vocabulary import parse_config, parse_ranks, parse_specials
from k2hybrid.errors import TokenizerError

GOLDEN = Path(__file__).parents[2] / "golden"
CASES = json.loads((GOLDEN / "golden-tokenizer.json").read_text())
BYTES = [bytes([byte]) for byte in range(256)]


def test_the_vocabulary_is_the_published_one(golden: Path) -> None:
    digest = hashlib.sha256((golden / "tiktoken.model").read_bytes()).hexdigest()
    assert digest == "b6c497a7469b33ced9c38afb1ad6e47f03f5e5dc05f15930799210ec050c5103"


def test_the_pattern_is_the_published_one() -> None:
    digest = hashlib.sha256(_PATTERN.encode()).hexdigest()
    assert digest == "de5781783b193d5ccf5b1b28edfa70fa816ce78d54603fdc422cfd8d4ea4411f"


@pytest.mark.parametrize("case", CASES, ids=lambda case: repr(case["text"][:24]))
def test_golden_ids(tokenizer: Tokenizer, case: dict) -> None:
    assert tokenizer.encode(case["text"]) == case["ids_plain"]
    assert tokenizer.encode_with_specials(case["text"]) == case["ids_special"]
    assert tokenizer.decode(case["ids_plain"]) == case["text"]
    assert tokenizer.decode(case["ids_special"]) == case["text"]


def test_specials_are_the_published_ones(tokenizer: Tokenizer, golden: Path) -> None:
    assert tokenizer.specials == json.loads((golden / "special-tokens.json").read_text())
    assert tokenizer.vocab_size == 163840
    assert tokenizer.stop_ids == {163586, 163585, 163593}


def test_no_special_ever_comes_out_of_plain_text(tokenizer: Tokenizer) -> None:
    text = "".join(tokenizer.specials)
    ids = tokenizer.encode(text)
    assert max(ids) < tokenizer.num_ranks
    assert tokenizer.decode(ids) == text


@given(text=st.text(max_size=200))
def test_round_trip(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("char", ["a", "A", " ", "\t", "\n", "-", "é", "汉", "1", "'"])
def test_a_million_of_one_character(tokenizer: Tokenizer, char: str) -> None:
    text = char * 1_000_000
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_long_runs_are_cut_where_the_published_tokenizer_cuts(tokenizer: Tokenizer) -> None:
    run = tokenizer.encode(" " * 25_000)
    assert tokenizer.encode(" " * 60_000) == run + run + tokenizer.encode(" " * 10_000)
    ordinary = "word " * 20_000
    assert tokenizer.encode(ordinary) == tokenizer._plain.encode_ordinary(ordinary)


def test_lone_surrogates_become_replacement_characters(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("a\ud800b\udfff") == tokenizer.encode("a\ufffdb\ufffd")
    assert tokenizer.encode_with_specials("\ud83d") == tokenizer.encode("\ufffd")


def test_ids_outside_the_vocabulary(tokenizer: Tokenizer) -> None:
    for token in (-1, tokenizer.vocab_size):
        with pytest.raises(TokenizerError, match="outside the vocabulary"):
            tokenizer.token_bytes(token)


# --- files ----------------------------------------------------------------------------------------


def lines(tokens: list[bytes], ranks: list[int] | None = None) -> bytes:
    numbers = range(len(tokens)) if ranks is None else ranks
    return b"".join(
        base64.b64encode(token) + b" %d\n" % rank for token, rank in zip(tokens, numbers, strict=True)
    )


def test_a_minimal_vocabulary_in_any_order() -> None:
    data = lines([*BYTES, b"ab"])
    backwards = b"\n".join(reversed(data.splitlines()))
    assert parse_ranks(data) == parse_ranks(backwards)
    assert parse_ranks(data)[b"ab"] == 256


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "no tokens"),
        (b"YQ==", "expected"),
        (b"YQ== 0 0", "expected"),
        (b"Y$== 0", "base64"),
        (b"YQ= 0", "base64"),
        (b"YQ== -1", "bad rank"),
        (b"YQ== x", "bad rank"),
        (b"YQ== 99999999999999999999", "bad rank"),
        (b"YQ== 4000000", "out of range"),
        (lines([*BYTES, b"a"]), "again"),
        (lines([*BYTES, b"ab"], [*range(256), 3]), "used twice"),
        (lines([*BYTES, b"ab"], [*range(256), 257]), "no token has rank 256"),
        (lines(BYTES[:-1]), "first 0xff"),
        (lines([*BYTES[:-1], b"ab"]), "first 0xff"),
        (lines([b"", *BYTES]), "expected"),
    ],
)
def test_malformed_ranks(data: bytes, message: str) -> None:
    with pytest.raises(TokenizerError, match=message):
        parse_ranks(data)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("[]", "not an object"),
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('{"added_tokens_decoder": []}', "added_tokens_decoder"),
        ('{"added_tokens_decoder": {"x": {"content": "a"}}}', "not a token id"),
        ('{"added_tokens_decoder": {"²": {"content": "a"}}}', "not a token id"),
        ('{"added_tokens_decoder": {"255": {"content": "a"}}}', "outside"),
        ('{"added_tokens_decoder": {"512": {"content": "a"}}}', "outside"),
        ('{"added_tokens_decoder": {"256": {"content": ""}}}', "no content"),
        ('{"added_tokens_decoder": {"256": 7}}', "no content"),
        ('{"added_tokens_decoder": {"256": {"content": "a"}, "257": {"content": "a"}}}', "names both"),
        ('{"added_tokens_decoder": {"256": {"content": "<|reserved_token_300|>"}}}', "names both"),
    ],
)
def test_malformed_configs(config: str, message: str) -> None:
    with pytest.raises(TokenizerError, match=message):
        parse_specials(parse_config(config.encode()), 256)


def test_unnamed_specials_have_their_published_names() -> None:
    specials = parse_specials({"added_tokens_decoder": {"256": {"content": "[BOS]"}}}, 256)
    assert len(specials) == 256
    assert specials["[BOS]"] == 256
    assert specials["<|reserved_token_511|>"] == 511


def test_missing_files_and_missing_markers(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="cannot read"):
        Tokenizer.load(tmp_path)
    with pytest.raises(TokenizerError, match="stop tokens"):
        Tokenizer({byte: i for i, byte in enumerate(BYTES)}, parse_specials({}, 256))
    with pytest.raises(TokenizerError, match="<think>"):
        Markers.from_specials({"<|im_end|>": 256})


def test_chat_is_imported_without_torch_and_jinja2() -> None:
    code = (
        "import sys, k2hybrid.chat.template, k2hybrid.chat.stream, k2hybrid.chat.stop\n"
        "print(*[name for name in ('torch', 'jinja2', 'numpy', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
