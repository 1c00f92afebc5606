"""Checks that ship with the package: `k2hybrid verify`. Of tool calls, over HTTP, against any endpoint."""

from k2hybrid.verify.command import main

__all__ = ["main"]
