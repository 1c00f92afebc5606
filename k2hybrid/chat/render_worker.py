"""The process in which a checkpoint's chat template runs: standard library and jinja2 only.

Started by `jinja.py`; `worker_side.py` reads its requests, writes its answers and bounds it. The template
sees a sandbox without attribute access to internals; the process sees no secrets of its parent.

How control tokens stay the template's own: in the parsed template, every spelling of a special token is
replaced by a variable whose value is a fresh random number for each request. Only where that number comes out
is a control token; so bodies pass through untouched, compare and split as usual, and whatever filters do to
them, they cannot become one. Constants that are compared, tested or searched for keep their spelling, as they
are not written out: `content.split('</think>')` works on bodies. A template must write a control token in one
piece: one assembled from pieces stays text.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Sequence
from datetime import datetime
from typing import Any

import jinja2
import jinja2.exceptions
import jinja2.ext
import jinja2.sandbox
from jinja2 import nodes
from jinja2.runtime import Context, Macro

from k2hybrid.chat.growing import Held, alike, chars_of
from k2hybrid.chat.worker_side import Answer, serve

_SEARCHING = frozenset(
    "split rsplit replace startswith endswith strip lstrip rstrip removeprefix removesuffix find rfind index "
    "rindex count partition rpartition get".split()
)
_DICT_ATTRIBUTES = frozenset(dir(dict))
_VARIABLE = "_control_token_"
_KEY_DIGITS = 38  # as unguessable as 126 bits; digits pass unchanged through case, escaping and JSON filters
_INDEX_DIGITS = 4


class RejectedError(Exception):
    """The template called `raise_exception`."""


class TooLongError(Exception):
    """The template wrote more than it may."""


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}` marks assistant text for training; here it is only its body."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The sandbox, quicker at what templates do for every message.

    `message.role` means `message["role"]`: what is no attribute is an item. The template's own macros are
    safe to call. And closer: methods of a type change what they are given, as in `dict.update(message, …)`.
    """

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return not isinstance(obj, type) and super().is_safe_attribute(obj, attr, value)

    def getattr(self, obj: Any, attribute: str) -> Any:
        if type(obj) is dict and attribute not in _DICT_ATTRIBUTES:
            return obj[attribute] if attribute in obj else self.undefined(obj=obj, name=attribute)
        return super().getattr(obj, attribute)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        if type(__obj) is not Macro:
            return super().call(__context, __obj, *args, **kwargs)
        kwargs.pop("_loop_vars", None)
        kwargs.pop("_block_vars", None)
        return __obj(__context.eval_ctx, *args, **kwargs)


class TemplateProgram:
    """A compiled chat template. `specials` are spellings; `variables` (bos_token, …) go to each rendering."""

    def __init__(self, source: str, specials: Sequence[str], variables: dict[str, str]) -> None:
        self._specials = list(specials)
        self._index = {name: i for i, name in enumerate(self._specials)}
        longest_first = sorted(self._specials, key=len, reverse=True)
        self._pattern = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")
        self._variables = variables
        environment = _Environment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols", _GenerationTag],
            optimized=False,  # nothing is computed while compiling, not even constants
            finalize=_as_it_is,
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        tree = environment.parse(source)
        self._protect(tree, environment)
        # The tree is compiled as jinja2's own `compile` does it with a source text.
        code = environment.compile(tree)
        self._template = jinja2.Template.from_code(environment, code, environment.make_globals(None))

    def render(self, context: dict[str, Any], max_chars: int) -> list[str | int]:
        """Pieces: plain text, or the index of a special token in `specials`. No two texts are neighbours."""
        key = _fresh_key()
        marks = {f"{_VARIABLE}{i}": key + str(i).zfill(_INDEX_DIGITS) for i in range(len(self._specials))}
        own = {name: self._mark(text, key) for name, text in self._variables.items()}
        size = 0
        chunks: list[str] = []
        try:
            for chunk in self._template.generate(**context, **own, **marks):
                size += len(chunk)
                if size > max_chars:
                    raise TooLongError(f"more than {max_chars} characters")
                chunks.append(chunk)
        except RejectedError as error:
            raise RejectedError("".join(map(str, self._split(str(error), key, spelled=True)))) from None
        return self._split("".join(chunks), key)

    def _mark(self, text: str, key: str) -> str:
        return self._pattern.sub(lambda m: key + str(self._index[m.group()]).zfill(_INDEX_DIGITS), text)

    def _split(self, text: str, key: str, spelled: bool = False) -> list[str | int]:
        texts_and_marks = re.split(f"{key}([0-9]{{{_INDEX_DIGITS}}})", text)
        texts, marks = texts_and_marks[::2], [int(digits) for digits in texts_and_marks[1::2]]
        if any(key in text for text in texts) or max(marks, default=0) >= len(self._specials):
            raise jinja2.TemplateRuntimeError("the template cut a control token into pieces")
        pieces: list[str | int] = [texts[0]] if texts[0] else []
        for index, text in zip(marks, texts[1:], strict=True):
            pieces.append(self._specials[index] if spelled else index)
            if text:
                pieces.append(text)
        return pieces

    # --- the template's own spellings -------------------------------------------------------------

    def _protect(self, tree: nodes.Template, environment: jinja2.Environment) -> None:
        """Replace spellings by variables, in data and in constants that may be written out."""
        for output in list(tree.find_all(nodes.Output)):
            output.nodes = [part for node in _joined(output.nodes) for part in self._data_parts(node)]
        self._protect_constants(tree)
        tree.set_environment(environment)

    def _data_parts(self, node: nodes.Expr) -> list[nodes.Expr]:
        if not isinstance(node, nodes.TemplateData):
            return [node]
        return [
            self._variable(part, node.lineno)
            if part in self._index
            else nodes.TemplateData(part, lineno=node.lineno)
            for part in self._pattern.split(node.data)
            if part
        ]

    def _protect_constants(self, node: nodes.Node) -> None:
        if isinstance(node, nodes.Compare | nodes.Test):
            return
        kept = _searched_for(node)
        for field, value in node.iter_fields():
            if isinstance(value, list):
                value[:] = [item if item is kept else self._replaced(item) for item in value]
            elif isinstance(value, nodes.Node) and value is not kept:
                self._replace_field(node, field)

    def _replace_field(self, node: nodes.Node, field: str) -> None:
        setattr(node, field, self._replaced(getattr(node, field)))

    def _replaced(self, item: Any) -> Any:
        if isinstance(item, nodes.Concat | nodes.Add):
            item = _folded(item)
        if isinstance(item, nodes.Const) and isinstance(item.value, str):
            parts = [part for part in self._pattern.split(item.value) if part]
            if not any(part in self._index for part in parts):
                return item
            marked: list[nodes.Expr] = [
                self._variable(part, item.lineno)
                if part in self._index
                else nodes.Const(part, lineno=item.lineno)
                for part in parts
            ]
            return marked[0] if len(marked) == 1 else nodes.Concat(marked, lineno=item.lineno)
        if isinstance(item, nodes.Node):
            self._protect_constants(item)
        return item

    def _variable(self, spelling: str, lineno: int) -> nodes.Name:
        return nodes.Name(f"{_VARIABLE}{self._index[spelling]}", "load", lineno=lineno)


def _folded(node: nodes.Expr) -> nodes.Expr:
    """A literal for literals joined by `~` or `+`, else the node itself."""
    parts = node.nodes if isinstance(node, nodes.Concat) else [node.left, node.right]  # type: ignore[attr-defined]
    folded = [_folded(part) if isinstance(part, nodes.Concat | nodes.Add) else part for part in parts]
    values = [part.value for part in folded if isinstance(part, nodes.Const) and isinstance(part.value, str)]
    return nodes.Const("".join(values), lineno=node.lineno) if len(values) == len(parts) else node


def _joined(parts: Sequence[nodes.Expr]) -> list[nodes.Expr]:
    """The parts of an output, neighbouring literal texts as one: a spelling may lie over both."""
    result: list[nodes.Expr] = []
    for part in parts:
        if isinstance(part, nodes.Concat | nodes.Add):
            part = _folded(part)
        if isinstance(part, nodes.Const) and isinstance(part.value, str):
            part = nodes.TemplateData(part.value, lineno=part.lineno)
        if result and isinstance(part, nodes.TemplateData) and isinstance(result[-1], nodes.TemplateData):
            part = nodes.TemplateData(result.pop().data + part.data, lineno=part.lineno)  # type: ignore[attr-defined]
        result.append(part)
    return result


def _searched_for(node: nodes.Node) -> nodes.Node | None:
    """The child of `node` that is looked for in something, not written out."""
    if isinstance(node, nodes.Getitem):
        return node.arg
    if isinstance(node, nodes.Pair):
        return node.key
    searches = (isinstance(node, nodes.Filter) and node.name == "replace") or (
        isinstance(node, nodes.Call) and isinstance(node.node, nodes.Getattr) and node.node.attr in _SEARCHING
    )
    return node.args[0] if searches and node.args else None  # type: ignore[attr-defined]


def _fresh_key() -> str:
    return str(secrets.randbelow(9 * 10 ** (_KEY_DIGITS - 1)) + 10 ** (_KEY_DIGITS - 1))


@jinja2.pass_context
def _as_it_is(context: object, value: object) -> object:
    """Output unchanged. That it asks for the context keeps jinja2 from computing outputs while compiling."""
    return value


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: Sequence[str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As chat templates expect it: unlike jinja2's own, neither HTML-escaped nor sorted."""
    pair = None if separators is None else (separators[0], separators[1])
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=pair, sort_keys=sort_keys)


def _raise_exception(message: object) -> str:
    raise RejectedError(str(message))


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


# --- the process ----------------------------------------------------------------------------------


class _Answers:
    """Renders histories. Of one that begins like an earlier one only what is new comes, and goes back."""

    def __init__(self, program: TemplateProgram) -> None:
        self._program = program
        self._held: Held[tuple[list[Any], list[Any], list[str | int]]] = Held()

    def __call__(self, request: dict[str, Any]) -> dict[str, Any]:
        base = request["base"]
        held = self._held.get(base)
        if held is None and base is not None:
            return {"forgotten": True}
        before, tools, pieces_before = held or ([], [], [])
        messages = before[: request["known"]] + request["messages"]
        tools = tools if request["tools"] is None else request["tools"]
        context = {
            "messages": messages,
            "tools": tools or None,
            "add_generation_prompt": request["add_generation_prompt"],
        }
        pieces = self._rendered(context, int(request["max_chars"]))
        grown = base if len(before) == request["known"] else None
        chars = request["chars"] + chars_of(pieces)
        self._held.put(request["number"], (messages, tools, pieces), chars, grown)
        known = alike(pieces_before, pieces)
        return {"known": known, "pieces": pieces[known:]}

    def _rendered(self, context: dict[str, Any], max_chars: int) -> list[str | int]:
        """The template's output; what is held gives way where memory does not suffice for both."""
        try:
            return self._program.render(context, max_chars)
        except MemoryError:
            if not len(self._held):
                raise
        self._held = Held()
        return self._program.render(context, max_chars)


def _start(request: dict[str, Any]) -> Answer:
    """Compile the template; what is returned renders with it."""
    return _Answers(TemplateProgram(request["source"], request["specials"], request["variables"]))


def _failure(error: Exception) -> dict[str, Any] | None:
    """The answer where a template refuses messages, or is wrong in a way that has a name."""
    match error:
        case RejectedError():
            return {"rejected": str(error)[:1000]}
        case TooLongError():
            return {"error": f"too much output: {error}"}
        case jinja2.TemplateSyntaxError():
            return {"error": f"line {error.lineno}: {error.message}"[:1000]}
        case jinja2.exceptions.SecurityError():
            return {"error": f"forbidden: {error}"[:1000]}
        case _:
            return None


if __name__ == "__main__":
    serve(_start, _failure)
