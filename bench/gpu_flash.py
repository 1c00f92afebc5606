"""Attention of a prefill at Kimi-K2's sizes: milliseconds a layer, and share of the limit.

A span's queries over all of its context, in blocks as large as a model has them, keys and values already
made. The limit is 2 · 64 · (192 + 128) operations for each query and row it sees, at the rate of a bf16
matmul; `k2hybrid plan` counts on 60 % of it (`experts/card_prediction.py`), which is the bar. Results are
checked against float64 first.

    python -m bench.gpu_flash [--json FILE] [--tiles]
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from bench.device_cases import U
from bench.device_rates import Rates, command, measured_rates, report, rows_of_case, us_per_call
from bench.gpu_doorbell import conditions
from k2hybrid.errors import KernelError
from k2hybrid.kernels.flash import Carried, Tile, flash_attend

HEADS, NOPE, ROPE, VALUE = 64, 128, 64, 128
FLOP = 2 * HEADS * (NOPE + ROPE + VALUE)  # of a query and a row that it sees
BLOCK = 5696  # rows, as `scratch.ON_DEVICE` has it for these sizes
BAR = 0.6
SPANS = [(0, 8192), (0, 16_384), (16_384, 16_384)]  # rows before, queries; the last is that of 32k tokens
MORE_SPANS = [(0, 512), (30_000, 200), (122_880, 8192)]  # without a bar
TILES = [
    Tile(queries, rows, warps, stages)
    for queries, warps in ((64, 4), (128, 4), (128, 8))
    for rows in (32, 64, 128)
    for stages in (2, 3, 4)
]


@dataclass(frozen=True)
class FlashCase:
    """`n` queries behind `before` rows; keys and values of all context, which is given in blocks."""

    q: torch.Tensor
    both: torch.Tensor
    rope: torch.Tensor
    before: int
    block: int
    scale: float
    tile: Tile | None = None

    @property
    def value(self) -> int:
        return self.both.shape[-1] - (self.q.shape[-1] - self.rope.shape[-1])

    def run(self) -> torch.Tensor:
        """What is not written must not be read: all that is given is NaN at first."""
        n, heads, _ = self.q.shape
        out = self.q.new_full((n, heads, self.value), torch.nan)
        carried = Carried.empty(n, heads, self.value, self.q.device)
        carried.mixed.fill_(torch.nan)
        carried.sums.fill_(torch.nan)
        self.attend(out, carried)
        return out

    def attend(self, out: torch.Tensor, carried: Carried) -> None:
        """All blocks, in order."""
        for start in range(0, len(self.both), self.block):
            rows = slice(start, start + self.block)
            flash_attend(
                self.q,
                self.both[rows],
                self.rope[rows],
                out,
                carried,
                start=start,
                position=self.before,
                scale=self.scale,
                tile=self.tile,
            )

    def errors(self, got: torch.Tensor) -> tuple[float, float]:
        """Of `got` against float64: the largest error in units of its bound, and the norm's in its own.

        Weights are rounded to bf16, scores and sums are fp32, the result is rounded: an output o of n rows
        errs by at most (U + 2^-10 + n 2^-26) Σ w |v| + U |o|, and since roundings are independent, of a root
        mean square below U/2, by a norm of no more than U √(Σ w² v² + o²) but for the sums' errors.
        """
        worst, error, sigma = 0.0, 0.0, 0.0
        rows = len(self.both)
        nope = self.q.shape[-1] - self.rope.shape[-1]
        seen = torch.arange(rows, device=self.q.device) <= torch.arange(
            self.before, self.before + len(self.q), device=self.q.device
        ).unsqueeze(1)
        sums = 2.0**-10 + rows * 2.0**-26
        for head in range(self.q.shape[1]):
            q, key = self.q[:, head].double(), self.both[:, head, :nope].double()
            value = self.both[:, head, nope:].double()
            scores = q[:, :nope] @ key.T + q[:, nope:] @ self.rope.double().T
            weights = (scores * self.scale).masked_fill_(~seen, -torch.inf).softmax(-1)
            wanted = weights @ value
            off = got[:, head].double() - wanted
            magnitudes = weights @ value.abs()
            largest = float((off.abs() / ((U + sums) * magnitudes + U * wanted.abs())).max())
            worst = worst if largest <= worst else largest  # NaN stays
            error += float(off.square().sum())
            sigma += U**2 * float((weights.square() @ value.square() + wanted.square()).sum())
            sigma += (sums / 8) ** 2 * float(magnitudes.square().sum())
        return worst, math.sqrt(error / sigma)


def flash_case(
    before: int,
    n: int,
    block: int,
    *,
    heads: int = HEADS,
    nope: int = NOPE,
    rope: int = ROPE,
    value: int = VALUE,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> FlashCase:
    """Random queries, keys and values; queries and rotary parts strided, as the network has them."""
    g = torch.Generator(device).manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, device=device, dtype=torch.bfloat16)

    rows = before + n
    return FlashCase(
        q=random(n, heads + 1, nope + rope)[:, :heads],
        both=random(rows, heads, nope + value),
        rope=random(rows, 16 + rope)[:, 16:],
        before=before,
        block=block,
        scale=1.5 / math.sqrt(nope + rope),
    )


def check(device: torch.device | str, before: int, n: int, heads: int) -> None:
    """Raises KernelError where results leave their bound."""
    case = flash_case(before, n, 448, heads=heads, device=device)
    errors = case.errors(case.run())
    if not all(error <= 1 for error in errors):  # NaN is no success
        raise KernelError(f"attention of a prefill errs by {errors} of its bounds")


def work(before: int, n: int) -> int:
    """Operations of one layer."""
    return FLOP * (n * before + n * (n + 1) // 2)


def measure(before: int, n: int, tile: Tile | None = None) -> float:
    """Microseconds a layer. Keys and values of a block exceed the L2 cache of most cards, a head's do not."""
    case = dataclasses.replace(flash_case(before, n, BLOCK, device="cuda"), tile=tile)
    out = case.q.new_empty((n, HEADS, VALUE))
    carried = Carried.empty(n, HEADS, VALUE, case.q.device)
    return us_per_call([lambda: case.attend(out, carried)])


def rows(rates: Rates, tiles: bool) -> Iterator[dict[str, Any]]:
    for before, n in SPANS if tiles else SPANS + MORE_SPANS:
        yield from rows_of_case(
            rates,
            {"case": "prefill attention", "before": before, "queries": n},
            (0, work(before, n)),
            partial(measure, before, n),
            bar=BAR if (before, n) in SPANS else None,
            tiles=TILES if tiles else (None,),
            named=lambda tile: f"{tile.queries}x{tile.rows} warps {tile.warps} stages {tile.stages}",
        )


def main() -> int:
    parser = command(__doc__)
    parser.add_argument("--tiles", action="store_true", help="try tiles other than the kernel's choice")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device: nothing to measure")
        return 0
    check("cuda", 1000, 300, HEADS)
    rates = measured_rates()
    told = conditions() | {"matmul_tflop_s": rates.flop_per_s / 1e12}
    return report(rows(rates, options.tiles), options.json, told)


if __name__ == "__main__":
    sys.exit(main())
