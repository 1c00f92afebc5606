"""What of a model a card is to hold, decided before anything is loaded. Layer 5."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass

from k2hybrid.cache.pages import LatentPages
from k2hybrid.cache.row_sizes import row_bytes
from k2hybrid.checkpoint.spec import ModelSpec
from k2hybrid.config import STEP_TOKENS, RuntimeConfig
from k2hybrid.errors import ConfigError
from k2hybrid.experts.plan import Need
from k2hybrid.experts.prediction import ModelSizes
from k2hybrid.model.card_memory import (
    CHUNK_STEP,
    CONTEXT_BYTES,
    CardWishes,
    card_needs,
    largest_chunk,
    require_card,
)
from k2hybrid.runtime.memory import log_needs

log = logging.getLogger(__name__)

MOST_GRAPH_ROWS = 16  # batches of up to so many sequences are recorded


@dataclass(frozen=True, slots=True)
class CardFit:
    """What is decided.

    Attributes:
        chunk: rows of a pass at most.
        graph_rows: of a recorded one.
        hot: experts that the card holds.
        needs: the rows of the memory table; on the emulated device, what a card would hold.
    """

    chunk: int
    graph_rows: int
    hot: int
    needs: tuple[Need, ...]


def fit_card(
    spec: ModelSpec, config: RuntimeConfig, memory_bytes: int | None, context_tokens: int
) -> CardFit:
    """The largest chunk and the most experts that fit beside weights and latents.

    Args:
        memory_bytes: that are free; None: the device is the CPU, and nothing is refused.

    Raises:
        ConfigError: it does not fit; the message says what would.
    """
    graph_rows = min(config.max_running, MOST_GRAPH_ROWS)
    wanted = _wanted_experts(spec, config)
    wishes = CardWishes(
        dense=config.dense_weights,
        rows=config.latent_rows,
        context=_latent_tokens(spec, config, context_tokens),
        longest=context_tokens,
        graph_rows=graph_rows,
        moved=config.cache_ram is not None or config.journal is not None,
    )
    if memory_bytes is None and config.vram is None:
        chunk = config.max_step_tokens or STEP_TOKENS
        needs = tuple(card_needs(spec, dataclasses.replace(wishes, chunk=chunk)))
        return CardFit(chunk, graph_rows, wanted or 0, needs)
    budget = _budget(config.vram, memory_bytes)
    chunk = config.max_step_tokens or largest_chunk(spec, budget, wishes) or CHUNK_STEP
    plan = require_card(spec, budget, dataclasses.replace(wishes, chunk=chunk))
    log_needs(list(plan.needs))
    if wanted is not None and wanted > plan.hot:
        log.warning("--hot-experts asks for %d experts; %d fit on the card", wanted, plan.hot)
    return CardFit(chunk, graph_rows, plan.hot if wanted is None else min(wanted, plan.hot), plan.needs)


def _budget(vram: int | None, free: int | None) -> int:
    """Bytes, the CUDA context included, which is there already."""
    if free is None:
        return vram or 0
    most = free + CONTEXT_BYTES
    if vram is not None and vram > most:
        raise ConfigError(
            f"--vram {vram} is more than this card has free ({most} bytes, the CUDA context included); ask "
            "for less, or end what else uses the card"
        )
    return vram or most


def _latent_tokens(spec: ModelSpec, config: RuntimeConfig, context_tokens: int) -> int:
    if config.latent_bytes is None:
        return context_tokens
    row = row_bytes(config.latent_rows, spec.kv_lora_rank, spec.qk_rope_head_dim)
    page_bytes = spec.num_layers * LatentPages.PAGE_TOKENS * row
    return config.latent_bytes // page_bytes * LatentPages.PAGE_TOKENS


def _wanted_experts(spec: ModelSpec, config: RuntimeConfig) -> int | None:
    if config.hot_experts is None:
        return None
    sizes = ModelSizes.of(spec).experts
    return min(config.hot_experts // sizes.expert_bytes, sizes.count) if sizes.count else 0
