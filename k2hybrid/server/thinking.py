"""How much a client lets the model think, in the words of every dialect. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from k2hybrid.server.fields import Fields, wrong_type, wrong_value

# Tokens of reasoning that an effort stands for; None: as many as leave room for an answer. The model's makers
# publish no such scale.
EFFORTS: dict[str, int | None] = {
    "none": 0,
    "minimal": 1024,
    "low": 4096,
    "medium": 16384,
    "high": None,
    "xhigh": None,
    "max": None,
}


@dataclass(frozen=True, slots=True)
class Thinking:
    """`enabled` False: the answer begins at once. `budget`: tokens of reasoning at most; None: no limit."""

    enabled: bool = True
    budget: int | None = None


def of_effort(fields: Fields, key: str) -> Thinking | None:
    """A named effort; None where the field is absent."""
    effort = fields.text(key)
    if effort is None:
        return None
    if effort not in EFFORTS:
        raise wrong_value(fields.name(key), f"{effort!r} is unknown; one of {', '.join(EFFORTS)}")
    return Thinking(EFFORTS[effort] != 0, EFFORTS[effort] or None)


def of_object(fields: Fields, key: str = "thinking") -> Thinking | None:
    """Anthropic's and Moonshot's `{"type": "enabled" | "adaptive" | "disabled", "budget_tokens": n}`.

    Also a plain true or false. None where the field is absent.
    """
    value = fields.value.get(key)
    if value is None:
        return None
    if isinstance(value, bool):
        return Thinking(value)
    if not isinstance(value, dict):
        raise wrong_type(fields.name(key), "an object", value)
    child = fields.child(key)
    kind = child.text("type", "enabled")
    if kind == "disabled":
        return Thinking(False)
    if kind not in ("enabled", "adaptive", "auto"):
        raise wrong_value(child.name("type"), f"{kind!r} is unknown; one of enabled, adaptive, disabled")
    budget = child.integer("budget_tokens", 0)
    return Thinking(budget != 0, budget or None)
