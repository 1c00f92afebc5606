"""A model that reads its prompt and says what `reader` makes of it, token by token, behind a real engine.

Its latents are the token ids themselves. So it reads the whole context from the pages, as a network does, and
template, tokenizer, grammar, sessions and stream machine are the real ones: only the logits are made up.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

import torch

from k2hybrid.cache.pages import LatentPages
from k2hybrid.cache.rows import Fp32Rows
from k2hybrid.chat.markers import Markers
from k2hybrid.chat.template import ChatTemplate
from k2hybrid.chat.tokenizer import Tokenizer
from k2hybrid.checkpoint.spec import read_spec
from k2hybrid.config import MINI_MODEL, RuntimeConfig
from k2hybrid.engine.engine import Engine
from k2hybrid.model.batch import Batch, Span
from k2hybrid.runtime import Runtime
from k2hybrid.runtime.sizes import network_sizes
from tests.clients.reader import answer

VOCABULARY = Path(__file__).parents[1] / "golden"  # the published one, and its chat template
CONTEXT_TOKENS = 131_072
_FILES = ("tiktoken.model", "tokenizer_config.json", "chat_template.jinja")
_SURE = 80.0


@dataclass
class State:
    batch: Batch
    failed_rows: set[int] = field(default_factory=set)


class Player:
    """A `StepModel` over pages whose rows hold one number."""

    def __init__(self, tokenizer: Tokenizer, pages: LatentPages, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._header_end = Markers.from_specials(tokenizer.specials).im_middle
        self._pages = pages
        self._vocab_size = vocab_size
        self._answer = lru_cache(64)(self._answer_to)  # the same prompt for each of its answer's tokens

    def begin(self, batch: Batch) -> State:
        """See `StepModel`."""
        return State(batch)

    def forward(self, state: State, until: int) -> State:
        """Store the ids."""
        for span, rows in zip(state.batch.spans, state.batch.row_slices(), strict=True):
            ids = state.batch.ids[rows].to(torch.float32).unsqueeze(1)
            self._pages.write(0, span.page_table, span.start, ids)
        return state

    def logits(self, state: State) -> torch.Tensor:
        """Sure of the answer's next token."""
        wanted = set(state.batch.logit_rows.tolist())
        logits = torch.zeros(len(wanted), self._vocab_size)
        at = 0
        for span, rows in zip(state.batch.spans, state.batch.row_slices(), strict=True):
            for row in range(rows.start, rows.stop):
                if row in wanted:
                    logits[at, self._next(self._context(span, row - rows.start))] = _SURE
                    at += 1
        return logits

    def _context(self, span: Span, row: int) -> list[int]:
        stop = span.start + row + 1
        return self._pages.gather(0, span.page_table, 0, stop)[:, 0].to(torch.int64).tolist()

    def _next(self, context: list[int]) -> int:
        """The token after `context`: the first one of what is still to say; the end if all else was said.

        The reasoning may have been ended from outside, or be over already in the prompt.
        """
        at = len(context) - context[::-1].index(self._header_end)
        said = self._tokenizer.decode(context[at:])
        whole = self._answer(tuple(context[:at]))
        if "</think>" in said:
            said, whole = (text.partition("</think>")[2] for text in (said, whole))
        left = whole[len(said) :] if whole.startswith(said) else ""
        return self._tokenizer.encode_with_specials(left)[0] if left else min(self._tokenizer.stop_ids)

    def _answer_to(self, prompt: tuple[int, ...]) -> str:
        return answer(self._tokenizer.decode(prompt))


def playing(folder: Path) -> Runtime:
    """A started runtime with the published vocabulary; `folder` is for its checkpoint of a few files."""
    config = json.loads((MINI_MODEL / "config.json").read_text())
    tokenizer = Tokenizer.load(VOCABULARY)
    config["vocab_size"] = tokenizer.vocab_size
    (folder / "config.json").write_text(json.dumps(config))
    for name in _FILES:
        shutil.copy(VOCABULARY / name, folder)
    spec = replace(read_spec(folder), eos_token_ids=tuple(tokenizer.stop_ids))
    pages = LatentPages(1, 4 * CONTEXT_TOKENS // LatentPages.PAGE_TOKENS, Fp32Rows(1))
    runtime_config = RuntimeConfig(model=folder)
    engine = Engine(
        Player(tokenizer, pages, spec.vocab_size),
        pages,
        sizes=replace(network_sizes(spec, 0, 1), layers=1, moe_layers=0),
        vocab_size=spec.vocab_size,
        context_tokens=CONTEXT_TOKENS,
        config=runtime_config,
    )
    engine.start()
    return Runtime(
        name="k2",
        config=runtime_config,
        spec=spec,
        tokenizer=tokenizer,
        template=ChatTemplate.load(folder, tokenizer),
        engine=engine,
    )
