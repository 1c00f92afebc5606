"""Engines over a model of integers, run by hand."""

from __future__ import annotations

from k2hybrid.config import RuntimeConfig
from k2hybrid.engine.engine import Engine
from tests.unit.engine.fakes import (
    SIZES,
    VOCAB,
    Collector,
    FakeJournal,
    FakeModel,
    FakePages,
    archive_for,
    job,
)

CONTEXT = 256


def build(
    pages: int = 64,
    *,
    max_step_tokens: int = 16,
    max_running: int = 4,
    max_queue: int = 64,
    ram_pages: int | None = None,
    journal: FakeJournal | None = None,
) -> tuple[Engine, FakeModel]:
    """An engine without a thread, with pages in RAM or in a journal as well; it is ticked by hand."""
    model = FakeModel(FakePages(pages))
    config = RuntimeConfig(max_step_tokens=max_step_tokens, max_running=max_running, max_queue=max_queue)
    archive = None
    if ram_pages is not None or journal is not None:
        archive = archive_for(model.pages, ram_pages, journal)
    engine = Engine(
        model,
        model.pages,
        sizes=SIZES,
        vocab_size=VOCAB,
        context_tokens=CONTEXT,
        config=config,
        archive=archive,
    )
    return engine, model


def drain(engine: Engine) -> None:
    while engine.tick():
        pass
    engine.check()


def run(engine: Engine, prompt: list[int], max_tokens: int = 5) -> Collector:
    sink = Collector()
    engine.submit(job(prompt, sink, max_tokens))
    drain(engine)
    return sink


def ended(sink: Collector) -> str:
    assert sink.done is not None
    assert sink.after_done == 0
    return sink.done.reason
