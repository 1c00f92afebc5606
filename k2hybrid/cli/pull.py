"""`k2hybrid pull`: download a model, with one bar, and the command that goes on where it was cut off."""

from __future__ import annotations

import argparse
import signal
import sys
from types import FrameType
from typing import NoReturn

from tqdm import tqdm

from k2hybrid.checkpoint.origin import Origin
from k2hybrid.checkpoint.pull import Pull


class Bar:
    """The bytes of all files together, with rate and remaining time."""

    def __init__(self) -> None:
        self._bar = tqdm(total=0, unit="B", unit_scale=True, desc="pull", smoothing=0.05)

    def expect(self, nbytes: int, present: int) -> None:
        """More to come."""
        self._bar.total += nbytes
        self._bar.initial += present  # came before: it says nothing about the rate
        self._bar.update(present)

    def add(self, nbytes: int) -> None:
        """Some came."""
        self._bar.update(nbytes)

    def close(self) -> None:
        """Leave the last state on screen."""
        self._bar.close()


def pull(args: argparse.Namespace) -> int:
    """Download as `args` say; the exit code. DownloadError."""
    origin = Origin(args.repo, args.revision, args.endpoint)
    bar = Bar() if sys.stderr.isatty() else None
    job = Pull(origin, args.dir, progress=bar)
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        folder = job.run()
    except KeyboardInterrupt:
        print(f"k2hybrid pull: interrupted; go on with: {job.command}", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
        if bar is not None:
            bar.close()
    print(folder)
    by_name = args.dir is None and args.revision is None
    print(f"serve it with: k2hybrid serve {args.repo if by_name else folder}", file=sys.stderr)
    return 0


def _interrupt(_number: int, _frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt
