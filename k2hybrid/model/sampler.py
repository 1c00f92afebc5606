"""Draws the next token of one sequence from its logits. Layer 3.

Order of operations, all in fp32 on this row alone, so that no other request can change the outcome:

1. the log-probabilities that a client may ask for are taken from the raw logits;
2. repetition penalty (over prompt and generated tokens): divides positive logits, multiplies others;
3. presence and frequency penalties (over generated tokens only, as in OpenAI's API);
4. `logit_bias`, then the mask;
5. temperature (below 1e-5: the best token, lowest id among equals, and nothing further);
6. cuts on the tempered distribution, each renormalising for the next: `min_p`, `top_k`, `top_p`. Among equal
   logits lower ids rank first;
7. one uniform number of a counter-based generator (Philox) keyed by the seed picks the token by inverse CDF.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from k2hybrid.errors import EngineError, RequestError
from k2hybrid.types import LogitsMask, SamplingParams, TokenLogprob

Row = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]

GREEDY_BELOW = 1e-5  # smaller temperatures would overflow fp32, and mean the same
MAX_TEMPERATURE = 1e30  # the inverse of a larger one is 0 in fp32, and 0 · −inf is not a number
MAX_REPETITION = 1e3  # 1/MAX_REPETITION to MAX_REPETITION: far outside this, penalised logits overflow fp32
MAX_LOGPROBS = 1024
BLOCK = 512  # weights summed at a time when a token is drawn from the whole vocabulary


def check_sampling(params: SamplingParams, vocab_size: int) -> None:
    """Refuse parameters outside their range.

    Raises:
        RequestError: naming the field, its value and its range.
    """

    def within(name: str, value: float, low: float, high: float) -> None:
        if not (low <= value <= high) or not math.isfinite(value):
            upper = "" if high == math.inf else f" and at most {high:g}"
            raise RequestError(
                f"{name} must be at least {low:g}{upper}, not {value}", param=name, code="invalid_value"
            )

    within("temperature", params.temperature, 0.0, MAX_TEMPERATURE)
    within("top_p", params.top_p, 0.0, 1.0)
    within("min_p", params.min_p, 0.0, 1.0)
    within("top_k", params.top_k, -1, math.inf)
    within("presence_penalty", params.presence_penalty, -2.0, 2.0)
    within("frequency_penalty", params.frequency_penalty, -2.0, 2.0)
    within("repetition_penalty", params.repetition_penalty, 1 / MAX_REPETITION, MAX_REPETITION)
    if params.logprobs is not None:
        within("logprobs", params.logprobs, 0, MAX_LOGPROBS)
    for token, bias in params.logit_bias.items():
        if not 0 <= token < vocab_size:
            raise RequestError(
                f"logit_bias names token {token}; this vocabulary has ids 0 to {vocab_size - 1}",
                param="logit_bias",
                code="invalid_value",
            )
        within("logit_bias", bias, -100.0, 100.0)


class Extremes(NamedTuple):
    """Of a row of logits: the greatest, the least, and the lowest id of the greatest."""

    greatest: float
    least: float
    first: int

    @property
    def finite(self) -> bool:
        """Whether all logits are: NaN and either infinity show here."""
        return math.isfinite(self.greatest) and math.isfinite(self.least)


def extremes(rows: Row) -> list[Extremes]:
    """Of each row of logits fp32 [R, vocab]; at once, since every sequence of a decode step asks."""
    if not len(rows):
        return []
    first = rows.argmax(axis=1)  # numpy returns the lowest id among equals, or the first NaN
    greatest = rows[np.arange(len(rows)), first].tolist()
    return list(map(Extremes, greatest, rows.min(axis=1).tolist(), first.tolist()))


class Sampler:
    """The sampling state of one sequence: its random stream and what its penalties count.

    Args:
        params: checked with `check_sampling`.
        vocab_size: length of a logits row.
        prompt: prompt ids, counted by the repetition penalty.

    Raises:
        RequestError: a parameter is out of range.
    """

    def __init__(self, params: SamplingParams, vocab_size: int, prompt: Sequence[int] = ()) -> None:
        check_sampling(params, vocab_size)
        self._params = params
        self._vocab_size = vocab_size
        key = None if params.seed is None else params.seed % (1 << 128)
        self._uniform = np.random.Generator(np.random.Philox(key=key))
        self._padded: Row = np.empty(0, np.float32)
        self._counts: dict[int, int] = {}  # of generated tokens
        self._prompt = frozenset(prompt) if params.repetition_penalty != 1.0 else frozenset()
        self._seen = set(self._prompt)
        self._bias_ids = np.fromiter(params.logit_bias.keys(), np.int64)
        self._bias = np.fromiter(params.logit_bias.values(), np.float32)

    def sample(
        self, logits: Row, mask: LogitsMask | None = None, known: Extremes | None = None
    ) -> tuple[int, TokenLogprob | None]:
        """Choose a token and count it.

        Args:
            logits: fp32 [vocab]; a mask may be written into it.
            mask: forbids tokens; asked to `apply`. What it makes of the choice goes to `correct`.
            known: the logits' `extremes`, if they were looked for.

        Raises:
            EngineError: a logit is not finite, or the mask forbids every token.
        """
        known = known or extremes(logits[np.newaxis])[0]
        if not known.finite:
            raise EngineError(
                "the model produced logits that are not finite; this request ends, others go on"
            )
        row = self._adjusted(logits, mask)
        token = self._choose(row, known.first if row is logits and mask is None else int(row.argmax()))
        self._count(token)
        return token, self._logprob(logits, known.greatest, token)

    def correct(self, chosen: int, taken: Sequence[int]) -> None:
        """Instead of `chosen`, the token sampled last, the tokens `taken` were generated."""
        self.forget([chosen])
        for token in taken:
            self._count(token)

    def forget(self, tokens: Iterable[int]) -> None:
        """These were generated and are taken back."""
        for token in tokens:
            left = self._counts.get(token, 0) - 1
            if left > 0:
                self._counts[token] = left
            else:
                self._counts.pop(token, None)
                if token not in self._prompt:
                    self._seen.discard(token)

    def warm(self, temperature: float) -> None:
        """Draw at `temperature` from now on, if it was lower."""
        if self._params.temperature < temperature:
            self._params = replace(self._params, temperature=temperature)

    def _count(self, token: int) -> None:
        self._counts[token] = self._counts.get(token, 0) + 1
        if self._params.repetition_penalty != 1.0:
            self._seen.add(token)

    def _adjusted(self, logits: Row, mask: LogitsMask | None) -> Row:
        params = self._params
        penalised = params.presence_penalty != 0.0 or params.frequency_penalty != 0.0
        if not penalised and params.repetition_penalty == 1.0 and not self._bias_ids.size:
            if mask is None:
                return logits
            if params.logprobs is None:
                mask.apply(torch.from_numpy(logits))
                return logits
        row = logits.copy()
        if self._seen:
            seen = np.fromiter(self._seen, np.int64)
            values = row[seen]
            penalty = np.float32(params.repetition_penalty)
            row[seen] = np.where(values > 0, values / penalty, values * penalty)
        if penalised and self._counts:
            ids = np.fromiter(self._counts.keys(), np.int64)
            counts = np.fromiter(self._counts.values(), np.float32)
            row[ids] -= np.float32(params.frequency_penalty) * counts + np.float32(params.presence_penalty)
        if self._bias_ids.size:
            row[self._bias_ids] += self._bias
        if mask is not None:
            mask.apply(torch.from_numpy(row))
        return row

    def _choose(self, row: Row, first: int) -> int:
        """`first`: the lowest id of the greatest logit."""
        params = self._params
        best = row[first]
        if best == -np.inf:
            raise EngineError("the mask forbids every token")
        if params.temperature < GREEDY_BELOW:
            return first
        weights = self._scratch(len(row))
        np.subtract(row, best, out=weights)
        if params.temperature != 1.0:
            weights *= np.float32(1.0 / params.temperature)
        np.exp(weights, out=weights)  # unnormalised probabilities; the best token has exactly 1
        if params.min_p == 0.0 and params.top_k <= 0 and params.top_p >= 1.0:
            return draw(self._padded, self._uniform.random())
        ids = cut(weights, params.min_p, params.top_k, params.top_p)
        return int(ids[_find(weights[ids], self._uniform.random())])

    def _scratch(self, vocab_size: int) -> Row:
        """Memory for a row, kept: fresh pages for each token would cost more than the arithmetic."""
        if not len(self._padded):
            self._padded = np.zeros(-(-vocab_size // BLOCK) * BLOCK, np.float32)
        return self._padded[:vocab_size]

    def _logprob(self, raw: Row, best: float, token: int) -> TokenLogprob | None:
        wanted = self._params.logprobs
        if wanted is None:
            return None
        total = best + math.log(float(np.exp(raw - np.float32(best)).sum(dtype=np.float64)))
        ids = ranked(raw, min(wanted, self._vocab_size)) if wanted else np.empty(0, np.int64)
        top = tuple((int(i), float(raw[i]) - total) for i in ids)
        return TokenLogprob(token, float(raw[token]) - total, top)


def draw(weights: Row, uniform: float) -> int:
    """The index at which the running sum of `weights` passes `uniform` of the total.

    First the block, by sums of blocks, then the place in it: no running sum over the whole vocabulary.

    Args:
        weights: not negative; length a multiple of `BLOCK`.
        uniform: in [0, 1).
    """
    blocks = weights.reshape(-1, BLOCK)
    mass = np.cumsum(blocks.sum(axis=1), dtype=np.float64)
    target = uniform * mass[-1]
    block = min(
        int(mass.searchsorted(target, side="right")), int(np.flatnonzero(np.diff(mass, prepend=0.0))[-1])
    )
    before = mass[block - 1] if block else 0.0
    inside = np.cumsum(blocks[block], dtype=np.float64)
    return block * BLOCK + _within(inside, blocks[block], target - before)


def _find(weights: Row, uniform: float) -> int:
    mass = np.cumsum(weights, dtype=np.float64)
    return _within(mass, weights, uniform * mass[-1])


def _within(mass: npt.NDArray[np.float64], weights: Row, target: float) -> int:
    index = int(mass.searchsorted(target, side="right"))
    if index == len(mass):  # rounded up to the total: the last that is possible
        index = int(weights.nonzero()[0][-1])
    return index


def ranked(values: Row, count: int) -> Ids:
    """Ids of the `count` largest values, largest first; lower ids first among equals."""
    if count < len(values):
        threshold = np.partition(values, len(values) - count)[len(values) - count]
        candidates = np.flatnonzero(values >= threshold)
    else:
        candidates = np.arange(len(values))
    order = np.argsort(-values[candidates], kind="stable")
    return candidates[order][:count]


def cut(weights: Row, min_p: float, top_k: int, top_p: float) -> Ids:
    """Ids that survive `min_p`, then `top_k`, then `top_p`, ascending; never empty.

    Args:
        weights: unnormalised probabilities whose largest is 1.
        min_p: keep tokens at least this share of the best token's probability.
        top_k: keep so many; 0 or less keeps all.
        top_p: of what is left, keep the fewest best tokens whose share reaches it.
    """
    kept: Ids | None = None  # None: all, without copying the row
    if min_p > 0.0:
        kept = np.flatnonzero(weights >= np.float32(min_p))
    if 0 < top_k < (len(weights) if kept is None else len(kept)):
        best = ranked(weights if kept is None else weights[kept], top_k)
        kept = np.sort(best if kept is None else kept[best])
    values = weights if kept is None else weights[kept]
    if top_p < 1.0:
        chosen = _nucleus(values, top_p)
        return chosen if kept is None else kept[chosen]
    return np.arange(len(weights)) if kept is None else kept


def _nucleus(values: Row, top_p: float) -> Ids:
    """Places of the fewest largest values whose share reaches `top_p`, ascending."""
    mass = float(values.sum(dtype=np.float64))
    # All values below this bound together weigh less than what top_p drops anyway: no need to sort them.
    head = np.flatnonzero(values >= 0.999 * (1.0 - top_p) * mass / len(values))
    descending = -np.sort(-values[head])
    before = np.cumsum(descending, dtype=np.float64) - descending
    count = max(1, int(np.count_nonzero(before < top_p * mass)))
    last = descending[count - 1]
    candidates = np.flatnonzero(values >= last)
    surplus = len(candidates) - count  # equals of the last beyond the count: the higher ids go
    if surplus > 0:
        equals = np.flatnonzero(values[candidates] == last)
        candidates = np.delete(candidates, equals[-surplus:])
    return candidates
