"""Catches what would make the host wait for a device, or need memory by data, on tensors of the CPU too."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

METHODS = {
    "item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__", "__contains__",
    "__array__", "nonzero", "unique", "masked_select", "bincount", "argwhere", "repeat_interleave",
}  # fmt: skip
OPERATORS = {
    "_local_scalar_dense", "item", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive",
    "bincount", "equal", "is_nonzero", "repeat_interleave",
}  # fmt: skip


class WaitsError(AssertionError):
    """Something would have waited."""


class NoWaiting:
    """`with NoWaiting() as guard:`; what runs in `guard.allowed(f)` may wait: stand-ins."""

    def __init__(self) -> None:
        self._on = True
        self._stack = ExitStack()

    def __enter__(self) -> NoWaiting:
        self._stack.enter_context(_Functions(self))
        self._stack.enter_context(_Operators(self))
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def check(self, name: str, args: tuple[Any, ...]) -> None:
        """Raise if a call of `name` is none for a device's step."""
        if not self._on:
            return
        masks = name in ("index.Tensor", "index_put_.default") and any(
            isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if name in METHODS or name.partition(".")[0] in OPERATORS or masks:
            raise WaitsError(name)

    @contextmanager
    def _off(self) -> Iterator[None]:
        before, self._on = self._on, False
        try:
            yield
        finally:
            self._on = before

    def allowed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, unguarded."""

        def call(*args: Any, **kwargs: Any) -> Any:
            with self._off():
                return function(*args, **kwargs)

        return call


class _Functions(TorchFunctionMode):
    def __init__(self, guard: NoWaiting) -> None:
        super().__init__()
        self._guard = guard

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._guard.check(getattr(func, "__name__", ""), args)
        return func(*args, **(kwargs or {}))


class _Operators(TorchDispatchMode):
    def __init__(self, guard: NoWaiting) -> None:
        super().__init__()
        self._guard = guard

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._guard.check(func.__name__, args)
        return func(*args, **(kwargs or {}))
