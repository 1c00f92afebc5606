"""What FP8 latent rows cost in accuracy: the built-in model over chats that it did not learn from.

    python -m bench.latent_rows [--chats 12] [--json FILE]

Each chat is a prompt of the test side with the model's own greedy answer, tokens that it is sure of and
others. Every token's distribution with FP8 rows is compared with that of bf16 rows: Kullback-Leibler
divergence KL(bf16 ‖ other) in nats, and whether the likeliest token is the same. bf16 rows in other chunks
are compared as well: that much differs between two equally right computations.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.routing import requests
from k2hybrid.bench.report import Row, conditions, print_report, write_json
from k2hybrid.cache.pages import LatentPages
from k2hybrid.cache.rows import row_format
from k2hybrid.checkpoint.spec import ModelSpec, read_spec
from k2hybrid.config import MINI_MODEL, RuntimeConfig
from k2hybrid.model.batch import Batch, Span
from k2hybrid.native.machine import Machine
from k2hybrid.runtime import load
from k2hybrid.runtime.assembly import assemble
from k2hybrid.runtime.experts import native_experts
from k2hybrid.types import TokenEvent

CHUNK_ROWS = 256
OTHER_CHUNK_ROWS = 96  # absorbed instead of expanded where that is cheaper
CASES = (("fp8 rows", "fp8", CHUNK_ROWS), ("bf16 rows in other chunks", "bf16", OTHER_CHUNK_ROWS))


def chats(count: int, threads: int) -> list[list[int]]:
    """Token ids of prompts and greedy answers."""
    found = []
    with load(threads=threads, idle_prefill=False) as model:
        for request in itertools.islice(requests(seed=11), count):
            prompt = model.template.render(request.messages, request.tools).ids
            run = model.generate(prompt, request.sampling, request.max_tokens)
            found.append([*prompt, *(event.token for event in run if isinstance(event, TokenEvent))])
    return found


class Scorer:
    """The built-in model with latent rows of one format.

    Args:
        rows: "bf16" or "fp8".
        longest: tokens of the longest chat.
    """

    def __init__(self, spec: ModelSpec, machine: Machine, rows: str, longest: int) -> None:
        row = row_format(rows, spec.kv_lora_rank, spec.qk_rope_head_dim)
        self._pages = LatentPages(spec.num_layers, -(-longest // LatentPages.PAGE_TOKENS), row)
        self._table = torch.tensor(self._pages.allocate(self._pages.free_pages))
        config = RuntimeConfig()
        experts = native_experts(config, spec, machine, max_rows=CHUNK_ROWS)
        self._checkpoint, self._network = assemble(
            MINI_MODEL,
            spec,
            machine,
            experts,
            self._pages,
            latent_norm_eps=config.latent_norm_eps,
            metered=lambda parts: parts,
        )

    def log_probabilities(self, ids: Sequence[int], chunk: int) -> torch.Tensor:
        """fp64 [tokens, vocab] of what follows each token of a chat, prefilled `chunk` tokens at a time."""
        out = []
        for start in range(0, len(ids), chunk):
            some = torch.tensor(ids[start : start + chunk])
            n = len(some)
            batch = Batch(
                some,
                torch.arange(start, start + n),
                (Span(start, n, self._table),),
                torch.arange(n),
            )
            out.append(self._network.logits(self._network.forward(self._network.begin(batch))))
        return torch.cat(out).double().log_softmax(-1)


def compare(texts: list[list[int]], machine: Machine) -> list[Row]:
    """One row a case."""
    spec = read_spec(MINI_MODEL)
    longest = max(map(len, texts))
    scorers = {name: Scorer(spec, machine, name, longest) for name in ("bf16", "fp8")}
    found: dict[str, list[torch.Tensor]] = {name: [] for name, _, _ in CASES}
    for ids in texts:
        wanted = scorers["bf16"].log_probabilities(ids, CHUNK_ROWS)
        best, second = wanted.topk(2).values.unbind(-1)
        following = torch.tensor(ids[1:])[:, None]
        for name, rows, chunk in CASES:
            other = scorers[rows].log_probabilities(ids, chunk)
            divergence = (wanted.exp() * (wanted - other)).sum(-1)
            same = (wanted.argmax(-1) == other.argmax(-1)).double()
            lost = (wanted[:-1].gather(1, following) - other[:-1].gather(1, following)).squeeze(1)
            lost = torch.cat((lost, lost.new_zeros(1)))  # nothing follows the last token
            found[name].append(torch.stack((divergence, same, lost, (best - second).exp())))
    made: list[Row] = []
    for name, _, _ in CASES:
        divergence, same, lost, ratio = torch.cat(found[name], dim=1)
        sure = ratio >= 2  # the likeliest token is twice as likely as the next
        made.append(
            {
                "case": name,
                "tokens": divergence.numel(),
                "mean_kl": divergence.mean().item(),
                "p99_kl": divergence.quantile(0.99).item(),
                "same_top_1": same.mean().item(),
                "same_top_1_where_sure": same[sure].mean().item(),
                "sure": sure.double().mean().item(),
                "nats_lost_per_token": lost.mean().item(),
            }
        )
    return made


def main() -> int:
    """Run the comparison."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--chats", type=int, default=12)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    machine = Machine(options.threads)
    texts = chats(options.chats, options.threads)
    with torch.no_grad():
        rows = compare(texts, machine)
    found = conditions(machine, chats=len(texts), chunk_rows=CHUNK_ROWS, other_chunk_rows=OTHER_CHUNK_ROWS)
    print_report("FP8 against bf16 latent rows", found, rows)
    if options.json:
        write_json(options.json, found, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
