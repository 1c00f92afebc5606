"""Products on a device: torch's own in bf16 with fp32 results."""

from __future__ import annotations

import torch

from k2hybrid.checkpoint.dense8 import dequantize
from k2hybrid.kernels.linear8 import linear8
from k2hybrid.types import LinearWeight, Weight8


class DeviceLinears:
    """`LinearKernels` of a device. Sums are fp32, in the order that the device's libraries choose.

    On a CPU, which plays the device in tests, operands are widened: torch has no bf16 product with an fp32
    result there.
    """

    def linear(self, x: torch.Tensor, weight: LinearWeight) -> torch.Tensor:
        """See `LinearKernels.linear`."""
        if x.device.type == "cpu":
            return x.float() @ (dequantize(weight) if isinstance(weight, Weight8) else weight.float()).T
        if isinstance(weight, Weight8):
            return linear8(x, weight)
        return torch.mm(x, weight.T, out_dtype=torch.float32)

    def head_linear(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """See `LinearKernels.head_linear`."""
        return self._by_head(x, weight.transpose(1, 2))

    def head_linear_t(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """See `LinearKernels.head_linear_t`."""
        return self._by_head(x, weight)

    def _by_head(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        by_head = x.transpose(0, 1)
        if x.device.type == "cpu":
            return torch.bmm(by_head.float(), weight.float()).transpose(0, 1).contiguous()
        return torch.bmm(by_head, weight, out_dtype=torch.float32).transpose(0, 1).contiguous()
