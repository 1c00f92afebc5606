"""The layers everything else is made of. Linears read activations in the model's dtype and give fp32.

A row's result of a linear never depends on the other rows (the kernels promise it), nor does what
`RowKernels` do to it. Where torch plays them, functions built on exp are another matter: vectorised and
scalar code differ in the last bit, and which of them an element meets depends on how many rows there are.
They are evaluated span by span, see `span_by_span`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F

from k2hybrid.checkpoint.dense8 import dequantize
from k2hybrid.errors import ConfigError
from k2hybrid.model.scratch import MLP_ROWS, STEP_ROWS
from k2hybrid.types import LinearWeight, Weight8


class LinearKernels(Protocol):
    """What multiplies. `native.machine` on the CPU in bf16; `TorchLinears` for tests and the fp32 dtype."""

    def linear(self, x: torch.Tensor, weight: LinearWeight) -> torch.Tensor:
        """x [T, K] (row stride free), weight [N, K] -> fp32 [T, N]."""

    def head_linear(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """x [T, H, K], weight [H, N, K] (head and row strides free) -> fp32 [T, H, N]."""

    def head_linear_t(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """x [T, H, K], weight [H, K, N] (head and row strides free) -> fp32 [T, H, N]."""


class RowKernels(Protocol):
    """What is done to rows between products, row by row and to bf16: `native.rows`, `kernels.rows`."""

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """x fp32 [T, n] (row stride free), weight fp32 [n] -> bf16 [T, n]."""

    def swiglu(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """fp32 [T, n] -> bf16 [T, n]: silu(gate) · up."""

    def choose(
        self, logits: torch.Tensor, bias: torch.Tensor, top_k: int, *, normalize: bool, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """logits fp32 [T, experts] -> ids int32, weights fp32 [T, top_k]: see `router`, without groups."""

    def prepare_attention(
        self,
        q: torch.Tensor,
        kv: torch.Tensor,
        norm: torch.Tensor,
        eps: float,
        cos: torch.Tensor,
        sin: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q fp32 [T, heads, nope + rope], kv fp32 [T, latent + rope], angles [T, 1, rope / 2].

        Returns:
            bf16 queries [T, heads, nope], the same rotated [T, heads, rope], rows [T, latent + rope].
        """


@runtime_checkable
class WithRows(Protocol):
    """Kernels that have `RowKernels` as well."""

    @property
    def rows(self) -> RowKernels: ...


def row_kernels(kernels: LinearKernels, dtype: torch.dtype) -> RowKernels | None:
    """Those that belong to `kernels`, if `dtype` is what they give; None: torch does it."""
    return kernels.rows if isinstance(kernels, WithRows) and dtype == torch.bfloat16 else None


class MlpStep(Protocol):
    """An MLP for few rows, in one call: same products and bits as in `MLP`."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x bf16 [T, hidden] -> fp32 [T, hidden]."""


@runtime_checkable
class MlpSteps(Protocol):
    """Kernels that have such steps (`native.machine`)."""

    def mlp_step(self, gate: LinearWeight, up: LinearWeight, down: LinearWeight) -> MlpStep: ...


class TorchLinears:
    """Products by torch in fp32, whatever the inputs' type: the reference. Converts the weight every time."""

    def linear(self, x: torch.Tensor, weight: LinearWeight) -> torch.Tensor:
        if isinstance(weight, Weight8):
            return x.float() @ dequantize(weight).T
        return x.float() @ weight.float().T

    def head_linear(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch.einsum("thk,hnk->thn", x.float(), weight.float())

    def head_linear_t(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch.einsum("thk,hkn->thn", x.float(), weight.float())


def unquantized(weight: LinearWeight) -> torch.Tensor:
    """A weight that more than a linear reads.

    Raises:
        ConfigError: it came in 8 bits.
    """
    if isinstance(weight, Weight8):
        raise ConfigError(
            f"a weight {list(weight.shape)} came in {weight.kind}, but the model reads it as it is published"
        )
    return weight


class Linear:
    """y = x Wᵀ. weight [N, K]."""

    def __init__(self, kernels: LinearKernels, weight: LinearWeight) -> None:
        self._kernels = kernels
        self.weight = weight

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, K] -> fp32 [T, N]."""
        return self._kernels.linear(x, self.weight)


class HeadLinear:
    """y[h] = x[h] W[h]ᵀ for every head. weight [H, N, K]."""

    def __init__(self, kernels: LinearKernels, weight: torch.Tensor) -> None:
        self._kernels = kernels
        self.weight = weight

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, H, K] -> fp32 [T, H, N]."""
        return self._kernels.head_linear(x, self.weight)


class HeadLinearT:
    """y[h] = x[h] W[h] for every head. weight [H, K, N]."""

    def __init__(self, kernels: LinearKernels, weight: torch.Tensor) -> None:
        self._kernels = kernels
        self.weight = weight

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, H, K] -> fp32 [T, H, N]."""
        return self._kernels.head_linear_t(x, self.weight)


class RMSNorm:
    """x / rms(x) · weight, computed in fp32, given in `dtype`."""

    def __init__(
        self, weight: torch.Tensor, eps: float, dtype: torch.dtype, rows: RowKernels | None = None
    ) -> None:
        self.weight = weight.float().contiguous()
        self.eps = eps
        self.dtype = dtype
        self._rows = rows

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x fp32 [T, n] -> dtype [T, n]."""
        if self._rows is not None:
            return self._rows.rms_norm(x, self.weight, self.eps)
        return rms_norm(x, self.weight, self.eps, self.dtype)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, dtype: torch.dtype) -> torch.Tensor:
    """`RMSNorm` as torch plays it."""
    inverse_rms = (x * x).mean(-1, keepdim=True).add_(eps).rsqrt_()
    return (x * inverse_rms).mul_(weight).to(dtype)


def span_by_span(
    function_: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, rows: Sequence[slice]
) -> torch.Tensor:
    """Apply an elementwise in-place function to x [T, n], one span's rows at a time; gives x."""
    for span in rows:
        function_(x[span])
    return x


def swiglu(gate: torch.Tensor, up: torch.Tensor, rows: Sequence[slice], dtype: torch.dtype) -> torch.Tensor:
    """silu(gate) · up, fp32 [T, n] -> dtype [T, n]; overwrites `gate`."""
    return span_by_span(_silu_, gate, rows).mul_(up).to(dtype)


def _silu_(x: torch.Tensor) -> torch.Tensor:
    return F.silu(x, inplace=True)


class MLP:
    """down(silu(gate(x)) · up(x)): the dense layers and the shared expert."""

    def __init__(
        self,
        kernels: LinearKernels,
        gate: LinearWeight,
        up: LinearWeight,
        down: LinearWeight,
        dtype: torch.dtype,
    ) -> None:
        self.gate = Linear(kernels, gate)
        self.up = Linear(kernels, up)
        self.down = Linear(kernels, down)
        self.dtype = dtype
        self._rows = row_kernels(kernels, dtype)
        self._step: MlpStep | None = None
        if isinstance(kernels, MlpSteps) and dtype == torch.bfloat16:
            self._step = kernels.mlp_step(gate, up, down)

    def __call__(self, x: torch.Tensor, rows: Sequence[slice]) -> torch.Tensor:
        """x [T, hidden], the rows of each span -> fp32 [T, hidden]."""
        if self._step is not None and x.shape[0] <= STEP_ROWS:
            return self._step(x)
        # Where torch plays swiglu spans must not be cut: see `span_by_span`.
        whole_spans = self._rows is None and len(rows) > 1
        if len(x) <= MLP_ROWS or whole_spans:
            return self._together(x, rows)
        out = torch.empty(len(x), self.down.weight.shape[0], dtype=torch.float32, device=x.device)
        for first in range(0, len(x), MLP_ROWS):
            tile = slice(first, first + MLP_ROWS)
            out[tile] = self._together(x[tile], [slice(None)])
        return out

    def _together(self, x: torch.Tensor, rows: Sequence[slice]) -> torch.Tensor:
        gate, up = self.gate(x), self.up(x)
        if self._rows is not None:
            return self.down(self._rows.swiglu(gate, up))
        return self.down(swiglu(gate, up, rows, self.dtype))
