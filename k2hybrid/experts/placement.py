"""Where the routed experts lie: a pure function of sizes, memory, wishes and, where known, counts of use.

    mapped     read from the file's pages, which the kernel keeps or drops: no copy, a start in no time
    resident   one copy in memory of our own; every node holds its rows of every expert
    streamed   a bounded set of slots that the disk fills as experts are asked for

A slot holds one expert. It is dealt by output rows: of gate and up a node holds the same rows as its part of
the hidden vector, of down its part of the result, and every node reads its own memory only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from k2hybrid.errors import ConfigError

Place = Literal["mapped", "resident", "streamed"]

GROUP = 32  # weights that share a scale: the published INT4 format
ROW_STEP = 16  # output rows that the kernels write at a time, one cache line of fp32
BLOCK = 4096  # direct reads start and end at such blocks of the file


@dataclass(frozen=True, slots=True)
class ExpertSizes:
    """Sizes of a model's routed experts; `layers` counts the layers that have any."""

    layers: int
    experts: int
    hidden: int
    inter: int

    def __post_init__(self) -> None:
        if min(self.layers, self.experts) < 0 or min(self.hidden, self.inter) < GROUP:
            raise ConfigError(f"there are no experts of these sizes: {self}")
        if self.hidden % GROUP or self.inter % GROUP:
            raise ConfigError(f"widths of INT4 experts are multiples of {GROUP}: {self}")

    @property
    def count(self) -> int:
        """All routed experts of the model."""
        return self.layers * self.experts

    @property
    def expert_bytes(self) -> int:
        """Of one expert in the file: gate, up and down, half a byte a weight and a bf16 scale per 32."""
        return 3 * (_packed(self.hidden, self.inter) + _scale(self.hidden, self.inter))

    @property
    def total_bytes(self) -> int:
        """Of all experts in the files."""
        return self.count * self.expert_bytes


@dataclass(frozen=True, slots=True)
class Placement:
    """What goes where.

    Attributes:
        nodes: ids of the NUMA nodes that compute, ascending.
        gate_bounds, down_bounds: node i has rows [bounds[i], bounds[i + 1]) of gate and up, and of down.
        slots: experts that have memory of their own at once; 0 for mapped, all for resident.
        fill_order: (MoE layer from 0, expert), most used first, one for each slot; None without counts.
        reason: why, for people.
    """

    place: Place
    nodes: tuple[int, ...]
    gate_bounds: tuple[int, ...]
    down_bounds: tuple[int, ...]
    slots: int
    fill_order: tuple[tuple[int, int], ...] | None
    reason: str


def shard_rows(rows: int, nodes: int, step: int = ROW_STEP) -> tuple[int, ...]:
    """Deal `rows` to `nodes` as evenly as multiples of `step` allow.

    Returns:
        nodes + 1 ascending bounds from 0 to `rows`; all but the last are multiples of `step`.

    Raises:
        ConfigError: a node would get less than one step.
    """
    steps = rows // step
    if not 1 <= nodes <= steps:
        raise ConfigError(
            f"{rows} rows can be dealt to 1…{steps} nodes, {step} rows each at least, not to {nodes}"
        )
    # Rounded up, so that the last node, which gets what is left beyond whole steps, has no more than others.
    return (*(-(-node * steps // nodes) * step for node in range(nodes)), rows)


def slot_bytes(sizes: ExpertSizes, nodes: int) -> tuple[int, ...]:
    """Bytes of one expert's slot on each of `nodes` nodes.

    Six segments (gate, up and down; nibbles and scales) of the node's rows, each with room for the blocks
    that a direct read of it touches.
    """
    gate, down = shard_rows(sizes.inter, nodes), shard_rows(sizes.hidden, nodes)
    return tuple(
        2 * _segments(gate[node + 1] - gate[node], sizes.hidden)
        + _segments(down[node + 1] - down[node], sizes.inter)
        for node in range(nodes)
    )


def least_slots(sizes: ExpertSizes) -> int:
    """The fewest slots that work: a large chunk asks for all experts of a layer at once."""
    return sizes.experts if sizes.layers else 0


def place_experts(
    sizes: ExpertSizes,
    *,
    node_memory: Mapping[int, int],
    wanted: Literal["auto", "mapped", "resident", "streamed"] = "auto",
    expert_ram: int | None = None,
    routing: Sequence[Sequence[int]] | None = None,
    reserved_bytes: int = 0,
) -> Placement:
    """Decide where the experts lie.

    Args:
        node_memory: bytes usable by this process on each NUMA node that computes.
        wanted: a place, or "auto": mapped on one node and resident on several while it fits, else streamed.
        expert_ram: bytes that slots may take in all.
        routing: how often each expert was chosen, [MoE layer][expert].
        reserved_bytes: what the rest needs (dense weights, latents, the process), on whichever node.

    Raises:
        ConfigError: the wishes contradict each other or do not fit; the message says what would.
    """
    memory = _Memory(sizes, dict(sorted(node_memory.items())), reserved_bytes)
    if wanted == "mapped" and expert_ram is not None:
        raise ConfigError("mapped experts take no memory of their own: leave --expert-ram out, or stream")
    if sizes.count == 0:
        return memory.placed("mapped", 0, None, "the model has no routed experts")
    if expert_ram is None and wanted == "auto":
        return _automatic(memory, routing)
    if wanted == "mapped":
        reason = "as asked"
        if not memory.holds_files:
            reason += f", though the {_gib(sizes.total_bytes)} of experts do not fit {memory.left}"
        return memory.placed("mapped", 0, routing, reason)

    slots = memory.slots if expert_ram is None else memory.slots_within(expert_ram)
    if wanted == "resident" or (wanted == "auto" and slots == sizes.count):
        if slots < sizes.count:
            short = memory.left if expert_ram is None else f"--expert-ram {_gib(expert_ram)}"
            raise ConfigError(
                f"resident experts take {_gib(memory.bytes_of(sizes.count), up=True)}, more than {short}; "
                "stream them, or map them"
            )
        return memory.placed("resident", slots, routing, "as asked" if wanted == "resident" else "all fit")
    if expert_ram is None:
        return _streamed(memory, slots, routing, "as asked")
    if slots < least_slots(sizes):
        raise ConfigError(
            f"--expert-ram {_gib(expert_ram)} has room for {slots} experts; a layer's worth, "
            f"{least_slots(sizes)}, take {_gib(memory.bytes_of(least_slots(sizes)), up=True)}: "
            "give at least that"
        )
    return _streamed(memory, slots, routing, f"--expert-ram {_gib(expert_ram)}")


def _automatic(memory: _Memory, routing: Sequence[Sequence[int]] | None) -> Placement:
    sizes = memory.sizes
    total = _gib(sizes.total_bytes)
    if len(memory.by_node) == 1:
        if memory.holds_files:
            return memory.placed("mapped", 0, routing, f"one node, and {total} of experts fit {memory.left}")
        why = f"{total} of experts do not fit {memory.left}: mapped, they would push each other out"
        return _streamed(memory, memory.slots, routing, why)
    if memory.slots == sizes.count:
        why = f"{len(memory.by_node)} nodes, and {total} of experts fit {memory.left}"
        return memory.placed("resident", sizes.count, routing, why)
    return _streamed(memory, memory.slots, routing, f"{total} of experts do not fit {memory.left}")


def _streamed(memory: _Memory, slots: int, routing: Sequence[Sequence[int]] | None, reason: str) -> Placement:
    least = least_slots(memory.sizes)
    if slots < least:
        raise ConfigError(
            f"there is room for {slots} experts in {memory.left}; streamed ones need a layer's worth, "
            f"{least}, {_gib(memory.bytes_of(least), up=True)}: free memory, or shorten the context"
        )
    return memory.placed("streamed", slots, routing, reason)


class _Memory:
    """How many slots there is room for."""

    def __init__(self, sizes: ExpertSizes, by_node: dict[int, int], reserved: int) -> None:
        if not by_node or min(by_node.values()) < 0 or reserved < 0:
            raise ConfigError(
                f"experts need a node that computes and has memory; nodes {by_node}, reserved {reserved}"
            )
        self.sizes = sizes
        self.by_node = by_node
        self.gate_bounds = shard_rows(sizes.inter, len(by_node))
        self.down_bounds = shard_rows(sizes.hidden, len(by_node))
        self.slot = slot_bytes(sizes, len(by_node))
        self.left_bytes = max(0, sum(by_node.values()) - reserved)
        self.holds_files = sizes.total_bytes <= self.left_bytes
        # A slot needs its share on every node; the rest lies wherever there is room.
        fullest = min(room // share for room, share in zip(by_node.values(), self.slot, strict=True))
        self.slots = min(sizes.count, fullest, self.left_bytes // sum(self.slot))

    @property
    def left(self) -> str:
        """What experts may take, in words."""
        return f"the {_gib(self.left_bytes)} of RAM that the rest leaves"

    def bytes_of(self, slots: int) -> int:
        """Bytes that `slots` slots take on all nodes."""
        return slots * sum(self.slot)

    def slots_within(self, expert_ram: int) -> int:
        """Slots that `expert_ram` bytes hold.

        Raises:
            ConfigError: the machine has less than that.
        """
        slots = min(self.sizes.count, expert_ram // sum(self.slot))
        if slots > self.slots:
            raise ConfigError(
                f"--expert-ram {_gib(expert_ram)} does not fit {self.left}; give at most "
                f"{_gib(self.bytes_of(self.slots))}"
            )
        return slots

    def placed(
        self, place: Place, slots: int, routing: Sequence[Sequence[int]] | None, reason: str
    ) -> Placement:
        order = None if routing is None else _most_used(self.sizes, routing)[:slots]
        nodes = tuple(self.by_node)
        return Placement(place, nodes, self.gate_bounds, self.down_bounds, slots, order, reason)


def _most_used(sizes: ExpertSizes, routing: Sequence[Sequence[int]]) -> tuple[tuple[int, int], ...]:
    """All (layer, expert), by falling count; equals in ascending order."""
    if len(routing) != sizes.layers or any(len(layer) != sizes.experts for layer in routing):
        raise ConfigError(f"counts of use must be of {sizes.layers} layers with {sizes.experts} experts each")
    pairs = [(layer, expert) for layer in range(sizes.layers) for expert in range(sizes.experts)]
    return tuple(sorted(pairs, key=lambda pair: -routing[pair[0]][pair[1]]))


def _packed(rows: int, columns: int) -> int:
    return rows * columns // 2


def _scale(rows: int, columns: int) -> int:
    return rows * columns // GROUP * 2


def _segments(rows: int, columns: int) -> int:
    """Nibbles and scales of `rows` rows, each in whole blocks and one more."""
    return sum(-(-part // BLOCK) * BLOCK + BLOCK for part in (_packed(rows, columns), _scale(rows, columns)))


def _gib(nbytes: int, *, up: bool = False) -> str:
    """As --expert-ram takes it; rounded down, or up where it names a need."""
    hundredths = -(-nbytes * 100 // (1 << 30)) if up else nbytes * 100 // (1 << 30)
    return f"{hundredths / 100:.2f}GiB"
