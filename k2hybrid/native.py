"""The only importer of the C++ extension: checks tensors at the border; pointers cross, torch does not."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

# libgomp's threads would otherwise spin for milliseconds after each torch operation, on the very cores that
# the pinned pool needs next. Must be set before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from k2hybrid.errors import NativeError
from k2hybrid.native_rows import NativeRows
from k2hybrid.types import LinearWeight, Weight8

try:
    from k2hybrid import _native
except ImportError as error:  # pragma: no cover - depends on the installation
    raise NativeError(
        f"the extension k2hybrid._native cannot be imported ({error}); build it with `pip install -e .`"
    ) from error

ExtensionError: type[Exception] = (
    _native.Error
)  # what the extension raises; `NativeError` is what callers see
# The CPU side of `csrc/gpu/doorbell.h`, wrapped by `hardware.doorbell` and `hardware.streams`.
EchoDoorbell = _native.EchoDoorbell
play_device = _native.play_device
ring_slot = _native.ring_slot
wait_reply = _native.wait_reply
doorbell_layout = _native.doorbell_layout
doorbell_bytes = _native.doorbell_bytes

_PAGE_ROWS = 64  # of `cache.pages`

INSTRUCTION_SETS: tuple[str, ...] = tuple(_native.instruction_sets())  # what this CPU offers, best first


# Read before any thread is pinned: a pinned thread sees its own core only.
ALLOWED_CPUS: tuple[int, ...] = tuple(sorted(os.sched_getaffinity(0)))


def physical_cpus(sysfs: Path = Path("/sys/devices/system/cpu")) -> list[int]:
    """One CPU number per physical core among those this process may run on, ascending."""
    seen: set[str] = set()
    chosen: list[int] = []
    for cpu in ALLOWED_CPUS:
        siblings = sysfs / f"cpu{cpu}" / "topology" / "thread_siblings_list"
        core = siblings.read_text().strip() if siblings.exists() else str(cpu)
        if core not in seen:
            seen.add(core)
            chosen.append(cpu)
    return chosen


class Machine:
    """The kernels picked for this CPU and the pinned pool that runs them. Passed on; there is no singleton.

    Args:
        threads: workers in all; default one per physical core that this process may use.
        isa: an instruction set of `INSTRUCTION_SETS`; may only lower what the CPU offers.
        nodes: the CPUs of each NUMA node, whose workers form a group; default one node with all CPUs. A node
            without CPUs here has workers that float, which is how tests play several nodes on one.

    Raises:
        NativeError: unknown instruction set, or more than this CPU has; more nodes than threads.
    """

    def __init__(
        self,
        threads: int | None = None,
        isa: str | None = None,
        nodes: Sequence[Sequence[int]] | None = None,
    ) -> None:
        by_node = [list(cpus) for cpus in nodes] if nodes is not None else [physical_cpus()]
        count = threads or sum(map(len, by_node)) or len(by_node)
        if count < len(by_node):
            raise NativeError(f"{count} threads cannot serve {len(by_node)} nodes; give each at least one")
        # Worker i belongs to node i % nodes, so that a smaller number of threads is dealt evenly.
        groups = [i % len(by_node) for i in range(count)]
        turns = [i // len(by_node) for i in range(count)]
        crowded = any(turn >= len(by_node[group]) for group, turn in zip(groups, turns, strict=True))
        # One node's spare workers float; with several nodes, all do if there are more than CPUs.
        if len(by_node) == 1:
            cpus = by_node[0]
        else:
            cpus = [] if crowded else [by_node[g][t] for g, t in zip(groups, turns, strict=True)]
        with _errors():
            self.handle = _native.Machine(count, isa or "", cpus, groups)
        self.threads: int = self.handle.threads
        self.isa: str = self.handle.isa
        self.nodes: int = self.handle.groups
        self.rows = NativeRows(self.handle, _ERRORS)
        self._known_spans: tuple[object, _GivenSpans] = (None, [])  # all layers of a pass have the same

    def pin_caller(self) -> None:
        """Bind the calling thread to the pool's first core: for the thread that runs the model, once."""
        # libgomp makes a team for each thread that calls torch, with that thread's affinity: let it
        # do so while the thread still floats, or the whole team would share one core.
        torch.ones(1 << 20).add_(1)
        self.handle.pin_caller()

    def linear(self, x: torch.Tensor, weight: LinearWeight) -> torch.Tensor:
        """fp32 [T, N] = x bf16 [T, K] · weightᵀ. A row's bits never depend on the other rows.

        Args:
            weight: bf16 [N, K], or 8 bits, whose e4m3 are not checked for NaN.
        """
        _require_bf16("x", x, 2)
        if isinstance(weight, Weight8):
            return self._linear8(x, weight)
        _require_bf16("weight", weight, 2)
        if x.shape[1] != weight.shape[1]:
            raise NativeError(f"linear: x {list(x.shape)} does not fit weight {list(weight.shape)}")
        tokens, columns = x.shape
        rows = weight.shape[0]
        out = torch.empty(tokens, rows, dtype=torch.float32)
        with _errors():
            self.handle.linear(
                x.data_ptr(), tokens, x.stride(0), 0, weight.data_ptr(), 1, rows, columns,
                0, weight.stride(0), out.data_ptr(),
            )  # fmt: skip
        return out

    def _linear8(self, x: torch.Tensor, weight: Weight8) -> torch.Tensor:
        values, scale = weight.values, weight.scale
        _require_weight8(weight)
        if x.shape[1] != values.shape[1]:
            raise NativeError(f"linear: x {list(x.shape)} does not fit weight {list(values.shape)}")
        tokens, (rows, columns) = x.shape[0], values.shape
        out = torch.empty(tokens, rows, dtype=torch.float32)
        with _errors():
            self.handle.linear8(
                x.data_ptr(), tokens, x.stride(0), weight.kind == "fp8", values.data_ptr(), scale.data_ptr(),
                rows, columns, values.stride(0), out.data_ptr(),
            )  # fmt: skip
        return out

    def head_linear(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """fp32 [T, H, N]: for each head h, x bf16 [T, H, K] · weight bf16 [H, N, K]ᵀ."""
        return self._by_head("linear", x, weight, contracted=2)

    def head_linear_t(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """fp32 [T, H, N]: for each head h, x bf16 [T, H, K] · weight bf16 [H, K, N]."""
        return self._by_head("linear_transposed", x, weight, contracted=1)

    def _by_head(self, kernel: str, x: torch.Tensor, weight: torch.Tensor, contracted: int) -> torch.Tensor:
        _require_heads(kernel, x, weight, contracted)
        tokens, (heads, rows, columns) = x.shape[0], weight.shape
        out = torch.empty(tokens, heads, weight.shape[3 - contracted], dtype=torch.float32)
        with _errors():
            getattr(self.handle, kernel)(
                x.data_ptr(), tokens, x.stride(0), x.stride(1), weight.data_ptr(), heads, rows, columns,
                weight.stride(0), weight.stride(1), out.data_ptr(),
            )  # fmt: skip
        return out

    def attend(
        self,
        q: torch.Tensor,
        rows: torch.Tensor,
        spans: Sequence[tuple[torch.Tensor, int, int]],
        *,
        latent: int,
        row_format: str,
        scale: float,
    ) -> torch.Tensor:
        """fp32 [T, H, latent]: of each query the mean of the latents that it sees, weighed by softmax.

        A query's bits depend on its own context alone.

        Args:
            q: bf16 [T, H, latent + rope], the spans' queries one after the other.
            rows: of one layer as stored, uint8 [pages · 64, row_bytes].
            spans: (page table int64 [P], tokens before, queries) of each sequence; query i sees the rows up
                to its own, tokens before + i.
            latent: a multiple of 16.
            row_format: "bf16" or "fp8", see `cache.rows`.
            scale: of the scores, above 0.

        Raises:
            NativeError: shapes or types do not fit, or a table names a page that is not there.
        """
        _require_bf16("q", q, 3)
        tokens, heads, width = q.shape
        fits = q.is_contiguous() and rows.is_contiguous() and rows.dtype == torch.uint8
        if (
            not fits
            or rows.device.type != "cpu"
            or row_format not in ("bf16", "fp8")
            or not 0 < latent <= width
        ):
            raise NativeError(
                f"attend takes contiguous q {list(q.shape)} and uint8 rows on the CPU in bf16 or fp8, not "
                f"{rows.dtype} {list(rows.shape)} on {rows.device} in {row_format}"
            )
        known, given = self._known_spans
        if spans is not known:
            given = _given_spans(spans)
            if isinstance(spans, tuple):  # which does not change
                self._known_spans = spans, given
        rope, row_bytes = width - latent, rows.shape[1]
        least = 2 * width if row_format == "bf16" else latent + 4 * -(-latent // 128) + 2 * rope
        if row_bytes != least or sum(count for *_, count in given) != tokens:
            raise NativeError(
                f"attend: rows of {row_bytes} bytes do not hold {width} values in {row_format}, or {tokens} "
                "queries are not the spans'"
            )
        out = torch.empty(tokens, heads, latent, dtype=torch.float32)
        with _errors():
            self.handle.attend(
                rows.data_ptr(), rows.shape[0] // _PAGE_ROWS, row_bytes, latent, rope, row_format == "fp8",
                given, q.data_ptr(), heads, scale, out.data_ptr(),
            )  # fmt: skip
        return out

    def probe_read_seconds(
        self, data: torch.Tensor, stripe_bytes: int, ahead_bytes: int, streams: int
    ) -> float:
        """Seconds that all threads need to read `data` once; see `hardware.bandwidth`.

        Args:
            stripe_bytes: what a thread takes at a time, at least 4096.
            ahead_bytes: of software prefetch; 0 leaves it to the hardware.
            streams: 1, 2, 4 or 8 parts of a stripe that are read in turn.
        """
        if not data.is_contiguous() or data.device.type != "cpu":
            raise NativeError("probe_read_seconds needs contiguous data on the CPU")
        if min(stripe_bytes, ahead_bytes) < 0:
            raise NativeError("probe_read_seconds needs sizes that are not negative")
        with _errors():
            return float(
                self.handle.probe_read_seconds(
                    data.data_ptr(), data.nbytes, stripe_bytes, ahead_bytes, streams
                )
            )

    def peak(self, kind: str) -> float | None:
        """Operations per second of all threads on registers alone, a multiply-add counted as two.

        Args:
            kind: "bf16" (AVX512-BF16), "int8" (AVX512-VNNI) or "fp32".

        Returns:
            None if the instruction set has no such instruction.
        """
        with _errors():
            found = self.handle.probe_peak(kind)
        return None if found is None else float(found)


class FileMap:
    """A map of a file whose loss does not end the process: who reads what is gone reads zeros.

    See `csrc/cpu/fault.h`. Close it before the memory is unmapped.

    Args:
        address: of the map, which is read-only and begins with the file.
        nbytes: of the map.
        descriptor: of the file; duplicated.

    Raises:
        NativeError: it overlaps a map that is registered, or there are too many maps or descriptors.
    """

    def __init__(self, address: int, nbytes: int, descriptor: int) -> None:
        self.address = address
        self.nbytes = nbytes
        with _errors():
            self._id: int | None = _native.register_file(address, nbytes, descriptor)

    @property
    def failed(self) -> bool:
        """Whether any of it may have been read as zeros."""
        return file_failed(self.address, self.nbytes)

    def restore(self, descriptor: int) -> bool:
        """Map the file again, opened anew, in the same place, while nobody reads.

        Returns:
            False: the file is not as long as the map, and nothing was changed.

        Raises:
            NativeError: it cannot be mapped, or this map is closed.
        """
        if self._id is None:
            raise NativeError("this map of a file is closed")
        with _errors():
            return bool(_native.restore_file(self._id, descriptor))

    def close(self) -> None:
        """Watch it no longer. Repeatedly."""
        if self._id is not None:
            closed, self._id = self._id, None
            _native.unregister_file(closed)


def look_at_files() -> float:
    """Notice which mapped files became shorter: the rest of their last page is read without a signal.

    Returns:
        The seconds it took.
    """
    return float(_native.look_at_files())


def file_failed(address: int, nbytes: int) -> bool:
    """Whether a byte there may have been read as zero in place of what its file holds. Ask after reading."""
    return bool(_native.file_failed(address, nbytes))


def file_changes() -> int:
    """Another number whenever `failed_ranges` or `rewritten_files` give something else."""
    return int(_native.file_changes())


def failed_ranges() -> list[tuple[int, int]]:
    """All bytes for which `file_failed` is true, as addresses [begin, end)."""
    return [(int(begin), int(end)) for begin, end in _native.failed_ranges()]


def rewritten_files() -> dict[int, int]:
    """Addresses of maps whose files `look_at_files` found written to, at the same size → how often."""
    return {int(address): int(times) for address, times in _native.rewritten_files().items()}


class StoreStats(NamedTuple):
    """What `NativeStore.stats` tells; slots hold one expert each."""

    slots: int
    filled: int
    hits: int  # experts that hand-offs found in memory
    misses: int  # those that had to be fetched
    lost: int  # reads of an expert that failed
    bytes_read: int


class FillProgress(NamedTuple):
    """What `NativeFiller.progress` tells, in experts."""

    experts: int
    done: int
    failed: int
    running: bool


class MemorySpan(NamedTuple):
    """Memory of this process."""

    address: int
    nbytes: int


class Loan(NamedTuple):
    """An expert in its slot: its bytes in the order of `NativeStore.copy`, and the slot's memory by node."""

    parts: tuple[MemorySpan, ...]
    memory: tuple[MemorySpan, ...]


class NativeStore:
    """Where the bytes of all routed experts lie, [layer][expert]; see `csrc/experts/store.h`.

    Args:
        gate_bounds, down_bounds: nodes + 1 ascending rows; node n has rows [b[n], b[n + 1]) of gate and
            up, and of down.
    """

    def __init__(
        self,
        layers: int,
        experts: int,
        hidden: int,
        inter: int,
        gate_bounds: Sequence[int] = (),
        down_bounds: Sequence[int] = (),
    ) -> None:
        with _errors():
            self.handle = _native.ExpertStore(
                layers, experts, hidden, inter, list(gate_bounds), list(down_bounds)
            )
        self.expert_bytes: int = self.handle.expert_bytes
        self.nodes: int = self.handle.nodes
        self.slot_bytes: tuple[int, ...] = tuple(self.handle.slot_bytes)  # of an expert, on each node

    def add_source(self, path: Path) -> int:
        """A file that experts are read from; its number."""
        with _errors():
            return int(self.handle.add_source(os.fspath(path)))

    def put(self, layer: int, expert: int, packed: Sequence[int], scale: Sequence[int]) -> None:
        """Addresses of gate, up and down, which must outlive the store."""
        with _errors():
            self.handle.put(layer, expert, list(packed), list(scale))

    def locate(self, layer: int, expert: int, places: Sequence[tuple[int, int]]) -> None:
        """Tell where in their files an expert's bytes lie; its addresses must be a map of these files.

        Args:
            places: (source, offset) of the packed weights of gate, up and down, then of their scales.
        """
        with _errors():
            self.handle.locate(layer, expert, list(places))

    def open_slots(
        self,
        count: int,
        node_ids: Sequence[int],
        *,
        streamed: bool,
        half_life: float = 0.0,
        folder: Path | None = None,
        digest: str = "",
        reader: str = "",
        depth: int = 16,
        piece_bytes: int = 2 << 20,
    ) -> None:
        """Memory for `count` experts; once, when all were put.

        Args:
            node_ids: the NUMA node of each shard; −1: not bound.
            streamed: hand-offs fetch what they miss; else experts are read mapped until they have a slot.
            half_life: of an expert's uses, in hand-offs; 0: the last use alone decides who leaves.
            folder: on hugetlbfs or shared memory, for slots that outlive the process.
            digest: of what such slots are filled from.
            reader: "uring", "threads", or "": the first that works.
            depth: pieces in flight.
            piece_bytes: of one read, a multiple of 4096.
        """
        with _errors():
            self.handle.open_slots(
                count, list(node_ids), os.fspath(folder) if folder else "", digest, reader, depth,
                piece_bytes, streamed, half_life,
            )  # fmt: skip

    def close_slots(self) -> None:
        """Give the slots back; every expert is mapped again. What fills them must have stopped."""
        with _errors():
            self.handle.close_slots()

    def copy(self, layer: int, expert: int, to: torch.Tensor) -> bool:
        """Copy an expert's bytes, as its file has them, to `to`, uint8 [at least expert_bytes]. Any thread.

        Packed rows of gate, up and down, then their scales; from its slot, or else through the map.

        Returns:
            False: they could not be read.
        """
        if to.dtype != torch.uint8 or to.device.type != "cpu" or not to.is_contiguous():
            raise NativeError("an expert is copied to contiguous bytes on the CPU")
        if to.numel() < self.expert_bytes:
            raise NativeError(f"an expert has {self.expert_bytes} bytes, and {to.numel()} are no room for it")
        with _errors():
            return bool(self.handle.copy(layer, expert, to.data_ptr()))

    def lend(self, layer: int, expert: int) -> Loan | None:
        """An expert's bytes in its slot, which stays as it is until `give_back`, once a loan. Any thread.

        The slot's memory stays the process's own until the slots are closed, so that it can be page-locked.

        Returns:
            None: it is in no slot, or not yet.
        """
        with _errors():
            found = self.handle.lend(layer, expert)
        if found is None:
            return None
        parts, memory = found
        return Loan(tuple(MemorySpan(*part) for part in parts), tuple(MemorySpan(*slot) for slot in memory))

    def give_back(self, layer: int, expert: int) -> None:
        """End a loan.

        Raises:
            NativeError: nobody borrowed it.
        """
        with _errors():
            self.handle.give_back(layer, expert)

    def pins(self, layer: int, expert: int) -> int:
        """Tickets that read this expert now."""
        return int(self.handle.pins(layer, expert))

    def in_slot(self, layer: int, expert: int) -> bool:
        """Whether the expert is in memory of its own."""
        return bool(self.handle.in_slot(layer, expert))

    def release(self, layer: int, expert: int) -> bool:
        """Back to the map, the slot free; False if it is pinned, in no slot, or streamed."""
        with _errors():
            return bool(self.handle.release(layer, expert))

    def stats(self) -> StoreStats:
        """Counts since the start."""
        return StoreStats(**self.handle.stats())

    def arenas(self) -> list[tuple[int, str, bool]]:
        """(bytes, kind of pages, bound to its node) of each node's slots."""
        with _errors():
            return [(int(nbytes), str(pages), bool(bound)) for nbytes, pages, bound in self.handle.arenas()]

    @property
    def reader(self) -> str:
        """What reads: "uring" or "threads"."""
        with _errors():
            return str(self.handle.reader)

    def inject_read_faults(self, *, fail_every: int = 0, short_every: int = 0) -> None:
        """For tests: every n-th piece fails, or ends early; 0: none."""
        with _errors():
            self.handle.inject_read_faults(fail_every, short_every)


class NativeFiller:
    """Threads that bring experts into slots behind the scenes; see `csrc/experts/filler.h`.

    Args:
        order: (layer, expert), first come first filled.
        cpus: of each node; an empty list does not bind its threads.
        threads: of each node.
    """

    def __init__(
        self,
        store: NativeStore,
        order: Sequence[tuple[int, int]],
        cpus: Sequence[Sequence[int]],
        *,
        threads: int = 1,
    ) -> None:
        with _errors():
            self.handle = _native.Filler(store.handle, list(order), [list(c) for c in cpus], threads)

    def progress(self) -> FillProgress:
        """How far it is."""
        return FillProgress(*self.handle.progress())

    def stop(self) -> None:
        """Finish what is on its way and end."""
        self.handle.stop()


class NativeSlot(NamedTuple):
    """Torch views of a slot's buffers at their fixed addresses, each in pages of its own."""

    x: torch.Tensor  # bf16 [max_rows, hidden]
    ids: torch.Tensor  # int32 [max_rows, top_k]
    weights: torch.Tensor  # fp32 [max_rows, top_k]
    out: torch.Tensor  # fp32 [max_rows, hidden]


def mask_logits(
    logits: torch.Tensor, plain: int, allowed: bytes | None, *, text: bool, specials: Sequence[int]
) -> None:
    """Set forbidden entries of `logits` (fp32 [count], on the CPU) to −inf, in place.

    Args:
        plain: ids below are plain tokens, the others specials.
        allowed: a bit per plain token, the lowest bit of a byte first; None: all of them or none, as `text`.
        specials: those that stay.

    Ten times as fast as torch's `masked_fill_` with as random a mask.
    """
    if logits.dtype != torch.float32 or logits.device.type != "cpu" or logits.dim() != 1:
        raise NativeError(f"logits must be one row of float32 on the CPU, not {logits.dtype}")
    if not logits.is_contiguous():
        raise NativeError("logits must be contiguous")
    with _errors():
        _native.mask_logits(logits.data_ptr(), logits.numel(), plain, allowed, text, specials)


class CollectReport(NamedTuple):
    """What `NativeDispatcher.collect` tells: a status byte per row (0: good), bytes, misses, nanoseconds."""

    status: bytes
    bytes_read: int
    misses: int
    busy_ns: int
    wait_ns: int


class NativeDispatcher:
    """The hand-off of `csrc/experts/dispatch.h`, slots as tensors."""

    def __init__(
        self, store: NativeStore, machine: Machine, *, hidden: int, max_rows: int, top_k: int, slots: int
    ) -> None:
        with _errors():
            self.handle = _native.Dispatcher(store.handle, machine.handle, max_rows, top_k, slots)
        self.slots = [_slot(self.handle, i, hidden, max_rows, top_k) for i in range(slots)]

    def acquire(self) -> int:
        """A free slot to fill."""
        with _errors():
            return int(self.handle.acquire())

    def submit(self, slot: int, layer: int, rows: int) -> int:
        """Start the slot's first `rows` rows; returns the epoch that `collect` wants."""
        with _errors():
            return int(self.handle.submit(slot, layer, rows))

    def collect(self, slot: int, epoch: int, rows: int) -> CollectReport:
        """Wait for the ticket; the result lies in the slot's `out`."""
        with _errors():
            return CollectReport(*self.handle.collect(slot, epoch, rows))

    def abort(self) -> None:
        """Every outstanding and later ticket completes as poisoned."""
        self.handle.abort()


class HandoffReport(NamedTuple):
    """What `NativeHandoff.end` tells of a step."""

    epoch: int
    layers: int
    answered: int
    aborted: str  # "" in a good step, else "asked", "watchdog" or "answer threw"
    error: str  # of an answer that threw
    next_layer: int  # the first that has no answer; −1: none
    lost_rows: list[int]  # an expert of theirs could not be read
    bytes_read: int
    misses: int
    busy_ns: int
    wait_ns: int


class NativeHandoff:
    """The thread that answers a stream; see `csrc/gpu/handoff.h`.

    Args:
        layers: those that may ring; slot i of the words is `layers[i]`'s.
        owner: of the words, which lie at `words`, aligned to 128 bytes.
        timeout_ms: without an answer or a sign of life, for which a step is aborted.
    """

    def __init__(
        self,
        store: NativeStore,
        machine: Machine,
        *,
        hidden: int,
        max_rows: int,
        top_k: int,
        layers: Sequence[int],
        owner: object,
        words: int,
        timeout_ms: float,
    ) -> None:
        with _errors():
            self.handle = _native.Handoff(
                store.handle, machine.handle, max_rows, top_k, list(layers), owner, words, timeout_ms
            )
        self.slot = _slot(self.handle, 0, hidden, max_rows, top_k)

    def begin(self, layers: Sequence[int], rows: int) -> int:
        """Open a step and return its epoch."""
        with _errors():
            return int(self.handle.begin(list(layers), rows))

    def end(self) -> HandoffReport:
        """Close the step; the stream must be idle."""
        with _errors():
            return HandoffReport(**self.handle.end())

    def abort(self) -> None:
        """Complete every wait as poisoned. From any thread; nothing happens once it is closed."""
        self.handle.abort()

    @property
    def aborted(self) -> bool:
        """Whether `reset` comes before the next step."""
        with _errors():
            return bool(self.handle.aborted())

    def reset(self) -> None:
        """Back to a clean state; the stream must be idle. `NativeError` while a worker is stuck."""
        with _errors():
            self.handle.reset()

    def close(self) -> None:
        """End the threads, an open step as aborted; the slot's memory stays. Repeatedly."""
        self.handle.close()

    def stall_at(self, layer: int) -> None:
        """For tests: the answering thread stands still at `layer`; −1: it goes on."""
        self.handle.stall_at(layer)


_GivenSpans = list[tuple[int, int, int]]


def _given_spans(spans: Sequence[tuple[torch.Tensor, int, int]]) -> _GivenSpans:
    """Address of the table, start and count of each."""
    given = []
    for table, start, count in spans:
        if table.dtype != torch.int64 or not table.is_contiguous() or table.device.type != "cpu":
            raise NativeError(f"a page table must be contiguous int64 on the CPU, not {table.dtype}")
        if min(start, count) < 0 or start + count > _PAGE_ROWS * table.numel():
            raise NativeError(f"a page table of {table.numel()} pages lacks rows {start} + {count}")
        given.append((table.data_ptr(), start, count))
    return given


def _slot(handle: Any, slot: int, hidden: int, max_rows: int, top_k: int) -> NativeSlot:
    x, ids, weights, out = handle.buffers(slot)
    return NativeSlot(
        _view(handle, x, torch.bfloat16, max_rows, hidden),
        _view(handle, ids, torch.int32, max_rows, top_k),
        _view(handle, weights, torch.float32, max_rows, top_k),
        _view(handle, out, torch.float32, max_rows, hidden),
    )


def _view(owner: object, address: int, dtype: torch.dtype, rows: int, columns: int) -> torch.Tensor:
    nbytes = rows * columns * dtype.itemsize
    buffer = (ctypes.c_uint8 * nbytes).from_address(address)
    buffer._owner = owner  # type: ignore[attr-defined]  # the memory lives as long as a view of it
    return torch.frombuffer(buffer, dtype=dtype).view(rows, columns)


def _require_bf16(name: str, tensor: torch.Tensor, dims: int) -> None:
    if tensor.dtype != torch.bfloat16 or tensor.device.type != "cpu":
        raise NativeError(f"{name} must be bfloat16 on the CPU, not {tensor.dtype} on {tensor.device}")
    if tensor.dim() != dims or (tensor.shape[-1] > 1 and tensor.stride(-1) != 1):
        raise NativeError(
            f"{name} must have {dims} dimensions, the last contiguous; shape {list(tensor.shape)}, "
            f"strides {list(tensor.stride())}"
        )


def _require_weight8(weight: Weight8) -> None:
    values, scale = weight.values, weight.scale
    dtype = {"int8": torch.int8, "fp8": torch.uint8}.get(weight.kind)
    if values.dtype != dtype or values.device.type != "cpu":
        raise NativeError(f"weight of {weight.kind!r} has values of {values.dtype} on {values.device}")
    if values.dim() != 2 or not values.shape[1] or (values.shape[1] > 1 and values.stride(1) != 1):
        raise NativeError(
            f"values must have 2 dimensions, the last contiguous and not empty; shape {list(values.shape)}, "
            f"strides {list(values.stride())}"
        )
    fits = scale.dtype == torch.float32 and scale.device == values.device and scale.is_contiguous()
    if not fits or scale.shape != values.shape[:1]:
        raise NativeError(
            f"scale must be contiguous float32 [{values.shape[0]}] beside the values, not {scale.dtype} "
            f"{list(scale.shape)} on {scale.device}"
        )


def _require_heads(what: str, x: torch.Tensor, weight: torch.Tensor, contracted: int) -> None:
    _require_bf16("x", x, 3)
    _require_bf16("weight", weight, 3)
    if x.shape[1] != weight.shape[0] or x.shape[2] != weight.shape[contracted]:
        raise NativeError(f"{what}: x {list(x.shape)} does not fit weight {list(weight.shape)}")


class _Errors(AbstractContextManager[None]):
    """Turns what the extension raises into `NativeError`. A decode step enters it hundreds of times."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, ExtensionError):
            raise NativeError(str(error)) from None


_ERRORS = _Errors()


def _errors() -> _Errors:
    return _ERRORS
