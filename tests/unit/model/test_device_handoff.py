"""The network on an emulated device, its experts behind the hand-off: the bits of experts that are called."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch

from k2hybrid.cache.pages import LatentPages
from k2hybrid.cache.rows import Bf16Rows
from k2hybrid.errors import EngineError
from k2hybrid.experts.dispatch import Dispatcher
from k2hybrid.experts.handoff import Handoff
from k2hybrid.experts.store import ExpertStore
from k2hybrid.hardware.streams import EmulatedStream
from k2hybrid.model.device import DeviceModel
from k2hybrid.model.kimi import Kimi
from k2hybrid.model.linears import DeviceLinears
from k2hybrid.model.paged import TorchDecode
from k2hybrid.native.machine import Machine
from tests.golden_model.tiny import TinyCheckpoint, batch_of, random_ids, tiny_checkpoint

MAX_ROWS = 80


class Called(Dispatcher):
    """The dispatcher where a stream's experts are expected."""

    def begin(self, layers: Sequence[int], rows: int) -> None:
        """Nothing is announced."""

    def end(self) -> set[int]:
        return set()


class Device:
    """A model in bf16 whose device is the CPU, over experts made by `make`."""

    def __init__(
        self, checkpoint: TinyCheckpoint, make: Callable[[ExpertStore, Machine], Called | Handoff]
    ) -> None:
        spec = self.spec = checkpoint.spec
        store = ExpertStore(
            layers=spec.num_layers,
            experts=spec.num_experts,
            hidden=spec.hidden_size,
            inter=spec.moe_intermediate_size,
        )
        checkpoint.fill(store)
        self.experts = make(store, Machine(2))
        self.pages = LatentPages(spec.num_layers, 16, Bf16Rows(spec.latent_dim))
        kernels, decode = DeviceLinears(), TorchDecode(self.pages)
        network = Kimi(spec, checkpoint, self.experts, kernels, self.pages, decode=decode)
        self.model = DeviceModel(
            network,
            self.experts,
            synchronize=lambda: None,
            recorder=lambda work: work,
            context_tokens=256,
            graph_rows=2,
        )
        self.tables = [torch.tensor(self.pages.allocate(2)) for _ in range(3)]

    def run(self, tokens: list[torch.Tensor], start: int, stops: Sequence[int] = ()) -> torch.Tensor:
        """Logits of the last token of each sequence; the pass pauses before the parts `stops`."""
        spans = [(ids, start, table) for ids, table in zip(tokens, self.tables, strict=False)]
        state = self.model.begin(batch_of(spans))
        for until in (*stops, self.model.network.parts):
            state = self.model.forward(state, until)
        assert state.failed_rows == set()
        return self.model.logits(state)


@pytest.fixture
def pair() -> Iterator[tuple[Device, Device]]:
    checkpoint = tiny_checkpoint("k2")
    spec = checkpoint.spec
    sizes = {"max_rows": MAX_ROWS, "top_k": spec.top_k}
    handed = Device(
        checkpoint,
        lambda store, machine: Handoff(
            store, machine, EmulatedStream(), layers=spec.moe_layers, timeout_ms=500, **sizes
        ),
    )
    called = Device(checkpoint, lambda store, machine: Called(store, machine, **sizes))
    yield handed, called
    assert isinstance(handed.experts, Handoff)
    handed.experts.close()


def test_prefill_and_decoding_have_the_same_bits(pair: tuple[Device, Device]) -> None:
    handed, called = pair
    prompts = [random_ids(handed.spec, 20, seed=seed) for seed in range(3)]
    for stops in ((), (1,), (2,), (3, 4)):
        assert torch.equal(handed.run(prompts, 0, stops), called.run(prompts, 0, stops))
    # More sequences than are ever recorded, then some that are, and repeated; each goes on without a gap.
    for position, count in enumerate((3, 3, 2, 2, 2, 1, 1, 1), start=20):
        tokens = [random_ids(handed.spec, 1, seed=position) for _ in range(count)]
        assert torch.equal(handed.run(tokens, position), called.run(tokens, position))


def test_a_pass_that_fails_leaves_experts_for_the_next(pair: tuple[Device, Device]) -> None:
    handed, called = pair
    assert isinstance(handed.experts, Handoff)
    prompts = [random_ids(handed.spec, 20, seed=1)]
    stuck = handed.spec.moe_layers[1]
    handed.experts.native.stall_at(stuck)
    with pytest.raises(EngineError, match=f"no progress after 1 of 2 layers, at layer {stuck}"):
        handed.run(prompts, 0)
    handed.experts.native.stall_at(-1)
    deadline = time.monotonic() + 10
    while True:
        try:
            got = handed.run(prompts, 0)
            break
        except EngineError:  # the answering thread is not back yet
            if time.monotonic() > deadline:
                raise
            time.sleep(0.001)
    assert torch.equal(got, called.run(prompts, 0))
