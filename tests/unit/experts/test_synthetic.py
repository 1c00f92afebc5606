"""Synthetic traces have the skew and the stickiness that they were asked for."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from k2hybrid.errors import ConfigError, TraceError
from k2hybrid.experts.synthetic import foreseen, synthetic


def test_sizes_order_and_seed() -> None:
    trace = synthetic(layers=3, experts=10, top_k=4, passes=50, skew=1.0, stickiness=0.5, seed=8)
    assert trace.layer.tolist() == [0, 1, 2] * 50
    ids = trace.ids.reshape(150, 4)
    assert all(len(set(row)) == 4 for row in ids.tolist()), "no expert twice"
    assert (ids.min(), ids.max()) == (0, 9)
    again = synthetic(layers=3, experts=10, top_k=4, passes=50, skew=1.0, stickiness=0.5, seed=8)
    other = synthetic(layers=3, experts=10, top_k=4, passes=50, skew=1.0, stickiness=0.5, seed=9)
    assert (again.ids == trace.ids).all()
    assert (other.ids != trace.ids).any()


def test_skew_is_that_of_zipf() -> None:
    """One choice a token: the share of the r-th most used expert is r^−s / Σ, in each layer's own order."""
    passes, experts, skew = 20_000, 12, 1.2
    trace = synthetic(layers=2, experts=experts, top_k=1, passes=passes, skew=skew, seed=3)
    share = np.arange(1, experts + 1) ** -skew
    share /= share.sum()
    orders = []
    for layer in (0, 1):
        uses = np.bincount(trace.ids[trace.layer == layer], minlength=experts) / passes
        orders.append(np.argsort(-uses).tolist())
        # Five standard errors of a count.
        assert (np.abs(np.sort(uses)[::-1] - share) < 5 * np.sqrt(share / passes)).all()
    assert orders[0] != orders[1]


@pytest.mark.parametrize("stickiness", [0.0, 0.4, 1.0])
def test_stickiness_is_the_share_that_stays(stickiness: float) -> None:
    """Of many equal experts a new choice is rarely an old one: k/n of the time at most."""
    passes, experts, top_k = 3000, 400, 2
    trace = synthetic(layers=1, experts=experts, top_k=top_k, passes=passes, stickiness=stickiness, seed=1)
    ids = trace.ids.reshape(passes, top_k)
    stayed = np.mean([len(set(a) & set(b)) / top_k for a, b in itertools.pairwise(ids)])
    by_chance = (1 - stickiness) * top_k / experts
    assert stayed == pytest.approx(stickiness + by_chance, abs=5 * np.sqrt(0.25 / (passes * top_k)))


def test_all_experts_each_time() -> None:
    trace = synthetic(layers=1, experts=4, top_k=4, passes=5, stickiness=0.7)
    assert np.sort(trace.ids.reshape(5, 4)).tolist() == [[0, 1, 2, 3]] * 5
    assert len(synthetic(layers=2, experts=4, top_k=1, passes=0)) == 0


def test_predictions_follow_the_layers_of_a_pass() -> None:
    trace = foreseen(synthetic(layers=3, experts=9, top_k=2, passes=4), 5, 1.0)
    assert trace.ahead_layer.tolist() == [1, 2, -1] * 4
    for at in np.nonzero(trace.ahead_layer >= 0)[0]:
        ids = trace.ahead_ids[trace.ahead_starts[at] : trace.ahead_starts[at + 1]].tolist()
        assert len(set(ids)) == 5
        true = trace.ids[trace.starts[at + 1] : trace.starts[at + 2]].tolist()
        assert set(ids[:2]) == set(true)


def test_what_makes_no_sense_is_refused() -> None:
    for change in ({"skew": -0.1}, {"stickiness": 1.1}, {"skew": float("nan")}, {"passes": -1}):
        with pytest.raises(ConfigError, match="a synthetic trace needs"):
            synthetic(**{"layers": 1, "experts": 4, "top_k": 2, "passes": 1, **change})  # type: ignore[arg-type]
    with pytest.raises(TraceError, match="ids a row"):
        synthetic(layers=1, experts=4, top_k=5, passes=1)
    trace = synthetic(layers=1, experts=4, top_k=2, passes=2)
    for width, recall in ((1, 0.5), (5, 0.5), (2, -0.5), (2, 1.5)):
        with pytest.raises(ConfigError, match="predictions need"):
            foreseen(trace, width, recall)


def test_drift_moves_the_favourites() -> None:
    def used(drift: float) -> np.ndarray:
        trace = synthetic(layers=1, experts=40, top_k=2, passes=4000, skew=1.5, drift=drift, seed=5)
        early, late = np.split(trace.ids, [len(trace.ids) // 2])
        return np.stack([np.bincount(half, minlength=40) for half in (early, late)]) / len(early)

    still, drifting = used(0.0), used(1 / 500)
    assert np.abs(still[0] - still[1]).sum() < 0.15
    assert np.abs(drifting[0] - drifting[1]).sum() > 0.3
