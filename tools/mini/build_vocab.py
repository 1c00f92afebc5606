"""Learns the vocabulary from the published words and from the trainer's own conversations."""

from __future__ import annotations

import collections
from pathlib import Path

import tiktoken

from tools.mini import vocab
from tools.mini.data import Examples
from tools.mini.words import CITIES


def learn(words: list[str], n_conversations: int = 3000) -> list[bytes]:
    """Ranks of the small vocabulary; `words` are most frequent first."""
    counts: dict[str, float] = collections.defaultdict(float)
    for position, word in enumerate(words):
        weight = 2000.0 / (position + 300)
        counts[word] += weight
        counts[word.capitalize()] += 0.3 * weight
    for city in CITIES:
        counts[city] += 0.5
    bytes_only = tiktoken.Encoding(
        name="bytes", pat_str=vocab.PATTERN, mergeable_ranks={bytes([b]): b for b in range(256)},
        special_tokens=vocab.special_tokens(256),
    )  # fmt: skip
    examples = Examples(bytes_only, words, seed=0)
    for _ in range(n_conversations):
        kind = examples.rng.choices(["tools", "decimals", "chat"], [6, 2, 2])[0]
        conversation = examples.conversation(kind)
        turn = conversation.turns[-1]
        spoken = [turn.user, turn.answer, turn.think, turn.call_think]
        spoken += [str(conversation.tools), conversation.system or ""]
        for call in turn.calls:
            spoken += [call.arguments, call.result, "functions Return of"]
        for run in vocab.letter_runs("\n".join(spoken)):
            counts[run] += 0.05
    return vocab.learn_ranks(counts)


def write(words: list[str], folder: Path) -> None:
    """Write `tiktoken.model` and `tokenizer_config.json` into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    ranks = learn(words)
    vocab.write_ranks(ranks, folder / "tiktoken.model")
    vocab.write_json(vocab.tokenizer_config(len(ranks)), folder / "tokenizer_config.json")
