"""The probes of the extension and what `hardware.bandwidth` makes of them. No figure is judged here."""

from __future__ import annotations

import pytest
import torch

from k2hybrid.errors import NativeError
from k2hybrid.hardware.bandwidth import (
    MEMORY_KINDS,
    QUICK_VARIANTS,
    VARIANTS,
    ReadVariant,
    measure,
    probe_memory,
    quick_gb_s,
)
from k2hybrid.native.extension import INSTRUCTION_SETS
from k2hybrid.native.machine import Machine

DATA = torch.ones((1 << 20) + 24, dtype=torch.uint8)


@pytest.fixture(params=INSTRUCTION_SETS)
def machine(request: pytest.FixtureRequest) -> Machine:
    return Machine(2, str(request.param))


@pytest.mark.parametrize("streams", [1, 2, 4, 8])
@pytest.mark.parametrize("ahead", [0, 2048, 8192])
@pytest.mark.parametrize("stripe", [4096, 100_000, 1 << 22])
def test_every_variant_takes_some_time(machine: Machine, streams: int, ahead: int, stripe: int) -> None:
    assert machine.probe_read_seconds(DATA, stripe, ahead, streams) > 0


@pytest.mark.parametrize("nbytes", [1, 7, 63, 511, 4097])
def test_few_bytes_are_read_too(machine: Machine, nbytes: int) -> None:
    assert machine.probe_read_seconds(DATA[:nbytes], 4096, 0, 8) > 0


@pytest.mark.parametrize(
    ("stripe", "ahead", "streams", "said"),
    [
        (4095, 0, 1, "at least 4096"),
        (-1, 0, 1, "negative"),
        (4096, -1, 1, "negative"),
        (4096, 1 << 21, 1, "prefetch"),
        (4096, 0, 0, "1, 2, 4 or 8"),
        (4096, 0, 3, "1, 2, 4 or 8"),
    ],
)
def test_senseless_variants_are_refused(stripe: int, ahead: int, streams: int, said: str) -> None:
    with pytest.raises(NativeError, match=said):
        Machine(1).probe_read_seconds(DATA, stripe, ahead, streams)


def test_unreadable_data_is_refused() -> None:
    with pytest.raises(NativeError, match="nothing to read"):
        Machine(1).probe_read_seconds(DATA[:0], 4096, 0, 1)
    with pytest.raises(NativeError, match="contiguous"):
        Machine(1).probe_read_seconds(DATA[::2], 4096, 0, 1)


def test_peaks_are_positive_or_absent(machine: Machine) -> None:
    peaks = {kind: machine.peak(kind) for kind in ("bf16", "int8", "fp32")}
    assert peaks["fp32"] is not None
    assert all(peak > 0 for peak in peaks.values() if peak is not None)
    assert (peaks["bf16"] is not None) == ("bf16" in machine.isa)


def test_an_unknown_peak_is_refused(machine: Machine) -> None:
    with pytest.raises(NativeError, match="bf16, int8 or fp32, not of int4"):
        machine.peak("int4")


@pytest.mark.parametrize("memory", MEMORY_KINDS)
def test_every_kind_of_memory_is_measured(memory: str) -> None:
    found = measure(Machine(2), 1 << 21, rounds=2, memory=memory)
    assert list(found.variants) == [variant.name for variant in VARIANTS]
    assert found.gb_s == max(found.variants.values()) == found.variants[found.best] > 0


def test_memory_holds_what_was_asked_for() -> None:
    for kind in MEMORY_KINDS:
        data = probe_memory(kind, 12_345)
        assert data.shape == (12_345,)
        assert int(data.min()) > 0
    with pytest.raises(ValueError, match="no memory 'swap'"):
        probe_memory("swap", 1)


def test_a_quick_probe_takes_the_best_variant() -> None:
    assert quick_gb_s(Machine(1), DATA) > 0
    assert len(VARIANTS) <= 10
    assert set(QUICK_VARIANTS) <= set(VARIANTS)


def test_variants_say_how_they_read() -> None:
    assert ReadVariant(1).name == "128 KB stripes, 1 stream, prefetch 0 KB"
    assert ReadVariant(4, 8192, None).name == "one stretch a thread, 4 streams, prefetch 8 KB"
