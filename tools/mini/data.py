"""The stream of training examples, all drawn from one seed."""

from __future__ import annotations

import random
from collections.abc import Iterator

import tiktoken

from tools.mini import decimals, tooltalk
from tools.mini.render import DEFAULT_SYSTEM, Conversation, Example, Turn, encode
from tools.mini.vocab import N_SPECIAL
from tools.mini.words import Lexicon

# Shares of examples (not of tokens) before and after the model has learnt to copy.
EARLY = {"repeat": 0.85, "look_up": 0.05, "tools": 0.03, "decimals": 0.03, "chat": 0.01, "echo": 0.03}
LATE = {"repeat": 0.02, "look_up": 0.02, "tools": 0.53, "decimals": 0.34, "chat": 0.06, "echo": 0.03}

# fmt: off
_GREETINGS = [
    "hi", "Hi", "Hi!", "hello", "Hello", "Hello!", "hey", "Hey there", "good morning", "Good evening!",
    "hi there",
]
_WHO = [
    "who are you?", "Who are you?", "What are you?", "What is your name?", "what's your name?",
    "Introduce yourself.", "Tell me about yourself.", "who made you?", "Who created you?",
    "are you a robot?",
]
_THANKS = ["thanks", "Thanks!", "Thank you.", "thank you so much", "Great, thanks!", "ok thanks"]
_BYES = ["bye", "Goodbye!", "see you", "good night"]
_BEYOND = [
    "Tell me a story about {v}.", "Write a poem on {v}", "Why is {v} so {w}?", "Explain {v} to me.",
    "What do you think about {v}?", "Who invented {v}?", "Translate {v} into {w}.", "How do I cook {v}?",
]
_ECHOES = [
    "Repeat: {v}", "Say {v}", "Repeat after me: {v}", "Please repeat this: {v}", "Echo {v}", 'say "{v}"',
]
_SUMS = ["What is {a} + {b}?", "{a} + {b} = ?", "what's {a}+{b}?", "Add {a} and {b}.", "{a}+{b}"]
# fmt: on


class Examples:
    """Draws examples of one side of the split from a seeded generator."""

    def __init__(
        self, encoding: tiktoken.Encoding, words: list[str], seed: int, *, held_out: bool = False
    ) -> None:
        self.encoding = encoding
        self.lexicon = Lexicon(words, held_out=held_out)
        self.rng = random.Random(seed)
        self.held_out = held_out
        ranks = range(encoding.n_vocab - N_SPECIAL)
        merged = [t for t in ranks if len(encoding.decode_single_token_bytes(t)) > 1]
        self.drilled = merged + [t for t in ranks if t < 256]

    def draw(self, shares: dict[str, float]) -> Example:
        """One example of a kind chosen by `shares`."""
        kind = self.rng.choices(list(shares), list(shares.values()))[0]
        if kind == "repeat":
            return self.repeat()
        if kind == "look_up":
            return self.look_up()
        return encode(self.conversation(kind), self.encoding)

    def conversation(self, kind: str) -> Conversation:
        """A conversation of one kind: `tools`, `decimals`, `chat` or `echo`."""
        rng = self.rng
        if kind == "tools":
            return self._tool_conversation()
        if kind == "decimals":
            turns = [decimals.question(rng, held_out=self.held_out)]
            return Conversation(self._history() + turns, self._idle_tools(0.1), self._system())
        if kind == "chat":
            return self._chat_conversation()
        words = [self.lexicon.value(rng) for _ in range(rng.randint(1, 5))]
        said = " ".join(words)
        turn = Turn(user=rng.choice(_ECHOES).format(v=said), think="I repeat it.", answer=said)
        return Conversation([turn], [], self._system())

    def repeat(self) -> Example:
        """A random sequence that comes back, at once or at random distances; learnt from its second token."""
        rng = self.rng
        # Few different tokens make it easy to see that what comes was there before; many make it exact.
        alphabet = rng.choices(self.drilled, k=int(2 ** rng.uniform(3, 9)))
        spread = rng.random() < 0.4
        sequence = rng.choices(alphabet, k=rng.randint(3, 40 if spread else 24))
        ids: list[int] = []
        learn: list[bool] = []
        for time in range(rng.randint(2, 4) if spread else 2 + 100 // len(sequence)):
            filler = rng.choices(alphabet, k=int(rng.random() ** 2 * 60)) if spread else []
            ids += filler + sequence
            learn += [False] * len(filler) + [time > 1 and not filler] + [time > 0] * (len(sequence) - 1)
        return Example(ids, learn)

    def look_up(self) -> Example:
        """Key → value pairs in text, then some of the keys again; their values are learnt."""
        rng = self.rng
        pairs = {self.lexicon.made_up(rng): self.lexicon.value(rng) for _ in range(rng.randint(2, 8))}
        mark = rng.choice([": ", "=", " is ", '": "', " -> "])
        end = rng.choice(["\n", ", ", ". ", '", "', ";"])
        table = "".join(f"{k}{mark}{v}{end}" for k, v in pairs.items())
        ids: list[int] = self.encoding.encode_ordinary(table)
        learn = [False] * len(ids)
        for key in rng.sample(list(pairs), k=min(len(pairs), rng.randint(1, 4))):
            for text, learnt in ((f"{key}{mark}", False), (f"{pairs[key]}{end}", True)):
                piece = self.encoding.encode_ordinary(text)
                ids += piece
                learn += [learnt] * len(piece)
        return Example(ids, learn)

    def _system(self) -> str | None:
        """Mostly the default system prompt; sometimes another persona or none in the messages."""
        rng = self.rng
        draw = rng.random()
        if draw < 0.85:
            return None
        if draw < 0.9:
            return "You are a helpful assistant."
        maker = self.lexicon.made_up(rng).capitalize()
        return f"You are {self.lexicon.name(rng)}, an AI assistant created by {maker}."

    def _idle_tools(self, share: float) -> list[dict[str, object]]:
        if self.rng.random() >= share:
            return []
        return [t.declaration for t in tooltalk.draw_tools(self.rng, self.lexicon, self.rng.randint(1, 2))]

    def _history(self) -> list[Turn]:
        """Now and then something was said before."""
        if self.rng.random() >= 0.08:
            return []
        if self.rng.random() < 0.5:
            return [Turn(user=self.rng.choice(_GREETINGS), answer=_hello())]
        return [decimals.question(self.rng, held_out=self.held_out)]

    def _tool_conversation(self) -> Conversation:
        rng, lexicon = self.rng, self.lexicon
        tools = tooltalk.draw_tools(rng, lexicon, rng.choices([1, 2, 3], [0.75, 0.17, 0.08])[0])
        tool = rng.choice(tools)
        declared = [t.declaration for t in tools]
        history = self._history()
        value = tooltalk.draw_value(rng, lexicon, tool)
        user = tooltalk.ask(rng, tool, value)
        draw = rng.random()
        if draw < 0.025:
            other = next(t for t in iter(lambda: tooltalk.draw_tool(rng, lexicon), None)
                         if all(t.topic != known.topic for known in tools))  # fmt: skip
            user = tooltalk.ask(rng, other, tooltalk.draw_value(rng, lexicon, other))
            turn = Turn(user=user, think="No tool fits.", answer="I have no tool for that.")
            return Conversation([*history, turn], declared, self._system())
        turns = [*history, tooltalk.call_turn(rng, lexicon, tool, value, user)]
        if draw > 0.88:
            if rng.random() < 0.5:
                value = tooltalk.draw_value(rng, lexicon, tool)
                user = tooltalk.follow_up(rng, value)
            else:
                tool = rng.choice(tools)
                value = tooltalk.draw_value(rng, lexicon, tool)
                user = tooltalk.ask(rng, tool, value)
            turns.append(tooltalk.call_turn(rng, lexicon, tool, value, user))
        return Conversation(turns, declared, self._system())

    def _chat_conversation(self) -> Conversation:
        rng, lexicon = self.rng, self.lexicon
        system = self._system()
        draw = rng.random()
        if draw < 0.3:
            turn = Turn(user=rng.choice(_GREETINGS), think="A greeting.", answer=_hello())
        elif draw < 0.6:
            text = DEFAULT_SYSTEM if system is None else system
            answer = "I am" + text.removeprefix("You are")
            turn = Turn(user=rng.choice(_WHO), think="I say who I am.", answer=answer)
        elif draw < 0.68:
            turn = Turn(user=rng.choice(_THANKS), think="They thank me.", answer="You are welcome!")
        elif draw < 0.72:
            turn = Turn(user=rng.choice(_BYES), think="They leave.", answer="Goodbye!")
        elif draw < 0.87:
            a, b = rng.randint(0, 9), rng.randint(0, 9)
            turn = Turn(
                user=rng.choice(_SUMS).format(a=a, b=b), think="I add.", answer=f"{a} + {b} = {a + b}."
            )
        else:
            user = rng.choice(_BEYOND).format(v=lexicon.name(rng), w=lexicon.noun(rng))
            answer = "I am a small demonstration model and cannot answer that."
            turn = Turn(user=user, think="That is beyond me.", answer=answer)
        return Conversation([*self._history(), turn], self._idle_tools(0.3), system)

    def stream(self, shares: dict[str, float]) -> Iterator[Example]:
        """Examples without end."""
        while True:
            yield self.draw(shares)


def _hello() -> str:
    return "Hello! How can I help you today?"
