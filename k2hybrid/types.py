"""Values and protocols that rooms exchange. Layer 0: imports only `errors`; torch for type checkers alone.

Three families:

* chat: `Message`, `ChatRequest`, and the events a token stream turns into;
* generation: `SamplingParams`, `Job`, `TokenEvent`/`DoneEvent`, and the two protocols through which the
  engine meets chat without knowing it (`LogitsMask`, `StopRule`);
* weights: `TensorRef`, `Weight8`, `WeightSource`, `ExpertSink`, and the hand-off (`RoutedExperts`,
  `ExpertSteps`, `SteppedExperts`, `Ticket`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypeAlias, runtime_checkable

if TYPE_CHECKING:
    import torch

# --- chat: what goes in ---------------------------------------------------------------------------

# "paused" stays inside: the job will go on (`StopRule.paused`).
ReasonCode = Literal["stop", "length", "tool_calls", "cancelled", "error", "paused"]
ToolChoice = Literal["auto", "none", "required"]


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call in the history. `arguments` is the JSON text as the client sent it, kept verbatim."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a conversation, whatever dialect it came in.

    `content` is text, or a sequence of parts (`{"type": "text", "text": …}`, …), or None.
    """

    role: str
    content: str | tuple[Mapping[str, Any], ...] | None = None
    name: str | None = None
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    partial: bool = False  # the last assistant message is to be continued, not answered
    response_id: str | None = None  # of the response that an assistant message came in, if the client has it

    # Histories are long: these are several times as fast as `dataclasses.replace`.

    def with_reasoning(self, reasoning: str | None) -> Message:
        """The same with other reasoning."""
        return Message(
            self.role, self.content, self.name, reasoning, self.tool_calls, self.tool_call_id, self.partial,
            self.response_id,
        )  # fmt: skip

    def with_calls(self, tool_calls: tuple[ToolCall, ...]) -> Message:
        """The same with other tool calls."""
        return Message(
            self.role, self.content, self.name, self.reasoning, tool_calls, self.tool_call_id, self.partial,
            self.response_id,
        )  # fmt: skip

    def answering(self, tool_call_id: str, name: str | None) -> Message:
        """The same as the result of a call."""
        return Message(
            self.role, self.content, name, self.reasoning, self.tool_calls, tool_call_id, self.partial,
            self.response_id,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is drawn. Defaults follow the model's makers: temperature 1.0, nothing cut."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: all
    min_p: float = 0.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None  # None: none; n: the chosen token's and the n best


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """What every dialect parses into."""

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    tool_choice: ToolChoice = "auto"
    tool_name: str | None = None  # with "required": the one tool that is to be called
    parallel_tool_calls: bool = True  # False: one call at most
    json_schema: Mapping[str, Any] | None = None  # the content is JSON that fits it, and nothing else
    constrained: bool = True  # False: nothing is enforced or validated; tokens are the model's own
    thinking: bool = True  # False: the answer begins after an empty reasoning
    thinking_budget: int | None = None  # tokens of reasoning at most; None: so many that an answer has room
    sampling: SamplingParams = SamplingParams()
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    request_id: str = ""
    response_id: str = ""  # under which the answer goes out, and by which it is found again
    scope: str = ""  # of the API key: nothing is shared between scopes
    store: bool = True  # False: nothing of it is written to disk
    reuse: bool = True  # False: computed as if nothing were known
    retry_key: str = ""  # equal for a request and its retry; "": an answer that nobody waits for is dropped
    progress: bool = False  # tell how far the prompt's prefill is


@dataclass(frozen=True, slots=True)
class CompletionRequest:
    """A text, or token ids, to be continued as they stand: no template, no roles, no thinking."""

    prompt: str | tuple[int, ...]
    specials: bool = False  # spellings of control tokens in the text mean them, and the answer shows them
    sampling: SamplingParams = SamplingParams()
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    request_id: str = ""
    scope: str = ""  # as in `ChatRequest`, and so the next three
    store: bool = True
    reuse: bool = True
    retry_key: str = ""


# --- chat: what comes out -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Reasoning:
    """A piece of the model's thinking."""

    text: str


@dataclass(frozen=True, slots=True)
class Content:
    """A piece of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCallStart:
    """A tool call opens: its position in this message, canonical id and name."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class ToolCallArguments:
    """A piece of the argument JSON of call `index`."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class ToolCallEnd:
    """Call `index` is finished."""

    index: int
    cut: bool = False  # the answer ended inside it


@dataclass(frozen=True, slots=True)
class Malformed:
    """Something the model wrote that is neither text nor a usable call: visible, never swallowed.

    `code` is for programs: "malformed"; "invalid_tool_call" if a call fits no declaration after all attempts;
    "invalid_json" if the content does not fit the schema asked for after all attempts.
    """

    text: str
    reason: str
    code: str = "malformed"


Event = Reasoning | Content | ToolCallStart | ToolCallArguments | ToolCallEnd | Malformed


# --- generation -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural-log probability of a token under the model (before temperature and cuts), and the best few."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class TokenEvent(NamedTuple):  # quickly made: every token takes one
    """One generated token."""

    token: int
    logprob: TokenLogprob | None = None


@dataclass(frozen=True, slots=True)
class PromptProgress:
    """How far a prompt's prefill is: `processed` of `total` tokens, `cached` of them taken from before."""

    total: int
    cached: int
    processed: int
    ms: float  # since the first pass


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of one request. `cached_tokens` of the prompt were not prefilled again."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    prefill_ms: float = 0.0
    decode_ms: float = 0.0
    reasoning_tokens: int = 0  # of the completion; known where a chat stream reads it


@dataclass(frozen=True, slots=True)
class DoneEvent:
    """The last event of a job. With reason "error", `error` says why."""

    reason: ReasonCode
    usage: Usage
    error: Exception | None = None


EngineEvent = TokenEvent | PromptProgress | DoneEvent


@runtime_checkable
class LogitsMask(Protocol):
    """Which tokens may come next; stateful, one per job. None of the engine's business why."""

    def apply(self, logits: torch.Tensor) -> None:
        """Set forbidden entries of `logits` [vocab] fp32 to −inf, in place."""

    def accept(self, token: int) -> Sequence[int]:
        """`token` was chosen. The tokens that are generated with it, at least one.

        Mostly `token` alone; with those behind it that can only follow; or others in its place.
        """


@runtime_checkable
class StopRule(Protocol):
    """When a job ends; stateful, one per job."""

    def push(self, token: int) -> bool:
        """True if generation ends with `token` (which is still delivered)."""

    @property
    def paused(self) -> bool:
        """Whether the end is a pause: what was generated is looked at before it goes on."""


@dataclass(frozen=True, slots=True)
class Job:
    """What the engine is asked to do: continue `ids`. `sink` is called from the engine's thread."""

    ids: Sequence[int]
    sampling: SamplingParams
    max_tokens: int  # 0, for background jobs alone: the latents of `ids` are computed, and that is all
    stop: StopRule
    sink: Callable[[EngineEvent], None]
    mask: LogitsMask | None = None
    request_id: str = ""
    scope: str = ""  # prefixes are shared within a scope only
    store: bool = True  # False: its latents stay in memory
    reuse: bool = True  # False: no prefix is taken from what is known
    resumable: bool = False  # its events are kept, so that `Engine.resume` can give them again
    background: bool = False  # runs while nothing else does, and ends when something else comes
    progress: bool = False  # the sink hears of every prefilled chunk, before the first token


# --- weights --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TensorRef:
    """Where a tensor's bytes lie: `address` is inside a read-only map of `path` that its owner keeps open."""

    name: str
    path: Path
    offset: int  # bytes from the start of the file
    nbytes: int
    dtype: str  # safetensors' words: "BF16", "I32", …
    shape: tuple[int, ...]
    address: int


@dataclass(frozen=True, slots=True)
class Int4Ref:
    """One INT4 matrix in place: `packed` int32 [out, in/8], `scale` bf16 [out, in/group]."""

    packed: TensorRef
    scale: TensorRef


@dataclass(frozen=True, slots=True)
class ExpertRef:
    """One routed expert: `gate`, `up` [moe_intermediate, hidden], `down` [hidden, moe_intermediate]."""

    gate: Int4Ref
    up: Int4Ref
    down: Int4Ref


Weight8Kind = Literal["int8", "fp8"]


@dataclass(frozen=True, slots=True, eq=False)
class Weight8:
    """A matrix of 8-bit values with a scale for each output row: W[n, k] = scale[n] · value[n, k].

    Attributes:
        values: [N, K], int8, or uint8 with the bits of e4m3 (never NaN).
        scale: fp32 [N].
        kind: which of the two.
    """

    values: torch.Tensor
    scale: torch.Tensor
    kind: Weight8Kind

    @property
    def shape(self) -> torch.Size:
        """(N, K)."""
        return self.values.shape

    @property
    def nbytes(self) -> int:
        """Of values and scales."""
        return self.values.nbytes + self.scale.nbytes

    def data_ptr(self) -> int:
        """Where the values begin."""
        return self.values.data_ptr()


LinearWeight: TypeAlias = "torch.Tensor | Weight8"  # what a linear reads: bf16 [N, K], or 8 bits


class LatentWeights(NamedTuple):
    """What a layer's latent attention is made of.

    Attributes:
        q_a: [rank, hidden]; None: q reads the rows themselves.
        q_norm: fp32 [rank]; None as q_a.
        q: [heads · (nope + rope), rank or hidden].
        kv_a: [latent + rope, hidden].
        latent_norm: fp32 [latent].
        key_to_latent, latent_to_value: bf16 [heads, nope, latent] and [heads, value, latent].
        o: [hidden, heads · value].
    """

    q_a: LinearWeight | None
    q_norm: torch.Tensor | None
    q: LinearWeight
    kv_a: LinearWeight
    latent_norm: torch.Tensor
    key_to_latent: torch.Tensor
    latent_to_value: torch.Tensor
    o: LinearWeight


class ExpertSink(Protocol):
    """Takes experts from the loader, which so needs to know nothing of the store behind it."""

    def add_expert(self, layer: int, expert: int, ref: ExpertRef) -> None:
        """Called exactly once for each (layer, expert); `layer` counts from 0 over all layers."""


class WeightSource(Protocol):
    """Hands out the non-expert weights, each exactly once."""

    def take(self, layer: int | None, role: str) -> LinearWeight:
        """The tensor in place (or on the device), e.g. `take(3, "q_a_proj")`, `take(None, "lm_head")`.

        8 bits at most for what nothing but `LinearKernels.linear` reads.
        """


@dataclass(frozen=True, slots=True)
class TicketStats:
    """What one hand-off cost."""

    bytes_read: int
    misses: int
    wait_ms: float
    busy_ms: float


class Ticket(Protocol):
    """A submitted hand-off. Collect it exactly once."""

    def collect(self) -> torch.Tensor:
        """Routed sum, fp32 [rows, hidden]; rows whose experts failed are listed in `failed_rows`."""

    @property
    def failed_rows(self) -> tuple[int, ...]:
        """Rows whose result is not to be used (their request ends); valid after `collect`."""

    @property
    def stats(self) -> TicketStats:
        """Valid after `collect`."""


class RoutedExperts(Protocol):
    """The routed experts of all layers, wherever their bytes lie."""

    def submit(self, layer: int, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> Ticket:
        """x bf16 [rows, hidden], ids int32 [rows, top_k] (−1: padding), weights fp32 [rows, top_k]."""


class ExpertSteps(Protocol):
    """What is handed off within a step is recorded on a stream, and answered while the stream runs."""

    def begin(self, layers: Sequence[int], rows: int) -> None:
        """Open a step that will submit these layers, in this order, with so many valid rows."""

    def end(self) -> set[int]:
        """Wait for the stream and close the step; rows that were lost. `EngineError` if it was aborted."""

    def abort(self) -> None:
        """Let the open step complete without a result, after an error in the midst of it. From any thread."""


class SteppedExperts(RoutedExperts, ExpertSteps, Protocol):
    """Routed experts that a stream asks: what was lost, and what it cost, is known when a step ends.

    Tickets only record; their `failed_rows` and `stats` are empty.
    """

    @property
    def stats(self) -> TicketStats:
        """Of the step that ended last."""
