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
from k2hybrid.mini_eval import decimals, frames
from k2hybrid.mini_eval.author import Author
from k2hybrid.mini_eval.conversation import Conversation, tools_json
from k2hybrid.mini_eval.split import side_of
from k2hybrid.mini_eval.words import Lexicon, published_words
from tools.mini import vocab
from tools.mini.data import STAGES, Lessons
from tools.mini.declared import Declared, encode_head
from tools.mini.export import SHARPNESS, checkpoint_tensors, sharpened, trainer_state
from tools.mini.model import MiniConfig, MiniModel, fake_quantize, quantize_int4, yarn_inverse_frequencies
from tools.mini.pieces import Example
from tools.mini.render import encode, prompt_text

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "k2hybrid" / "mini"
WORDS = published_words(ROOT / "tests" / "golden" / "tiktoken.model", limit=3000)


@pytest.fixture(scope="module")
def encoding() -> tiktoken.Encoding:
    return vocab.load_encoding(FOLDER / "tiktoken.model")


def conversations(n: int, seed: int) -> list[Conversation]:
    author, rng = Author(Lexicon(WORDS, "train")), random.Random(seed)
    return [author.with_tools(rng, author.toolset(rng), author.system(rng)) for _ in range(n)]


def template_text(conversation_messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> str:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment()
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, sort_keys=True, **options)
    template = environment.from_string((FOLDER / "chat_template.jinja").read_text())
    return template.render(messages=conversation_messages, tools=tools, add_generation_prompt=True)


def test_merges_join_letters_only(encoding: tiktoken.Encoding) -> None:
    ranks = [encoding.decode_single_token_bytes(i) for i in range(encoding.n_vocab - vocab.N_SPECIAL)]
    assert {bytes([b]) for b in range(256)} <= set(ranks)
    merged = [piece for piece in ranks if len(piece) > 1]
    assert len(merged) == len(ranks) - 256
    assert all(re.fullmatch(rb"[A-Za-z]+", piece) for piece in merged)


@pytest.mark.parametrize("word", ["weather", "Beijing", "Zanzibar", "population", "qxzkv"])
def test_a_word_has_the_same_pieces_wherever_it_stands(encoding: tiktoken.Encoding, word: str) -> None:
    pieces = encoding.encode_ordinary(word)
    for before in (" ", "_", '"', "."):
        assert encoding.encode_ordinary(before + word)[-len(pieces) :] == pieces


def test_specials_keep_the_published_names_and_offsets(encoding: tiktoken.Encoding) -> None:
    first = encoding.n_vocab - vocab.N_SPECIAL
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
        a, b = decimals.draw_pair(rng, "test")
        assert side_of("pair", " ".join(sorted((a, b)))) == "test"
        answer = decimals.compare(a, b, "bigger").answer
        expected = "They are equal" if Decimal(a) == Decimal(b) else f"{max(a, b, key=Decimal)} is bigger"
        assert answer == expected + "."


def messages_of(conversation: Conversation) -> list[dict[str, Any]]:
    """The conversation as a client sends it, without its last answer."""
    messages: list[dict[str, Any]] = []
    if conversation.system is not None:
        messages.append({"role": "system", "content": conversation.system})
    made = 0
    for turn in conversation.turns:
        messages.append({"role": "user", "content": turn.user})
        for step in turn.steps:
            calls, results = [], []
            for call in step.calls:
                call_id = f"functions.{call.name}:{made}"
                made += 1
                function = {"name": call.name, "arguments": call.arguments_json}
                calls.append({"id": call_id, "type": "function", "function": function})
                results.append(
                    {"role": "tool", "tool_call_id": call_id, "name": call.name, "content": call.result}
                )
            said = {"role": "assistant", "content": "", "reasoning_content": step.think, "tool_calls": calls}
            messages += [said, *results]
        messages.append({"role": "assistant", "content": turn.answer, "reasoning_content": turn.think})
    return messages[:-1]


def test_rendering_equals_the_chat_template() -> None:
    kinds = set()
    for conversation in conversations(150, seed=2):
        kinds.add(conversation.last.kind)
        rendered = template_text(messages_of(conversation), list(conversation.tools))
        assert rendered == prompt_text(conversation, steps=len(conversation.last.steps))
    assert kinds == {"none", "one", "parallel", "sequential"}


def test_only_the_assistants_last_run_is_learnt(encoding: tiktoken.Encoding) -> None:
    for conversation in conversations(60, seed=4):
        example = encode(conversation, Declared(encoding, conversation))
        turn = conversation.last
        learnt = encoding.decode([t for t, wanted in zip(example.ids, example.learn, strict=True) if wanted])
        assert learnt.endswith(f"<think>{turn.think}</think>{turn.answer}<|im_end|>")
        assert learnt.count("<|im_end|>") == learnt.count("<think>") == len(turn.steps) + 1
        assert "<|im_user|>" not in learnt
        assert "## Return of" not in learnt


def test_conversations_of_one_lesson_share_their_head(encoding: tiktoken.Encoding) -> None:
    author, rng = Author(Lexicon(WORDS, "train")), random.Random(1)
    toolset, system = author.toolset(rng), author.system(rng)
    one, two = (author.with_tools(rng, toolset, system) for _ in range(2))
    assert encode_head(one, encoding) == encode_head(two, encoding)
    declared = Declared(encoding, one)
    assert declared.ids == encode_head(one, encoding)
    whole = encoding.decode(declared.ids + encode(one, declared).ids)
    assert whole.startswith(prompt_text(one))


def test_tools_are_declared_sorted_and_compact() -> None:
    assert tools_json(({"b": 1, "a": {"d": "é", "c": 2}},)) == '[{"a":{"c":2,"d":"é"},"b":1}]'


@pytest.mark.parametrize("stage", STAGES)
def test_the_stream_is_reproducible(encoding: tiktoken.Encoding, stage: str) -> None:
    one, two = (Lessons(encoding, WORDS, seed=9) for _ in range(2))
    assert [one.draw(STAGES[stage]) for _ in range(30)] == [two.draw(STAGES[stage]) for _ in range(30)]


def test_repeats_are_learnt_only_where_they_can_be_known(encoding: tiktoken.Encoding) -> None:
    lessons = Lessons(encoding, WORDS, seed=1)
    for _ in range(100):
        (example,) = lessons.lesson("repeat").branches
        for at, learnt in enumerate(example.learn):
            if learnt:
                assert example.ids[at] in example.ids[:at]


def learnt_text(encoding: tiktoken.Encoding, example: Example) -> str:
    return encoding.decode([t for t, wanted in zip(example.ids, example.learn, strict=True) if wanted])


def test_verdicts_are_drilled_on_names_whose_words_were_said(encoding: tiktoken.Encoding) -> None:
    lessons = Lessons(encoding, WORDS, seed=3)
    for example in (e for _ in range(40) for e in lessons.lesson("member").branches):
        asked, lines = encoding.decode(example.ids).split("<think>")
        said = set(re.findall(r"[a-z]+", asked))
        for name, verdict in (line.split(":") for line in lines.splitlines()):
            words = [w for w in re.split(r"[-_.]", name) if w not in frames.GET_VERBS]
            assert verdict == (f"yes {name}" if said.issuperset(words) else "no")


def test_a_walk_is_learnt_alone_up_to_what_comes_behind_it(encoding: tiktoken.Encoding) -> None:
    lesson = Lessons(encoding, WORDS, seed=3).lesson("served")
    names = re.findall(r'"name":"([^"]+)"', encoding.decode(lesson.prefix))
    for example in lesson.branches:
        *walked, behind = learnt_text(encoding, example).removeprefix("<think>").split("\n")
        assert [line.partition(":")[0] for line in walked] == names
        assert (behind == "call ") == any(":yes " in line for line in walked)


def test_the_drill_on_declarations_leaves_the_verdicts_open(encoding: tiktoken.Encoding) -> None:
    lessons = Lessons(encoding, WORDS, seed=3)
    for example in (e for _ in range(20) for e in lessons.lesson("declared").branches):
        assert not re.search(r":(yes|no)", learnt_text(encoding, example))


def test_rendering_in_pieces_is_rendering_at_once(encoding: tiktoken.Encoding) -> None:
    """Pieces are encoded one by one: no merge may reach over their ends."""
    for conversation in conversations(60, seed=6):
        ids = encode(conversation, Declared(encoding, conversation)).ids
        assert ids == encoding.encode(encoding.decode(ids), allowed_special="all")


def test_the_full_mix_has_the_shares_that_the_card_tells(encoding: tiktoken.Encoding) -> None:
    """Learnt tokens: about 55 % tool calls, 15 % tools not needed, 15 % drills, 15 % talk."""
    lessons = Lessons(encoding, WORDS, seed=5)
    learnt = {"calls": 0, "no calls": 0, "drills": 0, "talk": 0}
    for _ in range(700):
        kind = lessons.rng.choices(*zip(*STAGES["full mix"].items(), strict=True))[0]
        for example in lessons.lesson(kind).branches:
            if kind in ("tools", "few_tools", "thought"):
                group = "calls" if "\ncall " in learnt_text(encoding, example) else "no calls"
            else:
                group = "talk" if kind == "talk" else "drills"
            learnt[group] += sum(example.learn)
    total = sum(learnt.values())
    shares = {group: 100 * count / total for group, count in learnt.items()}
    assert 48 <= shares["calls"] <= 62, shares
    assert all(9 <= shares[group] <= 21 for group in ("no calls", "drills", "talk")), shares


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


def test_a_sharpened_head_loses_no_bit() -> None:
    torch.manual_seed(0)
    state = MiniModel(MiniConfig(vocab_size=320, num_hidden_layers=2)).state_dict()
    before, after = checkpoint_tensors(state), checkpoint_tensors(sharpened(state))
    for name, value in before.items():
        assert torch.equal(after[name], value * (SHARPNESS if name == "lm_head.weight" else 1)), name


def test_the_folder_is_a_checkpoint_in_the_published_layout() -> None:
    config = json.loads((FOLDER / "config.json").read_text())
    index = json.loads((FOLDER / "model.safetensors.index.json").read_text())
    assert config["model_type"] == "kimi_k2"
    assert config["vocab_size"] == vocab.load_encoding(FOLDER / "tiktoken.model").n_vocab
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
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 20_000_000
