"""The memory table of a start: what the model will take of RAM, said before anything is loaded. Layer 5."""

from __future__ import annotations

import logging

from k2hybrid.cache.pages import LatentPages
from k2hybrid.checkpoint.spec import ModelSpec
from k2hybrid.config import RuntimeConfig
from k2hybrid.experts.placement import Placement
from k2hybrid.experts.plan import LEFT_LATENTS, Need, expert_needs, ram_needs
from k2hybrid.experts.prediction import ModelSizes

log = logging.getLogger(__name__)


def start_needs(
    spec: ModelSpec, pages: LatentPages, placement: Placement | None, config: RuntimeConfig
) -> list[Need]:
    """The rows: as `plan` has them, with the latents that were reserved. `placement`: of experts."""
    tokens = f"{pages.pages * pages.PAGE_TOKENS:,} tokens in {pages.format.name}"
    sizes = ModelSizes.of(spec, pages.format.row_bytes, dense_weights=config.dense_weights)
    latent_bytes = pages.pages * pages.page_bytes
    needs = [
        *ram_needs(sizes, tokens, latent_bytes, on_card=config.on_card),
        *expert_needs(sizes.experts, placement),
    ]
    if beside := (config.cache_ram or 0) // pages.page_bytes:
        tokens = f"{beside * pages.PAGE_TOKENS:,} tokens"
        needs.append(Need(f"latents that left, {tokens}", beside * pages.page_bytes, LEFT_LATENTS))
    return needs


def log_needs(needs: list[Need]) -> None:
    """Tell them, a line each."""
    width = max(len(need.name) for need in needs)
    for need in needs:
        log.info(
            "memory: %s %10s MiB  %s", f"{need.name:<{width}}", f"{need.nbytes / 2**20:,.0f}", need.where
        )
