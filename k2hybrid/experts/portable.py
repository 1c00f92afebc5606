"""The routed experts without the extension: numba over the published bytes where they lie.

For CPUs the extension cannot be built for, and as a second witness of its kernels. Nothing is unpacked ahead:
nibbles are read as little-endian words, scales as the bits of bf16.

Sums run in the order of `csrc/kernels/layout.h` and `matmul.inl.h`: of each block of 128 weights, lane j of
16 takes elements 8j to 8j+7 in four chained dot products of two (8j+k, then 8j+4+k, for k = 0 to 3); the
block enters the lane's sum by one multiply-add with its scale; at the end lanes 8, 4, 2 and 1 apart are
added. SwiGLU is that of `ffn.inl.h`, rounded to bf16 once.

Rounding: no fast-math, and a multiply-add is fused only where the C++ kernels ask for it. numba has none, so
LLVM's is emitted (`llvm.fma`: an instruction, or a function of libm on a CPU without; rounded once in either
case). So the results have the bits of the plain C++ kernels, as those of AVX2 and AVX-512 do. AVX-512 with
BF16 adds a pair of products in one step and flushes subnormals: last bits differ, within the bound of
`docs/numerics.md`.

Of what a mapped file lost, zeros are read (`csrc/cpu/fault.h`); the rows concerned are told.
"""

from __future__ import annotations

import ctypes
import importlib
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
import numpy.typing as npt
import torch

from k2hybrid.errors import ConfigError, EngineError
from k2hybrid.types import ExpertRef, Int4Ref, TensorRef, TicketStats

try:
    numba: Any = importlib.import_module("numba")
    intrinsic: Any = importlib.import_module("numba.extending").intrinsic
except ImportError as error:
    raise ConfigError(
        f"the portable experts need numba, which cannot be imported ({error}); pip install numba"
    ) from None

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Words = npt.NDArray[np.int32]
Halves = npt.NDArray[np.uint16]
Compiled = TypeVar("Compiled", bound=Callable[..., Any])

GROUP = 32
BLOCK = 128
LANES = 16
WORD = 8  # nibbles
# Nibbles of a word, that is elements of a lane, in the order in which they are summed.
CHAIN = [0, 4, 1, 5, 2, 6, 3, 7]
ROWS = 32  # output rows of one parallel chunk
TOKENS = 16  # tokens for which a row is unpacked once

# Typed, since numba would widen a plain number, and with it the sum.
F = np.float32
I = np.int32  # noqa: E741
U = np.uint32
ZERO, ONE = F(0), F(1)

# numba's last resort among its thread pools ends the process if two threads enter it.
_one_caller = threading.Lock()


def _compiled(function: Compiled) -> Compiled:
    return cast(Compiled, numba.njit(error_model="numpy")(function))


def _parallel(function: Compiled) -> Compiled:
    return cast(Compiled, numba.njit(parallel=True, nogil=True, error_model="numpy")(function))


def _emit_fma(_context: Any, a: Any, b: Any, c: Any) -> Any:
    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.fma(*args)

    number = numba.types.float32
    return number(number, number, number), generate


_fma: Any = intrinsic(_emit_fma)  # a · b + c of float32, rounded once


# --- kernels --------------------------------------------------------------------------------------


@_compiled
def _value(word: np.int32, nibble: int) -> np.float32:
    return F(F(I(I(word >> (4 * nibble)) & I(15))) - F(8))


@_compiled
def _unpack(words: Words, w: Floats) -> None:
    """The 128 weights of a block, without scales: w[16 i + j] is the i-th that lane j adds."""
    for j in range(16):
        word = words[j]
        w[j] = _value(word, 0)
        w[16 + j] = _value(word, 4)
        w[32 + j] = _value(word, 1)
        w[48 + j] = _value(word, 5)
        w[64 + j] = _value(word, 2)
        w[80 + j] = _value(word, 6)
        w[96 + j] = _value(word, 3)
        w[112 + j] = _value(word, 7)


@_compiled
def _add_block(w: Floats, x: Floats, scale: Floats, total: Floats) -> None:
    """total[j] += scale[j] · Σᵢ w[16 i + j] x[16 i + j]: unrolled, so that lanes become vectors."""
    for j in range(16):
        dot = _fma(w[j], x[j], ZERO)
        dot = _fma(w[16 + j], x[16 + j], dot)
        dot = _fma(w[32 + j], x[32 + j], dot)
        dot = _fma(w[48 + j], x[48 + j], dot)
        dot = _fma(w[64 + j], x[64 + j], dot)
        dot = _fma(w[80 + j], x[80 + j], dot)
        dot = _fma(w[96 + j], x[96 + j], dot)
        dot = _fma(w[112 + j], x[112 + j], dot)
        total[j] = _fma(dot, scale[j], total[j])


@_compiled
def _tree(v: Floats) -> np.float32:
    for j in range(8):
        v[j] += v[j + 8]
    for j in range(4):
        v[j] += v[j + 4]
    return F((v[0] + v[2]) + (v[1] + v[3]))


@_compiled
def _int4_rows(
    packed: Words, scale: Halves, top: int, bottom: int, x: Floats, first: int, last: int, y: Floats
) -> None:
    """y[t, r] = row top + r · token first + t. x [blocks, tokens, 128] in the order of `arrange`."""
    full = packed.shape[1] // 16
    tail = packed.shape[1] % 16  # words, so lanes too
    tokens = last - first
    w = np.empty(128, np.float32)
    words = np.zeros(16, np.int32)
    bits = np.zeros(16, np.uint32)
    scales = bits.view(np.float32)
    total = np.empty((tokens, 16), np.float32)
    for r in range(top, bottom):
        total[:] = ZERO
        for b in range(full):
            _unpack(packed[r, 16 * b : 16 * b + 16], w)
            for group in range(4):
                for j in range(4):
                    bits[4 * group + j] = U(scale[r, 4 * b + group]) << U(16)
            for t in range(tokens):
                _add_block(w, x[b, first + t], scales, total[t])
        if tail:
            words[:tail] = packed[r, 16 * full :]
            _unpack(words, w)
            bits[:] = U(0)  # lanes without weights have zeros in x as well
            for j in range(tail):
                bits[j] = U(scale[r, 4 * full + j // 4]) << U(16)
            for t in range(tokens):
                _add_block(w, x[full, first + t], scales, total[t])
        for t in range(tokens):
            y[t, r - top] = _tree(total[t])


@_compiled
def _exp(x: np.float32) -> np.float32:
    x = x if x < F(88) else F(88)
    x = x if x > F(-87) else F(-87)
    n = np.rint(x * F(1.44269504))
    r = _fma(n, F(-0.693359375), x)
    r = _fma(n, F(2.12194440e-4), r)
    p = F(1.9875691500e-4)
    p = _fma(p, r, F(1.3981999507e-3))
    p = _fma(p, r, F(8.3334519073e-3))
    p = _fma(p, r, F(4.1665795894e-2))
    p = _fma(p, r, F(1.6666665459e-1))
    p = _fma(p, r, F(5.0000001201e-1))
    p = _fma(p, r * r, r) + ONE
    return F(p * U((I(n) + I(127)) << I(23)).view(np.float32))


@_compiled
def _bf16(v: np.float32) -> np.float32:
    """The nearest value that bf16 can hold, ties to even; NaN stays NaN."""
    bits = F(v).view(np.uint32)
    if v != v:
        return U((bits | U(0x400000)) & U(0xFFFF0000)).view(np.float32)
    return U((bits + U(0x7FFF) + ((bits >> U(16)) & U(1))) & U(0xFFFF0000)).view(np.float32)


@_parallel
def gate_up(gate: Words, gate_scale: Halves, up: Words, up_scale: Halves, x: Floats, hidden: Floats) -> None:
    """hidden[t, r] = bf16(silu(gate row r · token t) · (up row r · token t)), in fp32."""
    rows = gate.shape[0]
    tokens = x.shape[1]
    for chunk in numba.prange((rows + ROWS - 1) // ROWS):
        top = chunk * ROWS
        bottom = min(top + ROWS, rows)
        g = np.empty((TOKENS, ROWS), np.float32)
        u = np.empty((TOKENS, ROWS), np.float32)
        for first in range(0, tokens, TOKENS):
            last = min(first + TOKENS, tokens)
            _int4_rows(gate, gate_scale, top, bottom, x, first, last, g)
            _int4_rows(up, up_scale, top, bottom, x, first, last, u)
            for t in range(first, last):
                for r in range(bottom - top):
                    silu = g[t - first, r] / (ONE + _exp(g[t - first, r] * F(-1)))
                    hidden[t, top + r] = _bf16(silu * u[t - first, r])


@_parallel
def add_down(down: Words, scale: Halves, hidden: Floats, target: Ints, weights: Floats, out: Floats) -> None:
    """out[target[t], r] += weights[t] · (down row r · token t), in ascending t."""
    rows = down.shape[0]
    tokens = hidden.shape[1]
    for chunk in numba.prange((rows + ROWS - 1) // ROWS):
        top = chunk * ROWS
        bottom = min(top + ROWS, rows)
        y = np.empty((TOKENS, ROWS), np.float32)
        for first in range(0, tokens, TOKENS):
            last = min(first + TOKENS, tokens)
            _int4_rows(down, scale, top, bottom, hidden, first, last, y)
            for t in range(first, last):
                for r in range(bottom - top):
                    row = target[t]
                    out[row, top + r] = _fma(weights[t], y[t - first, r], out[row, top + r])


# --- the FFN --------------------------------------------------------------------------------------


class Matrix(NamedTuple):
    """One INT4 matrix in place: packed [out, in/8], the bits of its bf16 scales [out, in/32]."""

    packed: Words
    scale: Halves


class Expert(NamedTuple):
    """gate and up [inter, hidden], down [hidden, inter]."""

    gate: Matrix
    up: Matrix
    down: Matrix


def arrange(x: Floats) -> Floats:
    """[tokens, in] → [blocks, tokens, 128]: position 16 i + j holds the i-th element that lane j adds.

    The last block is padded with zeros.
    """
    tokens, columns = x.shape
    blocks = -(-columns // BLOCK)
    padded = np.zeros((tokens, blocks * BLOCK), np.float32)
    padded[:, :columns] = x
    lanes = padded.reshape(tokens, blocks, LANES, WORD)[..., CHAIN]
    return np.ascontiguousarray(lanes.transpose(1, 0, 3, 2)).reshape(blocks, tokens, BLOCK)


def add_expert_output(expert: Expert, x: Floats, target: Ints, weights: Floats, out: Floats) -> None:
    """out[target[t]] += weights[t] · down(silu(gate(x[t])) · up(x[t])), tokens in ascending t.

    Args:
        x: fp32 holding bf16 values, as `arrange` lays them.
        out: fp32 [rows, hidden].
    """
    hidden = np.empty((x.shape[1], expert.gate.packed.shape[0]), np.float32)
    gate_up(*expert.gate, *expert.up, x, hidden)
    add_down(*expert.down, arrange(hidden), target, weights, out)


def routed_sum(
    experts: Mapping[int, Expert],
    x: Halves,
    ids: Words,
    weights: Floats,
    *,
    stopped: Callable[[], bool] = lambda: False,
) -> Floats:
    """Each row's sum over its experts in ascending id, fp32 [rows, hidden].

    Args:
        x: bits of bf16 [rows, hidden].
        ids: [rows, top_k], −1 is padding.
        weights: [rows, top_k].
        stopped: asked before each expert; what is then missing is left out.
    """
    out = np.zeros(x.shape, np.float32)
    arranged = arrange((x.astype(np.uint32) << 16).view(np.float32))
    for expert in np.unique(ids[ids >= 0]).tolist():
        if stopped():
            break
        row, column = np.nonzero(ids == expert)
        row = np.ascontiguousarray(row)  # numba compiles a slower variant for strides
        add_expert_output(experts[expert], np.take(arranged, row, axis=1), row, weights[row, column], out)
    return out


# --- the hand-off ---------------------------------------------------------------------------------


class PortableExperts:
    """An `ExpertSink` and the `RoutedExperts` over what it was given. The refs' bytes must stay mapped.

    A thread of its own runs the kernels, while the caller goes on: numba's threads inherit the cores of the
    thread that first needs them, and the one that runs the model gets pinned.

    Args:
        experts: routed experts per MoE layer.
        hidden, inter: `hidden_size` and `moe_intermediate_size`, multiples of 32.
        threads: at most so many; None: all that numba offers.
        failed: whether bytes at (address, nbytes) were lost, asked after they were read.
    """

    def __init__(
        self,
        *,
        experts: int,
        hidden: int,
        inter: int,
        max_rows: int,
        top_k: int,
        threads: int | None = None,
        failed: Callable[[int, int], bool] = lambda address, nbytes: False,
    ) -> None:
        self.experts = experts
        self.hidden = hidden
        self.inter = inter
        self.max_rows = max_rows
        self.top_k = top_k
        self.expert_bytes = 3 * hidden * inter // 2 + 3 * hidden * inter // GROUP * 2
        self._failed = failed
        self._threads = min(threads or numba.config.NUMBA_NUM_THREADS, numba.config.NUMBA_NUM_THREADS)
        self._refs: dict[tuple[int, int], ExpertRef] = {}
        self._aborted = threading.Event()
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="portable-experts")
        self._worker.submit(self._warm_up).result()

    def add_expert(self, layer: int, expert: int, ref: ExpertRef) -> None:
        """Take one expert; each (layer, expert) once.

        Raises:
            EngineError: it was added before, or a shape does not fit.
        """
        what = f"expert {expert} of layer {layer}"
        if (layer, expert) in self._refs:
            raise EngineError(f"{what} was added twice")
        for name, matrix, out, inner in (
            ("gate", ref.gate, self.inter, self.hidden),
            ("up", ref.up, self.inter, self.hidden),
            ("down", ref.down, self.hidden, self.inter),
        ):
            if matrix.packed.nbytes != out * inner // 2 or matrix.scale.nbytes != out * inner // GROUP * 2:
                raise EngineError(
                    f"{what}, {name}: {matrix.packed.nbytes} packed and {matrix.scale.nbytes} scale bytes do "
                    f"not make a [{out}, {inner}] INT4 matrix with groups of {GROUP}"
                )
        self._refs[layer, expert] = ref

    def submit(self, layer: int, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> PortableTicket:
        """Start the routed experts of `layer`; the arguments are copied.

        Args:
            x: bf16 [rows, hidden], rows ≤ max_rows.
            ids: int32 [rows, top_k]; −1 is padding and reads nothing.
            weights: fp32 [rows, top_k].

        Raises:
            EngineError: wrong shapes or types, an id out of range, or an expert that was never added.
        """
        rows = x.shape[0]
        fits = x.shape == (rows, self.hidden) and ids.shape == (rows, self.top_k)
        if rows > self.max_rows or not fits or weights.shape != ids.shape or x.dtype != torch.bfloat16:
            raise EngineError(
                f"submit takes up to {self.max_rows} rows of {self.hidden} bf16 values and {self.top_k} "
                f"experts; x {x.dtype} {list(x.shape)}, ids {list(ids.shape)}, weights {list(weights.shape)}"
            )
        chosen = {expert: self._ref(layer, expert) for expert in set(ids.flatten().tolist()) - {-1}}
        bits = x.detach().contiguous().view(torch.int16).numpy().view(np.uint16).copy()
        copies = ids.numpy().astype(np.int32), weights.detach().numpy().astype(np.float32)
        submitted = time.monotonic()
        done = self._worker.submit(self._run, chosen, bits, *copies)
        return PortableTicket(done, len(chosen) * self.expert_bytes, submitted)

    def abort(self) -> None:
        """Complete every outstanding and later ticket as poisoned."""
        self._aborted.set()

    def _ref(self, layer: int, expert: int) -> ExpertRef:
        if not 0 <= expert < self.experts:
            raise EngineError(f"expert id {expert} is out of range")
        ref = self._refs.get((layer, expert))
        if ref is None:
            raise EngineError(f"there is no expert {expert} in layer {layer}")
        return ref

    def _run(self, refs: Mapping[int, ExpertRef], x: Halves, ids: Words, weights: Floats) -> _Result:
        experts = {
            expert: Expert(*(_matrix(matrix) for matrix in _matrices(ref))) for expert, ref in refs.items()
        }
        out = self._sum(experts, x, ids, weights)
        failed = np.zeros(len(ids), bool)
        for expert, ref in refs.items():
            if any(self._failed(t.address, t.nbytes) for m in _matrices(ref) for t in (m.packed, m.scale)):
                failed |= (ids == expert).any(axis=1)
        if self._aborted.is_set():
            failed[:] = True
        return _Result(torch.from_numpy(out), tuple(np.flatnonzero(failed).tolist()), time.monotonic())

    def _sum(self, experts: Mapping[int, Expert], x: Halves, ids: Words, weights: Floats) -> Floats:
        with _one_caller:
            numba.set_num_threads(self._threads)
            return routed_sum(experts, x, ids, weights, stopped=self._aborted.is_set)

    def _warm_up(self) -> None:
        """Compiles, so that the first step is as fast as the next."""
        matrix = Matrix(np.zeros((GROUP, GROUP // WORD), np.int32), np.zeros((GROUP, 1), np.uint16))
        for array in matrix:
            array.flags.writeable = False
        one = np.zeros((1, 1), np.int32), np.zeros((1, 1), np.float32)
        self._sum({0: Expert(matrix, matrix, matrix)}, np.zeros((1, GROUP), np.uint16), *one)


class _Result(NamedTuple):
    out: torch.Tensor
    failed_rows: tuple[int, ...]
    finished: float


class PortableTicket:
    """One hand-off in flight (`types.Ticket`)."""

    def __init__(self, done: Future[_Result], bytes_read: int, submitted: float) -> None:
        self._done: Future[_Result] | None = done
        self._bytes_read = bytes_read
        self._submitted = submitted
        self._failed: tuple[int, ...] = ()
        self._stats: TicketStats | None = None

    def collect(self) -> torch.Tensor:
        """The routed sum, fp32 [rows, hidden]. Once only.

        Raises:
            EngineError: collected before.
        """
        if self._done is None:
            raise EngineError("this ticket was collected before")
        done, self._done = self._done, None
        start = time.monotonic()
        result = done.result()
        self._failed = result.failed_rows
        self._stats = TicketStats(
            bytes_read=self._bytes_read,
            misses=0,
            wait_ms=1e3 * (time.monotonic() - start),
            busy_ms=1e3 * (result.finished - self._submitted),
        )
        return result.out

    @property
    def failed_rows(self) -> tuple[int, ...]:
        """Rows whose result is not to be used: an expert could not be read, or the hand-off was aborted."""
        return self._failed

    @property
    def stats(self) -> TicketStats:
        """Bytes and times of this hand-off; after `collect`."""
        if self._stats is None:
            raise EngineError("collect the ticket before asking what it cost")
        return self._stats


def _matrices(ref: ExpertRef) -> tuple[Int4Ref, Int4Ref, Int4Ref]:
    return ref.gate, ref.up, ref.down


def _matrix(ref: Int4Ref) -> Matrix:
    out = ref.packed.shape[0]
    return Matrix(_view(ref.packed, np.int32, out), _view(ref.scale, np.uint16, out))


def _view(ref: TensorRef, dtype: type[np.generic], rows: int) -> npt.NDArray[Any]:
    """The tensor's bytes in place, read-only. numba compiles a variant of its own for unaligned ones."""
    data = (ctypes.c_uint8 * ref.nbytes).from_address(ref.address)
    view: npt.NDArray[Any] = np.frombuffer(memoryview(data), dtype=dtype).reshape(rows, -1)
    view.flags.writeable = False
    return view
