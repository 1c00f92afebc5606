"""Runtime: a loaded model that answers. Layer 5."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, replace
from types import TracebackType
from typing import Any

from k2hybrid.chat.exchanges import Exchanges, Recalled, gather
from k2hybrid.chat.markers import Markers
from k2hybrid.chat.prompt import Prompt
from k2hybrid.chat.stop import ChatStopRule
from k2hybrid.chat.stream import ChatStream
from k2hybrid.chat.template import ChatTemplate
from k2hybrid.chat.tokenizer import Tokenizer
from k2hybrid.checkpoint.spec import ModelSpec
from k2hybrid.config import RuntimeConfig
from k2hybrid.engine.engine import Engine
from k2hybrid.engine.handle import JobHandle
from k2hybrid.errors import CapacityError, ContextLengthError, EngineError
from k2hybrid.experts.store import ExpertStore
from k2hybrid.hardware.memory import MachineMemory, MemoryUse
from k2hybrid.runtime.ahead import Ahead
from k2hybrid.runtime.chat import ChatRun
from k2hybrid.runtime.completion import TextReader, TextRun, TextStopRule, prompt_ids
from k2hybrid.runtime.experts import expert_status
from k2hybrid.runtime.generate import StopTokens, TokenRun
from k2hybrid.runtime.guarded import GuardedRun, InvalidCalls
from k2hybrid.runtime.mask import ConstraintMask
from k2hybrid.runtime.parking import Parking
from k2hybrid.runtime.rules import Rulebook
from k2hybrid.runtime.sessions import Sessions
from k2hybrid.types import ChatRequest, CompletionRequest, Job, SamplingParams


class Runtime:
    """A model that is loaded and running; `k2hybrid.load` makes one. Thread-safe.

    Args:
        name: what clients call the model.
        engine: started; stopped by `close`.
        sessions: closed by `close`; None: they are kept in memory alone.
        store: of the routed experts; closed by `close`.
        lost_files: names of shards of which bytes are lost; called from any thread.
        device: figures of what computes all but the routed experts; called from any thread.
        release: gives back what lies under the engine, after it stopped.
    """

    def __init__(
        self,
        *,
        name: str,
        config: RuntimeConfig,
        spec: ModelSpec,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        engine: Engine,
        sessions: Sessions | None = None,
        store: ExpertStore | None = None,
        lost_files: Callable[[], Sequence[str]] = tuple,
        device: Callable[[], dict[str, Any]] = lambda: {"name": "cpu"},
        release: Callable[[], None] = lambda: None,
    ) -> None:
        self.name = name
        self.config = config
        self.spec = spec
        self.tokenizer = tokenizer
        self.template = template
        self.engine = engine
        self._markers = Markers.from_specials(tokenizer.specials)
        self._stop_ids = tokenizer.stop_ids | frozenset(spec.eos_token_ids)
        self._store = store
        self._lost_files = lost_files
        self._device = device
        self._release = release
        self._closed = False
        exchanges = Exchanges(self._markers, tokenizer)
        self._sessions = sessions or Sessions(exchanges, engine.page_tokens)
        self._parking: Parking[ChatRun] = Parking(ttl_s=config.retry_seconds)
        self._parked_texts: Parking[TextRun] = Parking(ttl_s=config.retry_seconds)
        self._rulebook = Rulebook(tokenizer, self._markers, self._stop_ids)
        self._ahead = Ahead(self._prompt_ids, engine.submit, lambda: engine.idle)

    @property
    def context_tokens(self) -> int:
        """Prompt and output of one request at most: what the context and the latent pages both hold."""
        return self.engine.capacity_tokens

    @property
    def invalid_calls(self) -> InvalidCalls:
        """Counts of tool calls that did not fit their schema."""
        return self._rulebook.invalid_calls

    def status(self) -> dict[str, dict[str, Any]]:
        """Figures of this moment.

        "engine" and "latents" are as `EngineMetrics.snapshot` and `PageMemory.snapshot`, with the row format;
        "experts" says where they lie, "device" what computes the rest (see `models.DeviceStatus`), "weights"
        which files were lost, "journal" whether it is written (see `Sessions.status`), and "memory" what this
        process and the machine have.
        """
        return {
            "engine": self.engine.metrics.snapshot(),
            "latents": {"rows": self.config.latent_rows, **self.engine.latents},
            "experts": expert_status(self._store),
            "device": self._device(),
            "weights": {"lost_files": list(self._lost_files())},
            "journal": self._sessions.status(),
            "memory": {**asdict(MemoryUse.now()), **asdict(MachineMemory.now())},
        }

    def is_exact(self, tool: Mapping[str, Any]) -> bool:
        """Whether a grammar holds all that `tool` declares; otherwise its calls are validated as well."""
        return self._rulebook.is_exact(tool)

    def generate(
        self,
        ids: Sequence[int],
        sampling: SamplingParams | None = None,
        max_tokens: int | None = None,
        stop_ids: Collection[int] | None = None,
        request_id: str = "",
    ) -> TokenRun:
        """Continue `ids`; iterate the result for tokens.

        Args:
            max_tokens: None, or more than the context leaves: what the context leaves.
            stop_ids: None: the model's end tokens; empty: nothing but max_tokens ends it.

        Raises:
            ContextLengthError: `ids` leave no room for a token of output.
            RequestError, CapacityError, EngineError: see `Engine.submit`.
        """
        limit = self._output_tokens(len(ids), max_tokens, "prompt")
        stop = StopTokens(self._stop_ids if stop_ids is None else stop_ids)
        params = sampling or SamplingParams()
        return TokenRun(
            lambda mailbox: self._submit(Job(ids, params, limit, stop, mailbox.put, request_id=request_id)),
            len(ids),
        )

    def chat(self, request: ChatRequest) -> ChatRun:
        """Validate, render and queue; iterate the result for events.

        Rendering and tokenizing take as long as the history is long, so an event loop calls `start_chat`.
        Several answers to one request are several calls, with different seeds; they share one prefill.

        Without tools, and with tool_choice "none", no tool call can begin. Declared tools are rendered either
        way, so that the prefix of the conversation stays the same. An answer that is not to be constrained
        may hold anything, and nothing of it is validated.

        Raises:
            RequestError: the request is at fault (`param` names the field).
            ContextLengthError: the prompt leaves no room for a token of output.
            TemplateError: the checkpoint's template failed on it.
            CapacityError: the queue is full.
        """
        self._require_open()
        key = request.retry_key
        if key and (parked := self._parking.take(key)) is not None:
            return parked.resumed(replace(request, store=parked.request.store))
        recalled = self._sessions.exchanges.recall(request.scope, request.messages)
        if not request.reuse:
            recalled = Recalled(request.messages, context_key=recalled.context_key)
        prompt = self._prompt(request, recalled)
        request = replace(request, store=request.store and recalled.store)
        limit = self._output_tokens(len(prompt.ids), request.max_tokens, "messages")
        rules, guard = self._rulebook.rules(
            request, prompt, limit, lambda read: self._stop_rule(request, prompt, mask, read)
        )
        mask = self._rulebook.mask(rules)
        tokens = TokenRun(
            lambda mailbox: self._submit(self._job(request, prompt, limit, mask, mailbox.put)),
            len(prompt.ids),
        )
        guarded = GuardedRun(
            tokens,
            guard,
            mask,
            self._markers,
            self.tokenizer,
            phase=rules.phase,
        )
        return ChatRun(
            request,
            guarded,
            lambda: ChatStream(
                self._markers,
                self.tokenizer,
                stop=request.stop,
                tools=request.tools,
                first_call_index=prompt.first_call_index,
                in_reasoning=prompt.in_reasoning,
                stop_ids=self._stop_ids,
            ),
            max_tokens=limit,
            ended=lambda run: self._ended(recalled, prompt, run),
            parked=(lambda run: self._parking.put(key, run, ChatRun.cancel)) if key else None,
        )

    def complete(self, request: CompletionRequest) -> TextRun:
        """Tokenize and queue a text to be continued as it stands; iterate the result for more of it.

        A request with a `retry_key` is taken up again by it, as in `chat`.

        Raises:
            RequestError, ContextLengthError, CapacityError, EngineError: as `generate`.
        """
        self._require_open()
        key = request.retry_key
        if key and (parked := self._parked_texts.take(key)) is not None:
            return parked.resumed()
        ids = prompt_ids(request, self.tokenizer)
        limit = self._output_tokens(len(ids), request.max_tokens, "prompt")
        stop = TextStopRule(request, self.tokenizer, self._stop_ids)
        tokens = TokenRun(
            lambda mailbox: self._submit(
                Job(
                    ids=ids,
                    sampling=request.sampling,
                    max_tokens=limit,
                    stop=stop,
                    sink=mailbox.put,
                    request_id=request.request_id,
                    scope=request.scope,
                    store=request.store,
                    reuse=request.reuse,
                    resumable=bool(key),
                )
            ),
            len(ids),
        )
        return TextRun(
            tokens,
            lambda: TextReader(request, self.tokenizer, self._stop_ids),
            limit,
            parked=(lambda run: self._parked_texts.put(key, run, TextRun.cancel)) if key else None,
        )

    def count(self, request: ChatRequest) -> int:
        """Tokens of the prompt that `chat` would make of `request`; raises as it does."""
        self._require_open()
        return len(self._prompt_ids(request))

    async def start_chat(self, request: ChatRequest) -> ChatRun:
        """`chat` in a worker thread. If the caller is cancelled meanwhile, so is the answer."""
        starting = asyncio.ensure_future(asyncio.to_thread(self.chat, request))
        try:
            return await asyncio.shield(starting)
        except asyncio.CancelledError:
            starting.add_done_callback(_cancel_started)
            raise

    def close(self) -> None:
        """End all requests with "cancelled" and let go of the checkpoint. Repeatedly."""
        if not self._closed:
            self._closed = True
            self._parking.close()
            self._parked_texts.close()
            self._ahead.close()
            self.engine.stop()
            self._rulebook.close()
            self._sessions.close()
            self.template.close()
            try:
                if self._store is not None:
                    self._store.close()
            finally:
                self._release()

    def __enter__(self) -> Runtime:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _submit(self, job: Job) -> JobHandle:
        """As `Engine.submit`; a full queue is told with the numbers that say how full."""
        try:
            return self.engine.submit(job)
        except CapacityError as error:  # prompt and output fit: `_output_tokens`
            running, most = self.engine.metrics.running, self.config.max_queue
            waiting = max(self.engine.metrics.waiting, most)  # those included that the engine has not seen
            raise CapacityError(
                f"the queue is full: {running} requests running, {waiting} waiting (--max-queue {most}); "
                "try again later"
            ) from error

    def _job(
        self,
        request: ChatRequest,
        prompt: Prompt,
        limit: int,
        mask: ConstraintMask,
        sink: Callable[..., None],
    ) -> Job:
        return Job(
            ids=prompt.ids,
            sampling=request.sampling,
            max_tokens=limit,
            stop=self._stop_rule(request, prompt, mask),
            sink=sink,
            mask=mask if request.constrained else None,
            request_id=request.request_id,
            scope=request.scope,
            store=request.store,
            reuse=request.reuse,
            resumable=bool(request.retry_key),
            progress=request.progress,
        )

    def _stop_rule(
        self, request: ChatRequest, prompt: Prompt, mask: ConstraintMask, read: Sequence[int] = ()
    ) -> ChatStopRule:
        """When the answer ends; the rule has read the tokens `read` already."""
        rule = ChatStopRule(
            self._markers,
            self.tokenizer,
            self._stop_ids,
            request.stop,
            in_reasoning=prompt.in_reasoning,
            pauses=lambda: mask.paused,
        )
        for token in read:
            rule.push(token)
        return rule

    def _ended(self, recalled: Recalled, prompt: Prompt, run: ChatRun) -> None:
        """An answer is out: remember it, and see to the next turn's latents."""
        request = run.request
        if run.finish_reason not in ("stop", "tool_calls", "length") or request.messages[-1].partial:
            return  # what continues a partial message is no message by itself
        answer = gather(run.events)
        # What the prompt began of the answer is a part of it.
        begun = self._begun(prompt.ids)
        made = self._sessions.exchanges.made(
            request.scope, recalled, answer, [*begun, *run.ids], request.response_id, store=request.store
        )
        before = prompt.ids[: len(prompt.ids) - len(begun)]
        self._sessions.remember(made, before, store=request.store)
        if run.finish_reason == "tool_calls":
            run.lease(self.config.lease_seconds)
        elif run.finish_reason == "stop" and self.config.idle_prefill and not self._closed:
            self._ahead.prefill(replace(request, messages=(*recalled.messages, answer.message())))

    def _begun(self, ids: Sequence[int]) -> Sequence[int]:
        """What follows the last header in a prompt's ids."""
        for at in range(len(ids) - 1, -1, -1):
            if ids[at] == self._markers.im_middle:
                return ids[at + 1 :]
        return ()

    def _prompt_ids(self, request: ChatRequest) -> list[int]:
        return self._prompt(request, self._sessions.exchanges.recall(request.scope, request.messages)).ids

    def _prompt(self, request: ChatRequest, recalled: Recalled) -> Prompt:
        """The prompt, known answers as they were generated, and thinking over where none is wanted."""
        prompt = self.template.render(recalled.messages, request.tools)
        ids = self._sessions.exchanges.spliced(prompt.ids, recalled)
        partial = bool(request.messages) and request.messages[-1].partial
        if request.thinking or partial:
            return replace(prompt, ids=ids)
        begin = () if prompt.in_reasoning else (self._markers.think_begin,)
        return replace(prompt, ids=[*ids, *begin, self._markers.think_end], in_reasoning=False)

    def _output_tokens(self, prompt_tokens: int, asked: int | None, param: str) -> int:
        most, context = self.context_tokens, self.engine.context_tokens
        left = most - prompt_tokens
        if left < 1:
            limit = f"{most} tokens of context"
            if most < context:
                limit = (
                    f"the KV cache holds {most} tokens, fewer than the context's {context}; "
                    "start the server with a larger --latent-gb (latent_bytes in Python)"
                )
            raise ContextLengthError(
                f"the prompt is too long: {prompt_tokens} tokens > {most - 1} maximum "
                f"({limit}; at least one token is for the answer)",
                param=param,
            )
        return left if asked is None else min(asked, left)

    def _require_open(self) -> None:
        if self._closed:
            raise EngineError("this runtime is closed; load the model again")


def _cancel_started(starting: asyncio.Future[ChatRun]) -> None:
    if not starting.cancelled() and starting.exception() is None:
        starting.result().cancel()
