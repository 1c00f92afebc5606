"""What goes where on a machine, whether it fits, how fast it is, and what one change would bring. Pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from k2hybrid.errors import ConfigError
from k2hybrid.experts.placement import Placement, place_experts, slot_bytes
from k2hybrid.experts.prediction import ModelSizes, Prediction, Predictor, Rates

GIB = 1 << 30
PROCESS_BYTES = GIB  # libraries, and what a pass needs for the moment: each below 512 MB
SYSTEM_BYTES = 2 * GIB  # of a machine that is only described: its kernel, and what else runs there
SHORT_CONTEXT = 1024
PROMPTS = (2048, 8192, 30720)
# GiB that machines are sold with.
RAM_SIZES = (32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)
HELPS = 1.05  # a size of RAM is worth naming from here on


@dataclass(frozen=True, slots=True)
class MachineSpec:
    """A machine, measured or described.

    Attributes:
        node_memory: bytes usable for a model on each NUMA node that computes.
        ram_gb_s: reads of all nodes together (GB are 10⁹ bytes).
        disk_gb_s: direct reads of whole experts; None: unknown.
        gpu_gb_s, pcie_gb_s: of a GPU with `vram_bytes`, if any; None: unknown.
    """

    node_memory: Mapping[int, int]
    cores: int
    ram_gb_s: float
    disk_gb_s: float | None = None
    vram_bytes: int = 0
    gpu_gb_s: float | None = None
    pcie_gb_s: float | None = None

    @property
    def memory(self) -> int:
        """Bytes usable on all nodes."""
        return sum(self.node_memory.values())

    def with_ram(self, nbytes: int) -> MachineSpec:
        """The same with `nbytes` of RAM in all, dealt evenly to its nodes."""
        usable = max(0, nbytes - SYSTEM_BYTES) // len(self.node_memory)
        return dataclasses.replace(self, node_memory=dict.fromkeys(self.node_memory, usable))


@dataclass(frozen=True, slots=True)
class Wishes:
    """What is asked of it. `hit_rate` of streamed experts by number of slots; None: even routing."""

    context: int = 32768
    concurrency: int = 4
    place: Literal["auto", "mapped", "resident", "streamed"] = "auto"
    expert_ram: int | None = None
    hit_rate: Callable[[int], float] | None = None


def headline_tokens(wishes: Wishes) -> int:
    """The context at which changes are judged: at long ones little but attention would be seen."""
    return min(wishes.context, PROMPTS[1])


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes of something, and where they lie."""

    name: str
    nbytes: int
    where: str


@dataclass(frozen=True, slots=True)
class CardPlan:
    """What goes onto a card with `budget` bytes.

    Attributes:
        weights: bytes of the dense weights among `needs`.
        hot: experts that what is left over holds.
        problem: what is lacking, and what would fit; empty if it fits.
    """

    budget: int
    needs: tuple[Need, ...]
    weights: int
    hot: int
    problem: str

    @property
    def spare(self) -> int:
        """Bytes that nothing takes; below 0 if it does not fit."""
        return self.budget - sum(need.nbytes for need in self.needs)


@dataclass(frozen=True, slots=True)
class Case:
    """One prediction. `name` says of what."""

    name: str
    found: Prediction


@dataclass(frozen=True, slots=True)
class Change:
    """A machine that differs in one thing. None: it does not fit there, or is not predicted."""

    name: str
    decode: Prediction | None
    prefill: Prediction | None
    note: str = ""


@dataclass(frozen=True, slots=True)
class Plan:
    """The answer. Without `predictor`, `problem` says what is missing."""

    needs: tuple[Need, ...]
    placement: Placement | None
    predictor: Predictor | None
    hit_rate: float | None  # of streamed experts
    problem: str
    cases: tuple[Case, ...]
    changes: tuple[Change, ...]
    gpu: str  # what this version makes of a GPU; empty: none was named
    card: CardPlan | None  # what would lie on it


def make_plan(
    sizes: ModelSizes,
    rates: Rates,
    machine: MachineSpec,
    wishes: Wishes,
    card: CardPlan | None = None,
) -> Plan:
    """Plan `sizes` on `machine`.

    Args:
        rates: of the kernels on any machine; they are carried over by bandwidth and cores.
        card: what would go onto the machine's GPU (`model.card_memory`); None: it has none.

    Raises:
        ConfigError: the wishes make no sense on any machine.
    """
    if wishes.context < 1 or wishes.concurrency < 1:
        raise ConfigError("a plan needs at least one token of context and one sequence")
    here = _Setup(sizes, rates, machine, wishes)
    now = here.headline()
    changes = [Change(name, *setup.headline()) for name, setup in _changes(here) if setup is not None]
    if card is not None:
        changes.append(_with_gpu(here, card))
    changes.sort(key=lambda change: [-(p.tokens_s if p else 0.0) for p in (change.decode, change.prefill)])
    return Plan(
        needs=tuple(here.needs()),
        placement=here.placement,
        predictor=here.predictor,
        hit_rate=here.hit_rate if here.placement and here.placement.place == "streamed" else None,
        problem=here.problem,
        cases=tuple(here.cases()),
        changes=(Change("as it is", *now), *changes),
        gpu="" if card is None else _gpu(card),
        card=card,
    )


def ram_needs(
    sizes: ModelSizes,
    tokens: str,
    latent_bytes: int,
    placement: Placement | None,
    *,
    on_card: bool = False,
) -> Iterator[Need]:
    """What a model takes of RAM, in the order of the model.

    Args:
        tokens: what the latents are of, for people.
        placement: of the experts; None: they are mapped, or there was no room to place them.
        on_card: dense weights and latents lie there, and are not counted.
    """
    if on_card:
        yield Need("embedding", sizes.embedding_bytes, "RAM, pages of the files")
    elif sizes.dense_weights == "bf16":
        yield Need("dense weights", sizes.resting_bytes, "RAM, pages of the files")
    else:
        made = sizes.resting_bytes - sizes.embedding_bytes
        yield Need(f"dense weights, {sizes.dense_weights}", made, "RAM, made at every start")
        yield Need("embedding", sizes.embedding_bytes, "RAM, pages of the files")
    if not on_card:
        yield Need(f"latents, {tokens}", latent_bytes, "RAM, at most; taken as tokens come")
    yield Need("the process", PROCESS_BYTES, "RAM, at most")
    experts = sizes.experts
    if placement is None or placement.place == "mapped":
        yield Need(f"{experts.count:,} experts", experts.total_bytes, "pages of the files")
        return
    shares = slot_bytes(experts, len(placement.nodes))
    for node, share in zip(placement.nodes, shares, strict=True):
        what = f"{placement.slots:,} of {experts.count:,} experts"
        yield Need(f"{what}, node {node}", placement.slots * share, f"RAM, {placement.place}")


class _Setup:
    """One model on one machine."""

    def __init__(self, sizes: ModelSizes, rates: Rates, machine: MachineSpec, wishes: Wishes) -> None:
        self.sizes, self.rates, self.machine, self.wishes = sizes, rates, machine, wishes
        self.latents = sizes.latent_bytes * wishes.context * wishes.concurrency
        self.rest = sizes.resting_bytes + self.latents + PROCESS_BYTES
        self.placement: Placement | None = None
        self.predictor: Predictor | None = None
        self.hit_rate = 1.0
        self.problem = ""
        if self.rest > machine.memory:
            short = self.rest - machine.memory
            self.problem = f"all but the experts takes {gib(short)} more than the RAM there is"
            return
        try:
            self.placement = place_experts(
                sizes.experts,
                node_memory=machine.node_memory,
                wanted=wishes.place,
                expert_ram=wishes.expert_ram,
                reserved_bytes=self.rest,
            )
        except ConfigError as error:
            self.problem = str(error)
            return
        if self.placement.place == "mapped" and sizes.experts.total_bytes + self.rest > machine.memory:
            self.problem = "mapped experts would push each other out of RAM; no speed is predicted for that"
            return
        if self.placement.place == "streamed":
            even = self.placement.slots / sizes.experts.count
            self.hit_rate = wishes.hit_rate(self.placement.slots) if wishes.hit_rate else even
            if machine.disk_gb_s is None and self.hit_rate < 1.0:
                self.problem = "the disk's speed is not known, and streamed experts wait for it"
                return
        self.predictor = Predictor(
            sizes,
            rates.at(ram_gb_s=machine.ram_gb_s, cores=machine.cores),
            self.placement.place,
            disk_gb_s=machine.disk_gb_s,
            hit_rate=self.hit_rate,
        )

    def on(self, machine: MachineSpec) -> _Setup:
        """The same on another machine. A budget for experts was meant for the RAM of this one."""
        wishes = self.wishes
        if machine.memory != self.machine.memory:
            wishes = dataclasses.replace(wishes, expert_ram=None)
        return _Setup(self.sizes, self.rates, machine, wishes)

    def needs(self) -> Iterator[Need]:
        """What takes memory, in the order of the model."""
        wanted = f"{self.wishes.concurrency} × {self.wishes.context:,} tokens"
        return ram_needs(self.sizes, wanted, self.latents, self.placement)

    def headline(self) -> tuple[Prediction | None, Prediction | None]:
        """What changes are judged by: decode of one sequence, and prefill, at `headline_tokens`."""
        if self.predictor is None:
            return None, None
        tokens = headline_tokens(self.wishes)
        return self.predictor.decode(1, tokens), self.predictor.prefill(tokens)

    def cases(self) -> Iterator[Case]:
        """Everything that is predicted."""
        predictor, context, many = self.predictor, self.wishes.context, self.wishes.concurrency
        if predictor is None:
            return
        for sequences in sorted({1, many}):
            what = "1 sequence" if sequences == 1 else f"{sequences} sequences"
            for length in sorted({min(SHORT_CONTEXT, context), context}):
                found = predictor.decode(sequences, length)
                yield Case(f"decode, {what} at {length:,} tokens", found)
        for tokens in sorted({*(t for t in PROMPTS if t < context), context}):
            yield Case(f"prefill, {tokens:,} tokens", predictor.prefill(tokens))


def _changes(here: _Setup) -> Iterator[tuple[str, _Setup]]:
    machine = here.machine
    double = dataclasses.replace(machine, ram_gb_s=2 * machine.ram_gb_s)
    yield "RAM twice as fast", here.on(double)
    yield "twice the cores", here.on(dataclasses.replace(machine, cores=2 * machine.cores))
    streamed = here.placement is not None and here.placement.place == "streamed"
    if streamed and machine.disk_gb_s is not None:
        faster = dataclasses.replace(machine, disk_gb_s=2 * machine.disk_gb_s)
        yield "a disk twice as fast", here.on(faster)
    if streamed or here.predictor is None:
        yield from _more_ram(here)


def _more_ram(here: _Setup) -> Iterator[tuple[str, _Setup]]:
    """The next size that helps, and the one that holds all experts."""
    now = here.headline()[0]
    helped = False
    for size in RAM_SIZES:
        machine = here.machine.with_ram(size * GIB)
        if machine.memory <= here.machine.memory:
            continue
        setup = here.on(machine)
        decode = setup.headline()[0]
        if decode is None or setup.placement is None:
            continue
        holds_all = setup.placement.place != "streamed"
        if holds_all or (not helped and (now is None or decode.tokens_s >= HELPS * now.tokens_s)):
            helped = True
            yield f"{size} GiB of RAM ({setup.placement.place})", setup
        if holds_all:
            return


def _gpu(card: CardPlan) -> str:
    fits = f"no: {card.problem}" if card.problem else f"it would fit, with {card.hot:,} experts"
    return f"This version computes on the CPU alone and leaves a GPU idle. On its {gib(card.budget)}: {fits}."


def _with_gpu(here: _Setup, card: CardPlan) -> Change:
    """A bound for dense part and attention on the GPU, experts where they are; nothing of it runs yet."""
    name, machine = "the dense part on the GPU", here.machine
    if here.predictor is None or machine.gpu_gb_s is None or machine.pcie_gb_s is None:
        return Change(name, None, None, "not in this version; a bound needs --gpu-gb-s and --pcie-gb-s")
    if card.problem:
        return Change(name, None, None, "not in this version, and it does not fit")
    sizes, context = here.sizes, headline_tokens(here.wishes)
    read = card.weights + context * sizes.latent_bytes
    # A row goes to the experts in bf16 and comes back in fp32, with ids and weights.
    crossing = sizes.experts.layers * (6 * sizes.experts.hidden + 8 * sizes.top_k)
    parts = here.predictor.experts(1)
    parts["GPU memory"] = read / machine.gpu_gb_s / 1e9
    parts["PCIe"] = crossing / machine.pcie_gb_s / 1e9
    return Change(name, Prediction(1, parts), None, "not in this version; a bound, without its own overhead")


def gib(nbytes: float) -> str:
    """For people."""
    return f"{nbytes / GIB:,.1f} GiB"
