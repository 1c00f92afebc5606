"""Products on a device, torch's own in bf16 with fp32 results, and what is done to rows between them."""

from __future__ import annotations

import torch

from k2hybrid.checkpoint.dense8 import dequantize
from k2hybrid.kernels import rows
from k2hybrid.kernels.linear8 import linear8
from k2hybrid.model import layers, router
from k2hybrid.model.rope import Rotation, rotate
from k2hybrid.types import LinearWeight, Weight8


class DeviceRows:
    """`RowKernels` of a device: a launch each, since launches are what a recorded step takes.

    Where there is no card, torch plays them.
    """

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """See `RowKernels.rms_norm`."""
        if x.is_cuda:
            return rows.rms_norm(x, weight, eps)
        return layers.rms_norm(x, weight, eps, torch.bfloat16)

    def swiglu(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """See `RowKernels.swiglu`."""
        if gate.is_cuda:
            return rows.swiglu(gate, up)
        return layers.swiglu(gate.clone(), up, [slice(None)], torch.bfloat16)

    def choose(
        self, logits: torch.Tensor, bias: torch.Tensor, top_k: int, *, normalize: bool, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `RowKernels.choose`."""
        if logits.is_cuda:
            return rows.choose(logits, bias, top_k, normalize=normalize, scale=scale)
        scores = torch.sigmoid(logits)
        ids = router.best(scores + bias, top_k)
        weights = router.scaled(scores.gather(1, ids), normalize=normalize, scale=scale)
        return ids.to(torch.int32), weights.masked_fill_(logits.isnan().any(1, keepdim=True), torch.nan)

    def prepare_attention(
        self,
        q: torch.Tensor,
        kv: torch.Tensor,
        norm: torch.Tensor,
        eps: float,
        cos: torch.Tensor,
        sin: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See `RowKernels.prepare_attention`."""
        if q.is_cuda:
            return rows.prepare_attention(q, kv, norm, eps, cos, sin)
        latent, heads = norm.shape[0], q.shape[1]
        nope = q.shape[2] - 2 * cos.shape[2]
        # The key's rotary part is rotated as one more head.
        both = torch.cat((q[..., nope:], kv[:, None, latent:]), dim=1)
        rotary = rotate(both, Rotation(cos, sin)).bfloat16()
        return (
            q[..., :nope].bfloat16(),
            rotary[:, :heads],
            torch.cat((self.rms_norm(kv[:, :latent], norm, eps), rotary[:, heads]), dim=-1),
        )


class DeviceLinears:
    """`LinearKernels` of a device. Sums are fp32, in the order that the device's libraries choose.

    On a CPU, which plays the device in tests, operands are widened: torch has no bf16 product with an fp32
    result there.
    """

    rows = DeviceRows()

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
