"""Linears over 8-bit weights at Kimi-K2's shapes: microseconds, and the share of the card's limit.

The limit is the greater of weight and activation bytes at the rate of a device copy and the products at the
rate of a bf16 matmul. Results are checked against float64 first.

    python -m bench.gpu_linear8 [--json FILE]
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from bench.device_cases import linear_case
from bench.device_rates import Rates, command, measured_rates, report, rotation, us_per_call
from bench.gpu_doorbell import conditions
from k2hybrid.errors import KernelError
from k2hybrid.kernels.linear8 import linear8

KINDS = ("int8", "fp8")
BOUND = 4e-6  # docs/numerics.md, at 7,168 columns
# Outputs, columns.
SHAPES = {
    "q_a": (1536, 7168),
    "q_b": (12288, 1536),
    "kv_a": (576, 7168),
    "o": (7168, 8192),
    "shared gate": (2048, 7168),
    "shared down": (7168, 2048),
}
FEW = (1, 8, 16)
MANY = (512, 4096)
MANY_SHAPES = ("q_b", "o")


def check(device: torch.device | str, outputs: int, inner: int) -> None:
    """Raises KernelError where results leave their bound."""
    for kind in KINDS:
        for count in (1, 7, 130):
            case = linear_case(kind, count, outputs, inner, device=device)
            error = case.error(case.run())
            if not error <= BOUND:
                raise KernelError(f"an {kind} linear of {count} rows errs by {error:.1e} of its norm")


def work(count: int, outputs: int, inner: int) -> tuple[int, int]:
    """Bytes and operations of one call."""
    return outputs * (inner + 4) + count * (2 * inner + 4 * outputs), 2 * count * outputs * inner


def measure(kind: str, count: int, outputs: int, inner: int) -> float:
    cases = [
        linear_case(kind, count, outputs, inner, device="cuda", seed=i)
        for i in range(rotation(outputs * inner))
    ]
    return us_per_call([partial(linear8, c.x, c) for c in cases])


def rows(rates: Rates) -> Iterator[dict[str, Any]]:
    for kind in KINDS:
        for name, (outputs, inner) in SHAPES.items():
            for count in FEW + (MANY if name in MANY_SHAPES else ()):
                us = measure(kind, count, outputs, inner)
                what = {"case": "8-bit linear", "weights": kind, "linear": name, "rows": count}
                yield what | rates.row(us, *work(count, outputs, inner))


def main() -> int:
    options = command(__doc__).parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device: nothing to measure")
        return 0
    check("cuda", 576, 7168)
    rates = measured_rates()
    told = conditions() | {"copy_gb_s": rates.bytes_per_s / 1e9, "matmul_tflop_s": rates.flop_per_s / 1e12}
    report(rows(rates), options.json, told)
    return 0


if __name__ == "__main__":
    sys.exit(main())
