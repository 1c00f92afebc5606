"""Shards that lose bytes while requests run: no wrong token, clear errors, others go on, and all comes back.

What a request needs is found by experiment: it is what changes its answer when it is zeros.
"""

from __future__ import annotations

import os
import random
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from k2hybrid.checkpoint.index import ShardIndex
from k2hybrid.checkpoint.synth import synthesize
from k2hybrid.errors import ExpertReadError, K2Error, ShardIndexError, WeightReadError
from k2hybrid.runtime import Runtime, load
from k2hybrid.types import SamplingParams, TensorRef, TokenEvent

SIZES = {
    "layers": 3,
    "experts": 32,
    "top_k": 2,
    "hidden": 128,
    "intermediate": 128,
    "moe_intermediate": 64,
    "heads": 2,
    "q_lora": 32,
    "kv_lora": 32,
    "nope": 16,
    "rope": 16,
    "v_head": 16,
    "positions": 1024,
    "vocab_size": 600,
}
OPTIONS = {"latent_bytes": 8 << 20, "max_step_tokens": 64, "threads": 2}
PAGE = os.sysconf("SC_PAGESIZE")
OUTPUT = 6

Answer = list[tuple[int, float]]  # tokens and their log probabilities

PROMPTS = [[7 * i % 590, 31 * i % 590, 101 * i % 590] for i in range(1, 41)]
LONG = [[(i * k * k + k) % 590 for k in range(80)] for i in (3, 5, 11, 17)]  # more than a latent page


def answer(runtime: Runtime, ids: list[int], count: int = OUTPUT) -> Answer:
    run = runtime.generate(ids, SamplingParams(temperature=0, logprobs=0), count, stop_ids=())
    return [
        (event.token, event.logprob.logprob)
        for event in run
        if isinstance(event, TokenEvent) and event.logprob is not None
    ]


def answers(folder: Path, prompts: list[list[int]], count: int = OUTPUT, **options: object) -> list[Answer]:
    with load(folder, **OPTIONS, **options) as runtime:
        return [answer(runtime, ids, count) for ids in prompts]


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Several shards, some of experts alone."""
    out = tmp_path_factory.mktemp("models") / "small"
    synthesize(out, overrides=SIZES, seed=5, shard_bytes=200_000)
    return out


@pytest.fixture(scope="module")
def healthy(pristine: Path) -> list[Answer]:
    return answers(pristine, PROMPTS)


@pytest.fixture(scope="module")
def tensors(pristine: Path) -> dict[str, TensorRef]:
    return ShardIndex(pristine).tensors


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    return shutil.copytree(pristine, tmp_path / "model")


def expert_shard(tensors: dict[str, TensorRef]) -> str:
    """A shard with experts and nothing else."""
    names: dict[str, list[str]] = {}
    for name, ref in tensors.items():
        names.setdefault(ref.path.name, []).append(name)
    return next(file for file, all_ in sorted(names.items()) if all(".experts." in name for name in all_))


def zeroed(folder: Path, to: Path, file: str, end: int) -> Path:
    """A copy of a checkpoint with zeros from `end` on in one shard."""
    shutil.copytree(folder, to)
    content = (to / file).read_bytes()
    (to / file).write_bytes(content[:end].ljust(len(content), b"\0"))
    return to


def in_place(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def replaced(path: Path, content: bytes) -> None:
    fresh = path.with_suffix(".incomplete")
    fresh.write_bytes(content)
    fresh.replace(path)


def put_back(path: Path, content: bytes, how: Callable[[Path, bytes], None] = in_place) -> None:
    how(path, content)
    os.utime(path, (1e9, 1e9))  # or it would be watched for a second longer


def outcome(runtime: Runtime, ids: list[int]) -> Answer | K2Error:
    try:
        return answer(runtime, ids)
    except K2Error as error:
        return error


def recovered(runtime: Runtime, prompts: list[list[int]], want: list[Answer]) -> bool:
    """Whether all answers are as they were; asked until the files are tried again, once a second."""
    deadline = time.monotonic() + 60
    for ids, true in zip(prompts, want, strict=True):
        while isinstance(got := outcome(runtime, ids), K2Error) and time.monotonic() < deadline:
            time.sleep(0.05)
        if got != true:
            return False
    return True


def cuts(tensors: dict[str, TensorRef], file: str) -> dict[str, int]:
    size = max(ref.offset + ref.nbytes for ref in tensors.values() if ref.path.name == file)
    return {
        "in the last page": size - min(100, size % PAGE - 1),
        "in a page": size - 2 * PAGE - 321,
        "at a page": size // PAGE * PAGE - PAGE,
    }


@pytest.mark.parametrize("where", ["in the last page", "in a page", "at a page"])
@pytest.mark.parametrize("experts", ["native", "portable"])
def test_lost_experts_end_the_requests_that_need_them(
    folder: Path,
    pristine: Path,
    tmp_path: Path,
    tensors: dict[str, TensorRef],
    healthy: list[Answer],
    where: str,
    experts: str,
) -> None:
    if experts == "portable":
        pytest.importorskip("numba", reason="the portable experts need numba")
        healthy = answers(pristine, PROMPTS, experts=experts)
    file = expert_shard(tensors)
    end = cuts(tensors, file)[where]
    changed = answers(zeroed(pristine, tmp_path / "zeroed", file, end), PROMPTS, experts=experts)
    needy = [i for i, ids in enumerate(PROMPTS) if changed[i] != healthy[i]]
    assert 0 < len(needy) < len(PROMPTS)
    content = (folder / file).read_bytes()
    with load(folder, **OPTIONS, experts=experts) as runtime:
        os.truncate(folder / file, end)
        with ThreadPoolExecutor(8) as clients:
            got = list(clients.map(lambda ids: outcome(runtime, ids), PROMPTS))
        for i in range(len(PROMPTS)):
            if i in needy:
                assert isinstance(got[i], ExpertReadError), i
                assert "put it back whole" in str(got[i])
            else:
                assert got[i] == healthy[i], i
        put_back(folder / file, content)
        assert recovered(runtime, PROMPTS, healthy)


DENSE = ["model.layers.0.self_attn.q_b_proj.weight", "model.layers.1.mlp.gate.weight", "lm_head.weight"]


@pytest.mark.parametrize("back", [in_place, replaced])
@pytest.mark.parametrize("name", [*DENSE, "model.layers.1.mlp.gate.e_score_correction_bias"])
def test_lost_dense_weights_end_all_requests_until_they_are_back(
    folder: Path,
    tensors: dict[str, TensorRef],
    healthy: list[Answer],
    name: str,
    back: Callable[[Path, bytes], None],
) -> None:
    ref = tensors[name]
    path = folder / ref.path.name
    content = path.read_bytes()
    with load(folder, **OPTIONS) as runtime:
        assert answer(runtime, PROMPTS[0]) == healthy[0]
        os.truncate(path, ref.offset + ref.nbytes - 1)
        for ids in PROMPTS[:4]:
            with pytest.raises(WeightReadError, match=rf"{path.name}.*put the whole file back"):
                answer(runtime, ids)
        put_back(path, content, back)
        assert recovered(runtime, PROMPTS, healthy)


def test_a_lost_part_of_the_embedding_ends_those_who_say_its_tokens(
    folder: Path, tensors: dict[str, TensorRef], healthy: list[Answer]
) -> None:
    ref = tensors["model.embed_tokens.weight"]
    path = folder / ref.path.name
    content = path.read_bytes()
    known = 400
    # What the last row of the prompt's answer is, nobody looks up.
    needy = [
        i
        for i, ids in enumerate(PROMPTS)
        if any(token >= known for token in [*ids, *(token for token, _ in healthy[i][:-1])])
    ]
    assert 0 < len(needy) < len(PROMPTS)
    with load(folder, **OPTIONS) as runtime:
        os.truncate(path, ref.offset + known * 2 * SIZES["hidden"])
        for i, ids in enumerate(PROMPTS):
            got = outcome(runtime, ids)
            assert isinstance(got, ExpertReadError) if i in needy else got == healthy[i]
        put_back(path, content)
        assert recovered(runtime, PROMPTS, healthy)


def test_latents_of_what_failed_are_not_used_again(
    folder: Path, pristine: Path, tensors: dict[str, TensorRef]
) -> None:
    want = answers(pristine, LONG)
    file = expert_shard(tensors)
    content = (folder / file).read_bytes()
    with load(folder, **OPTIONS) as runtime:
        os.truncate(folder / file, 0)
        for ids in LONG:
            assert isinstance(outcome(runtime, ids), ExpertReadError)
            assert runtime.engine.cached_prefix(ids) == 0
        put_back(folder / file, content)
        assert recovered(runtime, LONG, want)


class Spoiler(threading.Thread):
    """Cuts a file anywhere at any time, and puts it back, in one way or the other."""

    def __init__(self, path: Path, seed: str) -> None:
        super().__init__()
        self.path, self.content = path, path.read_bytes()
        self.chance = random.Random(seed)
        self.rounds = 0
        self.done = threading.Event()

    def run(self) -> None:
        size = len(self.content)
        while not self.done.wait(self.chance.uniform(0, 0.05)):
            # Mostly near the end, where only a few bytes become zeros, without a signal.
            lost = self.chance.choice([1, 50, self.chance.randrange(PAGE), self.chance.randrange(size)])
            os.truncate(self.path, size - lost)
            time.sleep(self.chance.choice([0.0, 0.01, 0.1]))
            put_back(self.path, self.content, self.chance.choice([in_place, replaced]))
            # Mostly so long that the server has noticed.
            self.done.wait(self.chance.choice([0.0, 1.2, 1.2]))
            self.rounds += 1


@pytest.mark.parametrize("kind", ["experts", "dense", "embedding"])
def test_under_load_no_wrong_token_leaves(
    folder: Path, pristine: Path, tensors: dict[str, TensorRef], kind: str
) -> None:
    """Whatever a request got is the beginning of its true answer."""
    count = 16
    want = answers(pristine, PROMPTS, count)
    file = {
        "experts": expert_shard(tensors),
        "dense": tensors[DENSE[0]].path.name,
        "embedding": tensors["model.embed_tokens.weight"].path.name,
    }[kind]
    ends: Counter[str] = Counter()
    with load(folder, **OPTIONS) as runtime:

        def ask(number: int) -> None:
            at = number % len(PROMPTS)
            got: list[int] = []
            run = runtime.generate(PROMPTS[at], SamplingParams(temperature=0), count, stop_ids=())
            try:
                got.extend(event.token for event in run if isinstance(event, TokenEvent))
                assert len(got) == count
                ends["whole"] += 1
            except (ExpertReadError, WeightReadError):
                ends["failed"] += 1
            assert got == [token for token, _ in want[at]][: len(got)]

        spoiler = Spoiler(folder / file, kind)
        spoiler.start()
        try:
            deadline, asked = time.monotonic() + 120, 0
            with ThreadPoolExecutor(6) as clients:
                while min(spoiler.rounds, ends["whole"], ends["failed"]) < 8 and time.monotonic() < deadline:
                    for run in [clients.submit(ask, asked + i) for i in range(12)]:
                        run.result()
                    asked += 12
        finally:
            spoiler.done.set()
            spoiler.join()
        assert recovered(runtime, PROMPTS, [whole[:OUTPUT] for whole in want])
    assert min(ends["whole"], ends["failed"]) >= 8, ends


def test_a_checkpoint_that_shrinks_while_it_is_opened_is_refused(
    folder: Path, tensors: dict[str, TensorRef], monkeypatch: pytest.MonkeyPatch
) -> None:
    from k2hybrid.runtime import assembly

    path = folder / tensors[DENSE[0]].path.name
    build = assembly.Kimi

    def shrinking(*args: object, **options: object) -> object:
        os.truncate(path, path.stat().st_size - 1)
        return build(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(assembly, "Kimi", shrinking)
    with pytest.raises(ShardIndexError, match="changed while it was opened"):
        load(folder, **OPTIONS)
