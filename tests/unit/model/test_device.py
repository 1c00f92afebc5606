"""The network on a device, played by the CPU, and on a card, played by tensors without contents."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from k2hybrid.cache.pages import LatentPages
from k2hybrid.cache.rows import Bf16Rows, Fp32Rows
from k2hybrid.checkpoint.spec import ModelSpec
from k2hybrid.errors import EngineError
from k2hybrid.experts.reference import ReferenceExperts, ReferenceTicket
from k2hybrid.model.batch import Batch, Span, sent
from k2hybrid.model.decode_step import DecodeStep
from k2hybrid.model.device import DeviceModel
from k2hybrid.model.kimi import Kimi
from k2hybrid.model.linears import DeviceLinears
from k2hybrid.model.paged import TorchDecode
from tests.golden_model import compare
from tests.golden_model.tiny import (
    TinyCheckpoint,
    TinyModel,
    batch_of,
    random_ids,
    tiny_checkpoint,
    tiny_model,
)

NAMES = ["k2", "no_q_lora_groups_3_dense_no_yarn", "wide_latent"]
CONTEXT = 256
CARD = "meta"  # its tensors have sizes and types, no contents: asking for a value raises


class StepReference(ReferenceExperts):
    """Reference experts that hold a step to its announcement, and lose or abort when told to."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(dtype)
        self.open = False
        self.announced: list[int] = []
        self.asked: list[int] = []
        self.rows: list[int] = []
        self.lost: set[int] = set()
        self.aborted = False

    def begin(self, layers: Sequence[int], rows: int) -> None:
        assert not self.open
        self.open, self.announced, self.asked = True, list(layers), []
        self.rows.append(rows)

    def submit(
        self, layer: int, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> ReferenceTicket:
        assert self.open
        assert x.shape[0] == self.rows[-1]
        self.asked.append(layer)
        return super().submit(layer, x, ids, weights)

    def end(self) -> set[int]:
        assert self.open
        self.open = False
        if self.aborted:
            self.aborted = False
            raise EngineError("the step was aborted")
        assert self.asked == self.announced
        return self.lost

    def abort(self) -> None:
        self.aborted = True


class Recorded:
    """Counts what is recorded and repeated."""

    def __init__(self) -> None:
        self.records = 0
        self.repeats = 0

    def __call__(self, work: Callable[[], None]) -> Callable[[], None]:
        self.records += 1

        def again() -> None:
            self.repeats += 1
            work()

        return again


class Played:
    """A tiny model in fp32 on a device that is the CPU."""

    def __init__(self, checkpoint: TinyCheckpoint, graph_rows: int = 4) -> None:
        spec = checkpoint.spec
        self.experts = StepReference(torch.float32)
        checkpoint.fill(self.experts)
        self.pages = LatentPages(spec.num_layers, 64, Fp32Rows(spec.latent_dim))
        network = Kimi(
            spec,
            checkpoint,
            self.experts,
            DeviceLinears(),
            self.pages,
            dtype=torch.float32,
            decode=TorchDecode(self.pages),
        )
        self.recorded = Recorded()
        self.model = DeviceModel(
            network,
            self.experts,
            synchronize=lambda: None,
            recorder=self.recorded,
            context_tokens=CONTEXT,
            graph_rows=graph_rows,
        )

    def table(self, tokens: int) -> torch.Tensor:
        return torch.tensor(self.pages.allocate(-(-tokens // LatentPages.PAGE_TOKENS)))

    def run(self, batch: Batch) -> torch.Tensor:
        state = self.model.begin(batch)
        return self.model.logits(self.model.forward(state, self.model.network.parts))


def conversations(spec: ModelSpec) -> list[torch.Tensor]:
    return [random_ids(spec, n, seed=n) for n in (70, 5, 130, 64)]


@pytest.mark.parametrize("graph_rows", [0, 2, 4])
@pytest.mark.parametrize("name", NAMES)
def test_passes_on_a_device_agree_with_those_without(name: str, graph_rows: int) -> None:
    checkpoint = compare.checkpoint(name)
    plain, played = tiny_model(checkpoint, torch.float32), Played(compare.checkpoint(name), graph_rows)
    spec = checkpoint.spec
    tables = []
    for ids in conversations(spec):
        pair = plain.table(len(ids) + 4), played.table(len(ids) + 4)
        wanted = plain.run(batch_of([(ids, 0, pair[0])]))
        got = played.run(batch_of([(ids, 0, pair[1])]))
        assert compare.largest_error(got, wanted) <= 1e-5
        tables.append((len(ids), pair))
    for step, rows in enumerate([1, 3, 4, 2]):  # each size twice, the second time repeated
        for again in (0, 1):
            nexts = [torch.tensor([7 + step + 3 * row]) for row in range(rows)]
            at = [(n, start + again, t) for n, (start, t) in zip(nexts, tables, strict=False)]
            wanted = plain.run(batch_of([(n, start, t[0]) for n, start, t in at]))
            got = played.run(batch_of([(n, start, t[1]) for n, start, t in at]))
            assert compare.largest_error(got, wanted) <= 1e-5
    sizes = [rows for rows in (1, 3, 4, 2) if rows <= graph_rows]
    assert (played.recorded.records, played.recorded.repeats) == (len(sizes), len(sizes))


def test_decoding_beside_a_chunk_and_in_pieces() -> None:
    """Such passes are not recorded; single tokens are attended to together all the same."""
    checkpoint = compare.checkpoint("k2")
    plain, played = tiny_model(checkpoint, torch.float32), Played(compare.checkpoint("k2"))
    ids, chunk = random_ids(checkpoint.spec, 70), random_ids(checkpoint.spec, 30, seed=9)
    logits = []
    models: list[TinyModel | Played] = [plain, played]
    for model in models:
        first, second = model.table(72), model.table(100)
        model.run(batch_of([(ids, 0, first)]))
        one = torch.tensor([5])
        mixed = model.run(batch_of([(one, 70, first), (chunk, 0, second), (one, 0, model.table(1))]))
        logits.append((mixed, first))
    assert compare.largest_error(logits[1][0], logits[0][0]) <= 1e-5
    batch = [(torch.tensor([9]), 71, table) for _, table in logits]
    wanted = plain.run(batch_of([batch[0]]))
    state = played.model.begin(batch_of([batch[1]]))
    for part in range(played.model.network.parts):
        state = played.model.forward(state, part + 1)
    assert compare.largest_error(played.model.logits(state), wanted) <= 1e-5
    assert played.recorded.records == 0


def test_lost_rows_and_aborted_steps_are_told_and_the_next_step_works() -> None:
    played = Played(compare.checkpoint("k2"))
    table = played.table(9)
    spec = played.model.network.spec
    played.run(batch_of([(random_ids(spec, 8), 0, table)]))
    played.experts.lost = {0}
    for _ in range(2):
        state = played.model.begin(batch_of([(torch.tensor([3]), 8, table)]))
        assert played.model.forward(state, played.model.network.parts).failed_rows == {0}
    played.experts.lost = set()
    played.experts.aborted = True
    with pytest.raises(EngineError, match="aborted"):
        played.run(batch_of([(torch.tensor([3]), 8, table)]))
    assert not played.experts.open
    assert torch.isfinite(played.run(batch_of([(torch.tensor([3]), 8, table)]))).all()


def test_steps_are_recorded_ahead_in_a_page_of_nobodys() -> None:
    plain, played = tiny_model(compare.checkpoint("k2"), torch.float32), Played(compare.checkpoint("k2"))
    quiet: list[bool] = []
    order: list[tuple[str, bool]] = []

    @contextmanager
    def quietly() -> Iterator[None]:
        quiet.append(True)
        yield
        quiet.pop()

    recorder, run = played.recorded, played.experts.begin

    def begin(layers: Sequence[int], rows: int) -> None:
        order.append((f"run {rows}", bool(quiet)))
        run(layers, rows)

    def record(work: Callable[[], None]) -> Callable[[], None]:
        order.append(("record", bool(quiet)))
        return recorder(work)

    played.experts.begin, played.model._recorder = begin, record  # type: ignore[method-assign]
    free = played.pages.free_pages
    played.model.record_ahead(3, quietly)
    # What is recorded asks experts in earnest; what runs for nobody does not.
    assert order == [(f"run {n}", True) if i == 0 else ("record", False) for n in (3, 2, 1) for i in (0, 1)]
    assert (played.model.recorded, played.pages.free_pages) == ([1, 2, 3], free)
    played.model.record_ahead(2, quietly)
    assert recorder.records == 3
    logits = []
    models: list[TinyModel | Played] = [plain, played]
    for model in models:
        tables = [model.table(12) for _ in range(2)]
        model.run(batch_of([(random_ids(plain.model.spec, 8), 0, table) for table in tables]))
        logits.append(model.run(batch_of([(torch.tensor([3 + i]), 8, t) for i, t in enumerate(tables)])))
    assert compare.largest_error(logits[1], logits[0]) <= 1e-5
    assert (recorder.records, recorder.repeats) == (3, 1)


def test_no_more_is_recorded_ahead_than_ever_is() -> None:
    played = Played(compare.checkpoint("k2"), graph_rows=2)
    played.model.record_ahead(8, nullcontext)
    assert played.model.recorded == [1, 2]


def test_a_step_that_cannot_be_recorded_is_served_all_the_same() -> None:
    plain, played = tiny_model(compare.checkpoint("k2"), torch.float32), Played(compare.checkpoint("k2"))
    tries = []

    def refuse(work: Callable[[], None]) -> Callable[[], None]:
        tries.append(work)
        raise RuntimeError("out of memory")

    played.model._recorder = refuse
    logits = []
    models: list[TinyModel | Played] = [plain, played]
    for model in models:
        table = model.table(12)
        model.run(batch_of([(random_ids(plain.model.spec, 8), 0, table)]))
        steps = [model.run(batch_of([(torch.tensor([3 + i]), 8 + i, table)])) for i in range(3)]
        logits.append(torch.cat(steps))
    assert compare.largest_error(logits[1], logits[0]) <= 1e-5
    assert len(tries) == 1


def test_a_pass_that_fails_closes_its_step() -> None:
    played = Played(compare.checkpoint("k2"), graph_rows=0)
    spec = played.model.network.spec
    good, table = random_ids(spec, 8), played.table(9)
    state = played.model.begin(batch_of([(good, 0, table)]))
    assert state.state is not None
    state.state.hidden = state.state.hidden[:, :3]  # no layer can read this
    with pytest.raises(RuntimeError):
        played.model.forward(state, played.model.network.parts)
    assert torch.isfinite(played.run(batch_of([(good, 0, table)]))).all()


class OnCard:
    """Weights of the right sizes on a card, without contents; the embedding stays in RAM."""

    def __init__(self, checkpoint: TinyCheckpoint) -> None:
        self._checkpoint = checkpoint

    def take(self, layer: int | None, role: str) -> torch.Tensor:
        weight = self._checkpoint.take(layer, role)
        return torch.empty(
            weight.shape, dtype=torch.bfloat16, device="cpu" if role == "embed_tokens" else CARD
        )


class CardExperts:
    """Give tensors on the card for tensors on the card."""

    def submit(
        self, layer: int, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> ReferenceTicket:
        assert x.device == ids.device == weights.device == torch.device(CARD)
        return ReferenceTicket(torch.empty(x.shape, device=CARD), ())


def card_decode(
    q_latent: torch.Tensor,
    q_rope: torch.Tensor,
    rows: torch.Tensor,
    tables: torch.Tensor,
    lengths: torch.Tensor,
    *,
    scale: float,
    row_format: str,
) -> torch.Tensor:
    assert rows.dtype == torch.uint8
    assert tables.dtype == lengths.dtype == torch.int32
    for tensor in (q_latent, q_rope, rows, tables, lengths):
        assert tensor.device == torch.device(CARD)
    assert row_format == "bf16"
    return torch.empty(q_latent.shape, device=CARD)


class OneDevice(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Operations on tensors of two devices raise, as they would with a card; copies alone may cross."""

    CROSSING = (torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        devices = {tensor.device.type for tensor in tensors if tensor.dim() > 0}
        if len(devices) > 1 and func not in self.CROSSING:
            raise AssertionError(f"{func} takes tensors of {sorted(devices)}")
        return func(*args, **(kwargs or {}))


@contextmanager
def card_network(name: str) -> Iterator[Kimi]:
    """A network whose tensors lie on a card that is not there; see `CARD` and `OneDevice`."""
    checkpoint = tiny_checkpoint(name)
    spec = checkpoint.spec
    pages = LatentPages(spec.num_layers, 8, Bf16Rows(spec.latent_dim), CARD)
    network = Kimi(spec, OnCard(checkpoint), CardExperts(), DeviceLinears(), pages, decode=card_decode)
    with OneDevice():  # type: ignore[no-untyped-call]
        yield network


@pytest.mark.parametrize("name", NAMES)
def test_a_decode_step_stays_on_the_card_and_waits_for_nothing(name: str) -> None:
    with card_network(name) as network:
        step = DecodeStep(network, 3, 4, pinned=False)
        step.work()
        assert step.logits.device == torch.device(CARD)


@pytest.mark.parametrize("name", NAMES)
def test_a_chunk_beside_decoding_stays_on_the_card(name: str) -> None:
    with card_network(name) as network:
        table = torch.tensor([0, 1, 2])
        spans = (Span(70, 1, table), Span(0, 130, table), Span(3, 2, table))
        rows = 133
        batch = Batch(torch.zeros(rows, dtype=torch.int64), torch.arange(rows), spans, torch.tensor([0, 132]))
        state = network.forward(network.begin(batch))
        assert state.hidden.device == network.logits(state).device == torch.device(CARD)


class Crossings(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts copies from RAM to the card: of ordinary memory, each is one that the host waits for."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in OneDevice.CROSSING and isinstance(out, torch.Tensor) and out.device.type == CARD:
            self.count += any(isinstance(arg, torch.Tensor) and arg.device.type != CARD for arg in args)
        return out


@pytest.mark.parametrize("name", NAMES)
def test_scattered_pages_are_named_to_the_card_once_a_pass(name: str) -> None:
    """In the plan, for all layers and blocks, and not by whoever attends."""
    with card_network(name) as network:
        few, many = torch.tensor([7, 1]), torch.tensor([4, 0, 2])
        batch = Batch(
            torch.zeros(133, dtype=torch.int64),
            torch.arange(133),
            (Span(70, 3, few), Span(0, 130, many)),
            torch.tensor([132]),
        )
        with Crossings() as begun:
            state = network.begin(batch)
        with Crossings() as crossed:
            network.forward(state)
        assert begun.count == 5  # tokens, slots, two of angles, tables
        assert crossed.count == 0
        assert {number: len(table) for number, table in state.plan.tables.items()} == {0: 2, 1: 3}


def test_what_goes_to_a_card_is_not_waited_for() -> None:
    asked: list[tuple[Any, ...]] = []

    class Tensor:
        """On which nothing but what is noted may be done."""

        def pin_memory(self) -> Tensor:
            asked.append(("pinned",))
            return self

        def to(self, device: torch.device, **options: bool) -> str:
            asked.append((device, options))
            return "there"

    given: Any = Tensor()
    assert sent(given, torch.device("cuda:0")) == "there"  # type: ignore[comparison-overlap]
    assert asked == [("pinned",), (torch.device("cuda:0"), {"non_blocking": True})]
    here = torch.ones(3)
    assert sent(here, torch.device("cpu")) is here
