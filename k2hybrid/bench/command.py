"""`k2hybrid bench [MODEL]`: prefill and decode tokens per second, and who read how many bytes in that time.

The limit is the machine's measured read bandwidth: a decode step cannot be faster than the weights it reads.
Prefill is bound by arithmetic as soon as many rows share a weight; its share of the bandwidth says only that.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from k2hybrid.bench.report import Row, conditions, print_report, write_json
from k2hybrid.bench.roles import RecordingExperts, RecordingMachine, Tally, WeightRoles
from k2hybrid.cache.pages import PAGE_TOKENS, LatentPages
from k2hybrid.cache.rows import Bf16Rows
from k2hybrid.checkpoint.hub import find_model, model_name
from k2hybrid.checkpoint.spec import read_spec
from k2hybrid.config import MINI_MODEL, DenseWeights, RuntimeConfig
from k2hybrid.engine.cost import LARGE_ROWS
from k2hybrid.errors import K2Error
from k2hybrid.experts.placement import Placement
from k2hybrid.hardware.bandwidth import Bandwidth, measure
from k2hybrid.hardware.memory import MemoryUse
from k2hybrid.model.batch import Batch, Span
from k2hybrid.native.machine import Machine
from k2hybrid.runtime.assembly import Parts, assemble
from k2hybrid.runtime.experts import native_experts

MAX_ROWS = 512


class Bench:
    """A model with its multiplications and hand-offs timed."""

    def __init__(
        self,
        model: Path,
        machine: Machine,
        context_tokens: int,
        *,
        placement: Placement | None = None,
        dense_weights: DenseWeights = "bf16",
    ) -> None:
        start = time.perf_counter()
        spec = read_spec(model)
        config = RuntimeConfig(model=model)
        self.pages = LatentPages(
            spec.num_layers, -(-context_tokens // PAGE_TOKENS), Bf16Rows(spec.latent_dim)
        )
        self._kernels = machine
        made = native_experts(config, spec, machine, max_rows=MAX_ROWS, placement=placement)
        self.store = made.store
        self.checkpoint, self.kimi = assemble(
            model,
            spec,
            machine,
            made,
            self.pages,
            latent_norm_eps=config.latent_norm_eps,
            dense_weights=dense_weights,
            metered=self._recorded,
        )
        self.table = torch.tensor(self.pages.allocate(self.pages.free_pages))
        self.spec = spec
        self.threads = machine.threads
        self.load_seconds = time.perf_counter() - start
        self._ids = torch.Generator().manual_seed(0)

    def _recorded(self, parts: Parts) -> Parts:
        weights = WeightRoles(parts.weights)
        self.machine = RecordingMachine(self._kernels, weights)
        self.experts = RecordingExperts(parts.experts)
        return Parts(weights, self.experts, self.machine)

    def step(self, start: int, count: int) -> float:
        """Seconds of one pass of `count` new random tokens after `start`, logits of the last one included."""
        ids = torch.randint(self.spec.vocab_size, (count,), generator=self._ids)
        span = Span(start, count, self.table)
        torch.set_num_threads(self.threads if count >= LARGE_ROWS else 1)  # as the engine does
        began = time.perf_counter()
        batch = Batch(ids, torch.arange(start, start + count), (span,), torch.tensor([count - 1]))
        self.kimi.logits(self.kimi.forward(self.kimi.begin(batch)))
        return time.perf_counter() - began

    def reset(self) -> None:
        """Forget what was counted so far."""
        self.machine.tallies.clear()
        self.experts.tally = Tally()

    def roles(self) -> dict[str, Tally]:
        """What was read since `reset`, by role."""
        return {
            "experts": self.experts.tally,
            **{r: self.machine.tallies[r] for r in ("dense", "head", "context")},
        }


def run(
    model: Path,
    machine: Machine,
    bandwidth: Bandwidth,
    prompt: int,
    decode: int,
    dense_weights: DenseWeights = "bf16",
) -> tuple[dict[str, float], list[Row]]:
    """Prefill `prompt` tokens (after one pass to warm up), then decode `decode` tokens one by one.

    Returns load time and memory, and the rows.
    """
    bench = Bench(model, machine, prompt + decode, dense_weights=dense_weights)
    loaded = MemoryUse.now()
    rows: list[Row] = []
    chunks = [(at, min(MAX_ROWS, prompt - at)) for at in range(0, prompt, MAX_ROWS)]
    for timed in (False, True):
        bench.reset()
        seconds = sum(bench.step(at, count) for at, count in chunks)
        if timed:
            rows += _rows(f"prefill {prompt}", prompt, [seconds], bench.roles(), bandwidth)
    bench.reset()
    steps = [bench.step(prompt + i, 1) for i in range(decode)]
    rows += _rows(f"decode after {prompt}", 1, steps, bench.roles(), bandwidth)
    ran = MemoryUse.now()
    bench.checkpoint.close()
    return {
        "load_ms": round(bench.load_seconds * 1e3, 1),
        "private_mb_loaded": round(loaded.private_bytes / 1e6, 1),
        "private_mb_run": round(ran.private_bytes / 1e6, 1),
        "mapped_mb_run": round(ran.mapped_bytes / 1e6, 1),
    }, rows


def _rows(
    case: str, tokens: int, steps: Sequence[float], roles: dict[str, Tally], bandwidth: Bandwidth
) -> list[Row]:
    """One row for the whole step (its median), one for each role (mean over the steps)."""
    median = statistics.median(steps)
    nbytes = sum(tally.nbytes for tally in roles.values()) / len(steps)
    rows: list[Row] = [
        {
            "case": case,
            "tokens_s": tokens / median,
            "ms": median * 1e3,
            "gb": nbytes / 1e9,
            "gb_s": nbytes / median / 1e9,
            "share_of_limit": nbytes / median / 1e9 / bandwidth.gb_s,
        }
    ]
    for role, tally in roles.items():
        if tally.seconds > 0:
            gb_s = tally.nbytes / tally.seconds / 1e9
            rows.append(
                {
                    "case": f"{case}: {role}",
                    "ms": tally.seconds / len(steps) * 1e3,
                    "gb": tally.nbytes / len(steps) / 1e9,
                    "gb_s": gb_s,
                    "share_of_limit": gb_s / bandwidth.gb_s,
                }
            )
    return rows


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    made = argparse.ArgumentParser(prog="k2hybrid bench", description=__doc__)
    what = "checkpoint folder, or OWNER/NAME in the Hugging Face cache (default: the built-in model)"
    named = made.add_mutually_exclusive_group()
    named.add_argument("positional_model", nargs="?", type=Path, metavar="MODEL", help=what)
    named.add_argument("--model", type=Path, metavar="MODEL", help="the same as an option")
    made.add_argument("--prompt", type=int, default=512, help="tokens to prefill (default 512)")
    made.add_argument("--decode", type=int, default=32, help="tokens to decode (default 32)")
    made.add_argument(
        "--dense-weights", choices=("bf16", "fp8", "int8"), default="bf16", help="as of serve (default bf16)"
    )
    made.add_argument("--threads", type=int, help="default: one per physical core")
    made.add_argument("--isa", help="use a lower instruction set than the CPU offers")
    made.add_argument("--json", type=Path, metavar="FILE", help='write {"conditions": …, "rows": […]}')
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; 1 if the model cannot be used."""
    options = parser().parse_args(argv)
    if min(options.prompt, options.decode) < 1:
        parser().error("--prompt and --decode must be at least 1")
    try:
        named = options.model or options.positional_model
        model = MINI_MODEL if named is None else find_model(named)
        machine = Machine(options.threads, options.isa)
        machine.pin_caller()
        bandwidth = measure(machine)
        kind = options.dense_weights
        found = conditions(
            machine, bandwidth, model=model_name(model), prompt=options.prompt, dense_weights=kind
        )
        measured, rows = run(model, machine, bandwidth, options.prompt, options.decode, kind)
    except K2Error as error:
        print(f"k2hybrid bench: {error}")
        return 1
    found |= measured
    print_report("tokens per second", found, rows)
    if options.json:
        write_json(options.json, found, rows)
    return 0
