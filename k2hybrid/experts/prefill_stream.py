"""Routed experts of a large chunk: those that it uses go over the bus, through rings of buffers.

    page-locked slots ───────────────────────────────────┬──copies──► ring of slots on the card ──► compute
    other sources ──threads──► ring of page-locked buffers ─╯
                  ──────────────────────────────────────────────────────────────────► the CPU: cold experts

Which expert goes which way is decided layer by layer from the routing (`split.plan_stream`), so the host
waits once a layer for the ids. Experts that lie on the card already are computed while the first copies run;
a copy into a slot of the ring waits only for what was computed from it before. A row's experts are added in a
fixed order: those on the card in ascending id, the streamed ones, then the CPU's sum.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from k2hybrid.errors import ConfigError, EngineError
from k2hybrid.experts.compute import ExpertCompute
from k2hybrid.experts.copies import CopyEngine, Fence
from k2hybrid.experts.device_slots import DeviceSlots, ExpertSource
from k2hybrid.experts.feed import ExpertFeed, Feeding
from k2hybrid.experts.split import BUFFERS, SplitRates, StreamPlan, plan_stream
from k2hybrid.types import RoutedExperts, TicketStats

TILE_ROWS = 1024  # of one expert that are computed together
MAX_RING_BYTES = 10**9  # buffers and slots together

Ids = npt.NDArray[np.int32]
Rows = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class StreamReport:
    """What one layer of a chunk took. Bytes are those of experts, over the bus.

    Attributes:
        bus_bytes: counted; less than predicted where experts could not be read.
        direct: streamed experts that went from their slots, through no buffer.
        lost: experts that could not be read.
    """

    plan: StreamPlan
    bus_bytes: int
    direct: int
    lost: tuple[int, ...]
    seconds: float


@dataclass(frozen=True)
class _Chunk:
    """A layer's input, on the device and what the host knows of it.

    pairs: int64 [rows · top_k], row · top_k + k, by ascending expert id, padding first.
    starts: where each expert's begin in `pairs`, and one past the last.
    """

    layer: int
    x: torch.Tensor
    weights: torch.Tensor
    ids: Ids
    pairs: torch.Tensor
    starts: Rows
    plan: StreamPlan
    begun: float


class StreamedExperts:
    """`RoutedExperts` for chunks, one ticket at a time.

    Args:
        cpu: takes tensors on the CPU, at most `cpu_rows` rows a call.
        slots: experts that are on the card already.
        source: where the others' bytes come from.
        buffers, ring: experts that fit into the page-locked buffers, and into the card's memory.
        fill_threads: that read into the former.
        direct_share: of streamed experts that need no buffer, until one layer's tells.

    Raises:
        ConfigError: a ring is empty, or they are larger together than `MAX_RING_BYTES`.
    """

    def __init__(
        self,
        cpu: RoutedExperts,
        slots: DeviceSlots,
        source: ExpertSource,
        compute: ExpertCompute,
        copies: CopyEngine,
        rates: SplitRates,
        *,
        cpu_rows: int,
        buffers: int = BUFFERS,
        ring: int = 8,
        fill_threads: int = 3,
        direct_share: float = 0.0,
    ) -> None:
        total = (buffers + ring) * slots.expert_bytes
        if min(buffers, ring, fill_threads, cpu_rows) < 1 or total > MAX_RING_BYTES:
            raise ConfigError(
                f"streaming needs a buffer, a slot, a thread and a row for the CPU at least, and at most "
                f"{MAX_RING_BYTES} bytes, not {buffers} and {ring} of {slots.expert_bytes} bytes"
            )
        self._cpu = cpu
        self._slots = slots
        self._compute = compute
        self._copies = copies
        self._rates = rates
        self._cpu_rows = cpu_rows
        device = slots.bytes.device
        self._feed = ExpertFeed(source, copies, slots.expert_bytes, buffers=buffers, threads=fill_threads)
        self._ring = torch.zeros(ring, slots.expert_bytes, dtype=torch.uint8, device=device)
        self._read: list[Fence] = [copies.fence() for _ in range(ring)]
        self._cold = ThreadPoolExecutor(1, thread_name_prefix="cold-experts")
        self._outstanding = False
        self._direct_share = direct_share

    @property
    def ring_bytes(self) -> tuple[int, int]:
        """Buffers on the host, and slots on the card."""
        return self._feed.nbytes, self._ring.nbytes

    @property
    def locked_bytes(self) -> int:
        """Of experts' slots in RAM, page-locked so far."""
        return self._feed.locked_bytes

    def rows_limit(self, nbytes: int, top_k: int) -> int:
        """The most rows whose activations here fit into `nbytes` of the card; x, ids and weights not counted.

        A row has its sum in fp32 and its pairs, sorted. A tile of an expert's rows has its input, two outputs
        in fp32 (the kernel's for each choice, and the sum) and what lies between the halves; sums of the CPU
        come by its `cpu_rows`.
        """
        hidden, inter = self._slots.hidden, self._slots.inter
        tile = TILE_ROWS * (10 * hidden + 10 * inter + 256)
        return max(0, (nbytes - tile - self._cpu_rows * (4 * hidden + 8)) // (4 * hidden + 40 * top_k))

    def submit(self, layer: int, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> StreamTicket:
        """See `RoutedExperts.submit`. Waits for the ids; the CPU and the first reads are under way then.

        Raises:
            EngineError: a ticket is outstanding.
        """
        if self._outstanding:
            raise EngineError("collect the chunk that is being streamed before the next is submitted")
        begun = time.perf_counter()
        host = ids.cpu().numpy()
        experts = self._slots.experts
        count = np.bincount((host + 1).reshape(-1), minlength=experts + 1)
        used = {int(expert): float(count[expert + 1]) for expert in np.nonzero(count[1:])[0]}
        here = {expert for at, expert in self._slots.there if at == layer}
        chunk = _Chunk(
            layer,
            x,
            weights.reshape(-1, 1),
            host,
            torch.argsort(ids.flatten(), stable=True),
            np.cumsum(count),
            plan_stream(self._rates.with_direct(self._direct_share), len(host), used, here),
            begun,
        )
        uses = torch.from_numpy((count[1:] > 0).astype(np.float32)).to(self._slots.counts.device)
        self._slots.counts[layer].add_(uses, alpha=self._rates.streamed_weight)
        feeding = Feeding(self._feed, layer, chunk.plan.streamed)
        try:
            cold = self._submit_cold(chunk)
        except BaseException:
            feeding.close()  # nobody may write into the buffers when the next chunk does
            raise
        self._outstanding = True
        return StreamTicket(self, chunk, cold, feeding)

    def close(self) -> None:
        """End the threads, and unlock the slots, which are there still; no ticket may be outstanding."""
        try:
            self._feed.close()
        finally:
            self._cold.shutdown()

    # --- over the bus -----------------------------------------------------------------------------

    def run(self, chunk: _Chunk, feeding: Feeding) -> tuple[torch.Tensor, list[int]]:
        """What the card computes of a chunk, fp32 [rows, hidden], and the experts that could not be read."""
        out = torch.zeros(chunk.x.shape, dtype=torch.float32, device=chunk.x.device)
        there = self._slots.there
        for expert in chunk.plan.hot:
            self._add(out, chunk, expert, self._slots.bytes, there[chunk.layer, expert])
        lost: list[int] = []
        sent = 0
        for expert in chunk.plan.streamed:
            slot = sent % len(self._ring)
            pieces = feeding.take()
            if not pieces:
                feeding.sent(None)
                lost.append(expert)
                continue
            arrival = self._copies.copy(self._ring[slot], pieces, self._read[slot])
            feeding.sent(arrival)
            arrival.order()
            self._add(out, chunk, expert, self._ring, slot)
            self._read[slot] = self._copies.fence()
            sent += 1
        return out, lost

    def _add(self, out: torch.Tensor, chunk: _Chunk, expert: int, memory: torch.Tensor, slot: int) -> None:
        """Add the expert in `memory[slot]` to the rows that chose it; each of them did once."""
        alone = memory[slot : slot + 1]  # a kernel then knows whose all the rows are
        begin, end = chunk.starts[expert].item(), chunk.starts[expert + 1].item()
        for start in range(begin, end, TILE_ROWS):
            pairs = chunk.pairs[start : min(start + TILE_ROWS, end)]
            rows = pairs // chunk.ids.shape[1]
            chosen = torch.zeros(len(pairs), 1, dtype=torch.int32, device=out.device)
            part = self._compute(
                chunk.x.index_select(0, rows),
                alone,
                chosen,
                chunk.weights.index_select(0, pairs),
                hidden=self._slots.hidden,
                inter=self._slots.inter,
            )
            out.index_add_(0, rows, part)

    # --- the CPU's --------------------------------------------------------------------------------

    def _submit_cold(self, chunk: _Chunk) -> Future[list[_ColdPart]]:
        cold = np.isin(chunk.ids, np.array(chunk.plan.cold, np.int32))
        rows = np.nonzero(cold.any(1))[0]
        at = torch.from_numpy(rows).to(chunk.x.device)
        x = chunk.x.index_select(0, at).cpu()
        weights = chunk.weights.view(chunk.ids.shape).index_select(0, at).cpu()
        ids = torch.from_numpy(np.where(cold, chunk.ids, -1)[rows].astype(np.int32))
        return self._cold.submit(self._run_cold, chunk.layer, rows, x, ids, weights)

    def _run_cold(
        self, layer: int, rows: Rows, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> list[_ColdPart]:
        parts = []
        for start in range(0, len(rows), self._cpu_rows):
            some = slice(start, start + self._cpu_rows)
            ticket = self._cpu.submit(layer, x[some], ids[some], weights[some])
            out = ticket.collect()
            here = rows[some]
            parts.append(_ColdPart(here, out, frozenset(here[list(ticket.failed_rows)].tolist())))
        return parts

    def release(self, direct: int, streamed: int) -> None:
        """The ticket that was outstanding is collected; `direct` of its streamed experts took no buffer."""
        self._outstanding = False
        if streamed:
            self._direct_share = direct / streamed

    @property
    def expert_bytes(self) -> int:
        """Of one expert."""
        return self._slots.expert_bytes


@dataclass(frozen=True, slots=True)
class _ColdPart:
    rows: Rows
    out: torch.Tensor
    failed: frozenset[int]


class StreamTicket:
    """A chunk's layer in flight (`types.Ticket`)."""

    def __init__(
        self,
        owner: StreamedExperts,
        chunk: _Chunk,
        cold: Future[list[_ColdPart]],
        feeding: Feeding,
    ) -> None:
        self._owner = owner
        self._chunk = chunk
        self._cold = cold
        self._feeding = feeding
        self._failed: tuple[int, ...] = ()
        self._report: StreamReport | None = None
        self._stats: TicketStats | None = None

    def collect(self) -> torch.Tensor:
        """The routed sum, fp32 [rows, hidden]. Once only.

        Raises:
            EngineError: collected before.
        """
        if self._report is not None:
            raise EngineError("a chunk's ticket is collected once")
        chunk, start = self._chunk, time.perf_counter()
        try:
            out, lost = self._owner.run(chunk, self._feeding)
            failed = set(self._rows_of(lost))
            for part in self._cold.result():
                out.index_add_(0, torch.from_numpy(part.rows).to(out.device), part.out.to(out.device))
                failed |= part.failed
        finally:
            # Whatever happened: nobody may write into the buffers when the next chunk does.
            try:
                self._feeding.close()
            finally:
                wait([self._cold])
                self._owner.release(self._feeding.direct, len(chunk.plan.streamed))
        end = time.perf_counter()
        sent = (len(chunk.plan.streamed) - len(lost)) * self._owner.expert_bytes
        self._failed = tuple(sorted(failed))
        self._report = StreamReport(chunk.plan, sent, self._feeding.direct, tuple(lost), end - chunk.begun)
        read = sent + len(chunk.plan.cold) * self._owner.expert_bytes
        misses = len(chunk.plan.streamed)
        self._stats = TicketStats(read, misses, (end - start) * 1e3, (end - chunk.begun) * 1e3)
        return out

    def _rows_of(self, experts: list[int]) -> Iterator[int]:
        yield from np.nonzero(np.isin(self._chunk.ids, experts).any(1))[0].tolist()

    @property
    def failed_rows(self) -> tuple[int, ...]:
        """Rows that needed an expert whose bytes could not be read."""
        return self._failed

    @property
    def report(self) -> StreamReport:
        """What it took; after `collect`."""
        if self._report is None:
            raise EngineError("collect the ticket before asking what it took")
        return self._report

    @property
    def stats(self) -> TicketStats:
        """Bytes over the bus and of the CPU's experts, streamed experts, times; after `collect`."""
        if self._stats is None:
            raise EngineError("collect the ticket before asking what it cost")
        return self._stats
