"""`python -m k2hybrid.server`, the same as `k2hybrid serve`: load a model, answer until a signal comes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from k2hybrid.config import RuntimeConfig
from k2hybrid.errors import K2Error
from k2hybrid.server.options import (
    Parser,
    add_model_options,
    add_server_options,
    add_session_options,
    fail,
    model_path,
    read_api_keys,
    runtime_options,
    session_options,
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Every option of `serve`."""
    add_model_options(parser)
    add_server_options(parser)
    add_session_options(parser)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse `argv` and serve; the exit code."""
    parser = Parser(prog="python -m k2hybrid.server", description="Serve a model through the OpenAI API.")
    add_options(parser)
    return serve(parser.parse_args(argv))


def serve(args: argparse.Namespace) -> int:
    """Serve as `args` say, until SIGINT or SIGTERM; the exit code. Failures end in one line.

    A second signal ends the process at once, with 130 or 143.
    """
    program = "k2hybrid serve"
    try:
        keys = read_api_keys(args.api_key_file)
        options = {"model": model_path(args), **runtime_options(args), **session_options(args)}
        RuntimeConfig.from_mapping(options)
        # Heavy imports only now, the heaviest last: wrong options or a taken port are told at once.
        from k2hybrid.checkpoint.hub import model_name
        from k2hybrid.server.process import bind, hosts_for, log_to_stderr, print_table, require_key, run

        require_key(args.host, keys, args.allow_no_key)
        hosts = hosts_for(args.host)
        with bind(args.host, args.port) as listener:
            if hosts is None and not keys:
                print(f"{program}: anyone who reaches {args.host} can use this", file=sys.stderr)
            log_to_stderr()
            from k2hybrid.runtime import load
            from k2hybrid.server.app import Settings, create_app
            from k2hybrid.server.live import LiveRuns

            with load(**options) as model:
                print_table(model.config.table())
                name = args.served_model_name or model_name(options["model"])
                settings = Settings(name, keys, hosts, tuple(args.allow_origin))
                live = LiveRuns()
                app = create_app(model, settings, live)
                run(app, listener, live, drain_s=args.drain, on_stopped=model.close)
    except (K2Error, OSError) as error:
        return fail(program, error)
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
