"""`k2hybrid plan` as a command: machines from files and options, what is printed and written."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from k2hybrid.checkpoint.presets import published_config
from k2hybrid.checkpoint.spec import ModelSpec
from k2hybrid.cli import machine as machine_module
from k2hybrid.cli import main
from k2hybrid.cli.machine import _WIDTHS, describe, read_description
from k2hybrid.errors import ConfigError
from k2hybrid.experts.prediction import Rates
from k2hybrid.model.card_memory import CardWishes, card_plan
from k2hybrid.runtime import card_rates

SPEC = ModelSpec.from_config(published_config())
RATES = {
    "cores": 8, "ram_gb_s": 100.0, "dense_gb_s": 90.0, "mapped_gb_s": 80.0, "arena_gb_s": 85.0,
    "dense_ops": 2e12, "expert_ops": 1.5e12, "overlap": 0.75, "step_s": 1e-4, "sequence_s": 2e-5,
    "context_s": 1e-7, "chunk_s": 0.02, "chunk_context_s": 1e-5, "sample_s": 1e-3,
    "widths": {name: getattr(SPEC, name) for name in _WIDTHS},
}  # fmt: skip
MACHINE = {"ram_gib": 768, "nodes": 2, "ram_gb_s": 400, "cores": 64, "nvme_gb_s": 12, "rates": RATES}


def run(tmp_path: Path, *options: str, machine: dict[str, Any] | None = None) -> int:
    file = tmp_path / "machine.json"
    file.write_text(json.dumps(MACHINE if machine is None else machine))
    return main(["plan", "kimi-k2-thinking", "--machine", str(file), *options])


def test_it_prints_what_goes_where_and_how_fast(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path) == 0
    out = capsys.readouterr().out
    for text in (
        "2 nodes",
        "dense weights",
        "resident",
        "it fits",
        "decode, 1 sequence at 32,768",
        "as it is",
    ):
        assert text in out
    assert all(line == line.rstrip() for line in out.splitlines())


def test_options_change_the_machine_of_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, "--ram", "256", "--nodes", "1", "--ctx", "4096", "--concurrency", "1") == 0
    out = capsys.readouterr().out
    assert "254.0 GiB of RAM to use on 1 node" in out
    assert "streamed" in out
    assert "decode, 1 sequence at 4,096" in out
    assert run(tmp_path, "--ram", "20") == 1
    assert "more than the RAM there is" in capsys.readouterr().out


def test_rows_in_fp8_take_656_bytes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written = tmp_path / "plan.json"
    for options, row_bytes in (([], 1152), (["--latent-rows", "fp8"], 656)):
        assert run(tmp_path, "--ctx", "4096", "--concurrency", "2", "--json", str(written), *options) == 0
        latents = [need for need in json.loads(written.read_text())["needs"] if "latents" in need["name"]]
        assert [need["nbytes"] for need in latents] == [61 * row_bytes * 2 * 4096]
    assert "fp8 rows are decoded besides" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run(tmp_path, "--latent-rows", "fp4")


def test_what_would_lie_on_a_card(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written = tmp_path / "plan.json"
    options = ["--vram", "24", "--ctx", "262144", "--concurrency", "1", "--json", str(written)]
    assert run(tmp_path, *options, "--dense-weights", "int8", "--latent-rows", "fp8") == 0
    out = capsys.readouterr().out
    assert "experts fit on the 24.0 GiB of the GPU; planned without it" in out
    card = json.loads(written.read_text())["card"]
    # The largest chunk that is asked for fits.
    wanted = card_plan(SPEC, 24 << 30, CardWishes("int8", "fp8", 262_144, 262_144))
    assert card == dataclasses.asdict(wanted) | {"needs": [dataclasses.asdict(need) for need in wanted.needs]}
    assert all(need.name in out for need in wanted.needs)
    assert run(tmp_path, *options) == 0
    out = capsys.readouterr().out
    assert "what would fit: --latent-rows fp8 --dense-weights int8" in out
    assert json.loads(written.read_text())["card"]["problem"] in out
    smaller = ["--ctx", "131072", "--concurrency", "1", "--dense-weights", "int8", "--latent-rows", "fp8"]
    assert run(tmp_path, "--vram", "24", *smaller) == 0
    assert "a chunk of 16,384 rows" in capsys.readouterr().out


def test_what_it_writes_it_reads_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written = tmp_path / "plan.json"
    assert run(tmp_path, "--json", str(written)) == 0
    first = capsys.readouterr().out
    assert main(["plan", "--machine", str(written)]) == 0
    assert capsys.readouterr().out == first
    found = json.loads(written.read_text())
    assert found["fits"] is True
    assert found["placement"]["place"] == "resident"
    for prediction in found["predictions"]:
        assert sum(prediction["parts"].values()) == pytest.approx(prediction["seconds"])


def test_channels_give_a_share_of_what_they_promise(tmp_path: Path) -> None:
    said = {key: value for key, value in MACHINE.items() if key != "ram_gb_s"}
    found = describe(SPEC, {**said, "channels": 16, "mts": 4800})
    assert found.machine.ram_gb_s == pytest.approx(0.8 * 16 * 4800 * 8 / 1e3)
    assert any("614.4 GB/s" in note and "assumed" in note for note in found.notes)


def test_toml_is_read_as_well(tmp_path: Path) -> None:
    file = tmp_path / "machine.toml"
    file.write_text("ram_gib = 512\ncores = 32\nram_gb_s = 200.5\n")
    assert read_description(file) == {"ram_gib": 512, "cores": 32, "ram_gb_s": 200.5}


def test_a_described_machine_needs_neither_torch_nor_the_extension(tmp_path: Path) -> None:
    file = tmp_path / "machine.json"
    file.write_text(json.dumps(MACHINE))
    code = (
        "import sys\nfrom k2hybrid.cli import main\n"
        f"assert main(['plan', '--machine', {str(file)!r}]) == 0\n"
        "sys.exit(any(m in sys.modules for m in ('torch', 'numpy', 'k2hybrid._native')))"
    )
    done = subprocess.run([sys.executable, "-c", code], timeout=60, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


@pytest.mark.parametrize("content", [b"", b"[]", b"3", b'{"ram_gib":', b"\xff\xfe", b'{"machine": []}'])
def test_files_that_are_no_machine_are_refused(tmp_path: Path, content: bytes) -> None:
    for name in ("m.json", "m.toml"):
        file = tmp_path / name
        file.write_bytes(content)
        if name == "m.toml" and not content:
            continue  # an empty machine: this one
        with pytest.raises(ConfigError, match=r"machine"):
            read_description(file)
    with pytest.raises(ConfigError, match="cannot read"):
        read_description(tmp_path / "nowhere.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ram": 3}, "unknown ram"),
        ({"cores": 0}, "cores must be a number above 0"),
        ({"cores": 2.5}, "whole number"),
        ({"ram_gb_s": "fast"}, "ram_gb_s must be a number"),
        ({"ram_gb_s": float("inf")}, "ram_gb_s must be a number"),
        ({"ram_gb_s": float("nan")}, "ram_gb_s must be a number"),
        ({"ram_gib": True}, "ram_gib must be a number"),
        ({"nodes": -2}, "nodes must be a number"),
        ({"channels": 8}, "together"),
        ({"channels": 8, "mts": 4800}, "not both"),
        ({"rates": 5}, "exactly"),
        ({"rates": {**RATES, "overlap": 2}}, "overlap"),
        ({"rates": {**RATES, "dense_ops": 0}}, "above 0"),
        ({"rates": {**RATES, "step_s": -1}}, "at least 0"),
        ({"rates": {**RATES, "widths": {}}}, "other widths"),
    ],
)
def test_machines_that_cannot_be_are_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any], message: str
) -> None:
    assert run(tmp_path, machine={**MACHINE, **change}) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ctx", "0"], "at least one token"),
        (["--ctx", "300000"], "262144"),
        (["--concurrency", "0"], "one sequence"),
    ],
)
def test_wishes_without_sense_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert run(tmp_path, *options) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("option", [["--hit-rate", "1.5"], ["--hit-rate", "x"], ["--expert-ram", "lots"]])
def test_options_that_are_no_values_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], option: list[str]
) -> None:
    with pytest.raises(SystemExit) as exited:
        run(tmp_path, *option)
    assert exited.value.code == 2
    assert option[1] in capsys.readouterr().err


def test_an_unknown_model_names_the_known_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "kimi-k3"]) == 1
    assert "kimi-k2-thinking" in capsys.readouterr().err


def test_a_folder_with_a_config_alone_is_enough(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(published_config()))
    file = tmp_path / "machine.json"
    file.write_text(json.dumps(MACHINE))
    for model in (tmp_path, tmp_path / "config.json"):
        assert main(["plan", str(model), "--machine", str(file)]) == 0


def test_the_disk_is_measured_where_it_matters_and_nothing_was_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unsaid = {key: value for key, value in MACHINE.items() if key != "nvme_gb_s"}
    folder = tmp_path / "disk"
    folder.mkdir()
    assert run(tmp_path, "--disk", str(folder), machine=unsaid) == 0
    assert "disk:" not in capsys.readouterr().out  # all experts fit
    missing = tmp_path / "nowhere"
    assert run(tmp_path, "--disk", str(missing), "--ram", "256", machine=unsaid) == 1
    out = capsys.readouterr().out
    assert "disk: not measured" in out
    assert "disk's speed is not known" in out
    shard = folder / "model.safetensors"
    with shard.open("wb") as file:
        file.truncate(300 << 20)  # as large as a checkpoint must be to be measured; a hole reads as well
    assert run(tmp_path, "--disk", str(folder), "--ram", "256", machine=unsaid) == 0
    assert "GB/s of" in capsys.readouterr().out


def test_dense_weights_of_8_bits_are_planned_and_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written = tmp_path / "plan.json"
    assert run(tmp_path, "--dense-weights", "fp8", "--json", str(written), "--ctx", "8192") == 0
    out = capsys.readouterr().out
    assert "dense weights, fp8" in out
    assert "made at every start" in out
    eight = json.loads(written.read_text())
    assert eight["dense_weights"] == "fp8"
    assert run(tmp_path, "--json", str(written), "--ctx", "8192") == 0
    sixteen = json.loads(written.read_text())
    assert sixteen["dense_weights"] == "bf16"
    assert eight["predictions"][0]["tokens_s"] > sixteen["predictions"][0]["tokens_s"]
    with pytest.raises(SystemExit):
        run(tmp_path, "--dense-weights", "int4")


def test_a_card_whose_rates_are_known_is_planned_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written = tmp_path / "plan.json"
    rates = ("--vram", "48", "--gpu-gb-s", "900", "--pcie-gb-s", "25", "--gpu-tflops", "150")
    options = ("--ctx", "8192", "--cache-ram", "8GiB", "--latent-rows", "fp8", "--json", str(written))
    assert run(tmp_path, *options, *rates) == 0
    out = capsys.readouterr().out
    assert "--device cuda: dense weights, latents and" in out
    assert "60% of its own rates and 80% of PCIe's are assumed" in out
    assert "decoded besides" not in out  # by the CPU
    assert "latents that left" in out
    assert "without the GPU" in out
    found = json.loads(written.read_text())
    assert found["on_card"] is True
    assert {"GPU memory", "GPU arithmetic", "PCIe"} <= set(found["predictions"][0]["parts"])
    assert found["machine"]["gpu_tflops"] == 150
    assert main(["plan", "--machine", str(written), *options[:-2]]) == 0
    assert capsys.readouterr().out == out
    # Pages that leave pass the card.
    assert any(need["name"] == "pages on their way" for need in found["card"]["needs"])


def test_a_card_that_is_here_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    card = {"vram_gib": 48.0, "gpu_gb_s": 900.0, "pcie_gb_s": 25.0, "gpu_tflops": 150.0}
    monkeypatch.setattr(machine_module, "_card_here", lambda: (card, "GPU: measured here"))
    rates = Rates(**{key: value for key, value in RATES.items() if key != "widths"})
    monkeypatch.setattr(machine_module, "_measured", lambda spec: rates)
    unsaid = {key: value for key, value in MACHINE.items() if key != "rates"}
    assert run(tmp_path, "--ctx", "8192", machine=unsaid) == 0
    out = capsys.readouterr().out
    assert "GPU: measured here" in out
    assert "--device cuda" in out
    assert run(tmp_path, "--ctx", "8192", "--vram", "24", machine=unsaid) == 0  # another one
    assert "GPU: measured here" not in capsys.readouterr().out
    assert run(tmp_path, "--ctx", "8192") == 0  # another machine
    assert "GPU" not in capsys.readouterr().out


def test_a_card_that_cannot_be_measured_is_left_idle(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def busy(device: torch.device) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 1 GiB")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(card_rates, "measure_card", busy)
    rates = Rates(**{key: value for key, value in RATES.items() if key != "widths"})
    monkeypatch.setattr(machine_module, "_measured", lambda spec: rates)
    unsaid = {key: value for key, value in MACHINE.items() if key != "rates"}
    assert run(tmp_path, machine=unsaid) == 0
    assert "GPU: not measured (CUDA out of memory.); give --vram" in capsys.readouterr().out
