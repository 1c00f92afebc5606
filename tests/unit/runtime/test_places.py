"""A model answers the same wherever its experts lie."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest

import k2hybrid
from k2hybrid.checkpoint.spec import read_spec
from k2hybrid.config import MINI_MODEL
from k2hybrid.errors import ConfigError, ExpertReadError
from k2hybrid.experts.placement import least_slots, slot_bytes
from k2hybrid.runtime.experts import expert_sizes
from k2hybrid.types import SamplingParams, TokenEvent

SIZES = expert_sizes(read_spec(MINI_MODEL))
SLOT = sum(slot_bytes(SIZES, 1))
GREEDY = SamplingParams(temperature=0)
PROMPT = list(range(7, 207, 5))


def answer(**options: Any) -> tuple[list[int], dict[str, Any], dict[str, Any]]:
    with k2hybrid.load(threads=2, latent_bytes=64 << 20, **options) as model:
        events = list(model.generate(PROMPT, GREEDY, max_tokens=24, stop_ids=()))
        tokens = [event.token for event in events if isinstance(event, TokenEvent)]
        return tokens, model.status()["experts"], dict(model.config.table())


@pytest.fixture(scope="module")
def mapped() -> list[int]:
    return answer(expert_place="mapped")[0]


def test_one_node_maps_by_default(mapped: list[int]) -> None:
    tokens, status, table = answer()
    assert tokens == mapped
    assert status == {"place": "mapped", "experts": SIZES.count, "expert_bytes": SIZES.expert_bytes}
    assert table["expert_place"] == "mapped"


@pytest.mark.parametrize("reader", ["uring", "threads"])
def test_streamed_with_the_fewest_slots(mapped: list[int], reader: str) -> None:
    least = least_slots(SIZES)
    tokens, status, table = answer(expert_ram=least * SLOT, expert_reader=reader)
    assert tokens == mapped
    assert status["place"] == table["expert_place"] == "streamed"
    assert status["slots"] == least < SIZES.count
    assert status["misses"] > 0
    assert status["filled"] <= least


def test_resident_and_found_again(mapped: list[int]) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        for _ in range(2):
            tokens, status, _ = answer(expert_place="resident", expert_arena=Path(folder))
            assert tokens == mapped
            assert status["place"] == "resident"
            assert status["slots"] == SIZES.count


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"expert_ram": SLOT}, "give at least that"),
        ({"expert_place": "resident", "expert_ram": least_slots(SIZES) * SLOT}, "stream them, or map them"),
        ({"expert_place": "mapped", "expert_ram": 1 << 30}, "leave --expert-ram out"),
        ({"expert_place": "elsewhere"}, "must be one of"),
        ({"expert_ram": "20GiB"}, "a number of bytes"),
        ({"expert_reader": "telepathy"}, "uring or threads"),
        ({"expert_arena": Path("/nowhere")}, "resident"),
        ({"expert_place": "resident", "expert_arena": Path("/nowhere")}, "cannot hold experts"),
        ({"experts": "portable", "expert_place": "streamed"}, "portable experts are read mapped"),
    ],
)
def test_what_does_not_fit_is_named(options: dict[str, Any], says: str) -> None:
    with pytest.raises(k2hybrid.errors.K2Error, match=says):
        answer(**options)


def test_unknown_options_are_named() -> None:
    with pytest.raises(ConfigError, match="expert_ram"):
        answer(expertram=5)


def test_a_disk_that_fails_ends_requests_and_no_more(mapped: list[int]) -> None:
    with k2hybrid.load(threads=2, latent_bytes=64 << 20, expert_ram=least_slots(SIZES) * SLOT) as model:
        assert model._store is not None
        model._store.native.inject_read_faults(fail_every=1)
        with pytest.raises(ExpertReadError, match="could not be read"):
            list(model.generate(PROMPT, GREEDY, max_tokens=24, stop_ids=()))
        model._store.native.inject_read_faults()
        events = list(model.generate(PROMPT, GREEDY, max_tokens=24, stop_ids=()))
        assert [event.token for event in events if isinstance(event, TokenEvent)] == mapped
        assert model.status()["experts"]["lost"] > 0
