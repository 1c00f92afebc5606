"""The recorded look-ahead is what the next layer's router says of this layer's input."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench.routing import header_of, record, requests
from k2hybrid.checkpoint.spec import read_spec
from k2hybrid.config import MINI_MODEL, RuntimeConfig
from k2hybrid.experts.recorder import TraceWriter
from k2hybrid.experts.traces import read_trace
from k2hybrid.model.kimi import Kimi
from k2hybrid.model.moe import MoE
from k2hybrid.runtime.loading import open_runtime
from k2hybrid.types import RoutedExperts, Ticket


class Seen:
    """Keeps what the experts are given."""

    def __init__(self, experts: RoutedExperts, kept: list[tuple[int, torch.Tensor, torch.Tensor]]) -> None:
        self.experts = experts
        self.kept = kept

    def submit(self, layer: int, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> Ticket:
        self.kept.append((layer, x.float().clone(), ids.clone()))
        return self.experts.submit(layer, x, ids, weights)


@pytest.mark.parametrize("scaled", [False, True])
def test_routes_and_look_ahead_of_the_built_in_model(tmp_path: Path, scaled: bool) -> None:
    kept: list[tuple[int, torch.Tensor, torch.Tensor]] = []
    spec = read_spec(MINI_MODEL)
    writer = TraceWriter(tmp_path / "t", header_of(MINI_MODEL, spec, 6))
    networks: list[Kimi] = []

    def wrapped(watched: Any) -> Any:
        network = watched.model
        networks.append(network)
        for layer in network.layers:
            if isinstance(layer.feed_forward, MoE):
                layer.feed_forward.experts = Seen(layer.feed_forward.experts, kept)
        record(network, writer, scaled=scaled)
        return watched

    with open_runtime(RuntimeConfig(threads=1, idle_prefill=False), wrapped=wrapped) as runtime:
        for request in itertools.islice(requests(1), 3):
            for _ in runtime.chat(request):
                pass
        routers = {
            at: (layer.feed_forward.router, layer.post_norm.weight)
            for at, layer in enumerate(networks[0].layers)
            if isinstance(layer.feed_forward, MoE)
        }
        weights = {
            at: (router.linear.weight.float().clone(), router.bias.clone(), norm.clone())
            for at, (router, norm) in routers.items()
        }
    writer.close()
    trace = read_trace(tmp_path / "t")
    assert trace.complete
    assert len(trace) == len(kept) > 20
    assert trace.layer.tolist() == [layer for layer, _, _ in kept]
    assert trace.header.expert_bytes * spec.num_experts * 4 == 16 * 4 * 31104
    for at, (layer, x, ids) in enumerate(kept):
        got = trace.ids[trace.starts[at] : trace.starts[at + 1]]
        assert got.tolist() == ids.flatten().tolist()
        ahead = trace.ahead_ids[trace.ahead_starts[at] : trace.ahead_starts[at + 1]].reshape(-1, 6)
        if layer == spec.num_layers - 1:
            assert trace.ahead_layer[at] == -1
            continue
        assert trace.ahead_layer[at] == layer + 1
        weight, bias, norm = weights[layer + 1]
        if scaled:
            x = (x * (norm / weights[layer][2])).to(torch.bfloat16).float()
        scores = torch.sigmoid(x @ weight.T) + bias
        best = scores.gather(1, torch.from_numpy(ahead.astype(np.int64)))
        # In falling order, and none of the others is better; sums in another order may swap equals.
        assert (best[:, :-1] >= best[:, 1:] - 1e-5).all()
        assert torch.allclose(best, scores.topk(6).values, atol=1e-5)
