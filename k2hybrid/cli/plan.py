"""`k2hybrid plan`: what goes where, whether it fits, how fast it will be, and what one change would bring."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from k2hybrid.cache.row_sizes import row_bytes
from k2hybrid.checkpoint.presets import PRESETS, published_config
from k2hybrid.checkpoint.spec import ModelSpec, read_spec
from k2hybrid.cli.machine import NUMBERS, Description, as_said, describe, read_description, with_disk
from k2hybrid.config import DenseWeights
from k2hybrid.errors import ConfigError
from k2hybrid.experts.card_prediction import BUS_SHARE, CARD_SHARE
from k2hybrid.experts.plan import CardPlan, Cards, Plan, Wishes, gib, headline_tokens, make_plan
from k2hybrid.experts.prediction import ModelSizes, Prediction
from k2hybrid.model.card_memory import CardWishes, card_plan, largest_chunk
from k2hybrid.server.options import size

_DEFAULT = "kimi-k2-thinking"


def add_plan_options(parser: argparse.ArgumentParser) -> None:
    """Model, machine, and what is wished for."""
    parser.add_argument(
        "model", nargs="?", default=_DEFAULT, metavar="MODEL",
        help=f"{', '.join(PRESETS)}, or a folder with a config.json; weights are not needed "
        f"(default: {_DEFAULT})",
    )  # fmt: skip
    group = parser.add_argument_group("machine", "this one, but for what is said here")
    group.add_argument("--machine", type=Path, metavar="FILE", help="the same as JSON or TOML, or a --json")
    for option, key, what in NUMBERS:
        group.add_argument(option, dest=key, type=float, default=None, metavar="N", help=what)
    group.add_argument(
        "--disk", type=Path, default=None, metavar="DIR",
        help="where the model lies or will lie, to measure that disk (default: MODEL, or this folder)",
    )  # fmt: skip
    wishes = parser.add_argument_group("wishes")
    wishes.add_argument(
        "--ctx", type=int, default=32768, metavar="TOKENS", help="context of a sequence (default: 32768)"
    )
    wishes.add_argument("--concurrency", type=int, default=4, metavar="N", help="sequences (default: 4)")
    wishes.add_argument(
        "--dense-weights", choices=("bf16", "fp8", "int8"), default="bf16",
        help="of all but routed experts (default: bf16, as published)",
    )  # fmt: skip
    wishes.add_argument(
        "--expert-place", choices=("auto", "mapped", "resident", "streamed"), default="auto",
        help="where experts lie (default: auto)",
    )  # fmt: skip
    wishes.add_argument(
        "--latent-rows",
        choices=("bf16", "fp8"),
        default="bf16",
        help="how latents are stored (default: bf16)",
    )
    wishes.add_argument("--expert-ram", type=size, metavar="SIZE", help="RAM for experts, such as 200GiB")
    wishes.add_argument(
        "--cache-ram", type=size, default=0, metavar="SIZE", help="RAM for latents that leave their pool"
    )
    wishes.add_argument(
        "--hit-rate", type=_share, metavar="X",
        help="share of streamed experts found in RAM (default: even routing, what share has room)",
    )  # fmt: skip
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write it there, machine and rates included"
    )


def plan(args: argparse.Namespace) -> int:
    """Print the plan; 1 if the model does not fit.

    Raises:
        ConfigError: the machine or the wishes make no sense.
        CheckpointError: the model's config cannot be used.
    """
    spec, folder = _model(args.model)
    if args.ctx > spec.max_positions:
        raise ConfigError(f"--ctx {args.ctx} is more than the {spec.max_positions} tokens of the model")
    said = read_description(args.machine) if args.machine else {}
    said |= {key: getattr(args, key) for _, key, _ in NUMBERS if getattr(args, key) is not None}
    described = describe(spec, said)
    rate = args.hit_rate
    wishes = Wishes(
        context=args.ctx,
        concurrency=args.concurrency,
        place=args.expert_place,
        expert_ram=args.expert_ram,
        cache_ram=args.cache_ram,
        hit_rate=None if rate is None else lambda _: rate,
    )
    sizes = ModelSizes.of(
        spec,
        row_bytes(args.latent_rows, spec.kv_lora_rank, spec.qk_rope_head_dim),
        dense_weights=args.dense_weights,
    )
    cards = _cards(spec, args)
    found = make_plan(sizes, described.rates, described.machine, wishes, cards)
    if found.placement is None or found.placement.place == "streamed":  # only then does the disk matter
        described = with_disk(described, spec, args.disk or folder or Path.cwd())
        found = make_plan(sizes, described.rates, described.machine, wishes, cards)
    if found.on_card:
        described = described.noting(
            f"GPU: {CARD_SHARE:.0%} of its own rates and {BUS_SHARE:.0%} of PCIe's are assumed; "
            "no card has confirmed it"
        )
    elif args.latent_rows != "bf16":
        described = described.noting(
            f"attention: its time is that of bf16 rows; {args.latent_rows} rows are decoded besides"
        )
    for line in report(found, described, wishes):
        print(line)
    if args.json:
        args.json.write_text(json.dumps(as_json(found, described, spec, args.dense_weights), indent=2) + "\n")
    return 1 if found.problem else 0


def _cards(spec: ModelSpec, args: argparse.Namespace) -> Cards:
    """What would lie on a card, with as large a prefill chunk as fits."""
    wanted = CardWishes(
        dense=args.dense_weights,
        rows=args.latent_rows,
        context=args.ctx * args.concurrency,
        longest=args.ctx,
        moved=args.cache_ram > 0,
    )

    def planned(vram_bytes: int) -> CardPlan:
        chunk = largest_chunk(spec, vram_bytes, wanted) or wanted.chunk
        return card_plan(spec, vram_bytes, dataclasses.replace(wanted, chunk=chunk))

    return planned


def _model(name: str) -> tuple[ModelSpec, Path | None]:
    """The spec, and the folder that it was read from."""
    if name in PRESETS:
        return ModelSpec.from_config(published_config(name)), None
    folder = Path(name)
    if folder.name == "config.json":
        folder = folder.parent
    if not folder.is_dir():
        raise ConfigError(f"{name} is neither a folder nor a known model; known: {', '.join(PRESETS)}")
    return read_spec(folder), folder


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no share between 0 and 1")
    return share


# --- what is printed ------------------------------------------------------------------------------


def report(found: Plan, described: Description, wishes: Wishes) -> list[str]:
    """The plan as lines."""
    machine = described.machine
    disk = f", disk {machine.disk_gb_s:.2f} GB/s" if machine.disk_gb_s else ""
    nodes = "1 node" if len(machine.node_memory) == 1 else f"{len(machine.node_memory)} nodes"
    lines = [
        f"machine: {gib(machine.memory)} of RAM to use on {nodes}, {machine.ram_gb_s:.1f} GB/s, "
        f"{machine.cores} cores{disk}",
        *(f"  {note}" for note in described.notes),
        "",
        *_columns(
            [("WHAT", "SIZE", "WHERE"), *((n.name, gib(n.nbytes), n.where) for n in found.needs)], (1,)
        ),
        "",
    ]
    if found.card:
        on_card = ((need.name, gib(need.nbytes), need.where) for need in found.card.needs)
        lines += [found.gpu, "", *_columns([("ON THE GPU", "SIZE", ""), *on_card], (1,)), ""]
    if found.placement:
        place = f"experts: {found.placement.place}; {found.placement.reason}"
        hits = f"; {found.hit_rate:.1%} found in RAM" if found.hit_rate is not None else ""
        lines.append(place + hits)
    lines += [f"no: {found.problem}" if found.problem else "it fits", ""]
    if found.cases:
        rows = [("PREDICTED", "TOKENS/S", "SECONDS", "LIMIT", "OF THE TIME")]
        for case in found.cases:
            one = case.found
            share = one.parts[one.limit] / one.seconds
            rows.append((case.name, _rate(one), f"{one.seconds:.3g}", one.limit, f"{share:.0%}"))
        lines += [*_columns(rows, (1, 2, 4)), ""]
    changes: list[tuple[str, ...]] = [
        (f"ONE CHANGE, AT {headline_tokens(wishes):,} TOKENS", "DECODE", "", "PREFILL", "", "")
    ]
    now = found.changes[0]
    for change in found.changes:
        cells = [change.name]
        for then, before in ((change.decode, now.decode), (change.prefill, now.prefill)):
            times = (
                f"× {then.tokens_s / before.tokens_s:.2f}" if then and before and change is not now else ""
            )
            cells += [_rate(then), times]
        changes.append((*cells, change.note))
    return [*lines, *_columns(changes, (1, 2, 3, 4))]


def _rate(found: Prediction | None) -> str:
    return "–" if found is None else f"{found.tokens_s:.3g}"


def _columns(rows: Sequence[Sequence[str]], right: Sequence[int]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            f"{cell:>{width}}" if column in right else f"{cell:<{width}}"
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def as_json(
    found: Plan, described: Description, spec: ModelSpec, dense_weights: DenseWeights
) -> dict[str, Any]:
    """The plan as data; "machine" is what `--machine` takes."""

    def one(prediction: Prediction | None) -> dict[str, Any] | None:
        if prediction is None:
            return None
        return {
            "tokens_s": prediction.tokens_s,
            "seconds": prediction.seconds,
            "limit": prediction.limit,
            "parts": prediction.parts,
        }

    return {
        "machine": as_said(described.machine, described.rates, spec),
        "dense_weights": dense_weights,
        "notes": list(described.notes),
        "fits": not found.problem,
        "problem": found.problem,
        "needs": [dataclasses.asdict(need) for need in found.needs],
        "placement": dataclasses.asdict(found.placement) if found.placement else None,
        "hit_rate": found.hit_rate,
        "on_card": found.on_card,
        "gpu": found.gpu,
        "card": dataclasses.asdict(found.card) if found.card else None,
        "predictions": [{"case": case.name, **(one(case.found) or {})} for case in found.cases],
        "changes": [
            {"change": c.name, "decode": one(c.decode), "prefill": one(c.prefill), "note": c.note}
            for c in found.changes
        ],
    }
