"""The picture of a simulated expert cache: hit rate against RAM, a line a policy."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from k2hybrid.cli.traces import name
from k2hybrid.errors import ConfigError

if TYPE_CHECKING:
    from k2hybrid.experts.simulate import PolicyName, Replay

_STYLES: dict[PolicyName, tuple[str, str]] = {
    "min": ("black", "--"),
    "lru": ("tab:blue", "-"),
    "lrfu": ("tab:orange", "-"),
    "lrfu-ghost": ("tab:green", "-."),
}


def plot_hit_rates(replays: Sequence[Replay], out: Path, *, title: str, expert_bytes: int = 0) -> None:
    """Write the picture; its kind is that of the name's ending. The same figures give the same bytes.

    Raises:
        ConfigError: matplotlib is not installed, or knows no such ending.
    """
    try:
        figures: Any = importlib.import_module("matplotlib.figure")
        settings: Any = importlib.import_module("matplotlib").rc_context
    except ImportError as error:
        raise ConfigError(
            f"--plot needs matplotlib, which cannot be imported ({error}); pip install matplotlib"
        ) from None
    figure = figures.Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    draw_hit_rates(axes, replays, expert_bytes)
    axes.set_title(title, fontsize=10, parse_math=False)
    axes.legend(fontsize=8, loc="lower right")
    try:
        with settings({"svg.hashsalt": "k2hybrid"}):
            figure.savefig(out, metadata={"Date": None} if out.suffix == ".svg" else None)
    except ValueError as error:
        raise ConfigError(f"{out} cannot be drawn: {error}") from None


def draw_hit_rates(axes: Any, replays: Sequence[Replay], expert_bytes: int) -> None:
    """The lines, on axes of matplotlib."""
    unit, scale = "slots", 1.0
    if expert_bytes:
        most = expert_bytes * max(replay.slots for replay in replays)
        unit, power = ("GiB", 30) if most >= 1 << 30 else ("MiB", 20) if most >= 1 << 20 else ("KiB", 10)
        scale = expert_bytes / (1 << power)
    for label in dict.fromkeys(map(name, replays)):
        line = [replay for replay in replays if name(replay) == label]
        colour, dash = _STYLES[line[0].policy]
        axes.plot(
            [replay.slots * scale for replay in line],
            [100 * replay.hit_rate for replay in line],
            color=colour,
            linestyle=dash,
            marker=".",
            linewidth=1.2,
            label=label,
        )
    axes.set_xlabel(f"RAM for experts, {unit}" if expert_bytes else "slots, one expert each")
    axes.set_ylabel("experts found in RAM, %")
    axes.set_xlim(left=0)
    axes.set_ylim(0, 101)
    axes.grid(alpha=0.3)
    if not expert_bytes:
        return
    top = axes.secondary_xaxis("top", functions=(lambda x: x / scale, lambda x: x * scale))
    top.tick_params(labelsize=8)
    top.set_xlabel("slots, one expert each", fontsize=8)
