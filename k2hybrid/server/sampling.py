"""How tokens are to be drawn and where an answer ends, in the words that OpenAI's endpoints share. Pure."""

from __future__ import annotations

from typing import Any

from k2hybrid.server.fields import Fields, wrong_type, wrong_value
from k2hybrid.types import SamplingParams

MAX_CHOICES = 8  # each is a whole generation
MAX_STOP = 16
MAX_STOP_CHARS = 1000
MAX_TOP_LOGPROBS = 20  # OpenAI's own limit
MAX_TEMPERATURE = 100.0
MAX_PENALTY = 2.0
MAX_REPETITION = 10.0
MIN_REPETITION = 0.01
MAX_BIAS = 100.0
_INT64 = 1 << 63


def parse_sampling(fields: Fields, logprobs: int | None) -> SamplingParams:
    """The sampling fields; `logprobs` is spelled differently from endpoint to endpoint."""
    default = SamplingParams()
    seed = fields.integer("seed")
    top_k = fields.integer("top_k", -1)
    return SamplingParams(
        temperature=fields.number("temperature", default.temperature, 0.0, MAX_TEMPERATURE),
        top_p=fields.number("top_p", default.top_p, 0.0, 1.0),
        top_k=max(top_k or 0, 0),  # -1 is another spelling of 0: all
        min_p=fields.number("min_p", default.min_p, 0.0, 1.0),
        seed=None if seed is None else seed % _INT64,
        presence_penalty=fields.number("presence_penalty", 0.0, -MAX_PENALTY, MAX_PENALTY),
        frequency_penalty=fields.number("frequency_penalty", 0.0, -MAX_PENALTY, MAX_PENALTY),
        repetition_penalty=fields.number("repetition_penalty", 1.0, MIN_REPETITION, MAX_REPETITION),
        logit_bias=_logit_bias(fields.child("logit_bias")),
        logprobs=logprobs,
    )


def parse_limit(fields: Fields, *keys: str) -> int | None:
    """Tokens of output at most, under the first of `keys` that is there. −1 means no limit, as elsewhere."""
    for key in keys:
        limit = fields.integer(key, -1)
        if limit == 0:
            raise wrong_value(fields.name(key), "must be at least 1, not 0")
        if limit is not None:
            return None if limit < 0 else limit
    return None


def parse_choices(fields: Fields) -> int:
    """How many answers are wanted."""
    return fields.integer("n", 1, MAX_CHOICES) or 1


def parse_stop(value: Any, key: str = "stop") -> tuple[str, ...]:
    """The strings that end an answer."""
    if value is None:
        return ()
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list):
        raise wrong_type(key, "a string or an array of strings", value)
    if len(stops) > MAX_STOP:
        raise wrong_value(key, f"has {len(stops)} entries; at most {MAX_STOP}")
    for i, stop in enumerate(stops):
        if not isinstance(stop, str):
            raise wrong_type(f"{key}[{i}]", "a string", stop)
        if len(stop) > MAX_STOP_CHARS:
            raise wrong_value(f"{key}[{i}]", f"has {len(stop)} characters; at most {MAX_STOP_CHARS}")
    return tuple(stop for stop in stops if stop)  # "" would stop everything at once; some clients send it


def _logit_bias(fields: Fields) -> dict[int, float]:
    bias = {}
    for key in fields.value:
        if not (key.isascii() and key.isdigit() and len(key) < 10):
            raise wrong_value("logit_bias", f"has the key {key[:20]!r}; keys are token ids")
        bias[int(key)] = fields.number(key, 0.0, -MAX_BIAS, MAX_BIAS)
    return bias
