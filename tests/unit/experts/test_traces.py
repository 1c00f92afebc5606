"""The trace file: what goes in comes out, however it was cut; and the recorder never stands in the way."""

from __future__ import annotations

import logging
import os
import signal
import stat
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from k2hybrid.errors import TraceError
from k2hybrid.experts import recorder
from k2hybrid.experts.recorder import TraceRecorder, TraceWriter
from k2hybrid.experts.synthetic import foreseen, synthetic
from k2hybrid.experts.traces import Trace, TraceHeader, pack_header, read_trace

HEADER = TraceHeader("a model", 5, 300, 3, "a test", expert_bytes=31104, ahead=4)
# (layer, ids, None or (layer foreseen, ids)); rows: none, one, many.
Entry = tuple[int, np.ndarray[Any, Any], tuple[int, np.ndarray[Any, Any]] | None]


def entries(seed: int = 0, count: int = 12, header: TraceHeader = HEADER) -> list[Entry]:
    rng = np.random.default_rng(seed)
    made: list[Entry] = []
    for at in range(count):
        rows = int(rng.choice([0, 1, 1, 1, 17]))
        layer = int(rng.integers(header.layers))
        ids = rng.integers(-1, header.experts, (rows, header.top_k), np.int32)
        ahead = rng.integers(0, header.experts, (rows, header.ahead), np.int32)
        made.append((layer, ids, (int(rng.integers(header.layers)), ahead) if at % 3 else None))
    return made


def write(path: Path, what: list[Entry], header: TraceHeader = HEADER, **options: int) -> None:
    writer = TraceWriter(path, header, **options)
    for layer, ids, ahead in what:
        writer.routed(layer, ids)
        if ahead is not None:
            writer.ahead(*ahead)
    writer.close()


def content(trace: Trace) -> list[tuple[Any, ...]]:
    """Its hand-offs as plain values."""
    found = []
    for at in range(len(trace)):
        ids = trace.ids[trace.starts[at] : trace.starts[at + 1]]
        ahead = trace.ahead_ids[trace.ahead_starts[at] : trace.ahead_starts[at + 1]]
        found.append(
            (
                int(trace.layer[at]),
                int(trace.rows[at]),
                ids.tolist(),
                int(trace.ahead_layer[at]),
                ahead.tolist(),
            )
        )
    return found


def wanted(what: list[Entry]) -> list[tuple[Any, ...]]:
    return [
        (
            layer,
            len(ids),
            ids.ravel().tolist(),
            *((-1, []) if not ahead else (ahead[0], ahead[1].ravel().tolist())),
        )
        for layer, ids, ahead in what
    ]


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    count=st.integers(0, 40),
    experts=st.sampled_from([4, 1 << 15, (1 << 15) + 1, 1 << 16]),
    top_k=st.integers(1, 4),
    layers=st.sampled_from([1, 61, 4096]),
)
def test_what_goes_in_comes_out(
    tmp_path_factory: pytest.TempPathFactory, seed: int, count: int, experts: int, top_k: int, layers: int
) -> None:
    header = TraceHeader("m", layers, experts, top_k, "t", ahead=4)
    what = entries(seed, count, header)
    path = tmp_path_factory.mktemp("trace") / "trace"
    write(path, what, header)
    trace = read_trace(path)
    assert trace.header == header
    assert trace.complete
    assert content(trace) == wanted(what)


def test_it_is_private_and_small(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        write(tmp_path / "t", [(1, np.zeros((1, 3), np.int32), None)] * 1000)
    finally:
        os.umask(before)
    info = (tmp_path / "t").stat()
    assert stat.S_IMODE(info.st_mode) == 0o600
    assert info.st_size < 1000 * (8 + 3 * 2) + 400


def test_every_cut_reads_up_to_the_last_whole_frame(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(recorder, "FRAME_BYTES", 1)  # a frame for almost every record
    what = entries(3, 12)
    path, cut = tmp_path / "whole", tmp_path / "cut"
    writer = TraceWriter(path, HEADER)
    for layer, ids, ahead in what:
        writer.routed(layer, ids)
        if ahead is not None:
            writer.ahead(*ahead)
        time.sleep(0.002)
    writer.close()
    data, everything, header = path.read_bytes(), wanted(what), len(pack_header(HEADER))
    lengths = set()
    for size in range(len(data)):
        cut.write_bytes(data[:size])
        caplog.clear()
        if size < header:
            with pytest.raises(TraceError, match=r"no routing trace|ends within its header"):
                read_trace(cut)
            continue
        trace = read_trace(cut)
        assert not trace.complete
        assert [record.levelno for record in caplog.records] == [logging.WARNING]
        assert "was cut off" in caplog.text
        part = content(trace)
        # A prediction may be cut from the hand-off before it.
        assert part[:-1] == everything[: max(len(part) - 1, 0)]
        assert [hand_off[:3] for hand_off in part] == [hand_off[:3] for hand_off in everything[: len(part)]]
        lengths.add(len(part))
    assert len(lengths) > 5
    assert max(lengths) == len(what)
    assert content(read_trace(path)) == everything


@pytest.mark.parametrize("then", ["time.sleep(60)", "writer.routed(0, np.array([[1, 2]]))"])
def test_a_kill_leaves_a_trace_of_what_came_before(tmp_path: Path, then: str) -> None:
    code = (
        "import sys, time, numpy as np\n"
        "from pathlib import Path\n"
        "from k2hybrid.experts.recorder import TraceWriter\n"
        "from k2hybrid.experts.traces import TraceHeader\n"
        "writer = TraceWriter(Path(sys.argv[1]), TraceHeader('m', 2, 9, 2, 't'))\n"
        "for at in range(20000): writer.routed(at % 2, np.array([[at % 9, 3]]))\n"
        "time.sleep(2.5)\n"
        "print('recorded', flush=True)\n"
        f"while True: {then}\n"
    )
    path = tmp_path / "t"
    child = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE)
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == b"recorded\n"
        time.sleep(0.2)
    finally:
        child.send_signal(signal.SIGKILL)
        child.communicate()
    trace = read_trace(path)
    assert not trace.complete
    assert len(trace) >= 20000, "what is older than a second is on disk"
    assert trace.ids[:40000:2].tolist() == [at % 9 for at in range(20000)]


def test_a_full_file_is_a_whole_trace_of_the_beginning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    what = entries(5, 400)
    for most in (300, 1000, 5000):
        path = tmp_path / str(most)
        caplog.clear()
        write(path, what, max_bytes=most)
        assert "the size it may have" in caplog.text
        assert path.stat().st_size <= most
        trace = read_trace(path)
        assert trace.complete
        part = content(trace)
        assert [hand_off[:3] for hand_off in part] == [hand_off[:3] for hand_off in wanted(what)[: len(part)]]
    assert len(part) > 20
    with pytest.raises(TraceError, match="holds nothing"):
        TraceWriter(tmp_path / "none", HEADER, max_bytes=50)
    assert not (tmp_path / "none").exists()


def test_a_disk_that_refuses_ends_the_recording_alone(tmp_path: Path) -> None:
    code = (
        "import resource, signal, sys, numpy as np\n"
        "from pathlib import Path\n"
        "from k2hybrid.experts.recorder import TraceWriter\n"
        "from k2hybrid.experts.traces import TraceHeader\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "writer = TraceWriter(Path(sys.argv[1]), TraceHeader('m', 2, 9, 2, 't'))\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))\n"
        "for at in range(100_000): writer.routed(at % 2, np.array([[at % 9, 3]]))\n"
        "writer.close(); writer.close()\n"
        "print('goes on')\n"
    )
    path = tmp_path / "t"
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout == "goes on\n"
    assert "ends here: it cannot be written" in done.stderr
    trace = read_trace(path)
    assert 0 < len(trace) < 100_000
    assert not trace.complete


def test_what_the_disk_cannot_keep_up_with_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(recorder, "MAX_WAITING_BYTES", 50)
    writer = TraceWriter(tmp_path / "t", HEADER)
    writer.routed(0, np.zeros((1, 3), np.int32))
    writer.routed(1, np.zeros((40, 3), np.int32))
    writer.routed(2, np.zeros((1, 3), np.int32))
    writer.close()
    assert "does not keep up" in caplog.text
    assert read_trace(tmp_path / "t").layer.tolist() == [0], "nothing follows a gap"


def test_nothing_is_overwritten_and_no_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("precious")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    with pytest.raises(TraceError, match="there already"):
        TraceWriter(tmp_path / "kept", HEADER)
    for name in ("link", "no folder/t", "nul\0"):
        with pytest.raises(TraceError, match=r"cannot be created|there already"):
            TraceWriter(tmp_path / name, HEADER)
    assert (tmp_path / "kept").read_text() == "precious"
    assert not (tmp_path / "target").exists()


def test_a_record_of_another_width_is_refused(tmp_path: Path) -> None:
    writer = TraceWriter(tmp_path / "t", HEADER)
    for shape in ((1, 2), (3,), (1, 4)):
        with pytest.raises(TraceError, match="3 ids a row"):
            writer.routed(0, np.zeros(shape, np.int32))
    writer.close()
    writer.routed(0, np.zeros((1, 3), np.int32))  # after the end: nothing happens
    assert len(read_trace(tmp_path / "t")) == 0


class Handed:
    """Experts that answer with what they were given, or refuse."""

    def __init__(self) -> None:
        self.refuses = False

    def submit(self, *given: Any) -> Any:
        if self.refuses:
            raise RuntimeError("refused")
        return given


def test_the_recorder_notes_hand_offs_and_passes_them_on(tmp_path: Path) -> None:
    experts = Handed()
    header = replace(HEADER, ahead=0)
    writer = TraceWriter(tmp_path / "t", header)
    recorded = TraceRecorder(experts, writer)
    x, weights = torch.zeros(2, 8), torch.zeros(2, 3)
    # Not contiguous, and changed afterwards, as a buffer that is used again.
    ids = torch.tensor([[5, -1], [299, 7], [0, 2]], dtype=torch.int32).T
    ticket: Any = recorded.submit(3, x, ids, weights)
    assert [part is given for part, given in zip(ticket, (3, x, ids, weights), strict=True)] == [True] * 4
    ids.zero_()
    experts.refuses = True
    with pytest.raises(RuntimeError):
        recorded.submit(4, x, ids, weights)
    writer.close()
    assert content(read_trace(tmp_path / "t")) == [(3, 2, [5, 299, 0, -1, 7, 2], -1, [])]


def test_select_keeps_ids_and_predictions_together(tmp_path: Path) -> None:
    what = entries(9, 30)
    write(tmp_path / "t", what)
    trace = read_trace(tmp_path / "t")
    some = trace.select(trace.rows == 1)
    assert content(some) == [hand_off for hand_off in content(trace) if hand_off[1] == 1]
    assert content(some.select(some.rows > 1)) == []


def test_layers_that_occur() -> None:
    trace = synthetic(layers=4, experts=8, top_k=2, passes=3)
    assert trace.moe_layers == (0, 1, 2, 3)
    assert trace.select(trace.layer > 1).moe_layers == (2, 3)


def test_a_synthetic_trace_survives_the_file(tmp_path: Path) -> None:
    trace = foreseen(synthetic(layers=3, experts=16, top_k=2, passes=20, seed=4), 3, 0.5)
    writer = TraceWriter(tmp_path / "t", trace.header)
    for at, (layer, _, ids, ahead_layer, ahead) in enumerate(content(trace)):
        writer.routed(layer, np.array(ids).reshape(1, -1))
        if ahead_layer >= 0:
            writer.ahead(ahead_layer, np.array(ahead).reshape(1, -1))
        assert (ahead_layer >= 0) == (at % 3 < 2)
    writer.close()
    assert content(read_trace(tmp_path / "t")) == content(trace)
