"""Where latent pages go that leave the pool: RAM, as `cache_ram` says, and the journal. Layer 5."""

from __future__ import annotations

import logging

from k2hybrid.cache.cuda_mover import CudaMover
from k2hybrid.cache.host_pages import HostPages
from k2hybrid.cache.journal import Journal
from k2hybrid.cache.journal_writer import JournalWriter
from k2hybrid.cache.page_mover import MemoryMover, PageMover
from k2hybrid.cache.pages import LatentPages
from k2hybrid.config import RuntimeConfig
from k2hybrid.engine.archive import Archive
from k2hybrid.engine.metrics import PageTraffic
from k2hybrid.engine.spill import Spill
from k2hybrid.errors import ConfigError

log = logging.getLogger(__name__)


def make_archive(
    config: RuntimeConfig, pages: LatentPages, journal: Journal | None, writer: JournalWriter | None
) -> Archive | None:
    """RAM and journal beside `pages`; None without either. The engine closes it; the mover is the caller's.

    Raises:
        ConfigError: `cache_ram` holds no page, or cannot be had.
    """
    if config.cache_ram is None and journal is None:
        return None
    mover: PageMover = CudaMover(pages) if pages.device.type == "cuda" else MemoryMover(pages)
    traffic = PageTraffic()
    try:
        spill = None if config.cache_ram is None else _spill(config.cache_ram, pages, mover, traffic)
    except BaseException:
        mover.close()
        raise
    return Archive(
        mover,
        pages.PAGE_TOKENS,
        reader=journal,
        writer=writer,
        spill=spill,
        page_bytes=pages.page_bytes,
        traffic=traffic,
    )


def _spill(cache_ram: int, pages: LatentPages, mover: PageMover, traffic: PageTraffic) -> Spill:
    count = cache_ram // pages.page_bytes
    if count < 1:
        raise ConfigError(
            f"--cache-ram {cache_ram} holds no page: {pages.PAGE_TOKENS} tokens of this model take "
            f"{pages.page_bytes} bytes"
        )
    try:
        room = mover.room(count)
    except RuntimeError as error:
        raise ConfigError(f"--cache-ram {cache_ram} cannot be had here ({error}); ask for less") from None
    log.info("%d latent pages have room in RAM, %d in the pool", count, pages.pages)
    return Spill(
        HostPages(room),
        mover,
        pages,
        page_tokens=pages.PAGE_TOKENS,
        page_bytes=pages.page_bytes,
        traffic=traffic,
    )
