"""RuntimeConfig: every option of a running model, frozen, resolved once. Layer 0."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from k2hybrid.errors import ConfigError

ExpertPlace = Literal["auto", "mapped", "resident", "streamed"]
LatentRows = Literal["bf16", "fp8"]
DenseWeights = Literal["bf16", "fp8", "int8"]

STEP_TOKENS = 512  # rows of one step at most, unless said otherwise
MINI_MODEL = Path(__file__).parent / "mini"


@dataclass(frozen=True, slots=True)
class RuntimeConfig:
    """Options that shape a loaded model. Sizes in tokens or bytes as their names say."""

    model: Path = MINI_MODEL
    device: str = "cpu"  # of the dense half: "cuda", "cuda:1", …; "emulated": the card's code on the CPU
    vram: int | None = None  # bytes of the card that may be taken; None: what is free
    hot_experts: int | None = None  # bytes of the card for the most used experts; None: what is left over
    dense_weights: DenseWeights = "bf16"  # as published; or 8 bits, made at load: `checkpoint.dense8`
    threads: int | None = None  # None: physical cores this process may use
    isa: str | None = None  # may only lower what the CPU offers
    experts: str = (
        "native"  # or "portable": compiled by numba, for CPUs that the extension has no kernels for
    )
    expert_place: ExpertPlace = "auto"  # where the routed experts lie; see `experts.placement`
    expert_ram: int | None = None  # bytes that experts may take; fewer than they have: they are streamed
    expert_arena: Path | None = None  # folder on hugetlbfs or /dev/shm: resident ones outlive the process
    expert_reader: str | None = None  # "uring" or "threads"; None: the first that works here
    trace: Path | None = None  # new file for the router's choices (ids only); None: they are not recorded
    context_tokens: int | None = None  # None: the checkpoint's max_position_embeddings
    latent_rows: LatentRows = "bf16"  # how a token's latent is stored; see `cache.rows`
    latent_bytes: int | None = None  # None: one whole context, 1 GiB at least, a quarter of RAM at most
    cache_ram: int | None = None  # bytes of RAM for latents that leave the pool; None: they are lost
    max_step_tokens: int | None = None  # rows of one step at most; None: 512, on a card what fits
    max_running: int = 16  # sequences that decode together
    max_queue: int = 256
    request_seconds: float | None = None  # None: a request may take as long as it takes
    lease_seconds: float = 900.0  # latents stay so long for a client that runs a tool
    retry_seconds: float = 600.0  # an answer whose client vanished is kept so long for its retry
    journal: Path | None = None  # folder for sessions; None: nothing is written to disk
    journal_bytes: int | None = None  # None: 64 GiB at most, and a quarter of the free disk
    journal_days: float = 30.0  # what was not used for so long is deleted
    idle_prefill: bool = True  # prefill, while idle, what the next turn of an answered chat will begin with
    latent_norm_eps: float = 1e-6  # q_a/kv_a norms: as in the published code, whatever the config says

    def __post_init__(self) -> None:
        if not re.fullmatch(r"cpu|emulated|cuda(:(0|[1-9][0-9]?))?", self.device):
            raise ConfigError(f"device must be cpu, cuda or cuda:N, not {self.device!r}")
        if self.device == "cpu" and (self.vram is not None or self.hot_experts is not None):
            raise ConfigError("vram and hot_experts are for a card: give --device cuda as well")
        if self.device != "cpu" and self.experts == "portable":
            raise ConfigError("portable experts cannot be handed off by a device; use --device cpu")
        if self.device != "cpu" and self.trace is not None:
            raise ConfigError("the router's choices stay on the card there; record a trace with --device cpu")
        if self.dense_weights not in get_args(DenseWeights):
            kinds = ", ".join(get_args(DenseWeights))
            raise ConfigError(f"dense_weights must be one of {kinds}, not {self.dense_weights!r}")
        if self.experts not in ("native", "portable"):
            raise ConfigError(f"experts must be native or portable, not {self.experts!r}")
        if self.expert_place not in get_args(ExpertPlace):
            raise ConfigError(
                f"expert_place must be one of {', '.join(get_args(ExpertPlace))}, not {self.expert_place!r}"
            )
        if self.latent_rows not in get_args(LatentRows):
            raise ConfigError(
                f"latent_rows must be one of {', '.join(get_args(LatentRows))}, not {self.latent_rows!r}"
            )
        if self.expert_reader not in (None, "uring", "threads"):
            raise ConfigError(f"expert_reader must be uring or threads, not {self.expert_reader!r}")
        for name in ("expert_ram", "cache_ram", "vram", "hot_experts"):
            value = getattr(self, name)
            if value is not None and type(value) is not int:
                raise ConfigError(f"{name} is a number of bytes, not {value!r}")
        placed = self.expert_place not in ("auto", "mapped") or self.expert_ram or self.expert_arena
        if self.experts == "portable" and placed:
            raise ConfigError(
                "portable experts are read mapped: leave expert_place, expert_ram and expert_arena out"
            )
        for name in ("max_running", "max_queue"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")
        at_least_one = (
            "threads",
            "context_tokens",
            "latent_bytes",
            "journal_bytes",
            "expert_ram",
            "cache_ram",
        )
        for name in (*at_least_one, "max_step_tokens", "vram"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, not {value}")
        if self.hot_experts is not None and self.hot_experts < 0:
            raise ConfigError(f"hot_experts cannot be {self.hot_experts}; give bytes, or 0 for none")
        for name in ("request_seconds", "lease_seconds", "retry_seconds", "journal_days"):
            value = getattr(self, name)
            if value is not None and not (value >= 0 if name != "request_seconds" else value > 0):
                raise ConfigError(f"{name} cannot be {value}; give seconds")

    @property
    def on_card(self) -> bool:
        """Whether dense weights and latents lie on a card, not in RAM."""
        return self.device.startswith("cuda")

    @classmethod
    def from_mapping(cls, options: Mapping[str, Any]) -> RuntimeConfig:
        """Build from names and values; an unknown name fails with the nearest valid one."""
        known = {f.name for f in fields(cls)}
        for name in options:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(sorted(known))}"
                raise ConfigError(f"unknown option {name!r}{hint}")
        return cls(**{**options, "model": Path(options.get("model", MINI_MODEL))})

    def table(self) -> list[tuple[str, str]]:
        """(name, value) rows for the one table that start-up prints."""
        unset = {
            "threads": "one per core",
            "isa": "the best",
            "expert_ram": "none of their own",
            "expert_arena": "none",
            "expert_reader": "the first that works",
            "trace": "none",
            "context_tokens": "the model's",
            "latent_bytes": "one context",
            "cache_ram": "none",
            "vram": "what is free" if self.on_card else "none",
            "hot_experts": "what is left over" if self.device != "cpu" else "none",
            "max_step_tokens": str(STEP_TOKENS),
            "request_seconds": "no limit",
            "journal": "none",
            "journal_bytes": "64 GiB, a quarter of the free disk at most",
        }
        values = ((f.name, getattr(self, f.name)) for f in fields(self))
        return [(name, unset[name] if value is None else str(value)) for name, value in values]
