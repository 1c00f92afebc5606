"""Memory modules from SMBIOS tables: channels by name, promises by multiplication, firmware's nonsense."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from k2hybrid.hardware.dmi import TABLE, parse_modules, promised, read_modules
from tests.unit.hardware.smbios import Slot, memory_device, structure, table

GIB = 1 << 30


def test_a_server_of_twelve_channels() -> None:
    slots = [Slot(f"DIMM {at % 2}", f"P0 CHANNEL {'ABCDEFGHIJKL'[at // 2]}") for at in range(24)]
    modules = parse_modules(table(slots))
    assert len(modules) == 24
    assert {module.size_bytes for module in modules} == {64 * GIB}
    assert {(module.kind, module.mt_s, module.width_bits) for module in modules} == {("DDR5", 4800, 64)}
    promise = promised(modules)
    assert promise is not None
    # AMD's own figure for this memory: 460.8 GB/s a socket
    assert promise.gb_s == pytest.approx(460.8)
    assert (promise.channels, promise.certain, promise.empty) == (12, True, ())


def test_empty_channels_are_named_and_the_slower_of_two_modules_counts() -> None:
    slots = [
        Slot("DIMM_A1"), Slot("DIMM_A2", mt_s=4000),
        Slot("DIMM_B1"), Slot("DIMM_B2", size_mb=0, mt_s=0),
        Slot("DIMM_C1", size_mb=0, mt_s=0), Slot("DIMM_C2", size_mb=0, mt_s=0),
    ]  # fmt: skip
    promise = promised(parse_modules(table(slots)))
    assert promise is not None
    assert promise.gb_s == pytest.approx((4000 + 4800) * 8 / 1000)
    assert (promise.channels, promise.empty) == (2, ("DIMM_C",))


def test_names_without_a_channel_make_the_promise_an_upper_bound() -> None:
    slots = [Slot(f"PROC 1 DIMM {at}", size_mb=32768 if at % 2 else 0) for at in range(1, 9)]
    promise = promised(parse_modules(table(slots)))
    assert promise is not None
    assert (promise.channels, promise.certain) == (4, False)
    assert promise.empty == ("PROC 1 DIMM 2", "PROC 1 DIMM 4", "PROC 1 DIMM 6", "PROC 1 DIMM 8")


@pytest.mark.parametrize(
    ("slot", "bank", "channel"),
    [
        ("DIMM 0", "P1 CHANNEL C", "P1 CHANNEL C"),
        ("Controller1-ChannelA-DIMM0", "BANK 0", "Controller1-ChannelA"),
        ("ChannelB-DIMM1", "BANK 3", "ChannelB"),
        ("DIMM 0", "NODE 0 CHANNEL 11 DIMM 0", "NODE 0 CHANNEL 11"),
        ("DIMM_P0_A0", "P0_Node0_Channel0_Dimm0", "P0_Node0_Channel0"),
        ("CPU2_DIMM_G1", "NODE 2", "CPU2_DIMM_G"),
        ("P1-DIMMA2", "P0_Node0", "P1-DIMMA"),
        ("DIMM_P1_B0", "", "DIMM_P1_B"),
        ("A1", "", None),  # Dell: the letter is the CPU, the number the slot
        ("DIMM_P0", "", None),
        ("PROC 1 DIMM 12", "", None),
        ("DIMM1", "BANK 0", None),
        ("Channels", "", None),
        ("", "", None),
    ],
)
def test_channels_by_name(slot: str, bank: str, channel: str | None) -> None:
    (module,) = parse_modules(table([Slot(slot, bank)]))
    assert module.channel == channel
    assert module.slot == (slot or bank or "unnamed slot")


def test_sizes_and_speeds_of_all_forms() -> None:
    slots = [
        Slot("a", size_mb=8192),
        Slot("b", size_mb=262144),
        Slot("c", mt_s=0, rated_mt_s=3200, kind=0x1A),
        Slot("d", mt_s=70000, rated_mt_s=70000),
        Slot("e", kind=0x09),
    ]
    modules = parse_modules(table(slots))
    assert [module.size_bytes // GIB for module in modules] == [8, 256, 64, 64]  # flash is no memory
    assert (modules[2].mt_s, modules[2].kind) == (3200, "DDR4")
    assert (modules[3].mt_s, modules[3].rated_mt_s) == (70000, 70000)


def test_older_structures_lack_fields() -> None:
    whole = Slot("DIMM_A1", size_mb=16384, mt_s=2933, rated_mt_s=3200, kind=0x1A)
    by_length = {
        length: parse_modules(memory_device(whole, length)) for length in (0x15, 0x1B, 0x22, 0x28, 0x5C)
    }
    assert [modules[0].mt_s for modules in by_length.values()] == [0, 3200, 2933, 2933, 2933]
    assert promised(by_length[0x15]) is None
    assert {modules[0].size_bytes for modules in by_length.values()} == {16 * GIB}


@pytest.mark.parametrize("change", [{"mt_s": 0, "rated_mt_s": 0}, {"width_bits": 0}, {"width_bits": 0xFFF7}])
def test_what_is_not_told_promises_nothing(change: dict[str, int]) -> None:
    slots = [Slot("DIMM_A1"), dataclasses.replace(Slot("DIMM_B1"), **change)]
    assert promised(parse_modules(table(slots))) is None
    assert promised(()) is None
    assert promised(parse_modules(table([Slot("DIMM_A1", size_mb=0)]))) is None


def test_the_table_ends_where_it_is_cut_off() -> None:
    slots = [Slot(f"DIMM_{letter}1", "bank") for letter in "ABC"]
    whole = table(slots)
    for end in range(len(whole)):
        modules = parse_modules(whole[:end])
        assert [module.slot for module in modules] == ["DIMM_A1", "DIMM_B1", "DIMM_C1"][: len(modules)]
    assert len(parse_modules(whole)) == 3
    assert parse_modules(structure(127, b"") + whole) == ()
    assert parse_modules(b"\x11\x03\x00\x00" + whole) == ()  # a length shorter than the header


@given(st.binary(max_size=400))
def test_any_bytes_are_read(data: bytes) -> None:
    for bytes_ in (data, memory_device(Slot("A")) + data, b"\x11\x5c\0\0" + data + b"\0\0"):
        promised(parse_modules(bytes_))


def test_tables_that_are_missing_or_refused(tmp_path: Path) -> None:
    assert read_modules(tmp_path) is None
    path = tmp_path / TABLE
    path.parent.mkdir(parents=True)
    path.write_bytes(table([Slot("DIMM_A1")]))
    found = read_modules(tmp_path)
    assert found is not None
    assert len(found) == 1
    path.chmod(0)
    was = os.geteuid()
    try:
        if was == 0:
            os.seteuid(65534)  # root reads every file
        with pytest.raises(PermissionError):
            read_modules(tmp_path)
    finally:
        os.seteuid(was)
