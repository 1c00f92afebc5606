"""What a model takes of a card's memory, row by row, before anything is loaded. Pure; layer 3.

Weights are counted tensor by tensor. A pass over many rows keeps what `_row_bytes` counts for
all of them, and a layer's stages, which follow each other, take `_scratch_bytes` besides. What is left over
holds experts. `docs/memory.md` says what each row stands for.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from k2hybrid.cache.row_sizes import PAGE_TOKENS, row_bytes
from k2hybrid.checkpoint.names import ExpectedTensor, dense_layer_tensors, outer_tensors
from k2hybrid.checkpoint.spec import ModelSpec
from k2hybrid.config import DenseWeights, LatentRows
from k2hybrid.errors import ConfigError
from k2hybrid.experts.plan import CardPlan, Need, gib
from k2hybrid.experts.prediction import ModelSizes
from k2hybrid.model.scratch import ABSORBED_ROWS, MLP_ROWS, ON_DEVICE, absorbed_below

MIB = 1 << 20
CONTEXT_BYTES = 600 * MIB  # assumed: the driver's context, the kernels' code, a workspace of cuBLAS
ALLOCATOR_BYTES = 256 * MIB  # assumed: what torch's allocator rounds up and keeps apart
GRAPH_BYTES = 16 * MIB  # assumed: what the driver keeps of one captured step
ALIGNMENT = 256  # of a tensor within the weights
EXPERT_TILE_ROWS = 1024  # of one streamed expert, as `experts/prefill_stream.py` has them
PARTS = 192  # of the contexts in a decode step's attention: one a multiprocessor, and no card has more
HOT_TABLE_BYTES = 12  # for each expert of each layer: its slot, twice, and its uses
MOVED_PAGES = 2  # that are gathered on the card, see `cache.cuda_mover`
CHUNK_STEP = 512  # chunks are multiples of it, at least one


@dataclass(frozen=True, slots=True)
class CardWishes:
    """What is to be on a card.

    Attributes:
        context: tokens of latents, of all sequences together.
        longest: tokens of one sequence at most; None: `context`.
        chunk: rows of a prefill chunk at most.
        graph_rows: decode batches of up to so many sequences are recorded, each size for itself.
        ring: experts on their way through the card while a prefill streams them.
        embedding: on the card too, not in RAM.
        moved: pages of latents go to RAM or to a journal and come back.
        context_bytes: of the CUDA context, see `CONTEXT_BYTES`.
    """

    dense: DenseWeights = "bf16"
    rows: LatentRows = "bf16"
    context: int = 32768
    longest: int | None = None
    chunk: int = 16384
    graph_rows: int = 16
    ring: int = 8
    embedding: bool = False
    moved: bool = False
    context_bytes: int = CONTEXT_BYTES


def card_plan(spec: ModelSpec, budget: int, wishes: CardWishes) -> CardPlan:
    """The table for `budget` bytes; its last row are the experts that what is left over holds.

    If it does not fit, there is no such row, and `problem` says what would.
    """
    needs = list(card_needs(spec, wishes))
    spare = budget - sum(need.nbytes for need in needs)
    weights = sum(nbytes for _, nbytes in weight_bytes(spec, wishes))
    if spare < 0:
        lacking = f"{_what(wishes)} lack {gib(-spare)} on a card with {budget:,} bytes"
        problem = f"{lacking}; what would fit: {_what_fits(spec, budget, wishes)}"
        return CardPlan(budget, tuple(needs), weights, wishes.chunk, 0, problem)
    sizes = ModelSizes.of(spec).experts
    hot = 0
    tables = HOT_TABLE_BYTES * spec.num_layers * sizes.experts
    if sizes.count and spare >= tables + sizes.expert_bytes:
        hot = min((spare - tables) // sizes.expert_bytes, sizes.count)
        where = f"what is left over; {sizes.expert_bytes:,} bytes each, and tables"
        needs.append(
            Need(f"hot experts, {hot:,} of {sizes.count:,}", hot * sizes.expert_bytes + tables, where)
        )
    return CardPlan(budget, tuple(needs), weights, wishes.chunk, hot, "")


def require_card(spec: ModelSpec, budget: int, wishes: CardWishes) -> CardPlan:
    """`card_plan`. ConfigError if it does not fit; the message says what would."""
    plan = card_plan(spec, budget, wishes)
    if plan.problem:
        raise ConfigError(plan.problem)
    return plan


def largest_context(spec: ModelSpec, budget: int, wishes: CardWishes) -> int:
    """Tokens of context, whole pages, that fit with everything else as wished; 0: none do."""

    def fits(pages: int) -> bool:
        tokens = pages * PAGE_TOKENS
        longest = None if wishes.longest is None else min(wishes.longest, tokens)
        return taken(spec, dataclasses.replace(wishes, context=tokens, longest=longest)) <= budget

    most = -(-spec.max_positions * max(1, wishes.graph_rows) // PAGE_TOKENS)
    return PAGE_TOKENS * _largest(fits, most)


def largest_chunk(spec: ModelSpec, budget: int, wishes: CardWishes) -> int:
    """Rows of a prefill chunk, up to the wished ones, that fit with everything else as wished; 0: none do."""

    def fits(steps: int) -> bool:
        return taken(spec, dataclasses.replace(wishes, chunk=steps * CHUNK_STEP)) <= budget

    return CHUNK_STEP * _largest(fits, wishes.chunk // CHUNK_STEP)


def taken(spec: ModelSpec, wishes: CardWishes) -> int:
    """Bytes of all but the hot experts."""
    return sum(need.nbytes for need in card_needs(spec, wishes))


def card_needs(spec: ModelSpec, wishes: CardWishes) -> Iterator[Need]:
    """The rows of the table, all but the hot experts."""
    about = {
        "matrices": "bf16" if wishes.dense == "bf16" else f"{wishes.dense}, an fp32 scale an output row",
        "kv_b": "bf16, whatever the others are",
        "router": "bf16; its correction bias fp32",
        "norms": "fp32",
        "embedding": "bf16",
    }
    for kind, nbytes in weight_bytes(spec, wishes):
        yield Need(f"weights: {kind}", nbytes, about[kind])
    row = row_bytes(wishes.rows, spec.kv_lora_rank, spec.qk_rope_head_dim)
    tokens = -(-wishes.context // PAGE_TOKENS) * PAGE_TOKENS
    latents = tokens * spec.num_layers * row
    yield Need(f"latents, {tokens:,} tokens", latents, f"{wishes.rows} rows, {row:,} bytes a layer")
    if wishes.moved:
        pages = MOVED_PAGES * PAGE_TOKENS * spec.num_layers * row
        yield Need("pages on their way", pages, "one to RAM, one from there")
    yield Need("CUDA context", wishes.context_bytes, "assumed; with the code of kernels")
    yield Need("allocator", ALLOCATOR_BYTES, "assumed; what it rounds up")
    yield Need("decode graphs", _graph_bytes(spec, wishes), f"for batches of 1 to {wishes.graph_rows}")
    each = _row_bytes(spec)
    yield Need(f"a chunk of {wishes.chunk:,} rows", wishes.chunk * each, f"{each:,} bytes a row")
    blocks = ON_DEVICE.block_bytes + ON_DEVICE.tile_bytes
    yield Need("scratch of a layer", _scratch_bytes(spec, wishes.chunk, blocks), "its largest stage")
    sizes = ModelSizes.of(spec).experts
    if sizes.count:
        yield Need("ring of a streamed prefill", wishes.ring * sizes.expert_bytes, f"{wishes.ring} experts")


def weight_bytes(spec: ModelSpec, wishes: CardWishes) -> list[tuple[str, int]]:
    """(kind, bytes) of the dense weights on the card, in the order of the table."""
    found = dict.fromkeys(("matrices", "kv_b", "router", "norms", "embedding"), 0)
    layers = (dense_layer_tensors(spec, layer) for layer in range(spec.num_layers))
    for tensor in itertools.chain(outer_tensors(spec), *layers):
        kind = _kind(tensor.key.role)
        if kind != "embedding" or wishes.embedding:
            nbytes = _tensor_bytes(tensor, kind, wishes.dense)
            found[kind] += -(-nbytes // ALIGNMENT) * ALIGNMENT
    return [(kind, nbytes) for kind, nbytes in found.items() if nbytes]


def _kind(role: str) -> str:
    if role == "embed_tokens":
        return "embedding"
    if role.endswith("norm"):
        return "norms"
    if role.startswith("router"):
        return "router"
    return "kv_b" if role == "kv_b_proj" else "matrices"


def _tensor_bytes(tensor: ExpectedTensor, kind: str, dense: DenseWeights) -> int:
    values = math.prod(tensor.shape)
    if kind == "norms" or "F32" in tensor.dtypes:
        return 4 * values
    if kind == "matrices" and dense != "bf16":
        return values + 4 * tensor.shape[0]
    return 2 * values


def _row_bytes(spec: ModelSpec) -> int:
    """What a row of a chunk keeps from layer to layer, and through the hand-off to the experts."""
    hidden, top_k = spec.hidden_size, spec.top_k if spec.moe_layers else 0
    residual, x, routed = 4 * hidden, 2 * hidden, 4 * hidden if top_k else 0
    # ids, positions and slots int64, angles' cosines and sines fp32; experts' ids, weights and sorted pairs.
    return residual + x + routed + 3 * 8 + 4 * spec.qk_rope_head_dim + top_k * (8 + 40)


def _scratch_bytes(spec: ModelSpec, rows: int, blocks: int) -> int:
    """The largest of a layer's stages: they follow each other, and each gives back what it took.

    What a product gives is fp32; it is rounded to bf16 for the next one. `blocks`: of attention's own.
    """
    hidden, latent, heads = spec.hidden_size, spec.kv_lora_rank, spec.num_heads
    query, values = heads * spec.qk_head_dim, heads * spec.v_head_dim
    shared = spec.moe_intermediate_size * spec.num_shared_experts if spec.moe_layers else 0
    width = max(spec.intermediate_size if spec.first_k_dense else 0, shared)
    # Until queries are rounded and latents stored: the query, what kv_a gave.
    kept = 4 * query + 4 * spec.latent_dim
    split = 2 * query  # in two parts, rotated
    attending = 2 * query + 2 * values  # and room for the result
    of_experts, of_mlp = min(rows, EXPERT_TILE_ROWS), min(rows, MLP_ROWS)
    # Groups of spans, or one span that is longer than they are.
    below = absorbed_below(latent, spec.qk_nope_head_dim, spec.qk_rope_head_dim, spec.v_head_dim)
    absorbed = int(min(rows, max(ABSORBED_ROWS, below)))
    return max(
        rows * 8 * hidden,  # a norm
        rows * (4 * query + 10 * (spec.q_lora_rank or 0)),
        rows * (kept + split + 2 * spec.latent_dim),  # and the latent with its rotated part
        # Queries in latent space in fp32, then bf16; what they found there, too; its values.
        rows * (split + 2 * values) + absorbed * (8 * heads * latent + 4 * values) + blocks,
        rows * (split + attending),  # both parts of the queries put together
        rows * attending + blocks,  # expanded attention; what it gives lies where it belongs
        rows * (attending + 4 * hidden),
        rows * 24 * spec.num_experts,  # scores, biased and sorted
        of_mlp * (10 * width + 4 * hidden) + (rows > of_mlp) * rows * 4 * hidden,
        of_experts * (10 * hidden + 10 * spec.moe_intermediate_size + 256) if spec.moe_layers else 0,
    )


def _graph_bytes(spec: ModelSpec, wishes: CardWishes) -> int:
    """Buffers at fixed addresses for each batch size, and a pool for activations that all graphs share."""
    most = wishes.graph_rows
    if not most:
        return 0
    pages = -(-(wishes.longest or wishes.context) // PAGE_TOKENS)
    # The embedded token, its angles, slot and length, a page table; logits.
    sequence = 4 * (spec.hidden_size + spec.qk_rope_head_dim + pages + spec.vocab_size) + 8 + 4
    latent = spec.num_heads * spec.kv_lora_rank
    parts = max(PARTS, 2 * most) * (latent + spec.num_heads) * 4  # of contexts, merged by log-sum-exp
    # In the absorbed form a row's query and its result are in the latent space, fp32 and bf16; logits again.
    row = _row_bytes(spec) + 2 * 6 * latent + 4 * spec.vocab_size
    pool = most * row + _scratch_bytes(spec, most, parts)
    return most * GRAPH_BYTES + most * (most + 1) // 2 * sequence + pool


def _what(wishes: CardWishes) -> str:
    return (
        f"{wishes.dense} weights, {wishes.rows} latents of {wishes.context:,} tokens and a chunk of "
        f"{wishes.chunk:,} rows"
    )


def _what_fits(spec: ModelSpec, budget: int, wishes: CardWishes) -> str:
    eight = wishes if wishes.dense != "bf16" else dataclasses.replace(wishes, dense="int8")
    cheaper = (dataclasses.replace(wishes, rows="fp8"), eight, dataclasses.replace(eight, rows="fp8"))
    found = [_options(other, wishes) for other in cheaper if taken(spec, other) <= budget][:1]
    if chunk := largest_chunk(spec, budget, wishes):
        found.append(f"a prefill chunk of {chunk:,} rows")
    if context := largest_context(spec, budget, wishes):
        found.append(f"a context of {context:,} tokens in all")
    if found:
        return "; or ".join(found)
    smallest = dataclasses.replace(cheaper[-1], chunk=CHUNK_STEP, graph_rows=1, embedding=False)
    if context := largest_context(spec, budget, smallest):
        options = [_options(smallest, wishes), f"a prefill chunk of {CHUNK_STEP} rows, one graph"]
        return ", ".join([*filter(None, options), f"a context of {context:,} tokens in all"])
    least = taken(spec, dataclasses.replace(smallest, context=PAGE_TOKENS, longest=None))
    return f"nothing; the least that this model takes is {gib(least)}, so use --device cpu"


def _options(other: CardWishes, wishes: CardWishes) -> str:
    """What to say on the command line for it."""
    options = {"--latent-rows": (other.rows, wishes.rows), "--dense-weights": (other.dense, wishes.dense)}
    return " ".join(f"{name} {then}" for name, (then, now) in options.items() if then != now)


def _largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest n from 0 to `most` that fits; more never fits where less does not."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle):
            low = middle
        else:
            high = middle - 1
    return low
