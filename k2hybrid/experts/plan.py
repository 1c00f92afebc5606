"""What goes where on a machine, whether it fits, how fast it is, and what one change would bring. Pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from k2hybrid.errors import ConfigError
from k2hybrid.experts.card_prediction import CardPredictor, CardRates
from k2hybrid.experts.placement import ExpertSizes, Placement, place_experts, slot_bytes
from k2hybrid.experts.prediction import ModelSizes, Prediction, Predictor, Rates
from k2hybrid.experts.split import BUFFERS

GIB = 1 << 30
PROCESS_BYTES = GIB  # libraries, and what a pass needs for the moment: each below 512 MB
SYSTEM_BYTES = 2 * GIB  # of a machine that is only described: its kernel, and what else runs there
SHORT_CONTEXT = 1024
PROMPTS = (2048, 8192, 30720)
# GiB that machines are sold with.
RAM_SIZES = (32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)
VRAM_SIZES = (8, 12, 16, 24, 32, 40, 48, 80, 96, 141, 180, 288)
HELPS = 1.05  # a size is worth naming from here on


@dataclass(frozen=True, slots=True)
class MachineSpec:
    """A machine, measured or described.

    Attributes:
        node_memory: bytes usable for a model on each NUMA node that computes.
        ram_gb_s: reads of all nodes together (GB are 10⁹ bytes).
        disk_gb_s: direct reads of whole experts; None: unknown.
        gpu_gb_s, pcie_gb_s: reads of its memory, and copies to it, of a GPU with `vram_bytes`, if any; None:
            unknown.
        gpu_tflops: 10¹² operations a second of its bf16 matrix products; None: unknown.
    """

    node_memory: Mapping[int, int]
    cores: int
    ram_gb_s: float
    disk_gb_s: float | None = None
    vram_bytes: int = 0
    gpu_gb_s: float | None = None
    pcie_gb_s: float | None = None
    gpu_tflops: float | None = None

    @property
    def card_rates(self) -> CardRates | None:
        """The GPU's; None: too little is known, or there is none."""
        if not self.vram_bytes or not self.gpu_gb_s or not self.pcie_gb_s or not self.gpu_tflops:
            return None
        return CardRates(self.gpu_gb_s, self.pcie_gb_s, self.gpu_tflops)

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
    """What is asked of it.

    Attributes:
        cache_ram: bytes for latents that leave their pool.
        hit_rate: of streamed experts by number of slots; None: even routing.
    """

    context: int = 32768
    concurrency: int = 4
    place: Literal["auto", "mapped", "resident", "streamed"] = "auto"
    expert_ram: int | None = None
    cache_ram: int = 0
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
        chunk: rows of a prefill's passes.
        hot: experts that what is left over holds.
        problem: what is lacking, and what would fit; empty if it fits.
    """

    budget: int
    needs: tuple[Need, ...]
    weights: int
    chunk: int
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
    predictor: Predictor | CardPredictor | None
    hit_rate: float | None  # of streamed experts
    problem: str
    cases: tuple[Case, ...]
    changes: tuple[Change, ...]
    on_card: bool
    gpu: str  # what is made of the GPU, and why; empty: there is none
    card: CardPlan | None  # what lies on it, or would


Cards = Callable[[int], CardPlan]  # what would lie on a card with so many bytes


def make_plan(
    sizes: ModelSizes,
    rates: Rates,
    machine: MachineSpec,
    wishes: Wishes,
    cards: Cards | None = None,
) -> Plan:
    """Plan `sizes` on `machine`.

    Args:
        rates: of the kernels on any machine; they are carried over by bandwidth and cores.
        cards: plans a card (`model.card_memory`); None: a GPU is left idle.

    Raises:
        ConfigError: the wishes make no sense on any machine.
    """
    if wishes.context < 1 or wishes.concurrency < 1:
        raise ConfigError("a plan needs at least one token of context and one sequence")
    here = _Setup(sizes, rates, machine, wishes, cards)
    changes = [Change(name, *setup.headline(), setup.problem) for name, setup in _changes(here)]
    changes.sort(key=lambda change: [-(p.tokens_s if p else 0.0) for p in (change.decode, change.prefill)])
    return Plan(
        needs=tuple(here.needs()),
        placement=here.placement,
        predictor=here.predictor,
        hit_rate=here.hit_rate if here.placement and here.placement.place == "streamed" else None,
        problem=here.problem,
        cases=tuple(here.cases()),
        changes=(Change("as it is", *here.headline()), *changes),
        on_card=here.on_card,
        gpu=here.gpu(),
        card=here.card,
    )


LEFT_LATENTS = "RAM, at most; taken as they leave"


def ram_needs(sizes: ModelSizes, tokens: str, latent_bytes: int, *, on_card: bool = False) -> Iterator[Need]:
    """What a model takes of RAM beside its routed experts, in the order of the model.

    Args:
        tokens: what the latents are of, for people.
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
    elif sizes.experts.count:
        buffers = BUFFERS * sizes.experts.expert_bytes
        yield Need("buffers of a streamed prefill", buffers, f"RAM, page-locked; {BUFFERS} experts")
    yield Need("the process", PROCESS_BYTES, "RAM, at most")


def expert_needs(experts: ExpertSizes, placement: Placement | None) -> Iterator[Need]:
    """What routed experts take of RAM. `placement`: None: they are mapped, or there was no room for them."""
    if placement is None or placement.place == "mapped":
        yield Need(f"{experts.count:,} experts", experts.total_bytes, "pages of the files")
        return
    shares = slot_bytes(experts, len(placement.nodes))
    for node, share in zip(placement.nodes, shares, strict=True):
        what = f"{placement.slots:,} of {experts.count:,} experts"
        yield Need(f"{what}, node {node}", placement.slots * share, f"RAM, {placement.place}")


class _Setup:
    """One model on one machine. The card is used if all fits on it, and enough is known of its speed."""

    def __init__(
        self,
        sizes: ModelSizes,
        rates: Rates,
        machine: MachineSpec,
        wishes: Wishes,
        cards: Cards | None,
    ) -> None:
        self.sizes, self.rates, self.machine, self.wishes = sizes, rates, machine, wishes
        self.cards = cards
        self.card = cards(machine.vram_bytes) if cards and machine.vram_bytes else None
        known = machine.card_rates
        self.used = (self.card, known) if self.card and not self.card.problem and known else None
        self.on_card = self.used is not None
        self.latents = sizes.latent_bytes * wishes.context * wishes.concurrency
        self.rest = sum(need.nbytes for need in self._apart_from_experts())
        self.placement: Placement | None = None
        self.predictor: Predictor | CardPredictor | None = None
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
        cpu = Predictor(
            sizes,
            rates.at(ram_gb_s=machine.ram_gb_s, cores=machine.cores),
            self.placement.place,
            disk_gb_s=machine.disk_gb_s,
            hit_rate=self.hit_rate,
        )
        self.predictor = cpu
        if self.used is not None:
            card, known = self.used
            self.predictor = CardPredictor(cpu, known, chunk=card.chunk, hot=card.hot)

    def on(self, machine: MachineSpec) -> _Setup:
        """The same on another machine. A budget for experts was meant for the RAM of this one."""
        wishes = self.wishes
        if machine.memory != self.machine.memory:
            wishes = dataclasses.replace(wishes, expert_ram=None)
        return _Setup(self.sizes, self.rates, machine, wishes, self.cards)

    def needs(self) -> Iterator[Need]:
        """What takes RAM, in the order of the model."""
        yield from self._apart_from_experts()
        yield from expert_needs(self.sizes.experts, self.placement)

    def _apart_from_experts(self) -> Iterator[Need]:
        wanted = f"{self.wishes.concurrency} × {self.wishes.context:,} tokens"
        yield from ram_needs(self.sizes, wanted, self.latents, on_card=self.on_card)
        if self.wishes.cache_ram:
            tokens = self.wishes.cache_ram // self.sizes.latent_bytes
            yield Need(f"latents that left, {tokens:,} tokens", self.wishes.cache_ram, LEFT_LATENTS)

    def gpu(self) -> str:
        """What is made of it, a line."""
        card = self.card
        if card is None:
            return ""
        if card.problem:
            return f"the GPU is left idle: {card.problem}"
        holds = f"dense weights, latents and {card.hot:,} experts fit on the {gib(card.budget)} of the GPU"
        if self.on_card:
            return f"--device cuda: {holds}"
        return (
            f"{holds}; planned without it, since its speed is not known: give --gpu-gb-s, --gpu-tflops and "
            "--pcie-gb-s"
        )

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
    if machine.card_rates is not None and here.cards is not None:
        yield from _other_cards(here)


def _other_cards(here: _Setup) -> Iterator[tuple[str, _Setup]]:
    """No card, one as fast with the next size that helps, and a bus twice as fast."""
    machine, now = here.machine, here.headline()
    if here.on_card:
        yield "without the GPU", here.on(dataclasses.replace(machine, vram_bytes=0))
        if machine.pcie_gb_s is not None:
            yield "PCIe twice as fast", here.on(dataclasses.replace(machine, pcie_gb_s=2 * machine.pcie_gb_s))
    for size in VRAM_SIZES:
        if size * GIB <= machine.vram_bytes:
            continue
        setup = here.on(dataclasses.replace(machine, vram_bytes=size * GIB))
        if setup.on_card and _helps(setup.headline(), now):
            yield f"a GPU with {size} GiB, as fast", setup
            return


def _helps(then: tuple[Prediction | None, ...], now: tuple[Prediction | None, ...]) -> bool:
    return any(
        t is not None and (n is None or t.tokens_s >= HELPS * n.tokens_s)
        for t, n in zip(then, now, strict=True)
    )


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


def gib(nbytes: float) -> str:
    """For people."""
    return f"{nbytes / GIB:,.1f} GiB"
