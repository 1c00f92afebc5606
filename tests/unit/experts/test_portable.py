"""The numba path of the routed experts, against float64, the reference, and the plain C++ kernels."""

from __future__ import annotations

import ctypes
import importlib
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from k2hybrid.checkpoint.loader import open_checkpoint
from k2hybrid.checkpoint.spec import read_spec
from k2hybrid.config import MINI_MODEL
from k2hybrid.errors import ConfigError, EngineError
from k2hybrid.experts.dispatch import Dispatcher
from k2hybrid.experts.reference import ReferenceExperts
from k2hybrid.experts.store import ExpertStore
from k2hybrid.native.extension import INSTRUCTION_SETS
from k2hybrid.native.files import file_failed, look_at_files
from k2hybrid.native.machine import Machine
from k2hybrid.types import ExpertRef, Int4Ref
from tests.guarded import guarded
from tests.random_experts import EXPERTS, LAYER, SIZES, TOP_K, RandomExperts, relative_error

BOUND = 3e-3  # one rounding to bf16, of the SwiGLU output (docs/numerics.md)

MAX_ROWS = 70


@pytest.fixture(scope="session")
def portable() -> ModuleType:
    pytest.importorskip("numba", reason="the portable experts need numba")
    return importlib.import_module("k2hybrid.experts.portable")


class Made(RandomExperts):
    """Experts that either path can be given."""

    def experts(self, portable: ModuleType, threads: int | None = 2, **options: Any) -> Any:
        experts = portable.PortableExperts(
            experts=EXPERTS,
            hidden=self.hidden,
            inter=self.inter,
            max_rows=MAX_ROWS,
            top_k=TOP_K,
            threads=threads,
            **options,
        )
        self.give(experts)
        return experts

    def dispatcher(self, isa: str) -> Dispatcher:
        store = ExpertStore(layers=2, experts=EXPERTS, hidden=self.hidden, inter=self.inter)
        self.give(store)
        return Dispatcher(store, Machine(1, isa), max_rows=MAX_ROWS, top_k=TOP_K)


@pytest.mark.parametrize(("hidden", "inter"), SIZES)
def test_routed_sum(portable: ModuleType, hidden: int, inter: int) -> None:
    made = Made(hidden, inter)
    experts = made.experts(portable)
    reference = ReferenceExperts(torch.float32)
    made.give(reference)
    for count in (1, 2, 5, 16, 17, 70):
        x, ids, weights = made.rows(count)
        ticket = experts.submit(LAYER, x, ids, weights)
        got = ticket.collect()
        assert ticket.failed_rows == ()
        assert relative_error(got, made.want(x, ids, weights)) < BOUND
        assert relative_error(got, reference.submit(LAYER, x, ids, weights).collect().double()) < BOUND


@pytest.mark.parametrize(("hidden", "inter"), SIZES)
def test_it_has_the_bits_of_plain_cpp(portable: ModuleType, hidden: int, inter: int) -> None:
    made = Made(hidden, inter)
    x, ids, weights = made.rows(40)
    ids[3, 1] = -1
    ids[5, 2] = ids[5, 0]
    got = made.experts(portable).submit(LAYER, x, ids, weights).collect()
    assert torch.equal(got, made.dispatcher("scalar").submit(LAYER, x, ids, weights).collect())


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_every_instruction_set_agrees(portable: ModuleType, isa: str) -> None:
    """Each is within the bound of exact arithmetic, so two differ by twice that at most."""
    made = Made(416, 160)
    x, ids, weights = made.rows(40)
    got = made.experts(portable).submit(LAYER, x, ids, weights).collect()
    other = made.dispatcher(isa).submit(LAYER, x, ids, weights).collect()
    assert relative_error(got, other.double()) < 2 * BOUND


def test_a_rows_bits_are_the_same_in_any_company(portable: ModuleType) -> None:
    made = Made(160, 96)
    x, ids, weights = made.rows(70)
    first = None
    for threads in (1, 2, None):
        experts = made.experts(portable, threads)
        together = experts.submit(LAYER, x, ids, weights).collect()
        first = together if first is None else first
        assert torch.equal(together, first)
        for t in range(0, 70, 7):
            alone = experts.submit(LAYER, x[t : t + 1], ids[t : t + 1], weights[t : t + 1]).collect()
            assert torch.equal(alone[0], together[t])


@pytest.mark.parametrize("shift", [8, 4, 2])
def test_rows_may_start_anywhere(portable: ModuleType, shift: int) -> None:
    made = Made(160, 96, shift)
    x, ids, weights = made.rows(5)
    got = made.experts(portable).submit(LAYER, x, ids, weights).collect()
    assert relative_error(got, made.want(x, ids, weights)) < BOUND


def test_steps_compile_nothing(portable: ModuleType) -> None:
    """Whatever the number of rows, and of rows an expert gets."""
    made = Made(160, 96)
    experts = made.experts(portable)
    kernels = (portable.gate_up, portable.add_down)
    before = [len(kernel.signatures) for kernel in kernels]
    for count in (1, 2, 40):
        experts.submit(LAYER, *made.rows(count)).collect()
    assert [len(kernel.signatures) for kernel in kernels] == before


def test_padding_reads_nothing_and_an_empty_call_is_fine(portable: ModuleType) -> None:
    made = Made(128, 128)
    experts = made.experts(portable)
    x, ids, weights = made.rows(4)
    ids[0] = -1
    ids[1, 2] = -1
    ticket = experts.submit(LAYER, x, ids, weights)
    got = ticket.collect()
    assert torch.count_nonzero(got[0]) == 0
    assert relative_error(got[1:], made.want(x, ids, weights)[1:]) < BOUND
    assert ticket.stats.bytes_read == experts.expert_bytes * len(set(ids.flatten().tolist()) - {-1})
    ids[:] = -1
    ticket = experts.submit(LAYER, x, ids, weights)
    assert torch.count_nonzero(ticket.collect()) == 0
    assert ticket.stats.bytes_read == 0
    assert experts.submit(LAYER, x[:0], ids[:0], weights[:0]).collect().shape == (0, 128)


def test_not_a_number_stays_in_its_row(portable: ModuleType) -> None:
    made = Made(160, 96)
    x, ids, weights = made.rows(3)
    x[1, 5] = float("nan")
    got = made.experts(portable).submit(LAYER, x, ids, weights).collect()
    assert got[1].isnan().all()
    assert got[[0, 2]].isfinite().all()


def test_tickets_overlap_and_arguments_are_copied(portable: ModuleType) -> None:
    made = Made(128, 128)
    experts = made.experts(portable)
    x, ids, weights = made.rows(2)
    want = made.want(x, ids, weights)
    first, second = (experts.submit(LAYER, x, ids, weights) for _ in range(2))
    for tensor in (x, ids, weights):
        tensor.zero_()
    with pytest.raises(EngineError, match="collect the ticket before"):
        _ = first.stats
    got = second.collect()
    assert torch.equal(first.collect(), got)
    assert relative_error(got, want) < BOUND
    assert first.stats.busy_ms > 0
    with pytest.raises(EngineError, match="collected before"):
        first.collect()


def test_wrong_calls_are_named(portable: ModuleType) -> None:
    made = Made(128, 128)
    experts = made.experts(portable)
    x, ids, weights = made.rows(2)
    bad = ids.clone()
    bad[1, 1] = EXPERTS
    with pytest.raises(EngineError, match=f"expert id {EXPERTS} is out of range"):
        experts.submit(LAYER, x, bad, weights)
    with pytest.raises(EngineError, match=r"no expert \d in layer 9"):
        experts.submit(9, x, ids, weights)
    with pytest.raises(EngineError, match="up to 70 rows"):
        experts.submit(LAYER, *made.rows(71))
    with pytest.raises(EngineError, match="rows of 128 bf16 values"):
        experts.submit(LAYER, x.float(), ids, weights)
    with pytest.raises(EngineError, match="added twice"):
        experts.add_expert(LAYER, 0, made.refs[0])
    with pytest.raises(EngineError, match=r"not make a \[128, 128\] INT4 matrix"):
        experts.add_expert(0, 0, Made(160, 96).refs[0])
    assert experts.submit(LAYER, x, ids, weights).collect().shape == (2, 128)


def test_after_an_abort_tickets_complete_as_poisoned(portable: ModuleType) -> None:
    made = Made(128, 128)
    experts = made.experts(portable)
    x, ids, weights = made.rows(3)
    before = experts.submit(LAYER, x, ids, weights)
    before.collect()
    experts.abort()
    assert before.failed_rows == ()
    after = experts.submit(LAYER, x, ids, weights)
    after.collect()
    assert after.failed_rows == (0, 1, 2)


def test_a_checkpoints_experts_in_place(portable: ModuleType) -> None:
    spec = read_spec(MINI_MODEL)
    sizes = {"experts": spec.num_experts, "hidden": spec.hidden_size, "inter": spec.moe_intermediate_size}
    store = ExpertStore(layers=spec.num_layers, **sizes)
    experts = portable.PortableExperts(**sizes, max_rows=8, top_k=spec.top_k)
    g = torch.Generator().manual_seed(1)
    x = torch.randn(8, spec.hidden_size, generator=g).bfloat16()
    ids = torch.stack([torch.randperm(spec.num_experts, generator=g)[: spec.top_k] for _ in range(8)]).int()
    weights = torch.rand(8, spec.top_k, generator=g)
    native = Dispatcher(store, Machine(1, "scalar"), max_rows=8, top_k=spec.top_k)
    with open_checkpoint(MINI_MODEL, store), open_checkpoint(MINI_MODEL, experts):
        for layer in spec.moe_layers:
            got = experts.submit(layer, x, ids, weights).collect()
            assert torch.equal(got, native.submit(layer, x, ids, weights).collect())


def test_without_numba_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "numba", None)
    monkeypatch.delitem(sys.modules, "k2hybrid.experts.portable", raising=False)
    with pytest.raises(ConfigError, match="pip install numba"):
        importlib.import_module("k2hybrid.experts.portable")


def test_an_expert_that_cannot_be_read_fails_its_rows_only(portable: ModuleType, tmp_path: Path) -> None:
    made = Made(128, 128)
    broken = 4
    file = tmp_path / "expert"
    tensors = [
        t
        for m in (made.refs[broken].gate, made.refs[broken].up, made.refs[broken].down)
        for t in (m.packed, m.scale)
    ]
    file.write_bytes(b"".join(ctypes.string_at(t.address, t.nbytes).ljust(16384, b"\0") for t in tensors))
    x, ids, weights = made.rows(30)
    hit = tuple(t for t in range(30) if broken in ids[t].tolist())
    good = [t for t in range(30) if t not in hit]
    assert 0 < len(hit) < 30
    with guarded(file) as mapped:
        places = iter(range(mapped.ctypes.data, mapped.ctypes.data + mapped.nbytes, 16384))
        moved = [replace(t, address=next(places)) for t in tensors]
        made.refs[broken] = ExpertRef(*(Int4Ref(*moved[i : i + 2]) for i in (0, 2, 4)))
        experts = made.experts(portable, failed=file_failed)
        whole = experts.submit(LAYER, x, ids, weights)
        want = whole.collect()
        assert whole.failed_rows == ()
        with file.open("r+b") as handle:
            for end in (5 * 16384 + 1000, 3 * 16384, 0):  # the scales of down; down and up's; all
                handle.truncate(end)
                look_at_files()
                ticket = experts.submit(LAYER, x, ids, weights)
                got = ticket.collect()
                assert ticket.failed_rows == hit
                assert torch.equal(got[good], want[good])
