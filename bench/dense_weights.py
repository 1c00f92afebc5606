"""What dense weights of 8 bits cost in accuracy, beside the published bf16.

    python -m bench.dense_weights [--conversations N] [--json FILE]

On the built-in model: perplexity, mean KL divergence from bf16 and how often the likeliest token is the same,
over conversations of a kind that it can have, of the test side of `k2hybrid.mini_eval` (it was taught none):
all tokens, and those that the assistant says. On random matrices at Kimi-K2's widths: the relative error of
products against float64 with the published weights, beside what rounding is expected to cost, and the largest
share of the bound of docs/numerics.md that an element takes; the exit status is 1 if one exceeds it. Nothing
is timed.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import torch

from k2hybrid.bench.report import Row, conditions, print_report, write_json
from k2hybrid.cache.pages import PAGE_TOKENS, LatentPages
from k2hybrid.cache.rows import Bf16Rows
from k2hybrid.checkpoint.dense8 import dequantize, quantize
from k2hybrid.checkpoint.spec import read_spec
from k2hybrid.config import MINI_MODEL, DenseWeights, RuntimeConfig
from k2hybrid.mini_eval.cases import author_of
from k2hybrid.mini_eval.toolbox import Toolset
from k2hybrid.model.batch import Batch, Span
from k2hybrid.native.machine import Machine
from k2hybrid.runtime.assembly import assemble
from k2hybrid.runtime.experts import native_experts
from k2hybrid.types import Weight8, Weight8Kind
from tools.mini import vocab
from tools.mini.declared import Declared
from tools.mini.render import encode

KINDS: tuple[Weight8Kind, ...] = ("fp8", "int8")
CONTEXT = 2048
# Rows and columns: of kv_a, of a shared expert and its down, and some rows of the dense layer's down.
SHAPES = ((576, 7168), (2048, 7168), (7168, 2048), (512, 18432))
TOKENS = 16
# Of rounding, relative and root mean square, where mantissas are spread as 1/m (docs/numerics.md).
FP8_EXPECTED = 2**-3 / math.sqrt(12) / math.sqrt(3 / (2 * math.log(2)))


class Model:
    """The built-in model with dense weights of one kind."""

    def __init__(self, machine: Machine, kind: DenseWeights) -> None:
        spec = read_spec(MINI_MODEL)
        pages = LatentPages(spec.num_layers, CONTEXT // PAGE_TOKENS, Bf16Rows(spec.latent_dim))
        config = RuntimeConfig(model=MINI_MODEL)
        experts = native_experts(config, spec, machine, max_rows=CONTEXT)
        self._checkpoint, self._network = assemble(
            MINI_MODEL,
            spec,
            machine,
            experts,
            pages,
            latent_norm_eps=config.latent_norm_eps,
            dense_weights=kind,
            metered=lambda parts: parts,
        )
        self._table = torch.tensor(pages.allocate(pages.free_pages))

    def log_probabilities(self, ids: Sequence[int]) -> torch.Tensor:
        """fp32 [tokens, vocab], of what follows each token."""
        count = len(ids)
        span = Span(0, count, self._table)
        batch = Batch(torch.tensor(ids), torch.arange(count), (span,), torch.arange(count))
        logits = self._network.logits(self._network.forward(self._network.begin(batch)))
        return logits.log_softmax(-1)


def texts(count: int, seed: int) -> list[tuple[list[int], torch.Tensor]]:
    """(ids, whether the assistant says it) of conversations: talk, and calls of a simple tool, in turn."""
    encoding, author = vocab.load_encoding(MINI_MODEL / "tiktoken.model"), author_of(None)
    found = []
    for i in range(count):
        rng = random.Random(f"dense weights {seed} {i}")
        if i % 2:
            conversation = author.talk(rng, author.system(rng))
        else:
            conversation = author.with_tools(rng, Toolset((author.first_tool(rng),)), None, "one")
        declared = Declared(encoding, conversation)
        head, body = declared.ids, encode(conversation, declared)
        ids = [*head, *body.ids][:CONTEXT]
        found.append((ids, torch.tensor([*[False] * len(head), *body.learn][:CONTEXT])))
    return found


def model_rows(machine: Machine, conversations: Sequence[tuple[list[int], torch.Tensor]]) -> list[Row]:
    """One for each kind, over all tokens and over the assistant's."""
    models = {kind: Model(machine, kind) for kind in get_args(DenseWeights)}
    sums: dict[tuple[str, str], list[float]] = {}
    for ids, spoken in conversations:
        found = {kind: model.log_probabilities(ids)[:-1] for kind, model in models.items()}
        base, after = found["bf16"], torch.tensor(ids)[1:, None]
        for kind, logs in found.items():
            loss = -logs.gather(1, after)[:, 0]
            divergence = (base.exp() * (base - logs)).sum(-1)
            same = (base.argmax(-1) == logs.argmax(-1)).float()
            for which, rows in (("all", torch.ones_like(spoken)), ("assistant", spoken)):
                kept = rows[1:]
                total = sums.setdefault((which, kind), [0.0] * 4)
                for i, values in enumerate((torch.ones_like(loss), loss, divergence, same)):
                    total[i] += float(values[kept].sum())
    return [
        {
            "case": f"built-in model, {which} tokens",
            "kind": kind,
            "tokens": int(count),
            "perplexity": math.exp(loss / count),
            "mean_kl": divergence / count,
            "same_likeliest": same / count,
        }
        for (which, kind), (count, loss, divergence, same) in sorted(sums.items())
    ]


def random_rows(machine: Machine) -> list[Row]:
    """One for each kind, shape and distribution of the weights."""
    rows: list[Row] = []
    generator = torch.Generator().manual_seed(0)
    for out, inner in SHAPES:
        normal = torch.randn(out, inner, generator=generator)
        # Student's t of four degrees of freedom: a few large weights in every row.
        tails = normal / (torch.randn(4, out, inner, generator=generator).square().mean(0)).sqrt()
        x = torch.randn(TOKENS, inner, generator=generator).bfloat16()
        for name, weight in (("normal", normal), ("heavy tails", tails)):
            published = (weight * 0.02).bfloat16()
            exact = x.double() @ published.double().T
            for kind in KINDS:
                made = quantize(published, kind, name)
                error = machine.linear(x, made).double() - exact
                rows.append(
                    {
                        "case": f"{out} × {inner}, {name}",
                        "kind": kind,
                        "relative_error": float(error.norm() / exact.norm()),
                        "expected": _expected(published, made),
                        "share_of_bound": float((error.abs() / _bound(x, published, made)).max()),
                    }
                )
    return rows


def _expected(published: torch.Tensor, made: Weight8) -> float:
    if made.kind == "fp8":
        return FP8_EXPECTED
    step = made.scale.double().square().mean().sqrt()
    return float(step / math.sqrt(12) / published.double().square().mean().sqrt())


def _bound(x: torch.Tensor, published: torch.Tensor, made: Weight8) -> torch.Tensor:
    """float64 [T, N]: largest error of rounding the weights, and of the kernel's sums."""
    size = published.double().abs()
    step = made.scale.double()[:, None]
    rounded = step / 2 if made.kind == "int8" else torch.maximum(size / 16, step * 2**-10)
    steps = 2 * math.ceil(x.shape[1] / 32) + 5
    summed = steps * 2.0**-24 * dequantize(made).double().abs()
    return x.double().abs() @ (rounded.expand_as(size) + summed).T


def main(argv: Sequence[str] | None = None) -> int:
    """Run both parts; 1 if an element exceeds its bound."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--conversations", type=int, default=60, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(argv)
    machine = Machine(options.threads)
    torch.set_num_threads(machine.threads)
    found = conditions(machine, conversations=options.conversations, seed=options.seed)
    on_model = model_rows(machine, texts(options.conversations, options.seed))
    on_random = random_rows(machine)
    print_report("8 bits against bf16: the built-in model", found, on_model)
    print_report("8 bits against bf16: products of random weights", {}, on_random)
    if options.json:
        write_json(options.json, found, [*on_model, *on_random])
    return int(any(row["share_of_bound"] > 1 for row in on_random))


if __name__ == "__main__":
    sys.exit(main())
