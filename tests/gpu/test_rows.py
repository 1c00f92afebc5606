"""The kernels between a device's products on the card at hand, and in a captured graph."""

from __future__ import annotations

import pytest
import torch

from k2hybrid.kernels import rows
from k2hybrid.kernels.split import split
from tests import row_checks

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("n", [*row_checks.WIDTHS, 18432])
def test_rms_norm(n: int) -> None:
    row_checks.check_rms_norm("cuda", n)


@pytest.mark.parametrize("n", [1, 33, 2048, 18432])
def test_swiglu(n: int) -> None:
    row_checks.check_swiglu("cuda", n)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("experts", "top_k"), row_checks.CHOICES)
def test_choose(experts: int, top_k: int, normalize: bool) -> None:
    row_checks.check_choose("cuda", experts, top_k, normalize)


def test_ties_and_what_is_no_number() -> None:
    row_checks.check_ties("cuda")
    row_checks.check_lost_logits("cuda")


@pytest.mark.parametrize(("heads", "nope", "rope", "latent"), row_checks.ATTENTIONS)
def test_prepare_attention(heads: int, nope: int, rope: int, latent: int) -> None:
    row_checks.check_prepare_attention("cuda", heads, nope, rope, latent)


@pytest.mark.parametrize(("latent", "rope"), row_checks.LATENTS)
def test_fp8_rows(latent: int, rope: int) -> None:
    row_checks.check_fp8_rows("cuda", latent, rope)


@pytest.mark.parametrize(("experts", "count", "top_k"), row_checks.SPLITS)
def test_split(experts: int, count: int, top_k: int) -> None:
    row_checks.check_split("cuda", experts, count, top_k)


def test_no_rows_and_refusals() -> None:
    row_checks.check_no_rows("cuda")
    row_checks.check_refusals("cuda")


def test_a_captured_graph_gives_the_same_bits() -> None:
    """Of all of them at Kimi-K2's sizes, for other contents of the same memory."""
    hidden, weight = row_checks.random(8, 7168).cuda(), row_checks.random(7168, seed=1).cuda()
    logits, bias = row_checks.random(8, 384).cuda(), row_checks.random(384, seed=1).cuda() * 0.1
    q, kv, norm = (row_checks.random(*s).cuda() for s in ((8, 64, 192), (8, 576), (512,)))
    cos, sin = torch.ones(8, 1, 32).cuda(), torch.zeros(8, 1, 32).cuda()
    slots, stored = torch.arange(8).cuda(), torch.zeros(8, 656, dtype=torch.uint8).cuda()
    table = torch.arange(-1, 384, dtype=torch.int32).cuda()
    limits, counts = torch.arange(65, dtype=torch.int32).cuda(), torch.zeros(384).cuda()

    def all_of_them() -> list[torch.Tensor]:
        made = [rows.rms_norm(hidden, weight, 1e-6), rows.swiglu(hidden, hidden)]
        ids, weights = rows.choose(logits, bias, 8, normalize=True, scale=2.8)
        q_nope, q_rope, latents = rows.prepare_attention(q, kv, norm, 1e-6, cos, sin)
        rows.store_fp8(latents, slots, stored, latent=512, group=128, exponents=(-117, 7))
        return [*made, ids, weights, q_nope, q_rope, *split(ids, table, limits, counts, 1.0), stored.clone()]

    all_of_them()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = all_of_them()
    for given in (hidden, logits, q, kv):
        given.copy_(given.flip(0) * 0.5)
    graph.replay()
    for again, now in zip(recorded, all_of_them(), strict=True):
        assert torch.equal(again, now)
