"""The latent pages of a model that is being loaded: how many there are. Layer 5."""

from __future__ import annotations

import logging
import os

import torch

from k2hybrid.cache.pages import LatentPages
from k2hybrid.cache.rows import row_format
from k2hybrid.checkpoint.spec import ModelSpec
from k2hybrid.config import RuntimeConfig
from k2hybrid.engine.scheduler import pages_for
from k2hybrid.errors import ConfigError

log = logging.getLogger(__name__)

LEAST_LATENT_BYTES = 1 << 30  # of the default


def ram_bytes() -> int:
    """Of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def context_tokens_of(spec: ModelSpec, config: RuntimeConfig) -> int:
    """Tokens of one request at most; warns of more than the model was made for."""
    wanted = config.context_tokens or spec.max_positions
    if wanted > spec.max_positions:
        log.warning(
            "a context of %d tokens was asked for; the model was made for %d", wanted, spec.max_positions
        )
    return wanted


def latent_pages(
    spec: ModelSpec, config: RuntimeConfig, context_tokens: int, device: torch.device | None = None
) -> LatentPages:
    """As many pages as the options ask for, or as one whole context takes.

    Args:
        device: where they lie; None: in RAM.

    Raises:
        ConfigError: too little memory for a page, or more than can be had.
    """
    rows = row_format(config.latent_rows, spec.kv_lora_rank, spec.qk_rope_head_dim)
    page_bytes = spec.num_layers * LatentPages.PAGE_TOKENS * rows.row_bytes
    latent_bytes = config.latent_bytes
    if latent_bytes is None:
        # Reserved, not touched: pages that no request has needed yet cost nothing.
        latent_bytes = pages_for(context_tokens, LatentPages.PAGE_TOKENS) * page_bytes
        if device is None:  # on a card every byte is counted, see `runtime.card`
            most = max(LEAST_LATENT_BYTES, ram_bytes() // 4)
            latent_bytes = min(max(LEAST_LATENT_BYTES, latent_bytes), most)
    pages = latent_bytes // page_bytes
    if pages < 1:
        raise ConfigError(
            f"latent_bytes {latent_bytes} holds no page: {LatentPages.PAGE_TOKENS} tokens of this "
            f"model take {page_bytes} bytes"
        )
    try:
        return LatentPages(spec.num_layers, pages, rows, device or "cpu")
    except RuntimeError as error:  # torch's word for memory that cannot be had
        raise ConfigError(
            f"{latent_bytes} bytes for latent pages cannot be had here; ask for less"
        ) from error
