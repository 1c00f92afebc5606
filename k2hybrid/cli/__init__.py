"""The `k2hybrid` command: serve, chat, bench, mini-eval, pull, inspect, verify, synth, plan, sessions,
traces, doctor.

Each command's code, and what it needs, is imported when that command runs: `--help` answers at once.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Sequence
from pathlib import Path

from k2hybrid.cli.checkpoint_options import (
    add_inspect_options,
    add_pull_options,
    add_verify_options,
    asks_for_tools,
)
from k2hybrid.errors import K2Error
from k2hybrid.server.__main__ import add_options
from k2hybrid.server.options import USAGE, Parser, add_model_options, fail

_PROGRAM = "k2hybrid"
_COMMANDS = (
    "serve",
    "chat",
    "bench",
    "mini-eval",
    "pull",
    "inspect",
    "verify",
    "synth",
    "plan",
    "sessions",
    "traces",
    "doctor",
)
_WITH_OWN_OPTIONS = ("bench", "mini-eval")

# (option, type, what it sets); names as `k2hybrid.checkpoint.synth` knows them.
_SYNTH_SIZES: tuple[tuple[str, str], ...] = (
    ("layers", "layers in all"),
    ("dense-layers", "of them dense, at the beginning"),
    ("experts", "routed experts of a layer"),
    ("shared-experts", "shared experts of a layer"),
    ("top-k", "experts a token is sent to"),
    ("hidden", "width of the residual stream"),
    ("intermediate", "width of a dense layer's MLP"),
    ("moe-intermediate", "width of an expert"),
    ("heads", "attention heads"),
    ("q-lora", "rank of the query projection"),
    ("kv-lora", "rank of the latent"),
    ("nope", "width of a head's part without position"),
    ("rope", "width of a head's part with position"),
    ("v-head", "width of a head's value"),
    ("positions", "longest context"),
    ("vocab-size", "tokens, where the vocabulary is generated"),
)


def build_parser() -> Parser:
    """The parser of all commands."""
    parser = Parser(prog=_PROGRAM, description="Run Kimi-K2-Thinking and its relatives on one workstation.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=Parser)

    def command(name: str, summary: str) -> Parser:
        sub = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        sub.set_defaults(parser=sub)
        return sub

    serve = command("serve", "serve a model through the OpenAI API")
    add_options(serve)

    chat = command("chat", "talk to a model in the terminal")
    add_model_options(chat)
    _add_chat_options(chat)

    # Their options are their own: they parse them themselves.
    command("bench", "measure prefill and decode tokens/s and their share of the memory limit")
    command("mini-eval", "count how often the built-in model calls tools rightly, through the HTTP API")

    add_pull_options(command("pull", "download a model from a Hugging Face hub, or go on with that"))
    add_inspect_options(command("inspect", "show what a checkpoint holds, and what it lacks"))
    add_verify_options(command("verify", "check all of a checkpoint, or the tool calls of an endpoint"))

    synth = command("synth", "write a random checkpoint in the published layout")
    _add_synth_options(synth)

    from k2hybrid.cli.plan import add_plan_options

    add_plan_options(command("plan", "say what fits a machine, how fast it will be, and what would help"))

    from k2hybrid.cli.sessions import add_sessions_options

    add_sessions_options(command("sessions", "list or delete the sessions in a journal"))

    from k2hybrid.cli.traces import add_traces_options

    add_traces_options(command("traces", "show a routing trace, or simulate an expert cache with it"))

    from k2hybrid.cli.doctor import add_doctor_options

    add_doctor_options(command("doctor", "show what this machine offers, what slows it down, and the fixes"))
    return parser


def _add_chat_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("conversation")
    group.add_argument("-p", "--prompt", default=None, help="answer this and exit (-: read it from stdin)")
    group.add_argument("--system", default=None, help="system message (default: the chat template's)")
    group.add_argument(
        "--temperature", type=float, default=1.0, help="0: always the likeliest token (default: 1)"
    )
    group.add_argument("--top-p", type=float, default=1.0, help="draw from this share of the probability")
    group.add_argument("--seed", type=int, default=None, help="repeat the same draws")
    group.add_argument("--max-tokens", type=int, default=None, metavar="N", help="longest answer")
    group.add_argument(
        "--reasoning",
        choices=("auto", "show", "hide"),
        default="auto",
        help="auto: on a terminal only (default)",
    )


def _add_synth_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", type=Path, metavar="OUT", help="new or empty folder")
    parser.add_argument("--like", default="kimi-k2-thinking", metavar="NAME", help="preset to start from")
    for name, summary in _SYNTH_SIZES:
        parser.add_argument(f"--{name}", type=int, default=None, metavar="N", help=summary)
    parser.add_argument(
        "--vocab", type=Path, default=None, metavar="FILE", help="tiktoken file to use as it is"
    )
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same bytes (default: 0)")
    parser.add_argument(
        "--shard-gb", type=float, default=None, metavar="GB", help="largest file, in 10⁹ bytes"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command in `argv`; its exit code."""
    given = list(sys.argv[1:] if argv is None else argv)
    if given and (given[0] in _WITH_OWN_OPTIONS or (given[0] == "verify" and asks_for_tools(given[1:]))):
        return _with_own_options(given[0], given[1:])
    parser = build_parser()
    _check_command(parser, given)
    args = parser.parse_args(given)
    try:
        return _run(args)
    except (K2Error, OSError) as error:
        return fail(f"{_PROGRAM} {args.command}", error)
    except KeyboardInterrupt:
        return 130


def _check_command(parser: Parser, given: Sequence[str]) -> None:
    """An unknown command fails with the nearest valid name; argparse would list them all."""
    if given and not given[0].startswith("-") and given[0] not in _COMMANDS:
        near = difflib.get_close_matches(given[0], _COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(_COMMANDS)}"
        parser.exit(USAGE, f"{_PROGRAM}: unknown command {given[0]}; {hint}\n")


def _run(args: argparse.Namespace) -> int:
    match args.command:
        case "serve":
            from k2hybrid.server.__main__ import serve

            return serve(args)
        case "chat":
            from k2hybrid.cli.chat import chat

            return chat(args)
        case "synth":
            return _synth(args)
        case "plan":
            from k2hybrid.cli.plan import plan

            return plan(args)
        case "sessions":
            from k2hybrid.cli.sessions import sessions

            return sessions(args)
        case "traces":
            from k2hybrid.cli.traces import traces

            return traces(args)
        case "inspect":
            from k2hybrid.cli.inspect import inspect

            return inspect(args)
        case "verify":
            from k2hybrid.cli.verify import verify

            return verify(args)
        case "pull":
            from k2hybrid.cli.pull import pull

            return pull(args)
        case _:
            from k2hybrid.cli.doctor import doctor

            return doctor(args)


def _with_own_options(command: str, argv: Sequence[str]) -> int:
    try:
        if command == "bench":
            from k2hybrid.bench import main as run
        elif command == "verify":
            from k2hybrid.verify import main as run
        else:
            from k2hybrid.mini_eval.command import main as run

        return run(argv)
    except (K2Error, OSError) as error:
        return fail(f"{_PROGRAM} {command}", error)
    except KeyboardInterrupt:
        return 130


def _synth(args: argparse.Namespace) -> int:
    from k2hybrid.checkpoint.synth import SHARD_BYTES, synthesize

    sizes = {name.replace("-", "_"): getattr(args, name.replace("-", "_")) for name, _ in _SYNTH_SIZES}
    synthesize(
        args.out,
        args.like,
        {name: value for name, value in sizes.items() if value is not None},
        seed=args.seed,
        vocab=args.vocab,
        shard_bytes=SHARD_BYTES if args.shard_gb is None else int(args.shard_gb * 1e9),
        progress=sys.stderr.isatty(),
    )
    return 0


def print_rows(rows: Sequence[tuple[str, str]]) -> None:
    """Two columns, aligned."""
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")
