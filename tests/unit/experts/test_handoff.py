"""The hand-off of a stream against the dispatcher: bits, losses, aborts, stuck workers. Without a device."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from k2hybrid.checkpoint.loader import open_checkpoint
from k2hybrid.checkpoint.synth import synthesize
from k2hybrid.engine.metrics import ByteMeter
from k2hybrid.errors import EngineError, NativeError
from k2hybrid.experts.dispatch import Dispatcher
from k2hybrid.experts.handoff import Handoff
from k2hybrid.experts.placement import Placement, shard_rows
from k2hybrid.experts.store import ExpertStore
from k2hybrid.hardware.doorbell import DoorbellWords
from k2hybrid.hardware.streams import EmulatedStream, SignalStream
from k2hybrid.native.extension import INSTRUCTION_SETS
from k2hybrid.native.machine import Machine
from k2hybrid.runtime.meter import MeteredSteps
from tests.guarded import guarded
from tests.random_experts import EXPERTS, TOP_K, RandomLayers

HIDDEN, INTER = 160, 96
LAYERS = [1, 2, 4, 5]  # of six; layers 0 and 3 have no experts
MAX_ROWS = 8
PATIENT_MS = 60_000.0  # longer than any test waits

Rows = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Tape(EmulatedStream):
    """A stream that can be captured: a replay runs what was recorded with the values of that time."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Callable[[], None]] | None = None

    @property
    def capturing(self) -> bool:
        return self.kept is not None

    def _record(self, run: Callable[[], None]) -> None:
        run() if self.kept is None else self.kept.append(run)

    def copy(self, to: torch.Tensor, source: torch.Tensor) -> None:
        self._record(lambda: super(Tape, self).copy(to, source))

    def ring(self, words: DoorbellWords, slot: int, value: int = 0) -> None:
        self._record(lambda: super(Tape, self).ring(words, slot, value))

    def wait(self, words: DoorbellWords, slot: int) -> None:
        self._record(lambda: super(Tape, self).wait(words, slot))

    def capture(self, record: Callable[[], None]) -> Callable[[], None]:
        self.kept = []
        record()
        kept, self.kept = self.kept, None

        def replay() -> None:
            for run in kept:
                run()

        return replay


class Made:
    """Random experts in several layers, a hand-off, and the dispatcher that says what is right."""

    def __init__(
        self,
        *,
        machine: Machine | None = None,
        stream: SignalStream | None = None,
        timeout_ms: float = PATIENT_MS,
    ) -> None:
        self.random = RandomLayers(HIDDEN, INTER, LAYERS)
        self.store = self.random.store
        machine = machine or Machine(2)
        self.handoff = Handoff(
            self.store,
            machine,
            stream or EmulatedStream(),
            layers=LAYERS,
            max_rows=MAX_ROWS,
            top_k=TOP_K,
            timeout_ms=timeout_ms,
        )
        one = Machine(1, machine.isa)
        self.dispatcher = Dispatcher(self.store, one, max_rows=MAX_ROWS, top_k=TOP_K)

    def want(self, layer: int, rows: Rows) -> torch.Tensor:
        return self.dispatcher.submit(layer, *rows).collect()

    def good_step(self, layers: list[int], count: int) -> None:
        inputs = [self.random.rows(count) for _ in layers]
        self.handoff.begin(layers, count)
        got = [
            self.handoff.submit(layer, *rows).collect() for layer, rows in zip(layers, inputs, strict=True)
        ]
        assert self.handoff.end() == set()
        for layer, rows, out in zip(layers, inputs, got, strict=True):
            assert torch.equal(out, self.want(layer, rows))

    def recover(self) -> None:
        """Begin a step once the answering thread is back, which takes it a moment."""
        deadline = time.monotonic() + 10
        while True:
            try:
                return self.handoff.begin([], 1)
            except EngineError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.001)


@pytest.fixture
def made() -> Iterator[Made]:
    made = Made()
    yield made
    made.handoff.close()


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_results_are_the_dispatchers_bits(isa: str, threads: int) -> None:
    made = Made(machine=Machine(threads, isa))
    for layers in ([1, 2, 4, 5], [2], [4, 5], [1, 5], [5, 1]):
        for count in (1, 3, MAX_ROWS):
            made.good_step(layers, count)
    made.handoff.close()


def test_rows_beyond_the_steps_are_not_looked_at(made: Made) -> None:
    for count in (1, 5, 7):
        x, ids, weights = made.random.rows(MAX_ROWS)
        x[count:], ids[count:], weights[count:] = float("nan"), 1 << 30, float("nan")
        ids[0, 1:] = -1
        made.handoff.begin([2], count)
        got = made.handoff.submit(2, x, ids, weights).collect()
        assert made.handoff.end() == set()
        assert got.shape == (MAX_ROWS, HIDDEN)
        assert torch.equal(got[:count], made.want(2, (x[:count], ids[:count], weights[:count])))


def test_what_was_captured_is_replayed_in_any_step_that_lists_its_layers() -> None:
    tape = Tape()
    made = Made(stream=tape)
    x, ids, weights = made.random.rows(MAX_ROWS)
    outs: dict[int, torch.Tensor] = {}

    def record(layers: list[int]) -> Callable[[], None]:
        def run() -> None:
            for layer in layers:
                outs[layer] = made.handoff.submit(layer, x, ids, weights).collect()

        return tape.capture(run)

    first, second = record([1, 2]), record([4, 5])  # outside of any step
    for step in range(12):
        count = 1 + step % MAX_ROWS
        for buffer, new in zip((x, ids, weights), made.random.rows(MAX_ROWS), strict=True):
            buffer.copy_(new)
        pieces = ([first], [second], [first, second])[step % 3]
        layers = ([1, 2], [4, 5], LAYERS)[step % 3]
        made.handoff.begin(layers, count)
        for piece in pieces:
            piece()
        assert made.handoff.end() == set()
        for layer in layers:
            want = made.want(layer, (x[:count], ids[:count], weights[:count]))
            assert torch.equal(outs[layer][:count], want)
    made.handoff.close()


def test_a_step_without_layers_is_nothing(made: Made) -> None:
    made.handoff.begin([], MAX_ROWS)
    assert made.handoff.end() == set()
    assert made.handoff.stats.bytes_read == 0


def test_the_callers_thread_is_free_between_ring_and_wait(made: Made) -> None:
    made.handoff.native.stall_at(2)
    rows = made.random.rows(2)
    made.handoff.begin([2], 2)
    ticket = made.handoff.submit(2, *rows)  # returns, though nobody answers yet
    made.handoff.native.stall_at(-1)
    assert torch.equal(ticket.collect(), made.want(2, rows))
    assert made.handoff.end() == set()


def test_a_wait_lets_other_threads_of_python_run(made: Made) -> None:
    made.handoff.native.stall_at(2)
    other = threading.Timer(0.05, lambda: made.handoff.native.stall_at(-1))
    other.start()
    made.good_step([1, 2], 1)  # would be aborted a minute later if the timer could not run
    other.join()


def test_rows_of_a_lost_expert_are_told_by_the_end_of_the_step(made: Made, tmp_path: Path) -> None:
    file = tmp_path / "expert"
    file.write_bytes(bytes(1 << 20))
    broken = 3
    with guarded(file) as mapped:
        at = mapped.ctypes.data
        made.store.native.put(4, broken, [at, at + 65536, at + 131072], [at + 196608] * 3)
        with file.open("r+b") as handle:
            handle.truncate(0)
        lost: set[int] = set()
        made.handoff.begin(LAYERS, MAX_ROWS)
        for layer in LAYERS:
            rows = made.random.rows(MAX_ROWS)
            if layer == 4:
                lost = {row for row, chosen in enumerate(rows[1].tolist()) if broken in chosen}
            ticket = made.handoff.submit(layer, *rows)
            got, want = ticket.collect(), made.want(layer, rows)
            assert ticket.failed_rows == ()
            good = [row for row in range(MAX_ROWS) if row not in lost]
            assert torch.equal(got[good], want[good])
        assert 0 < len(lost) < MAX_ROWS
        assert made.handoff.end() == lost
        made.good_step([1, 2], 3)


def test_streamed_experts_with_reads_that_fail(tmp_path: Path) -> None:
    experts, hidden, inter = 12, 224, 96
    sizes = {
        "layers": 4, "experts": experts, "top_k": TOP_K, "hidden": hidden, "moe_intermediate": inter,
        "intermediate": 64, "heads": 2, "q_lora": 32, "kv_lora": 32, "nope": 32, "rope": 32, "v_head": 32,
        "positions": 512, "vocab_size": 600,
    }  # fmt: skip
    synthesize(tmp_path / "model", "kimi-k2-thinking", sizes, seed=3, shard_bytes=300_000)
    bounds = shard_rows(inter, 2), shard_rows(hidden, 2)
    store, mapped = (
        ExpertStore(layers=4, experts=experts, hidden=hidden, inter=inter, placement=placement)
        for placement in (Placement("streamed", (-1, -1), *bounds, 2 * experts, None, "test"), None)
    )
    checkpoint, kept = (open_checkpoint(tmp_path / "model", into) for into in (store, mapped))
    store.open_slots(checkpoint.maps)
    store.native.inject_read_faults(fail_every=17)
    machine = Machine(2, nodes=[[], []])
    handoff = Handoff(store, machine, EmulatedStream(), layers=[1, 2, 3], max_rows=2, top_k=TOP_K)
    dispatcher = Dispatcher(mapped, Machine(1), max_rows=2, top_k=TOP_K)
    g = torch.Generator().manual_seed(1)
    lost_rows = good_rows = misses = 0
    for step in range(60):
        layers, count = ([1 + step % 3], 2) if step % 2 else ([1, 2, 3], 1)
        handoff.begin(layers, count)
        same = torch.ones(count, dtype=torch.bool)
        for layer in layers:
            x = torch.randn(count, hidden, generator=g).bfloat16()
            ids = torch.stack([torch.randperm(experts, generator=g)[:TOP_K] for _ in range(count)]).int()
            weights = torch.rand(count, TOP_K, generator=g)
            got = handoff.submit(layer, x, ids, weights).collect()
            same &= (got == dispatcher.submit(layer, x, ids, weights).collect()).all(1)
        lost = handoff.end()
        assert all(same[row] for row in range(count) if row not in lost), f"step {step}"
        lost_rows, good_rows = lost_rows + len(lost), good_rows + count - len(lost)
        misses += handoff.stats.misses
    assert lost_rows > 0
    assert good_rows > 0
    assert misses > 0
    handoff.close()
    store.close()
    assert kept is not None


def test_what_a_step_cost_is_known_when_it_ends(made: Made) -> None:
    meter = ByteMeter()
    metered = MeteredSteps(made.handoff, meter)
    read = 0
    for step in range(3):
        metered.begin([1, 4], 2)
        bytes_of_step = 0
        for layer in (1, 4):
            rows = made.random.rows(2)
            bytes_of_step += len(set(rows[1].flatten().tolist())) * made.store.expert_bytes
            metered.submit(layer, *rows).collect()
        assert meter.expert_bytes == read, f"nothing of step {step} is known yet"
        assert metered.end() == set()
        read += bytes_of_step
        assert metered.stats.bytes_read == bytes_of_step
        assert meter.expert_bytes == read
        assert metered.stats.busy_ms >= metered.stats.wait_ms > 0


# --- what goes wrong ------------------------------------------------------------------------------


def test_a_stuck_worker_is_an_error_and_the_next_step_works() -> None:
    made = Made(timeout_ms=500)
    made.handoff.native.stall_at(4)
    made.handoff.begin(LAYERS, 3)
    for layer in LAYERS:  # no wait of it hangs
        made.handoff.submit(layer, *made.random.rows(3)).collect()
    with pytest.raises(EngineError, match="no progress after 2 of 4 layers, at layer 4"):
        made.handoff.end()
    with pytest.raises(EngineError, match="have not come back"):
        made.handoff.begin(LAYERS, 3)
    made.handoff.native.stall_at(-1)
    made.recover()
    assert made.handoff.end() == set()
    made.good_step(LAYERS, 3)
    made.handoff.close()


def test_an_answer_that_throws_is_an_error_with_its_words(made: Made) -> None:
    x, ids, weights = made.random.rows(2)
    bad = ids.clone()
    bad[1, 1] = EXPERTS
    made.handoff.begin(LAYERS, 2)
    for layer in LAYERS:
        made.handoff.submit(layer, x, bad if layer == 2 else ids, weights).collect()
    with pytest.raises(EngineError, match=f"1 of 4 layers: layer 2: expert id {EXPERTS} is out"):
        made.handoff.end()
    made.recover()
    made.handoff.end()
    made.good_step(LAYERS, 2)


def test_an_abort_from_another_thread_ends_the_step(made: Made) -> None:
    made.handoff.native.stall_at(2)
    made.handoff.begin(LAYERS, 1)

    def abort() -> None:
        time.sleep(0.05)
        made.handoff.abort()

    other = threading.Thread(target=abort)
    other.start()
    for layer in LAYERS:
        made.handoff.submit(layer, *made.random.rows(1)).collect()
    other.join()
    with pytest.raises(EngineError, match="was aborted after 1 of 4 layers"):
        made.handoff.end()
    made.handoff.native.stall_at(-1)
    made.recover()
    made.handoff.end()
    made.good_step(LAYERS, 1)


def test_a_step_that_its_caller_gave_up_is_aborted_and_forgotten(made: Made) -> None:
    """As the model does when something fails between two layers: abort, then another step."""
    made.handoff.begin(LAYERS, 2)
    made.handoff.submit(1, *made.random.rows(2)).collect()
    made.handoff.submit(2, *made.random.rows(2))  # never collected
    made.handoff.abort()
    made.recover()
    made.handoff.end()
    made.good_step(LAYERS, 2)


def test_steps_are_opened_and_closed_in_order(made: Made) -> None:
    with pytest.raises(EngineError, match="no step"):
        made.handoff.end()
    rows = made.random.rows(1)
    with pytest.raises(EngineError, match="layer 1 is not what the open step"):
        made.handoff.submit(1, *rows)
    made.handoff.begin([1, 4], 1)
    with pytest.raises(EngineError, match="is open"):
        made.handoff.begin([1], 1)
    with pytest.raises(EngineError, match="layer 2 is not what"):
        made.handoff.submit(2, *rows)
    ticket = made.handoff.submit(1, *rows)
    with pytest.raises(NativeError, match="in flight"):
        made.handoff.submit(4, *rows)
    assert torch.equal(ticket.collect(), made.want(1, rows))
    with pytest.raises(NativeError, match="not outstanding"):
        ticket.collect()
    with pytest.raises(EngineError, match=r"did not complete.*1 slots were not rung"):
        made.handoff.end()
    made.recover()
    made.handoff.end()
    for layers, count in (([1, 1], 1), ([3], 1), ([1], 0), ([1], MAX_ROWS + 1)):
        with pytest.raises(NativeError, match=r"listed twice|no routed experts|rows must lie"):
            made.handoff.begin(layers, count)
    made.good_step([1], 1)


def test_what_does_not_fit_is_refused_before_it_is_recorded(made: Made) -> None:
    x, ids, weights = made.random.rows(2)
    made.handoff.begin([1], 2)
    for bad in (
        made.random.rows(MAX_ROWS + 1),
        (x[:, :-1], ids, weights),
        (x, ids[:, :-1], weights),
        (x, ids, weights[:1]),
        (x.float(), ids, weights),
        (x, ids.long(), weights),
    ):
        with pytest.raises(NativeError, match="submit takes up to 8 rows of 160 bfloat16"):
            made.handoff.submit(1, *bad)
    with pytest.raises(NativeError, match="layer 3 has no routed experts"):
        made.handoff.submit(3, x, ids, weights)
    strided = [t.t().contiguous().t() for t in (x, ids, weights)]
    assert torch.equal(made.handoff.submit(1, *strided).collect(), made.want(1, (x, ids, weights)))
    assert made.handoff.end() == set()
    for layers in ([], [1, 1]):
        with pytest.raises(NativeError, match="each once"):
            Handoff(made.store, Machine(1), EmulatedStream(), layers=layers, max_rows=1, top_k=1)


def test_what_was_captured_in_another_order_is_an_error_not_a_hang() -> None:
    tape = Tape()
    made = Made(stream=tape, timeout_ms=500)
    rows = made.random.rows(1)
    replay = tape.capture(lambda: [made.handoff.submit(layer, *rows).collect() for layer in (2, 1)])
    made.handoff.begin([1, 2], 1)
    replay()
    with pytest.raises(EngineError, match=r"at layer 1.*another layer was handed off"):
        made.handoff.end()
    made.recover()
    made.handoff.end()
    made.good_step([1, 2], 1)
    made.handoff.close()


def test_a_device_that_gave_up_waiting_is_an_error() -> None:
    made = Made(stream=EmulatedStream(limit_ms=400))
    made.handoff.native.stall_at(1)
    made.handoff.begin([1], 1)
    made.handoff.submit(1, *made.random.rows(1)).collect()
    made.handoff.native.stall_at(-1)
    with pytest.raises(EngineError, match=r"gave up waiting|not rung"):
        made.handoff.end()
    made.recover()
    made.handoff.end()
    made.good_step([1], 1)
    made.handoff.close()


def test_it_closes_in_the_midst_of_a_step_and_stays_closed() -> None:
    made = Made()
    made.handoff.begin(LAYERS, 1)
    made.handoff.submit(1, *made.random.rows(1))
    made.handoff.close()
    made.handoff.close()
    made.handoff.abort()
    with pytest.raises(NativeError, match="closed"):
        made.handoff.begin(LAYERS, 1)
    assert made.handoff.native.slot.x.shape == (MAX_ROWS, HIDDEN)  # the memory is still there


def test_closing_from_another_thread_frees_one_that_waits() -> None:
    made = Made()
    made.handoff.native.stall_at(1)
    made.handoff.begin([1], 1)
    ticket = made.handoff.submit(1, *made.random.rows(1))
    other = threading.Timer(0.05, made.handoff.close)
    other.start()
    ticket.collect()
    other.join()


DIES = """
import torch
from tests.unit.experts.test_handoff import LAYERS, Made
made = Made(timeout_ms=60_000)
made.handoff.native.stall_at(2)
made.handoff.begin(LAYERS, 1)
made.handoff.submit(1, *made.random.rows(1)).collect()
made.handoff.submit(2, *made.random.rows(1))
{last}
print("done", flush=True)
"""


@pytest.mark.parametrize("last", ["", "del made", "raise SystemExit(print('done'))"])
def test_the_interpreter_ends_with_a_step_open(last: str) -> None:
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run(
        [sys.executable, "-c", DIES.format(last=last)], cwd=root, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
