"""A tiny good checkpoint to attack, and the tools to do it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from k2hybrid.checkpoint.index import INDEX_NAME
from k2hybrid.checkpoint.loader import open_checkpoint
from k2hybrid.checkpoint.synth import synthesize
from k2hybrid.types import ExpertRef, Int4Ref

TINY: dict[str, Any] = {
    "layers": 1,
    "dense_layers": 0,
    "hidden": 32,
    "intermediate": 32,
    "moe_intermediate": 32,
    "heads": 1,
    "q_lora": None,
    "kv_lora": 4,
    "nope": 4,
    "rope": 2,
    "v_head": 4,
    "experts": 1,
    "top_k": 1,
    "vocab_size": 512,
}


@dataclass
class Sink:
    """Keeps what the loader hands out."""

    refs: list[ExpertRef] = field(default_factory=list)

    def add_expert(self, layer: int, expert: int, ref: ExpertRef) -> None:
        self.refs.append(ref)

    def places(self) -> list[tuple[Any, ...]]:
        """Where every expert tensor lies; the address differs from map to map."""
        places = []
        for expert in self.refs:
            for matrix in (expert.gate, expert.up, expert.down):
                assert isinstance(matrix, Int4Ref)
                for ref in (matrix.packed, matrix.scale):
                    places.append((ref.name, ref.path.name, ref.offset, ref.nbytes, ref.dtype, ref.shape))
        return places


@dataclass
class Target:
    """A copy of the tiny checkpoint in one shard."""

    folder: Path

    @property
    def shard(self) -> Path:
        return next(self.folder.glob("*.safetensors"))

    @property
    def index(self) -> Path:
        return self.folder / INDEX_NAME

    def split(self) -> tuple[bytes, bytes]:
        """(header JSON, data) of the shard."""
        content = self.shard.read_bytes()
        length = int.from_bytes(content[:8], "little")
        return content[8 : 8 + length], content[8 + length :]

    def join(self, header: bytes, data: bytes) -> None:
        header += b" " * (-len(header) % 8)
        self.shard.write_bytes(len(header).to_bytes(8, "little") + header + data)

    def edit_header(self, change: Callable[[dict[str, Any]], object]) -> None:
        header, data = self.split()
        fields = json.loads(header)
        change(fields)
        self.join(json.dumps(fields).encode(), data)

    def edit_index(self, change: Callable[[dict[str, Any]], object]) -> None:
        fields = json.loads(self.index.read_text())
        change(fields)
        self.index.write_text(json.dumps(fields))

    def open(self) -> list[tuple[Any, ...]]:
        """Open and close it; where its experts lie."""
        sink = Sink()
        open_checkpoint(self.folder, sink).close()
        return sink.places()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tiny") / "model"
    synthesize(out, overrides=TINY, seed=1)
    return out


@pytest.fixture
def target(tiny: Path, tmp_path: Path) -> Target:
    shutil.copytree(tiny, tmp_path / "model")
    return Target(tmp_path / "model")
