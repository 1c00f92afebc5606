"""The routed experts of a model being loaded: where they are to lie, and what computes them. Layer 5."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from k2hybrid.checkpoint.loader import Checkpoint
from k2hybrid.checkpoint.spec import ModelSpec
from k2hybrid.config import RuntimeConfig
from k2hybrid.errors import ConfigError
from k2hybrid.experts.dispatch import Dispatcher
from k2hybrid.experts.placement import ExpertSizes, Place, Placement, place_experts, slot_bytes
from k2hybrid.experts.plan import SYSTEM_BYTES, ram_needs
from k2hybrid.experts.prediction import ModelSizes
from k2hybrid.experts.recorder import TraceWriter
from k2hybrid.experts.store import ExpertStore
from k2hybrid.experts.traces import TraceHeader
from k2hybrid.hardware.cgroup import read_limits
from k2hybrid.hardware.doctor import package_version
from k2hybrid.hardware.topology import Topology
from k2hybrid.native.files import file_failed
from k2hybrid.native.machine import Machine
from k2hybrid.runtime.fingerprint import weights_digest
from k2hybrid.types import ExpertSink, RoutedExperts

log = logging.getLogger(__name__)

PROGRESS_S = 10.0
HALF_LIFE_PASSES = 8.0  # of an expert's uses; chosen by replay, docs/traces.md
CORES_PER_FILL_THREAD = 8  # one thread copies as fast as several cores compute
MOST_FILL_THREADS = 4


@dataclass(frozen=True, slots=True)
class Experts:
    """What the loader fills and the network computes with.

    Attributes:
        open: to be called with the checkpoint that handed out all experts.
        store: None where numba computes.
    """

    sink: ExpertSink
    routed: RoutedExperts
    store: ExpertStore | None
    open: Callable[[Checkpoint], None]

    @property
    def _placement(self) -> Placement | None:
        return self.store.placement if self.store is not None else None

    @property
    def place(self) -> Place:
        """Where they lie."""
        return self._placement.place if self._placement is not None else "mapped"

    @property
    def slot_bytes(self) -> int:
        """Of all slots."""
        if self.store is None or self._placement is None:
            return 0
        return self._placement.slots * sum(self.store.native.slot_bytes)


def expert_sizes(spec: ModelSpec) -> ExpertSizes:
    """Of the model's routed experts."""
    return ExpertSizes(len(spec.moe_layers), spec.num_experts, spec.hidden_size, spec.moe_intermediate_size)


def placement_for(config: RuntimeConfig, spec: ModelSpec, topology: Topology, latent_bytes: int) -> Placement:
    """Where the experts are to lie on this machine.

    Raises:
        ConfigError: what the options ask for does not fit; the message says what would.
    """
    memory = {node.id: node.memory_bytes for node in topology.compute_nodes}
    limit = read_limits().memory_bytes
    total = sum(memory.values())
    if limit is not None and limit < total:  # a container's share, taken from all nodes alike
        memory = {node: nbytes * limit // total for node, nbytes in memory.items()}
    sizes = expert_sizes(spec)
    dense = ModelSizes.of(spec, dense_weights=config.dense_weights)
    rest = sum(need.nbytes for need in ram_needs(dense, "", 0, on_card=config.on_card))
    placement = place_experts(
        sizes,
        node_memory=memory,
        wanted=config.expert_place,
        expert_ram=config.expert_ram,
        reserved_bytes=rest + latent_bytes + SYSTEM_BYTES,
    )
    if config.expert_arena is not None and placement.place != "resident":
        raise ConfigError(
            f"experts are {placement.place} here ({placement.reason}); --expert-arena is for resident ones: "
            "leave it out, or add --expert-place resident"
        )
    if config.expert_arena is not None:
        _require_room(config.expert_arena, placement.slots * sum(slot_bytes(sizes, len(placement.nodes))))
    return placement


def _require_room(folder: Path, nbytes: int) -> None:
    try:
        system = os.statvfs(folder)
    except OSError as error:
        raise ConfigError(f"{folder} cannot hold experts: {error.strerror}") from None
    room = system.f_blocks * system.f_frsize
    if room < nbytes:
        raise ConfigError(
            f"{folder} has {room / 2**30:.2f} GiB, resident experts take {nbytes / 2**30:.2f} GiB; as root: "
            f"mount -o remount,size={-(-nbytes // 2**30) + 1}G {folder}"
        )


def make_experts(
    config: RuntimeConfig,
    spec: ModelSpec,
    machine: Machine,
    topology: Topology,
    latent_bytes: int,
    *,
    max_rows: int,
) -> Experts:
    """Experts as the options ask for them, for passes of up to `max_rows` rows.

    Raises:
        ConfigError: they do not fit, or numba is asked for and not installed.
    """
    if config.experts == "portable":
        return portable_experts(spec, machine, max_rows=max_rows)
    placement = placement_for(config, spec, topology, latent_bytes)
    log.info("experts are %s: %s", placement.place, placement.reason)
    return native_experts(config, spec, machine, max_rows=max_rows, placement=placement, topology=topology)


def native_experts(
    config: RuntimeConfig,
    spec: ModelSpec,
    machine: Machine,
    *,
    max_rows: int,
    placement: Placement | None = None,
    topology: Topology | None = None,
) -> Experts:
    """Experts that the extension computes, mapped or as `placement` says."""
    store = ExpertStore(layers=spec.num_layers, placement=placement, **_sizes(spec))
    routed = Dispatcher(store, machine, max_rows=max_rows, top_k=spec.top_k)
    cpus = [node.threads for node in topology.compute_nodes] if topology is not None else [()]

    def opened(checkpoint: Checkpoint) -> None:
        most = max(len(threads) for threads in cpus)
        store.open_slots(
            checkpoint.maps,
            folder=config.expert_arena,
            digest=weights_digest(config.model),
            reader=config.expert_reader or "",
            half_life=HALF_LIFE_PASSES * len(spec.moe_layers),
            cpus=cpus,
            fill_threads=min(MOST_FILL_THREADS, max(1, most // CORES_PER_FILL_THREAD)),
        )
        _report(store)

    return Experts(store, routed, store, opened)


def portable_experts(spec: ModelSpec, machine: Machine, *, max_rows: int) -> Experts:
    """Experts that numba computes, mapped.

    Raises:
        ConfigError: numba is not installed.
    """
    from k2hybrid.experts.portable import PortableExperts  # numba is optional, and slow to import

    made = PortableExperts(
        **_sizes(spec), max_rows=max_rows, top_k=spec.top_k, threads=machine.threads, failed=file_failed
    )
    return Experts(made, made, None, lambda _: None)


def trace_writer(path: Path, spec: ModelSpec, name: str) -> TraceWriter:
    """A new trace of the model's routing.

    Raises:
        TraceError: the file is there already or cannot be made.
    """
    sizes = expert_sizes(spec)
    made_by = f"k2hybrid {package_version()}"
    header = TraceHeader(name, spec.num_layers, sizes.experts, spec.top_k, made_by, sizes.expert_bytes)
    return TraceWriter(path, header)


def expert_status(store: ExpertStore | None) -> dict[str, Any]:
    """What a server tells of its experts: where they lie, and how far their slots are filled.

    "to_fill", "fill_done" and "fill_failed" count what is brought in behind the scenes, in experts.
    """
    if store is None:
        return {"place": "mapped"}
    sizes = {"experts": store.count, "expert_bytes": store.expert_bytes}
    placement = store.placement
    if placement is None or placement.slots == 0:
        return {"place": "mapped", **sizes}
    stats, progress = store.stats, store.progress
    used = stats.hits + stats.misses
    return {
        "place": placement.place,
        **sizes,
        "slots": placement.slots,
        "filled": stats.filled,
        "filling": bool(progress and progress.running),
        "to_fill": progress.experts if progress else None,
        "fill_done": progress.done if progress else None,
        "fill_failed": progress.failed if progress else None,
        "bytes_read": stats.bytes_read,
        "hits": stats.hits,
        "misses": stats.misses,
        "hit_rate": stats.hits / used if used else None,
        "lost": stats.lost,
    }


def _sizes(spec: ModelSpec) -> dict[str, int]:
    return {"experts": spec.num_experts, "hidden": spec.hidden_size, "inter": spec.moe_intermediate_size}


def _report(store: ExpertStore) -> None:
    """Log how far the slots are filled, until they are."""
    if store.progress is None:
        return
    arenas = store.native.arenas()
    kinds = ", ".join(f"{nbytes / 2**30:.1f} GiB in {pages} pages" for nbytes, pages, _ in arenas)
    log.info("experts: %s; read by %s", kinds, store.native.reader)

    def follow() -> None:
        told = -1
        while True:
            progress = store.progress
            if progress is None or not progress.running:
                break
            share = 100 * progress.done // max(1, progress.experts)
            if share != told:
                log.info("experts: %d %% of %d in memory", share, progress.experts)
                told = share
            if store.closing.wait(PROGRESS_S):
                return
        if progress is not None:
            log.info("experts: %d filled, %d could not be read", store.stats.filled, progress.failed)

    threading.Thread(target=follow, name="expert progress", daemon=True).start()
