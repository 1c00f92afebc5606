"""Sizes of latent pages and rows, without torch: whoever plans memory counts as the pages do."""

from __future__ import annotations

from k2hybrid.errors import ConfigError

PAGE_TOKENS = 64
GROUP = 128  # latent values that share a scale in FP8 rows


def fp8_groups(latent: int) -> int:
    """Scales of a row; the last one may stand for fewer values."""
    return -(-latent // GROUP)


def row_bytes(name: str, latent: int, rope: int) -> int:
    """Of a row of `latent` + `rope` values, in the format that options call `name`.

    Raises:
        ConfigError: there is no such format.
    """
    match name:
        case "bf16":
            return 2 * (latent + rope)
        case "fp8":  # bytes, fp32 scales, the rotated key part in bf16
            return latent + 4 * fp8_groups(latent) + 2 * rope
        case "fp32":
            return 4 * (latent + rope)
    raise ConfigError(f"latent rows are bf16 or fp8, not {name!r}")
