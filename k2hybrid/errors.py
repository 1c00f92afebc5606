"""The error tree. Every failure a user can cause has a name here, and its message says what to do.

Layer 0: imports nothing of the package.
"""

from __future__ import annotations

from collections.abc import Sequence


class K2Error(Exception):
    """Root of all errors that k2hybrid raises on purpose."""


class ConfigError(K2Error):
    """A runtime option is unknown, malformed or contradicts another one."""


class NativeError(K2Error):
    """The C++ extension is missing, was built from other sources, or rejected its arguments."""


class KernelError(K2Error):
    """A kernel of the device cannot run: Triton is not there, or a tensor is not what it takes."""


# --- checkpoint -----------------------------------------------------------------------------------


class CheckpointError(K2Error):
    """A model folder cannot be used. Subclasses say which part of it is wrong."""


class ModelNotFoundError(CheckpointError):
    """A model was named that is neither a folder nor a repository in the Hugging Face cache."""


class IncompleteError(CheckpointError):
    """A download was begun and not finished; the message has the command that goes on with it."""


class DownloadError(CheckpointError):
    """A repository cannot be downloaded, or not all of it; the message says why and what to do."""


class SpecError(CheckpointError):
    """`config.json` is unreadable, unsupported or contradicts itself."""


class HeaderError(CheckpointError):
    """A safetensors file is truncated, or its header lies about its content."""


class ShardIndexError(CheckpointError):
    """`model.safetensors.index.json` is unreadable or does not match the files beside it."""


class TensorError(CheckpointError):
    """Tensors are missing, extra, duplicated, mis-shaped or mis-typed.

    Attributes:
        problems: one line per offending tensor, all of them, not only the first.
    """

    def __init__(self, message: str, problems: Sequence[str] = ()) -> None:
        shown = "".join(f"\n  - {line}" for line in problems[:20])
        more = f"\n  … and {len(problems) - 20} more" if len(problems) > 20 else ""
        super().__init__(message + shown + more)
        self.problems = tuple(problems)


class TokenizerError(CheckpointError):
    """The vocabulary or its special tokens are missing or malformed."""


class TemplateError(K2Error):
    """A chat template failed, reached for something forbidden, or exceeded its time or memory bound."""


# --- requests -------------------------------------------------------------------------------------


class RequestError(K2Error):
    """A request cannot be served as it is; the client must change it.

    Attributes:
        param: the offending field, if one is to blame.
        code: a stable machine-readable word (`invalid_value`, `context_length_exceeded`, …).
    """

    def __init__(self, message: str, *, param: str | None = None, code: str = "invalid_request") -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class ContextLengthError(RequestError):
    """The prompt, or prompt plus requested output, does not fit the context."""

    def __init__(self, message: str, *, param: str | None = "messages") -> None:
        super().__init__(message, param=param, code="context_length_exceeded")


class CapacityError(K2Error):
    """The queue or the latent pages are full; the same request may succeed later."""


class EngineError(K2Error):
    """The engine stopped, or a step failed for this request alone."""


class TimeLimitError(EngineError):
    """A request ran for longer than it may (`request_seconds`)."""


class ExpertReadError(EngineError):
    """The bytes of an expert could not be read; the requests that needed it end, others go on."""


class WeightReadError(EngineError):
    """Weights that every request needs could not be read; requests are served again once they can."""


class TraceError(K2Error):
    """A routing trace cannot be recorded, is damaged, or is none."""


# --- evaluation -----------------------------------------------------------------------------------


class EvaluationError(K2Error):
    """`mini-eval` cannot go on: its server is not there or ended, or its words cannot be used."""


class ReplyError(EvaluationError):
    """One request was refused, or answered with something else than asked; its case counts as wrong."""
