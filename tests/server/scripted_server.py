"""`python -m tests.server.scripted_server`: a server process that starts at once and ends answers when told.

It prints "asked" for every answer that begins; SIGUSR1 lets all of them finish.
"""

from __future__ import annotations

import argparse
import signal
import time
from collections.abc import Iterator

from k2hybrid.server.app import create_app
from k2hybrid.server.live import LiveRuns
from k2hybrid.server.options import add_server_options
from k2hybrid.server.process import bind, run
from k2hybrid.types import ChatRequest, Content
from tests.server.scripted import Script, ScriptedModel, ScriptedRun, Step


class Model(ScriptedModel):
    def chat(self, request: ChatRequest) -> ScriptedRun:
        self.play_next(Script(self.steps()))
        answer = super().chat(request)
        print("asked", flush=True)
        return answer

    def steps(self) -> Iterator[Step]:
        while not self.told:
            yield Step((Content("x"),), delay_s=0.05)

    told = False

    def tell(self, *_: object) -> None:
        self.told = True


def main() -> None:
    parser = argparse.ArgumentParser()
    add_server_options(parser)
    parser.add_argument("--stop-s", type=float, default=0.0)
    args = parser.parse_args()

    def on_stopped() -> None:
        print("stopping", flush=True)
        time.sleep(args.stop_s)
        print("stopped", flush=True)

    model = Model()
    signal.signal(signal.SIGUSR1, model.tell)
    live = LiveRuns()
    with bind(args.host, args.port) as listener:
        run(create_app(model, live=live), listener, live, drain_s=args.drain, on_stopped=on_stopped)


if __name__ == "__main__":
    main()
