"""`k2hybrid traces`: what a routing trace holds, and what share of it a bounded expert RAM would find."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from k2hybrid.errors import ConfigError
from k2hybrid.server.options import Parser, size

if TYPE_CHECKING:
    from k2hybrid.experts.simulate import Replay, Tickets
    from k2hybrid.experts.traces import Trace

HALF_LIFE = 8.0  # passes
SIZES = 12  # of a sweep, if none are named


def add_traces_options(parser: argparse.ArgumentParser) -> None:
    """`show` and `simulate`, each with its own options."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True, parser_class=Parser)
    show = actions.add_parser("show", help="what a trace holds: sizes, and how skewed and sticky it is")
    simulate = actions.add_parser("simulate", help="the share of experts found in RAM, by size and policy")
    for action in (show, simulate):
        action.set_defaults(parser=action)
        action.add_argument("file", type=Path, metavar="FILE", help="a trace")
        action.add_argument(
            "--decode", action="store_true", help="leave out hand-offs of more than one row, as of prefill"
        )
    sizes = simulate.add_mutually_exclusive_group()
    sizes.add_argument("--slots", type=_count, nargs="+", metavar="N", help="experts that RAM holds")
    sizes.add_argument("--ram", type=size, nargs="+", metavar="SIZE", help="RAM for experts, such as 200GiB")
    simulate.add_argument(
        "--expert-bytes", type=size, metavar="SIZE", help="of one expert, if not as in the trace"
    )
    simulate.add_argument(
        "--policy", nargs="+", metavar="NAME",
        help="of lru, lrfu, lrfu-ghost and min, which knows the future (default: all)",
    )  # fmt: skip
    simulate.add_argument(
        "--half-life", type=float, default=HALF_LIFE, metavar="PASSES", help="of a use in lrfu (default: 8)"
    )
    simulate.add_argument("--by-layer", action="store_true", help="show hits and misses of each layer too")
    simulate.add_argument("--json", type=Path, metavar="OUT", help="write the figures there")
    simulate.add_argument(
        "--plot", type=Path, metavar="OUT.svg", help="draw hit rate against RAM; needs matplotlib"
    )


def traces(args: argparse.Namespace) -> int:
    """Run the action in `args`."""
    from k2hybrid.experts.traces import read_trace

    trace = read_trace(args.file)
    if args.decode:
        trace = trace.select(trace.rows == 1)
    if not len(trace):
        raise ConfigError(f"{args.file} has no hand-offs{' of one row' if args.decode else ''}")
    return _show(trace) if args.action == "show" else _simulate(trace, args)


def _show(trace: Trace) -> int:
    from k2hybrid.cli import print_rows

    header, layers = trace.header, trace.moe_layers
    asked, top_tenth, again = _habits(trace)
    rows = [
        ("model", header.model),
        ("recorded by", header.created_by),
        ("experts", f"{header.experts} a layer, {header.top_k} of them a row"),
        ("expert size", f"{header.expert_bytes:,} bytes" if header.expert_bytes else "not known"),
        ("layers", f"{len(layers)} of {header.layers} ({layers[0]} to {layers[-1]})"),
        ("hand-offs", f"{len(trace):,}, {int((trace.rows == 1).sum()):,} of them with one row"),
        ("passes", f"{len(trace) / len(layers):,.1f}"),
        ("rows", f"{int(trace.rows.sum()):,}, {int(trace.rows.max()):,} at most at once"),
        ("experts asked for", f"{asked:,}, each once a hand-off"),
        ("most used tenth", f"{top_tenth:.1%} of what is asked for"),
        ("asked for again", f"{again:.1%} were asked for by the layer's last hand-off too"),
        ("predictions", f"{header.ahead} ids a row" if header.ahead else "none"),
        ("end", "closed" if trace.complete else "cut off"),
    ]
    print_rows(rows)
    return 0


def _habits(trace: Trace) -> tuple[int, float, float]:
    """Experts asked for; the share of each layer's most used tenth; the share that comes again at once."""
    import numpy as np

    header = trace.header
    uses = np.zeros((header.layers, header.experts), np.int64)
    last: dict[int, set[int]] = {}
    again = 0
    for ticket, layer in enumerate(trace.layer.tolist()):
        ids = set(trace.ids[trace.starts[ticket] : trace.starts[ticket + 1]].tolist()) - {-1}
        uses[layer, list(ids)] += 1
        again += len(ids & last.get(layer, set()))
        last[layer] = ids
    asked = int(uses.sum())
    tenth = np.sort(uses, axis=1)[:, -max(1, header.experts // 10) :].sum()
    return asked, float(tenth) / max(asked, 1), again / max(asked, 1)


def _simulate(trace: Trace, args: argparse.Namespace) -> int:
    from k2hybrid.experts.simulate import POLICIES, Tickets, sweep

    expert_bytes = args.expert_bytes or trace.header.expert_bytes
    tickets = Tickets.of(trace)
    sizes = _sizes(tickets, args, expert_bytes)
    replays = sweep(tickets, sizes, args.policy or POLICIES, args.half_life)
    for line in _table(replays, expert_bytes):
        print(line)
    if args.by_layer:
        for replay in replays:
            print(
                f"\n{replay.policy}, {replay.slots} slots\n{'layer':>6}{'hits':>12}{'misses':>12}{'found':>9}"
            )
            for layer, (hits, misses) in replay.by_layer().items():
                print(f"{layer:>6}{hits:>12,}{misses:>12,}{hits / max(hits + misses, 1):>9.2%}")
    if args.json:
        found = {
            "model": trace.header.model,
            "passes": len(trace) / tickets.moe_layers,
            "rows": rows_of(replays),
        }
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    if args.plot:
        from k2hybrid.cli.traces_plot import plot_hit_rates

        title = f"{trace.header.model}: {len(trace) / tickets.moe_layers:,.0f} passes"
        plot_hit_rates(replays, args.plot, title=title, expert_bytes=expert_bytes)
    return 0


def _sizes(tickets: Tickets, args: argparse.Namespace, expert_bytes: int) -> Sequence[int]:
    """Slots to try, ascending."""
    if args.slots:
        return sorted(set(args.slots))
    if args.ram:
        if not expert_bytes:
            raise ConfigError("the trace does not say how large an expert is; give --expert-bytes")
        return sorted({ram // expert_bytes for ram in args.ram})
    least, most = max(tickets.largest, 1), max(tickets.used, 1)
    return sorted({least + (most - least) * step // (SIZES - 1) for step in range(SIZES)})


def rows_of(replays: Sequence[Replay]) -> list[dict[str, Any]]:
    """The figures of replays, for JSON."""
    return [
        {
            "policy": replay.policy,
            "half_life": replay.half_life,
            "slots": replay.slots,
            "hits": replay.hits,
            "misses": replay.misses,
            "hit_rate": round(replay.hit_rate, 5),
        }
        for replay in replays
    ]


def _table(replays: Sequence[Replay], expert_bytes: int) -> list[str]:
    names = [name(replay) for replay in replays]
    columns = list(dict.fromkeys(names))
    rates = {(replay.slots, column): replay.hit_rate for replay, column in zip(replays, names, strict=True)}
    lines = [f"{'slots':>8}{'RAM':>12}" + "".join(f"{column:>24}" for column in columns)]
    for slots in dict.fromkeys(replay.slots for replay in replays):
        ram = _shown(slots * expert_bytes) if expert_bytes else "?"
        lines.append(f"{slots:>8}{ram:>12}" + "".join(f"{rates[slots, column]:>24.2%}" for column in columns))
    return lines


def _shown(size: int) -> str:
    unit, power = ("GiB", 30) if size >= 1 << 30 else ("MiB", 20)
    return f"{size / (1 << power):.2f} {unit}"


def name(replay: Replay) -> str:
    """Of the policy, with its half life."""
    return replay.policy if replay.half_life is None else f"{replay.policy}, {replay.half_life:g} passes"


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 1 <= int(text) < 1 << 31):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of slots")
    return int(text)
