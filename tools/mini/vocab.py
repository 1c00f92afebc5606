"""The small vocabulary: bytes, letter merges, and the published specials by name at the same offsets."""

from __future__ import annotations

import base64
import collections
import itertools
import json
import re
from pathlib import Path
from typing import Any

import tiktoken

N_RANKS = 1792
N_SPECIAL = 256

# The split pattern of the published tokenizer, alternatives in order.
PATTERN = "|".join([
    r"[\p{Han}]+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"\p{N}{1,3}",
    r" ?[^\s\p{L}\p{N}]+[\r\n]*",
    r"\s*[\r\n]+",
    r"\s+(?!\S)",
    r"\s+",
])  # fmt: skip

# Offset from the first special id → name; every other offset is a reserved token.
NAMED_SPECIALS = {
    0: "[BOS]", 1: "[EOS]", 2: "<|im_end|>", 3: "<|im_user|>", 4: "<|im_assistant|>",
    6: "<|start_header_id|>", 7: "<|end_header_id|>", 9: "[EOT]", 10: "<|im_system|>",
    11: "<|tool_calls_section_begin|>", 12: "<|tool_calls_section_end|>", 13: "<|tool_call_begin|>",
    14: "<|tool_call_argument_begin|>", 15: "<|tool_call_end|>", 17: "<|im_middle|>", 18: "<|media_begin|>",
    19: "<|media_content|>", 20: "<|media_end|>", 21: "<|media_pad|>", 22: "<think>", 23: "</think>",
    254: "[UNK]", 255: "[PAD]",
}  # fmt: skip
# These are control tokens of the text itself, not of the tokenizer.
_TEXT_CONTROLS = {
    "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>", "<|tool_call_begin|>",
    "<|tool_call_argument_begin|>", "<|tool_call_end|>", "<think>", "</think>",
}  # fmt: skip

_LETTER_RUN = re.compile(r"[A-Z]*[a-z]+|[A-Z]+")


def special_tokens(n_ranks: int) -> dict[str, int]:
    """Name → id for the 256 specials that follow `n_ranks` ranks."""
    return {NAMED_SPECIALS.get(k, f"<|reserved_token_{n_ranks + k}|>"): n_ranks + k for k in range(N_SPECIAL)}


def learn_ranks(counts: dict[str, float], n_ranks: int = N_RANKS) -> list[bytes]:
    """Byte-pair ranks: the 256 bytes, then merges that join ASCII letters to letters only.

    `counts` weighs letter runs (see `letter_runs`). Ties break by spelling: the result is reproducible.
    """
    words = [([bytes([b]) for b in word.encode()], weight) for word, weight in sorted(counts.items())]
    pairs: dict[tuple[bytes, bytes], float] = collections.defaultdict(float)
    where: dict[tuple[bytes, bytes], set[int]] = collections.defaultdict(set)
    for index, (parts, weight) in enumerate(words):
        for pair in itertools.pairwise(parts):
            pairs[pair] += weight
            where[pair].add(index)
    ranks = [bytes([b]) for b in range(256)]
    known = set(ranks)
    while len(ranks) < n_ranks:
        best = max(pairs, key=lambda p: (pairs[p], p))
        merged = best[0] + best[1]
        if merged not in known:
            ranks.append(merged)
            known.add(merged)
        for index in sorted(where.pop(best)):
            parts, weight = words[index]
            for pair in itertools.pairwise(parts):
                pairs[pair] -= weight
                where[pair].discard(index)
            joined: list[bytes] = []
            at = 0
            while at < len(parts):
                if at + 1 < len(parts) and (parts[at], parts[at + 1]) == best:
                    joined.append(merged)
                    at += 2
                else:
                    joined.append(parts[at])
                    at += 1
            parts[:] = joined
            for pair in itertools.pairwise(parts):
                pairs[pair] += weight
                where[pair].add(index)
        pairs.pop(best, None)
    return ranks


def letter_runs(text: str) -> list[str]:
    """Letter runs in which merges may happen, cut where the published pattern cuts at case changes."""
    return _LETTER_RUN.findall(text)


def write_ranks(ranks: list[bytes], path: Path) -> None:
    """Write `tiktoken.model`: one `<base64> <rank>` a line."""
    path.write_bytes(
        b"".join(base64.b64encode(piece) + f" {rank}\n".encode() for rank, piece in enumerate(ranks))
    )


def load_encoding(path: Path) -> tiktoken.Encoding:
    """The tokenizer of a `tiktoken.model` file with the published pattern and specials."""
    ranks: dict[bytes, int] = {}
    for line in path.read_bytes().splitlines():
        piece, rank = line.split()
        ranks[base64.b64decode(piece)] = int(rank)
    return tiktoken.Encoding(
        name="k2hybrid-mini",
        pat_str=PATTERN,
        mergeable_ranks=ranks,
        special_tokens=special_tokens(len(ranks)),
    )


def tokenizer_config(n_ranks: int) -> dict[str, Any]:
    """`tokenizer_config.json` with this vocabulary's ids."""
    named = NAMED_SPECIALS
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    return {
        "added_tokens_decoder": {
            str(n_ranks + k): {"content": name, **flags, "special": name not in _TEXT_CONTROLS}
            for k, name in named.items()
        },
        "additional_special_tokens": [
            name for name in named.values()
            if name not in _TEXT_CONTROLS and name not in ("[BOS]", "[EOS]", "[UNK]", "[PAD]")
        ],
        "bos_token": "[BOS]",
        "clean_up_tokenization_spaces": False,
        "eos_token": "[EOS]",
        "extra_special_tokens": {},
        "model_max_length": 262144,
        "pad_token": "[PAD]",
        "tokenizer_class": "TikTokenTokenizer",
        "unk_token": "[UNK]",
    }  # fmt: skip


def write_json(value: Any, path: Path) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
