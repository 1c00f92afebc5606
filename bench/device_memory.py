"""How a card's memory is counted, and held against the table of docs/memory.md: for bench/gpu_memory.py."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from k2hybrid.checkpoint.spec import ModelSpec
from k2hybrid.experts.plan import CardPlan
from k2hybrid.model.card_memory import CardWishes, largest_chunk, require_card
from k2hybrid.model.layers import HeadLinear, HeadLinearT
from k2hybrid.types import Weight8

PARTS_OF_KV_B = (HeadLinear, HeadLinearT)


@dataclass(frozen=True)
class Counters:
    """Bytes of a card.

    Attributes:
        allocated: of tensors; the most since `reset`.
        reserved: what torch's allocator holds for them; the most since `reset`.
        taken: all that is not free, whoever has it.
    """

    allocated: Callable[[], int]
    most_allocated: Callable[[], int]
    reserved: Callable[[], int]
    most_reserved: Callable[[], int]
    taken: Callable[[], int]
    reset: Callable[[], None]

    @property
    def outside(self) -> int:
        """Of torch's allocator: the context, kernels' code, what the driver keeps of graphs."""
        return self.taken() - self.reserved()


def cuda_counters(device: torch.device) -> Counters:
    """Of a card that nobody else uses."""

    def taken() -> int:
        free, total = torch.cuda.mem_get_info(device)
        return total - free

    return Counters(
        torch.cuda.memory_allocated,
        torch.cuda.max_memory_allocated,
        torch.cuda.memory_reserved,
        torch.cuda.max_memory_reserved,
        taken,
        torch.cuda.reset_peak_memory_stats,
    )


def planned(plan: CardPlan, *names: str) -> int:
    """Bytes of all rows that begin with one of the names."""
    return sum(need.nbytes for need in plan.needs if need.name.startswith(names))


def row(name: str, plan: int, measured: int) -> dict[str, Any]:
    """Of the table; what must hold is said of all rows together alone."""
    return {
        "case": "card memory",
        "row": name,
        "planned": plan,
        "measured": measured,
        "measured_over_planned": round(measured / plan, 3),
    }


def fitted(spec: ModelSpec, cap: int, wishes: CardWishes) -> tuple[CardPlan, CardWishes]:
    """The table with the largest chunk that fits, as a start finds it."""
    wishes = dataclasses.replace(wishes, chunk=largest_chunk(spec, cap, wishes))
    return require_card(spec, cap, wishes), wishes


def weights_of(part: object) -> Iterator[torch.Tensor]:
    """The weights of a layer, wherever its parts have them."""
    if isinstance(part, torch.Tensor):
        yield part
    elif isinstance(part, Weight8):
        yield from (part.values, part.scale)
    elif type(part).__module__.startswith("k2hybrid.model.") and not isinstance(part, PARTS_OF_KV_B):
        for value in getattr(part, "__dict__", {}).values():
            yield from weights_of(value)


def released() -> None:
    """What nobody holds any more goes back to the driver."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
