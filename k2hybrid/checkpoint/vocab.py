"""Tokenizer files in K2's format: ranks as tiktoken writes them, then 256 special ids."""

from __future__ import annotations

import base64
import binascii
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from k2hybrid.checkpoint.strict_json import read_bounded, show
from k2hybrid.errors import TokenizerError

SPECIAL_COUNT = 256
_LIMIT_BYTES = 256 << 20

# Special tokens by their distance from the first special id (163584 in K2); the others are
# `<|reserved_token_{id}|>`. Source: the published tokenizer_config.json.
SPECIALS = {
    0: "[BOS]",
    1: "[EOS]",
    2: "<|im_end|>",
    3: "<|im_user|>",
    4: "<|im_assistant|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    9: "[EOT]",
    10: "<|im_system|>",
    11: "<|tool_calls_section_begin|>",
    12: "<|tool_calls_section_end|>",
    13: "<|tool_call_begin|>",
    14: "<|tool_call_argument_begin|>",
    15: "<|tool_call_end|>",
    17: "<|im_middle|>",
    18: "<|media_begin|>",
    19: "<|media_content|>",
    20: "<|media_end|>",
    21: "<|media_pad|>",
    22: "<think>",
    23: "</think>",
    254: "[UNK]",
    255: "[PAD]",
}
BOS, END_OF_MESSAGE, PAD = 0, 2, 255
_SHOWN_IN_TEXT = {11, 12, 13, 14, 15, 22, 23}  # published with "special": false, so that decoding keeps them


def read_ranks(path: Path) -> list[bytes]:
    """The byte strings of a tiktoken file (`<base64> <rank>` a line), by rank.

    Raises:
        TokenizerError: a malformed line, ranks not 0, 1, 2, …, a string twice, or a single byte missing.
    """
    ranks: list[bytes] = []
    for number, line in enumerate(read_bounded(path, _LIMIT_BYTES, TokenizerError).splitlines()):
        encoded, _, rank = line.partition(b" ")
        try:
            token = base64.b64decode(encoded, validate=True)
        except binascii.Error:
            token = b""
        if not token or rank != b"%d" % number:
            raise TokenizerError(f"{path}: line {number + 1} is {show(line)}, expected '<base64> {number}'")
        ranks.append(token)
    known = set(ranks)
    if len(known) != len(ranks):
        raise TokenizerError(f"{path}: {len(ranks) - len(known)} byte strings have two ranks")
    missing = [value for value in range(256) if bytes([value]) not in known]
    if missing:
        raise TokenizerError(f"{path}: the single bytes {show(missing)} have no rank")
    return ranks


def generated_ranks(count: int) -> list[bytes]:
    """A vocabulary of `count` ranks: all bytes, then aa, ab, … aaa, …, each reachable by merging its prefix.

    Raises:
        TokenizerError: fewer than the 256 single bytes.
    """
    if count < 256:
        raise TokenizerError(
            f"a vocabulary needs 256 ranks for the single bytes and 256 specials, not {count} ranks"
        )
    return list(itertools.islice(_strings(), count))


def _strings() -> Iterator[bytes]:
    # Printable bytes first, as in the published file.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    yield from (bytes([value]) for value in [*printable, *sorted(set(range(256)) - set(printable))])
    letters = [bytes([value]) for value in range(ord("a"), ord("z") + 1)]
    for length in itertools.count(2):
        yield from map(b"".join, itertools.product(letters, repeat=length))


def format_ranks(ranks: Sequence[bytes]) -> bytes:
    """The content of `tiktoken.model`."""
    return b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(ranks))


def special_tokens(ranks: int) -> dict[str, int]:
    """Name → id of the 256 specials that follow `ranks` ranks."""
    return {SPECIALS.get(i, f"<|reserved_token_{ranks + i}|>"): ranks + i for i in range(SPECIAL_COUNT)}


def tokenizer_config(ranks: int) -> dict[str, Any]:
    """The content of `tokenizer_config.json`, without the published file's reference to code."""
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    named = {
        str(ranks + i): {"content": name, **flags, "special": i not in _SHOWN_IN_TEXT}
        for i, name in SPECIALS.items()
    }
    own = {0, 1, 254, 255} | _SHOWN_IN_TEXT
    return {
        "added_tokens_decoder": named,
        "additional_special_tokens": [name for i, name in SPECIALS.items() if i not in own],
        "bos_token": SPECIALS[BOS],
        "clean_up_tokenization_spaces": False,
        "eos_token": SPECIALS[1],
        "extra_special_tokens": {},
        "model_max_length": 10**30,
        "pad_token": SPECIALS[PAD],
        "tokenizer_class": "TikTokenTokenizer",
        "unk_token": SPECIALS[254],
    }
