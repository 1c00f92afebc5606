"""A model over integers and pages that only count: the engine without a network.

`FakeModel` writes each token into the pages it is told to, and predicts the next token from the whole context
*as it reads it back from those pages*. So a wrong page table, a page reused too early or a wrong position
changes its output, and `expected_tokens` says what the output must be.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch

from k2hybrid.cache.host_pages import HostPages
from k2hybrid.cache.page_keys import Found, common_tokens
from k2hybrid.engine.archive import Archive
from k2hybrid.engine.cost import DenseWeights, NetworkSizes
from k2hybrid.engine.metrics import PageTraffic
from k2hybrid.engine.spill import Spill
from k2hybrid.errors import CapacityError, EngineError
from k2hybrid.model.batch import Batch
from k2hybrid.types import DoneEvent, EngineEvent, Job, PromptProgress, SamplingParams, TokenEvent

VOCAB = 97
GREEDY = SamplingParams(temperature=0.0)
LAYERS = 3
# Every row costs the same, whatever is read: a chunk of 15 rows takes as long as 15 decode steps.
SIZES = NetworkSizes(LAYERS, attention=DenseWeights(0, 500_000), mlp=DenseWeights(0, 500_000))


def _bf16(weights: int) -> DenseWeights:
    return DenseWeights(2 * weights, weights)


# Kimi-K2-Thinking: 60 of 61 layers have 384 experts of 24.8 MB; the dense part is 21.1 GB.
K2 = NetworkSizes(
    layers=61, moe_layers=60, attention=_bf16(101_000_000), mlp=_bf16(396_000_000), shared=_bf16(46_800_000),
    head=_bf16(1_174_000_000), expert=DenseWeights(24_772_608, 44_040_192), experts=384, top_k=8,
    context_ops=64 * 1088, latent_bytes=1152, attention_parts=4, whole_below=171,
    pair_ops=64 * 320, key_ops=64 * 512 * 256,
)  # fmt: skip


def next_token(context: Sequence[int]) -> int:
    """A token that depends on every token of the context and on its position."""
    value = 7
    for position, token in enumerate(context):
        value = (value * 31 + token * (position + 3) + 11) % 1_000_003
    return value % VOCAB


def expected_tokens(prompt: Sequence[int], count: int) -> list[int]:
    """What greedy generation gives, whatever else runs."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(next_token(ids))
    return ids[len(prompt) :]


class FakePages:
    """Counts references, and holds a token where a real page holds its latents."""

    def contents(self, page: int) -> list[Any]:
        """What a copy of the page copies."""
        return self.tokens[page]

    def __init__(self, pages: int, page_tokens: int = 4) -> None:
        self.PAGE_TOKENS = page_tokens
        self.tokens = [[-1] * page_tokens for _ in range(pages)]
        self._counts = [0] * pages
        self._free = list(range(pages))

    @property
    def free_pages(self) -> int:
        return len(self._free)

    def refcount(self, page: int) -> int:
        return self._counts[page]

    def allocate(self, count: int) -> list[int]:
        if count > len(self._free):
            raise CapacityError(f"{count} pages wanted, {len(self._free)} free")
        taken, self._free = self._free[:count], self._free[count:]
        for page in taken:
            self._counts[page] = 1
            self.tokens[page] = [-1] * self.PAGE_TOKENS
        return taken

    def retain(self, pages: Iterable[int]) -> None:
        for page in pages:
            if self._counts[page] < 1:
                raise EngineError(f"page {page} is free")
            self._counts[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        for page in pages:
            if self._counts[page] < 1:
                raise EngineError(f"page {page} is released too often")
            self._counts[page] -= 1
            if not self._counts[page]:
                self._free.append(page)

    def copy_rows(self, src: int, dst: int, rows: int) -> None:
        if min(self._counts[src], self._counts[dst]) < 1:
            raise EngineError(f"rows are copied from {src} to {dst}, of which one is free")
        self.tokens[dst][:rows] = self.tokens[src][:rows]


class FakeMover:
    """Copies pages when it is told to, or waited for; `fails` may say which copies do.

    A page that somebody writes, or that is nobody's, while it is copied leaves its mark in the copy.
    """

    def __init__(self, pages: FakePages) -> None:
        self.pages = pages
        self.ways: dict[str, deque[_Copy]] = {"out": deque(), "in": deque()}
        self.copied = 0
        self.fails: Callable[[str], bool] = lambda way: False

    def room(self, buffers: int) -> list[list[Any]]:
        return [[None] * self.pages.PAGE_TOKENS for _ in range(buffers)]

    def mark(self) -> None:
        pass

    @property
    def waiting(self) -> int:
        return sum(map(len, self.ways.values()))

    def out(self, pages: Sequence[int], buffers: Sequence[Any], _after: None = None) -> Future[None]:
        return self._later("out", pages, [(self.pages.contents, page) for page in pages], buffers)

    def into(self, pages: Sequence[int], buffers: Sequence[Any], _after: None = None) -> Future[None]:
        to = [self.pages.contents(page) for page in pages]
        return self._later("in", pages, [(lambda same: same, buffer) for buffer in buffers], to)

    def buffers(self, page: int, tokens: int, _after: None = None) -> list[Any]:
        return self.pages.contents(page)[:tokens]

    def fill(self, page: int, tokens: int, read: Callable[[Any], bool], _after: None = None) -> bool:
        rows: list[Any] = [None] * tokens
        if not read(rows):
            return False
        self.pages.contents(page)[:tokens] = rows
        return True

    def close(self) -> None:
        self.run(self.waiting)

    def run(self, copies: int, ways: Sequence[str] = ("in", "out")) -> None:
        """Make so many copies, of each way those first that were begun first."""
        for way in ways:
            while copies and self.ways[way]:
                copies -= 1
                self.ways[way].popleft().make()

    def _later(
        self,
        way: str,
        pages: Sequence[int],
        sources: list[tuple[Callable[[Any], Any], Any]],
        to: Sequence[Any],
    ) -> _Copy:
        copy = _Copy(self, way, list(pages), sources, to)
        self.ways[way].append(copy)
        return copy


class _Copy(Future[None]):
    """Who waits for it makes it, and those before it."""

    def __init__(
        self,
        mover: FakeMover,
        way: str,
        pages: list[int],
        sources: list[tuple[Callable[[Any], Any], Any]],
        to: Sequence[Any],
    ) -> None:
        super().__init__()
        self._mover, self._way, self._pages, self._sources, self._to = mover, way, pages, sources, to

    def make(self) -> None:
        for page in self._pages:
            if self._mover.pages.refcount(page) < 1:
                self.set_exception(EngineError(f"page {page} is nobody's while it is copied"))
                raise AssertionError(f"page {page} is nobody's while it is copied")
        if self._mover.fails(self._way):
            for to in self._to:
                to[:] = [-2] * len(to)
            self.set_exception(OSError("planned"))
            return
        for to, (read, source) in zip(self._to, self._sources, strict=True):
            to[:] = read(source)
        self._mover.copied += 1
        self.set_result(None)

    def _force(self) -> None:
        while not self.done():
            self._mover.run(1, [self._way])

    def exception(self, timeout: float | None = None) -> BaseException | None:
        self._force()
        return super().exception(timeout)

    def result(self, timeout: float | None = None) -> None:
        self._force()
        super().result(timeout)


class Deferred:
    """An executor that works when it is told to."""

    def __init__(self) -> None:
        self.tasks: deque[Callable[[], None]] = deque()

    def submit(self, function: Callable[..., None], *args: Any) -> None:
        self.tasks.append(lambda: function(*args))

    def run(self) -> None:
        while self.tasks:
            self.tasks.popleft()()

    def shutdown(self, *, wait: bool, cancel_futures: bool) -> None:
        self.tasks.clear()


class FakeJournal:
    """Pages on disk, as journal and writer in one; what is offered is written at once if `ready`."""

    def __init__(self) -> None:
        self.ready = True
        self.files: dict[bytes, tuple[bytes, tuple[int, ...], list[Any]]] = {}
        self.broken: set[bytes] = set()
        self.reads = 0

    def knows(self, key: bytes) -> bool:
        return key in self.files

    def offer(
        self,
        key: bytes,
        parent: bytes,
        ids: Sequence[int],
        payload: Callable[[], Any],
        done: Callable[[], None],
    ) -> bool:
        if not self.ready or key in self.files:
            return False
        self.files[key] = (parent, tuple(ids), list(payload()))
        done()
        return True

    def closest(self, parent: bytes, ids: Sequence[int]) -> Found | None:
        best = None
        for key, (above, tokens, _) in self.files.items():
            rows = common_tokens(tokens, tuple(ids)) if above == parent else 0
            if rows and (best is None or rows > best.rows):
                best = Found(key, parent, tokens, rows)
        return best

    def read_page(self, key: bytes, parent: bytes, ids: Sequence[int], out: Any) -> bool:
        self.reads += 1
        if key in self.broken:
            return False
        assert self.files[key][:2] == (parent, tuple(ids))
        out[:] = self.files[key][2]
        return True


def archive_for(
    pages: FakePages,
    ram_pages: int | None,
    journal: FakeJournal | None = None,
    mover: FakeMover | None = None,
) -> Archive:
    """An archive over fakes, with room for so many pages in RAM."""
    mover = mover or FakeMover(pages)
    traffic = PageTraffic()
    spill = None
    if ram_pages is not None:
        spill = Spill(
            HostPages(mover.room(ram_pages)), mover, pages, page_tokens=pages.PAGE_TOKENS, page_bytes=10,
            traffic=traffic,
        )  # fmt: skip
    return Archive(
        mover, pages.PAGE_TOKENS, reader=journal, writer=journal, spill=spill, page_bytes=10, traffic=traffic
    )


@dataclass
class FakeState:
    batch: Batch
    failed_rows: set[int] = field(default_factory=set)
    part: int = 0


class FakeModel:
    """See the module. `before_step` may raise, block, or fail rows of the state it is given."""

    def __init__(self, pages: FakePages) -> None:
        self.pages = pages
        self.batches: list[Batch] = []
        self.slices: list[int] = []  # parts of each call
        self.before_step: Callable[[FakeState], None] = lambda state: None
        self.poison: Callable[[list[int]], bool] = lambda context: False  # contexts whose logits are NaN

    @property
    def tokens_run(self) -> int:
        return sum(len(batch.ids) for batch in self.batches)

    def begin(self, batch: Batch) -> FakeState:
        return FakeState(batch)

    def forward(self, state: FakeState, until: int) -> FakeState:
        if state.part == 0:
            self.before_step(state)
            self.batches.append(state.batch)
        if until <= state.part:
            raise EngineError("a pass must go forward")
        self.slices.append(until - state.part)
        state.part = until
        if until < 2 * LAYERS:
            return state
        ids = state.batch.ids.tolist()
        for span, rows in zip(state.batch.spans, state.batch.row_slices(), strict=True):
            for row in range(rows.start, rows.stop):
                position = span.start + row - rows.start
                if state.batch.positions[row] != position:
                    raise EngineError("a position does not follow from its span")
                self._page(span.page_table, position)[position % self.pages.PAGE_TOKENS] = ids[row]
        return state

    def logits(self, state: FakeState) -> torch.Tensor:
        out = []
        for row in state.batch.logit_rows.tolist():
            for span, rows in zip(state.batch.spans, state.batch.row_slices(), strict=True):
                if rows.start <= row < rows.stop:
                    length = span.start + row - rows.start + 1
                    context = [
                        self._page(span.page_table, p)[p % self.pages.PAGE_TOKENS] for p in range(length)
                    ]
                    logits = torch.zeros(VOCAB)
                    logits[next_token(context)] = 5.0
                    out.append(logits * float("nan") if self.poison(context) else logits)
        return torch.stack(out)

    def _page(self, table: torch.Tensor, position: int) -> list[int]:
        page = int(table[position // self.pages.PAGE_TOKENS])
        if self.pages.refcount(page) < 1:
            raise EngineError(f"page {page} is used though nobody holds it")
        return self.pages.tokens[page]


class Collector:
    """A sink that keeps what it gets."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.progress: list[PromptProgress] = []
        self.done: DoneEvent | None = None
        self.events = 0
        self.after_done = 0
        self.finished = threading.Event()
        self.on_token: Callable[[int], None] = lambda token: None

    def __call__(self, event: EngineEvent) -> None:
        self.events += 1
        self.after_done += self.done is not None
        if isinstance(event, TokenEvent):
            self.tokens.append(event.token)
            self.on_token(event.token)
        elif isinstance(event, PromptProgress):
            self.progress.append(event)
        else:
            self.done = event
            self.finished.set()


class StopAt:
    """Ends at a token; never, if it is None. A `pause` is an end that is none yet."""

    def __init__(self, token: int | None = None, *, pause: bool = False) -> None:
        self.token = token
        self.paused = pause

    def push(self, token: int) -> bool:
        return token == self.token


def job(
    ids: Sequence[int],
    sink: Callable[[EngineEvent], None],
    max_tokens: int = 5,
    *,
    stop: int | None = None,
    sampling: SamplingParams = GREEDY,
    request_id: str = "test",
) -> Job:
    return Job(tuple(ids), sampling, max_tokens, StopAt(stop), sink, request_id=request_id)
