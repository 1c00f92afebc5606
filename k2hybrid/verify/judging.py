"""Which calls of an answer are right: a declared tool is named, and its arguments fit its schema."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from k2hybrid.verify.endpoint import Answer
from k2hybrid.verify.samples import Sample

CUT_OFF = "length"  # the finish_reason of an answer whose last call may not be whole


@dataclass(frozen=True)
class Verdict:
    """How one request went. `wrong`: a line for each call that is not right."""

    line: int
    finish_reason: str | None  # None: it has no answer
    calls: int = 0
    wrong: tuple[str, ...] = ()
    unreadable: int = 0
    failure: str | None = None

    @property
    def lines(self) -> list[str]:
        """What there is to say, a line each, without anything that was asked or answered."""
        said = [*self.wrong]
        if self.failure is not None:
            said.append(self.failure)
        if self.unreadable:
            said.append(f"{self.unreadable} times neither text nor a call")
        return [f"line {self.line}: {what}" for what in said]


def judged(sample: Sample, answer: Answer) -> Verdict:
    """The verdict on an answer. A last call that was cut off is none: nobody could run it."""
    calls = answer.calls[:-1] if answer.finish_reason == CUT_OFF else answer.calls
    wrong = []
    for number, call in enumerate(calls, start=1):
        tool = sample.tools.get(call.name)
        reason = "no such tool is declared" if tool is None else tool.misfit(call.arguments)
        if reason is not None:
            wrong.append(f"call {number}, {call.name[:80]!r}: {reason}")
    return Verdict(sample.line, answer.finish_reason, len(calls), tuple(wrong), answer.unreadable)


@dataclass(frozen=True)
class Summary:
    """The figures of a run."""

    requests: int
    answered: int
    finish_reasons: Mapping[str, int]
    with_calls: int  # answers that hold any
    all_right: int  # of those, without a wrong one
    calls: int
    right: int
    unreadable: int
    failures: list[str] = field(default_factory=list)

    @property
    def accuracy(self) -> float | None:
        """The share of calls that are right; None without any."""
        return self.right / self.calls if self.calls else None

    @property
    def perfect(self) -> bool:
        """Every request was answered, there are calls, and all of them are right."""
        return self.answered == self.requests and self.calls > 0 and self.right == self.calls

    def as_json(self) -> dict[str, Any]:
        return {
            "requests": self.requests,
            "answered": self.answered,
            "finish_reasons": dict(self.finish_reasons),
            "answers_with_calls": self.with_calls,
            "answers_all_right": self.all_right,
            "calls": self.calls,
            "calls_right": self.right,
            "schema_accuracy": self.accuracy,
            "unreadable": self.unreadable,
            "failures": self.failures,
        }


def summary(verdicts: Iterable[Verdict]) -> Summary:
    """The figures of all verdicts."""
    verdicts = list(verdicts)
    reasons = Counter(verdict.finish_reason for verdict in verdicts if verdict.finish_reason is not None)
    calling = [verdict for verdict in verdicts if verdict.calls]
    return Summary(
        requests=len(verdicts),
        answered=sum(reasons.values()),
        finish_reasons=dict(reasons.most_common()),
        with_calls=len(calling),
        all_right=sum(not verdict.wrong for verdict in calling),
        calls=sum(verdict.calls for verdict in calling),
        right=sum(verdict.calls - len(verdict.wrong) for verdict in calling),
        unreadable=sum(verdict.unreadable for verdict in verdicts),
        failures=[line for verdict in verdicts for line in verdict.lines],
    )
