"""Models whose dense weights are of 8 bits: their answers, their memory, and what lost files mean to them."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from k2hybrid.cache.pages import LatentPages
from k2hybrid.cache.rows import Bf16Rows
from k2hybrid.checkpoint import dense8
from k2hybrid.checkpoint.dense_bytes import DENSE8_ROLES
from k2hybrid.checkpoint.index import ShardIndex
from k2hybrid.checkpoint.loader import open_checkpoint
from k2hybrid.checkpoint.names import tensor_name
from k2hybrid.checkpoint.spec import read_spec
from k2hybrid.checkpoint.synth import synthesize
from k2hybrid.config import DenseWeights, RuntimeConfig
from k2hybrid.engine.metrics import ByteMeter
from k2hybrid.errors import ConfigError, ShardIndexError, TensorError
from k2hybrid.experts.prediction import ModelSizes
from k2hybrid.model.kimi import Kimi
from k2hybrid.model.layers import TorchLinears
from k2hybrid.native.machine import Machine
from k2hybrid.runtime import Runtime, load
from k2hybrid.runtime.assembly import assemble
from k2hybrid.runtime.dense8 import Dense8Weights
from k2hybrid.runtime.experts import native_experts
from k2hybrid.runtime.fingerprint import fingerprint
from k2hybrid.runtime.memory import start_needs
from k2hybrid.runtime.meter import MeteredWeights
from k2hybrid.runtime.sizes import network_sizes
from k2hybrid.types import SamplingParams, TensorRef, TokenEvent, Weight8, Weight8Kind

KINDS: tuple[Weight8Kind, ...] = ("fp8", "int8")
PROMPTS = [[7, 300, 21], list(range(500, 530)), [1000, 3], list(range(40, 51))]


class _NoSink:
    def add_expert(self, layer: int, expert: int, ref: object) -> None:
        pass


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Weight8Kind:
    kind: Weight8Kind = request.param
    return kind


@pytest.fixture
def copied(checkpoint: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "copied"
    shutil.copytree(checkpoint, folder)
    return folder


def answers(folder: Path, kind: DenseWeights, together: bool) -> list[list[tuple[int, float]]]:
    def events(run: Iterator[object]) -> list[tuple[int, float]]:
        found = [event for event in run if isinstance(event, TokenEvent)]
        return [(event.token, event.logprob.logprob) for event in found if event.logprob is not None]

    def start(model: Runtime, ids: list[int]) -> Iterator[object]:
        return iter(model.generate(ids, SamplingParams(temperature=0, logprobs=0), 12, stop_ids=()))

    with load(folder, latent_bytes=4 << 20, threads=2, dense_weights=kind) as model:
        if together:
            return [events(run) for run in [start(model, ids) for ids in PROMPTS]]
        return [events(start(model, ids)) for ids in PROMPTS]


def test_an_answer_is_the_same_alone_and_in_a_batch(checkpoint: Path, kind: Weight8Kind) -> None:
    alone = answers(checkpoint, kind, together=False)
    assert [len(answer) for answer in alone] == [12] * len(PROMPTS)
    assert answers(checkpoint, kind, together=True) == alone
    assert answers(checkpoint, "bf16", together=False) != alone


def test_the_model_is_what_torch_makes_of_the_same_weights(checkpoint: Path, kind: Weight8Kind) -> None:
    """Which weights are of 8 bits, and that each is the published one, rounded."""
    with open_checkpoint(checkpoint, _NoSink()) as plain, open_checkpoint(checkpoint, _NoSink()) as other:
        source = Dense8Weights(other, kind)
        for ref in ShardIndex(checkpoint).tensors:
            for layer, role in _places(ref):
                made, published = source.take(layer, role), plain.take(layer, role)
                assert isinstance(made, Weight8) == (role in DENSE8_ROLES)
                if isinstance(made, Weight8):
                    x = torch.randn(3, made.shape[1]).bfloat16()
                    got, want = Machine(1).linear(x, made), TorchLinears().linear(x, published)
                    again = TorchLinears().linear(x, made)
                    assert torch.allclose(got, again, rtol=1e-4, atol=1e-4 * float(again.abs().max()))
                    assert (got - want).norm() < 0.06 * want.norm()
                else:
                    assert torch.equal(made, published)


def _places(name: str) -> list[tuple[int | None, str]]:
    found = re.match(r"model\.layers\.(\d+)\.", name)
    layer = None if found is None else int(found[1])
    roles = [*DENSE8_ROLES, "kv_b_proj", "router", "norm", "embed_tokens", "input_layernorm", "router_bias"]
    places: list[tuple[int | None, str]] = []
    for role in roles:
        try:
            if tensor_name(layer, role) == name:
                places.append((layer, role))
        except KeyError:
            continue
    return places


def test_a_model_needs_kv_b_as_it_is_published(checkpoint: Path) -> None:
    class Wrong(Dense8Weights):
        def take(self, layer: int | None, role: str) -> Weight8 | torch.Tensor:
            found = super().take(layer, role)
            return found if isinstance(found, Weight8) else dense8.quantize(found.view(-1, 32), "int8", role)

    spec = read_spec(checkpoint)
    pages = LatentPages(spec.num_layers, 1, Bf16Rows(spec.latent_dim))
    with open_checkpoint(checkpoint, _NoSink()) as opened, pytest.raises(ConfigError, match="came in int8"):
        Kimi(spec, Wrong(opened, "int8"), None, TorchLinears(), pages)  # type: ignore[arg-type]


def test_options_are_checked_and_shown(checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match="one of bf16, fp8, int8, not 'int4'"):
        load(checkpoint, dense_weights="int4")
    assert dict(RuntimeConfig(dense_weights="fp8").table())["dense_weights"] == "fp8"


def test_latents_of_other_weights_are_not_found(checkpoint: Path) -> None:
    spec = read_spec(checkpoint)
    pages = LatentPages(spec.num_layers, 1, Bf16Rows(spec.latent_dim))
    kinds: tuple[DenseWeights, ...] = ("bf16", *KINDS)
    found = {
        kind: fingerprint(RuntimeConfig(model=checkpoint, dense_weights=kind), pages, None) for kind in kinds
    }
    assert len(set(found.values())) == 3


def test_bytes_are_those_that_are_read_and_operations_stay(checkpoint: Path, kind: Weight8Kind) -> None:
    spec, found = read_spec(checkpoint), {}
    for dense_weights in ("bf16", kind):
        meter = ByteMeter()
        pages = LatentPages(spec.num_layers, 1, Bf16Rows(spec.latent_dim))
        machine = Machine(1)
        experts = native_experts(RuntimeConfig(model=checkpoint), spec, machine, max_rows=4)
        opened, network = assemble(
            checkpoint, spec, machine, experts, pages, latent_norm_eps=1e-6, dense_weights=dense_weights,
            metered=lambda parts, meter=meter: parts._replace(weights=MeteredWeights(parts.weights, meter)),
        )  # fmt: skip
        opened.close()
        sizes = ModelSizes.of(spec, dense_weights=dense_weights)
        assert meter.step_bytes == sizes.dense_bytes + sizes.head_bytes
        options = RuntimeConfig(dense_weights=dense_weights)
        told = {need.name: need.nbytes for need in start_needs(spec, pages, None, options)}
        assert dense_weights == "bf16" or told[f"dense weights, {kind}"] == meter.step_bytes
        found[dense_weights] = network_sizes(spec, meter.step_bytes, pages.format.row_bytes)
        assert network.embedding.dtype == torch.bfloat16
        assert found[dense_weights].parts == network.parts
    for part in ("attention", "mlp", "shared", "head"):
        eight, sixteen = (getattr(found[dense_weights], part) for dense_weights in (kind, "bf16"))
        assert eight.row_ops == sixteen.row_ops
        assert eight.bytes < 0.75 * sixteen.bytes


# --- memory and files ------------------------------------------------------------------------------


def mapped_rss(path: Path) -> int:
    """Bytes of a file that this process has in memory through maps of it."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            inside = line.endswith(str(path))
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


def test_weights_are_not_kept_twice(tmp_path: Path, kind: Weight8Kind) -> None:
    folder = tmp_path / "wide"
    overrides = {"layers": 1, "hidden": 512, "intermediate": 4096, "heads": 2, "vocab_size": 4096}
    synthesize(folder, overrides=overrides, seed=1)
    with open_checkpoint(folder, _NoSink()) as opened:
        (shard,) = {ref.path for ref in ShardIndex(folder).tensors.values()}
        source = Dense8Weights(opened, kind)
        wanted = [(0, "gate_proj"), (0, "up_proj"), (0, "down_proj"), (None, "lm_head")]
        made = [source.take(layer, role) for layer, role in wanted]
        published = sum(2 * weight.shape.numel() for weight in made)
        assert published == 16 << 20
        # What is left is a few pages around the tensors' borders, read ahead with their neighbours.
        assert mapped_rss(shard) < published // 8
        assert sum(weight.nbytes for weight in made) < 0.51 * published


def _ref(folder: Path, layer: int | None, role: str) -> TensorRef:
    return ShardIndex(folder).tensors[tensor_name(layer, role)]


def test_bytes_lost_before_they_are_read_are_an_error(copied: Path, kind: Weight8Kind) -> None:
    ref = _ref(copied, 1, "o_proj")
    with open_checkpoint(copied, _NoSink()) as opened:
        os.truncate(ref.path, ref.offset + 16)
        with pytest.raises(ShardIndexError, match="lost bytes while it was read"):
            Dense8Weights(opened, kind).take(1, "o_proj")


def test_bytes_lost_while_they_are_read_are_an_error(
    copied: Path, kind: Weight8Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever was made of them, NaN included."""
    ref = _ref(copied, 1, "o_proj")

    def cut_before(weight: torch.Tensor, *rest: object) -> Weight8:
        os.truncate(ref.path, ref.offset + ref.nbytes - 16)
        raise TensorError("NaN")

    monkeypatch.setattr("k2hybrid.runtime.dense8.quantize", cut_before)
    with (
        open_checkpoint(copied, _NoSink()) as opened,
        pytest.raises(ShardIndexError, match="lost bytes while it was read"),
    ):
        Dense8Weights(opened, kind).take(1, "o_proj")


def test_a_file_written_to_while_a_model_is_made_is_an_error(
    copied: Path, kind: Weight8Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    ref = _ref(copied, 1, "o_proj")
    real = dense8.quantize

    def write_before(weight: torch.Tensor, kind: Weight8Kind, what: str) -> Weight8:
        if what == "o_proj of layer 1":
            with open(ref.path, "r+b") as file:
                file.seek(ref.offset)
                file.write(b"\0" * 16)
            os.utime(ref.path, ns=(1, 1))  # clocks of files are coarse
        return real(weight, kind, what)

    monkeypatch.setattr("k2hybrid.runtime.dense8.quantize", write_before)
    with pytest.raises(ShardIndexError, match="changed while it was opened"):
        load(copied, latent_bytes=4 << 20, threads=1, dense_weights=kind).close()


def test_weights_that_are_not_finite_are_named(copied: Path, kind: Weight8Kind) -> None:
    ref = _ref(copied, 1, "o_proj")
    with open(ref.path, "r+b") as file:
        file.seek(ref.offset + 10)
        file.write(b"\xc0\x7f")  # NaN in bf16
    with pytest.raises(TensorError, match="o_proj of layer 1 holds NaN or infinity"):
        load(copied, latent_bytes=4 << 20, threads=1, dense_weights=kind)


def test_a_file_that_is_lost_later_does_not_matter_to_what_was_made_of_it(
    copied: Path, kind: Weight8Kind
) -> None:
    """The watch asks for the tensors that are still read, and for them alone."""
    ref = _ref(copied, 1, "o_proj")
    with open_checkpoint(copied, _NoSink()) as opened:
        source = Dense8Weights(opened, kind)
        source.take(1, "o_proj")
        eight, sixteen = opened.watch(), open_checkpoint(copied, _NoSink()).watch()
        place = (ref.address, ref.address + ref.nbytes)
        assert not eight.dense_failed([place])
        router = _in(opened.watch(), tensor_name(1, "router"))
        assert eight.dense_failed([router])
        assert sixteen.dense_failed([_in(sixteen, tensor_name(1, "o_proj"))])


def _in(watch: object, name: str) -> tuple[int, int]:
    ref: TensorRef = watch._tensors[name]  # type: ignore[attr-defined]
    return ref.address, ref.address + ref.nbytes
