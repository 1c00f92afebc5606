"""What goes wrong on a device: names, sizes, hand-offs that are stuck or fail, NaN, and how it ends."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from k2hybrid.checkpoint.index import ShardIndex
from k2hybrid.checkpoint.loader import open_checkpoint
from k2hybrid.checkpoint.synth import synthesize
from k2hybrid.errors import CheckpointError, ConfigError, EngineError
from k2hybrid.experts.handoff import TIMEOUT_MS, Handoff
from k2hybrid.model.paged import TorchDecode
from k2hybrid.runtime import load, on_device
from k2hybrid.runtime.device_weights import DeviceWeights
from k2hybrid.runtime.on_device import settled
from k2hybrid.types import TokenEvent, Weight8
from tests.conftest import driver_sees_a_device
from tests.unit.runtime.conftest import SIZES
from tests.unit.runtime.emulated import GREEDY, HANDED, OPTIONS, SOME_HOT, STREAMED, Opened, idle, opened

no_card = pytest.mark.skipif(driver_sees_a_device(), reason="there is a card here")
PROMPT = [*range(300, 340)]

# --- options ------------------------------------------------------------------------------------------


@no_card
@pytest.mark.parametrize("name", ["cuda", "cuda:0", "cuda:7"])
def test_without_a_card_the_message_says_what_helps(name: str) -> None:
    with pytest.raises(ConfigError, match=r"^--device \S+ cannot be used here \(.+\): .*use --device cpu$"):
        load(device=name)


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "cuda:-1", "cuda:01", "cuda:٣", "CUDA", ""])
def test_malformed_names(name: str) -> None:
    with pytest.raises(ConfigError, match="device must be cpu, cuda or cuda:N"):
        load(device=name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vram": 1 << 30}, "give --device cuda as well"),
        ({"hot_experts": 0}, "give --device cuda as well"),
        ({"device": "emulated", "experts": "portable"}, "use --device cpu"),
        ({"device": "emulated", "trace": Path("trace")}, "record a trace with --device cpu"),
        ({"device": "emulated", "vram": 0}, "vram must be at least 1"),
        ({"device": "emulated", "hot_experts": -1}, "or 0 for none"),
        ({"device": "emulated", "vram": 1.5}, "vram is a number of bytes"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(**options)


def served(*argv: str) -> tuple[int, list[str]]:
    command = [sys.executable, "-m", "k2hybrid.server", "--port", "0", "--no-journal", *argv]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    return ended.returncode, ended.stderr.splitlines()


@no_card
def test_the_command_says_so_in_one_line() -> None:
    code, lines = served("--device", "cuda")
    assert code == 1
    assert [line for line in lines if "cannot be used here" in line] == lines


# --- a hand-off that fails ----------------------------------------------------------------------------


@pytest.fixture
def handoffs(monkeypatch: pytest.MonkeyPatch) -> list[Handoff]:
    """Those that are made."""
    made: list[Handoff] = []

    def make(*args: Any, **options: Any) -> Handoff:
        made.append(Handoff(*args, **options))
        return made[-1]

    monkeypatch.setattr(on_device, "Handoff", make)
    return made


def outcome(model: Opened, ids: list[int], count: int = 6) -> list[int] | EngineError:
    try:
        return model.tokens(ids, count)
    except EngineError as error:
        return error


@pytest.mark.parametrize("options", [{"hot_experts": 0}, {"hot_experts": SOME_HOT}], ids=["handed", "hot"])
@pytest.mark.parametrize("layer", [1, 3])
def test_a_stuck_worker_ends_requests_and_the_next_are_served(
    handoffs: list[Handoff], options: dict[str, int], layer: int
) -> None:
    with opened("emulated", max_step_tokens=HANDED, **options) as model:
        want = model.tokens(PROMPT, 6)
        handoffs[0].native.stall_at(layer)
        begun = time.monotonic()
        got = outcome(model, PROMPT)
        assert isinstance(got, EngineError)
        assert "a worker is stuck" in str(got)
        # No sooner than the watchdog. How much later at most `device_checks.check_stuck` says.
        assert 1e-3 * TIMEOUT_MS <= time.monotonic() - begun < 30
        stuck = outcome(model, PROMPT)  # still not back: no request hangs
        assert isinstance(stuck, EngineError)
        handoffs[0].native.stall_at(-1)
        deadline = time.monotonic() + 20
        while isinstance(got := outcome(model, PROMPT), EngineError) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert got == want
        assert idle(model.runtime)


def test_a_worker_that_is_stuck_does_not_keep_close_waiting(handoffs: list[Handoff]) -> None:
    with opened("emulated", max_step_tokens=HANDED, hot_experts=0) as model:
        handoffs[0].native.stall_at(2)
        run = model.runtime.generate(PROMPT, GREEDY, 6, stop_ids=())
        closer = threading.Thread(target=model.runtime.close)
        time.sleep(0.2)
        closer.start()
        closer.join(30)
        handoffs[0].native.stall_at(-1)
        assert not closer.is_alive()
        try:
            list(run)
        except EngineError as error:
            assert "stuck" in str(error) or "abort" in str(error)  # noqa: PT017


class Throwing:
    """Decoding that raises, or gives NaN, when told to."""

    def __init__(self, inner: TorchDecode, state: dict[str, str]) -> None:
        self._inner, self._state = inner, state

    def __call__(self, *args: Any, **options: Any) -> torch.Tensor:
        out = self._inner(*args, **options)
        if self._state.get("do") == "raise":
            raise RuntimeError("the kernel failed")
        return out * torch.nan if self._state.get("do") == "nan" else out


@pytest.fixture
def trouble(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    from k2hybrid.runtime import device

    state: dict[str, str] = {}
    monkeypatch.setattr(device, "TorchDecode", lambda pages: Throwing(TorchDecode(pages), state))
    return state


@pytest.mark.parametrize(
    "options", [{"max_step_tokens": HANDED}, {"max_step_tokens": STREAMED, "hot_experts": SOME_HOT}]
)
@pytest.mark.parametrize(("do", "message"), [("raise", "the kernel failed"), ("nan", "not finite")])
def test_a_step_that_fails_ends_its_requests_alone(
    trouble: dict[str, str], options: dict[str, int], do: str, message: str
) -> None:
    with opened("emulated", **options) as model:
        want = model.tokens(PROMPT, 6)
        for _ in range(2):
            trouble["do"] = do
            got = outcome(model, [*PROMPT, 5])
            assert isinstance(got, EngineError)
            assert message in str(got)
            trouble.clear()
            assert model.tokens(PROMPT, 6) == want
        assert idle(model.runtime)


def test_experts_that_fail_in_a_streamed_chunk_leave_the_next_chunk_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from k2hybrid.experts.compute import plain_experts
    from k2hybrid.runtime import device

    failing = threading.Event()

    def compute(*args: Any, **options: Any) -> torch.Tensor:
        if failing.is_set():
            raise RuntimeError("out of memory")
        return plain_experts(*args, **options)

    monkeypatch.setattr(device, "plain_experts", compute)
    long = [*range(300, 500)]
    with opened("emulated", max_step_tokens=STREAMED, hot_experts=0) as model:
        want = model.tokens(long, 4)
        failing.set()
        got = outcome(model, [*long[1:], 7])
        assert isinstance(got, EngineError)
        assert "out of memory" in str(got)
        failing.clear()
        fresh = [*range(301, 501)]
        assert not isinstance(outcome(model, fresh), EngineError)
        assert model.tokens(long, 4) == want


# --- how it ends --------------------------------------------------------------------------------------


def threads_of_ours() -> set[str]:
    names = ("hot-experts", "expert-stream", "cold-experts")
    return {thread.name for thread in threading.enumerate() if thread.name.startswith(names)}


def test_closing_ends_requests_and_threads(checkpoint: Path) -> None:
    before = set(threading.enumerate())
    native = len(list(Path("/proc/self/task").iterdir()))
    for _ in range(2):
        options = {**OPTIONS, "max_step_tokens": STREAMED, "hot_experts": SOME_HOT}
        model = load(device="emulated", **options)
        runs = [model.generate([*range(300 + n, 500)], GREEDY, 60, stop_ids=()) for n in range(3)]
        tokens = iter(runs[0])
        assert isinstance(next(tokens), TokenEvent)
        for _ in range(3):
            model.close()
        assert len(list(tokens)) < 59
        assert [len(list(run)) < 60 for run in runs[1:]] == [True, True]
        assert {run.finish_reason for run in runs} == {"cancelled"}
        assert not threads_of_ours()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and (
        set(threading.enumerate()) - before or len(list(Path("/proc/self/task").iterdir())) > native + 2
    ):
        time.sleep(0.02)
    assert set(threading.enumerate()) - before == set()
    assert len(list(Path("/proc/self/task").iterdir())) <= native + 2  # torch may have made its own


@pytest.mark.parametrize("way", ["asleep", "running"])
def test_the_interpreter_ends_without_a_close(way: str) -> None:
    script = f"""
        import k2hybrid
        from k2hybrid.types import SamplingParams
        model = k2hybrid.load(device="emulated", threads=1, context_tokens=640, hot_experts={SOME_HOT})
        run = model.generate([*range(300, 400)], SamplingParams(temperature=0), 400, stop_ids=())
        tokens = iter(run)
        for _ in range(20 if "{way}" == "running" else 400):
            next(tokens)
        print("said")
    """
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=60
    )
    assert (ended.returncode, ended.stdout) == (0, "said\n"), ended.stderr


def test_a_load_that_fails_leaves_no_thread(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from k2hybrid.runtime import models

    def fail(*args: Any, **options: Any) -> Any:
        raise EngineError("no network")

    for name in ("assemble", "WatchedModel"):
        with monkeypatch.context() as patch:
            patch.setattr(models, name, fail)
            with pytest.raises(EngineError, match="no network"):
                load(device="emulated", **{**OPTIONS, "max_step_tokens": STREAMED})
        assert not threads_of_ours()


# --- parts --------------------------------------------------------------------------------------------


def test_a_model_without_routed_experts(tmp_path: Path) -> None:
    synthesize(tmp_path / "dense", overrides={**SIZES, "dense_layers": SIZES["layers"]}, seed=2)
    said = []
    for device in ("cpu", "emulated"):
        with opened(device, tmp_path / "dense", max_step_tokens=32) as model:
            said.append([model.answer([5, 6, n], 5) for n in range(3)])
            status = model.runtime.status()["device"]
    assert "hot_slots" not in status
    assert status["recorded"] == [*range(1, 9)]
    for got, want in zip(*said, strict=True):
        assert ((got[1][0] - want[1][0]).norm() / want[1][0].norm()) < 0.05


def test_a_recorder_waits_for_what_is_on_its_way() -> None:
    order: list[str] = []

    class Experts:
        def settle(self) -> None:
            order.append("settled")

    def recorder(work: Callable[[], None]) -> Callable[[], None]:
        order.append("recorded")
        return work

    record = settled(recorder, Experts())  # type: ignore[arg-type]
    record(lambda: order.append("run"))()
    assert order == ["settled", "recorded", "run"]


META = torch.device("meta")


@pytest.fixture
def dense(checkpoint: Path, tmp_path: Path) -> Iterator[tuple[Any, Path]]:
    import shutil

    class NoSink:
        def add_expert(self, layer: int, expert: int, ref: object) -> None:
            return

    folder = shutil.copytree(checkpoint, tmp_path / "copied")
    with open_checkpoint(folder, NoSink()) as opened_checkpoint:
        yield opened_checkpoint, folder


def test_weights_are_copied_and_let_go(dense: tuple[Any, Path]) -> None:
    """What was copied to a card may be lost: nobody reads it any more. The embedding stays where it is."""
    checkpoint, folder = dense
    weights = DeviceWeights(checkpoint, META, checkpoint.let_go)
    copied = weights.take(0, "q_b_proj")
    assert copied.device == META
    embedding = weights.take(None, "embed_tokens")
    assert embedding.device.type == "cpu"
    here = DeviceWeights(checkpoint, torch.device("cpu"), checkpoint.let_go).take(0, "o_proj")
    assert here.device.type == "cpu"
    refs = ShardIndex(folder).tensors
    with (folder / refs["model.layers.0.self_attn.q_b_proj.weight"].path.name).open("r+b") as file:
        file.truncate(0)
    watch = checkpoint.watch()
    watch.look()
    assert watch.dense_failed()  # of others in that file
    ours, others = (refs[f"model.layers.0.self_attn.{role}.weight"] for role in ("q_b_proj", "o_proj"))
    mapped = {ref.name: (ref.address, ref.nbytes) for ref in checkpoint._open_index().tensors.values()}
    assert mapped[ours.name] not in watch._dense
    assert mapped[others.name] in watch._dense


def test_weights_of_8_bits_are_copied_whole() -> None:
    made = Weight8(torch.zeros(3, 4, dtype=torch.int8), torch.ones(3), "int8")
    let_go: list[tuple[int | None, str]] = []

    class Source:
        def take(self, layer: int | None, role: str) -> Weight8:
            return made

    copied = DeviceWeights(Source(), META, lambda *key: let_go.append(key)).take(1, "up_proj")
    assert isinstance(copied, Weight8)
    assert (copied.values.device, copied.scale.device, copied.kind) == (META, META, "int8")
    assert let_go == []  # its source was let go where it was made


def test_weights_that_are_lost_while_they_are_copied_are_refused(dense: tuple[Any, Path]) -> None:
    checkpoint, folder = dense
    path = ShardIndex(folder).tensors["lm_head.weight"].path
    with (folder / path.name).open("r+b") as file:
        file.truncate(0)
    with pytest.raises(CheckpointError, match="put the whole file back"):
        DeviceWeights(checkpoint, META, checkpoint.let_go).take(None, "lm_head")
