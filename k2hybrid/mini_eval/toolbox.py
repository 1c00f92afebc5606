"""Tools: declarations with parameters of every JSON type, everyday ones and ones made of random words."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from k2hybrid.mini_eval import frames
from k2hybrid.mini_eval.dealt import listed, of_domain
from k2hybrid.mini_eval.domains import DOMAINS, ROLES, Domain
from k2hybrid.mini_eval.words import Lexicon

# JSON type by kind of value; every other kind is a string.
_TYPES = {
    "int": "integer", "decimal": "number", "bool": "boolean", "words": "array", "ints": "array",
    "object": "object",
}  # fmt: skip
_RANDOM_KINDS = (
    "word",
    "name",
    "code",
    "int",
    "decimal",
    "bool",
    "enum",
    "words",
    "ints",
    "object",
    "place",
    "date",
)
_RANDOM_WEIGHTS = (18, 12, 8, 12, 6, 10, 12, 9, 3, 8, 4, 3)
# Tools whose requests nobody could tell apart.
_CONFUSABLE = (
    {"weather", "forecast"},
    {"search", "products"},
    {"definition", "user"},
    {"news", "search"},
    {"note", "reminder", "task"},
    {"route", "distance"},
    {"list", "order"},
    {"list", "recipe"},
    {"products", "order"},
    {"products", "stock"},
)


@dataclass(frozen=True)
class Parameter:
    """One property of a tool. `mentions` are natural phrases with a slot {v}; without, its name is said."""

    name: str
    about: str
    kind: str
    role: str
    required: bool = True
    mentions: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    fields: tuple[Parameter, ...] = ()

    @property
    def spoken(self) -> str:
        """The name as one says it."""
        return spoken_name(self.name)

    @property
    def json_type(self) -> str:
        """The report's cell: string, number, boolean, enum, array or object."""
        if self.kind == "enum":
            return "enum"
        json_type = _TYPES.get(self.kind, "string")
        return "number" if json_type == "integer" else json_type


@dataclass(frozen=True)
class Tool:
    """A declared function and the frames that ask for it, with a slot for each role that a frame fills."""

    want: str
    name: str
    parameters: tuple[Parameter, ...]
    frames: tuple[str, ...]
    declaration: dict[str, Any] = field(repr=False)

    def parameter(self, role: str) -> Parameter:
        """The parameter that plays `role`."""
        return next(p for p in self.parameters if p.role == role)


@dataclass(frozen=True)
class Toolset:
    """Tools declared together. In a chain the second tool takes what the first returns, under that name."""

    tools: tuple[Tool, ...]
    chain: tuple[Tool, Tool] | None = None

    @property
    def declarations(self) -> tuple[dict[str, Any], ...]:
        return tuple(tool.declaration for tool in self.tools)


def spoken_name(name: str) -> str:
    """`maxResults`, `max_results` → `max results`."""
    return re.sub(r"([a-z])([A-Z])", r"\1 \2", name).replace("_", " ").replace("-", " ").lower()


def _join_name(rng: random.Random, words: Sequence[str]) -> str:
    """An identifier in one of the four styles, mostly snake."""
    draw = rng.random()
    if draw < 0.68:
        return "_".join(words)
    if draw < 0.82:
        return words[0] + "".join(w.capitalize() for w in words[1:])
    if draw < 0.91:
        return "-".join(words)
    return f"{words[-1]}.{'_'.join(words[:-1])}" if len(words) > 1 else words[0]


class Toolbox:
    """Draws tools of one side of the split."""

    def __init__(self, lexicon: Lexicon) -> None:
        self._lexicon = lexicon
        side = lexicon.side
        self._frames = {id(d): of_domain(side, d) for d in DOMAINS}
        self._descriptions = listed(side, "DESCRIPTIONS")
        self._action_descriptions = listed(side, "ACTION_DESCRIPTIONS")
        self._queries = listed(side, "QUERIES")
        self._bare = listed(side, "BARE_QUERIES")
        self._actions = listed(side, "ACTIONS")

    # ---- sets ----------------------------------------------------------------------------------------------

    def toolset(self, rng: random.Random, count: int) -> Toolset:
        """`count` tools, near-duplicates among them in half of the sets."""
        tools: list[Tool] = []
        chain = None
        if count >= 2 and rng.random() < 0.4:
            chain = self._chain(rng)
            tools += chain
        siblings = rng.random() < 0.5
        while len(tools) < count:
            drawn = None
            if siblings and tools and rng.random() < 0.6:
                drawn = self._sibling(rng, rng.choice(tools))
            tool = drawn or self.tool(rng)
            if not any(self._clash(tool, other) for other in tools):
                tools.append(tool)
        rng.shuffle(tools)
        return Toolset(tuple(tools), chain)

    def tool(self, rng: random.Random) -> Tool:
        """Any tool."""
        if rng.random() < 0.55:
            return self.everyday(rng)
        return self._random_query(rng) if rng.random() < 0.6 else self._random_action(rng)

    def everyday(self, rng: random.Random) -> Tool:
        """One of the domains."""
        return self._of_domain(rng, rng.choice(DOMAINS))

    def small(self, rng: random.Random) -> Tool:
        """Random words: a name, and few parameters without descriptions."""
        words = [self._lexicon.word(rng) for _ in range(rng.choice([1, 2, 2, 3]))]
        kinds = rng.choices(["word", "int", "bool", "decimal"], [6, 2, 1, 1], k=rng.choice([1, 1, 2, 3]))
        drawn = (Parameter(self._lexicon.word(rng), "", kind, "small") for kind in kinds)
        parameters = tuple({p.name: p for p in drawn}.values())
        properties = {p.name: _schema(rng, p, shown=False) for p in parameters}
        name, schema = _join_name(rng, words), {"properties": properties, "type": "object"}
        declaration = {"type": "function", "function": {"name": name, "parameters": schema}}
        return Tool(" ".join(words), name, parameters, (), declaration)

    def unrelated(self, rng: random.Random, toolset: Toolset) -> Tool:
        """A tool for a request that no tool of `toolset` serves."""
        while True:
            tool = self.tool(rng)
            words = set(spoken_name(tool.want).split()) | set(re.split(r"\W|_", tool.name.lower()))
            known = {
                w
                for t in toolset.tools
                for w in [*spoken_name(t.want).split(), *re.split(r"\W|_", t.name.lower())]
            }
            if not (words - {"get", "create", "find", "set", ""}) & known and not any(
                self._clash(tool, other) for other in toolset.tools
            ):
                return tool

    @staticmethod
    def _clash(one: Tool, other: Tool) -> bool:
        if one.name == other.name or (one.want == other.want and one.frames == other.frames):
            return True
        return any({one.want, other.want} <= group for group in _CONFUSABLE)

    # ---- everyday tools ------------------------------------------------------------------------------------

    def _of_domain(self, rng: random.Random, domain: Domain) -> Tool:
        needed: list[Parameter] = []
        taken: set[str] = set()
        for role in domain.needs:
            parameter = self._play(rng, role, required=True)
            while parameter.name in taken:
                parameter = self._play(rng, role, required=True)
            taken.add(parameter.name)
            needed.append(parameter)
        for role in rng.sample(
            domain.may, k=min(len(domain.may), rng.choices([0, 1, 2, 3], [35, 30, 22, 13])[0])
        ):
            parameter = self._play(rng, role, required=rng.random() < 0.2)
            if parameter.name not in taken:
                taken.add(parameter.name)
                needed.append(parameter)
        name = rng.choice(domain.names)
        if rng.random() < 0.05:  # a name that says nothing: the description decides
            name = rng.choice(
                [self._lexicon.made_up(rng), f"tool_{rng.randint(1, 40)}", f"fn{rng.randint(1, 99)}"]
            )
        return self._declare(
            rng, domain.want, name, rng.choice(domain.descriptions), needed, self._frames[id(domain)]
        )

    def _play(self, rng: random.Random, role_name: str, *, required: bool) -> Parameter:
        role = ROLES[role_name]
        name, about = rng.choice(role.names)
        choices: tuple[str, ...] = ()
        if role.kind == "enum":
            choices = rng.choice(role.choices)
        fields = self._fields(rng) if role.kind == "object" else ()
        return Parameter(name, about, role.kind, role_name, required, role.mentions, choices, fields)

    # ---- tools of random words -----------------------------------------------------------------------------

    def _random_query(self, rng: random.Random, noun: str | None = None) -> Tool:
        """Something of something: `get_river_color(name)`."""
        draw = rng.random()
        first = noun or self._lexicon.word(rng)
        topic = (
            [first]
            if draw < 0.4 and noun is None
            else [first, rng.choice([self._lexicon.word(rng), *frames.ATTRIBUTES])]
        )
        want = " ".join(topic)
        verb = rng.choice(frames.GET_VERBS)
        words = topic if rng.random() < 0.15 else [verb, *topic]
        main = self._random_main(rng) if rng.random() < 0.93 else None
        patterns = self._queries if main else self._bare
        filled = tuple(p.replace("{t}", want).replace("{v}", "{main}") for p in patterns)
        description = self._describe(rng, self._descriptions, want, main)
        return self._declare(
            rng, want, _join_name(rng, words), description, [main] if main else [], filled, extras=True
        )

    def _random_action(self, rng: random.Random, noun: str | None = None) -> Tool:
        """Something done to a thing: `archive_ticket(title, …)`."""
        topic = noun or self._lexicon.word(rng)
        verb = rng.choice(frames.ACTION_VERBS)
        want = f"{verb} {topic}"
        main = self._random_main(rng)
        filled = tuple(
            p.replace("{d}", verb).replace("{t}", topic).replace("{v}", "{main}") for p in self._actions
        )
        description = self._describe(rng, self._action_descriptions, topic, main).replace("{d}", verb)
        description = description[0].upper() + description[1:]
        return self._declare(
            rng, want, _join_name(rng, [verb, topic]), description, [main], filled, extras=True
        )

    def _sibling(self, rng: random.Random, tool: Tool) -> Tool | None:
        """A near-duplicate: another attribute or another verb of the same thing."""
        same = [d for d in DOMAINS if d.want == tool.want and not set(d.names) & {tool.name}]
        if same and rng.random() < 0.7:
            return self._of_domain(rng, rng.choice(same))
        noun = tool.want.split()[-1] if rng.random() < 0.5 else tool.want.split()[0]
        if noun in frames.ACTION_VERBS:
            noun = tool.want.split()[-1]
        return self._random_query(rng, noun) if rng.random() < 0.5 else self._random_action(rng, noun)

    def _chain(self, rng: random.Random) -> tuple[Tool, Tool]:
        """`get_code(name)` and `get_price(code)`: what the first returns, the second needs."""
        link = rng.choice([*frames.LINKS, self._lexicon.word(rng)])
        key = link.replace(" ", "_")
        main = self._random_main(rng, kinds=("person", "name", "place", "word"))
        name = _join_name(rng, [rng.choice(frames.GET_VERBS), *link.split()])
        filled = tuple(p.replace("{t}", link).replace("{v}", "{main}") for p in self._queries)
        first = self._declare(
            rng, link, name, self._describe(rng, self._descriptions, link, main), [main], filled
        )
        while True:
            want = rng.choice([self._lexicon.word(rng), *frames.ATTRIBUTES])
            if want != link:
                break
        kind = "int" if rng.random() < 0.3 else "code"
        about = rng.choice([f"The {link}", link.capitalize(), f"{link.capitalize()} to look up"])
        taken = Parameter(key, about, kind, "main")
        name = _join_name(rng, [rng.choice(frames.GET_VERBS), *want.split()])
        filled = tuple(p.replace("{t}", want).replace("{v}", "{main}") for p in self._queries)
        description = self._describe(rng, self._descriptions, want, taken)
        return first, self._declare(rng, want, name, description, [taken], filled)

    def _random_main(
        self, rng: random.Random, kinds: Sequence[str] = ("name", "place", "person", "word", "code", "int")
    ) -> Parameter:
        kind = rng.choice(kinds)
        roles = {
            "name": "item",
            "place": "place",
            "person": "person",
            "word": "topic",
            "code": "id",
            "int": "number_id",
        }
        name, about = rng.choice(ROLES[roles[kind]].names)
        if rng.random() < 0.3:
            name = self._lexicon.word(rng)
            about = f"The {name}"
        return Parameter(name, about, kind, "main")

    def _random_parameter(self, rng: random.Random, *, required: bool) -> Parameter:
        kind = rng.choices(_RANDOM_KINDS, _RANDOM_WEIGHTS)[0]
        words = [self._lexicon.word(rng) for _ in range(rng.choice([1, 1, 1, 2]))]
        name = (
            "_".join(words) if rng.random() < 0.85 else words[0] + "".join(w.capitalize() for w in words[1:])
        )
        spoken = spoken_name(name)
        if kind == "bool":
            about = rng.choice(
                [f"Whether to use {spoken}", f"Use {spoken}", f"If {spoken} is on", f"Turn {spoken} on"]
            )
        else:
            about = rng.choice(
                [f"The {spoken}", f"{spoken.capitalize()} to use", spoken.capitalize(), f"Value of {spoken}"]
            )
        choices = (
            tuple(dict.fromkeys(self._lexicon.word(rng) for _ in range(rng.randint(2, 4))))
            if kind == "enum"
            else ()
        )
        fields = self._fields(rng) if kind == "object" else ()
        return Parameter(name, about, kind, f"extra {name}", required, (), choices, fields)

    def _fields(self, rng: random.Random) -> tuple[Parameter, ...]:
        """Two or three scalar properties of a nested object."""
        fields: dict[str, Parameter] = {}
        while len(fields) < rng.choice([2, 2, 3]):
            name = rng.choice([self._lexicon.word(rng), *frames.FIELD_NAMES])
            kind = rng.choice(["word", "name", "code", "int", "place", "int"])
            fields[name] = Parameter(name, f"The {name}", kind, f"field {name}")
        return tuple(fields.values())

    # ---- declarations --------------------------------------------------------------------------------------

    @staticmethod
    def _describe(rng: random.Random, patterns: Sequence[str], topic: str, main: Parameter | None) -> str:
        pattern = rng.choice([p for p in patterns if main or "{p}" not in p] or ["The {t}."])
        return pattern.replace("{t}", topic).replace("{p}", main.spoken if main else "")

    def _declare(
        self, rng: random.Random, want: str, name: str, description: str, needed: list[Parameter],
        requests: tuple[str, ...], *, extras: bool = False,
    ) -> Tool:  # fmt: skip
        parameters = list(needed)
        if extras:
            for _ in range(rng.choices([0, 1, 2, 3], [35, 30, 22, 13])[0]):
                extra = self._random_parameter(rng, required=rng.random() < 0.35)
                if all(extra.name != p.name for p in parameters):
                    parameters.append(extra)
        shown = rng.random() < 0.88
        schema: dict[str, Any] = {
            "type": "object",
            "properties": {p.name: _schema(rng, p, shown) for p in parameters},
        }
        required = [p.name for p in parameters if p.required]
        if required or rng.random() < 0.3:
            schema["required"] = required
        if rng.random() < 0.15:
            schema["additionalProperties"] = False
        function: dict[str, Any] = {"name": name, "parameters": schema}
        if rng.random() < 0.97:
            function["description"] = description
        if rng.random() < 0.05:
            function["strict"] = True
        return Tool(want, name, tuple(parameters), requests, {"type": "function", "function": function})


def _schema(rng: random.Random, parameter: Parameter, shown: bool) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": _TYPES.get(parameter.kind, "string")}
    if shown:
        schema["description"] = parameter.about
    if parameter.kind == "enum":
        schema["enum"] = list(parameter.choices)
    elif parameter.kind == "words":
        schema["items"] = {"type": "string"}
    elif parameter.kind == "ints":
        schema["items"] = {"type": "integer"}
    elif parameter.kind == "object":
        schema["properties"] = {f.name: _schema(rng, f, shown=False) for f in parameter.fields}
        if rng.random() < 0.5:
            schema["required"] = [f.name for f in parameter.fields]
    elif parameter.kind == "bool" and not parameter.required and rng.random() < 0.15:
        schema["default"] = False
    elif parameter.kind == "date" and rng.random() < 0.2:
        schema["format"] = "date"
    elif parameter.kind == "int" and rng.random() < 0.1:
        schema["minimum"] = 1
    return schema
