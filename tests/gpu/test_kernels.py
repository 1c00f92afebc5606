"""The device kernels compiled for the card at hand; without one `tests/kernels_device` interprets them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bench.device_cases import expert_case, latent_case, linear_case
from bench.gpu_flash import flash_case

pytestmark = pytest.mark.gpu

FORMATS = ("bf16", "fp8")
KINDS = ("int8", "fp8")


def captured(record: object) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    """A graph of one call, after a call that compiles what it launches."""
    assert callable(record)
    record()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = record()
    return graph, out


@pytest.mark.parametrize("row_format", FORMATS)
@pytest.mark.parametrize(
    ("lengths", "pages", "heads", "latent", "rope"),
    [
        ([150], 3, 4, 32, 16),
        ([300, 0, 77], 6, 5, 160, 16),
        ([1, 64, 65, 127, 128], 2, 17, 48, 8),
        ([9000], 141, 64, 512, 64),
        ([1, 4000, 0, 129], 63, 64, 512, 64),
    ],
)
def test_latent_attention(
    row_format: str, lengths: list[int], pages: int, heads: int, latent: int, rope: int
) -> None:
    case = latent_case(row_format, lengths, heads=heads, latent=latent, rope=rope, pages=pages, device="cuda")
    worst, norm = case.errors(case.run())
    assert worst <= 1
    assert norm <= 1


def test_every_code_of_fp8_is_exact_in_a_tensor_core() -> None:
    """Subnormals too. One row: its weight is 1, and what comes out is the row; scales are powers of two."""
    codes = torch.tensor([code for code in range(256) if code & 127 != 127], dtype=torch.uint8, device="cuda")
    case = latent_case("fp8", [1], heads=64, latent=256, rope=64, pages=1, device="cuda")
    row = case.rows[int(case.tables[0, 0]) * 64]
    row[: len(codes)] = codes
    row[256:264] = torch.tensor([0.5, 2.0**-20], device="cuda").view(torch.uint8)
    want = codes.view(torch.float8_e4m3fn).float()
    want[:128] *= 0.5
    want[128:] *= 2.0**-20
    assert torch.equal(case.run()[0, :, : len(codes)], want.expand(64, -1))


@pytest.mark.parametrize("row_format", FORMATS)
def test_a_captured_graph_reads_tables_and_lengths_anew(row_format: str) -> None:
    case = latent_case(row_format, [500, 70], heads=64, latent=512, rope=64, pages=8, device="cuda")
    graph, out = captured(case.run)
    for lengths in ([500, 70], [70, 500], [69, 13]):
        case.lengths.copy_(torch.tensor(lengths, dtype=torch.int32))
        if lengths[0] == 70:
            case.tables.copy_(case.tables.flip(0))
        graph.replay()
        torch.cuda.synchronize()
        worst, norm = case.errors(out)
        assert worst <= 1
        assert norm <= 1


@pytest.mark.parametrize(
    ("before", "n", "block", "sizes"),
    [
        (0, 1, 64, {"heads": 1, "nope": 32, "rope": 32, "value": 32}),
        (70, 200, 100, {"heads": 4, "nope": 32, "rope": 32, "value": 32}),
        (333, 137, 61, {"heads": 3, "nope": 14, "rope": 10, "value": 18}),
        (500, 90, 256, {"heads": 3, "nope": 192, "rope": 64, "value": 256}),
        (0, 300, 1000, {}),
        (1000, 333, 448, {}),
        (9000, 700, 5696, {"heads": 8}),
    ],
)
def test_attention_of_a_prefill(before: int, n: int, block: int, sizes: dict[str, int]) -> None:
    case = flash_case(before, n, block, device="cuda", **sizes)
    got = case.run()
    worst, norm = case.errors(got)
    assert worst <= 1
    assert norm <= 1
    assert torch.equal(case.run(), got)


def test_attention_of_a_prefill_far_beyond_two_to_the_31() -> None:
    """Values of keys lie as far as 2.1 * 2^31 behind the first: rows that no query may leave out."""
    before = 140_000
    case = flash_case(before, 3, before + 3, heads=128, device="cuda")
    few = slice(120, 123)
    one = replace(case, q=case.q[:, few], both=case.both[:, few].contiguous())
    got = case.run()[:, few]
    worst, norm = one.errors(got)
    assert worst <= 1
    assert norm <= 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("rows", "outputs", "inner"),
    [(1, 7, 36), (3, 100, 1028), (1, 576, 7168), (16, 1536, 7168), (33, 130, 260), (500, 2048, 7168)],
)
def test_linear8(kind: str, rows: int, outputs: int, inner: int) -> None:
    case = linear_case(kind, rows, outputs, inner, device="cuda")
    got = case.run()
    assert case.error(got) < 4e-6  # docs/numerics.md, at 7,168 columns
    assert torch.equal(case.run(), got)
    graph, out = captured(case.run)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, got)


@pytest.mark.parametrize(
    ("rows", "top_k", "slots", "hidden", "inter"),
    [
        (1, 1, 1, 32, 32),
        (5, 3, 7, 96, 64),
        (150, 2, 2, 64, 96),
        (8, 8, 10, 7168, 2048),
        (200, 4, 6, 7168, 2048),
    ],
)
def test_int4_experts(rows: int, top_k: int, slots: int, hidden: int, inter: int) -> None:
    case = expert_case(rows, top_k, slots, hidden, inter, absent=0.0 if rows == 1 else 0.3, device="cuda")
    got = case.run()
    assert case.error(got) < 3e-3
    graph, out = captured(case.run)
    # The same graph with other choices: each row's in the opposite order.
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, got)
    case.chosen.copy_(case.chosen.flip(1))
    case.weights.copy_(case.weights.flip(1))
    graph.replay()
    torch.cuda.synchronize()
    assert case.error(out) < 3e-3


def test_a_row_of_experts_is_the_same_bits_alone_or_among_others() -> None:
    case = expert_case(6, 3, 4, 96, 64, device="cuda")
    together = case.run()
    for t in range(6):
        one = slice(t, t + 1)
        alone = replace(case, x=case.x[one], chosen=case.chosen[one], weights=case.weights[one]).run()
        assert torch.equal(alone[0], together[t])
