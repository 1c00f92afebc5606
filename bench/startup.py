"""How soon a server answers, and how fast experts become resident behind its back.

    k2hybrid synth wide --like kimi-k2-thinking --layers 2
    python bench/startup.py wide [--json FILE]

First token: from the command to the first streamed token, the checkpoint in the page cache. Bar: 5 s.

Residency: the rate at which slots fill while nothing is asked, against the rate at which as many threads read
the same bytes and copy them into fresh memory of the same kind; once from the page cache, once from the disk.
They take turns, medians count. Bar: 90 %.
"""

from __future__ import annotations

import argparse
import mmap
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import httpx

from bench.page_cache import cached_bytes, forget, remember
from k2hybrid.bench.report import Row, conditions, print_report, write_json
from k2hybrid.checkpoint.loader import open_checkpoint
from k2hybrid.checkpoint.spec import read_spec
from k2hybrid.experts.placement import BLOCK, place_experts
from k2hybrid.experts.store import ExpertStore
from k2hybrid.native.machine import Machine
from k2hybrid.runtime.experts import expert_sizes
from k2hybrid.types import TensorRef

FIRST_TOKEN_BAR_S = 5.0
RESIDENCY_BAR = 0.9
PIECE_BYTES, DEPTH = 2 << 20, 8  # of the store's background reads
HUGE = 2 << 20
SPARED_BYTES = 1 << 30
MADV_POPULATE_WRITE = 23  # of <linux/mman.h>, Linux 5.14
SAMPLE = 4  # the reference reads a quarter of the experts
Source = Literal["page cache", "disk"]


def first_token_seconds(model: Path) -> float:
    """From the command to the first token of a streamed answer."""
    began = time.perf_counter()
    server = subprocess.Popen(
        [sys.executable, "-m", "k2hybrid.server", "--model", str(model), "--port", "0", "--no-journal"],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert server.stdout is not None
        base = next(line.split()[-1] for line in server.stdout if line.startswith("Listening on"))
        body = {"messages": [{"role": "user", "content": "Hi"}], "stream": True, "max_tokens": 4}
        with httpx.stream("POST", f"{base}/v1/chat/completions", json=body, timeout=120) as reply:
            reply.raise_for_status()
            for line in reply.iter_lines():
                if '"reasoning_content":"' in line or '"content":"' in line:
                    return time.perf_counter() - began
        raise RuntimeError("the server ended its answer without a token")
    finally:
        server.terminate()
        server.wait(timeout=60)


PREPARE: dict[Source, Callable[[Path], None]] = {"page cache": remember, "disk": forget}


class Fill:
    """Slots that fill from a checkpoint."""

    def __init__(self, model: Path) -> None:
        spec = read_spec(model)
        sizes = expert_sizes(spec)
        placement = place_experts(sizes, node_memory={-1: 1 << 50}, wanted="resident")
        self.store = ExpertStore(
            layers=spec.num_layers, experts=sizes.experts, hidden=sizes.hidden, inter=sizes.inter,
            placement=placement,
        )  # fmt: skip
        self.checkpoint = open_checkpoint(model, self.store)
        self.nbytes = sizes.total_bytes

    def seconds(self) -> float:
        """Until all experts are resident."""
        began = time.perf_counter()
        self.store.open_slots(self.checkpoint.maps)
        while (progress := self.store.progress) is not None and progress.running:
            time.sleep(0.002)
        took = time.perf_counter() - began
        assert progress is not None
        assert self.store.stats.filled == progress.experts > 0
        return took

    def close(self) -> None:
        """Give memory and maps back."""
        self.store.close()
        self.checkpoint.close()

    def tensors(self) -> list[TensorRef]:
        """What a fill reads, in its order."""
        return [tensor for key in self.store.keys for tensor in self.store.tensors(*key)]


def read_seconds(tensors: list[TensorRef], source: Source) -> float:
    """As many threads as a fill has read the same bytes into fresh huge pages, by plain or direct reads."""
    direct = source == "disk"
    files = {
        path: os.open(path, os.O_RDONLY | (os.O_DIRECT if direct else 0))
        for path in {tensor.path for tensor in tensors}
    }
    pieces = []
    total = 0
    for tensor in tensors:
        first = tensor.offset // BLOCK * BLOCK if direct else tensor.offset
        last = tensor.offset + tensor.nbytes
        last = -(-last // BLOCK) * BLOCK if direct else last
        step = PIECE_BYTES if direct else last - first
        for at in range(first, last, step):
            pieces.append((files[tensor.path], at, min(step, last - at), total))
            total += -(-min(step, last - at) // BLOCK) * BLOCK
    began = time.perf_counter()
    room = mmap.mmap(-1, total + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    room.madvise(mmap.MADV_HUGEPAGE)
    view = memoryview(room)
    todo, lock = iter(pieces), threading.Lock()

    def work() -> None:
        while True:
            with lock:
                piece = next(todo, None)
            if piece is None:
                return
            descriptor, at, nbytes, to = piece
            os.preadv(descriptor, [view[to : to + nbytes]], at)

    threads = [threading.Thread(target=work) for _ in range(DEPTH if direct else 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    took = time.perf_counter() - began
    view.release()
    room.close()
    for descriptor in files.values():
        os.close(descriptor)
    return took


def touch_memory() -> None:
    """Write to free memory and give it back: a virtual machine's host makes pages at their first touch."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") - SPARED_BYTES
    if free > 0:
        with mmap.mmap(-1, free, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as room:
            room.madvise(mmap.MADV_HUGEPAGE)
            room.madvise(MADV_POPULATE_WRITE)


def residency(model: Path, source: Source, rounds: int) -> Row:
    """Fill and reference in turns."""
    fills, reads, cached = [], [], []
    for _ in range(rounds):
        forget(model)
        touch_memory()
        PREPARE[source](model)
        fill = Fill(model)
        fills.append(fill.seconds())
        cached.append(cached_bytes(fill.store))
        fill.close()
        forget(model)
        touch_memory()
        PREPARE[source](model)
        # Some of them: what is read must not push out of the page cache what is to be read.
        sample = fill.tensors()[: len(fill.tensors()) // SAMPLE]
        reads.append(sum(tensor.nbytes for tensor in sample) / read_seconds(sample, source))
    rate, reference = fill.nbytes / statistics.median(fills) / 1e9, statistics.median(reads) / 1e9
    ratio = statistics.median(fill.nbytes / took / read for took, read in zip(fills, reads, strict=True))
    return {
        "case": f"residency from {source}",
        "seconds": statistics.median(fills),
        "gb_s": rate,
        "reference_gb_s": reference,
        "share": ratio,
        "experts_cached_gb": statistics.median(cached) / 1e9,
        "bar": RESIDENCY_BAR,
        "holds": ratio >= RESIDENCY_BAR,
    }


def main() -> int:
    """Run all cases; exit status 1 if a bar is missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--starts", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3, help="of residency; 0 leaves it out")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    remember(options.model)
    starts = [first_token_seconds(options.model) for _ in range(options.starts)]
    seconds = statistics.median(starts)
    rows: list[Row] = [
        {
            "case": "first token, warm page cache",
            "seconds": seconds,
            "bar": FIRST_TOKEN_BAR_S,
            "holds": seconds <= FIRST_TOKEN_BAR_S,
        }
    ]
    if options.rounds:
        rows += [residency(options.model, source, options.rounds) for source in ("page cache", "disk")]
    found = conditions(
        Machine(),
        model=options.model.resolve().name,
        starts=options.starts,
        rounds=options.rounds,
        load_average_after=float(Path("/proc/loadavg").read_text().split()[0]),
    )
    print_report("start-up", found, rows)
    if options.json:
        write_json(options.json, found, rows)
    return 0 if all(row["holds"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
