"""The words of a request that decide something which their neighbours' names do not say.

`How far is it from Oslo to Rome?` asks for `get_distance`: of the words in the domain's frames `far` occurs
in the fewest other domains. `without icons` and `icons off` turn the same switch.
"""

from __future__ import annotations

import collections
import re
from typing import Any

from k2hybrid.mini_eval.domains import DOMAINS
from k2hybrid.mini_eval.everyday_frames import MORE_FRAMES
from k2hybrid.mini_eval.toolbox import spoken_name
from tools.mini.pieces import Place

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


_ON = frozenset(
    "on true yes enabled enable active allowed allow want wanted use using with including keep".split()
)
_OFF = frozenset(
    "off false no not don't without disabled disable inactive deactivated deactivate skip omit exclude "
    "excluding leave".split()
)
_NEAR = 4  # words between a switch and its name, at most


def switch(name: str, user: str, value: bool) -> Place | None:
    """The word that turns the boolean parameter `name` to `value`, behind it or before, if there is one."""
    words = list(re.finditer(r"\w+(?:'t)?", user))
    telling = _ON if value else _OFF
    for said in dict.fromkeys((spoken_name(name), name)):
        for mention in re.finditer(rf"(?<!\w){re.escape(said)}(?!\w)", user, re.I):
            behind = [word for word in words if word.start() >= mention.end()][:_NEAR]
            before = [word for word in words if word.end() <= mention.start()][: -_NEAR - 1 : -1]
            for word in (*behind, *before):
                if word[0].lower() not in telling:
                    continue
                if word.start() > mention.start():
                    return Place(("user",), before=user[mention.start() : word.start()], text=word[0])
                return Place(("user",), after=user[word.end() : mention.end()], text=word[0])
    return None
