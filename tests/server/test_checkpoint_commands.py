"""inspect, verify, pull, and models named by repository, as commands."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file

from k2hybrid.checkpoint.origin import Origin
from k2hybrid.checkpoint.pull import Pull
from k2hybrid.checkpoint.synth import synthesize
from k2hybrid.cli import main
from k2hybrid.config import MINI_MODEL
from tests.hub_server import Hub, content_of, serving, sha256
from tests.server.process import started

REPO = "owner/Tiny"
SIZES: dict[str, Any] = {
    "layers": 2, "experts": 4, "top_k": 2, "hidden": 64, "heads": 2, "intermediate": 64,
    "moe_intermediate": 32, "vocab_size": 600, "q_lora": 32, "kv_lora": 32, "nope": 32,
    "rope": 16, "v_head": 32,
}  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "model"
    synthesize(out, overrides=SIZES, seed=2, shard_bytes=40_000)
    return out


@pytest.fixture
def model(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


def shards(model: Path) -> list[Path]:
    return sorted(model.glob("*.safetensors"))


def written(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def test_verify_a_whole_checkpoint(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "report.json"
    assert main(["verify", str(model), "--json", str(report)]) == 0
    assert f"{model}: whole, by its headers" in capsys.readouterr().out
    assert written(report)["deep"] is None
    digest = sha256(shards(model)[0].read_bytes())
    (model / "SHA256SUMS").write_text(f"{digest} *{shards(model)[0].name}\n")
    assert main(["verify", str(model), "--deep", "--json", str(report)]) == 0
    printed = capsys.readouterr().out
    assert f"{model}: whole\n" in printed
    found = written(report)
    assert found["whole"] is True
    assert found["problems"] == []
    assert found["deep"]["checksums_compared"] == [shards(model)[0].name]
    assert found["deep"]["bytes_read"] == sum(path.stat().st_size for path in shards(model))
    assert found["tensors"] == sum(len(load_file(path)) for path in shards(model))


def test_the_built_in_model_is_whole(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(MINI_MODEL), "--deep"]) == 0


def test_verify_lists_everything_at_once(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gone, cut, infinite = shards(model)[:3]
    gone.unlink()
    cut.write_bytes(cut.read_bytes()[:-1])
    tensors = load_file(infinite)
    name = next(name for name, tensor in tensors.items() if tensor.dtype == torch.bfloat16)
    tensors[name].view(-1)[0] = float("inf")
    save_file(tensors, infinite, metadata={"format": "pt"})
    (model / "chat_template.jinja").write_text("{{ nothing.there.at_all }}")
    report = tmp_path / "report.json"
    assert main(["verify", str(model), "--deep", "--json", str(report)]) == 1
    problems = written(report)["problems"]
    assert written(report)["missing_shards"] == [gone.name]
    for text in (f"{gone.name}: missing", f"{cut} is truncated", f"{name}: 1 values", "chat template cannot"):
        assert len([line for line in problems if text in line]) == 1, (text, problems)
    assert len(problems) == 4
    assert f"{model}: 4 problems" in capsys.readouterr().out
    # The vocabulary as well, in place of the template, which cannot be tried without.
    (model / "tiktoken.model").write_bytes(b"oops\n")
    assert main(["verify", str(model)]) == 1
    printed = capsys.readouterr().out
    assert "tiktoken.model line 1" in printed
    assert f"1 of {len(shards(model)) + 1} shards are missing" in printed


def test_a_vocabulary_that_is_too_large_for_the_model(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copyfile(MINI_MODEL / "tiktoken.model", model / "tiktoken.model")
    shutil.copyfile(MINI_MODEL / "tokenizer_config.json", model / "tokenizer_config.json")
    assert main(["verify", str(model)]) == 1
    assert "but config.json says vocab_size 600" in capsys.readouterr().out


def test_inspect_shows_shards_layers_experts_and_links(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = shards(model)[0]
    first.rename(tmp_path / "blob")
    first.symlink_to("../blob")
    (model / "README.md").symlink_to("nowhere")
    report = tmp_path / "report.json"
    assert main(["inspect", str(model), "--experts", "--json", str(report)]) == 0
    printed = capsys.readouterr().out.splitlines()
    found = written(report)
    assert found["links"] == {first.name: str(tmp_path / "blob"), "README.md": None}
    assert f"{first.name} -> {tmp_path / 'blob'}" in printed
    assert "README.md -> nowhere" in printed
    assert [shard["nbytes"] for shard in found["shards"]] == [path.stat().st_size for path in shards(model)]
    for shard in found["shards"]:
        assert [shard["name"], f"{shard['tensors']:,}", f"{shard['nbytes']:,}"] in map(str.split, printed)
    assert [(one["layer"], one["expert"]) for one in found["experts"]] == [(1, expert) for expert in range(4)]
    experts = sum(
        tensor.nbytes
        for path in shards(model)
        for name, tensor in load_file(path).items()
        if ".mlp.experts." in name
    )
    assert found["layers"]["1"]["expert_bytes"] == experts
    assert any(line.split()[:4] == ["routed", "experts", "in", "all"] for line in printed)
    assert any(line.startswith("rows of packed start at multiples of ") for line in printed)
    assert sum(found["expert_row_alignments"]["scale"].values()) == 4 * 3


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors.index.json", "shards"])
def test_inspect_shows_what_is_there_of_a_part(
    model: Path, capsys: pytest.CaptureFixture[str], missing: str
) -> None:
    if missing == "shards":
        for path in shards(model)[1:]:
            path.unlink()
    else:
        (model / missing).unlink()
    assert main(["inspect", str(model)]) == 1
    shown = capsys.readouterr()
    assert shards(model)[0].name in shown.out
    assert shown.err.startswith(f"k2hybrid inspect: {model} is not whole: ")
    assert ("num_layers" in shown.out) is (missing != "config.json")


def test_pull_then_use_it_by_name(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with serving(Hub(REPO, content_of(whole))) as hub:
        broken = shards(whole)[1].name
        hub.statuses[broken] = 404
        assert main(["pull", REPO, "--endpoint", hub.url]) == 1
        shown = capsys.readouterr()
        assert f"{broken}: " in shown.err
        assert f"go on with: k2hybrid pull {REPO} --endpoint {hub.url}\n" in shown.err
        # Half of it is refused, and what can be seen of it is shown.
        for argv in (
            ["serve", REPO, "--port", "0", "--no-journal"],
            ["chat", REPO, "-p", "x"],
            ["bench", REPO],
        ):
            assert main(argv) == 1
            captured = capsys.readouterr()
            said = captured.err + captured.out
            assert (
                f"lacks 1 of {len(shards(whole))} shards: {broken}; finish the download: k2hybrid pull"
                in said
            )
        assert main(["inspect", REPO]) == 1
        assert f"{broken}  missing" in capsys.readouterr().out
        assert main(["verify", REPO]) == 1
        assert f"finish the download: k2hybrid pull {REPO}" in capsys.readouterr().out

        hub.statuses.clear()
        assert main(["pull", REPO, "--endpoint", hub.url]) == 0
        shown = capsys.readouterr()
        folder = Path(shown.out.strip())
        assert content_of(folder) == content_of(whole)
        assert shown.err == f"serve it with: k2hybrid serve {REPO}\n"
    # From here on nobody answers.
    assert main(["verify", REPO, "--deep"]) == 0
    assert f"checksums of {len(content_of(whole))} files compared\n" in capsys.readouterr().out
    assert main(["inspect", REPO]) == 0
    assert f" -> {folder.parent.parent / 'blobs'}" in capsys.readouterr().out
    assert main(["chat", REPO, "-p", "hello", "--max-tokens", "2", "--threads", "1"]) == 0
    report = tmp_path / "bench.json"
    assert main(["bench", "--model", REPO, "--prompt", "4", "--decode", "1", "--json", str(report)]) == 0
    assert written(report)["conditions"]["model"] == "Tiny"


def test_what_cannot_be_pulled(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pull", "../../etc"]) == 1
    assert capsys.readouterr().err == "k2hybrid pull: '../../etc' is no repository; name it OWNER/NAME\n"


def test_serving_by_name_goes_by_that_name(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A snapshot's folder is called by its commit; clients see the repository's name."""
    with serving(Hub(REPO, content_of(whole))) as hub:
        Pull(Origin(REPO, None, hub.url), cache=tmp_path / "hub").run()
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    with started(REPO) as (_, url, _):
        assert httpx.get(f"{url}/v1/models").json()["data"][0]["id"] == "Tiny"
