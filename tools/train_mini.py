"""Train the built-in model and export it in the published checkpoint layout.

    python -m tools.train_mini vocab  --published-vocab TIKTOKEN_MODEL --out k2hybrid/mini
    python -m tools.train_mini train  --published-vocab TIKTOKEN_MODEL --out k2hybrid/mini
    python -m tools.train_mini export --out k2hybrid/mini
    k2hybrid mini-eval

TIKTOKEN_MODEL is the published vocabulary file, which only lends its words. `train` resumes where `--state`
exists, saves there every five minutes and on SIGTERM, and writes its log as JSON lines beside it
(`tools/mini/curves.py` draws them). The curriculum (`data.STAGES`) has gates: copy drills until nearly every
token of unseen sequences is copied; one tool with one parameter until held-out calls are right; up to three
tools; then the full mix. Steps of `--batch` tokens; Muon and AdamW, the rate held, then falling linearly to
zero; INT4 fake quantization of the routed experts from the first step on. `export` doubles the logits
(`export.SHARPNESS`). Sums of other threads and other CPUs round differently: a run elsewhere gives its like,
not its bits.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import signal
import sys
import time
from pathlib import Path

# The matrix library compiles one kernel per shape and keeps as many as this.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "8192")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F

from k2hybrid.mini_eval.words import published_words
from tools.mini import build_vocab, export, vocab
from tools.mini.crew import Crew
from tools.mini.data import STAGES, Lessons
from tools.mini.guidance import Guidance
from tools.mini.model import MiniConfig, MiniModel
from tools.mini.optim import make_optimizers
from tools.mini.packing import IGNORED, Packer
from tools.mini.probe import Figures, probe
from tools.mini.start import start_near_copying

WARMUP_STEPS = 50
# Looked at and exported are weights averaged over about so many steps, which lack the noise of the last ones.
AVERAGE_STEPS = 60
DECAY_SHARE = 0.8
SAVE_SECONDS = 300
LOG_EVERY = 20
# Stage → (kind of held-out lesson, figure, value that opens the next stage).
GATES = {
    "drills": ("repeat", "tokens", 0.98),
    "one tool": ("first_tool", "calls", 0.90),
    "few tools": ("few_tools", "calls", 0.80),
}
# Copying is found at a high rate; what comes after is learnt better below it.
CALM = 0.7
# What looking elsewhere than guided weighs beside the loss of the tokens.
GUIDED = 1.0
# Stages in which copies are to be said right behind the heads that copy: what is deeper finds them late.
SAID_EARLY = ("drills", "one tool")
# After them the heads are told everything in every so many steps only, what is hard in each.
REMIND_EVERY = 4
HARD_KINDS = ("copy", "evidence", "value")
# A stage that has not reached its gate after this share of all tokens is left, and the log says so.
PATIENCE = 0.08


def learning_rate(peak: float, step: int, tokens: int, total: float) -> float:
    """Warm up, hold, then fall linearly to zero over the last `DECAY_SHARE` of the tokens."""
    return peak * min(1.0, (step + 1) / WARMUP_STEPS) * min(1.0, max(0.0, 1 - tokens / total) / DECAY_SHARE)


@torch.no_grad()
def follow(average: MiniModel, model: MiniModel, step: int) -> None:
    """Move the averaged weights towards the model's; the correction bias, which is no average, is copied."""
    share = max(1 / AVERAGE_STEPS, 1 / (step + 1))
    for mean, now in zip(average.parameters(), model.parameters(), strict=True):
        mean.lerp_(now, share)
    for held, new in zip(average.buffers(), model.buffers(), strict=True):
        held.copy_(new)


class Trainer:
    """Model, optimizers, data and counters: all that a resumed run needs."""

    def __init__(self, args: argparse.Namespace, crew: Crew) -> None:
        torch.manual_seed(args.seed)
        self.args, self.crew = args, crew
        self.encoding = vocab.load_encoding(args.out / "tiktoken.model")
        self.pad_id = self.encoding.n_vocab - 1
        self.words = published_words(args.published_vocab)
        self.model = MiniModel(MiniConfig(vocab_size=self.encoding.n_vocab))
        if args.start_from is None:
            start_near_copying(self.model)
        else:
            exported = export.read(args.start_from, self.model.config)
            self.model.load_state_dict(export.sharpened(exported, 1 / export.SHARPNESS))
        self.average = copy.deepcopy(self.model)
        self.optimizers = make_optimizers(self.model, args.lr)
        self.lessons = Lessons(self.encoding, self.words, args.seed * 1000 + crew.rank)
        self.stage = list(STAGES)[0 if args.start_from is None else -1]
        self.packer = Packer(
            lambda: self.lessons.draw(STAGES[self.stage]), self.pad_id, args.batch // crew.size
        )
        self.step = 0
        self.tokens = self.stage_began = 0
        self.learnt = 0
        self.looked: dict[str, float] = {}
        self.seconds = 0.0
        self.asked_to_end = self.stopping = False

    def stop(self, *_: object) -> None:
        """End at the next line of the log, saving the state (a signal handler)."""
        self.asked_to_end = True

    def save(self) -> None:
        self.args.state.parent.mkdir(parents=True, exist_ok=True)
        data = {"random": self.lessons.rng.getstate(), "waiting": self.packer.waiting}
        _write(data, self._data_path)
        if not self.crew.leads:
            return
        state = {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
            "stage": self.stage,
            "counters": (self.step, self.tokens, self.stage_began, self.learnt, self.seconds),
        }
        _write(state, self.args.state)

    @property
    def _data_path(self) -> Path:
        path: Path = self.args.state
        return path.with_suffix(f".data{self.crew.rank}")

    def load(self) -> None:
        state = torch.load(self.args.state, weights_only=False)
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        data = torch.load(self._data_path, weights_only=False)
        self.lessons.rng.setstate(data["random"])
        self.packer.waiting = data["waiting"]
        self.stage = state["stage"]
        self.step, self.tokens, self.stage_began, self.learnt, self.seconds = state["counters"]

    def train_step(self) -> tuple[float, float]:
        """One optimizer step; returns the mean loss and the heaviest expert load over the mean."""
        peak = self.args.lr * (1.0 if self.stage == next(iter(STAGES)) else CALM)
        lr = learning_rate(peak, self.step, self.tokens, self.args.tokens)
        batch = self.packer.next()
        early = self.stage in SAID_EARLY
        everything = early or self.step % REMIND_EVERY == 0
        guidance = Guidance(says=early, kinds=None if everything else HARD_KINDS)
        logits = self.model(batch, guidance).float()
        loss = F.cross_entropy(logits, batch.labels, ignore_index=IGNORED)
        (loss + GUIDED * guidance.loss()).backward()  # type: ignore[no-untyped-call]
        self.looked |= guidance.means()
        self.crew.mean(p.grad for p in self.model.parameters() if p.grad is not None)
        self.crew.mean(layer.load for layer in self.model.moe_layers)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * group.get("share", 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        heaviest = max(layer.balance(2e-3 * lr / self.args.lr) for layer in self.model.moe_layers)
        self.step += 1
        follow(self.average, self.model, self.step)
        self.tokens += self.args.batch
        self.learnt += batch.n_learnt
        return float(loss.detach()), heaviest

    def figures(self) -> dict[str, Figures]:
        """Figures of the averaged weights, on the same lessons of the dev side every time."""
        return probe(self.average, Lessons(self.encoding, self.words, seed=7, side="dev"), self.pad_id)

    def run(self) -> None:
        """Train until `--tokens`, `--minutes` or a signal."""
        began = saved = lap = time.monotonic()
        tokens_then, losses = self.tokens, list[float]()
        while self.tokens < self.args.tokens and not self.stopping:
            loss, heaviest = self.train_step()
            losses.append(loss)
            if self.step % LOG_EVERY:
                continue
            now = time.monotonic()
            self.log("train", loss=sum(losses) / len(losses), load=heaviest, guided=self.looked,
                     tokens_per_second=(self.tokens - tokens_then) / (now - lap))  # fmt: skip
            self.seconds += now - lap
            losses = []
            if self.step % self.args.probe_every == 0:
                self.look()
            if self.crew.told(now - saved > SAVE_SECONDS):
                self.save()
                saved = now
            ending = self.asked_to_end or now - began > self.args.minutes * 60
            self.stopping = bool(self.crew.told(ending))
            lap, tokens_then = time.monotonic(), self.tokens
        self.save()
        self.log("stopped" if self.stopping else "done")

    def look(self) -> None:
        """Look at the dev side, and go on to the next stage if its gate is passed."""
        if self.crew.leads:
            figures = self.figures()
            self.log("dev", **{kind: figure.as_dict() for kind, figure in figures.items()})
            self.pass_gate(figures)
        stages = list(STAGES)
        self.stage = stages[self.crew.told(stages.index(self.stage))]

    def pass_gate(self, figures: dict[str, Figures]) -> None:
        """Go on to the next stage once this one's figure is reached."""
        if self.stage not in GATES:
            return
        kind, name, bar = GATES[self.stage]
        reached = figures[kind].as_dict()[name]
        late = self.tokens - self.stage_began > PATIENCE * self.args.tokens
        if reached >= bar or late:
            stages = list(STAGES)
            following = stages[stages.index(self.stage) + 1]
            self.log(
                "gate" if reached >= bar else "patience",
                passed=self.stage, figure=f"{kind} {name}", reached=reached, bar=bar, next=following,
            )  # fmt: skip
            self.stage, self.stage_began = following, self.tokens

    def log(self, event: str, **values: object) -> None:
        """One JSON line to the terminal and to the run's log."""
        if not self.crew.leads:
            return
        line = {
            "time": time.strftime("%H:%M:%S"), "step": self.step, "tokens": self.tokens,
            "learnt": self.learnt, "stage": self.stage, "seconds": round(self.seconds),
            "event": event, **values,
        }  # fmt: skip
        text = json.dumps(line)
        print(text, flush=True)
        self.args.state.parent.mkdir(parents=True, exist_ok=True)
        with self.args.state.with_suffix(".jsonl").open("a", encoding="utf-8") as file:
            file.write(text + "\n")


def _write(state: object, path: Path) -> None:
    partial = path.with_suffix(f"{path.suffix}.partial")
    torch.save(state, partial)
    partial.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["vocab", "train", "export"])
    parser.add_argument("--published-vocab", type=Path, help="tiktoken.model of moonshotai/Kimi-K2-Thinking")
    parser.add_argument("--out", type=Path, default=Path("k2hybrid/mini"))
    parser.add_argument("--state", type=Path, default=Path(".cache/mini/state.pt"))
    parser.add_argument(
        "--start-from", type=Path, metavar="DIR",
        help="begin with the weights of an exported checkpoint, and with the full mix",
    )  # fmt: skip
    parser.add_argument("--tokens", type=float, default=32e6, help="tokens to train on, padding included")
    parser.add_argument(
        "--minutes", type=float, default=1e9, help="stop earlier after so many, to be resumed"
    )
    parser.add_argument("--batch", type=int, default=8192, help="tokens in a step, of all workers")
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument(
        "--probe-every", type=int, default=200, help="steps between two looks at the dev side"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1, help="threads of a process")
    parser.add_argument("--workers", type=int, default=2, help="processes that train together, a core each")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.command in ("vocab", "train") and args.published_vocab is None:
        parser.error(f"{args.command} needs --published-vocab")
    if args.command == "vocab":
        build_vocab.write(published_words(args.published_vocab), args.out)
        return
    if args.command == "export":
        n_vocab = vocab.load_encoding(args.out / "tiktoken.model").n_vocab
        state = torch.load(args.state, weights_only=False)["average"]
        export.export(export.sharpened(state), MiniConfig(vocab_size=n_vocab), args.out)
        return
    trainer = Trainer(args, Crew.start(args.workers))
    if args.state.exists():
        trainer.load()
        trainer.log("resumed")
    if trainer.crew.leads:
        signal.signal(signal.SIGTERM, trainer.stop)
    trainer.run()


if __name__ == "__main__":
    main()
