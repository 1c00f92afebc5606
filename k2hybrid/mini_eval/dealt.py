"""Frames of one side by the name of their list: the first ones and those that came later, dealt apart.

Dealt together, later frames would move earlier ones to another side, and what a trained model has read would
become what it is asked.
"""

from __future__ import annotations

from k2hybrid.mini_eval import frames, further_frames
from k2hybrid.mini_eval.domains import Domain
from k2hybrid.mini_eval.everyday_frames import MORE_FRAMES
from k2hybrid.mini_eval.split import Side, frames_of


def listed(side: Side, name: str) -> tuple[str, ...]:
    """This side's share of a list of `frames`, by its name there."""
    return frames_of(side, getattr(frames, name)) + frames_of(side, getattr(further_frames, f"MORE_{name}"))


def of_domain(side: Side, domain: Domain) -> tuple[str, ...]:
    """This side's share of the frames that ask for an everyday tool."""
    return frames_of(side, domain.frames) + frames_of(side, MORE_FRAMES[domain.names[0]])
