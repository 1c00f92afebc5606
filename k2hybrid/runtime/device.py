"""Where the dense half of a model runs, if not on the CPU: a card, or the CPU playing one. Layer 5.

The emulated device runs the card's code path (recorded steps, hand-off by doorbell, experts on the device) on
the CPU: what tests can check of it without a card. It is slower than `cpu`, and nobody's choice for serving.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from k2hybrid.cache.pages import LatentPages
from k2hybrid.checkpoint.spec import ModelSpec
from k2hybrid.config import DenseWeights
from k2hybrid.errors import ConfigError, NativeError
from k2hybrid.experts.compute import ExpertCompute, plain_experts
from k2hybrid.experts.copies import CopyEngine, CudaCopies, InlineCopies
from k2hybrid.experts.prediction import ModelSizes
from k2hybrid.experts.split import SplitRates
from k2hybrid.hardware.checks.gpu import check_driver
from k2hybrid.hardware.cuda_driver import CudaDriver
from k2hybrid.hardware.cuda_graphs import GraphRecorder
from k2hybrid.hardware.streams import CudaStream, EmulatedStream, SignalStream, choose_signal
from k2hybrid.model.card_memory import CONTEXT_BYTES
from k2hybrid.model.decode_step import Recorder
from k2hybrid.model.paged import PagedDecode, TorchDecode
from k2hybrid.native.machine import Machine
from k2hybrid.runtime.card_rates import card_clock
from k2hybrid.runtime.device_rates import measure_split_rates, measured_handoff


@dataclass(frozen=True, slots=True)
class Device:
    """A device and what works on it.

    Attributes:
        name: as options have it.
        memory_bytes: that a model may take; None: the CPU's own.
        signal: how the stream rings and waits, and why.
        decode: makes what attends over the given pages.
        compute: runs experts that lie on the device.
        rates: of card, bus and CPU at a model's experts, beside a shared one of such weights.
        enter: makes it the calling thread's device.
        limit: refuses this process more than so many bytes of it, the CUDA context included.
    """

    name: str
    torch: torch.device
    memory_bytes: int | None
    signal: str
    stream: SignalStream
    recorder: Recorder
    decode: Callable[[LatentPages], PagedDecode]
    compute: ExpertCompute
    copies: CopyEngine
    rates: Callable[[ModelSpec, Machine, DenseWeights], SplitRates]
    enter: Callable[[], None]
    limit: Callable[[int], None]


def open_device(name: str) -> Device | None:
    """The device of that name; None for "cpu".

    Raises:
        ConfigError: there is no such card, or torch cannot use it; the message says what would help.
    """
    if name == "cpu":
        return None
    return _emulated() if name == "emulated" else _card(name)


def _emulated() -> Device:
    return Device(
        name="emulated",
        torch=torch.device("cpu"),
        memory_bytes=None,
        signal="emulated",
        stream=EmulatedStream(),
        recorder=lambda work: work,
        decode=TorchDecode,
        compute=plain_experts,
        copies=InlineCopies(),
        rates=lambda spec, *_: emulated_rates(spec),
        enter=lambda: None,
        limit=lambda nbytes: None,
    )


def emulated_rates(spec: ModelSpec) -> SplitRates:
    """A machine whose card and bus are so fast that chunks of a few dozen rows are streamed already."""
    return SplitRates(
        ModelSizes.of(spec).experts.expert_bytes, card=1e12, ram=5e10, bus=5e10, bus_traffic=0.5
    )


def _card(name: str) -> Device:
    _require_cuda(name)
    device = torch.device(name if ":" in name else f"{name}:0")
    count = torch.cuda.device_count()
    if device.index >= count:
        found = ", ".join(f"cuda:{index}" for index in range(count))
        raise ConfigError(f"there is no {name} here; use one of: {found}")
    torch.cuda.set_device(device)
    # Triton comes with a CUDA build of torch alone.
    from k2hybrid.kernels.experts import int4_experts
    from k2hybrid.kernels.mla import mla_decode

    signal, refused = choose_signal()
    stream, copies = CudaStream(signal), CudaCopies(device)
    return Device(
        name=str(device),
        torch=device,
        memory_bytes=torch.cuda.mem_get_info(device)[0],
        signal=f"{signal} ({refused})" if refused else signal,
        stream=stream,
        recorder=GraphRecorder(),
        decode=lambda _: mla_decode,
        compute=int4_experts,
        copies=copies,
        rates=lambda spec, machine, dense: measure_split_rates(
            spec,
            dense,
            machine,
            int4_experts,
            copies,
            device,
            clock=card_clock(device),
            # In memory of its own: what is recorded here is forgotten.
            handoff_s=measured_handoff(spec, machine, stream, GraphRecorder()),
        ),
        enter=lambda: torch.cuda.set_device(device),
        limit=lambda nbytes: _limit(device, nbytes),
    )


def _limit(device: torch.device, nbytes: int) -> None:
    total = torch.cuda.mem_get_info(device)[1]
    share = min(1.0, max(0, nbytes - CONTEXT_BYTES) / total)
    torch.cuda.set_per_process_memory_fraction(share, device)


def _require_cuda(name: str) -> None:
    if torch.cuda.is_available():
        return
    driver_cuda, problem = None, ""
    try:
        driver_cuda = CudaDriver().version()
    except NativeError as error:
        problem = str(error)
    found = check_driver(Path("/"), torch.version.cuda, driver_cuda, problem)[0]
    fix = f"{found.fix}; or " if found.fix else ""
    raise ConfigError(f"--device {name} cannot be used here ({found.found}): {fix}use --device cpu")
