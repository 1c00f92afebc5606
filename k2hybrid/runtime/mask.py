"""Logits masks: what `chat` allows, written into a row of logits. Layer 5."""

from __future__ import annotations

from concurrent.futures import Executor, Future

import torch

from k2hybrid.chat.constraint import Allowed, Constraint
from k2hybrid.native.logits import mask_logits

# A grammar's mask takes longer the larger the vocabulary; handing it to another thread takes longer than a
# small one.
OFFLOAD_FROM = 32_768


class ConstraintMask:
    """A `types.LogitsMask` over a `Constraint`.

    Args:
        plain_tokens: ids below are plain tokens, the others specials.
        executor: computes the mask of the next token while the model runs; None: when it is needed.
    """

    def __init__(self, constraint: Constraint, plain_tokens: int, executor: Executor | None = None) -> None:
        self._constraint = constraint
        self._plain = plain_tokens
        self._executor = executor
        self._next: Future[Allowed] | None = None

    @property
    def paused(self) -> bool:
        """Whether what was generated is to be validated before it goes on."""
        return self._constraint.paused

    @property
    def broken(self) -> bool:
        """See `Constraint.broken`; from any thread."""
        return self._constraint.broken

    @property
    def in_content(self) -> bool:
        """Whether no call was begun."""
        return self._constraint.calls == 0

    def apply(self, logits: torch.Tensor) -> None:
        """Set forbidden entries of `logits` [vocab] to −inf, in place."""
        allowed = self._settled() or self._constraint.allowed()
        mask_logits(logits, self._plain, allowed.bits, text=allowed.text, specials=allowed.specials)

    def accept(self, token: int) -> list[int]:
        """`token` was chosen; see `Constraint.accept`."""
        taken = self._constraint.accept(token)
        if self._executor is not None and self._constraint.needs_grammar and not self.paused:
            self._next = self._executor.submit(self._constraint.allowed)
        return taken

    def resume(self) -> None:
        """See `Constraint.resume`; while the job does not run."""
        self._settled()
        self._constraint.resume()

    def rewind(self, generated: int) -> None:
        """See `Constraint.rewind`; while the job does not run."""
        self._settled()
        self._constraint.rewind(generated)

    def _settled(self) -> Allowed | None:
        """What was computed ahead, if anything was; nobody else is at the constraint afterwards."""
        computing, self._next = self._next, None
        return None if computing is None else computing.result()
