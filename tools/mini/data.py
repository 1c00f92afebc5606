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
from tools.mini.declared import Declared
from tools.mini.packing import Lesson
from tools.mini.pieces import Example, Piece, Place, assemble
from tools.mini.render import ASSISTANT, Speaker, encode
from tools.mini.thoughts import call_line, deciding, verdict, walk_line, words_said
from tools.mini.vocab import N_SPECIAL

# The curriculum: shares of lessons in each stage. A lesson of tools holds several conversations.
STAGES: dict[str, dict[str, float]] = {
    "drills": {
        "repeat": 0.45,
        "look_up": 0.12,
        "declared": 0.25,
        "member": 0.08,
        "first_tool": 0.05,
        "talk": 0.05,
    },
    "one tool": {
        "repeat": 0.12,
        "look_up": 0.08,
        "declared": 0.20,
        "member": 0.10,
        "served": 0.04,
        "first_tool": 0.40,
        "talk": 0.06,
    },
    "few tools": {
        "repeat": 0.10,
        "look_up": 0.06,
        "declared": 0.16,
        "member": 0.05,
        "asked": 0.08,
        "served": 0.08,
        "thought": 0.15,
        "first_tool": 0.06,
        "few_tools": 0.16,
        "talk": 0.10,
    },
    "full mix": {
        "repeat": 0.07,
        "look_up": 0.05,
        "declared": 0.08,
        "member": 0.03,
        "asked": 0.12,
        "served": 0.08,
        "thought": 0.25,
        "few_tools": 0.03,
        "tools": 0.14,
        "talk": 0.18,
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
        self.nothing = Declared(encoding)
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
                kinds = rng.choices(["one", "none"], [3, 2], k=5)
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
            case "asked":
                return Lesson([], [self._asked() for _ in range(3)])
            case "served":
                return self._served()
            case "thought":
                return self._thought()
            case "talk":
                system = self.author.system(rng)
                return self._encode([self.author.talk(rng, system) for _ in range(_BRANCHES)])
        raise ValueError(f"unknown kind of lesson {kind}")

    def _encode(self, conversations: list[Conversation]) -> Lesson:
        declared = Declared(self.encoding, conversations[0])
        return Lesson(declared.ids, [encode(c, declared) for c in conversations], declared.guides)

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
        head = Conversation((Turn("", ""),), toolset.declarations, self.author.system(rng))
        declared = Declared(self.encoding, head)
        walked = [Piece("<think>")]
        current = 0
        for tool in toolset.tools:
            walked += walk_line(declared, tool.name, rng.random() < 0.3, "", current)
            walked.append(Piece("\n", True))
            current = declared.ends[tool.name, None]
        walked.append(
            Piece("No tool fits." if all(p.text != "yes" for p in walked) else "call ", True, current=current)
        )
        lines = [walked]
        for tool in rng.sample(toolset.tools, k=min(6, len(toolset.tools))):
            given = {p.name: True for p in tool.parameters if rng.random() < 0.7}
            line = [*call_line(declared, tool.name, given, 0, ""), Piece("</think>", True)]
            lines.append([Piece(p.text) if i < 3 else p for i, p in enumerate(line)])
        branches = [assemble(map(self._given, line), declared) for line in lines]
        return Lesson(declared.ids, branches, declared.guides)

    def _given(self, piece: Piece) -> Piece:
        """What a drill does not ask for: verdicts, and values, for which any word stands."""
        if piece.text in ("yes", "no"):
            return Piece(piece.text)
        return Piece(self.lexicon.word(self.rng)) if piece.text == "true" else piece

    def _member(self) -> Example:
        """Some words, then names: one serves where all its words, but for a verb, were among them."""
        rng, lexicon = self.rng, self.lexicon
        words = [lexicon.word(rng) for _ in range(24)]
        words = list(dict.fromkeys(w for w in words if w not in GET_VERBS))
        n = rng.randint(3, 14)
        said, others = words[:n], words[n:]
        user = " ".join(said)
        pieces = [
            Piece("<|im_user|>user<|im_middle|>"),
            Piece(user, opens="user"),
            Piece(f"<|im_end|>{ASSISTANT}<think>"),
        ]
        for _ in range(rng.randint(3, 9)):
            serves = rng.random() < 0.4
            parts = rng.sample(said, k=rng.randint(1, 3))
            if not serves:
                parts[rng.randrange(len(parts))] = rng.choice(others)
            verb = [rng.choice(GET_VERBS)] if rng.random() < 0.5 else []
            name = rng.choice("___-.").join([*verb, *parts])
            heard = words_said(name, user)
            pieces += [Piece(name, words=heard), Piece(":")]
            decides = deciding(name, heard, serves=serves)
            if serves:
                at = Place(("user",), text=parts[-1])
                pieces += [Piece("yes", True, gathers=decides, evidence=at), Piece(f" {name}\n", True)]
            else:
                pieces += [Piece("no", True, gathers=decides), Piece("\n", True)]
        return assemble(pieces, self.nothing)

    def _asked(self) -> Example:
        """A request in everyday words, then names of everyday tools, one of which serves."""
        rng = self.rng
        tools = [self.author.everyday_tool(rng) for _ in range(rng.randint(3, 7))]
        asked = rng.choice(tools)
        user = self.author.request(rng, asked)
        pieces = [
            Piece("<|im_user|>user<|im_middle|>"),
            Piece(user, opens="user"),
            Piece(f"<|im_end|>{ASSISTANT}<think>"),
        ]
        for tool in {tool.want: tool for tool in [*tools, asked]}.values():
            words = words_said(tool.name, user)
            pieces += [Piece(tool.name, words=words), Piece(":")]
            pieces += verdict(tool.declaration["function"], words, user, serves=tool is asked)
            pieces.append(Piece(f" {tool.name}\n" if tool is asked else "\n"))
        return assemble(pieces, self.nothing)

    def _served(self) -> Lesson:
        """Requests, and of the thinking on each only the walk over the tools and what comes behind it."""
        rng = self.rng
        toolset = self.author.toolset(rng, rng.randint(2, 6))
        declared = Declared(self.encoding, Conversation((Turn("", ""),), toolset.declarations))
        branches: list[Example] = []
        for kind in rng.choices(["one", "parallel", "sequential", "none"], [5, 2, 1, 4], k=10):
            made = self.author.with_tools(rng, toolset, None, kind, history_share=0.0)
            pieces = Speaker(declared, made).pieces(steps=None)
            began = next(i for i, piece in enumerate(pieces) if piece.opens == "think")
            lines = [i for i, piece in enumerate(pieces) if i > began and piece.text == "\n"]
            branches.append(assemble(pieces[: lines[len(toolset.tools) - 1] + 2], declared))
        return Lesson(declared.ids, branches, declared.guides)

    def _thought(self) -> Lesson:
        """Conversations up to the first call, which is a copy of what was thought, or up to the answer."""
        rng = self.rng
        toolset, system = self.author.toolset(rng), self.author.system(rng)
        made = [self.author.with_tools(rng, toolset, system) for _ in range(_BRANCHES)]
        declared = Declared(self.encoding, made[0])
        branches: list[Example] = []
        for conversation in made:
            pieces = Speaker(declared, conversation).pieces(steps=None)
            thought = next(i for i, piece in enumerate(pieces) if piece.learn and piece.text == "</think>")
            branches.append(assemble(pieces[: thought + 1], declared))
        return Lesson(declared.ids, branches, declared.guides)

    def _repeat(self) -> Example:
        """A random sequence that comes back, at once or at random distances; learnt from its second token."""
        rng = self.rng
        # Few different tokens make it easy to see that what comes was there before; many make it exact.
        alphabet = rng.choices(self.drilled, k=int(2 ** rng.uniform(3, 9)))
        spread = rng.random() < 0.5
        sequence = rng.choices(alphabet, k=rng.randint(3, 40 if spread else 24))
        ids: list[int] = []
        learn: list[bool] = []
        pairs: list[tuple[int, int]] = []
        before = 0
        for time in range(rng.randint(2, 4) if spread else 2 + 100 // len(sequence)):
            filler = rng.choices(alphabet, k=int(rng.random() ** 2 * 150)) if spread else []
            start = len(ids) + len(filler)
            if time:
                pairs += [(start + i - 1, before + i) for i in range(1, len(sequence))]
            before = start
            ids += filler + sequence
            learn += [False] * len(filler) + [time > 1 and not filler] + [time > 0] * (len(sequence) - 1)
        return Example(ids, learn, {"copy": pairs})

    def _look_up(self) -> Example:
        """Key → value pairs in text, then some of the keys again; their values are learnt."""
        rng, lexicon = self.rng, self.lexicon
        pairs = {lexicon.word(rng): str(lexicon.value(rng)) for _ in range(rng.randint(2, 12))}
        mark = rng.choice([": ", "=", " is ", '": "', " -> "])
        end = rng.choice(["\n", ", ", ". ", '", "', ";"])
        pieces = [Piece("".join(f"{k}{mark}{v}{end}" for k, v in pairs.items()), opens="user")]
        for key in rng.sample(list(pairs), k=min(len(pairs), rng.randint(2, 6))):
            source = Place(("user",), f"{key}{mark}")
            pieces += [Piece(f"{key}{mark}"), Piece(f"{pairs[key]}{end}", True, source)]
        return assemble(pieces, self.nothing)
