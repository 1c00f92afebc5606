"""Shards that lose bytes under the emulated device: by hand-off, over the bus, and with experts on the card.

Its dense weights stay in the map; those of a card are copied (tests/unit/runtime/test_device_failures.py).
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from k2hybrid.checkpoint.index import ShardIndex
from k2hybrid.checkpoint.synth import synthesize
from k2hybrid.errors import ExpertReadError, K2Error, WeightReadError
from k2hybrid.runtime import Runtime, load
from k2hybrid.types import TensorRef
from tests.attacks.test_lost_files import (
    PROMPTS,
    SIZES,
    Answer,
    answer,
    cuts,
    expert_shard,
    outcome,
    put_back,
    zeroed,
)

OPTIONS = {"device": "emulated", "threads": 1, "context_tokens": 320, "latent_bytes": 8 << 20}
SHORT = PROMPTS[:16]
LONG = [[(i * k * k + k) % 590 for k in range(200)] for i in (3, 5, 11, 17)]
WAYS = {
    "handed": ({"max_step_tokens": 16, "hot_experts": 0}, SHORT),
    "streamed": ({"max_step_tokens": 256, "hot_experts": 0}, LONG),
}


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("models") / "small"
    synthesize(out, overrides=SIZES, seed=5, shard_bytes=200_000)
    return out


@pytest.fixture(scope="module")
def tensors(pristine: Path) -> dict[str, TensorRef]:
    return ShardIndex(pristine).tensors


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    return shutil.copytree(pristine, tmp_path / "model")


@contextmanager
def loaded(folder: Path, **options: int) -> Iterator[Runtime]:
    with load(folder, **OPTIONS, **options) as runtime:
        yield runtime


def fresh(folder: Path, prompts: list[list[int]], **options: int) -> list[Answer]:
    """Asked one after the other, each for the first time: the same passes give the same bits."""
    with loaded(folder, **options) as runtime:
        return [answer(runtime, ids) for ids in prompts]


def served_again(runtime: Runtime, prompts: list[list[int]]) -> bool:
    """Whether all prompts are answered, soon."""
    deadline = time.monotonic() + 30
    for ids in prompts:
        while isinstance(outcome(runtime, ids), K2Error):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
    return True


@pytest.mark.parametrize("where", ["in the last page", "in a page", "at a page"])
@pytest.mark.parametrize("way", WAYS)
def test_lost_experts_end_the_requests_that_need_them(
    folder: Path, pristine: Path, tmp_path: Path, tensors: dict[str, TensorRef], way: str, where: str
) -> None:
    options, prompts = WAYS[way]
    file = expert_shard(tensors)
    end = cuts(tensors, file)[where]
    healthy = fresh(pristine, prompts, **options)
    changed = fresh(zeroed(pristine, tmp_path / "zeroed", file, end), prompts, **options)
    needy = [i for i in range(len(prompts)) if changed[i] != healthy[i]]
    assert needy
    content = (folder / file).read_bytes()
    with loaded(folder, **options) as runtime:
        if way == "streamed":
            assert runtime.status()["device"]["handed_rows"] < len(LONG[0])
        os.truncate(folder / file, end)
        noticed = False
        for i, ids in enumerate(prompts):
            got = outcome(runtime, ids)
            if i in needy:
                assert isinstance(got, ExpertReadError), i
                noticed = True
            elif isinstance(got, ExpertReadError):
                # Zeros that no signal told of: the pass that finds them cannot say who read them on a device.
                assert not noticed
                noticed = True
            else:
                assert got == healthy[i], i
        assert runtime.status()["weights"]["lost_files"] == [file]
        put_back(folder / file, content)
        assert served_again(runtime, prompts)
        assert runtime.status()["weights"]["lost_files"] == []
    assert fresh(folder, prompts, **options) == healthy


def test_what_is_lost_is_prefilled_anew_when_it_is_back(
    folder: Path, pristine: Path, tensors: dict[str, TensorRef]
) -> None:
    options, prompts = WAYS["streamed"]
    healthy = fresh(pristine, prompts, **options)
    file = expert_shard(tensors)
    content = (folder / file).read_bytes()
    with loaded(folder, **options) as runtime:
        os.truncate(folder / file, 0)
        for ids in prompts:
            assert isinstance(outcome(runtime, ids), ExpertReadError)
            assert runtime.engine.cached_prefix(ids) == 0
        put_back(folder / file, content)
        assert served_again(runtime, [[1, 2, 3]])
        assert [answer(runtime, ids) for ids in prompts] == healthy


def test_experts_on_the_card_need_no_file(folder: Path, tensors: dict[str, TensorRef]) -> None:
    """Once all that a prompt needs is there, it is answered though the files are gone; others are not."""
    files = {ref.path.name for name, ref in tensors.items() if ".experts." in name}
    dense = {ref.path.name for name, ref in tensors.items() if ".experts." not in name}
    gone = sorted(files - dense)
    content = {name: (folder / name).read_bytes() for name in gone}
    ids = PROMPTS[0]
    with loaded(folder, max_step_tokens=16, hot_experts=1 << 30) as runtime:
        deadline, known, told = time.monotonic() + 30, -1, None
        while known != (known := runtime.status()["device"]["hot_experts"]) or not known:
            for _ in range(8):
                told = answer(runtime, ids)
            assert time.monotonic() < deadline
        for name in gone:
            os.truncate(folder / name, 0)
        assert answer(runtime, ids) == told
        others = [outcome(runtime, other) for other in PROMPTS[1:20]]
        assert any(isinstance(got, ExpertReadError) for got in others)
        assert answer(runtime, ids) == told
        for name in gone:
            put_back(folder / name, content[name])
        assert served_again(runtime, PROMPTS[:20])
        assert runtime.status()["engine"]["integrity_errors"] == 0


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_b_proj.weight", "lm_head.weight"])
def test_lost_dense_weights_end_all_requests_until_they_are_back(
    folder: Path, tensors: dict[str, TensorRef], name: str
) -> None:
    ref = tensors[name]
    path = folder / ref.path.name
    content = path.read_bytes()
    options, prompts = WAYS["handed"]
    with loaded(folder, **options) as runtime:
        answer(runtime, prompts[0])
        os.truncate(path, ref.offset + ref.nbytes - 1)
        for ids in prompts[:3]:
            with pytest.raises(WeightReadError, match=rf"{path.name}.*put the whole file back"):
                answer(runtime, ids)
        put_back(path, content)
        assert served_again(runtime, prompts)
