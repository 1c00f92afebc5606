"""Options of the commands about checkpoints: inspect, verify, pull. Imports nothing heavy."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

_MODEL = "checkpoint folder, or OWNER/NAME of a repository in the Hugging Face cache"


def add_inspect_options(parser: argparse.ArgumentParser) -> None:
    """Options of `inspect`."""
    parser.add_argument("model", type=Path, metavar="MODEL", help=_MODEL)
    parser.add_argument("--experts", action="store_true", help="list every routed expert as well")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all of it, experts included")


def add_verify_options(parser: argparse.ArgumentParser) -> None:
    """Options of `verify` where it checks a checkpoint; with `--tools` it has others."""
    parser.add_argument("model", nargs="?", type=Path, metavar="MODEL", help=_MODEL)
    parser.add_argument(
        "--deep",
        action="store_true",
        help="read every byte as well: checksums of files where they are known, and finite weights",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was found")
    parser.add_argument(
        "--tools",
        metavar="FILE",
        help="count the valid tool calls of an endpoint instead; see `k2hybrid verify --tools FILE --help`",
    )


def asks_for_tools(argv: Sequence[str]) -> bool:
    """Whether `verify` is to check the tool calls of an endpoint."""
    return any(word == "--tools" or word.startswith("--tools=") for word in argv)


def add_pull_options(parser: argparse.ArgumentParser) -> None:
    """Options of `pull`."""
    parser.add_argument("repo", metavar="REPO", help="repository, OWNER/NAME")
    parser.add_argument("--revision", metavar="R", help="branch, tag or commit (default: main)")
    parser.add_argument(
        "--dir", type=Path, metavar="DIR", help="folder to fill (default: the Hugging Face cache)"
    )
    parser.add_argument("--endpoint", metavar="URL", help="another hub than https://huggingface.co")
