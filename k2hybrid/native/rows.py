"""What the CPU does to rows between products: checks tensors at the border, see `csrc/cpu/rows.h`."""

from __future__ import annotations

from typing import Any

import torch

from k2hybrid.errors import NativeError
from k2hybrid.native.extension import ERRORS
from k2hybrid.native.tensors import require_fp32

MOST_CHOSEN = 64  # experts of a row; kMostChosen


class NativeRows:
    """Norms, SwiGLU, the choice of experts, rotation. A row's bits never depend on the other rows.

    Args:
        handle: of the `Machine` whose kernels and pool do it.

    All methods raise NativeError where types or shapes do not fit.
    """

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """x fp32 [T, n] (row stride free), weight fp32 [n] -> bf16 [T, n]: x / rms(x) · weight."""
        require_fp32("x", x, 2)
        require_fp32("weight", weight, 1)
        rows, n = x.shape
        if weight.shape[0] != n or not n:
            raise NativeError(f"rms_norm: x {list(x.shape)} does not fit weight {list(weight.shape)}")
        out = torch.empty(rows, n, dtype=torch.bfloat16)
        with ERRORS:
            self._handle.rms_norm(x.data_ptr(), rows, x.stride(0), weight.data_ptr(), eps, n, out.data_ptr())
        return out

    def swiglu(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """gate and up fp32 [T, n] -> bf16 [T, n]: silu(gate) · up."""
        for name, x in (("gate", gate), ("up", up)):
            require_fp32(name, x, 2, whole=True)
        if gate.shape != up.shape:
            raise NativeError(f"swiglu: gate {list(gate.shape)} does not fit up {list(up.shape)}")
        rows, n = gate.shape
        out = torch.empty(rows, n, dtype=torch.bfloat16)
        with ERRORS:
            self._handle.swiglu(gate.data_ptr(), up.data_ptr(), rows, n, out.data_ptr())
        return out

    def choose(
        self, logits: torch.Tensor, bias: torch.Tensor, top_k: int, *, normalize: bool, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The experts with the greatest sigmoid(logits) + bias, best first, equal ones by number.

        Args:
            logits: fp32 [T, experts].
            bias: fp32 [experts].
            normalize: divide the weights by their sum.
            scale: of the weights.

        Returns:
            ids int32 [T, top_k], weights fp32 [T, top_k]: the sigmoids; NaN where a logit of the row is.
        """
        require_fp32("logits", logits, 2, whole=True)
        require_fp32("bias", bias, 1)
        rows, experts = logits.shape
        if bias.shape[0] != experts or not 0 < top_k <= min(experts, MOST_CHOSEN):
            raise NativeError(
                f"choose: {top_k} of {experts} experts (at most {MOST_CHOSEN}), bias {list(bias.shape)}"
            )
        ids = torch.empty(rows, top_k, dtype=torch.int32)
        weights = torch.empty(rows, top_k, dtype=torch.float32)
        with ERRORS:
            self._handle.choose(
                logits.data_ptr(), bias.data_ptr(), rows, experts, top_k, normalize, scale,
                ids.data_ptr(), weights.data_ptr(),
            )  # fmt: skip
        return ids, weights

    def prepare_attention(
        self,
        q: torch.Tensor,
        kv: torch.Tensor,
        norm: torch.Tensor,
        eps: float,
        cos: torch.Tensor,
        sin: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Turn the rotary parts of queries and keys, norm the latents, and round all to bf16.

        Args:
            q: fp32 [T, heads, nope + rope].
            kv: fp32 [T, latent + rope].
            norm: fp32 [latent].
            cos, sin: fp32 [T, 1, rope / 2], of each row's angles.

        Returns:
            bf16 [T, heads, nope], [T, heads, rope] and [T, latent + rope].
        """
        require_fp32("q", q, 3, whole=True)
        require_fp32("kv", kv, 2, whole=True)
        require_fp32("norm", norm, 1)
        require_fp32("cos", cos, 3, whole=True)
        require_fp32("sin", sin, 3, whole=True)
        rows, heads, width = q.shape
        latent, rope = norm.shape[0], 2 * cos.shape[2]
        fits = kv.shape == (rows, latent + rope) and cos.shape == sin.shape == (rows, 1, rope // 2)
        if not fits or not latent or rope > width:
            raise NativeError(
                f"prepare_attention: q {list(q.shape)}, kv {list(kv.shape)}, norm {list(norm.shape)}, "
                f"cos {list(cos.shape)} and sin {list(sin.shape)} do not fit each other"
            )
        nope = width - rope
        q_nope = torch.empty(rows, heads, nope, dtype=torch.bfloat16)
        q_rope = torch.empty(rows, heads, rope, dtype=torch.bfloat16)
        latents = torch.empty(rows, latent + rope, dtype=torch.bfloat16)
        with ERRORS:
            self._handle.prepare_attention(
                q.data_ptr(), kv.data_ptr(), rows, heads, nope, rope, latent, norm.data_ptr(), eps,
                cos.data_ptr(), sin.data_ptr(), q_nope.data_ptr(), q_rope.data_ptr(), latents.data_ptr(),
            )  # fmt: skip
        return q_nope, q_rope, latents
