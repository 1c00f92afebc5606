"""`k2hybrid bench` on a tiny random checkpoint: what it counts, and the file that it writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from k2hybrid.bench import command, main
from k2hybrid.checkpoint.loader import open_checkpoint
from k2hybrid.checkpoint.synth import synthesize
from k2hybrid.experts.store import ExpertStore
from k2hybrid.hardware.bandwidth import measure
from k2hybrid.native.machine import Machine

SIZES = {"layers": 3, "experts": 4, "hidden": 64, "heads": 2, "top_k": 2, "vocab_size": 2048}
SIZES |= {"intermediate": 96, "moe_intermediate": 32}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "model"
    synthesize(folder, overrides=SIZES, seed=1)
    return folder


@pytest.fixture
def small_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "measure", lambda machine: measure(machine, 1 << 22, rounds=2))


@pytest.mark.usefixtures("small_probe")
def test_it_writes_conditions_and_rows(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "results" / "bench.json"
    assert main([str(model), "--prompt", "20", "--decode", "3", "--threads", "2", "--json", str(file)]) == 0
    written = json.loads(file.read_text())
    assert set(written) == {"conditions", "rows"}
    found = written["conditions"]
    assert found["threads"] == 2
    assert found["read_bandwidth_gb_s"] == max(found["read_bandwidth_variants"].values()) > 0
    assert found["private_mb_run"] > 0
    cases = [row["case"] for row in written["rows"]]
    assert cases == [
        f"{phase}{role}"
        for phase in ("prefill 20", "decode after 20")
        for role in ("", ": experts", ": dense", ": head", ": context")
    ]
    for row in written["rows"]:
        assert row["share_of_limit"] == pytest.approx(row["gb_s"] / found["read_bandwidth_gb_s"], rel=0.01)
    whole = written["rows"][5]
    assert whole["tokens_s"] == pytest.approx(1e3 / whole["ms"])


@pytest.mark.usefixtures("small_probe")
def test_a_decode_step_counts_every_weight_it_reads_once(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    assert main([str(model), "--prompt", "1", "--decode", "2", "--json", str(file)]) == 0
    gb = {row["case"]: row["gb"] for row in json.loads(file.read_text())["rows"]}
    store = ExpertStore(layers=3, experts=4, hidden=64, inter=32)
    with open_checkpoint(model, store) as checkpoint:
        total = checkpoint.total_bytes
    experts = 2 * 4 * store.expert_bytes  # two MoE layers
    shapes = 2 * 4 * 3 * 8  # weight_shape tensors
    vectors = 3 * 2 * (64 + 64 + 1536 + 512) + 64 * 2 + 2 * 4 * 4  # norms and correction biases
    embedding = 2048 * 64 * 2
    assert gb["decode after 1: experts"] * 1e9 == pytest.approx(2 * 2 * store.expert_bytes)
    assert gb["decode after 1: head"] * 1e9 == pytest.approx(embedding)
    assert gb["decode after 1: dense"] * 1e9 == pytest.approx(
        total - experts - shapes - vectors - 2 * embedding, abs=1
    )
    # Step 2 sees two latent rows, step 3 three: 576 values, in three layers.
    assert gb["decode after 1: context"] * 1e9 == pytest.approx(3 * 576 * 2 * (2 + 3) / 2)


def test_an_unusable_model_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "measure", lambda machine: measure(machine, 1 << 22, rounds=1))
        assert main([str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert said.startswith("k2hybrid bench: ")
    assert "config.json" in said


def test_the_probe_prefers_its_best_variant() -> None:
    found = measure(Machine(2), 1 << 23, rounds=3)
    assert found.gb_s == max(found.variants.values()) == found.variants[found.best]
    assert found.threads == 2


@pytest.mark.usefixtures("small_probe")
def test_dense_weights_of_8_bits_are_counted_as_they_are_read(model: Path, tmp_path: Path) -> None:
    found = {}
    for kind in ("bf16", "int8"):
        file = tmp_path / f"{kind}.json"
        given = [str(model), "--prompt", "1", "--decode", "1", "--json", str(file), "--dense-weights", kind]
        assert main(given) == 0
        written = json.loads(file.read_text())
        assert written["conditions"]["dense_weights"] == kind
        found[kind] = {row["case"]: row["gb"] * 1e9 for row in written["rows"]}
    head = "decode after 1: head"
    assert found["bf16"][head] == pytest.approx(2 * 2048 * 64)
    assert found["int8"][head] == pytest.approx(2048 * 64 + 4 * 2048)
    for role in ("experts", "context"):
        assert found["int8"][f"decode after 1: {role}"] == found["bf16"][f"decode after 1: {role}"]
