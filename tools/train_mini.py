"""Train the built-in model on a CPU and export it in the published checkpoint layout.

    python -m tools.train_mini vocab  --published-vocab TIKTOKEN_MODEL --out k2hybrid/mini
    python -m tools.train_mini train  --published-vocab TIKTOKEN_MODEL --out k2hybrid/mini
    python -m tools.train_mini export --out k2hybrid/mini
    python -m tools.mini.evaluate --checkpoint k2hybrid/mini --published-vocab TIKTOKEN_MODEL

TIKTOKEN_MODEL is the published vocabulary file, which only lends its words. `train` resumes where
`--state` exists and saves there every three minutes and on SIGTERM. The recipe: copy drills (see
`data.EARLY`) until repeats are copied, then the full mix (`data.LATE`) of tool conversations, decimals,
small talk and a few drills; a tenth of all words, values and number pairs is held out by hash. Steps of
4096 tokens; Muon and AdamW from 6e-3 linearly to zero; INT4 fake quantization of the routed experts from
the first step on. The shipped checkpoint is this recipe's: 15.5 M tokens from seed 1 in one run,
`train --published-vocab tests/golden/tiktoken.model --threads 2`, half an hour on two shared cores. Sums of
two threads and of other CPUs round differently, so that a run elsewhere gives its like, not its bits.
"""

from __future__ import annotations

import argparse
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

from tools.mini import build_vocab, export, vocab
from tools.mini.data import EARLY, LATE, Examples
from tools.mini.model import MiniConfig, MiniModel
from tools.mini.optim import make_optimizers
from tools.mini.packing import IGNORED, Packer
from tools.mini.probe import probe
from tools.mini.start import start_near_copying
from tools.mini.words import published_words

BATCH_TOKENS = 4096
WARMUP_STEPS = 50
DECAY_SHARE = 1.0
# Matching one token back reaches about 0.66 on these drills, matching all that fits 0.99.
COPY_GATE = 0.85


def learning_rate(peak: float, step: int, tokens: int, total: int) -> float:
    """Warm up, then fall linearly to zero over the last `DECAY_SHARE` of the tokens (1: all of them)."""
    warm = min(1.0, (step + 1) / WARMUP_STEPS)
    return peak * warm * min(1.0, max(0.0, (1 - tokens / total) / DECAY_SHARE))


class Trainer:
    """Model, optimizers, data and counters: all that a resumed run needs."""

    def __init__(self, args: argparse.Namespace) -> None:
        torch.manual_seed(args.seed)
        self.args = args
        self.encoding = vocab.load_encoding(args.out / "tiktoken.model")
        self.pad_id = self.encoding.n_vocab - 1
        self.words = published_words(args.published_vocab)
        self.model = MiniModel(MiniConfig(vocab_size=self.encoding.n_vocab))
        start_near_copying(self.model)
        self.optimizers = make_optimizers(self.model, args.lr)
        self.examples = Examples(self.encoding, self.words, args.seed)
        self.shares = EARLY
        self.packer = Packer(lambda: self.examples.draw(self.shares), self.pad_id, BATCH_TOKENS)
        self.step = 0
        self.tokens = 0
        self.stopping = False

    def stop(self, *_: object) -> None:
        """End after the running step, saving the state (a signal handler)."""
        self.stopping = True

    def save(self) -> None:
        self.args.state.parent.mkdir(parents=True, exist_ok=True)
        state = {
            "model": self.model.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
            "random": self.examples.rng.getstate(),
            "waiting": self.packer.waiting,
            "late": self.shares is LATE,
            "step": self.step,
            "tokens": self.tokens,
        }
        partial = self.args.state.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(self.args.state)

    def load(self) -> None:
        state = torch.load(self.args.state, weights_only=False)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.examples.rng.setstate(state["random"])
        self.packer.waiting = state["waiting"]
        self.shares = LATE if state["late"] else EARLY
        self.step, self.tokens = state["step"], state["tokens"]

    def train_step(self) -> tuple[float, float]:
        """One optimizer step over `--micro` batches; returns the mean loss and the heaviest expert load."""
        lr = learning_rate(self.args.lr, self.step, self.tokens, self.args.tokens)
        batches = [self.packer.next() for _ in range(self.args.micro)]
        learnt = sum(batch.n_learnt for batch in batches)
        total = 0.0
        for batch in batches:
            logits = self.model(batch.ids, batch.lengths, batch.wanted).float()
            loss = F.cross_entropy(logits, batch.labels, ignore_index=IGNORED, reduction="sum") / learnt
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * group.get("share", 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        heaviest = max(layer.balance(2e-3 * lr / self.args.lr) for layer in self.model.moe_layers)
        self.step += 1
        self.tokens += BATCH_TOKENS * len(batches)
        return total, heaviest

    def figures(self) -> dict[str, tuple[float, float, float]]:
        """Held-out figures, always on the same examples."""
        return probe(self.model, Examples(self.encoding, self.words, seed=7, held_out=True), self.pad_id)

    def run(self) -> None:
        started, tokens_then, losses = time.monotonic(), self.tokens, []
        saved = time.monotonic()
        while self.tokens < self.args.tokens and not self.stopping:
            loss, heaviest = self.train_step()
            losses.append(loss)
            if self.step % 20 == 0:
                rate = (self.tokens - tokens_then) / (time.monotonic() - started)
                self.log(f"loss {sum(losses) / len(losses):.4f}  {rate:.0f} tok/s  load {heaviest:.2f}")
                started, tokens_then, losses = time.monotonic(), self.tokens, []
            if self.step % self.args.probe_every == 0:
                figures = self.figures()
                self.log(
                    "held out "
                    + "  ".join(f"{k} {a:.3f}/{n:.2f}/{p:.3f}" for k, (a, n, p) in figures.items())
                )
                if self.shares is EARLY and figures["repeat"][0] >= COPY_GATE:
                    self.log(f"gate: repeats copied at {figures['repeat'][0]:.3f}; the full mix from here on")
                    self.shares = LATE
                started, tokens_then = time.monotonic(), self.tokens
            if time.monotonic() - saved > 180:
                self.save()
                saved = time.monotonic()
        self.save()
        self.log("stopped" if self.stopping else "done")

    def log(self, text: str) -> None:
        line = f"{time.strftime('%H:%M:%S')} step {self.step} tokens {self.tokens / 1e6:.2f}M  {text}"
        print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["vocab", "train", "export"])
    parser.add_argument("--published-vocab", type=Path, help="tiktoken.model of moonshotai/Kimi-K2-Thinking")
    parser.add_argument("--out", type=Path, default=Path("k2hybrid/mini"))
    parser.add_argument("--state", type=Path, default=Path(".cache/mini/state.pt"))
    parser.add_argument("--tokens", type=float, default=15.5e6, help="tokens to train on, padding included")
    parser.add_argument("--lr", type=float, default=6e-3)
    parser.add_argument("--micro", type=int, default=1, help="batches of 4096 tokens in a step")
    parser.add_argument("--probe-every", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.command in ("vocab", "train") and args.published_vocab is None:
        parser.error(f"{args.command} needs --published-vocab")
    if args.command == "vocab":
        build_vocab.write(published_words(args.published_vocab), args.out)
        return
    if args.command == "export":
        n_vocab = vocab.load_encoding(args.out / "tiktoken.model").n_vocab
        state = torch.load(args.state, weights_only=False)["model"]
        export.export(state, MiniConfig(vocab_size=n_vocab), args.out)
        return
    trainer = Trainer(args)
    if args.state.exists():
        trainer.load()
        trainer.log("resumed")
    signal.signal(signal.SIGTERM, trainer.stop)
    trainer.run()


if __name__ == "__main__":
    main()
