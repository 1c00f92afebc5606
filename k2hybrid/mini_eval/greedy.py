"""The same prompts as raw ids through transformers with a plain greedy loop: do the same ids come out?

Ids come from the runtime that the server runs, given the ids that the server's /tokenize makes of the
prompts. The server itself is held to them by the number of tokens it says it made, and by their text.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from k2hybrid.checkpoint.spec import read_spec
from k2hybrid.errors import ReplyError
from k2hybrid.mini_eval import deepseek
from k2hybrid.mini_eval.client import Client, Reply, at_once
from k2hybrid.mini_eval.conversation import Conversation
from k2hybrid.mini_eval.play import opening
from k2hybrid.runtime import load
from k2hybrid.types import SamplingParams, TokenEvent

_LATENT_BYTES = 1 << 27  # one conversation at a time


@dataclass(frozen=True)
class Comparison:
    """One prompt: whether the runtime's ids and the server's text are transformers'; what differs, if not.

    `lead`: of transformers' choice over its second best, where the ids first differ. A small one is a tie
    that rounding decides: the runtime computes in bf16, this oracle in fp32.
    """

    case: Conversation
    same_ids: bool
    same_text: bool
    lead: float | None
    difference: str


def compare(
    client: Client,
    folder: Path,
    cases: Sequence[Conversation],
    limit: int,
    threads: int | None,
) -> list[Comparison]:
    """Each case's first reply, by the server, by the runtime in this process and by transformers in fp32."""

    def ask(case: Conversation) -> tuple[list[int], Reply | str]:
        messages = opening(case)
        ids = client.tokenize(messages, case.tools)
        try:
            return ids, client.chat(messages, case.tools, temperature=0, max_tokens=limit)
        except ReplyError as error:
            return ids, str(error)

    # One at a time, as the runtime below gets them: so both prefill in the same chunks.
    asked = at_once(ask, cases, 1, "prompts through the server")
    ends = frozenset(read_spec(folder).eos_token_ids)
    options = {} if threads is None else {"threads": threads}
    with load(folder, latent_bytes=_LATENT_BYTES, context_tokens=1 << 15, **options) as runtime:
        greedy = SamplingParams(temperature=0.0)

        def generate(ids: list[int]) -> list[int]:
            run = runtime.generate(ids, greedy, limit, ends)
            return [event.token for event in run if isinstance(event, TokenEvent)]

        ours = [generate(ids) for ids, _ in asked]
        model = deepseek.load(folder)
        if threads is not None:
            torch.set_num_threads(threads)
        prompts = [ids for ids, _ in asked]
        theirs = at_once(lambda ids: continued(model, ids, ends, limit), prompts, 1, "through transformers")
        found = []
        for case, (_, reply), mine, (ids, gaps) in zip(cases, asked, ours, theirs, strict=True):
            text = runtime.tokenizer.decode(ids)
            said = _is_said(reply, ids, text)
            lead, difference = _difference(mine, ids, gaps, text, reply)
            found.append(Comparison(case, mine == ids, said, lead, difference))
    return found


@torch.no_grad()
def continued(
    model: Any, ids: Sequence[int], ends: Collection[int], limit: int
) -> tuple[list[int], list[float]]:
    """The plain greedy loop: new ids up to an end or the limit, and by how much each led."""
    new: list[int] = []
    gaps: list[float] = []
    fed, cache = torch.tensor([list(ids)]), None
    while len(new) < limit and not (new and new[-1] in ends):
        out = model(input_ids=fed, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        best = out.logits[0, -1].topk(2)
        new.append(int(best.indices[0]))
        gaps.append(float(best.values[0] - best.values[1]))
        fed = torch.tensor([new[-1:]])
    return new, gaps


def _is_said(reply: Reply | str, ids: Sequence[int], text: str) -> bool:
    """Whether the reply has as many tokens as `ids`, and all its parts stand in their text in order."""
    if isinstance(reply, str) or reply.completion_tokens != len(ids):
        return False
    calls = reply.message.get("tool_calls") or ()
    parts = [reply.reasoning, reply.content]
    for call in calls:
        parts += [call["function"]["name"], call["function"]["arguments"]]
    at = 0
    for part in parts:
        at = text.find(part, at)
        if at < 0:
            return False
        at += len(part)
    return True


def _difference(
    mine: Sequence[int], ids: Sequence[int], gaps: Sequence[float], text: str, reply: Reply | str
) -> tuple[float | None, str]:
    for at, (one, other) in enumerate(zip(mine, ids, strict=False)):
        if one != other:
            told = f"token {at}: {one}, by transformers {other}, which led by {gaps[at]:.3g} there"
            return gaps[at], told
    if len(mine) != len(ids):
        return None, f"{len(mine)} tokens, by transformers {len(ids)}"
    return (
        None,
        f"the server said {reply if isinstance(reply, str) else reply.message}; transformers {text!r}",
    )
