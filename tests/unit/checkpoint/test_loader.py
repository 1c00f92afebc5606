"""The loader: every tensor found, in place, used exactly once; every kind of mismatch listed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from k2hybrid.checkpoint.index import INDEX_NAME
from k2hybrid.checkpoint.loader import Checkpoint, open_checkpoint
from k2hybrid.checkpoint.names import expected_tensors, tensor_name
from k2hybrid.checkpoint.spec import read_spec
from k2hybrid.checkpoint.synth import synthesize
from k2hybrid.errors import CheckpointError, TensorError
from k2hybrid.types import TensorRef


def all_tensors(model_dir: Path) -> dict[str, torch.Tensor]:
    """What the safetensors library reads."""
    shards = sorted(model_dir.glob("*.safetensors"))
    return {name: tensor for shard in shards for name, tensor in load_file(shard).items()}


def raw_bytes(ref: TensorRef) -> bytes:
    return ref.path.read_bytes()[ref.offset : ref.offset + ref.nbytes]


def take_all(checkpoint: Checkpoint) -> None:
    for tensor in expected_tensors(checkpoint.spec):
        if tensor.key.expert is None:
            checkpoint.take(tensor.key.layer, tensor.key.role)


def one_shard_copy(small: Path, target: Path, change: Any) -> Path:
    """A copy of the checkpoint in one shard, its tensors edited by `change(tensors)`, the index to match."""
    shutil.copytree(small, target, ignore=shutil.ignore_patterns("*.safetensors"))
    tensors = all_tensors(small)
    change(tensors)
    save_file(tensors, target / "model-00001-of-000001.safetensors", metadata={"format": "pt"})
    index = {"weight_map": dict.fromkeys(tensors, "model-00001-of-000001.safetensors")}
    (target / INDEX_NAME).write_text(json.dumps(index))
    return target


def test_every_tensor_as_the_safetensors_library_reads_it(small: Path, sink: Any) -> None:
    expected = all_tensors(small)
    with open_checkpoint(small, sink) as checkpoint:
        for tensor in expected_tensors(checkpoint.spec):
            layer, role, expert = tensor.key
            if expert is None:
                assert torch.equal(checkpoint.take(layer, role), expected[tensor.name])
        checkpoint.close_ledger()
        for (layer, expert), ref in sink.refs.items():
            for projection in ("gate", "up", "down"):
                name = f"model.layers.{layer}.mlp.experts.{expert}.{projection}_proj.weight_"
                for part in ("packed", "scale"):
                    found: TensorRef = getattr(getattr(ref, projection), part)
                    assert found.name == name + part
                    assert raw_bytes(found) == expected[found.name].view(torch.uint8).numpy().tobytes()
        assert len(sink.refs) == 2 * 8
        assert checkpoint.total_bytes == sum(tensor.nbytes for tensor in expected.values())


def test_weights_stay_in_the_map(small: Path, sink: Any) -> None:
    with open_checkpoint(small, sink) as checkpoint:
        head = checkpoint.take(None, "lm_head")
        maps = Path("/proc/self/maps").read_text().splitlines()
        found = []
        for address in (head.data_ptr(), sink.refs[2, 5].down.packed.address):
            for line in maps:
                low, high = (int(end, 16) for end in line.split()[0].split("-"))
                if low <= address < high:
                    found.append(line.split())
        assert len(found) == 2
        assert all(fields[1] == "r--s" and fields[5].startswith(str(small)) for fields in found)


def test_a_tensor_outlives_the_checkpoint(small: Path, sink: Any) -> None:
    checkpoint = open_checkpoint(small, sink)
    norm = checkpoint.take(None, "norm")
    checkpoint.close()
    assert torch.equal(norm, all_tensors(small)["model.norm.weight"])
    with pytest.raises(CheckpointError, match="closed"):
        checkpoint.take(None, "lm_head")


def test_ledger(small: Path, sink: Any) -> None:
    with open_checkpoint(small, sink) as checkpoint:
        checkpoint.take(1, "router")
        with pytest.raises(TensorError, match="second time"):
            checkpoint.take(1, "router")
        with pytest.raises(TensorError, match="no tensor has the role"):
            checkpoint.take(1, "rooter")
        with pytest.raises(TensorError, match=r"no model\.layers\.0\.mlp\.gate\.weight"):
            checkpoint.take(0, "router")
        with pytest.raises(TensorError) as caught:
            checkpoint.close_ledger()
        dense = [tensor.name for tensor in expected_tensors(checkpoint.spec) if tensor.key.expert is None]
        assert set(caught.value.problems) == set(dense) - {tensor_name(1, "router")}


@pytest.mark.parametrize("q_lora", [None, 24])
@pytest.mark.parametrize("dense_layers", [0, 1, 3])
@pytest.mark.parametrize("shape_dtype", ["I32", "I64"])
def test_shapes_of_other_sizes(
    tmp_path: Path, sizes: dict[str, Any], sink: Any, q_lora: int | None, dense_layers: int, shape_dtype: str
) -> None:
    changed = sizes | {"q_lora": q_lora, "dense_layers": dense_layers, "shared_experts": 2, "experts": 5}
    spec = synthesize(tmp_path / "m", overrides=changed, shape_dtype=shape_dtype)
    with open_checkpoint(tmp_path / "m", sink) as checkpoint:
        take_all(checkpoint)
        checkpoint.close_ledger()
        assert checkpoint.ignored_shapes == 0
        assert len(sink.refs) == (3 - dense_layers) * 5
        assert checkpoint.spec == spec == read_spec(tmp_path / "m")


def test_garbage_weight_shapes_are_counted_and_ignored(small: Path, tmp_path: Path, sink: Any) -> None:
    name = "model.layers.1.mlp.experts.0.{}_proj.weight_shape"

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name.format("gate")] = torch.tensor([-(2**31), 2**31 - 1], dtype=torch.int32)
        tensors[name.format("up")] = torch.tensor([2**62, 0])
        tensors[name.format("down")] = torch.tensor([64, 32])  # right, as int64

    with open_checkpoint(one_shard_copy(small, tmp_path / "m", change), sink) as checkpoint:
        assert checkpoint.ignored_shapes == 2
        assert sink.refs[1, 0].gate.packed.shape == (32, 8)
        take_all(checkpoint)
        checkpoint.close_ledger()


EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight_"


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda t: t.pop(EXPERT + "scale"), f"{EXPERT}scale: missing"),
        (lambda t: t.pop("lm_head.weight"), "lm_head.weight: missing"),
        (lambda t: t.pop(EXPERT + "shape"), f"{EXPERT}shape: missing"),
        (
            lambda t: t.update(
                {"model.layers.3.input_layernorm.weight": torch.ones(64, dtype=torch.bfloat16)}
            ),
            "model.layers.3.input_layernorm.weight: extra; this model has no such tensor",
        ),
        (
            lambda t: t.update({EXPERT + "packed": torch.zeros(32, 16, dtype=torch.int32)}),
            f"{EXPERT}packed: I32 [32, 16], expected I32 [32, 8]",
        ),
        (
            lambda t: t.update({EXPERT + "packed": torch.zeros(32, 8, dtype=torch.float32)}),
            f"{EXPERT}packed: F32 [32, 8], expected I32 [32, 8]",
        ),
        (
            lambda t: t.update({EXPERT + "shape": torch.zeros(2, 1, dtype=torch.int32)}),
            f"{EXPERT}shape: I32 [2, 1], expected I32 or I64 [2]",
        ),
        (
            lambda t: t.update({EXPERT + "shape": torch.zeros(2, dtype=torch.float32)}),
            f"{EXPERT}shape: F32 [2], expected I32 or I64 [2]",
        ),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(64, dtype=torch.float16)}),
            "model.norm.weight: F16 [64], expected BF16 [64]",
        ),
        (
            lambda t: t.update(
                {"model.layers.1.mlp.gate.e_score_correction_bias": torch.zeros(8, dtype=torch.bfloat16)}
            ),
            "model.layers.1.mlp.gate.e_score_correction_bias: BF16 [8], expected F32 [8]",
        ),
    ],
)
def test_mismatches_are_named(small: Path, tmp_path: Path, sink: Any, change: Any, line: str) -> None:
    with pytest.raises(TensorError) as caught:
        open_checkpoint(one_shard_copy(small, tmp_path / "m", change), sink)
    assert caught.value.problems == (line,)
    assert not sink.refs  # nothing is handed out before everything is validated


def test_one_error_lists_all_mismatches(small: Path, tmp_path: Path, sink: Any) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for expert in range(8):
            del tensors[f"model.layers.2.mlp.experts.{expert}.up_proj.weight_packed"]
        tensors["é"] = torch.zeros(1)

    with pytest.raises(TensorError) as caught:
        open_checkpoint(one_shard_copy(small, tmp_path / "m", change), sink)
    assert len(caught.value.problems) == 9
