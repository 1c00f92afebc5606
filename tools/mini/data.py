"""The stream of lessons, all drawn from one seed: drills, conversations with tools, talk."""

from __future__ import annotations

import random
from collections.abc import Mapping

import tiktoken

from k2hybrid.mini_eval.author import Author
from k2hybrid.mini_eval.conversation import Conversation, Turn
from k2hybrid.mini_eval.split import Side
from k2hybrid.mini_eval.toolbox import Toolset
from k2hybrid.mini_eval.words import Lexicon
from tools.mini.packing import Lesson
from tools.mini.render import Example, encode, encode_head
from tools.mini.vocab import N_SPECIAL

# The curriculum: shares of lessons in each stage. A lesson of tools holds several conversations.
STAGES: dict[str, dict[str, float]] = {
    "drills": {"repeat": 0.80, "look_up": 0.12, "first_tool": 0.03, "talk": 0.05},
    "one tool": {"repeat": 0.15, "look_up": 0.25, "first_tool": 0.45, "talk": 0.15},
    "few tools": {
        "repeat": 0.08,
        "look_up": 0.12,
        "declared": 0.12,
        "first_tool": 0.13,
        "few_tools": 0.45,
        "talk": 0.10,
    },
    "full mix": {"repeat": 0.08, "look_up": 0.14, "declared": 0.12, "tools": 0.27, "talk": 0.12},
}
_BRANCHES = 6


class Lessons:
    """Draws lessons of one side of the split from a seeded generator."""

    def __init__(
        self, encoding: tiktoken.Encoding, words: list[str], seed: int, side: Side = "train"
    ) -> None:
        self.encoding = encoding
        self.lexicon = Lexicon(words, side)
        self.author = Author(self.lexicon)
        self.rng = random.Random(seed)
        ranks = range(encoding.n_vocab - N_SPECIAL)
        merged = [t for t in ranks if len(encoding.decode_single_token_bytes(t)) > 1]
        self.drilled = merged + [t for t in ranks if t < 256]

    def draw(self, shares: Mapping[str, float]) -> Lesson:
        """One lesson of a kind chosen by `shares`."""
        return self.lesson(self.rng.choices(list(shares), list(shares.values()))[0])

    def lesson(self, kind: str) -> Lesson:
        """One lesson of a kind that `STAGES` names."""
        rng = self.rng
        match kind:
            case "repeat":
                return Lesson([], [self._repeat()])
            case "look_up":
                return Lesson([], [self._look_up() for _ in range(2)])
            case "first_tool":
                toolset = Toolset((self.author.first_tool(rng),))
                made = [
                    self.author.with_tools(rng, toolset, None, "one", history_share=0.0) for _ in range(4)
                ]
                return self._encode(made)
            case "few_tools":
                toolset, system = self.author.toolset(rng, rng.randint(1, 3)), self.author.system(rng)
                kinds = rng.choices(["one", "parallel", "none"], [6, 2, 2], k=_BRANCHES)
                return self._encode([self.author.with_tools(rng, toolset, system, kind) for kind in kinds])
            case "tools":
                toolset, system = self.author.toolset(rng), self.author.system(rng)
                return self._encode([self.author.with_tools(rng, toolset, system) for _ in range(_BRANCHES)])
            case "declared":
                return self._declared()
            case "talk":
                system = self.author.system(rng)
                return self._encode([self.author.talk(rng, system) for _ in range(_BRANCHES)])
        raise ValueError(f"unknown kind of lesson {kind}")

    def _encode(self, conversations: list[Conversation]) -> Lesson:
        return Lesson(
            encode_head(conversations[0], self.encoding), [encode(c, self.encoding) for c in conversations]
        )

    def _declared(self) -> Lesson:
        """Each declared tool's name after its description, and its parameters after its name.

        What a call must be looked up for, many times a declaration: conversations ask for it once each.
        """
        rng = self.rng
        toolset = self.author.toolset(rng, rng.randint(1, 8))
        branches: list[Example] = []
        for made, tool in enumerate(rng.sample(toolset.tools, k=len(toolset.tools))):
            function = tool.declaration["function"]
            if "description" in function:
                asked = f"<think>{function['description'].rstrip('.')}: I call "
                branches.append(self._pieces([(asked, False), (f"{tool.name}.", True)]))
            opening = f"<|tool_call_begin|>functions.{tool.name}:{made}<|tool_call_argument_begin|>"
            pieces = [(opening, False), ("{", True)]
            for at, name in enumerate(sorted(function["parameters"]["properties"])):
                schema = function["parameters"]["properties"][name]
                value = {"integer": "1", "number": "2.5", "boolean": "true", "array": "[", "object": "{"}
                shown = value.get(schema["type"], '"')
                pieces.append((f'{", " if at else ""}"{name}": {shown}', True))
                pieces.append(({"[": "]", "{": "}", '"': f'{self.lexicon.word(rng)}"'}.get(shown, ""), False))
            branches.append(self._pieces([*pieces, ("}", True)]))
        head = Conversation((Turn("", ""),), toolset.declarations, self.author.system(rng))
        return Lesson(encode_head(head, self.encoding), branches)

    def _pieces(self, pieces: list[tuple[str, bool]]) -> Example:
        ids: list[int] = []
        learn: list[bool] = []
        for text, learnt in pieces:
            piece = self.encoding.encode(text, allowed_special="all")
            ids += piece
            learn += [learnt] * len(piece)
        return Example(ids, learn)

    def _repeat(self) -> Example:
        """A random sequence that comes back, at once or at random distances; learnt from its second token."""
        rng = self.rng
        # Few different tokens make it easy to see that what comes was there before; many make it exact.
        alphabet = rng.choices(self.drilled, k=int(2 ** rng.uniform(3, 9)))
        spread = rng.random() < 0.5
        sequence = rng.choices(alphabet, k=rng.randint(3, 40 if spread else 24))
        ids: list[int] = []
        learn: list[bool] = []
        for time in range(rng.randint(2, 4) if spread else 2 + 100 // len(sequence)):
            filler = rng.choices(alphabet, k=int(rng.random() ** 2 * 150)) if spread else []
            ids += filler + sequence
            learn += [False] * len(filler) + [time > 1 and not filler] + [time > 0] * (len(sequence) - 1)
        return Example(ids, learn)

    def _look_up(self) -> Example:
        """Key → value pairs in text, then some of the keys again; their values are learnt."""
        rng, lexicon = self.rng, self.lexicon
        pairs = {lexicon.word(rng): str(lexicon.value(rng)) for _ in range(rng.randint(2, 12))}
        mark = rng.choice([": ", "=", " is ", '": "', " -> "])
        end = rng.choice(["\n", ", ", ". ", '", "', ";"])
        ids: list[int] = self.encoding.encode_ordinary(
            "".join(f"{k}{mark}{v}{end}" for k, v in pairs.items())
        )
        learn = [False] * len(ids)
        for key in rng.sample(list(pairs), k=min(len(pairs), rng.randint(2, 6))):
            for text, learnt in ((f"{key}{mark}", False), (f"{pairs[key]}{end}", True)):
                piece = self.encoding.encode_ordinary(text)
                ids += piece
                learn += [learnt] * len(piece)
        return Example(ids, learn)
