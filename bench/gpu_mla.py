"""Latent attention of a decode step at Kimi-K2's sizes: microseconds a layer, and share of the limit.

The limit is the greater of cache bytes at the rate of a device copy and 139,264 operations a context token at
the rate of a bf16 matmul. The bar is 60 % of it: batch 1 at 128k tokens and batch 8 at 32k, both row formats,
of the kernel's own choice of a tile. Results are checked against float64 first.

    python -m bench.gpu_mla [--json FILE] [--tiles]
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch

from bench.device_cases import latent_case, random_rows
from bench.device_rates import Rates, command, measured_rates, report, rotation, rows_of_case, us_per_call
from bench.gpu_doorbell import conditions
from k2hybrid.errors import KernelError
from k2hybrid.kernels.mla import PAGE_TOKENS, Tile, mla_decode, row_bytes

HEADS, LATENT, ROPE = 64, 512, 64
FLOP_PER_TOKEN = 2 * HEADS * (LATENT + ROPE + LATENT)
FORMATS = ("bf16", "fp8")
BAR = 0.6
CONTEXTS = [(1, 131_072), (8, 32_768)]
MORE_CONTEXTS = [(1, 2_048), (1, 16_384), (4, 16_384)]  # without a bar
TILES = [
    Tile(heads, tokens, warps, stages)
    for heads, warps in ((16, 4), (32, 8), (64, 8))
    for tokens in (32, 64)
    for stages in (1, 2, 3)
]


def check(device: torch.device | str, lengths: Sequence[int], heads: int, latent: int, rope: int) -> None:
    """Raises KernelError where results leave their bound."""
    pages = -(-max(lengths) // PAGE_TOKENS)
    for row_format in FORMATS:
        case = latent_case(
            row_format, lengths, heads=heads, latent=latent, rope=rope, pages=pages, device=device
        )
        errors = case.errors(case.run())
        if not all(error <= 1 for error in errors):  # NaN is no success
            raise KernelError(f"latent attention over {row_format} rows errs by {errors} of its bounds")


def work(row_format: str, batch: int, tokens: int) -> tuple[int, int]:
    """Cache bytes and operations of one layer."""
    return batch * tokens * row_bytes(row_format, LATENT, ROPE), batch * tokens * FLOP_PER_TOKEN


def measure(row_format: str, batch: int, tokens: int, tile: Tile | None = None) -> float:
    """Microseconds a layer, over as many layers as exceed the cache."""
    g = torch.Generator("cuda").manual_seed(0)
    nbytes, _ = work(row_format, batch, tokens)
    pages = tokens // PAGE_TOKENS
    layers = [random_rows(row_format, batch * tokens, LATENT, ROPE, g)[0] for _ in range(rotation(nbytes))]
    tables = torch.randperm(batch * pages, generator=g, device="cuda").int().view(batch, pages)
    lengths = torch.full((batch,), tokens, dtype=torch.int32, device="cuda")
    q_latent = torch.randn(batch, HEADS, LATENT, generator=g, device="cuda").bfloat16()
    q_rope = torch.randn(batch, HEADS, ROPE, generator=g, device="cuda").bfloat16()
    call = partial(mla_decode, q_latent, q_rope, scale=0.1447, row_format=row_format, tile=tile)
    return us_per_call([partial(call, rows=rows, tables=tables, lengths=lengths) for rows in layers])


def rows(rates: Rates, tiles: bool) -> Iterator[dict[str, Any]]:
    for row_format in FORMATS:
        for batch, tokens in CONTEXTS if tiles else CONTEXTS + MORE_CONTEXTS:
            yield from rows_of_case(
                rates,
                {"case": "mla decode", "rows": row_format, "batch": batch, "context": tokens},
                work(row_format, batch, tokens),
                partial(measure, row_format, batch, tokens),
                bar=BAR if (batch, tokens) in CONTEXTS else None,
                tiles=TILES if tiles else (None,),
                named=lambda tile: f"{tile.heads}x{tile.tokens} warps {tile.warps} stages {tile.stages}",
            )


def main() -> int:
    parser = command(__doc__)
    parser.add_argument("--tiles", action="store_true", help="try tiles other than the kernel's choice")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device: nothing to measure")
        return 0
    check("cuda", [1000, 0, 77], HEADS, LATENT, ROPE)
    rates = measured_rates()
    told = conditions() | {"copy_gb_s": rates.bytes_per_s / 1e9, "matmul_tflop_s": rates.flop_per_s / 1e12}
    return report(rows(rates, options.tiles), options.json, told)


if __name__ == "__main__":
    sys.exit(main())
