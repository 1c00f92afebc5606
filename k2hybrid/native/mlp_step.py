"""An MLP of few rows in one call; see `csrc/cpu/mlp_step.h`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from k2hybrid.errors import NativeError
from k2hybrid.native.extension import ERRORS, EXTENSION
from k2hybrid.native.tensors import given_weight, require_bf16
from k2hybrid.types import LinearWeight

if TYPE_CHECKING:
    from k2hybrid.native.machine import Machine


class NativeMlpStep:
    """One layer's, over weights that it keeps: gate and up [inner, hidden], down [hidden, inner].

    Raises:
        NativeError: types or shapes do not fit.
    """

    def __init__(self, machine: Machine, gate: LinearWeight, up: LinearWeight, down: LinearWeight) -> None:
        self._weights = gate, up, down
        self._hidden = gate.shape[1]
        with ERRORS:
            self._handle = EXTENSION.MlpStep(
                machine.handle, given_weight("gate", gate), given_weight("up", up), given_weight("down", down)
            )

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x bf16 [T, hidden] -> fp32 [T, hidden].

        Raises:
            NativeError: x does not fit, or weights can no longer be read.
        """
        require_bf16("x", x, 2)
        tokens, hidden = x.shape
        if hidden != self._hidden:
            raise NativeError(f"MLP: x {list(x.shape)} does not fit weights of {self._hidden} columns")
        out = torch.empty(tokens, hidden, dtype=torch.float32)
        with ERRORS:
            self._handle.run(x.data_ptr(), tokens, x.stride(0), out.data_ptr())
        return out
