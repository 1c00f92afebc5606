"""The only importer of the C++ extension."""

from __future__ import annotations

from contextlib import AbstractContextManager

from k2hybrid.errors import NativeError

try:
    from k2hybrid import _native
except ImportError as error:  # pragma: no cover - depends on the installation
    raise NativeError(
        f"the extension k2hybrid._native cannot be imported ({error}); build it with `pip install -e .`"
    ) from error

EXTENSION = _native
INSTRUCTION_SETS: tuple[str, ...] = tuple(EXTENSION.instruction_sets())  # what this CPU offers, best first
ExtensionError: type[Exception] = EXTENSION.Error  # what it raises; `NativeError` is what callers see


class _Errors(AbstractContextManager[None]):
    """Turns what the extension raises into `NativeError`. A decode step enters it hundreds of times."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, ExtensionError):
            raise NativeError(str(error)) from None


ERRORS = _Errors()
