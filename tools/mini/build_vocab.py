"""Learns the vocabulary from the published words and from the trainer's own conversations."""

from __future__ import annotations

import collections
import random
from pathlib import Path

from k2hybrid.mini_eval.author import Author
from k2hybrid.mini_eval.conversation import tools_json
from k2hybrid.mini_eval.words import CITIES, PEOPLE, Lexicon
from tools.mini import vocab


def learn(words: list[str], n_lessons: int = 1500) -> list[bytes]:
    """Ranks of the small vocabulary; `words` are most frequent first."""
    counts: dict[str, float] = collections.defaultdict(float)
    for position, word in enumerate(words):
        weight = 2000.0 / (position + 300)
        counts[word] += weight
        counts[word.capitalize()] += 0.3 * weight
    for name in CITIES + PEOPLE:
        counts[name] += 0.5
    author, rng = Author(Lexicon(words, "train")), random.Random(0)
    for _ in range(n_lessons):
        toolset, system = author.toolset(rng), author.system(rng)
        conversations = [author.with_tools(rng, toolset, system) for _ in range(3)]
        conversations += [author.talk(rng, system) for _ in range(2)]
        spoken = [tools_json(toolset.declarations), system or "", "functions Return of"]
        for turn in (c.last for c in conversations):
            spoken += [turn.user, turn.answer, turn.think]
            spoken += [step.think for step in turn.steps]
            spoken += [text for call in turn.calls for text in (call.arguments_json, call.result)]
        for run in vocab.letter_runs("\n".join(spoken)):
            counts[run] += 0.03
    return vocab.learn_ranks(counts)


def write(words: list[str], folder: Path) -> None:
    """Write `tiktoken.model` and `tokenizer_config.json` into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    ranks = learn(words)
    vocab.write_ranks(ranks, folder / "tiktoken.model")
    vocab.write_json(vocab.tokenizer_config(len(ranks)), folder / "tokenizer_config.json")
