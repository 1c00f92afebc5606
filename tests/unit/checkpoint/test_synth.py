"""Synthetic checkpoints: the published layout to the byte, numbers that behave, reproducible by seed."""

from __future__ import annotations

import base64
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from k2hybrid.checkpoint import int4
from k2hybrid.checkpoint.index import INDEX_NAME, ShardIndex
from k2hybrid.checkpoint.names import expected_tensors
from k2hybrid.checkpoint.presets import changed_config, published_config
from k2hybrid.checkpoint.shard_writer import ShardTensor, write_shard
from k2hybrid.checkpoint.spec import ModelSpec, read_spec
from k2hybrid.checkpoint.synth import SHARD_BYTES, synthesize
from k2hybrid.checkpoint.vocab import read_ranks, special_tokens, tokenizer_config
from k2hybrid.errors import CheckpointError, SpecError, TokenizerError

GOLDEN = Path(__file__).resolve().parents[2] / "golden"


def test_true_size_has_the_published_tensors() -> None:
    spec = ModelSpec.from_config(published_config())
    count = nbytes = 0
    for tensor in expected_tensors(spec):
        count += 1
        if not tensor.key.role.endswith(".shape"):
            nbytes += ShardTensor(tensor.name, tensor.dtypes[0], tensor.shape).nbytes
    assert count == 208_215
    assert nbytes == 594_205_351_936


def test_files_are_bytes_that_the_safetensors_library_writes(tmp_path: Path) -> None:
    tensors = {
        "b.weight": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3),
        "a.weight": torch.arange(3, dtype=torch.bfloat16),
        "z.bias": torch.arange(3, dtype=torch.float32),
        "c.weight_packed": torch.arange(4, dtype=torch.int32).reshape(2, 2),
        "c.weight_shape": torch.tensor([2, 16], dtype=torch.int32),
        "d.weight_shape": torch.tensor([2, 16]),
    }
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    dtypes = {torch.bfloat16: "BF16", torch.float32: "F32", torch.int32: "I32", torch.int64: "I64"}
    described = [ShardTensor(name, dtypes[t.dtype], tuple(t.shape)) for name, t in tensors.items()]
    written: list[int] = []
    write_shard(
        tmp_path / "ours",
        described,
        lambda tensor: [tensors[tensor.name].flatten().view(torch.uint8).numpy()],
        written.append,
    )
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert sum(written) == sum(t.nbytes for t in tensors.values())


def test_whole_shards_are_bytes_that_the_safetensors_library_writes(small: Path, tmp_path: Path) -> None:
    for shard in small.glob("*.safetensors"):
        save_file(load_file(shard), tmp_path / "again", metadata={"format": "pt"})
        assert shard.read_bytes() == (tmp_path / "again").read_bytes()


def test_rows_start_at_every_residue_of_8_modulo_64(small: Path) -> None:
    index = ShardIndex(small)
    packed = [ref for name, ref in index.tensors.items() if name.endswith("weight_packed")]
    assert {ref.address % 64 for ref in packed} == set(range(0, 64, 8))


def test_shards_and_index(small: Path) -> None:
    names = sorted(path.name for path in small.glob("*.safetensors"))
    assert len(names) > 3
    assert all(re.fullmatch(r"model-\d{5}-of-\d{6}\.safetensors", name) for name in names)
    assert names[-1] == f"model-{len(names):05d}-of-{len(names):06d}.safetensors"
    index = json.loads((small / INDEX_NAME).read_text())
    sizes = {name: sum(t.nbytes for t in load_file(small / name).values()) for name in names}
    assert index["metadata"]["total_size"] == sum(sizes.values())
    assert set(index["weight_map"].values()) == set(names)
    # Only a single tensor larger than the bound may exceed it.
    assert all(size <= 60_000 or len(load_file(small / name)) == 1 for name, size in sizes.items())


def test_layers_are_not_split_at_the_default_size() -> None:
    spec = ModelSpec.from_config(changed_config("kimi-k2-thinking", {"layers": 2}, None))
    layer = [t for t in expected_tensors(spec) if t.key.layer == 1]
    nbytes = sum(ShardTensor(t.name, t.dtypes[0], t.shape).nbytes for t in layer)
    assert SHARD_BYTES - 10_000_000 < nbytes <= SHARD_BYTES


def test_compressed_tensors_decompresses_to_the_same_numbers(small: Path) -> None:
    compressors = pytest.importorskip("compressed_tensors.compressors")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    config = json.loads((small / "config.json").read_text())["quantization_config"]
    scheme = quantization.QuantizationConfig.model_validate(config).config_groups["group_0"]
    tensors = {name: t for path in small.glob("*.safetensors") for name, t in load_file(path).items()}
    compared = 0
    for name, packed in tensors.items():
        prefix, _, part = name.rpartition(".")
        if part != "weight_packed":
            continue
        scale = tensors[prefix + ".weight_scale"]
        state = {key: tensors[f"{prefix}.{key}"] for key in ("weight_packed", "weight_scale", "weight_shape")}
        theirs = compressors.PackedQuantizationCompressor.decompress(state, scheme)["weight"]
        assert theirs.dtype == torch.bfloat16  # their product is rounded once more than ours
        assert torch.equal(theirs, int4.dequantize(packed, scale).to(torch.bfloat16))
        compared += 1
    assert compared == 2 * 8 * 3


def test_numbers_keep_activations_in_range(tmp_path: Path, sizes: dict[str, Any]) -> None:
    wide = sizes | {"hidden": 512, "moe_intermediate": 256, "layers": 2, "dense_layers": 1, "experts": 2}
    synthesize(tmp_path / "m", overrides=wide, seed=3)
    tensors = load_file(tmp_path / "m" / "model-00001-of-000001.safetensors")
    q_values: set[int] = set()
    for name, tensor in tensors.items():
        if name.endswith("_packed"):
            weight = int4.dequantize(tensor, tensors[name.replace("packed", "scale")])
            q_values |= set(int4.unpack(tensor).flatten().tolist())
        elif tensor.ndim == 2 and tensor.dtype == torch.bfloat16 and not name.endswith("scale"):
            weight = tensor.float()
        else:
            continue
        gain = float(weight.square().mean().sqrt()) * (1 if "embed" in name else weight.shape[1] ** 0.5)
        assert 0.9 < gain < 1.1, name
        assert abs(float(weight.mean()) / float(weight.std())) < 4.5 / weight.numel() ** 0.5, name
    assert q_values == set(range(-7, 8))
    norm = tensors["model.norm.weight"].float()
    assert 0.9 < float(norm.min()) < float(norm.max()) < 1.2
    bias = tensors["model.layers.1.mlp.gate.e_score_correction_bias"]
    assert bias.dtype == torch.float32
    assert 0 < float(bias.abs().max()) < 0.2


def test_same_seed_same_numbers_however_sharded(small: Path, tmp_path: Path, sizes: dict[str, Any]) -> None:
    first = {name: t for path in small.glob("*.safetensors") for name, t in load_file(path).items()}
    synthesize(tmp_path / "a", overrides=sizes, seed=7)
    again = load_file(tmp_path / "a" / "model-00001-of-000001.safetensors")
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)
    synthesize(tmp_path / "b", overrides=sizes, seed=8)
    other = load_file(tmp_path / "b" / "model-00001-of-000001.safetensors")
    same = [name for name in first if torch.equal(first[name], other[name])]
    assert same
    assert all(name.endswith("weight_shape") for name in same)


def test_given_vocabulary_moves_the_specials(tmp_path: Path, sizes: dict[str, Any]) -> None:
    ranks = [bytes([value]) for value in range(256)] + [b"ab", b"abc"]
    vocab = tmp_path / "v"
    vocab.write_bytes(b"".join(base64.b64encode(t) + b" %d\n" % i for i, t in enumerate(ranks)))
    sizes = {name: value for name, value in sizes.items() if name != "vocab_size"}
    synthesize(tmp_path / "m", overrides=sizes, vocab=vocab)
    spec = read_spec(tmp_path / "m")
    assert spec.vocab_size == 258 + 256
    assert (spec.bos_token_id, spec.eos_token_ids, spec.pad_token_id) == (258, (260,), 513)
    assert (tmp_path / "m" / "tiktoken.model").read_bytes() == vocab.read_bytes()
    tokens = json.loads((tmp_path / "m" / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    assert tokens["280"]["content"] == "<think>"
    with pytest.raises(SpecError, match="vocab_size follows"):
        synthesize(tmp_path / "n", overrides={"vocab_size": 600}, vocab=vocab)


def test_tokenizer_files_are_the_published_ones() -> None:
    ranks = len(read_ranks(GOLDEN / "tiktoken.model"))
    published = json.loads((GOLDEN / "tokenizer_config.json").read_text())
    ours = tokenizer_config(ranks)
    assert ours["added_tokens_decoder"] == published["added_tokens_decoder"]
    assert ours["additional_special_tokens"] == published["additional_special_tokens"]
    assert special_tokens(ranks) == json.loads((GOLDEN / "special-tokens.json").read_text())


def test_generated_vocabulary_is_used_by_bpe(small: Path) -> None:
    tiktoken = pytest.importorskip("tiktoken")
    ranks = read_ranks(small / "tiktoken.model")
    assert len(ranks) == 600 - 256
    encoding = tiktoken.Encoding(
        "generated",
        pat_str=r"\w+|\W+",
        mergeable_ranks={t: i for i, t in enumerate(ranks)},
        special_tokens={},
    )
    ids = encoding.encode("abacadabra ü")
    assert encoding.decode(ids) == "abacadabra ü"
    assert any(len(ranks[i]) == 2 for i in ids)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"IQ== 1\n", "line 1"),
        (b"IQ== 0\nIQ== 1\n", "two ranks"),
        (b"IQ== 0\n", "single bytes"),
        (b"IQ==0\n", "line 1"),
        (b"@@ 0\n", "line 1"),
        (b" 0\n", "line 1"),
        (b"\xff\xfe 0\n", "line 1"),
    ],
)
def test_malformed_vocabulary(tmp_path: Path, content: bytes, named: str) -> None:
    (tmp_path / "v").write_bytes(content)
    with pytest.raises(TokenizerError, match=named):
        synthesize(tmp_path / "m", vocab=tmp_path / "v")
    assert not (tmp_path / "m").exists()


def test_refusals(tmp_path: Path, sizes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(CheckpointError, match="not empty"):
        synthesize(tmp_path / "full", overrides=sizes)
    with pytest.raises(CheckpointError, match="not empty"):
        synthesize(tmp_path / "full" / "x", overrides=sizes)
    with pytest.raises(SpecError, match="did you mean 'experts'"):
        synthesize(tmp_path / "m", overrides=sizes | {"expert": 3})
    with pytest.raises(SpecError, match="num_experts_per_tok 9"):
        synthesize(tmp_path / "m", overrides=sizes | {"top_k": 9})
    with pytest.raises(SpecError, match="no preset"):
        synthesize(tmp_path / "m", like="gpt-2", overrides=sizes)
    with pytest.raises(TokenizerError, match="256 ranks"):
        synthesize(tmp_path / "m", overrides=sizes | {"vocab_size": 511})
    with pytest.raises(CheckpointError, match="seed"):
        synthesize(tmp_path / "m", overrides=sizes, seed=-1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 10_000))
    with pytest.raises(CheckpointError, match="GB are free"):
        synthesize(tmp_path / "m", overrides=sizes)
    assert not (tmp_path / "m").exists()
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["x"]


def test_an_interrupted_folder_is_not_a_checkpoint(
    tmp_path: Path, sizes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("k2hybrid.checkpoint.synth.write_shard", full_disk)
    with pytest.raises(CheckpointError, match="No space left"):
        synthesize(tmp_path / "m", overrides=sizes)
    assert not (tmp_path / "m" / INDEX_NAME).exists()
