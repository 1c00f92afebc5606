"""The sampler: exact cuts and penalties, exact distribution, independence, refusals."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from k2hybrid.errors import EngineError, RequestError
from k2hybrid.model.sampler import BLOCK, Row, Sampler, check_sampling, cut, draw, extremes, ranked
from k2hybrid.types import SamplingParams

VOCAB = 50


def logits_of(*values: float) -> Row:
    return np.array(values, np.float32)


def random_logits(seed: int, vocab: int = VOCAB) -> Row:
    return np.random.default_rng(seed).standard_normal(vocab, np.float32) * 2


def exact_probabilities(logits: Row, params: SamplingParams) -> np.ndarray:
    """Temperature, min_p, top_k, top_p over a sorted list in double precision: the definition, slowly."""
    p = torch.softmax(torch.from_numpy(logits).double() / params.temperature, 0).tolist()
    ranking = sorted(range(len(p)), key=lambda i: (-p[i], i))
    ranking = [i for i in ranking if p[i] >= params.min_p * p[ranking[0]]]
    if params.top_k > 0:
        ranking = ranking[: params.top_k]
    mass = sum(p[i] for i in ranking)
    kept: list[int] = []
    reached = 0.0
    for i in ranking:
        if kept and reached >= params.top_p * mass:
            break
        kept.append(i)
        reached += p[i]
    out = np.zeros(len(p))
    out[kept] = [p[i] / reached for i in kept]
    return out


class Forbid:
    def __init__(self, *tokens: int) -> None:
        self.tokens = list(tokens)

    def apply(self, logits: torch.Tensor) -> None:
        logits[self.tokens] = -math.inf

    def accept(self, token: int) -> list[int]:
        return [token]


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(seed=1),
        SamplingParams(seed=1, temperature=0.6),
        SamplingParams(seed=1, temperature=1.7),
        SamplingParams(seed=1, top_p=0.8),
        SamplingParams(seed=1, top_k=7),
        SamplingParams(seed=1, min_p=0.05),
        SamplingParams(seed=1, temperature=1.3, min_p=0.02, top_k=12, top_p=0.9),
    ],
)
def test_frequencies_follow_the_exact_distribution(params: SamplingParams) -> None:
    logits = random_logits(3)
    expected = exact_probabilities(logits, params)
    sampler = Sampler(params, VOCAB)
    draws = 20_000
    counts = np.bincount([sampler.sample(logits)[0] for _ in range(draws)], minlength=VOCAB)
    assert counts[expected == 0].sum() == 0
    # Chi-square over cells with at least five expected draws; the rest together make one more cell.
    big = expected * draws >= 5
    observed = [*counts[big], counts[~big].sum()]
    wanted = [*(expected[big] * draws), expected[~big].sum() * draws]
    cells = [(o, w) for o, w in zip(observed, wanted, strict=True) if w > 0]
    chi2 = sum((o - w) ** 2 / w for o, w in cells)
    freedom = len(cells) - 1
    # Wilson and Hilferty: the cube root of chi²/n is nearly normal. 3.3 standard deviations: p ≈ 0.0005.
    z = ((chi2 / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    assert z < 3.3


@pytest.mark.parametrize("seed", range(30))
def test_cuts_keep_exactly_the_tokens_of_the_definition(seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits = random_logits(seed, 400)
    params = SamplingParams(
        temperature=float(rng.uniform(0.3, 2.0)),
        min_p=float(rng.choice([0.0, 0.01, 0.1])),
        top_k=int(rng.choice([0, 1, 5, 100])),
        top_p=float(rng.choice([0.0, 0.3, 0.95, 1.0])),
    )
    weights = np.exp((logits - logits.max()) / np.float32(params.temperature))
    kept = cut(weights, params.min_p, params.top_k, params.top_p)
    expected = np.flatnonzero(exact_probabilities(logits, params))
    assert sorted(kept.tolist()) == expected.tolist()


def test_top_p_prunes_before_sorting_without_losing_anything() -> None:
    # Flat, and nearly flat: the case in which the bound is tightest.
    flat = np.ones(1000, dtype=np.float32)
    assert cut(flat, 0.0, 0, 0.5).tolist() == list(range(500))
    nearly = np.linspace(1.0, 0.999, 1000).astype(np.float32)
    assert cut(nearly, 0.0, 0, 0.25).tolist() == list(range(250))
    peaked = np.full(1000, 1e-6, dtype=np.float32)
    peaked[7] = 1.0
    assert cut(peaked, 0.0, 0, 0.99).tolist() == [7]


def test_among_equals_lower_ids_rank_first() -> None:
    values = np.array([1, 3, 2, 3, 3, 2], dtype=np.float32)
    assert ranked(values, 2).tolist() == [1, 3]
    assert ranked(values, 4).tolist() == [1, 3, 4, 2]
    assert ranked(values, 6).tolist() == [1, 3, 4, 2, 5, 0]
    sampler = Sampler(SamplingParams(temperature=0.0), 6)
    assert sampler.sample(values)[0] == 1


@pytest.mark.parametrize("temperature", [0.0, 1e-6, 1e-40])
def test_no_temperature_is_greedy(temperature: float) -> None:
    sampler = Sampler(SamplingParams(temperature=temperature), VOCAB)
    for seed in range(20):
        logits = random_logits(seed)
        assert sampler.sample(logits)[0] == int(logits.argmax())


def test_extreme_temperatures_stay_finite() -> None:
    logits = random_logits(0)
    assert Sampler(SamplingParams(temperature=1e-5), VOCAB).sample(logits)[0] == int(logits.argmax())
    hot = Sampler(SamplingParams(temperature=1e30, seed=0), VOCAB)
    assert len({hot.sample(logits)[0] for _ in range(400)}) > 40


def test_the_seed_decides() -> None:
    logits = [random_logits(n) for n in range(40)]

    def draw(seed: int | None) -> list[int]:
        sampler = Sampler(SamplingParams(seed=seed), VOCAB)
        return [sampler.sample(row)[0] for row in logits]

    assert draw(5) == draw(5)
    assert draw(5) != draw(6)
    assert draw(-1) == draw(-1)
    assert draw(2**70) == draw(2**70)
    assert draw(None) != draw(None)


def test_the_row_is_not_changed_and_other_rows_do_not_matter() -> None:
    block = np.stack([random_logits(1), random_logits(2)])
    before = block.copy()
    params = SamplingParams(seed=3, presence_penalty=1.0, repetition_penalty=1.2, logit_bias={4: 5.0})
    together = Sampler(params, VOCAB, [1, 2])
    alone = Sampler(params, VOCAB, [1, 2])
    for _ in range(20):
        assert together.sample(block[1])[0] == alone.sample(random_logits(2))[0]
    assert np.array_equal(block, before)


def test_extremes_of_many_rows_are_those_of_each() -> None:
    """Equal logits, NaN and infinities among them; what is known before changes no choice."""
    rows = np.stack([random_logits(n) for n in range(12)])
    rows[1, 5] = rows[1, 3] = rows[1].max() + 1
    rows[2, 7], rows[3, 0], rows[4, 9] = float("nan"), float("inf"), -float("inf")
    found = extremes(rows)
    assert found[1].first == 3
    assert [e.finite for e in found] == [n not in (2, 3, 4) for n in range(12)]
    for n, row in enumerate(rows):
        if not found[n].finite:
            continue
        assert (found[n].greatest, found[n].least) == (float(row.max()), float(row.min()))
        for params in (
            SamplingParams(temperature=0.0, logprobs=3),
            SamplingParams(seed=n, logprobs=0),
            SamplingParams(temperature=0.0),  # a mask is written into the row itself
            SamplingParams(temperature=0.0, logit_bias={found[n].first: -50.0}),
        ):
            for mask in (None, Forbid(found[n].first)):
                told = Sampler(params, VOCAB).sample(row.copy(), mask, found[n])
                assert told == Sampler(params, VOCAB).sample(row.copy(), mask)
    assert extremes(rows[:0]) == []


def test_presence_and_frequency_count_generated_tokens_only() -> None:
    params = SamplingParams(temperature=0.0, presence_penalty=1.0, frequency_penalty=0.5)
    sampler = Sampler(params, 3, prompt=[0, 0, 0])
    row = logits_of(4.0, 2.4, 0.0)
    # Token 0 loses 1.5, then 0.5 more each time: 4.0, 2.5, then 2.0 < 2.4.
    assert [sampler.sample(row)[0] for _ in range(3)] == [0, 0, 1]


def test_repetition_counts_the_prompt_too_and_shrinks_either_sign() -> None:
    params = SamplingParams(temperature=0.0, repetition_penalty=2.0)
    assert Sampler(params, 3, prompt=[0]).sample(logits_of(3.0, 2.0, 0.0))[0] == 1
    assert Sampler(params, 3).sample(logits_of(3.0, 2.0, 0.0))[0] == 0
    assert Sampler(params, 2, prompt=[0]).sample(logits_of(-1.0, -1.5))[0] == 1
    after_one = Sampler(params, 3)
    assert [after_one.sample(logits_of(3.0, 2.0, 0.0))[0] for _ in range(2)] == [0, 1]


def test_logit_bias_forces_and_forbids() -> None:
    sampler = Sampler(SamplingParams(logit_bias={7: 100.0}), VOCAB)
    assert {sampler.sample(random_logits(n))[0] for n in range(20)} == {7}
    best = int(random_logits(1).argmax())
    banned = Sampler(SamplingParams(temperature=0.0, logit_bias={best: -100.0}), VOCAB)
    assert banned.sample(random_logits(1))[0] != best


def test_the_mask_is_obeyed() -> None:
    mask = Forbid(*range(1, VOCAB))
    sampler = Sampler(SamplingParams(seed=0), VOCAB)
    assert [sampler.sample(random_logits(n), mask)[0] for n in range(5)] == [0] * 5
    with pytest.raises(EngineError, match="forbids every token"):
        sampler.sample(random_logits(0), Forbid(*range(VOCAB)))


def test_tokens_taken_instead_of_the_chosen_one_are_counted() -> None:
    params = SamplingParams(temperature=0.0, frequency_penalty=2.0, repetition_penalty=2.0)
    told, plain = Sampler(params, VOCAB, [5]), Sampler(params, VOCAB, [5])
    chosen, _ = told.sample(random_logits(20))
    told.correct(chosen, [1, 2, 5])
    for token in (1, 2, 5):
        row = np.full(VOCAB, -1.0, np.float32)
        row[token] = 50.0
        assert plain.sample(row)[0] == token
    for n in range(5):
        assert told.sample(random_logits(n)) == plain.sample(random_logits(n))


def test_tokens_taken_back_leave_no_trace() -> None:
    params = SamplingParams(temperature=0.0, frequency_penalty=2.0, repetition_penalty=2.0)
    sampler, fresh = Sampler(params, VOCAB, [5]), Sampler(params, VOCAB, [5])
    drawn = [sampler.sample(random_logits(n))[0] for n in range(5)]
    sampler.forget(drawn)
    assert sampler.sample(random_logits(9)) == fresh.sample(random_logits(9))


def test_logprobs_are_those_of_the_raw_logits() -> None:
    logits = random_logits(9)
    exact = torch.log_softmax(torch.from_numpy(logits).double(), 0)
    params = SamplingParams(
        temperature=0.3, top_k=2, presence_penalty=2.0, logit_bias={3: -50.0}, logprobs=5, seed=1
    )
    sampler = Sampler(params, VOCAB)
    for _ in range(3):
        token, logprob = sampler.sample(logits)
        assert logprob is not None
        assert logprob.token == token
        assert logprob.logprob == pytest.approx(float(exact[token]), abs=1e-5)
        order = exact.argsort(descending=True)[:5].tolist()
        assert [i for i, _ in logprob.top] == order
        assert [v for _, v in logprob.top] == pytest.approx(exact[order].tolist(), abs=1e-5)
    chosen_only = Sampler(SamplingParams(logprobs=0), VOCAB).sample(logits)[1]
    assert chosen_only is not None
    assert chosen_only.top == ()
    assert Sampler(SamplingParams(), VOCAB).sample(logits)[1] is None


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(seed=0, repetition_penalty=1e-3),
        SamplingParams(seed=0, repetition_penalty=1e3),
        SamplingParams(seed=0, temperature=1e30),
    ],
)
def test_the_bounds_of_the_ranges_keep_every_number_finite(params: SamplingParams) -> None:
    logits = random_logits(5) * np.float32(1e4)
    sampler = Sampler(params, VOCAB, prompt=range(VOCAB))
    with np.errstate(all="raise", under="ignore"):
        for _ in range(20):
            assert sampler.sample(logits.copy(), Forbid(3))[0] != 3


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_named(bad: float, temperature: float) -> None:
    logits = random_logits(0)
    logits[VOCAB - 1] = bad
    with pytest.raises(EngineError, match="not finite"):
        Sampler(SamplingParams(temperature=temperature), VOCAB).sample(logits)


def test_a_draw_at_the_very_end_takes_the_last_possible_token() -> None:
    sampler = Sampler(SamplingParams(), 4)

    class One:
        def random(self) -> float:
            return 1.0

    sampler._uniform = One()  # type: ignore[assignment]
    mask = Forbid(3)
    assert sampler.sample(logits_of(0.0, 0.0, 0.0, 0.0), mask)[0] == 2


def test_a_draw_by_blocks_agrees_with_a_running_sum() -> None:
    rng = np.random.default_rng(0)
    weights = (rng.random(4 * BLOCK) ** 30).astype(np.float32)
    weights[BLOCK : 2 * BLOCK] = 0  # a block that is impossible
    weights[-BLOCK:] = 0
    mass = np.cumsum(weights, dtype=np.float64)
    different = 0
    for uniform in rng.random(3000):
        index = draw(weights, float(uniform))
        assert weights[index] > 0
        different += index != mass.searchsorted(uniform * mass[-1], side="right")
    assert different <= 3  # only where the sum of a block was rounded just there
    assert draw(weights, 0.0) == weights.nonzero()[0][0]
    assert draw(weights, 1.0) == weights.nonzero()[0][-1]


@pytest.mark.parametrize(
    ("params", "param"),
    [
        (SamplingParams(temperature=-0.1), "temperature"),
        (SamplingParams(temperature=math.nan), "temperature"),
        (SamplingParams(temperature=math.inf), "temperature"),
        (SamplingParams(top_p=1.01), "top_p"),
        (SamplingParams(min_p=-1), "min_p"),
        (SamplingParams(top_k=-2), "top_k"),
        (SamplingParams(presence_penalty=2.1), "presence_penalty"),
        (SamplingParams(frequency_penalty=-2.1), "frequency_penalty"),
        (SamplingParams(temperature=1e300), "temperature"),
        (SamplingParams(repetition_penalty=0.0), "repetition_penalty"),
        (SamplingParams(repetition_penalty=1e-320), "repetition_penalty"),
        (SamplingParams(repetition_penalty=1e300), "repetition_penalty"),
        (SamplingParams(logit_bias={VOCAB: 1.0}), "logit_bias"),
        (SamplingParams(logit_bias={-1: 1.0}), "logit_bias"),
        (SamplingParams(logit_bias={1: 101.0}), "logit_bias"),
        (SamplingParams(logprobs=-1), "logprobs"),
        (SamplingParams(logprobs=100_000), "logprobs"),
    ],
)
def test_parameters_out_of_range_are_refused_by_name(params: SamplingParams, param: str) -> None:
    with pytest.raises(RequestError, match=param) as refused:
        check_sampling(params, VOCAB)
    assert refused.value.param == param
    assert refused.value.code == "invalid_value"
