"""The same machine and thread count as in the comparison with the oracle."""

from tests.golden_model.conftest import machine, one_torch_thread

__all__ = ["machine", "one_torch_thread"]
