"""Sessions: the model's answers in memory and, with a journal, on disk. Layer 5."""

from __future__ import annotations

import logging
import re
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from k2hybrid.cache.journal import Journal
from k2hybrid.cache.journal_writer import JournalWriter
from k2hybrid.cache.page_keys import page_keys
from k2hybrid.cache.session_log import Exchange as LoggedExchange
from k2hybrid.chat.exchanges import Exchange, Exchanges
from k2hybrid.config import RuntimeConfig

log = logging.getLogger(__name__)

_FLUSH_SECONDS = 10.0
_SLOW_DISK = 50e6  # bytes/s that even a busy or rotating disk writes
_UNFIT = re.compile(r"[^A-Za-z0-9_-]")


class Sessions:
    """Remembers exchanges; with a journal, those of before a restart too.

    Args:
        journal: opened; closed by `close`, after its writer.
    """

    def __init__(
        self, exchanges: Exchanges, page_tokens: int, journal: Journal | None = None,
        writer: JournalWriter | None = None,
    ) -> None:  # fmt: skip
        self.exchanges = exchanges
        self._page_tokens = page_tokens
        self._journal = journal
        self._writer = writer
        for logged in journal.exchanges() if journal else ():
            exchanges.add(
                Exchange(
                    logged.scope, logged.context_key, logged.message_key, logged.response_id,
                    logged.session, logged.reasoning, logged.ids,
                )
            )  # fmt: skip

    def remember(self, exchange: Exchange, prompt: Sequence[int], *, store: bool) -> None:
        """Keep an answer to `prompt`; with `store`, in the journal too, after the pages offered before."""
        self.exchanges.add(exchange)
        if self._writer is None or not store:
            return
        ids = [*prompt, *exchange.ids]
        keys = page_keys(exchange.scope, ids[:-1], self._page_tokens)  # the last token was never run
        self._writer.append(
            LoggedExchange(
                session=_UNFIT.sub("-", exchange.session)[:128] or "unnamed",
                response_id=exchange.response_id,
                scope=exchange.scope,
                context_key=exchange.context_key,
                message_key=exchange.message_key,
                ids=exchange.ids,
                reasoning=exchange.reasoning,
                created=int(time.time()),
                last_page="",
                tokens=len(ids),
            ),
            [key.key for key in keys],
        )

    def status(self) -> dict[str, Any]:
        """Of the journal: whether there is one, whether it is being written, and why that failed last."""
        if self._journal is None:
            return {"enabled": False}
        return {
            "enabled": True,
            "writing": not self._journal.failed,
            "last_error": self._journal.last_error,
            "bytes": self._journal.size,
        }

    def close(self) -> None:
        """Write what waits, for as long as a slow disk takes, and close the journal."""
        if self._writer is not None:
            self._flush(self._writer)
        if self._journal is not None:
            self._journal.close()

    def _flush(self, writer: JournalWriter) -> None:
        seconds = _FLUSH_SECONDS + writer.backlog().size / _SLOW_DISK
        left = None if writer.flush(seconds) else writer.backlog()
        if left is not None and left.pages:
            log.warning(
                "journal: %d latent pages, %.2f GB, were not written in the %.0f s there were for it; after "
                "a restart their tokens are prefilled again",
                left.pages, left.size / 1e9, seconds,
            )  # fmt: skip
        if not writer.close() and (unsaved := writer.backlog().sessions):
            log.warning("journal: the last answers of sessions %s were not written", ", ".join(unsaved))


def journal_limit(config: RuntimeConfig, folder: Path) -> int:
    """Bytes that the journal may take: as configured, or 64 GiB and a quarter of what is free at most."""
    if config.journal_bytes is not None:
        return config.journal_bytes
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return min(64 << 30, shutil.disk_usage(existing).free // 4)
