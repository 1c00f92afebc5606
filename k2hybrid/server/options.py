"""Command-line options of a loaded model and of the server. Imports nothing heavy: `--help` must be quick."""

from __future__ import annotations

import argparse
import difflib
import os
import re
import sys
from pathlib import Path
from typing import Any, NoReturn

from k2hybrid.config import MINI_MODEL
from k2hybrid.errors import ConfigError

# Exit codes: 1, it could not be done; 2, the command line is wrong.
FAILED = 1
USAGE = 2
MAX_GB = 1 << 20  # more is a slip of the finger
MAX_DRAIN_S = 86400.0
_UNITS = {"": 1, "B": 1}
_UNITS |= {f"{letter}iB": 1 << (10 * power) for power, letter in enumerate("KMGT", 1)}
_UNITS |= {f"{letter}B": 1000**power for power, letter in enumerate("KMGT", 1)}


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaint about an unknown option names the nearest valid one."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # An abbreviation that works today would change its meaning with tomorrow's options.
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Like the base class; unknown options exit with code 2 and a hint."""
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            getattr(parsed, "parser", self).refuse(unknown[0])
        return parsed

    def refuse(self, argument: str) -> NoReturn:
        """Exit because of an argument nobody asked for."""
        name = argument.partition("=")[0]
        valid = [option for action in self._actions for option in action.option_strings]
        near = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]}?" if near else f"; see {self.prog} --help"
        kind = "option" if name.startswith("-") else "argument"
        self.error(f"unknown {kind} {name}{hint}")

    def error(self, message: str) -> NoReturn:
        """One line, no usage dump."""
        self.exit(USAGE, f"{self.prog}: {message}\n")


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Options that become a RuntimeConfig."""
    group = parser.add_argument_group("model")
    what = "checkpoint folder, or OWNER/NAME in the Hugging Face cache (default: the built-in model)"
    named = group.add_mutually_exclusive_group()
    named.add_argument("positional_model", nargs="?", type=Path, default=None, metavar="MODEL", help=what)
    named.add_argument("--model", type=Path, default=None, metavar="MODEL", help="the same as an option")
    group.add_argument(
        "--device", default=None, metavar="NAME",
        help="where all but the routed experts runs: cpu, cuda or cuda:N (default: cpu)",
    )  # fmt: skip
    group.add_argument(
        "--vram",
        type=size,
        default=None,
        metavar="SIZE",
        help="memory of the card to use (default: what is free)",
    )
    group.add_argument(
        "--hot-experts", type=size, default=None, metavar="SIZE",
        help="of it, for the most used experts; 0: none (default: what is left over)",
    )  # fmt: skip
    group.add_argument(
        "--dense-weights", choices=["bf16", "fp8", "int8"], default=None,
        help="of all but routed experts: bf16 as published (default), or half the bytes, made at each start",
    )  # fmt: skip
    group.add_argument(
        "--threads", type=int, default=None, metavar="N", help="CPU threads (default: all cores)"
    )
    group.add_argument(
        "--experts", choices=["native", "portable"], default=None,
        help="portable: routed experts through numba (pip install 'k2hybrid[portable]'), for other CPUs",
    )  # fmt: skip
    group.add_argument(
        "--expert-place", choices=["auto", "mapped", "resident", "streamed"], default=None,
        help="where routed experts lie (default: auto; `k2hybrid plan` says which that is, and why)",
    )  # fmt: skip
    group.add_argument(
        "--expert-ram", type=size, default=None, metavar="SIZE",
        help="RAM for routed experts, as 200GiB; what does not fit is read from disk as it is needed",
    )  # fmt: skip
    group.add_argument(
        "--expert-arena", type=Path, default=None, metavar="DIR",
        help="keep resident experts in files on hugetlbfs or in /dev/shm, ready at the next start",
    )  # fmt: skip
    group.add_argument(
        "--expert-reader", choices=["uring", "threads"], default=None, help="how experts are read from disk"
    )
    group.add_argument(
        "--trace", type=Path, default=None, metavar="FILE",
        help="record which experts are chosen, ids only, for `k2hybrid traces`",
    )  # fmt: skip
    group.add_argument("--isa", default=None, help="lower the instruction set used (see `k2hybrid doctor`)")
    group.add_argument(
        "--ctx", type=int, default=None, metavar="TOKENS", help="longest context (default: the model's)"
    )
    group.add_argument(
        "--latent-rows", choices=["bf16", "fp8"], default=None,
        help="how the KV cache is stored: fp8 takes 57 %% of the memory, and is less exact (default: bf16)",
    )  # fmt: skip
    group.add_argument("--latent-gb", type=float, default=None, metavar="GB", help="memory for the KV cache")
    group.add_argument(
        "--cache-ram", type=size, default=None, metavar="SIZE",
        help="RAM for what does not stay in the KV cache, as 32GiB; otherwise it is computed again",
    )  # fmt: skip
    group.add_argument(
        "--max-step-tokens", type=int, default=None, metavar="N", help="rows of one step at most"
    )
    group.add_argument(
        "--max-running", type=int, default=None, metavar="N", help="requests that decode together"
    )
    group.add_argument("--max-queue", type=int, default=None, metavar="N", help="requests that may wait")


def runtime_options(args: argparse.Namespace) -> dict[str, Any]:
    """The RuntimeConfig fields that were given; the others keep their defaults."""
    latent_bytes = None if args.latent_gb is None else _bytes("--latent-gb", args.latent_gb)
    given = {
        "device": args.device,
        "vram": args.vram,
        "hot_experts": args.hot_experts,
        "dense_weights": args.dense_weights,
        "threads": args.threads,
        "experts": args.experts,
        "expert_place": args.expert_place,
        "expert_ram": args.expert_ram,
        "expert_arena": args.expert_arena,
        "expert_reader": args.expert_reader,
        "trace": args.trace,
        "isa": args.isa,
        "context_tokens": args.ctx,
        "latent_rows": args.latent_rows,
        "latent_bytes": latent_bytes,
        "cache_ram": args.cache_ram,
        "max_step_tokens": args.max_step_tokens,
        "max_running": args.max_running,
        "max_queue": args.max_queue,
    }
    return {name: value for name, value in given.items() if value is not None}


def model_path(args: argparse.Namespace) -> Path:
    """The checkpoint folder asked for; CheckpointError if there is none, or only a part of one."""
    from k2hybrid.checkpoint.hub import find_model

    named = args.model if args.model is not None else args.positional_model
    return MINI_MODEL if named is None else find_model(named)


def add_server_options(parser: argparse.ArgumentParser) -> None:
    """Options of the HTTP side."""
    group = parser.add_argument_group("server")
    group.add_argument("--host", default="127.0.0.1", help="address to bind (default: %(default)s)")
    group.add_argument(
        "--port", type=_port, default=8000, help="port, 0: any free one (default: %(default)s)"
    )
    group.add_argument(
        "--api-key-file", type=Path, default=None, metavar="FILE", help="accepted keys, one a line"
    )
    group.add_argument(
        "--allow-no-key", action="store_true", help="serve beyond this machine without asking for a key"
    )
    group.add_argument(
        "--allow-origin",
        type=_origin,
        action="append",
        default=[],
        metavar="ORIGIN",
        help="let web pages of this origin use it, http://HOST:PORT or '*'; may be repeated",
    )
    group.add_argument("--served-model-name", default=None, metavar="NAME", help="name that clients see")
    group.add_argument(
        "--drain",
        type=_seconds,
        default=30.0,
        metavar="SECONDS",
        help="how long answers may go on after SIGTERM or Ctrl-C; a second one ends at once (default: 30)",
    )


def add_session_options(parser: argparse.ArgumentParser) -> None:
    """Options of what stays between requests, and after a restart."""
    group = parser.add_argument_group("sessions")
    where = group.add_mutually_exclusive_group()
    where.add_argument(
        "--journal",
        type=Path,
        default=None,
        metavar="DIR",
        help="folder for sessions, for its owner's eyes only (default: k2hybrid/journal in the user's cache)",
    )
    where.add_argument("--no-journal", action="store_true", help="keep sessions in memory alone")
    group.add_argument("--journal-gb", type=float, default=None, metavar="GB", help="disk for the journal")
    group.add_argument(
        "--journal-days",
        type=float,
        default=None,
        metavar="DAYS",
        help="delete what was not used for longer",
    )
    group.add_argument(
        "--lease",
        type=_seconds,
        default=None,
        metavar="SECONDS",
        help="keep latents so long for a client that runs a tool (default: 900)",
    )
    group.add_argument(
        "--request-limit",
        type=_seconds,
        default=None,
        metavar="SECONDS",
        help="end a request that takes longer (default: none)",
    )
    group.add_argument(
        "--no-idle-prefill", action="store_true", help="compute nothing ahead of the next turn while idle"
    )


def session_options(args: argparse.Namespace) -> dict[str, Any]:
    """The RuntimeConfig fields of `add_session_options`. The parents of a default journal are created."""
    given: dict[str, Any] = {
        "journal_bytes": None if args.journal_gb is None else _bytes("--journal-gb", args.journal_gb),
        "journal_days": args.journal_days,
        "lease_seconds": args.lease,
        "request_seconds": args.request_limit,
        "idle_prefill": False if args.no_idle_prefill else None,
    }
    if not args.no_journal:
        given["journal"] = args.journal or _default_journal()
    return {name: value for name, value in given.items() if value is not None}


def _default_journal() -> Path:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "k2hybrid"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"cannot create {folder} for the journal: {error.strerror}; use --journal DIR or --no-journal"
        ) from None
    return folder / "journal"


def _bytes(option: str, gb: float) -> int:
    if not 0 < gb <= MAX_GB:
        raise ConfigError(f"{option} must be above 0 and at most {MAX_GB}, not {gb:g}")
    return int(gb * (1 << 30))


def _port(text: str) -> int:
    if not (text.isascii() and text.isdigit()) or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port (0 to 65535)")
    return int(text)


def _origin(text: str) -> str:
    origin = text.strip().lower().rstrip("/")
    if origin not in ("*", "null") and not re.fullmatch(r"[a-z][a-z0-9+.\-]*://[^\s/?#]+", origin, re.ASCII):
        raise argparse.ArgumentTypeError(f"{text!r} is no origin (http://HOST:PORT, or * for any page)")
    return origin


def size(text: str) -> int:
    """Bytes, as `200GiB`, `1.5GB` or a plain number says."""
    number = re.fullmatch(r"(\d{1,15}(?:\.\d{1,6})?) ?([A-Za-z]*)", text, re.ASCII)
    if number is None or number[2] not in _UNITS or not 1 <= float(number[1]) * _UNITS[number[2]] < 1 << 60:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write bytes, or such as 1.5GiB or 200GB")
    return int(float(number[1]) * _UNITS[number[2]])


def _seconds(text: str) -> float:
    number = re.fullmatch(r"(\d+(?:\.\d+)?)s?", text, re.ASCII)
    if number is None or float(number[1]) > MAX_DRAIN_S:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds (0 to {MAX_DRAIN_S:g})")
    return float(number[1])


def read_api_keys(path: Path | None) -> tuple[str, ...]:
    """The keys in `path`: one a line, empty lines and `#` comments apart. ConfigError if there is none."""
    if path is None:
        return ()
    try:
        lines = path.read_text("ascii").splitlines()
    except OSError as error:
        raise ConfigError(f"cannot read the API key file {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"the API key file {path} holds more than ASCII text") from None
    keys = tuple(key for line in lines if (key := line.strip()) and not key.startswith("#"))
    if not keys:
        raise ConfigError(f"the API key file {path} holds no key; write one on a line of its own")
    return keys


def fail(program: str, error: Exception) -> int:
    """Say in one line why it could not be done, and give the exit code."""
    print(f"{program}: {error}", file=sys.stderr)
    return FAILED
