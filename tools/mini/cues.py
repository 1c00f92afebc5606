"""The word of a request that tells which everyday tool it asks for, where the tool's name was not said.

`How far is it from Oslo to Rome?` asks for `get_distance`: of the words in the domain's frames `far` occurs
in the fewest other domains.
"""

from __future__ import annotations

import collections
import re
from typing import Any

from k2hybrid.mini_eval.domains import DOMAINS
from k2hybrid.mini_eval.everyday_frames import MORE_FRAMES

_WORDS = re.compile(r"[a-z]+|[*+]")
_MOST = 6  # of domains in whose frames a cue may occur


def _words(frames: tuple[str, ...]) -> set[str]:
    return {word for frame in frames for word in _WORDS.findall(re.sub(r"\{\w+\}", " ", frame).lower())}


_FRAME_WORDS = [_words((*domain.frames, *MORE_FRAMES[domain.names[0]])) for domain in DOMAINS]
_SPREAD = collections.Counter(word for words in _FRAME_WORDS for word in words)


def cue(function: dict[str, Any], user: str) -> str | None:
    """The most telling word of `user`, as it is spelt there; None where the tool is no everyday one."""
    name, description = function["name"], function.get("description")
    known = [
        words
        for domain, words in zip(DOMAINS, _FRAME_WORDS, strict=True)
        if name in domain.names or description in domain.descriptions
    ]
    said = re.findall(r"[A-Za-z]+|[*+]", user)
    telling = [
        (_SPREAD[word.lower()], at, word)
        for at, word in enumerate(said)
        if any(word.lower() in words for words in known) and _SPREAD[word.lower()] <= _MOST
    ]
    return min(telling)[2] if telling else None
