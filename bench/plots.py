"""The pictures of the benches; the same rows give the same bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, ScalarFormatter

from k2hybrid.bench.report import Row
from k2hybrid.cli.traces_plot import draw_hit_rates

if TYPE_CHECKING:
    from k2hybrid.experts.simulate import Replay

_COLOURS = {"memory": "tab:blue", "compute": "tab:orange"}


def plot_kernel(found: Mapping[str, Any], rows: Sequence[Row], out: Path) -> None:
    """Shares of the limit by case with their bars; for a sweep, tokens/s over tokens."""
    if all(row["case"].startswith("sweep-") for row in rows):
        figure, (upper, lower) = plt.subplots(2, 1, figsize=(8, 7), sharex=True, layout="constrained")
        tokens = [row["tokens"] for row in rows]
        upper.plot(tokens, [row["tokens_s"] for row in rows], marker=".", linewidth=1)
        upper.set_xscale("log", base=2)
        upper.xaxis.set_major_formatter(ScalarFormatter())
        upper.set_ylabel(f"tokens/s, one layer of {rows[0]['experts']} experts")
        lower.plot(tokens, [100 * row["share_of_limit"] for row in rows], marker=".", linewidth=1)
        lower.set_ylabel("share of the limit, %")
        lower.set_xlabel("tokens")
        lower.set_ylim(0, 101)
        upper.set_ylim(bottom=0)
        for axes in (upper, lower):
            axes.grid(alpha=0.3)
    else:
        figure, axes = plt.subplots(figsize=(8, 1 + 0.3 * len(rows)), layout="constrained")
        for at, row in enumerate(rows):
            axes.barh(at, 100 * row["share_of_limit"], color=_COLOURS[row["limit"]], height=0.7)
            if row["bar"] is not None:
                axes.plot([100 * row["bar"]] * 2, [at - 0.45, at + 0.45], color="black", linewidth=2)
        axes.set_yticks(range(len(rows)), [row["case"] for row in rows])
        axes.invert_yaxis()
        axes.set_xlim(0, 101)
        axes.set_xlabel("share of the limit, % (blue: bandwidth, orange: arithmetic; black: what is asked)")
    figure.suptitle(
        f"{found['cpu']}, {found['threads']} threads, {found['isa']}, {found['memory']}: "
        f"{found['read_bandwidth_gb_s']} GB/s, {found['peak_gflop_s']} GFLOP/s",
        fontsize=9,
    )
    _save(figure, out)


def plot_bandwidth(found: Mapping[str, Any], rows: Sequence[Row], out: Path) -> None:
    """GB/s over threads, a picture a kind of memory and a line a variant; the peaks beside them."""
    reads = [row for row in rows if "gb_s" in row]
    kinds = list(dict.fromkeys(row["memory"] for row in reads))
    figure, ((*left, right),) = plt.subplots(
        1, len(kinds) + 1, figsize=(3.5 * len(kinds) + 3.5, 6), layout="constrained", squeeze=False
    )
    for axes, kind in zip(left, kinds, strict=True):
        _lines(axes, [row for row in reads if row["memory"] == kind], "gb_s")
        axes.set_title(f"{kind}, GB/s", fontsize=9)
    _lines(right, [row for row in rows if "gop_s" in row], "gop_s")
    right.set_title("peaks, 10⁹ operations/s", fontsize=9)
    right.legend(fontsize=8)
    if left:
        handles, labels = left[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=7)
    figure.suptitle(f"{found['cpu']}, {found['isa']}", fontsize=9)
    _save(figure, out)


def plot_expert_cache(pictures: Sequence[tuple[str, Sequence[Replay], int]], out: Path) -> None:
    """Hit rate against RAM, a picture a trace: its name, the replays, bytes of an expert."""
    columns = min(3, len(pictures))
    lines = -(-len(pictures) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(4.2 * columns, 3.6 * lines), layout="constrained", squeeze=False
    )
    for at in range(lines * columns):
        picture = axes[at // columns][at % columns]
        if at >= len(pictures):
            picture.set_axis_off()
            continue
        name, replays, expert_bytes = pictures[at]
        draw_hit_rates(picture, replays, expert_bytes)
        picture.set_title(name, fontsize=9)
    axes[0][0].legend(fontsize=7, loc="lower right")
    _save(figure, out)


def _lines(axes: Any, rows: Sequence[Row], field: str) -> None:
    """A colour for each way of reading, a dash for each distance of prefetch."""
    colours: dict[str, str] = {}
    dashes: dict[str, str] = {}
    for case in dict.fromkeys(row["case"] for row in rows):
        way, _, ahead = case.partition(", prefetch ")
        line = [row for row in rows if row["case"] == case]
        axes.plot(
            [row["threads"] for row in line],
            [row[field] for row in line],
            color=colours.setdefault(way, f"C{len(colours)}"),
            linestyle=dashes.setdefault(ahead, ("-", "--", "-.", ":")[len(dashes) % 4]),
            marker=".",
            linewidth=1,
            label=case,
        )
    axes.set_xlabel("threads")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)


def _save(figure: Figure, out: Path) -> None:
    mpl.rcParams["svg.hashsalt"] = "k2hybrid"
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, metadata={"Date": None})
    plt.close(figure)
