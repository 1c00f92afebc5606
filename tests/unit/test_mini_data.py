"""The built-in model's data, vocabulary and folder: what training relies on and the runtime reads."""

from __future__ import annotations

import json
import random
import re
from decimal import Decimal
from pathlib import Path
from typing import Any

import jinja2.sandbox
import pytest
import tiktoken
import torch
from safetensors import safe_open

from k2hybrid.checkpoint import int4
from tools.mini import decimals, tooltalk, vocab
from tools.mini.data import EARLY, LATE, Examples
from tools.mini.export import checkpoint_tensors, trainer_state
from tools.mini.model import MiniConfig, MiniModel, fake_quantize, quantize_int4, yarn_inverse_frequencies
from tools.mini.packing import IGNORED, Packer, pack
from tools.mini.render import Example, encode, prompt_text, tools_json
from tools.mini.words import CITIES, Lexicon, is_held_out

FOLDER = Path(__file__).resolve().parents[2] / "k2hybrid" / "mini"
WORDS = """\
river stone paper window garden silver winter orange button candle forest island ladder mirror
pocket rocket saddle temple velvet walnut anchor basket copper dragon engine falcon guitar hammer
jacket kettle lemon magnet""".split()


@pytest.fixture(scope="module")
def encoding() -> tiktoken.Encoding:
    return vocab.load_encoding(FOLDER / "tiktoken.model")


def template_text(conversation_messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> str:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment()
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, sort_keys=True, **options)
    template = environment.from_string((FOLDER / "chat_template.jinja").read_text())
    return template.render(messages=conversation_messages, tools=tools, add_generation_prompt=True)


def test_merges_join_letters_only(encoding: tiktoken.Encoding) -> None:
    ranks = [encoding.decode_single_token_bytes(i) for i in range(encoding.n_vocab - vocab.N_SPECIAL)]
    assert {bytes([b]) for b in range(256)} <= set(ranks)
    merged = [piece for piece in ranks if len(piece) > 1]
    assert len(merged) == vocab.N_RANKS - 256
    assert all(re.fullmatch(rb"[A-Za-z]+", piece) for piece in merged)


@pytest.mark.parametrize("word", ["weather", "Beijing", "Zanzibar", "population", "qxzkv"])
def test_a_word_has_the_same_pieces_wherever_it_stands(encoding: tiktoken.Encoding, word: str) -> None:
    pieces = encoding.encode_ordinary(word)
    for before in (" ", "_", '"', "."):
        assert encoding.encode_ordinary(before + word)[-len(pieces) :] == pieces


def test_specials_keep_the_published_names_and_offsets(encoding: tiktoken.Encoding) -> None:
    first = vocab.N_RANKS
    assert encoding.encode_single_token("<|im_end|>") == first + 2
    assert encoding.encode_single_token("</think>") == first + 23
    assert encoding.encode_single_token("[PAD]") == first + 255
    assert encoding.encode_single_token(f"<|reserved_token_{first + 5}|>") == first + 5
    assert len(vocab.special_tokens(first)) == vocab.N_SPECIAL


def test_learned_ranks_do_not_depend_on_the_order_of_words() -> None:
    counts = {word: float(index % 5 + 1) for index, word in enumerate(WORDS)}
    backwards = dict(reversed(counts.items()))
    assert vocab.learn_ranks(counts, 300) == vocab.learn_ranks(backwards, 300)


@pytest.mark.parametrize(
    ("a", "b", "word", "think", "answer"),
    [
        (
            "9.11",
            "9.9",
            "bigger",
            "9.11 and 9.90: 99= ..= 19< bigger second. 9.9 is bigger.",
            "9.9 is bigger.",
        ),
        (
            "9.75",
            "12.5",
            "smaller",
            "09.75 and 12.50: 01< smaller first. 9.75 is smaller.",
            "9.75 is smaller.",
        ),
        ("3", "3.0", "larger", "3.0 and 3.0: 33= ..= 00= larger equal. They are equal.", "They are equal."),
    ],
)
def test_decimals_are_compared_digit_by_digit(a: str, b: str, word: str, think: str, answer: str) -> None:
    turn = decimals.compare(a, b, word)
    assert turn.think == think
    assert turn.answer == answer


def test_decimal_answers_are_true_and_pairs_stay_on_their_side() -> None:
    rng = random.Random(3)
    for _ in range(300):
        a, b = decimals.draw_pair(rng, held_out=True)
        assert is_held_out("pair", " ".join(sorted((a, b))))
        answer = decimals.compare(a, b, "bigger").answer
        expected = "They are equal" if Decimal(a) == Decimal(b) else f"{max(a, b, key=Decimal)} is bigger"
        assert answer == expected + "."


def test_words_of_the_two_sides_never_meet() -> None:
    sides = [Lexicon(WORDS + CITIES, held_out=side) for side in (False, True)]
    assert not set(sides[0].nouns) & set(sides[1].nouns)
    assert not set(sides[0].cities) & set(sides[1].cities)
    rng = random.Random(0)
    assert all(is_held_out("word", sides[1].made_up(rng)) for _ in range(50))


def test_tool_runs_are_consistent() -> None:
    rng, lexicon = random.Random(5), Lexicon(WORDS)
    for _ in range(200):
        tool = tooltalk.draw_tool(rng, lexicon)
        value = tooltalk.draw_value(rng, lexicon, tool)
        turn = tooltalk.call_turn(rng, lexicon, tool, value, tooltalk.ask(rng, tool, value))
        (call,) = turn.calls
        arguments = json.loads(call.arguments)
        assert list(arguments) == [tool.parameter]
        assert str(arguments[tool.parameter]) == value
        assert call.name == tool.declaration["function"]["name"]
        assert call.name in turn.call_think


def test_rendering_equals_the_chat_template(encoding: tiktoken.Encoding) -> None:
    examples = Examples(encoding, WORDS, seed=2)
    seen_calls = 0
    for _ in range(120):
        conversation = examples.conversation("tools")
        messages: list[dict[str, Any]] = []
        if conversation.system is not None:
            messages.append({"role": "system", "content": conversation.system})
        made = 0
        for turn in conversation.turns:
            messages.append({"role": "user", "content": turn.user})
            for call in turn.calls:
                call_id = f"functions.{call.name}:{made}"
                made += 1
                function = {"name": call.name, "arguments": call.arguments}
                messages += [
                    {
                        "role": "assistant",
                        "content": "",
                        "reasoning_content": turn.call_think,
                        "tool_calls": [{"id": call_id, "type": "function", "function": function}],
                    },
                    {"role": "tool", "tool_call_id": call_id, "name": call.name, "content": call.result},
                ]
            messages.append({"role": "assistant", "content": turn.answer, "reasoning_content": turn.think})
        seen_calls += made
        rendered = template_text(messages[:-1], conversation.tools)
        assert rendered == prompt_text(conversation, last_calls=len(conversation.turns[-1].calls))
    assert seen_calls > 50


def test_only_the_assistants_last_run_is_learnt(encoding: tiktoken.Encoding) -> None:
    examples = Examples(encoding, WORDS, seed=4)
    for _ in range(50):
        conversation = examples.conversation("tools")
        example = encode(conversation, encoding)
        turn = conversation.turns[-1]
        learnt = encoding.decode([t for t, wanted in zip(example.ids, example.learn, strict=True) if wanted])
        assert learnt.endswith(f"<think>{turn.think}</think>{turn.answer}<|im_end|>")
        assert learnt.count("<|im_end|>") == len(turn.calls) + 1
        assert turn.user not in learnt or turn.user in turn.call_think


def test_tools_are_declared_sorted_and_compact() -> None:
    assert tools_json([{"b": 1, "a": {"d": "é", "c": 2}}]) == '[{"a":{"c":2,"d":"é"},"b":1}]'


@pytest.mark.parametrize("shares", [EARLY, LATE])
def test_the_stream_is_reproducible(encoding: tiktoken.Encoding, shares: dict[str, float]) -> None:
    one, two = (Examples(encoding, WORDS, seed=9) for _ in range(2))
    assert [one.draw(shares).ids for _ in range(40)] == [two.draw(shares).ids for _ in range(40)]


def test_repeats_are_learnt_only_where_they_can_be_known(encoding: tiktoken.Encoding) -> None:
    examples = Examples(encoding, WORDS, seed=1)
    for _ in range(100):
        example = examples.repeat()
        for at, learnt in enumerate(example.learn):
            if learnt:
                assert example.ids[at] in example.ids[:at]


def test_packing_keeps_every_learnt_token() -> None:
    examples = [Example([5, 6, 7], [False, True, True]), Example(list(range(40)), [False] * 39 + [True])]
    batch = pack(examples, pad_id=99, size=128)
    assert sum(batch.lengths) == 128
    assert batch.lengths[:2] == [32, 64]
    kept = batch.labels != IGNORED
    assert batch.wanted[kept].tolist() == [0, 1, 32 + 38]
    assert batch.labels[kept].tolist() == [6, 7, 39]
    assert batch.ids[3:32].tolist() == [99] * 29


def test_batches_have_one_size() -> None:
    rng = random.Random(0)

    def draw() -> Example:
        n = rng.randint(2, 300)
        return Example([1] * n, [True] * n)

    packer = Packer(draw, pad_id=0, size=1024)
    assert {len(packer.next().ids) for _ in range(10)} == {1024}


def test_training_sees_the_experts_that_are_exported() -> None:
    weight = torch.randn(6, 96, generator=torch.Generator().manual_seed(1))
    assert torch.equal(fake_quantize(weight), int4.dequantize(*int4.quantize(weight)))


def test_quantized_weights_stay_within_half_a_step() -> None:
    weight = torch.randn(4, 96, generator=torch.Generator().manual_seed(0))
    q, scale = quantize_int4(weight)
    assert int(q.abs().max()) <= 7
    # The scale itself is rounded to bfloat16, so the largest value may fall 7 · 2⁻⁹ steps outside −7…7.
    assert torch.all((q * scale - weight.reshape(q.shape)).abs() <= scale * (0.5 + 7 * 2**-8))


def test_yarn_frequencies_are_cut_at_one_wavelength() -> None:
    frequencies = yarn_inverse_frequencies(MiniConfig())
    plain = 50000.0 ** (-torch.arange(0, 32, 2, dtype=torch.float64) / 32)
    assert torch.allclose(frequencies[:10], plain[:10].float())
    assert torch.allclose(frequencies[10:], (plain[10:] / 64).float())


def test_export_and_back_is_the_fake_quantized_model() -> None:
    torch.manual_seed(0)
    config = MiniConfig(vocab_size=320, num_hidden_layers=2)
    tensors = checkpoint_tensors(MiniModel(config).state_dict())
    assert tensors["model.layers.1.mlp.experts.15.down_proj.weight_packed"].shape == (192, 12)
    assert tensors["model.layers.1.mlp.experts.0.up_proj.weight_scale"].shape == (96, 6)
    assert tensors["model.layers.1.mlp.gate.e_score_correction_bias"].dtype == torch.float32
    again = checkpoint_tensors(trainer_state(tensors, config))
    assert again.keys() == tensors.keys()
    for name, value in tensors.items():
        if name.endswith(("weight_packed", "weight_scale")):
            continue  # a group without a ±7 is quantized anew to another grid with the same values nearby
        assert torch.equal(again[name], value), name


def test_the_folder_is_a_checkpoint_in_the_published_layout() -> None:
    config = json.loads((FOLDER / "config.json").read_text())
    index = json.loads((FOLDER / "model.safetensors.index.json").read_text())
    assert config["model_type"] == "kimi_k2"
    assert config["vocab_size"] == vocab.N_RANKS + vocab.N_SPECIAL
    files = set(index["weight_map"].values())
    assert len(files) >= 2
    total_bytes = 0
    for file in files:
        with safe_open(FOLDER / file, "pt") as shard:
            names = set(shard.keys())
            assert names == {name for name, where in index["weight_map"].items() if where == file}
            for name in names:
                tensor = shard.get_tensor(name)
                total_bytes += tensor.numel() * tensor.element_size()
    assert total_bytes == index["metadata"]["total_size"]
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 15_000_000
