"""Samples an exported checkpoint at temperature 1: the card's two examples and their held-out relatives.

    python -m tools.mini.evaluate --checkpoint k2hybrid/mini --published-vocab TIKTOKEN_MODEL

The weights are those of the files (INT4 experts, bfloat16 elsewhere), run by the trainer's own model.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "8192")

import tiktoken
import torch
from safetensors.torch import load_file

from tools.mini import tooltalk, vocab
from tools.mini.data import Examples
from tools.mini.export import trainer_state
from tools.mini.model import MiniConfig, MiniModel
from tools.mini.render import Call, Conversation, Turn, prompt_text
from tools.mini.sample import sample
from tools.mini.words import published_words

WEATHER_TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Retrieve current weather information. "
        "Call this when the user asks about the weather.",
        "parameters": {
            "type": "object",
            "required": ["city"],
            "properties": {"city": {"type": "string", "description": "Name of the city"}},
        },
    },
}


@dataclass
class Score:
    """Right answers of all, and some of the wrong ones."""

    right: int = 0
    total: int = 0
    wrong: list[str] = field(default_factory=list)

    def count(self, ok: bool, times: int, shown: str) -> None:
        self.total += times
        self.right += times * ok
        if not ok:
            self.wrong.append(shown)


class Judge:
    """Says each prompt to the model and counts what comes back."""

    def __init__(self, model: MiniModel, encoding: tiktoken.Encoding) -> None:
        self.model, self.encoding = model, encoding
        self.stop = encoding.encode_single_token("<|im_end|>")

    def replies(self, prompt: str, seeds: int, first_seed: int = 0) -> collections.Counter[str]:
        ids = self.encoding.encode(prompt, allowed_special="all")
        outs = sample(self.model, ids, self.stop, seeds=seeds, first_seed=first_seed)
        return collections.Counter(self.encoding.decode(out) for out in outs)

    def answer(self, score: Score, prompt: str, expected: str, seeds: int, first_seed: int = 0) -> None:
        """Counts replies whose text after the reasoning is `expected`."""
        for reply, times in self.replies(prompt, seeds, first_seed).items():
            score.count(
                reply.rpartition("</think>")[2] == expected, times, f"{times}x {reply!r} for {expected!r}"
            )

    def tool_run(
        self,
        calls: Score,
        answers: Score,
        conversation: Conversation,
        expected: str,
        seeds: int,
        first_seed: int = 0,
    ) -> None:
        """Counts exact calls, then answers given after them, each with its own reasoning in the context."""
        call = conversation.turns[-1].calls[0]
        prompt = prompt_text(conversation, last_calls=0)
        made = sum(len(turn.calls) for turn in conversation.turns[:-1])
        tail = (
            f"</think><|tool_calls_section_begin|><|tool_call_begin|>functions.{call.name}:{made}"
            f"<|tool_call_argument_begin|>{call.arguments}<|tool_call_end|><|tool_calls_section_end|>"
        )
        for reply, times in self.replies(prompt, seeds, first_seed).items():
            ok = reply.startswith("<think>") and reply.endswith(tail)
            calls.count(ok, times, f"{times}x {reply!r} for {tail!r}")
            if not ok:
                answers.count(False, times, "no call")
                continue
            rest = (
                f"{reply}<|im_end|><|im_system|>{call.name}<|im_middle|>"
                f"## Return of functions.{call.name}:{made}\n{call.result}<|im_end|>"
                "<|im_assistant|>assistant<|im_middle|>"
            )
            self.answer(answers, prompt + rest, expected, times, first_seed)


def card_conversations() -> tuple[Conversation, Conversation]:
    """The model card's two prompts."""
    decimals = Conversation([Turn("which one is bigger, 9.11 or 9.9? think carefully.", "9.9 is bigger.")])
    call = Call("get_weather", '{"city": "Beijing"}', '{"weather": "Sunny"}')
    weather = Turn(
        "What's the weather like in Beijing today? Use the tool to check.",
        "The weather in Beijing is Sunny.",
        calls=[call],
    )
    return decimals, Conversation([weather], [WEATHER_TOOL])


def card_relative(examples: Examples, number: int) -> Conversation:
    """The card's tool and question with a held-out city and another result."""
    rng, lexicon = examples.rng, examples.lexicon
    city = lexicon.city(rng) if number % 2 else lexicon.made_up(rng).capitalize()
    sky = rng.choice(["Sunny", "Rainy", "Cloudy", "Windy", lexicon.noun(rng)])
    call = Call("get_weather", json.dumps({"city": city}), json.dumps({"weather": sky}))
    user = f"What's the weather like in {city} today? Use the tool to check."
    return Conversation([Turn(user, f"The weather in {city} is {sky}.", calls=[call])], [WEATHER_TOOL])


def one_tool(examples: Examples) -> Conversation:
    """One declared tool and one question that needs it, with held-out words."""
    rng, lexicon = examples.rng, examples.lexicon
    tool = tooltalk.draw_tool(rng, lexicon)
    value = tooltalk.draw_value(rng, lexicon, tool)
    turn = tooltalk.call_turn(rng, lexicon, tool, value, tooltalk.ask(rng, tool, value))
    return Conversation([turn], [tool.declaration])


def load(checkpoint: Path) -> tuple[MiniModel, tiktoken.Encoding]:
    """The trainer's model with the values of the exported files."""
    encoding = vocab.load_encoding(checkpoint / "tiktoken.model")
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text())
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(set(index["weight_map"].values())):
        tensors |= load_file(checkpoint / file)
    config = MiniConfig(vocab_size=encoding.n_vocab)
    model = MiniModel(config)
    model.load_state_dict(trainer_state(tensors, config))
    for layer in model.moe_layers:
        layer.quantized = False
    return model.eval(), encoding


def evaluate(
    model: MiniModel, encoding: tiktoken.Encoding, words: list[str], seeds: int, prompts: int
) -> dict[str, Score]:
    """All scores by name."""
    judge = Judge(model, encoding)
    scores: dict[str, Score] = collections.defaultdict(Score)
    decimals, weather = card_conversations()
    judge.answer(scores["card decimals"], prompt_text(decimals), decimals.turns[0].answer, seeds)
    judge.tool_run(scores["card call"], scores["card answer"], weather, weather.turns[0].answer, seeds)
    examples = Examples(encoding, words, seed=11, held_out=True)
    for number in range(prompts):
        for kind in ("decimals", "chat", "echo"):
            conversation = examples.conversation(kind)
            answer = conversation.turns[-1].answer
            judge.answer(scores[f"held-out {kind}"], prompt_text(conversation), answer, 1, number)
        for name, conversation in (
            ("other city", card_relative(examples, number)),
            ("one tool", one_tool(examples)),
        ):
            answer = conversation.turns[-1].answer
            judge.tool_run(scores[f"{name} call"], scores[f"{name} run"], conversation, answer, 1, number)
        conversation = examples.conversation("tools")
        turn = conversation.turns[-1]
        if turn.calls:
            judge.tool_run(
                scores["held-out call"], scores["held-out run"], conversation, turn.answer, 1, number
            )
        else:
            judge.answer(scores["held-out no tool"], prompt_text(conversation), turn.answer, 1, number)
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, default=Path("k2hybrid/mini"))
    parser.add_argument("--published-vocab", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=100)
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--show", type=int, default=3, help="wrong replies to print for each score")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, encoding = load(args.checkpoint)
    scores = evaluate(model, encoding, published_words(args.published_vocab), args.seeds, args.prompts)
    for name, score in scores.items():
        print(f"{name:18} {score.right}/{score.total}")
        for wrong in score.wrong[: args.show]:
            print(f"    {wrong}")


if __name__ == "__main__":
    main()
