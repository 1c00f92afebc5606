"""load: from a checkpoint folder to a running model. Layer 5."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from k2hybrid.cache.journal import Journal
from k2hybrid.cache.journal_writer import JournalWriter
from k2hybrid.cache.pages import LatentPages
from k2hybrid.chat.exchanges import Exchanges
from k2hybrid.chat.markers import Markers
from k2hybrid.chat.template import ChatTemplate
from k2hybrid.chat.tokenizer import Tokenizer
from k2hybrid.checkpoint.hub import model_name
from k2hybrid.checkpoint.spec import read_spec
from k2hybrid.config import STEP_TOKENS, RuntimeConfig
from k2hybrid.engine.engine import Engine
from k2hybrid.engine.metrics import ByteMeter
from k2hybrid.engine.step import StepModel
from k2hybrid.errors import TokenizerError
from k2hybrid.hardware.topology import read_topology
from k2hybrid.native.machine import ALLOWED_CPUS, Machine
from k2hybrid.runtime.archive import make_archive
from k2hybrid.runtime.experts import make_experts, trace_writer
from k2hybrid.runtime.fingerprint import fingerprint
from k2hybrid.runtime.latents import context_tokens_of, latent_pages
from k2hybrid.runtime.memory import log_needs, start_needs
from k2hybrid.runtime.models import card_of, model_in_ram, model_on_device
from k2hybrid.runtime.on_device import COLD_ROWS
from k2hybrid.runtime.runtime import Runtime
from k2hybrid.runtime.sessions import Sessions, journal_limit
from k2hybrid.runtime.sizes import network_sizes

# Attention this wide (heads · v_head_dim) is worth several torch threads in a prefill. In a narrower one they
# mostly wait for each other: on two busy cores a small model's prefill took thrice as long with two.
WIDE_ATTENTION = 2048


def load(model: str | Path | None = None, **options: Any) -> Runtime:
    """Open a checkpoint and start its engine; weights stay in the files, mapped (8-bit ones are made).

    Args:
        model: checkpoint folder in the published layout; None: the built-in model.
        options: fields of `RuntimeConfig`.

    Raises:
        ConfigError: an option is unknown, malformed, or does not fit the model.
        CheckpointError: the folder cannot be used; the subclass says which part of it.
        NativeError: the extension is missing, or the CPU lacks the instruction set asked for.
    """
    given: Mapping[str, Any] = options if model is None else {**options, "model": model}
    return open_runtime(RuntimeConfig.from_mapping(given))


def open_runtime(
    config: RuntimeConfig, *, wrapped: Callable[[StepModel], StepModel] = lambda model: model
) -> Runtime:
    """As `load`. `wrapped` may put something around the model, e.g. to record or to replay it."""
    with ExitStack() as opened:  # undoes what was done if a later part fails
        spec = read_spec(config.model)
        tokenizer = Tokenizer.load(config.model)
        if tokenizer.vocab_size > spec.vocab_size:
            raise TokenizerError(
                f"the tokenizer of {config.model} has {tokenizer.vocab_size} ids, but config.json says "
                f"vocab_size {spec.vocab_size}"
            )
        template = ChatTemplate.load(config.model, tokenizer)
        opened.callback(template.close)
        topology = read_topology(allowed_cpus=ALLOWED_CPUS)
        nodes = [node.cpus for node in topology.compute_nodes]
        machine = Machine(config.threads, config.isa, nodes if len(nodes) > 1 else None)
        meter = ByteMeter()
        context_tokens = context_tokens_of(spec, config)
        card = card_of(spec, config, context_tokens)
        pages = latent_pages(spec, config, context_tokens, None if card is None else card.device.torch)
        latent_bytes = (0 if card is not None else pages.pages * pages.page_bytes) + (config.cache_ram or 0)
        rows = (config.max_step_tokens or STEP_TOKENS) if card is None else min(card.fit.chunk, COLD_ROWS)
        experts = make_experts(config, spec, machine, topology, latent_bytes, max_rows=rows)
        placement = experts.store.placement if experts.store is not None else None
        log_needs(start_needs(spec, pages, placement, config))
        # From here on it says what runs, not what was left open: it is printed.
        config = replace(
            config,
            threads=machine.threads,
            isa=machine.isa,
            expert_place=experts.place,
            expert_ram=experts.slot_bytes or None,
            max_step_tokens=rows if card is None else card.fit.chunk,
            hot_experts=None if card is None else card.hot_bytes(spec),
        )
        name = model_name(config.model)
        tracing = None
        if config.trace is not None and spec.moe_layers:
            tracing = trace_writer(config.trace, spec, name)
            opened.callback(tracing.close)

        if card is None:
            made = model_in_ram(config, spec, machine, experts, pages, meter, tracing)
        else:
            made = model_on_device(config, spec, machine, experts, pages, meter, card, context_tokens)
        opened.callback(made.close)
        if experts.store is not None:
            opened.callback(experts.store.close)
        journal, writer = _journal(config, pages, template.source)
        if journal is not None and writer is not None:
            opened.callback(journal.close)
            opened.callback(writer.close)
        archive = make_archive(config, pages, journal, writer)
        if archive is not None:
            opened.callback(archive.mover.close)
            opened.callback(archive.close)
        exchanges = Exchanges(Markers.from_specials(tokenizer.specials), tokenizer)
        sessions = Sessions(exchanges, pages.PAGE_TOKENS, journal, writer)
        engine = Engine(
            wrapped(made.model),
            pages,
            sizes=network_sizes(
                spec,
                meter.step_bytes,
                pages.format.row_bytes,
                on_device=card is not None,
                fused=card is None and machine.tiles,
            ),
            vocab_size=spec.vocab_size,
            context_tokens=context_tokens,
            config=config,
            meter=meter,
            torch_threads=machine.threads if spec.num_heads * spec.v_head_dim >= WIDE_ATTENTION else 1,
            archive=archive,
            on_start=made.prepare,
        )

        def release() -> None:
            if tracing is not None:
                tracing.close()
            if archive is not None:
                archive.mover.close()
            made.close()

        runtime = Runtime(
            name=name,
            config=config,
            spec=spec,
            tokenizer=tokenizer,
            template=template,
            engine=engine,
            sessions=sessions,
            store=experts.store,
            lost_files=lambda: made.watch.lost_files,
            device=made.device,
            release=release,
        )
        engine.start()
        opened.pop_all()
        return runtime


def _journal(
    config: RuntimeConfig, pages: LatentPages, template: str | None
) -> tuple[Journal | None, JournalWriter | None]:
    if config.journal is None:
        return None, None
    journal = Journal(
        config.journal,
        fingerprint(config, pages, template),
        pages.page_bytes,
        max_bytes=journal_limit(config, config.journal),
        max_age_s=config.journal_days * 86_400,
    )
    return journal, JournalWriter(journal)
