"""Attention of one layer for few rows, in one call; see `csrc/cpu/latent_step.h`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from k2hybrid.errors import NativeError
from k2hybrid.native.extension import ERRORS, EXTENSION
from k2hybrid.native.tensors import PAGE_ROWS, given_weight, require_bf16, require_fp32
from k2hybrid.types import LatentWeights

if TYPE_CHECKING:
    from k2hybrid.native.machine import Machine


class NativeLatentStep:
    """One layer's, over weights that it keeps.

    Args:
        eps: of both norms.
        scale: of the scores.

    Raises:
        NativeError: types or shapes do not fit.
    """

    def __init__(
        self, machine: Machine, weights: LatentWeights, *, rope: int, eps: float, scale: float
    ) -> None:
        for name, norm in (("q_norm", weights.q_norm), ("latent_norm", weights.latent_norm)):
            if norm is not None:
                require_fp32(name, norm, 1, whole=True)
        lower = weights.q_a
        if (lower is None) != (weights.q_norm is None):
            raise NativeError("q_a and its norm belong together")
        fits = lower is None or weights.q_norm is None or weights.q_norm.shape[0] == lower.shape[0]
        if not fits or weights.latent_norm.shape[0] != weights.key_to_latent.shape[2]:
            raise NativeError("the norms of an attention layer do not fit its weights")
        self._weights = weights
        self.machine = machine
        self._hidden = weights.kv_a.shape[1]
        self._out = weights.o.shape[0]
        self._rope = rope
        self._row_bytes = 2 * weights.kv_a.shape[0]
        with ERRORS:
            self._handle = EXTENSION.LatentStep(
                machine.handle,
                None if lower is None else given_weight("q_a", lower),
                given_weight("q", weights.q),
                given_weight("kv_a", weights.kv_a),
                given_weight("key_to_latent", weights.key_to_latent),
                given_weight("latent_to_value", weights.latent_to_value),
                given_weight("o", weights.o),
                0 if weights.q_norm is None else weights.q_norm.data_ptr(),
                weights.latent_norm.data_ptr(),
                eps,
                scale,
                rope,
            )

    def __call__(
        self,
        x: torch.Tensor,
        rows: torch.Tensor,
        slots: torch.Tensor,
        spans: Sequence[tuple[torch.Tensor, int, int]],
        cos: torch.Tensor,
        sin: torch.Tensor,
    ) -> torch.Tensor:
        """fp32 [T, hidden] that joins the residual stream; stores the rows' latents.

        Args:
            x: bf16 [T, hidden], normed.
            rows: of the layer as stored in bf16, uint8 [pages · 64, row_bytes].
            slots: int64 [T], of each row among them.
            spans: as `Machine.attend` takes them.
            cos, sin: fp32 [T, 1, rope / 2].

        Raises:
            NativeError: shapes or types do not fit, a slot or table names a page that is not there, or
                weights can no longer be read.
        """
        require_bf16("x", x, 2)
        tokens = x.shape[0]
        given = self.machine.given_spans(spans)
        angles = (tokens, 1, self._rope // 2)
        fits = rows.dtype == torch.uint8 and rows.is_contiguous() and rows.shape[1] == self._row_bytes
        fits &= slots.dtype == torch.int64 and slots.is_contiguous() and slots.shape == (tokens,)
        for turn in (cos, sin):
            fits &= turn.dtype == torch.float32 and turn.is_contiguous() and turn.shape == angles
        if not fits or x.shape[1] != self._hidden or sum([count for *_, count in given]) != tokens:
            raise NativeError(
                f"latent step: x {list(x.shape)}, rows {rows.dtype} {list(rows.shape)}, slots "
                f"{slots.dtype} {list(slots.shape)}, cos {list(cos.shape)} and spans do not fit each other"
            )
        out = torch.empty(tokens, self._out, dtype=torch.float32)
        with ERRORS:
            self._handle.run(
                x.data_ptr(), tokens, x.stride(0), cos.data_ptr(), sin.data_ptr(), slots.data_ptr(), given,
                rows.data_ptr(), rows.shape[0] // PAGE_ROWS, out.data_ptr(),
            )  # fmt: skip
        return out
