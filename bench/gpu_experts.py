"""INT4 experts in slots at Kimi-K2's sizes: microseconds, and the share of the card's limit.

The limit is the greater of the bytes of the chosen experts, each once, at the rate of a device copy, and the
products at the rate of a bf16 matmul. Results are checked against float64 first.

    python -m bench.gpu_experts [--json FILE]
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from bench.device_cases import expert_case
from bench.device_rates import Rates, command, measured_rates, report, rotation, us_per_call
from bench.gpu_doorbell import conditions
from k2hybrid.errors import KernelError
from k2hybrid.kernels.experts import expert_bytes, int4_experts

HIDDEN, INTER = 7168, 2048
BOUND = 3e-3  # docs/numerics.md
# Rows, chosen experts of a row, slots: hot experts of a decode step; a slice of a streamed prefill.
CASES = [(1, 2, 24), (1, 8, 24), (4, 4, 24), (8, 4, 24), (512, 2, 16), (4096, 1, 16)]


def check(device: torch.device | str, hidden: int, inter: int) -> None:
    """Raises KernelError where results leave their bound."""
    for count in (1, 5, 150):
        case = expert_case(count, 2, 2, hidden, inter, absent=0.0, device=device)
        error = case.error(case.run())
        if not error <= BOUND:
            raise KernelError(f"INT4 experts over {count} rows err by {error:.1e} of their norm")


def work(count: int, top_k: int, distinct: int) -> tuple[int, int]:
    """Bytes and operations of one call whose choices fall on `distinct` experts."""
    nbytes = distinct * expert_bytes(HIDDEN, INTER) + count * (2 + 4) * HIDDEN
    return nbytes, 2 * count * top_k * 3 * HIDDEN * INTER


def rows(rates: Rates) -> Iterator[dict[str, Any]]:
    g = torch.Generator("cuda").manual_seed(0)
    most = max(slots for _, _, slots in CASES)
    # Any bytes are nibbles; scales of random bits would be NaN, and its arithmetic is not slower.
    sets = [
        torch.randint(
            0, 256, (most, expert_bytes(HIDDEN, INTER)), generator=g, device="cuda", dtype=torch.uint8
        )
        for _ in range(rotation(most * expert_bytes(HIDDEN, INTER)))
    ]
    for count, top_k, slots in CASES:
        draws = torch.rand(count, slots, generator=g, device="cuda")
        chosen = draws.argsort(1)[:, :top_k].int().contiguous()
        x = torch.randn(count, HIDDEN, generator=g, device="cuda").bfloat16()
        weights = torch.rand(count, top_k, generator=g, device="cuda")
        call = partial(int4_experts, x, chosen=chosen, weights=weights, hidden=HIDDEN, inter=INTER)
        us = us_per_call([partial(call, slots=held[:slots]) for held in sets])
        what = {"case": "INT4 experts", "rows": count, "top_k": top_k, "slots": slots}
        yield what | rates.row(us, *work(count, top_k, len(set(chosen.flatten().tolist()))))


def main() -> int:
    options = command(__doc__).parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device: nothing to measure")
        return 0
    check("cuda", HIDDEN, INTER)
    rates = measured_rates()
    told = conditions() | {"copy_gb_s": rates.bytes_per_s / 1e9, "matmul_tflop_s": rates.flop_per_s / 1e12}
    report(rows(rates), options.json, told)
    return 0


if __name__ == "__main__":
    sys.exit(main())
