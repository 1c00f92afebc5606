"""How far a prompt's prefill is, in llama.cpp's words. Pure."""

from __future__ import annotations

from k2hybrid.types import PromptProgress


def told_progress(progress: PromptProgress) -> dict[str, int]:
    """What stands under `prompt_progress`, in whatever dialect."""
    return {
        "total": progress.total,
        "cache": progress.cached,
        "processed": progress.processed,
        "time_ms": round(progress.ms),
    }
