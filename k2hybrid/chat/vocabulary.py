"""Reads the two tokenizer files of a checkpoint, strictly: `tiktoken.model` and `tokenizer_config.json`.

Nothing of the checkpoint is executed: its `tokenization_*.py` is never looked at.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from k2hybrid.errors import TokenizerError

RANKS_FILE = "tiktoken.model"
CONFIG_FILE = "tokenizer_config.json"
SPECIALS = 256  # ids after the ranks, whether named or not (the published tokenizer reserves as many)
_MAX_FILE_BYTES = 64 << 20  # the published vocabulary has 2.8 MB


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """`ranks`: token bytes → id 0…n−1; `specials`: spelling → id n…n+255; `config`: tokenizer_config.json."""

    ranks: dict[bytes, int]
    specials: dict[str, int]
    config: Mapping[str, Any]


def read_vocabulary(model_dir: Path) -> Vocabulary:
    """Read and check both files. Raises TokenizerError naming the file, the line and the fault."""
    ranks = parse_ranks(_read(model_dir / RANKS_FILE))
    config = parse_config(_read(model_dir / CONFIG_FILE))
    return Vocabulary(ranks, parse_specials(config, len(ranks)), config)


def parse_ranks(data: bytes) -> dict[bytes, int]:
    """`<base64> <rank>` a line; ranks 0…n−1 each once, in any order; every single byte is a token."""
    ranks: dict[bytes, int] = {}
    used = bytearray()
    for number, line in enumerate(data.splitlines(), 1):
        if not line.strip():
            continue
        fields = line.split()
        if len(fields) != 2:
            raise TokenizerError(f"{RANKS_FILE} line {number}: expected '<base64> <rank>', got {line[:60]!r}")
        try:
            token = base64.b64decode(fields[0], validate=True)
        except binascii.Error as error:
            raise TokenizerError(f"{RANKS_FILE} line {number}: bad base64 {fields[0][:60]!r}") from error
        if not fields[1].isdigit() or len(fields[1]) > 9:
            raise TokenizerError(f"{RANKS_FILE} line {number}: bad rank {fields[1][:20]!r}")
        rank = int(fields[1])
        if not token:
            raise TokenizerError(f"{RANKS_FILE} line {number}: an empty token")
        if token in ranks:
            raise TokenizerError(
                f"{RANKS_FILE} line {number}: token {token!r} again, first at rank {ranks[token]}"
            )
        if rank >= len(used):
            if rank > len(data):  # a rank beyond the file's size cannot be part of 0…n−1
                raise TokenizerError(f"{RANKS_FILE} line {number}: rank {rank} is out of range")
            used.extend(bytes(rank + 1 - len(used)))
        if used[rank]:
            raise TokenizerError(f"{RANKS_FILE} line {number}: rank {rank} is used twice")
        used[rank] = 1
        ranks[token] = rank
    if not ranks:
        raise TokenizerError(f"{RANKS_FILE} holds no tokens")
    if len(ranks) != len(used):
        raise TokenizerError(
            f"{RANKS_FILE}: no token has rank {used.index(0)}, but ranks go up to {len(used) - 1}"
        )
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise TokenizerError(
            f"{RANKS_FILE}: {len(missing)} single bytes have no token, first 0x{missing[0]:02x}"
        )
    return ranks


def parse_config(data: bytes) -> Mapping[str, Any]:
    """`tokenizer_config.json` as an object."""
    try:
        config = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{CONFIG_FILE} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise TokenizerError(f"{CONFIG_FILE} is not an object")
    return config


def parse_specials(config: Mapping[str, Any], num_ranks: int) -> dict[str, int]:
    """The 256 ids after the ranks: `added_tokens_decoder` names some, the others are reserved ones."""
    named: dict[int, str] = {}
    entries = config.get("added_tokens_decoder", {})
    if not isinstance(entries, dict):
        raise TokenizerError(f"{CONFIG_FILE}: added_tokens_decoder is not an object")
    for key, entry in entries.items():
        if not key.isascii() or not key.isdigit() or len(key) > 9:
            raise TokenizerError(f"{CONFIG_FILE}: added_tokens_decoder key {key[:40]!r} is not a token id")
        token_id = int(key)
        if not num_ranks <= token_id < num_ranks + SPECIALS:
            raise TokenizerError(
                f"{CONFIG_FILE}: special id {token_id} lies outside {num_ranks}…{num_ranks + SPECIALS - 1}"
            )
        spelling = entry.get("content") if isinstance(entry, dict) else None
        if not isinstance(spelling, str) or not spelling:
            raise TokenizerError(f"{CONFIG_FILE}: special token {token_id} has no content")
        named[token_id] = spelling
    specials: dict[str, int] = {}
    for token_id in range(num_ranks, num_ranks + SPECIALS):
        spelling = named.get(token_id, f"<|reserved_token_{token_id}|>")
        if spelling in specials:
            raise TokenizerError(
                f"{CONFIG_FILE}: {spelling!r} names both {specials[spelling]} and {token_id}"
            )
        specials[spelling] = token_id
    return specials


def named_token(config: Mapping[str, Any], key: str) -> str | None:
    """The spelling under `bos_token`, `eos_token`, …, written as a string or as `{"content": …}`."""
    value = config.get(key)
    if isinstance(value, dict):
        value = value.get("content")
    if value is not None and not isinstance(value, str):
        raise TokenizerError(f"{CONFIG_FILE}: {key} is not a string")
    return value


def _read(path: Path) -> bytes:
    try:
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise TokenizerError(f"{path} is larger than {_MAX_FILE_BYTES} bytes")
        return path.read_bytes()
    except OSError as error:
        raise TokenizerError(f"cannot read {path}: {error.strerror}") from error
