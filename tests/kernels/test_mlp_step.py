"""An MLP in one call: the bits of the four calls that it stands for."""

from __future__ import annotations

import pytest
import torch

from k2hybrid.checkpoint.dense8 import quantize
from k2hybrid.errors import NativeError
from k2hybrid.model.layers import MLP
from k2hybrid.model.scratch import STEP_ROWS
from k2hybrid.native.extension import INSTRUCTION_SETS
from k2hybrid.native.machine import Machine
from k2hybrid.types import LinearWeight, Weight8Kind


def weights(hidden: int, inner: int, kind: Weight8Kind | None = None) -> list[LinearWeight]:
    draw = torch.Generator().manual_seed(hidden + inner)
    made: list[LinearWeight] = []
    for role, shape in (("gate", (inner, hidden)), ("up", (inner, hidden)), ("down", (hidden, inner))):
        weight = (torch.randn(shape, generator=draw) * shape[1] ** -0.5).bfloat16()
        made.append(weight if kind is None else quantize(weight, kind, role))
    return made


def rows_of(count: int, hidden: int) -> torch.Tensor:
    return torch.randn(count, hidden, generator=torch.Generator().manual_seed(count)).bfloat16()


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
@pytest.mark.parametrize("kind", [None, "int8", "fp8"])
@pytest.mark.parametrize(("hidden", "inner"), [(192, 96), (71, 45)])
def test_the_bits_of_four_calls(isa: str, kind: Weight8Kind | None, hidden: int, inner: int) -> None:
    machine = Machine(2, isa)
    whole, parts = (MLP(machine, *weights(hidden, inner, kind), torch.bfloat16) for _ in range(2))
    assert whole._step is not None
    parts._step = None
    for count in (1, 2, 7, STEP_ROWS, STEP_ROWS + 1, 3):
        x = rows_of(count, hidden)
        assert torch.equal(whole(x, [slice(None)]), parts(x, [slice(None)]))
        wide = torch.cat((x, x), dim=1)[:, :hidden]  # rows further apart
        assert torch.equal(whole(wide, [slice(None)]), parts(x, [slice(None)]))
    assert whole(rows_of(4, hidden), [slice(None)]).abs().max() > 0.01


def test_bad_input_is_named() -> None:
    machine = Machine(1)
    gate, up, down = weights(64, 32)
    step = machine.mlp_step(gate, up, down)
    with pytest.raises(NativeError, match="does not fit"):
        step(rows_of(2, 63))
    with pytest.raises(NativeError, match="bfloat16"):
        step(rows_of(2, 64).float())
    for wrong in ((gate, down, down), (gate, up, up), (gate[:, :-1], up, down), (gate[:-1], up, down)):
        with pytest.raises(NativeError, match="do not fit"):
            machine.mlp_step(*wrong)  # type: ignore[arg-type]
