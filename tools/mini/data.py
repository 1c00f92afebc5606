"""The stream of lessons, all drawn from one seed: drills, conversations with tools, talk."""

from __future__ import annotations

import random
from collections.abc import Mapping

import tiktoken

from k2hybrid.mini_eval.author import Author
from k2hybrid.mini_eval.conversation import Conversation, Turn
from k2hybrid.mini_eval.frames import GET_VERBS
from k2hybrid.mini_eval.split import Side
from k2hybrid.mini_eval.toolbox import Toolset
from k2hybrid.mini_eval.words import Lexicon
from tools.mini.packing import Lesson
from tools.mini.render import ASSISTANT, Example, encode, encode_head
from tools.mini.vocab import N_SPECIAL

# The curriculum: shares of lessons in each stage. A lesson of tools holds several conversations.
STAGES: dict[str, dict[str, float]] = {
    "drills": {"repeat": 0.80, "look_up": 0.12, "first_tool": 0.03, "talk": 0.05},
    "one tool": {
        "repeat": 0.24,
        "look_up": 0.12,
        "member": 0.20,
        "declared": 0.15,
        "first_tool": 0.20,
        "few_tools": 0.03,
        "talk": 0.06,
    },
    "few tools": {
        "repeat": 0.15,
        "look_up": 0.08,
        "member": 0.25,
        "declared": 0.25,
        "served": 0.08,
        "first_tool": 0.08,
        "few_tools": 0.08,
        "talk": 0.03,
    },
    "full mix": {
        "repeat": 0.21,
        "look_up": 0.12,
        "member": 0.09,
        "declared": 0.10,
        "served": 0.02,
        "tools": 0.24,
        "talk": 0.22,
    },
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
                kinds = rng.choices(["one", "none"], [3, 1], k=4)
                made = [self.author.with_tools(rng, toolset, None, k, history_share=0.0) for k in kinds]
                return self._encode(made)
            case "few_tools":
                toolset, system = (
                    self.author.toolset(rng, rng.choice([1, 1, 1, 2, 3])),
                    self.author.system(rng),
                )
                kinds = rng.choices(["one", "parallel", "none"], [6, 2, 2], k=_BRANCHES)
                return self._encode([self.author.with_tools(rng, toolset, system, kind) for kind in kinds])
            case "tools":
                toolset, system = self.author.toolset(rng), self.author.system(rng)
                return self._encode([self.author.with_tools(rng, toolset, system) for _ in range(_BRANCHES)])
            case "declared":
                return self._declared()
            case "member":
                return Lesson([], [self._member() for _ in range(2)])
            case "served":
                return self._served()
            case "talk":
                system = self.author.system(rng)
                return self._encode([self.author.talk(rng, system) for _ in range(_BRANCHES)])
        raise ValueError(f"unknown kind of lesson {kind}")

    def _encode(self, conversations: list[Conversation]) -> Lesson:
        return Lesson(
            encode_head(conversations[0], self.encoding), [encode(c, self.encoding) for c in conversations]
        )

    def _declared(self) -> Lesson:
        """The walk over the declared tools and over the parameters of some, with verdicts that are given.

        What a call must be looked up for, many times a declaration: conversations ask for it once each.
        """
        rng = self.rng
        if rng.random() < 0.6:
            count = rng.randint(3, 10)
            toolset = Toolset(tuple(self.author.small_tool(rng) for _ in range(count)))
        else:
            toolset = self.author.toolset(rng, rng.randint(1, 5))
        walked: list[tuple[str, bool]] = [("<think>", False)]
        for at, tool in enumerate(toolset.tools):
            serves = rng.random() < 0.3
            walked += [(f"{tool.name}:", True), ("yes" if serves else "no", False)]
            walked += [(f" {tool.name}", True)] * serves
            walked.append(("\n", at + 1 < len(toolset.tools)))
        branches = [self._pieces(walked)]
        for tool in rng.sample(toolset.tools, k=min(6, len(toolset.tools))):
            properties = tool.declaration["function"]["parameters"]["properties"]
            pieces = [(f"call {tool.name}", False)]
            for name in sorted(properties):
                given = rng.random() < 0.7
                pieces += [(f" {name}:", True), ("yes" if given else "no", False)]
                if given:
                    pieces += [
                        (f" {name} {properties[name]['type']}", True),
                        (f" {self.lexicon.word(rng)}", False),
                    ]
            branches.append(self._pieces([*pieces, ("</think>", True)]))
        head = Conversation((Turn("", ""),), toolset.declarations, self.author.system(rng))
        return Lesson(encode_head(head, self.encoding), branches)

    def _member(self) -> Example:
        """Some words, then names: one serves where all its words, but for a verb, were among them."""
        rng, lexicon = self.rng, self.lexicon
        words = [lexicon.word(rng) for _ in range(24)]
        words = list(dict.fromkeys(w for w in words if w not in GET_VERBS))
        n = rng.randint(3, 14)
        said, others = words[:n], words[n:]
        asked = f"<|im_user|>user<|im_middle|>{' '.join(said)}<|im_end|>{ASSISTANT}<think>"
        pieces = [(asked, False)]
        for _ in range(rng.randint(3, 9)):
            serves = rng.random() < 0.4
            parts = rng.sample(said, k=rng.randint(1, 3))
            if not serves:
                parts[rng.randrange(len(parts))] = rng.choice(others)
            verb = [rng.choice(GET_VERBS)] if rng.random() < 0.5 else []
            name = rng.choice("___-.").join([*verb, *parts])
            pieces += [(f"{name}:", False), (f"yes {name}\n" if serves else "no\n", True)]
        return self._pieces(pieces)

    def _served(self) -> Lesson:
        """Requests, and of the thinking on each only the walk over the tools and what comes behind it."""
        rng = self.rng
        toolset = self.author.toolset(rng, rng.randint(2, 6))
        branches: list[Example] = []
        for kind in rng.choices(["one", "parallel", "sequential", "none"], [5, 2, 1, 4], k=10):
            turn = self.author.with_tools(rng, toolset, None, kind, history_share=0.0).last
            lines = (turn.steps[0].think if turn.steps else turn.think).split("\n")
            walked, (behind, *_) = lines[: len(toolset.tools)], lines[len(toolset.tools)].split()
            asked = f"<|im_user|>user<|im_middle|>{turn.user}<|im_end|>{ASSISTANT}<think>"
            branches.append(self._pieces([(asked, False), ("\n".join([*walked, behind]), True)]))
        return Lesson(
            encode_head(Conversation((Turn("", ""),), toolset.declarations), self.encoding), branches
        )

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
