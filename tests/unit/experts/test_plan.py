"""Plans for machines that are only described: what fits, where, and what is said of changes."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from k2hybrid.checkpoint.presets import published_config
from k2hybrid.checkpoint.spec import ModelSpec
from k2hybrid.config import DenseWeights
from k2hybrid.errors import ConfigError
from k2hybrid.experts.card_prediction import CardPredictor, CardRates
from k2hybrid.experts.placement import slot_bytes
from k2hybrid.experts.plan import GIB, PROCESS_BYTES, CardPlan, MachineSpec, Plan, Wishes, make_plan
from k2hybrid.experts.prediction import ModelSizes, Predictor
from k2hybrid.model.card_memory import CardWishes, card_plan, largest_chunk
from tests.k2_rates import K2, RATES, SPEC

TWO_NODES = MachineSpec({0: 384 * GIB, 1: 384 * GIB}, cores=64, ram_gb_s=400.0, disk_gb_s=12.0)
SMALL = MachineSpec({0: 254 * GIB}, cores=16, ram_gb_s=80.0, disk_gb_s=6.0)


def plan(machine: MachineSpec, **wishes: Any) -> Plan:
    return make_plan(K2, RATES, machine, Wishes(**wishes))


def names(found: Plan) -> list[str]:
    return [change.name for change in found.changes]


def test_enough_ram_on_two_nodes_makes_experts_resident() -> None:
    found = plan(TWO_NODES)
    assert not found.problem
    assert found.placement is not None
    assert (found.placement.place, found.hit_rate) == ("resident", None)
    experts = [need for need in found.needs if "experts" in need.name]
    assert [need.nbytes for need in experts] == [23040 * share for share in slot_bytes(K2.experts, 2)]
    latents = next(need for need in found.needs if need.name.startswith("latents"))
    assert latents.nbytes == 4 * 32768 * 70_272
    there = RATES.at(ram_gb_s=400.0, cores=64)
    one = next(case for case in found.cases if case.name == "decode, 1 sequence at 32,768 tokens")
    assert one.found == Predictor(K2, there, "resident").decode(1, 32768)
    assert not any("RAM (" in name or "disk" in name for name in names(found))


def test_less_ram_than_the_model_streams_with_even_hits() -> None:
    found = plan(SMALL)
    assert found.placement is not None
    assert found.placement.place == "streamed"
    assert found.hit_rate == found.placement.slots / 23040
    room = 254 * GIB - K2.resting_bytes - 4 * 32768 * 70_272 - PROCESS_BYTES
    assert found.placement.slots == room // sum(slot_bytes(K2.experts, 1))
    assert "a disk twice as fast" in names(found)
    assert "768 GiB of RAM (mapped)" in names(found)
    assert plan(SMALL, hit_rate=lambda slots: 0.9).cases[0].found.seconds < found.cases[0].found.seconds


def test_changes_are_ordered_by_what_they_bring_and_start_from_what_is() -> None:
    found = plan(SMALL, context=1024)
    assert found.changes[0].name == "as it is"
    speeds = [change.decode.tokens_s for change in found.changes[1:] if change.decode]
    assert speeds == sorted(speeds, reverse=True)
    faster = next(change for change in found.changes if change.name == "a disk twice as fast")
    assert faster.decode == plan(dataclasses.replace(SMALL, disk_gb_s=12.0), context=1024).changes[0].decode


def test_a_change_of_ram_takes_the_next_size_that_helps() -> None:
    found = plan(SMALL, context=1024)
    sizes = [name for name in names(found) if "of RAM (" in name]
    assert set(sizes) == {"384 GiB of RAM (streamed)", "768 GiB of RAM (mapped)"}


@pytest.mark.parametrize(
    ("machine", "wishes", "problem"),
    [
        (MachineSpec({0: 14 * GIB}, 8, 80.0), {}, "more than the RAM there is"),
        (MachineSpec({0: 28 * GIB}, 8, 80.0, 6.0), {"context": 1024}, "room for"),
        (dataclasses.replace(SMALL, disk_gb_s=None), {}, "disk's speed"),
        (SMALL, {"place": "mapped"}, "push each other out"),
        (SMALL, {"place": "resident"}, "stream them"),
        (SMALL, {"expert_ram": GIB}, "give at least that"),
    ],
)
def test_what_does_not_fit_says_what_is_missing(
    machine: MachineSpec, wishes: dict[str, Any], problem: str
) -> None:
    found = plan(machine, **wishes)
    assert problem in found.problem
    assert found.cases == ()
    assert found.changes[0].decode is None


def test_what_does_not_fit_is_told_which_ram_would_do() -> None:
    found = plan(MachineSpec({0: 14 * GIB}, 8, 80.0, 6.0), context=1024)
    useful = [change for change in found.changes if change.decode]
    assert [change.name for change in useful] == ["768 GiB of RAM (mapped)", "48 GiB of RAM (streamed)"]


@pytest.mark.parametrize("wishes", [{"context": 0}, {"concurrency": 0}])
def test_wishes_without_sense_are_refused(wishes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        plan(TWO_NODES, **wishes)


WISHED = CardWishes(context=4 * 32768, longest=32768)


def on_card(vram_bytes: int) -> CardPlan:
    chunk = largest_chunk(SPEC, vram_bytes, WISHED) or WISHED.chunk
    return card_plan(SPEC, vram_bytes, dataclasses.replace(WISHED, chunk=chunk))


def with_card(machine: MachineSpec, **wishes: Any) -> Plan:
    return make_plan(K2, RATES, machine, Wishes(**wishes), on_card)


CARD = {"vram_bytes": 48 * GIB, "gpu_gb_s": 900.0, "pcie_gb_s": 25.0, "gpu_tflops": 150.0}


def test_a_card_holds_all_but_the_experts_and_is_predicted() -> None:
    machine = dataclasses.replace(TWO_NODES, **CARD)
    found = with_card(machine)
    assert found.on_card
    assert found.gpu.startswith("--device cuda: dense weights, latents and")
    card, placement = found.card, found.placement
    assert card is not None
    assert placement is not None
    names_in_ram = [need.name for need in found.needs]
    assert names_in_ram[:3] == ["embedding", "buffers of a streamed prefill", "the process"]
    assert found.needs[1].nbytes == 12 * K2.experts.expert_bytes
    assert not any("latents" in name for name in names_in_ram)
    rates = machine.card_rates
    assert rates == CardRates(900.0, 25.0, 150.0)
    cpu = Predictor(K2, RATES.at(ram_gb_s=400.0, cores=64), "resident")
    want = CardPredictor(cpu, rates, chunk=card.chunk, hot=card.hot)
    one = next(case for case in found.cases if case.name == "decode, 1 sequence at 32,768 tokens")
    assert one.found == want.decode(1, 32768)
    prompt = next(case for case in found.cases if case.name == "prefill, 32,768 tokens")
    assert prompt.found == want.prefill(32768)


def test_latents_that_leave_take_ram_from_the_experts() -> None:
    machine = dataclasses.replace(SMALL, **CARD)
    found, more = with_card(machine), with_card(machine, cache_ram=20 * GIB)
    left = next(need for need in more.needs if need.name.startswith("latents that left"))
    assert left.nbytes == 20 * GIB
    assert found.placement is not None
    assert more.placement is not None
    slots = 20 * GIB / sum(slot_bytes(K2.experts, 1))
    assert found.placement.slots - more.placement.slots == pytest.approx(slots, abs=1)


def test_changes_of_a_card() -> None:
    """Without it, a larger one, a faster bus: each is the plan of that machine."""
    machine = dataclasses.replace(SMALL, **CARD)
    changes = {change.name: change for change in with_card(machine).changes}
    alone = plan(SMALL).changes[0]
    assert changes["without the GPU"] == dataclasses.replace(alone, name="without the GPU")
    bus = with_card(dataclasses.replace(machine, pcie_gb_s=50.0)).changes[0]
    assert changes["PCIe twice as fast"] == dataclasses.replace(bus, name="PCIe twice as fast")
    (larger,) = [name for name in changes if name.startswith("a GPU with")]
    size = int(larger.split()[3])
    assert size > 48
    then = with_card(dataclasses.replace(machine, vram_bytes=size * GIB)).changes[0]
    assert changes[larger] == dataclasses.replace(then, name=larger)


@pytest.mark.parametrize(
    ("card", "said"),
    [
        ({"vram_bytes": 48 * GIB}, "give --gpu-gb-s, --gpu-tflops and --pcie-gb-s"),
        (CARD | {"vram_bytes": 16 * GIB}, "left idle: bf16 weights"),
    ],
)
def test_a_card_of_which_too_little_is_known_or_there_is_left_idle(card: dict[str, Any], said: str) -> None:
    found = with_card(dataclasses.replace(TWO_NODES, **card))
    assert not found.on_card
    assert said in found.gpu
    assert found.cases == plan(TWO_NODES).cases
    larger = [change for change in found.changes if change.name.startswith("a GPU with")]
    assert len(larger) == ("gpu_tflops" in card)
    assert all(change.decode for change in larger)


@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_dense_weights_of_8_bits_take_half_the_room_and_time(kind: DenseWeights) -> None:
    spec = ModelSpec.from_config(published_config())
    eight = ModelSizes.of(spec, dense_weights=kind)
    kept = 61 * 2 * 16384 * 512 + 60 * 2 * 384 * 7168  # kv_b and routers
    vectors = K2.dense_bytes + K2.head_bytes - 2 * (K2.dense_ops + K2.head_ops)
    values = K2.dense_ops + K2.head_ops - kept // 2
    assert 0 < eight.dense_bytes + eight.head_bytes - kept - values - vectors < values // 1000  # scales
    assert 9.8e9 < values < 9.9e9
    assert (eight.dense_ops, eight.head_ops) == (K2.dense_ops, K2.head_ops)
    assert eight.embedding_bytes == K2.embedding_bytes

    found = make_plan(eight, RATES, TWO_NODES, Wishes())
    needs = {need.name: need.nbytes for need in found.needs}
    assert needs[f"dense weights, {kind}"] == eight.dense_bytes + eight.head_bytes
    assert needs["embedding"] == K2.embedding_bytes
    before = plan(TWO_NODES).cases[0].found
    saved = (K2.dense_bytes + K2.head_bytes - eight.dense_bytes - eight.head_bytes) / (4 * 90e9)
    assert before.seconds - found.cases[0].found.seconds == pytest.approx(saved)
