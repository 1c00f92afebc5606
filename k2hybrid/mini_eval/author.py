"""Writes conversations of one side of the split: with tools of every kind, and without."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace

from k2hybrid.mini_eval import decimals, frames, thinking
from k2hybrid.mini_eval.conversation import DEFAULT_SYSTEM, Call, Conversation, Step, Turn
from k2hybrid.mini_eval.dealt import listed
from k2hybrid.mini_eval.requests import Request, Requests
from k2hybrid.mini_eval.toolbox import Tool, Toolbox, Toolset
from k2hybrid.mini_eval.words import Lexicon

# How many tools are declared together, and how often; talk has none.
_SIZES, _SIZE_WEIGHTS = (1, 2, 3, 4, 5, 6, 7, 8), (30, 14, 12, 10, 10, 9, 8, 7)

# Tools that serve what is otherwise answered, or refused, without one.
_ADDING, _EXPLAINING = {"sum"}, {"definition", "recipe", "search"}


class Author:
    """Draws toolsets, and conversations over them."""

    def __init__(self, lexicon: Lexicon) -> None:
        self.lexicon = lexicon
        self._toolbox = Toolbox(lexicon)
        self._requests = Requests(lexicon)
        side = self._side = lexicon.side
        self._both, self._chains = listed(side, "BOTH"), listed(side, "CHAINS")
        self._bare = listed(side, "BARE_QUERIES")
        self._talk: dict[str, tuple[str, ...]] = {
            name.lower(): listed(side, name)
            for name in (
                "GREETINGS",
                "WHO",
                "THANKS",
                "BYES",
                "BEYOND",
                "ECHOES",
                "SUMS",
                "FACTS",
                "ABOUT_FACTS",
                "INTROS",
            )
        }

    # ---- what a conversation stands on ---------------------------------------------------------------------

    def toolset(self, rng: random.Random, count: int | None = None) -> Toolset:
        """One to eight tools (or `count`)."""
        return self._toolbox.toolset(rng, count or rng.choices(_SIZES, _SIZE_WEIGHTS)[0])

    def first_tool(self, rng: random.Random) -> Tool:
        """A tool with one parameter, to begin with."""
        while True:
            tool = self._toolbox.tool(rng)
            if len(tool.parameters) == 1:
                return tool

    def everyday_tool(self, rng: random.Random) -> Tool:
        """A tool that people ask for in words of their own."""
        return self._toolbox.everyday(rng)

    def request(self, rng: random.Random, tool: Tool) -> str:
        """One request for a tool."""
        return self._requests.one(rng, tool).text

    def small_tool(self, rng: random.Random) -> Tool:
        """A tool of random words with a short declaration, for drills."""
        return self._toolbox.small(rng)

    def system(self, rng: random.Random) -> str | None:
        """Mostly the default; sometimes a plain assistant, another persona, or a persona with a rule."""
        draw = rng.random()
        if draw < 0.72:
            return None
        if draw < 0.82:
            return "You are a helpful assistant."
        maker = self.lexicon.word(rng).capitalize()
        persona = f"You are {self.lexicon.person(rng)}, an AI assistant created by {maker}."
        if draw < 0.92:
            return persona
        rule = rng.choice(
            [
                "Use the tools.",
                "Be brief.",
                "Answer in one sentence.",
                "Today is {d}.",
                "The user is {n}.",
                "You help with {w}.",
            ]
        )
        return (
            f"{persona} {rule}".replace("{d}", self.lexicon.date(rng))
            .replace("{n}", self.lexicon.person(rng))
            .replace("{w}", self.lexicon.word(rng))
        )

    # ---- conversations with tools --------------------------------------------------------------------------

    def with_tools(
        self,
        rng: random.Random,
        toolset: Toolset,
        system: str | None,
        kind: str | None = None,
        *,
        history_share: float = 0.18,
    ) -> Conversation:
        """A conversation over `toolset` whose last turn is of `kind`; any kind where it is None."""
        history: list[Turn] = []
        last: Request | None = None
        if rng.random() < history_share:
            for _ in range(rng.choice([1, 1, 2])):
                turn, last, _ = self._any_turn(
                    rng, toolset, system, rng.choice(["one", "one", "none", "parallel"])
                )
                history.append(turn)
        if last is not None and kind in (None, "one") and rng.random() < 0.4:
            following = self._requests.follow_up(rng, last)
            if following is not None:
                turn = self._call_turn(rng, toolset, following.text, [following])
                return Conversation(
                    (*history, turn), toolset.declarations, system, following.types, "follow-up"
                )
        chained = 18 if toolset.chain else 0
        drawn = kind or rng.choices(["one", "parallel", "sequential", "none"], [42, 16, chained, 42])[0]
        turn, _, types = self._any_turn(rng, toolset, system, drawn)
        return Conversation((*history, turn), toolset.declarations, system, types, turn.kind)

    def _any_turn(
        self, rng: random.Random, toolset: Toolset, system: str | None, kind: str
    ) -> tuple[Turn, Request | None, frozenset[str]]:
        if kind == "sequential" and toolset.chain is None:
            kind = "one"
        if kind == "none":
            return self._idle_turn(rng, toolset, system), None, frozenset()
        if kind == "sequential" and toolset.chain is not None:
            return self._chain_turn(rng, toolset, toolset.chain), None, frozenset({"string"})
        if kind == "parallel":
            text, requests = self._parallel(rng, toolset)
            types = frozenset().union(*(r.types for r in requests))
            return self._call_turn(rng, toolset, text, requests), None, types
        request = self._requests.one(rng, rng.choice(toolset.tools))
        return self._call_turn(rng, toolset, request.text, [request]), request, request.types

    def _parallel(self, rng: random.Random, toolset: Toolset) -> tuple[str, list[Request]]:
        count = 3 if rng.random() < 0.25 else 2
        if rng.random() < 0.55 or len(toolset.tools) == 1:
            for tool in rng.sample(toolset.tools, k=len(toolset.tools)):
                drawn = self._requests.several(rng, tool, count)
                if drawn is not None:
                    return drawn
        first, second = (self._requests.plain(rng, rng.choice(toolset.tools)) for _ in range(2))
        if second.tool is first.tool and second.arguments == first.arguments:
            return first.text, [first]
        a, b = first.text.rstrip(".?! "), second.text
        if not b.startswith(second.about or "\0") and b[1:2].islower():
            b = b[0].lower() + b[1:]
        return rng.choice(self._both).format(a=a, b=b), [first, second]

    def _call_turn(self, rng: random.Random, toolset: Toolset, text: str, requests: list[Request]) -> Turn:
        """The calls in the order of the tools, which is that of the thinking."""
        requests = sorted(requests, key=lambda request: toolset.tools.index(request.tool))
        calls: list[Call] = []
        sentences: list[str] = []
        told: list[str] = []
        for request in requests:
            result, sentence, values = self._result(rng, request.tool.want, request.about)
            calls.append(Call(request.tool.name, request.arguments, result))
            sentences.append(sentence)
            told += values
        lines = [thinking.call_line(r.tool, r.arguments) for r in requests]
        think = "\n".join([thinking.walk(toolset.tools, [r.tool for r in requests]), *lines])
        think_last = "I have the result." if len(calls) == 1 else "I have the results."
        return Turn(text, " ".join(sentences), think_last,
                    (Step(think, tuple(calls)),), tuple(told))  # fmt: skip

    def _chain_turn(self, rng: random.Random, toolset: Toolset, chain: tuple[Tool, Tool]) -> Turn:
        first, second = chain
        (source,), (link,) = first.parameters, second.parameters
        value = self.lexicon.draw(rng, source.kind)
        key = self.lexicon.draw(rng, link.kind)
        text = rng.choice(self._chains).format(k=first.want, v=value, t=second.want)
        if rng.random() < 0.3 and not text.startswith(str(value)):
            text = text[0].lower() + text[1:]
        found: dict[str, object] = {link.name: key}
        if rng.random() < 0.2:
            found[rng.choice(frames.ATTRIBUTES)] = self.lexicon.value(rng)
        steps = [
            Step(
                f"{thinking.walk(toolset.tools, chain)}\n"
                f"{thinking.call_line(first, {source.name: value})}\nthen {second.name}",
                (Call(first.name, {source.name: value}, json.dumps(found, ensure_ascii=False)),),
            ),
        ]  # fmt: skip
        result, sentence, told = self._result(rng, second.want, str(key))
        plan = thinking.call_line(second, {link.name: key})
        steps.append(Step(plan, (Call(second.name, {link.name: key}, result),)))
        return Turn(text, sentence, "I have the result.", tuple(steps), told)

    def _result(self, rng: random.Random, want: str, about: str) -> tuple[str, str, tuple[str, ...]]:
        """What the tool returns, the sentence that tells it, and what in it must be told."""
        about = f" for {about}" if about else ""
        draw = rng.random()
        if draw < 0.07:
            problem = rng.choice(
                ["not found", "timeout", f"unknown {self.lexicon.word(rng)}", self.lexicon.phrase(rng)]
            )
            return (
                json.dumps({"error": problem}, ensure_ascii=False),
                f"The tool failed: {problem}.",
                (problem,),
            )
        if draw < 0.17:
            text = str(self.lexicon.value(rng))
            return text, f"The result{about} is {text}.", (text,)
        key = (
            want
            if draw < 0.45
            else rng.choice(["result", "status", "value", *frames.ATTRIBUTES, self.lexicon.word(rng)])
        )
        readings: dict[str, object] = {key.replace(" ", "_"): self._reading(rng)}
        if draw > 0.72:
            for _ in range(rng.choice([1, 1, 2])):
                readings.setdefault(
                    rng.choice(["id", "unit", *frames.ATTRIBUTES, self.lexicon.word(rng)]), self._reading(rng)
                )
        told = " and ".join(
            f"the {k.replace('_', ' ')}{about if i == 0 else ''} is {v}"
            for i, (k, v) in enumerate(readings.items())
        )
        separators = (", ", ": ") if rng.random() < 0.8 else (",", ":")
        text = json.dumps(readings, ensure_ascii=False, separators=separators)
        return text, told[0].upper() + told[1:] + ".", tuple(str(v) for v in readings.values())

    def _reading(self, rng: random.Random) -> str | int | float:
        return (
            rng.choice(["Sunny", "ok", "sent", "done", "Cloudy", "created"])
            if rng.random() < 0.08
            else self.lexicon.value(rng)
        )

    def _idle_turn(self, rng: random.Random, toolset: Toolset, system: str | None) -> Turn:
        """Tools are there and not needed, or none of them serves, or what they need was not said."""
        draw = rng.random()
        walked = thinking.walk(toolset.tools)
        unserved = f"{walked}\nNo tool fits."
        if draw < 0.3:
            other = self._toolbox.unrelated(rng, toolset)
            return Turn(self._requests.one(rng, other).text, "I have no tool for that.", unserved)
        if draw < 0.4:
            tool = rng.choice(toolset.tools)
            needed = [p for p in tool.parameters if p.required]
            if len(needed) == 1 and self._bare:
                missing = needed[0].spoken
                text = rng.choice(self._bare).format(t=tool.want)
                seen = f"{thinking.walk(toolset.tools, [tool])}\n{thinking.call_line(tool, {})}"
                return Turn(text, f"Please tell me the {missing}.", f"{seen}\nThe {missing} is missing.")
        wants = {tool.want for tool in toolset.tools}
        kind = rng.choices(
            ["greeting", "who", "thanks", "beyond", "sum", "facts", "decimals", "echo"],
            [14, 14, 8, 0 if wants & _EXPLAINING else 12, 0 if wants & _ADDING else 12, 20, 14, 6],
        )[0]
        turn = self.talk_turn(rng, kind, system)
        if kind == "beyond":
            return replace(turn, think=unserved, answer="I have no tool for that.")
        return replace(turn, think=f"{walked}\n{turn.think}")

    # ---- talk ----------------------------------------------------------------------------------------------

    def talk(self, rng: random.Random, system: str | None, kind: str | None = None) -> Conversation:
        """A conversation without tools."""
        kinds, weights = (
            ("greeting", "who", "thanks", "beyond", "sum", "facts", "decimals", "echo"),
            (8, 10, 3, 7, 14, 20, 32, 6),
        )
        drawn = kind or rng.choices(kinds, weights)[0]
        history = []
        if rng.random() < 0.12:
            history.append(self.talk_turn(rng, rng.choices(kinds, weights)[0], system))
        return Conversation((*history, self.talk_turn(rng, drawn, system)), (), system, topic=drawn)

    def talk_turn(self, rng: random.Random, kind: str, system: str | None) -> Turn:
        """One turn of a kind of talk."""
        made: dict[str, Callable[[], Turn]] = {
            "greeting": lambda: Turn(
                self._say(rng, "greetings"), "Hello! How can I help you today?", "A greeting."),
            "who": lambda: Turn(self._say(rng, "who"), _who(system), "I say who I am."),
            "thanks": lambda: Turn(self._say(rng, "thanks"), "You are welcome!", "They thank me.")
            if rng.random() < 0.7 else Turn(self._say(rng, "byes"), "Goodbye!", "They leave."),
            "beyond": lambda: Turn(
                self._say(rng, "beyond", v=self.lexicon.name(rng), w=self.lexicon.word(rng)),
                "I am a small demonstration model and cannot answer that.", "That is beyond me."),
            "sum": lambda: self._sum(rng),
            "facts": lambda: self._facts(rng),
            "decimals": lambda: decimals.question(rng, self._side),
            "echo": lambda: self._echo(rng),
        }  # fmt: skip
        return made[kind]()

    def _say(self, rng: random.Random, name: str, **slots: object) -> str:
        return rng.choice(self._talk[name]).format(**slots)

    def _sum(self, rng: random.Random) -> Turn:
        a, b = rng.randint(0, 20), rng.randint(0, 20)
        return Turn(self._say(rng, "sums", a=a, b=b), f"{a} + {b} = {a + b}.", "I add.")

    def _echo(self, rng: random.Random) -> Turn:
        said = " ".join(str(self.lexicon.value(rng)) for _ in range(rng.randint(1, 4)))
        return Turn(self._say(rng, "echoes", v=said), said, "I repeat it.")

    def _facts(self, rng: random.Random) -> Turn:
        """Some facts in the prompt and a question on one of them."""
        holders = list(dict.fromkeys(self.lexicon.person(rng) for _ in range(rng.randint(1, 4))))
        nouns = [
            self.lexicon.noun(rng) if rng.random() < 0.6 else rng.choice(frames.ATTRIBUTES) for _ in range(2)
        ]
        frame = rng.choice(self._talk["facts"])
        facts = [(x, rng.choice(nouns), str(self.lexicon.value(rng))) for x in holders]
        x, n, y = rng.choice(facts)
        text = " ".join(frame.format(n=noun, x=holder, y=value) for holder, noun, value in facts)
        user = self._say(rng, "intros") + text + " " + self._say(rng, "about_facts", n=n, x=x)
        return Turn(user, f"The {n} of {x} is {y}.", "The text says it.", told=(y,))


def _who(system: str | None) -> str:
    text = DEFAULT_SYSTEM if system is None else system
    first = text.split(". ")[0].rstrip(".") + "."
    return "I am" + first.removeprefix("You are")
