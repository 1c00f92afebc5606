"""Who sees what: words, values and frames are dealt to train, dev and test by hash before anything else."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Literal

Side = Literal["train", "dev", "test"]


def _hash(kind: str, text: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{kind}:{text}".encode()).digest()[:4], "big")


def side_of(kind: str, text: str) -> Side:
    """A tenth of all words and values is for testing, a tenth for watching, the rest for learning."""
    bucket = _hash(kind, text) % 10
    return "test" if bucket == 0 else "dev" if bucket == 1 else "train"


def frames_of(side: Side, frames: Sequence[str]) -> tuple[str, ...]:
    """This side's share of a list of frames: at least a fifth is for testing only, at least one each.

    Dealt within each list, in the order of the frames' hashes, so that every list has frames on every side.
    Lists of fewer than five frames are not worth a split: they go to training, the other sides do without.
    """
    ordered = sorted(dict.fromkeys(frames), key=lambda frame: _hash("frame", frame))
    n = len(ordered)
    if n < 5:
        return tuple(ordered) if side == "train" else ()
    n_test, n_dev = -(-n // 5), max(1, n // 12)
    return tuple(
        {"test": ordered[:n_test], "dev": ordered[n_test : n_test + n_dev]}.get(
            side, ordered[n_test + n_dev :]
        )
    )
