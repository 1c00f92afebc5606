"""The model that an engine drives, over an open checkpoint: in RAM, or on a device. Layer 5."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from k2hybrid.cache.pages import LatentPages
from k2hybrid.checkpoint.spec import ModelSpec
from k2hybrid.checkpoint.watch import FileWatch
from k2hybrid.config import RuntimeConfig
from k2hybrid.engine.metrics import ByteMeter
from k2hybrid.engine.step import StepModel
from k2hybrid.experts.device_experts import DeviceExperts
from k2hybrid.experts.prediction import ModelSizes
from k2hybrid.experts.recorder import TraceRecorder, TraceWriter
from k2hybrid.model.device import DeviceModel
from k2hybrid.model.linears import DeviceLinears
from k2hybrid.native.machine import Machine
from k2hybrid.runtime.assembly import Parts, assemble
from k2hybrid.runtime.card import CardFit, fit_card
from k2hybrid.runtime.device import Device, open_device
from k2hybrid.runtime.experts import Experts
from k2hybrid.runtime.meter import MeteredExperts, MeteredSteps, MeteredWeights
from k2hybrid.runtime.on_device import NoSteps, before_steps, device_experts, settled
from k2hybrid.runtime.watched import Handoffs, NotedExperts, WatchedModel


@dataclass(frozen=True, slots=True)
class Made:
    """A model that is ready to run.

    Attributes:
        device: figures of what computes it, as `Runtime.status` tells them.
        prepare: for the thread that will run passes, before the first.
        close: ends threads and gives the checkpoint back; no pass may run. Repeatedly.
    """

    model: StepModel
    watch: FileWatch
    device: Callable[[], dict[str, Any]]
    prepare: Callable[[], None]
    close: Callable[[], None]


@dataclass(frozen=True, slots=True)
class Card:
    """A device, and what of a model it is to hold."""

    device: Device
    fit: CardFit

    def hot_bytes(self, spec: ModelSpec) -> int:
        """Of the experts that it holds at most."""
        return self.fit.hot * ModelSizes.of(spec).experts.expert_bytes


def card_of(spec: ModelSpec, config: RuntimeConfig, context_tokens: int) -> Card | None:
    """The device that `config` names; None: the CPU.

    Raises:
        ConfigError: it cannot be used, or the model does not fit.
    """
    device = open_device(config.device)
    if device is None:
        return None
    fit = fit_card(spec, config, device.memory_bytes, context_tokens)
    if config.vram is not None:
        device.limit(config.vram)
    return Card(device, fit)


def model_in_ram(
    config: RuntimeConfig,
    spec: ModelSpec,
    machine: Machine,
    experts: Experts,
    pages: LatentPages,
    meter: ByteMeter,
    tracing: TraceWriter | None,
) -> Made:
    """All of it on the CPU. Raises as `assemble` does."""
    handoffs = Handoffs()

    def metered(parts: Parts) -> Parts:
        traced = parts.experts if tracing is None else TraceRecorder(parts.experts, tracing)
        routed = NotedExperts(MeteredExperts(traced, meter), handoffs)
        return parts._replace(weights=MeteredWeights(parts.weights, meter), experts=routed)

    with ExitStack() as opened:
        checkpoint, network = assemble(
            config.model,
            spec,
            machine,
            experts,
            pages,
            latent_norm_eps=config.latent_norm_eps,
            dense_weights=config.dense_weights,
            metered=metered,
        )
        opened.callback(checkpoint.close)
        watch = checkpoint.watch()
        model = WatchedModel(network, watch, network.embedding, handoffs)
        return Made(model, watch, lambda: {"name": "cpu"}, machine.pin_caller, opened.pop_all().close)


def model_on_device(
    config: RuntimeConfig,
    spec: ModelSpec,
    machine: Machine,
    experts: Experts,
    pages: LatentPages,
    meter: ByteMeter,
    card: Card,
    context_tokens: int,
) -> Made:
    """All but the routed experts and the embedding on `card`. Raises as `assemble` does."""
    device, fit = card.device, card.fit
    with ExitStack() as opened:
        on_card: DeviceExperts | None = None
        steps = None
        if experts.store is not None and spec.moe_layers:
            on_card = device_experts(
                device,
                fit,
                spec,
                experts.store,
                machine,
                experts.routed,
                max_running=config.max_running,
                dense=config.dense_weights,
            )
            opened.callback(on_card.close)
            # Before slots are given back or files closed, nobody may bring an expert from them any more.
            experts.store.before_close(_leaving(device, on_card))
            steps = MeteredSteps(on_card, meter)

        def metered(parts: Parts) -> Parts:
            weights = MeteredWeights(parts.weights, meter)
            return parts._replace(weights=weights, experts=steps or parts.experts)

        checkpoint, network = assemble(
            config.model,
            spec,
            DeviceLinears(),
            experts,
            pages,
            latent_norm_eps=config.latent_norm_eps,
            dense_weights=config.dense_weights,
            device=device.torch,
            decode=device.decode(pages),
            metered=metered,
        )
        opened.callback(checkpoint.close)
        model = DeviceModel(
            network,
            steps or NoSteps(),
            synchronize=device.stream.synchronize,
            recorder=device.recorder if on_card is None else settled(device.recorder, on_card),
            context_tokens=context_tokens,
            graph_rows=fit.graph_rows,
        )
        watch = checkpoint.watch()
        watched = WatchedModel(model, watch, network.embedding, None)
        if on_card is not None:
            opened.callback(on_card.close)
        opened.callback(device.enter)  # first: whoever closes need not have been on it
        status = DeviceStatus(card, model, on_card)
        prepare = before_steps(device, model, on_card)
        return Made(watched, watch, status.figures, prepare, opened.pop_all().close)


def _leaving(device: Device, experts: DeviceExperts) -> Callable[[], None]:
    def leave() -> None:
        device.enter()  # whoever closes need not have been on it
        experts.close()

    return leave


class DeviceStatus:
    """What a device holds and does."""

    def __init__(self, card: Card, model: DeviceModel, experts: DeviceExperts | None) -> None:
        self._card = card
        self._model = model
        self._experts = experts

    def figures(self) -> dict[str, Any]:
        """Those of this moment; from any thread.

        "holds" are the rows of the memory table in bytes (on the emulated device: what a card would hold),
        "chunk" is the most rows of a pass, "handed_rows" of one whose experts are handed off (more are
        streamed), "locked_bytes" is slots in RAM that those are copied from, "recorded" the batch sizes whose
        decode steps are recorded. "hot_found" is the share of experts' uses that found theirs on the card,
        None before any was counted.
        """
        device, fit, experts = self._card.device, self._card.fit, self._experts
        figures: dict[str, Any] = {
            "name": device.name,
            "signal": device.signal,
            "holds": {need.name: need.nbytes for need in fit.needs},
            "chunk": fit.chunk,
            "recorded": self._model.recorded,
        }
        if experts is not None:
            keeper = experts.keeper
            figures |= {
                "handed_rows": experts.handed_rows,
                "locked_bytes": experts.locked_bytes,
                "hot_slots": keeper.slots.count,
                "hot_experts": len(keeper.slots.there),
                "hot_found": keeper.found_share,
            }
        return figures
