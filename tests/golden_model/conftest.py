"""One machine for all tests of the folder: a single thread, since the models are tiny."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from k2hybrid.native.machine import Machine


@pytest.fixture(scope="session")
def machine() -> Machine:
    """The kernels of this CPU."""
    return Machine(threads=1)


@pytest.fixture(autouse=True)
def one_torch_thread() -> Iterator[None]:
    """Tiny products are slower on several."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
