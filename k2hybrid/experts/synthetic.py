"""Routing traces made up by rule: how skewed and how sticky the choices are is set, not learnt."""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

from k2hybrid.errors import ConfigError
from k2hybrid.experts.traces import Ints, Trace, TraceHeader, offsets

Floats = npt.NDArray[np.float64]


def synthetic(
    *,
    layers: int,
    experts: int,
    top_k: int,
    passes: int,
    skew: float = 0.0,
    stickiness: float = 0.0,
    drift: float = 0.0,
    seed: int = 0,
    expert_bytes: int = 0,
) -> Trace:
    """`passes` passes of one row through `layers` MoE layers.

    Each layer has its own order of experts; the one at place r (from 1) weighs r^−skew (Zipf). Each choice of
    the last pass stays with probability `stickiness`; the others are drawn anew, by weight, without repeats.
    With `drift`, that share of a layer's experts trade places in its order before each pass, on average.

    Raises:
        ConfigError: skew is negative, or stickiness or drift no probability.
        TraceError: the sizes are not those of a model.
    """
    if not (0 <= skew < 100 and 0 <= stickiness <= 1 and 0 <= drift <= 1 and passes >= 0):
        raise ConfigError(
            f"a synthetic trace needs a skew from 0 on, stickiness and drift of 0…1 and passes from 0 on, "
            f"not {skew}, {stickiness}, {drift} and {passes}"
        )
    drifts = f", drift {drift:g}" if drift else ""
    rule = f"synthetic, skew {skew:g}, stickiness {stickiness:g}{drifts}, seed {seed}"
    header = TraceHeader(rule, layers, experts, top_k, "k2hybrid", expert_bytes)
    rng = np.random.default_rng(seed)
    weight = -skew * np.log(np.arange(1, experts + 1))
    weights = np.stack([rng.permutation(weight) for _ in range(layers)])
    ids = np.empty((passes, layers, top_k), np.int32)
    for at in range(passes):
        if drift:
            _trade(weights, rng, drift)
        # The largest of weight + Gumbel noise are a draw without repeats (T. Vieira, 2014).
        drawn = weights + rng.gumbel(size=weights.shape)
        if at:
            stays = rng.random((layers, top_k)) < stickiness
            layer, column = np.nonzero(stays)
            drawn[layer, ids[at - 1, layer, column]] += 1e6  # before all that are new
        ids[at] = np.argpartition(-drawn, top_k - 1, axis=1)[:, :top_k]
    tickets = passes * layers
    return Trace(
        header,
        np.tile(np.arange(layers, dtype=np.int32), passes),
        np.ones(tickets, np.int32),
        offsets(np.full(tickets, top_k)),
        ids.reshape(-1),
        np.full(tickets, -1, np.int32),
        np.zeros(tickets + 1, np.int64),
        np.zeros(0, np.int32),
    )


def _trade(weights: Floats, rng: np.random.Generator, drift: float) -> None:
    """Swap the weights of random pairs of experts, in place: a share `drift` of each layer's, on average."""
    layers, experts = weights.shape
    for layer, pairs in enumerate(rng.poisson(drift * experts / 2, layers)):
        for _ in range(pairs):
            a, b = rng.integers(experts, size=2)
            weights[layer, [a, b]] = weights[layer, [b, a]]


def foreseen(trace: Trace, width: int, recall: float, seed: int = 0) -> Trace:
    """`trace`, whose tickets have one row each, with predictions of `width` ids for the layer that follows.

    Each true choice is among them with probability `recall`, and first; the others are drawn at random.
    Nothing is foreseen for the first layer of the next pass, whose token is not known yet.

    Raises:
        ConfigError: rows or widths do not fit, or recall is no probability.
    """
    header = trace.header
    if not (0 <= recall <= 1 and header.top_k <= width <= header.experts and (trace.rows == 1).all()):
        raise ConfigError(
            f"predictions need one row a ticket, a recall of 0…1, not {recall}, and "
            f"{header.top_k}…{header.experts} ids, not {width}"
        )
    rng = np.random.default_rng(seed)
    true = trace.ids.reshape(-1, header.top_k)[1:]
    has = trace.layer[1:] > trace.layer[:-1]
    drawn = rng.random((len(true), header.experts), np.float32)
    ticket = np.arange(len(true))[:, None]
    drawn[ticket, true] = np.where(rng.random(true.shape) < recall, drawn[ticket, true] - 1, 2.0)
    ids: Ints = np.argsort(drawn, axis=1)[:, :width].astype(np.int32)[has]
    known = np.concatenate((has, [False]))[: len(trace)]
    ahead_layer = np.where(known, np.append(trace.layer[1:], -1)[: len(trace)], -1).astype(np.int32)
    return dataclasses.replace(
        trace,
        header=dataclasses.replace(header, ahead=width),
        ahead_layer=ahead_layer,
        ahead_starts=offsets(known * width),
        ahead_ids=ids.reshape(-1),
    )
