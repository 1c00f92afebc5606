"""The routed experts and the network of a model whose dense half runs on a device. Layer 5."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext

from k2hybrid.checkpoint.spec import ModelSpec
from k2hybrid.config import DenseWeights
from k2hybrid.experts.device_experts import DeviceExperts, handed_rows
from k2hybrid.experts.device_slots import DeviceSlots
from k2hybrid.experts.handoff import Handoff
from k2hybrid.experts.hot_keeper import HotKeeper
from k2hybrid.experts.hybrid import HybridExperts
from k2hybrid.experts.prefill_stream import StreamedExperts
from k2hybrid.experts.store import ExpertStore
from k2hybrid.model.decode_step import Recorder
from k2hybrid.model.device import DeviceModel
from k2hybrid.native.machine import Machine
from k2hybrid.runtime.card import CardFit
from k2hybrid.runtime.device import Device
from k2hybrid.types import RoutedExperts

log = logging.getLogger(__name__)

COLD_ROWS = 2048  # of a streamed chunk that the CPU takes in one call
AHEAD_ROWS = 8  # steps of up to so many sequences are recorded before the first request


def device_experts(
    device: Device,
    fit: CardFit,
    spec: ModelSpec,
    store: ExpertStore,
    machine: Machine,
    cold: RoutedExperts,
    *,
    max_running: int,
    dense: DenseWeights,
) -> DeviceExperts:
    """Experts for passes of up to `fit.chunk` rows.

    Args:
        cold: takes up to `COLD_ROWS` rows of streamed chunks, on the CPU.
        max_running: sequences that decode together: never streamed.
        dense: what the other weights on the device are.
    """
    rates = device.rates(spec, machine, dense)
    resident = store.placement is not None and store.placement.place == "resident"
    direct = 1.0 if resident else 0.0  # until they are filled too much is streamed, which costs time alone
    rows = handed_rows(rates.with_direct(direct), fit.chunk, max_running, spec.top_k, spec.num_experts)
    handoff = Handoff(store, machine, device.stream, layers=spec.moe_layers, max_rows=rows, top_k=spec.top_k)
    slots = DeviceSlots(
        store,
        device.copies,
        device.torch,
        layers=spec.num_layers,
        experts=spec.num_experts,
        hidden=spec.hidden_size,
        inter=spec.moe_intermediate_size,
        count=fit.hot,
    )
    streamed = None
    if rows < fit.chunk:
        streamed = StreamedExperts(
            cold,
            slots,
            store,
            device.compute,
            device.copies,
            rates,
            cpu_rows=min(COLD_ROWS, fit.chunk),
            direct_share=direct,
        )
    return DeviceExperts(
        handoff, HybridExperts(handoff, slots, device.compute, rates), streamed, HotKeeper(slots)
    )


def settled(recorder: Recorder, experts: DeviceExperts) -> Recorder:
    """A recorder that lets experts that are on their way to the card arrive first."""

    def record(work: Callable[[], None]) -> Callable[[], None]:
        experts.settle()
        return recorder(work)

    return record


def before_steps(device: Device, model: DeviceModel, experts: DeviceExperts | None) -> Callable[[], None]:
    """What the thread that runs passes does first.

    It records steps there, and not while a model is loaded: a start takes no longer, and requests that come
    meanwhile wait, once. Later each batch size would stop all that are served when it first occurs.
    """

    def prepare() -> None:
        device.enter()
        begun = time.perf_counter()
        model.record_ahead(AHEAD_ROWS, nullcontext if experts is None else experts.rehearsing)
        log.info(
            "decode steps of %s sequences recorded in %.1f s", model.recorded, time.perf_counter() - begun
        )

    return prepare


class NoSteps:
    """`ExpertSteps` of a model without routed experts."""

    def begin(self, layers: Sequence[int], rows: int) -> None:
        """Nothing to open."""

    def end(self) -> set[int]:
        """Nothing was lost."""
        return set()

    def abort(self) -> None:
        """Nobody waits."""
