"""Logits of a sequence's last row → the tokens that it goes on with. Layer 4."""

from __future__ import annotations

from k2hybrid.engine.sequence import Sequence
from k2hybrid.model.sampler import Extremes, Row
from k2hybrid.types import TokenEvent, TokenLogprob


def choose(sequence: Sequence, logits: Row, known: Extremes) -> tuple[list[TokenEvent], bool]:
    """The next tokens of `sequence`, and whether its answer ends with them.

    There is one, or as many as its job's mask forces; none beyond `max_tokens` or the end.

    Args:
        logits: fp32 [vocab]; a mask may be written into it.
        known: their extremes.

    Raises:
        Exception: what the sampler, the mask or the stop rule raises, for this sequence alone.
    """
    job = sequence.job
    token, logprob = sequence.sampler.sample(logits, job.mask, known)
    events = [TokenEvent(token, logprob)] if job.mask is None else _taken(sequence, token, logprob)
    del events[job.max_tokens - sequence.generated :]
    for at, event in enumerate(events, 1):
        if job.stop.push(event.token):
            return events[:at], True
    return events, False


def _taken(sequence: Sequence, token: int, logprob: TokenLogprob | None) -> list[TokenEvent]:
    """What the job's mask makes of the token that was chosen. What it forces has probability 1."""
    mask = sequence.job.mask
    tokens = (token,) if mask is None else mask.accept(token)
    if len(tokens) == 1 and tokens[0] == token:
        return [TokenEvent(token, logprob)]
    sequence.sampler.correct(token, tokens)
    return [
        TokenEvent(
            taken,
            logprob
            if at == 0 and taken == token
            else None
            if logprob is None
            else TokenLogprob(taken, 0.0, ((taken, 0.0),) if logprob.top else ()),
        )
        for at, taken in enumerate(tokens)
    ]
