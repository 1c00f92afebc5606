"""What is done to rows between products, and the split of experts: against float64 and torch."""

from __future__ import annotations

import pytest
import torch

from k2hybrid.cache.rows import Fp8Rows
from k2hybrid.kernels import rows
from k2hybrid.model.linears import DeviceLinears
from k2hybrid.native.machine import Machine
from tests import row_checks
from tests.golden_model.tiny import batch_of, random_ids, tiny_checkpoint, tiny_model

# What overflows, or multiplies an infinity, is meant to: a card says nothing of it.
pytestmark = pytest.mark.filterwarnings(
    "ignore:overflow encountered:RuntimeWarning", "ignore:invalid value encountered:RuntimeWarning"
)


@pytest.mark.parametrize("n", row_checks.WIDTHS)
def test_rms_norm(n: int) -> None:
    row_checks.check_rms_norm("cpu", n)


@pytest.mark.parametrize("n", [1, 33, 512, 1024, 2048, 2500])
def test_swiglu(n: int) -> None:
    row_checks.check_swiglu("cpu", n)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("experts", "top_k"), row_checks.CHOICES)
def test_choose(experts: int, top_k: int, normalize: bool) -> None:
    row_checks.check_choose("cpu", experts, top_k, normalize)


def test_equal_scores_go_to_the_lower_expert() -> None:
    row_checks.check_ties("cpu")


def test_what_is_no_number_still_chooses_different_experts() -> None:
    row_checks.check_lost_logits("cpu")


@pytest.mark.parametrize(("heads", "nope", "rope", "latent"), row_checks.ATTENTIONS)
def test_prepare_attention(heads: int, nope: int, rope: int, latent: int) -> None:
    row_checks.check_prepare_attention("cpu", heads, nope, rope, latent)


@pytest.mark.parametrize(("latent", "rope"), row_checks.LATENTS)
def test_fp8_rows(latent: int, rope: int) -> None:
    row_checks.check_fp8_rows("cpu", latent, rope)


@pytest.mark.parametrize(("experts", "count", "top_k"), row_checks.SPLITS)
def test_split(experts: int, count: int, top_k: int) -> None:
    row_checks.check_split("cpu", experts, count, top_k)


def test_no_rows() -> None:
    row_checks.check_no_rows("cpu")


def test_what_they_do_not_take() -> None:
    row_checks.check_refusals("cpu")


def test_they_choose_as_the_cpu_does() -> None:
    """The same experts, since no two scores are as near as both may err; and all but the same of the rest."""
    cpu = Machine(1).rows
    logits, bias = row_checks.random(30, 384) * 2, row_checks.random(384, seed=1) * 0.1
    biased = (logits.double().sigmoid() + bias.double()).sort(descending=True).values[:, :9]
    apart = (biased.diff().abs() > row_checks.SCORES).all(1)
    assert apart.sum() > 20
    ours = rows.choose(logits, bias, 8, normalize=True, scale=2.827)
    theirs = cpu.choose(logits, bias, 8, normalize=True, scale=2.827)
    assert torch.equal(ours[0][apart], theirs[0][apart])
    torch.testing.assert_close(ours[1][apart], theirs[1][apart], rtol=5e-6, atol=0)
    x, weight = row_checks.random(5, 300), row_checks.random(300, seed=1)
    for got, want in (
        (rows.rms_norm(x, weight, 1e-6), cpu.rms_norm(x, weight, 1e-6)),
        (rows.swiglu(x, x * 2), cpu.swiglu(x, x * 2)),
    ):
        # Almost all round to the same neighbour.
        assert (got != want).double().mean() < 0.01
        torch.testing.assert_close(got, want, rtol=2.0**-7, atol=0)


class Launched(DeviceLinears):
    """A device's products on the CPU; between them the kernels themselves."""

    rows = rows  # type: ignore[assignment]  # a module has them too


class LaunchedRows(Fp8Rows):
    """FP8 rows, stored by the kernel."""

    def put(self, rows_: torch.Tensor, slots: torch.Tensor, stored: torch.Tensor) -> None:
        rows.store_fp8(rows_, slots, stored, latent=self.latent, group=128, exponents=(-117, 7))


@pytest.mark.parametrize(
    ("name", "stored"), [("k2", "bf16"), ("wide_latent", "bf16"), ("beta_fast_32_odd_sizes", "fp8")]
)
def test_a_network_says_the_same(name: str, stored: str) -> None:
    """A prefill and a token behind it, beside torch between the products: few roundings fall otherwise."""
    logits = []
    for kernels, form in ((DeviceLinears(), Fp8Rows), (Launched(), LaunchedRows)):
        checkpoint = tiny_checkpoint(name)
        spec = checkpoint.spec
        rows_ = form(spec.kv_lora_rank, spec.qk_rope_head_dim) if stored == "fp8" else None
        model = tiny_model(checkpoint, torch.bfloat16, kernels=kernels, rows=rows_)
        table = model.table(7)
        said = [model.run(batch_of([(ids, start, table)])) for ids, start in (
            (random_ids(spec, 6), 0), (torch.tensor([5]), 6)
        )]  # fmt: skip
        logits.append(torch.cat(said))
    distance = (logits[1] - logits[0]).norm(dim=-1) / logits[0].norm(dim=-1)
    assert bool((distance <= 0.012).all())  # docs/numerics.md, "A small model on a device"
