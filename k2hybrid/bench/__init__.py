"""Benchmarks that ship with the package: `k2hybrid bench`. Each figure comes with its share of the limit."""

from k2hybrid.bench.command import main

__all__ = ["main"]
