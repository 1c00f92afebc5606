"""Tokens per second before there are weights: bytes and operations of a pass, at measured rates. Pure.

A pass reads every dense weight once, and of each layer's experts those that a row chose; routing is taken as
even. The first row of a weight costs its reading, each further one its arithmetic, and what of the two does
not overlap is lost: r and c seconds take max(r, c) + (1 − overlap) · min(r, c) together. What else a layer
does, attention over the context among it, is torch's and Python's; it was timed at the model's widths.

Missed experts come from the disk while gate and up of present ones compute, and of the last to come after it.
Only then does down begin, a third of an expert's work (`csrc/experts/dispatch.h`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from k2hybrid.checkpoint.dense_bytes import weight_bytes
from k2hybrid.checkpoint.names import ExpectedTensor, dense_layer_tensors
from k2hybrid.checkpoint.spec import ModelSpec
from k2hybrid.config import DenseWeights
from k2hybrid.experts.placement import ExpertSizes, Place

CHUNK_ROWS = 512  # of a prefill, as the engine makes them
ADDED_LATER = 64  # results of experts that may wait for their sum (csrc/experts/dispatch.cpp)
CLEARLY = 1.2  # times as long to compute as to read: then a chunk tells the rate of arithmetic
RESOURCES = ("RAM bandwidth", "disk", "arithmetic", "attention", "overhead")


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """What a pass over a model reads and computes. Bytes; operations are multiply-adds of one row."""

    experts: ExpertSizes
    layers: int
    top_k: int
    dense_bytes: int  # of all layers and the last norm, read by every pass
    dense_ops: int
    kv_b_ops: int  # of them, those that a prefill spends on its context instead (`Rates.chunk_context_s`)
    shared_bytes: int  # of dense_bytes, the shared experts'
    shared_ops: int
    absorbed_ops: int  # of attention, a layer, row and token of context; in decode
    expanded_ops: int  # the same in a prefill, beside kv_b's
    head_bytes: int  # lm_head, read for rows whose logits are wanted
    head_ops: int
    embedding_bytes: int  # of which a pass reads some rows
    latent_bytes: int  # of one token, all layers
    dense_weights: DenseWeights = "bf16"

    @classmethod
    def of(
        cls, spec: ModelSpec, row_bytes: int | None = None, *, dense_weights: DenseWeights = "bf16"
    ) -> ModelSizes:
        """The sizes of the model that `spec` describes.

        Args:
            row_bytes: of a token's latent in one layer (`RowFormat.row_bytes`); None: as bf16.
        """
        dense = [tensor for layer in range(spec.num_layers) for tensor in dense_layer_tensors(spec, layer)]
        head = (spec.vocab_size, spec.hidden_size)

        def nbytes(tensor: ExpectedTensor) -> int:
            if "F32" in tensor.dtypes:
                return 4 * math.prod(tensor.shape)
            return weight_bytes(tensor.key.role, tensor.shape, dense_weights)

        return cls(
            experts=ExpertSizes(
                len(spec.moe_layers), spec.num_experts, spec.hidden_size, spec.moe_intermediate_size
            ),
            layers=spec.num_layers,
            top_k=spec.top_k,
            dense_bytes=sum(map(nbytes, dense)) + 2 * spec.hidden_size,
            dense_ops=sum(math.prod(t.shape) for t in dense if len(t.shape) == 2),
            kv_b_ops=sum(math.prod(t.shape) for t in dense if t.key.role == "kv_b_proj"),
            shared_bytes=sum(nbytes(t) for t in dense if t.key.role.startswith("shared_")),
            shared_ops=sum(math.prod(t.shape) for t in dense if t.key.role.startswith("shared_")),
            absorbed_ops=spec.num_heads * (spec.latent_dim + spec.kv_lora_rank),
            expanded_ops=spec.num_heads * (spec.qk_head_dim + spec.v_head_dim),
            head_bytes=weight_bytes("lm_head", head, dense_weights),
            head_ops=math.prod(head),
            embedding_bytes=2 * math.prod(head),
            latent_bytes=spec.num_layers * (2 * spec.latent_dim if row_bytes is None else row_bytes),
            dense_weights=dense_weights,
        )

    @property
    def expert_ops(self) -> int:
        """Of one expert."""
        return 3 * self.experts.hidden * self.experts.inter

    @property
    def resting_bytes(self) -> int:
        """All weights but the routed experts."""
        return self.dense_bytes + self.head_bytes + self.embedding_bytes

    def distinct(self, rows: int) -> float:
        """Expected distinct experts that `rows` rows choose in one layer."""
        experts = self.experts.experts
        return experts * (1.0 - (1.0 - self.top_k / experts) ** rows) if experts else 0.0


@dataclass(frozen=True, slots=True)
class Rates:
    """What probes measured, at the widths of one model, on a machine with `cores` cores.

    Attributes:
        ram_gb_s: the best read of memory, the limit (GB are 10⁹ bytes).
        dense_gb_s: bf16 weights of a mapped file, one row; 8 bits are taken to be read as fast.
        mapped_gb_s, arena_gb_s: INT4 experts of a mapped file and in huge pages, one row.
        dense_ops, expert_ops: multiply-adds a second where many rows share a weight.
        overlap: how much of the lesser of reading and computing an expert hides behind the other, 0 to 1.
        step_s: what every layer of a decode step takes beside its weights, one sequence, no context.
        sequence_s: of it, for each further sequence.
        context_s: in a decode step, for each token of context, a layer.
        chunk_s: what every layer of a chunk of `CHUNK_ROWS` rows takes beside its weights, no context.
        chunk_context_s: in such a chunk, for each token of context, a layer.
        sample_s: choosing a token.
    """

    cores: int
    ram_gb_s: float
    dense_gb_s: float
    mapped_gb_s: float
    arena_gb_s: float
    dense_ops: float
    expert_ops: float
    overlap: float
    step_s: float
    sequence_s: float
    context_s: float
    chunk_s: float
    chunk_context_s: float
    sample_s: float

    def at(self, *, ram_gb_s: float, cores: int) -> Rates:
        """The same kernels on a machine with other memory and more or fewer such cores.

        Reads keep their share of the limit; what one core does alone, as between a step's products, keeps its
        time.
        """
        memory, share = ram_gb_s / self.ram_gb_s, cores / self.cores
        return Rates(
            cores=cores,
            ram_gb_s=ram_gb_s,
            dense_gb_s=self.dense_gb_s * memory,
            mapped_gb_s=self.mapped_gb_s * memory,
            arena_gb_s=self.arena_gb_s * memory,
            dense_ops=self.dense_ops * share,
            expert_ops=self.expert_ops * share,
            overlap=self.overlap,
            step_s=self.step_s,
            sequence_s=self.sequence_s,
            context_s=self.context_s / share,
            chunk_s=self.chunk_s / share,
            chunk_context_s=self.chunk_context_s / share,
            sample_s=self.sample_s,
        )


@dataclass(frozen=True, slots=True)
class Prediction:
    """`tokens` in `seconds`, which are the sum of `parts`: seconds by resource (`RESOURCES`)."""

    tokens: int
    parts: dict[str, float]

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())

    @property
    def tokens_s(self) -> float:
        return self.tokens / self.seconds

    @property
    def limit(self) -> str:
        """The resource that takes the most time."""
        return max(self.parts, key=lambda name: self.parts[name])


class Predictor:
    """Predicts passes over one model.

    Args:
        place: of the experts.
        disk_gb_s: of direct reads; needed where experts are streamed.
        hit_rate: share of the experts asked for that have a slot already.

    Attributes:
        miss_rate: share of them that come from the disk.
        expert_bytes_s: at which an expert that is there is read.
        disk_s: of one expert from the disk.
    """

    def __init__(
        self,
        sizes: ModelSizes,
        rates: Rates,
        place: Place,
        *,
        disk_gb_s: float | None = None,
        hit_rate: float = 1.0,
    ) -> None:
        self.sizes = sizes
        self.rates = rates
        self.place = place
        self.miss_rate = 1.0 - hit_rate if place == "streamed" else 0.0
        self.expert_bytes_s = 1e9 * (rates.mapped_gb_s if place == "mapped" else rates.arena_gb_s)
        self.disk_s = math.inf
        if disk_gb_s is not None:
            self.disk_s = sizes.experts.expert_bytes / (disk_gb_s * 1e9)

    def decode(self, sequences: int, context: int) -> Prediction:
        """One step of `sequences` sequences, each with `context` tokens behind it."""
        rates, layers = self.rates, self.sizes.layers
        parts = self._weights(sequences, self.sizes.dense_ops)
        self._read(parts, self.sizes.head_bytes, sequences, self.sizes.head_ops)
        parts["attention"] += layers * sequences * context * rates.context_s
        parts["overhead"] += layers * (rates.step_s + (sequences - 1) * rates.sequence_s)
        parts["overhead"] += sequences * rates.sample_s
        return Prediction(sequences, parts)

    def prefill(self, tokens: int) -> Prediction:
        """A prompt of `tokens` tokens, to its first token."""
        rates, layers = self.rates, self.sizes.layers
        total = dict.fromkeys(RESOURCES, 0.0)
        for start in range(0, tokens, CHUNK_ROWS):
            rows = min(CHUNK_ROWS, tokens - start)
            parts = self._weights(rows, self.sizes.dense_ops - self.sizes.kv_b_ops)
            share = layers * rows / CHUNK_ROWS
            parts["attention"] += share * (start + rows) * rates.chunk_context_s
            parts["overhead"] += share * rates.chunk_s
            for name, seconds in parts.items():
                total[name] += seconds
        self._read(total, self.sizes.head_bytes, 1, 0.0)
        total["overhead"] += rates.sample_s
        return Prediction(tokens, total)

    def weights_seconds(self, rows: int) -> float:
        """Of a decode step of `rows` sequences, all weights but the head's."""
        return sum(self._weights(rows, self.sizes.dense_ops).values())

    def _weights(self, rows: int, dense_ops: int) -> dict[str, float]:
        """Seconds of all weights but the head's, for `rows` rows."""
        parts = self.experts(rows)
        self._read(parts, self.sizes.dense_bytes, rows, dense_ops)
        return parts

    def experts(self, rows: int) -> dict[str, float]:
        """Seconds of all layers' routed experts, for `rows` rows, by resource."""
        sizes, rates = self.sizes, self.rates
        parts = dict.fromkeys(RESOURCES, 0.0)
        distinct = sizes.distinct(rows)
        if not distinct:
            return parts
        rows_each = rows * sizes.top_k / distinct
        read = sizes.experts.expert_bytes / self.expert_bytes_s
        compute = max(0.0, rows_each - 1.0) * sizes.expert_ops / rates.expert_ops
        one = self._overlapped(read, compute)
        name = "RAM bandwidth" if read >= compute else "arithmetic"
        missed = distinct * self.miss_rate
        # Gate and up arrive first, and are computed while down is read. Of few rows all is computed as it
        # comes, down of the last expert last; of many, all down projections come at the end.
        few = rows * sizes.top_k <= ADDED_LATER
        late = missed * self.disk_s + (min(1.0, missed) * one / 3 if few else 0.0) if missed else 0.0
        waiting = max(0.0, late - (distinct * one if few else 2 / 3 * distinct * one))
        parts[name] += sizes.experts.layers * distinct * one
        parts["disk"] += sizes.experts.layers * waiting
        return parts

    def _read(self, parts: dict[str, float], nbytes: int, rows: int, ops: float) -> None:
        """Dense weights, for `rows` rows of `ops` multiply-adds each."""
        read = nbytes / (self.rates.dense_gb_s * 1e9)
        compute = (rows - 1) * ops / self.rates.dense_ops
        name = "RAM bandwidth" if read >= compute else "arithmetic"
        parts[name] += self._overlapped(read, compute)

    def _overlapped(self, read: float, compute: float) -> float:
        return max(read, compute) + (1.0 - self.rates.overlap) * min(read, compute)


def arithmetic_rates(
    sizes: ModelSizes, *, one: float, few: tuple[int, float], full: tuple[int, float], chunk: float
) -> tuple[float, float]:
    """Multiply-adds a second and overlap, from measured seconds.

    Args:
        one: of an expert with one row; `few` and `full`: (rows, seconds) of an expert with several.
        chunk: of a whole layer's experts for `CHUNK_ROWS` rows.

    Where a chunk is clearly bound by arithmetic, it decides the rate: more rows than one expert's share the
    caches. Near the border an error of the overlap would have it counted as what it is not.
    """
    ops = sizes.expert_ops
    distinct = sizes.distinct(CHUNK_ROWS)
    each = (CHUNK_ROWS * sizes.top_k / distinct, chunk / distinct)
    overlap = 1.0
    rate = (full[0] - 1) * ops / full[1]
    for _ in range(8):  # either depends a little on the other
        rows, seconds = each if (each[0] - 1) * ops / rate > CLEARLY * one else full
        rate = (rows - 1) * ops / max(seconds - (1.0 - overlap) * one, seconds / 2)
        compute = (few[0] - 1) * ops / rate
        lost = few[1] - max(one, compute)
        overlap = min(1.0, max(0.0, 1.0 - lost / min(one, compute)))
    return rate, overlap
