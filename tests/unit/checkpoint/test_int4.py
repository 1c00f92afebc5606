"""The INT4 reference: nibble order, offset binary, and agreement with compressed-tensors."""

from __future__ import annotations

import pytest
import torch

from k2hybrid.checkpoint import int4
from k2hybrid.errors import TensorError


def every_value(rows: int, columns: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(-8, 8, (rows, columns), generator=generator, dtype=torch.int8)


def test_first_element_is_the_lowest_nibble_as_offset_binary() -> None:
    q = torch.tensor([[-8, 7, 0, -1, 1, 2, 3, 4]], dtype=torch.int8)
    packed = int4.pack(q)
    assert packed.view(torch.uint8).tolist() == [[0xF0, 0x78, 0xA9, 0xCB]]
    assert packed.dtype == torch.int32
    assert packed.shape == (1, 1)


def test_unpack_inverts_pack() -> None:
    q = every_value(5, 96)
    assert set(q.flatten().tolist()) == set(range(-8, 8))
    assert torch.equal(int4.unpack(int4.pack(q)), q)


def test_dequantize_takes_the_scale_of_the_element_s_own_group() -> None:
    q = torch.full((1, 96), 2, dtype=torch.int8)
    scale = torch.tensor([[1.0, 0.5, -4.0]], dtype=torch.bfloat16)
    expected = [2.0] * 32 + [1.0] * 32 + [-8.0] * 32
    assert int4.dequantize(int4.pack(q), scale).tolist() == [expected]


def test_quantize_errs_by_half_a_step_at_most() -> None:
    weight = torch.randn(16, 128, generator=torch.Generator().manual_seed(2))
    weight[3, 32:64] = 0
    packed, scale = int4.quantize(weight)
    step = scale.float().repeat_interleave(32, dim=1)
    error = (int4.dequantize(packed, scale) - weight).abs()
    # bf16 rounds the scale by 2^-9 at most, so amax may lie 7 · 2^-9 steps beyond the last value.
    assert bool((error <= step * (0.5 + 7 * 2**-8)).all())
    assert int4.unpack(packed).abs().max() == 7
    assert torch.equal(int4.dequantize(packed, scale)[3, 32:64], torch.zeros(32))


def test_same_bytes_as_compressed_tensors() -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    q = every_value(24, 160)
    packed = int4.pack(q)
    assert torch.equal(helpers.pack_to_int32(q, num_bits=4), packed)
    assert torch.equal(helpers.unpack_from_int32(packed, 4, q.shape), q)


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(TensorError, match="int8"):
        int4.pack(torch.zeros(2, 8))
    with pytest.raises(TensorError, match="multiple of 8"):
        int4.pack(torch.zeros(2, 12, dtype=torch.int8))
    with pytest.raises(TensorError, match="−8…7"):
        int4.pack(torch.full((1, 8), 8, dtype=torch.int8))
    with pytest.raises(TensorError, match="int32"):
        int4.unpack(torch.zeros(2, 8))
    with pytest.raises(TensorError, match="groups"):
        int4.dequantize(torch.zeros(2, 8, dtype=torch.int32), torch.ones(3, 2, dtype=torch.bfloat16))
    with pytest.raises(TensorError, match="multiple of 32"):
        int4.quantize(torch.zeros(2, 40))
