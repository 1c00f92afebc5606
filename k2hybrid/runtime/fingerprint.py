"""What journaled pages depend on, as one digest: checkpoint, page format, template. Layer 5."""

from __future__ import annotations

import hashlib
from pathlib import Path

from k2hybrid.cache.pages import LatentPages
from k2hybrid.config import RuntimeConfig

# Raised when latents come out differently from the same files, or their rows lie differently.
PAGES_VERSION = 2
_READ = ("config.json", "model.safetensors.index.json", "tiktoken.model", "tokenizer_config.json")


def fingerprint(config: RuntimeConfig, pages: LatentPages, template: str | None) -> str:
    """Hex digest. Weights count by their files' names, sizes and times of change: reading all takes minutes.

    So a copied checkpoint may get another fingerprint; a changed one keeps its own only with forged times.
    """
    digest = hashlib.blake2b(digest_size=16)

    def add(*values: object) -> None:
        digest.update(repr(values).encode())

    add(PAGES_VERSION, type(pages.format).__name__, pages.page_bytes, pages.PAGE_TOKENS)
    add(config.latent_norm_eps, config.device, template)
    if config.dense_weights != "bf16":  # which adds nothing: its journals are older than the option
        add(config.dense_weights)
    for name in _READ:
        path = config.model / name
        add(name, path.read_bytes() if path.exists() else None)
    add(weights_digest(config.model))
    return digest.hexdigest()


def weights_digest(model: Path) -> str:
    """Hex digest of the shards' names, sizes and times of change."""
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(Path(model).glob("*.safetensors")):
        status = path.stat()
        digest.update(repr((path.name, status.st_size, status.st_mtime_ns)).encode())
    return digest.hexdigest()
