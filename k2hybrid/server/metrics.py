"""GET /metrics: what the engine did, where experts lie and what a device holds, as Prometheus reads it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from starlette.requests import Request
from starlette.responses import Response

from k2hybrid.server.served import ServedModel

_TEXT = "text/plain; version=0.0.4; charset=utf-8"

# (name, help) by their names in `EngineMetrics.snapshot`, `expert_status` and `DeviceStatus.figures`.
_ENGINE_COUNTERS = {
    "steps": "Passes over the network",
    "failed_steps": "Passes that ended in an error",
    "put_back": "Requests that gave their pages to older ones, to come back",
    "prompt_tokens": "Tokens of prompts",
    "cached_tokens": "Tokens of prompts that were not computed again",
    "completion_tokens": "Tokens generated",
    "cached_ram_tokens": "Tokens whose latents came back from RAM (--cache-ram)",
    "cached_journal_tokens": "Tokens whose latents came back from the journal",
    "pages_to_ram": "Latent pages copied to RAM",
    "pages_from_ram": "Latent pages copied back from RAM",
    "bytes_to_ram": "Bytes of latent pages copied to RAM",
    "bytes_from_ram": "Bytes of latent pages copied back from RAM",
    "page_copy_errors": "Copies of latent pages that failed",
}
_ENGINE_GAUGES = {
    "running": "Requests at work",
    "waiting": "Requests in the queue",
    "ram_pages": "Latent pages that lie in RAM",
    "recent_tokens_per_s": "Tokens a second over recent passes",
    "recent_gb_s": "Bytes of weights read a second over recent passes, in 10^9",
}
_EXPERT_COUNTERS = {
    "hits": "Experts found in memory",
    "misses": "Experts that had to be read from disk first",
    "lost": "Reads of an expert that failed",
    "bytes_read": "Bytes of experts read from disk",
}
_EXPERT_GAUGES = {
    "slots": "Experts that have room in memory of their own",
    "filled": "Experts that are there",
    "filling": "1 while experts are brought in behind the scenes",
}
_DEVICE_GAUGES = {
    "chunk": "Rows of a pass on the device at most",
    "handed_rows": "Rows of a pass whose experts are handed off at most; more are streamed",
    "locked_bytes": "Experts in RAM that are page-locked: chunks send them to the device through no buffer",
    "hot_slots": "Experts that have room on the device",
    "hot_experts": "Experts that lie on the device",
}


class Metrics:
    """Answers with the figures of this moment."""

    def __init__(self, model: ServedModel) -> None:
        self._model = model
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def collect(self) -> Iterator[Metric]:
        """All figures; called by the registry."""
        status = self._model.status()
        engine, experts = status["engine"], status["experts"]
        for name, about in _ENGINE_COUNTERS.items():
            yield CounterMetricFamily(f"k2hybrid_{name}", about, value=engine[name])
        for name, about in _ENGINE_GAUGES.items():
            yield GaugeMetricFamily(f"k2hybrid_{name}", about, value=engine[name])
        finished = CounterMetricFamily("k2hybrid_requests", "Requests that ended", labels=["reason"])
        for reason, count in engine["finished"].items():
            finished.add_metric([reason], count)
        yield finished
        yield _told("k2hybrid_experts_place", "Where routed experts lie", "place", experts["place"])
        yield _told("k2hybrid_latent_rows", "How latents are stored", "format", status["latents"]["rows"])
        yield from _device(status["device"])
        for name, about in _EXPERT_COUNTERS.items():
            if name in experts:
                yield CounterMetricFamily(f"k2hybrid_experts_{name}", about, value=experts[name])
        for name, about in _EXPERT_GAUGES.items():
            if name in experts:
                yield GaugeMetricFamily(f"k2hybrid_experts_{name}", about, value=experts[name])

    async def answer(self, _request: Request) -> Response:
        """The text that a scraper reads."""
        return Response(generate_latest(self._registry), media_type=_TEXT)


def _device(device: Mapping[str, Any]) -> Iterator[Metric]:
    yield _told("k2hybrid_device", "What computes all but the routed experts", "name", device["name"])
    for name, about in _DEVICE_GAUGES.items():
        if name in device:
            yield GaugeMetricFamily(f"k2hybrid_device_{name}", about, value=device[name])
    if device.get("hot_found") is not None:
        about = "Share of experts' uses that found theirs on the device"
        yield GaugeMetricFamily("k2hybrid_device_hot_found", about, value=device["hot_found"])
    if "recorded" in device:
        about = "Batch sizes whose decode steps are recorded"
        yield GaugeMetricFamily("k2hybrid_device_recorded_steps", about, value=len(device["recorded"]))
    if "holds" in device:
        held = GaugeMetricFamily("k2hybrid_device_bytes", "Planned for the device", labels=["what"])
        for what, nbytes in device["holds"].items():
            held.add_metric([what], nbytes)
        yield held


def _told(name: str, about: str, label: str, word: str) -> Metric:
    """A fact in a word: a gauge of 1 with the word as its label."""
    fact = GaugeMetricFamily(name, about, labels=[label])
    fact.add_metric([word], 1)
    return fact
