"""What the user says to have a tool called, and the arguments that are right for it."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, replace
from typing import Any

from k2hybrid.mini_eval import frames
from k2hybrid.mini_eval.dealt import listed
from k2hybrid.mini_eval.toolbox import Parameter, Tool
from k2hybrid.mini_eval.words import Lexicon


@dataclass(frozen=True)
class Request:
    """A tool, the arguments that `text` asks for, and the value it is about ("" where there is none)."""

    tool: Tool
    arguments: dict[str, Any]
    text: str
    about: str
    types: frozenset[str]


class Requests:
    """Draws requests in the frames of one side."""

    def __init__(self, lexicon: Lexicon) -> None:
        self._lexicon = lexicon
        side = lexicon.side
        self._mentions = listed(side, "MENTIONS")
        self._yes, self._no = listed(side, "YES"), listed(side, "NO")
        self._heads, self._tails = listed(side, "HEADS"), listed(side, "TAILS")
        self._several = listed(side, "SEVERAL")
        self._follow_ups = listed(side, "FOLLOW_UPS")

    def one(self, rng: random.Random, tool: Tool) -> Request:
        """One call of `tool`, with the words people put around a request."""
        request = self.plain(rng, tool)
        return replace(request, text=self._polish(rng, request.text, starts_with=request.about))

    def plain(self, rng: random.Random, tool: Tool) -> Request:
        """One call of `tool`, the bare request: part of a longer message."""
        return self._request(rng, tool, rng.choice(tool.frames))

    def several(self, rng: random.Random, tool: Tool, count: int) -> tuple[str, list[Request]] | None:
        """One sentence that asks the same for several values; None where `tool` has no one scalar to vary."""
        needed = [p for p in tool.parameters if p.required]
        if len(needed) != 1 or needed[0].kind not in ("place", "person", "word", "name", "code", "int"):
            return None
        parameter = needed[0]
        values: list[Any] = []
        while len(values) < count:
            value = self._lexicon.draw(rng, parameter.kind)
            if value not in values and " and " not in str(value):
                values.append(value)
        listed = rng.choice(self._several).format(l=", ".join(map(str, values[:-1])), z=values[-1])
        frame = rng.choice(tool.frames)
        text = self._polish(
            rng, frame.replace("{" + parameter.role + "}", listed), starts_with=str(values[0])
        )
        return text, [
            Request(tool, {parameter.name: v}, text, str(v), frozenset({parameter.json_type})) for v in values
        ]

    def follow_up(self, rng: random.Random, last: Request) -> Request | None:
        """The same tool once more for another value, said in a few words."""
        if len(last.arguments) != 1:
            return None
        parameter = next(p for p in last.tool.parameters if p.name in last.arguments)
        if parameter.kind not in ("place", "person", "word", "name", "code"):
            return None
        value = self._lexicon.draw(rng, parameter.kind)
        text = rng.choice(self._follow_ups).format(v=value)
        return Request(last.tool, {parameter.name: value}, text, str(value), frozenset({parameter.json_type}))

    # ---- the parts of a sentence ---------------------------------------------------------------------------

    def _request(self, rng: random.Random, tool: Tool, frame: str) -> Request:
        roles = re.findall(r"{([^{}]+)}", frame)
        in_frame = [tool.parameter(role) for role in roles]
        further = [p for p in tool.parameters if p not in in_frame and (p.required or rng.random() < 0.5)]
        rng.shuffle(further)
        values = {p.name: self._value(rng, p) for p in [*in_frame, *further]}
        body = frame.rstrip(".?! ")
        end = frame[len(body) :].strip()
        text = body
        for parameter in in_frame:
            slot = "{" + parameter.role + "}"
            last = body.endswith(slot) and not further
            text = text.replace(slot, self._spoken(rng, parameter, values[parameter.name], at_end=last))
        if further:
            mentions = [self._mention(rng, p, values[p.name], at_end=p is further[-1]) for p in further]
            said_first = mentions[0].startswith(_opening(values[further[0].name]))
            text = self._attach(rng, text, mentions, end, capitalize=not said_first)
        else:
            text += end
        scalars = [
            p.name
            for p in [*in_frame, *further]
            if p.kind != "bool" and isinstance(values[p.name], str | int | float)
        ]
        about = str(values[scalars[0]]) if scalars else ""
        # In the order of the declaration, which the template sorts by name.
        arguments = {name: values[name] for name in sorted(values)}
        used = [p for p in tool.parameters if p.name in values]
        return Request(tool, arguments, text, about, frozenset(p.json_type for p in used))

    def _attach(
        self, rng: random.Random, text: str, mentions: list[str], end: str, *, capitalize: bool
    ) -> str:
        """The further arguments behind the request, in front of it, or as a sentence of their own.

        A value that stands first keeps its letters: then nothing is capitalized.
        """
        draw = rng.random()
        listed = mentions[0]
        for mention in mentions[1:]:
            listed += rng.choice(frames.JOINS[:3]) + mention
        if draw < 0.62:
            bare = mentions[0].split()[0] in (
                "with",
                "in",
                "for",
                "on",
                "at",
                "to",
                "as",
                "by",
                "using",
                "without",
                "from",
                "of",
                "into",
            )
            return (
                text
                + (" " if bare and rng.random() < 0.7 else rng.choice([", ", ", ", " ", ". ", "; "]))
                + listed
                + end
            )
        if draw < 0.85:
            if rng.random() < 0.6 and capitalize:
                listed = listed[0].upper() + listed[1:]
            return f"{text}{end or '.'} {listed}{rng.choice(['.', '', '.'])}"
        return (
            f"{listed[0].upper() + listed[1:] if rng.random() < 0.5 and capitalize else listed}: {text}{end}"
            if draw < 0.93
            else f"{text} ({listed}){end}"
        )

    def _polish(self, rng: random.Random, text: str, starts_with: str) -> str:
        if rng.random() < 0.12 and self._heads:
            text = rng.choice(self._heads) + text
        elif rng.random() < 0.5 and not (starts_with and text.startswith(starts_with)):
            text = text[0].upper() + text[1:]
        if rng.random() < 0.12 and self._tails:
            text += ("" if text[-1] in ".?!" else ".") + rng.choice(self._tails)
        return text

    def _value(self, rng: random.Random, parameter: Parameter) -> Any:
        kind = parameter.kind
        if kind == "bool":
            return rng.random() < 0.65
        if kind == "enum":
            return rng.choice(parameter.choices)
        if kind == "words":
            draw = self._lexicon.person if rng.random() < 0.25 else self._lexicon.word
            return list(
                dict.fromkeys(draw(rng) for _ in range(rng.choices([1, 2, 3, 4], [10, 40, 38, 12])[0]))
            )
        if kind == "ints":
            return [self._lexicon.integer(rng) for _ in range(rng.randint(2, 4))]
        if kind == "object":
            return {
                f.name: self._lexicon.draw(rng, f.kind)
                for f in sorted(parameter.fields, key=lambda f: f.name)
            }
        return self._lexicon.draw(rng, kind)

    def _spoken(self, rng: random.Random, parameter: Parameter, value: Any, *, at_end: bool) -> str:
        if parameter.kind == "object":
            return self._fields(rng, parameter, value)
        if isinstance(value, list):
            texts = [str(v) for v in value]
            draw = rng.random()
            if len(texts) == 1 or draw < 0.3:
                return ", ".join(texts)
            return ", ".join(texts[:-1]) + (" and " if draw < 0.8 else ", and ") + texts[-1]
        text = str(value)
        quoted = 0.08 if parameter.kind in ("place", "person", "word", "name", "code", "path") else 0.0
        if parameter.kind == "phrase":
            quoted = 0.5 if at_end else 1.0
        if rng.random() < quoted:
            return rng.choice(['"{}"', '"{}"', "'{}'", "“{}”"]).format(text)
        return text

    def _mention(self, rng: random.Random, parameter: Parameter, value: Any, *, at_end: bool) -> str:
        name = parameter.spoken if rng.random() < 0.75 else parameter.name
        if parameter.kind == "bool":
            return rng.choice(self._yes if value else self._no).format(p=name)
        if parameter.kind == "object":
            opening = rng.choice(
                [
                    "{p} {v}",
                    "with {p} {v}",
                    "{p}: {v}",
                    "the {p} is {v}",
                    "{p} ({v})",
                    "{p} with {v}",
                    "use {p} {v}",
                ]
            )
            return opening.format(p=name, v=self._fields(rng, parameter, value))
        natural = parameter.mentions and rng.random() < 0.65
        pattern = rng.choice(parameter.mentions if natural else self._mentions)
        spoken = self._spoken(rng, parameter, value, at_end=at_end and pattern.endswith("{v}"))
        return pattern.format(p=name, v=spoken)

    def _fields(self, rng: random.Random, parameter: Parameter, value: dict[str, Any]) -> str:
        pattern, join = rng.choice(
            [
                ("{k} {v}", ", "),
                ("{k} {v}", " and "),
                ("{k}: {v}", ", "),
                ("{k}={v}", " "),
                ("{k} {v}", ", "),
                ("{k}={v}", ", "),
            ]
        )
        order = list(parameter.fields)
        rng.shuffle(order)
        parts = [pattern.format(k=f.name, v=value[f.name]) for f in order]
        return (
            join.join(parts)
            if join != " and " or len(parts) == 2
            else ", ".join(parts[:-1]) + " and " + parts[-1]
        )


def _opening(value: Any) -> str:
    """What a value begins with where it is said."""
    while isinstance(value, list):
        value = value[0]
    return "\0" if isinstance(value, dict | bool) else str(value)
