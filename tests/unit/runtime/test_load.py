"""Loading: options, refusals, what is let go."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

import k2hybrid
from k2hybrid.cache.pages import LatentPages
from k2hybrid.cache.rows import Fp8Rows
from k2hybrid.checkpoint.spec import read_spec
from k2hybrid.config import RuntimeConfig
from k2hybrid.errors import ConfigError, ContextLengthError, EngineError, TensorError, TokenizerError
from k2hybrid.experts.prediction import ModelSizes
from k2hybrid.runtime import Runtime, latents, load, models
from k2hybrid.runtime.memory import start_needs
from k2hybrid.types import ChatRequest, Message


def test_the_package_imports_nothing_heavy() -> None:
    code = (
        "import sys, k2hybrid; assert k2hybrid.__version__; "
        "print(*sorted({'torch', 'numpy', 'k2hybrid.native', 'k2hybrid.runtime'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_public_names_come_at_first_use() -> None:
    assert k2hybrid.load is load
    assert set(k2hybrid.__all__) <= set(dir(k2hybrid))
    for name in k2hybrid.__all__:
        assert getattr(k2hybrid, name) is not None
    with pytest.raises(AttributeError, match="lode"):
        k2hybrid.lode  # noqa: B018


def test_a_loaded_model_knows_its_name_and_sizes(runtime: Runtime, checkpoint: Path) -> None:
    assert runtime.name == checkpoint.name
    assert runtime.context_tokens == 1024
    assert runtime.spec.vocab_size == runtime.tokenizer.vocab_size
    assert runtime.config.model == checkpoint


def test_unknown_options_are_refused_with_the_nearest_name(checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'threads'"):
        load(checkpoint, thread=2)


def test_memory_is_told_before_anything_is_loaded(
    checkpoint: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_args: object, **_options: object) -> None:
        raise EngineError("nothing is loaded yet")

    monkeypatch.setattr(models, "assemble", stop)
    with caplog.at_level(logging.INFO, "k2hybrid"), pytest.raises(EngineError, match="nothing is loaded"):
        load(checkpoint, latent_rows="fp8", latent_bytes=1 << 20, threads=1)
    told = [line for line in caplog.messages if line.startswith("memory:")]
    assert [line.split()[1] for line in told] == ["dense", "latents,", "the", "8"]
    assert "in fp8" in told[1]
    assert "1,024 MiB" in told[2]


def test_the_table_counts_what_was_reserved(checkpoint: Path) -> None:
    spec = read_spec(checkpoint)
    pages = LatentPages(spec.num_layers, 5, Fp8Rows(32, 16))
    weights = sum(
        tensor.nbytes
        for shard in checkpoint.glob("*.safetensors")
        for name, tensor in load_file(shard).items()
        if ".experts." not in name
    )
    dense, latents, _, experts = start_needs(spec, pages, None, RuntimeConfig())
    assert dense.nbytes == weights
    assert latents.nbytes == pages.pages * pages.page_bytes == 5 * 64 * 2 * (32 + 4 + 2 * 16)
    assert "320 tokens in fp8" in latents.name
    assert experts.nbytes == ModelSizes.of(spec).experts.total_bytes


def test_memory_that_no_machine_has_is_refused(checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match="ask for less"):
        load(checkpoint, latent_bytes=1 << 50)


def test_memory_for_less_than_a_page_is_refused(checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match="holds no page"):
        load(checkpoint, latent_bytes=100)


def test_few_pages_bound_the_context(checkpoint: Path) -> None:
    page_bytes = 2 * 64 * 48 * 2
    with load(checkpoint, latent_bytes=3 * page_bytes, threads=1) as small:
        assert small.context_tokens == 3 * 64
        for tokens in (3 * 64, 2000):
            with pytest.raises(ContextLengthError, match=rf"{tokens} tokens > 191 maximum") as refused:
                small.generate([1] * tokens)
            assert "holds 192 tokens, fewer than the context's 1024" in str(refused.value)
            assert "--latent-gb" in str(refused.value)
            assert "latent_bytes" in str(refused.value)


def test_where_the_context_bounds_it_no_memory_is_asked_for(checkpoint: Path) -> None:
    with (
        load(checkpoint, latent_bytes=4 << 20, threads=1) as roomy,
        pytest.raises(ContextLengthError, match="1024 tokens of context") as refused,
    ):
        roomy.generate([1] * 1024)
    assert "latent" not in str(refused.value)


def test_a_context_beyond_the_models_is_said(checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), load(checkpoint, context_tokens=2000, threads=1) as long:
        assert long.context_tokens == 2000
    assert "made for 1024" in caplog.text


def test_a_vocabulary_larger_than_the_model_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(checkpoint, broken)
    config = json.loads((broken / "config.json").read_text())
    config["vocab_size"] = 1000
    config |= {key: 999 for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in config}
    (broken / "config.json").write_text(json.dumps(config))
    with pytest.raises(TokenizerError, match="1024 ids, but config"):
        load(broken)


def test_a_missing_tensor_is_named(checkpoint: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(checkpoint, broken)
    config = json.loads((broken / "config.json").read_text())
    config["num_hidden_layers"] = 3
    (broken / "config.json").write_text(json.dumps(config))
    with pytest.raises(TensorError, match=r"model\.layers\.2\..*missing"):
        load(broken)


def test_a_closed_runtime_says_so(checkpoint: Path) -> None:
    runtime = load(checkpoint, threads=1)
    run = runtime.generate([1, 2, 3], max_tokens=900, stop_ids=())
    runtime.close()
    runtime.close()
    assert len(list(run)) < 900
    assert run.finish_reason == "cancelled"
    with pytest.raises(EngineError, match="closed"):
        runtime.chat(ChatRequest((Message("user", "Hello"),)))
    with pytest.raises(EngineError, match="stopped"):
        runtime.generate([1])


def test_the_main_module_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "k2hybrid", "--help"], capture_output=True, text=True, check=True
    )
    assert "serve" in done.stdout


def test_pages_hold_one_context_at_least(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latents, "LEAST_LATENT_BYTES", 1 << 12)
    with load(checkpoint, context_tokens=1000, threads=1) as small:
        assert small.context_tokens == 1000
    monkeypatch.setattr(latents, "ram_bytes", lambda: 1 << 20)
    with load(checkpoint, context_tokens=200_000, threads=1) as poor:
        assert 0 < poor.context_tokens < 200_000
