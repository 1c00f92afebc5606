"""Draws a training run's log: losses, held-out figures, gates and the learning rate's fall.

python -m tools.mini.curves .cache/mini/state.jsonl k2hybrid/mini/curves.svg
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt

_LABELS = {
    "repeat": "repeats: tokens", "look_up": "look-ups: whole", "first_tool": "one tool: calls",
    "few_tools": "1–3 tools: calls", "tools": "1–8 tools: calls",
    "talk": "talk: whole answers",
}  # fmt: skip
_FIGURE = {
    "repeat": "tokens",
    "look_up": "whole",
    "first_tool": "calls",
    "few_tools": "calls",
    "tools": "calls",
    "talk": "whole",
}


def draw(lines: list[dict[str, Any]], out: Path) -> None:
    """Write the picture: the loss above, the shares right on the dev side below, over millions of tokens."""
    train = [line for line in lines if line["event"] == "train"]
    dev = [line for line in lines if line["event"] == "dev"]
    gates = [line for line in lines if line["event"] in ("gate", "patience")]
    figure, (upper, lower) = plt.subplots(2, 1, figsize=(8, 6.5), sharex=True, layout="constrained")
    upper.plot(_millions(train), [line["loss"] for line in train], color="0.3", linewidth=1)
    upper.set_yscale("log")
    upper.set_ylabel("training loss, nats a learnt token")
    for kind, label in _LABELS.items():
        lower.plot(
            _millions(dev), [100 * line[kind][_FIGURE[kind]] for line in dev], label=label, linewidth=1.4
        )
    lower.set_ylabel("right under greedy decoding, % (dev side)")
    lower.set_xlabel("million tokens")
    lower.set_ylim(0, 101)
    lower.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    for gate in gates:
        for axes in (upper, lower):
            axes.axvline(gate["tokens"] / 1e6, color="tab:red", linestyle=":", linewidth=1)
        label = f"{gate['event']}: {gate['passed']}"
        upper.annotate(label, (gate["tokens"] / 1e6, upper.get_ylim()[1]), rotation=90, va="top", ha="right",
                       fontsize=8, color="tab:red")  # fmt: skip
    mpl.rcParams["svg.hashsalt"] = "k2hybrid"  # the same log gives the same bytes
    figure.savefig(out, metadata={"Date": None})


def _millions(lines: list[dict[str, Any]]) -> list[float]:
    return [line["tokens"] / 1e6 for line in lines]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("log", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    draw([json.loads(line) for line in args.log.read_text(encoding="utf-8").splitlines()], args.out)


if __name__ == "__main__":
    main()
