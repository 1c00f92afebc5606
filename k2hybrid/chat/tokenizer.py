"""Text ↔ token ids with the checkpoint's own vocabulary.

`encode` is plain: the spelling of a special token in a text becomes ordinary tokens. Special tokens are put
into a prompt by id, by the chat template alone (`template.py`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import tiktoken

from k2hybrid.chat.vocabulary import SPECIALS, named_token, read_vocabulary
from k2hybrid.errors import TokenizerError

# How text is cut into pieces before byte-pair merging; the published tokenizer's pattern, whose parts are
# joined by "|". `&&` is set intersection: runs of Han characters stand alone.
_PATTERN = "|".join(
    (
        r"[\p{Han}]+",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*"
        r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+"
        r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)

# The pattern's look-ahead backtracks once per character and overflows the regex engine's stack on about a
# million white-space characters in a row; older tiktoken merges long pieces in quadratic time. The published
# tokenizer bounds runs at this length too, so such text gets the ids the model was trained with.
_MAX_RUN_CHARS = 25_000
_LONG_RUN = re.compile(rf"\s{{{_MAX_RUN_CHARS + 1},}}|\S{{{_MAX_RUN_CHARS + 1},}}")
_SURROGATE = re.compile("[\ud800-\udfff]")

_STOP_NAMES = ("<|im_end|>", "[EOS]", "[EOT]")


class Tokenizer:
    """A vocabulary of `num_ranks` byte-pair tokens followed by 256 specials. Immutable and thread-safe."""

    def __init__(
        self, ranks: dict[bytes, int], specials: dict[str, int], config: Mapping[str, Any] | None = None
    ) -> None:
        self.specials = specials
        self.num_ranks = len(ranks)
        self.vocab_size = len(ranks) + SPECIALS
        self.config: Mapping[str, Any] = config or {}
        self.special_names = {token: name for name, token in specials.items()}
        self.stop_ids = frozenset(specials[name] for name in _STOP_NAMES if name in specials)
        if not self.stop_ids:
            raise TokenizerError(f"none of the stop tokens {', '.join(_STOP_NAMES)} is in the vocabulary")
        self._bytes = [b""] * self.vocab_size
        for token, rank in ranks.items():
            self._bytes[rank] = token
        for name, token_id in specials.items():
            self._bytes[token_id] = name.encode()
        self._plain = tiktoken.Encoding("k2", pat_str=_PATTERN, mergeable_ranks=ranks, special_tokens={})
        longest_first = sorted(specials, key=len, reverse=True)
        self.special_pattern = re.compile("|".join(map(re.escape, longest_first)))

    @classmethod
    def load(cls, model_dir: str | Path) -> Tokenizer:
        """Read `tiktoken.model` and `tokenizer_config.json`. Raises TokenizerError if they are malformed."""
        vocabulary = read_vocabulary(Path(model_dir))
        return cls(vocabulary.ranks, vocabulary.specials, vocabulary.config)

    @property
    def encoding(self) -> tiktoken.Encoding:
        """The byte-pair tokens, without specials."""
        return self._plain

    def named(self, key: str) -> str | None:
        """The spelling that tokenizer_config.json gives as `bos_token`, `eos_token`, …"""
        return named_token(self.config, key)

    def encode(self, text: str) -> list[int]:
        """Ids of `text` as plain text: never a special. Lone surrogates count as U+FFFD.

        A run of more than 25,000 characters with, or without, any white space is cut into runs of that
        length.
        """
        ids: list[int] = []
        for piece in _bounded_runs(replace_surrogates(text)):
            ids += self._plain.encode_ordinary(piece)
        return ids

    def encode_with_specials(self, text: str) -> list[int]:
        """As `encode`, but spellings of special tokens become their ids. For trusted text only."""
        ids: list[int] = []
        start = 0
        for match in self.special_pattern.finditer(text):
            ids += self.encode(text[start : match.start()])
            ids.append(self.specials[match.group()])
            start = match.end()
        return ids + self.encode(text[start:])

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`, specials by their spelling; bytes that are no UTF-8 become U+FFFD."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")

    def token_bytes(self, token: int) -> bytes:
        """The bytes of one token. Raises TokenizerError where the id is outside the vocabulary."""
        if not 0 <= token < self.vocab_size:
            raise TokenizerError(f"token id {token} is outside the vocabulary of {self.vocab_size}")
        return self._bytes[token]


def replace_surrogates(text: str) -> str:
    r"""`text` with lone surrogates (JSON's \ud800) as U+FFFD, so that it has a UTF-8 form."""
    return text if text.isascii() else _SURROGATE.sub("\ufffd", text)


def _bounded_runs(text: str) -> Iterator[str]:
    start = 0
    for run in _LONG_RUN.finditer(text):
        for cut in range(run.start() + _MAX_RUN_CHARS, run.end(), _MAX_RUN_CHARS):
            yield text[start:cut]
            start = cut
    yield text[start:]
