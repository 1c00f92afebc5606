"""The kernels picked for this CPU, and the pinned pool that runs them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from k2hybrid.errors import NativeError
from k2hybrid.native.extension import ERRORS, EXTENSION
from k2hybrid.native.latent_step import NativeLatentStep
from k2hybrid.native.mlp_step import NativeMlpStep
from k2hybrid.native.rows import NativeRows
from k2hybrid.native.tensors import PAGE_ROWS, require_bf16, require_heads, require_weight8
from k2hybrid.types import LatentWeights, LinearWeight, Weight8

# Read before any thread is pinned: a pinned thread sees its own core only.
ALLOWED_CPUS: tuple[int, ...] = tuple(sorted(os.sched_getaffinity(0)))

_GivenSpans = list[tuple[int, int, int]]


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
        with ERRORS:
            self.handle = EXTENSION.Machine(count, isa or "", cpus, groups)
        self.threads: int = self.handle.threads
        self.isa: str = self.handle.isa
        # AMX, which torch uses as well: bf16 products of many rows are several times as fast by torch there.
        self.tiles: bool = self.isa == "amx_bf16"
        self.nodes: int = self.handle.groups
        self.rows = NativeRows(self.handle)
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
        require_bf16("x", x, 2)
        if isinstance(weight, Weight8):
            return self._linear8(x, weight)
        require_bf16("weight", weight, 2)
        if x.shape[1] != weight.shape[1]:
            raise NativeError(f"linear: x {list(x.shape)} does not fit weight {list(weight.shape)}")
        tokens, columns = x.shape
        rows = weight.shape[0]
        out = torch.empty(tokens, rows, dtype=torch.float32)
        with ERRORS:
            self.handle.linear(
                x.data_ptr(), tokens, x.stride(0), 0, weight.data_ptr(), 1, rows, columns,
                0, weight.stride(0), out.data_ptr(),
            )  # fmt: skip
        return out

    def _linear8(self, x: torch.Tensor, weight: Weight8) -> torch.Tensor:
        values, scale = weight.values, weight.scale
        require_weight8(weight)
        if x.shape[1] != values.shape[1]:
            raise NativeError(f"linear: x {list(x.shape)} does not fit weight {list(values.shape)}")
        tokens, (rows, columns) = x.shape[0], values.shape
        out = torch.empty(tokens, rows, dtype=torch.float32)
        with ERRORS:
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
        require_heads(kernel, x, weight, contracted)
        tokens, (heads, rows, columns) = x.shape[0], weight.shape
        out = torch.empty(tokens, heads, weight.shape[3 - contracted], dtype=torch.float32)
        with ERRORS:
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
        require_bf16("q", q, 3)
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
        given = self.given_spans(spans)
        rope, row_bytes = width - latent, rows.shape[1]
        least = 2 * width if row_format == "bf16" else latent + 4 * -(-latent // 128) + 2 * rope
        if row_bytes != least or sum(count for *_, count in given) != tokens:
            raise NativeError(
                f"attend: rows of {row_bytes} bytes do not hold {width} values in {row_format}, or {tokens} "
                "queries are not the spans'"
            )
        out = torch.empty(tokens, heads, latent, dtype=torch.float32)
        with ERRORS:
            self.handle.attend(
                rows.data_ptr(), rows.shape[0] // PAGE_ROWS, row_bytes, latent, rope, row_format == "fp8",
                given, q.data_ptr(), heads, scale, out.data_ptr(),
            )  # fmt: skip
        return out

    @property
    def attend_seconds(self) -> float:
        """That attention to contexts took since the start, of `attend` and of latent steps."""
        return float(self.handle.attend_ns) / 1e9

    def given_spans(self, spans: Sequence[tuple[torch.Tensor, int, int]]) -> _GivenSpans:
        """Address of the table, start and count of each; all layers of a pass ask for the same.

        Raises:
            NativeError: a table does not fit.
        """
        known, given = self._known_spans
        if spans is not known:
            given = _given_spans(spans)
            if isinstance(spans, tuple):  # which does not change
                self._known_spans = spans, given
        return given

    def latent_step(self, weights: LatentWeights, *, rope: int, eps: float, scale: float) -> NativeLatentStep:
        """One layer's attention for few rows, in one call; see there."""
        return NativeLatentStep(self, weights, rope=rope, eps=eps, scale=scale)

    def mlp_step(self, gate: LinearWeight, up: LinearWeight, down: LinearWeight) -> NativeMlpStep:
        """An MLP for few rows, in one call; see there."""
        return NativeMlpStep(self, gate, up, down)

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
        with ERRORS:
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
        with ERRORS:
            found = self.handle.probe_peak(kind)
        return None if found is None else float(found)


def _given_spans(spans: Sequence[tuple[torch.Tensor, int, int]]) -> _GivenSpans:
    """Address of the table, start and count of each."""
    given = []
    for table, start, count in spans:
        if table.dtype != torch.int64 or not table.is_contiguous() or table.device.type != "cpu":
            raise NativeError(f"a page table must be contiguous int64 on the CPU, not {table.dtype}")
        if min(start, count) < 0 or start + count > PAGE_ROWS * table.numel():
            raise NativeError(f"a page table of {table.numel()} pages lacks rows {start} + {count}")
        given.append((table.data_ptr(), start, count))
    return given
