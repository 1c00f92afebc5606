"""Records a routing trace of a model with early router look-ahead, from chats written for the built-in model.

    python -m bench.routing mini.trace [--passes 2000] [--ahead 8] [--look next|own]

While layer l's experts work, the router of the next MoE layer is asked what it would choose for the input of
layer l's experts; its best `--ahead` ids a row go into the trace beside the choices. `next`: the input is
scaled as layer l+1's norm would; `own`: it is taken as it is.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from k2hybrid import __version__
from k2hybrid.checkpoint.spec import ModelSpec, read_spec
from k2hybrid.config import MINI_MODEL, RuntimeConfig
from k2hybrid.engine.step import StepModel
from k2hybrid.experts.recorder import TraceWriter
from k2hybrid.experts.traces import TraceHeader
from k2hybrid.mini_eval.cases import author_of, draw
from k2hybrid.mini_eval.play import opening
from k2hybrid.model.kimi import Kimi
from k2hybrid.model.moe import MoE
from k2hybrid.model.router import Router, choose
from k2hybrid.runtime.loading import open_runtime
from k2hybrid.runtime.watched import WatchedModel
from k2hybrid.types import ChatRequest, Message, RoutedExperts, SamplingParams, Ticket, ToolCall

CASES = 50  # drawn at once


class LookAhead:
    """`RoutedExperts` of one layer: notes its ids, and what the next layer's router makes of its input."""

    def __init__(
        self,
        experts: RoutedExperts,
        writer: TraceWriter,
        following: tuple[int, Router, torch.Tensor | None] | None,
    ) -> None:
        self._experts = experts
        self._writer = writer
        self._following = following

    def submit(self, layer: int, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> Ticket:
        """See `RoutedExperts.submit`."""
        ticket = self._experts.submit(layer, x, ids, weights)
        self._writer.routed(layer, ids.numpy())
        if self._following is not None:
            at, router, scale = self._following
            seen = x if scale is None else (x.float() * scale).to(x.dtype)
            wider = dataclasses.replace(router.spec, top_k=self._writer.header.ahead)
            foreseen = choose(torch.sigmoid(router.linear(seen)), router.bias, wider)
            self._writer.ahead(at, foreseen.to(torch.int32).numpy())
        return ticket


def record(network: Kimi, writer: TraceWriter, *, scaled: bool) -> None:
    """Put a `LookAhead` before the experts of every MoE layer.

    scaled: the look-ahead scales what it sees as the next layer's norm would.
    """
    layers = [(at, layer) for at, layer in enumerate(network.layers) if isinstance(layer.feed_forward, MoE)]
    for (_, layer), after in zip(layers, [*layers[1:], None], strict=True):
        following = None
        if after is not None:
            at, next_layer = after
            assert isinstance(next_layer.feed_forward, MoE)
            scale = next_layer.post_norm.weight / layer.post_norm.weight if scaled else None
            following = (at, next_layer.feed_forward.router, scale)
        assert isinstance(layer.feed_forward, MoE)
        layer.feed_forward.experts = LookAhead(layer.feed_forward.experts, writer, following)


def header_of(model: Path, spec: ModelSpec, ahead: int) -> TraceHeader:
    """Of a trace of this model."""
    weights = 3 * spec.hidden_size * spec.moe_intermediate_size
    return TraceHeader(
        model.resolve().name,
        spec.num_layers,
        spec.num_experts,
        spec.top_k,
        f"k2hybrid {__version__}, bench.routing",
        expert_bytes=weights // 2 + weights // spec.group_size * 2,
        ahead=ahead,
    )


def requests(seed: int) -> Iterator[ChatRequest]:
    """First replies to conversations of every kind: with tools and without."""
    author = author_of(None)
    cases = (case for batch in itertools.count() for case in draw(author, seed + batch, CASES))
    for count, case in enumerate(cases):
        yield ChatRequest(
            tuple(map(_message, opening(case))),
            case.tools,
            sampling=SamplingParams(temperature=0.0),
            max_tokens=256,
            store=False,
            request_id=f"chat-{count}",
        )


def _message(fields: dict[str, Any]) -> Message:
    calls = tuple(
        ToolCall(call["id"], call["function"]["name"], call["function"]["arguments"])
        for call in fields.get("tool_calls", ())
    )
    return Message(
        fields["role"],
        fields["content"],
        name=fields.get("name"),
        reasoning=fields.get("reasoning_content"),
        tool_calls=calls,
        tool_call_id=fields.get("tool_call_id"),
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="a new file")
    parser.add_argument("--model", type=Path, default=MINI_MODEL)
    parser.add_argument(
        "--passes", type=int, default=2000, help="tokens to be generated, in one chat at a time"
    )
    parser.add_argument("--ahead", type=int, default=8, help="ids a row that are foreseen")
    parser.add_argument("--look", choices=("next", "own"), default="next")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--threads", type=int, default=None)
    args = parser.parse_args()
    spec = read_spec(args.model)
    writer = TraceWriter(args.out, header_of(args.model, spec, args.ahead))

    def wrapped(network: StepModel) -> StepModel:
        assert isinstance(network, WatchedModel)
        kimi = network.model
        assert isinstance(kimi, Kimi)
        record(kimi, writer, scaled=args.look == "next")
        return network

    config = RuntimeConfig(model=args.model, threads=args.threads, idle_prefill=False)
    generated = chats = 0
    with open_runtime(config, wrapped=wrapped) as runtime:
        for request in requests(args.seed):
            if generated >= args.passes:
                break
            answer = runtime.chat(request)
            for _ in answer:
                pass
            generated += answer.usage.completion_tokens
            chats += 1
    writer.close()
    print(f"{generated} tokens of {chats} chats: {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
