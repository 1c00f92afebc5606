"""What a model whose dense half is on a device must do: asked of a card, and of the emulated device."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Sequence
from typing import Any

import pytest

from k2hybrid.errors import EngineError
from k2hybrid.experts.device_slots import DeviceSlots
from k2hybrid.experts.handoff import Handoff
from k2hybrid.experts.prefill_stream import StreamedExperts, StreamTicket
from k2hybrid.runtime import device as devices
from k2hybrid.runtime import on_device
from k2hybrid.runtime.device import emulated_rates
from tests.device_parity import SOME_HOT, agreement, opened

# Dense weights and latents; hot experts: none, some, or what is left over.
VARIANTS: list[dict[str, Any]] = [
    {"hot_experts": 0},
    {"hot_experts": SOME_HOT, "latent_rows": "fp8"},
    {"dense_weights": "int8", "hot_experts": SOME_HOT},
    {"dense_weights": "fp8", "latent_rows": "fp8", "hot_experts": 0},
    {"dense_weights": "int8", "latent_rows": "fp8"},
    {"hot_experts": 0, "expert_place": "resident"},
]
SESSIONS, TURNS = 3, 3
TRIES = 8  # of what is timed


def of_card(options: dict[str, Any]) -> dict[str, Any]:
    """Those that a model without a card has as well."""
    return {name: value for name, value in options.items() if name not in ("hot_experts", "vram")}


def check_batches(
    device: str, batches: Sequence[int], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Greedy answers of batches of these sizes are the CPU's wherever it is sure.

    The largest comes first: its prompts are the shortest then, so that they fit into one chunk.
    """
    batches = sorted(batches, reverse=True)
    slots: list[DeviceSlots] = []

    class Seen(DeviceSlots):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            slots.append(self)

    monkeypatch.setattr(on_device, "DeviceSlots", Seen)
    with opened("cpu", **of_card(options)) as cpu:
        starts = [20 * sum(batches[:at]) for at in range(len(batches))]
        prompts = [cpu.prompts(count, 20, start) for count, start in zip(batches, starts, strict=True)]
        for batch in prompts:
            cpu.answer(batch, 18)
    with opened(device, cpu.said, **options) as card:
        for batch in prompts:
            card.answer(batch, 18)
            assert len(batch) in card.told.decoded
        if slots[0].count:
            slots[0].wait()
            assert 0 < len(slots[0].there) + len(slots[0]._coming) <= slots[0].count
    assert card.said == cpu.said
    agreement(cpu.told.seen, card.told.seen).check()


def check_streamed(device: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt in chunks whose experts go over the bus."""
    streamed: list[int] = []
    submit = StreamedExperts.submit

    def counted(self: StreamedExperts, layer: int, x: Any, ids: Any, weights: Any) -> StreamTicket:
        streamed.append(x.shape[0])
        return submit(self, layer, x, ids, weights)

    monkeypatch.setattr(StreamedExperts, "submit", counted)
    # So small a model's experts would never be streamed at a card's own rates.
    monkeypatch.setattr(devices, "measure_split_rates", lambda spec, *_, **__: emulated_rates(spec))
    with opened("cpu", max_step_tokens=256, **of_card(options)) as cpu:
        prompts = cpu.prompts(2, 300)
        for prompt in prompts:
            cpu.answer([prompt], 24)
    assert streamed == []
    with opened(device, cpu.said, max_step_tokens=256, **options) as card:
        layers = len(card.runtime.spec.moe_layers)
        for prompt in prompts:
            card.answer([prompt], 24)
        locked = card.runtime.status()["device"]["locked_bytes"]
    assert (locked > 0) == (options.get("expert_place") == "resident")
    assert max(streamed) == 256
    assert len(streamed) >= 3 * layers  # 300 and 600 tokens have three whole chunks
    agreement(cpu.told.seen, card.told.seen).check()


def converse(model: Any) -> None:
    """Sessions that take turns; each turn goes on where the session's last one ended."""
    draw = random.Random(5)
    histories = model.prompts(SESSIONS, 300)
    for _ in range(TURNS):
        for history in histories:
            (said,) = model.answer([history], 6)
            history += [*said, *(draw.randrange(256) for _ in range(11))]


def check_spilled(device: str) -> None:
    """Sessions that do not fit the pool together come back from RAM, and nothing is computed again."""
    page = 5 * 64 * 256
    with opened("cpu", latent_bytes=64 * page) as cpu:
        converse(cpu)
    with opened(device, cpu.said, latent_bytes=20 * page, cache_ram=60 * page) as card:
        converse(card)
        figures = card.runtime.status()["engine"]
    assert card.prefilled == cpu.prefilled
    assert card.prefilled[SESSIONS:] == [12] * SESSIONS * (TURNS - 1)
    assert figures["cached_ram_tokens"] > 500
    assert figures["page_copy_errors"] == figures["integrity_errors"] == 0
    agreement(cpu.told.seen, card.told.seen).check()


def check_stuck(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that stands still ends the request with an error in time; later ones are served."""
    handoffs: list[Handoff] = []

    class Seen(Handoff):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            handoffs.append(self)

    monkeypatch.setattr(on_device, "Handoff", Seen)
    with opened(device, hot_experts=0) as card:
        native = handoffs[0].native
        (prompt,) = card.prompts(1, 60)
        (want,) = card.answer([prompt], 6)  # kernels are compiled, and a step is recorded
        took = math.inf
        for _ in range(TRIES):
            native.stall_at(3)
            card.told.seen.clear()
            begun = time.monotonic()
            with pytest.raises(EngineError, match="no progress"):
                card.answer([prompt], 6)
            took = min(took, time.monotonic() - begun)
            native.stall_at(-1)
            deadline = time.monotonic() + 10
            while True:  # until the worker is back
                card.told.seen.clear()
                try:
                    (said,) = card.answer([prompt], 6)
                    break
                except EngineError:
                    assert time.monotonic() < deadline
                    time.sleep(0.05)
            assert said == want
            if took < 1.0:
                return
        # Others on this machine take a part of one try, not of all; what is in the way by construction does.
        raise AssertionError(f"an error is promised within a second and came after {took:.2f} s at best")
