"""Where the trainer tells heads to look: at what is copied, and at nothing where nothing is."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest
import tiktoken
import torch

from k2hybrid.mini_eval.author import Author
from k2hybrid.mini_eval.conversation import Conversation
from k2hybrid.mini_eval.words import Lexicon, published_words
from tools.mini import vocab
from tools.mini.cues import cue
from tools.mini.data import Lessons
from tools.mini.declared import NOTHING, Declared, properties
from tools.mini.guidance import HEADS, Guidance
from tools.mini.model import MiniConfig, MiniModel
from tools.mini.packing import pack
from tools.mini.render import encode

ROOT = Path(__file__).resolve().parents[2]
WORDS = published_words(ROOT / "tests" / "golden" / "tiktoken.model", limit=3000)
KINDS = (
    "repeat",
    "look_up",
    "member",
    "declared",
    "served",
    "thought",
    "first_tool",
    "few_tools",
    "tools",
    "talk",
)


@pytest.fixture(scope="module")
def encoding() -> tiktoken.Encoding:
    return vocab.load_encoding(ROOT / "k2hybrid" / "mini" / "tiktoken.model")


def conversations(n: int, seed: int) -> list[Conversation]:
    author, rng = Author(Lexicon(WORDS, "train")), random.Random(seed)
    return [author.with_tools(rng, author.toolset(rng), author.system(rng)) for _ in range(n)]


@pytest.mark.parametrize("kind", KINDS)
def test_who_copies_looks_at_an_earlier_token_like_the_next_one(
    encoding: tiktoken.Encoding, kind: str
) -> None:
    lessons = Lessons(encoding, WORDS, seed=2)
    copied = 0
    for lesson in (lessons.lesson(kind) for _ in range(20)):
        for branch in lesson.branches:
            ids = lesson.prefix + branch.ids
            for looks, at in branch.guides.get("copy", ()):
                assert len(lesson.prefix) <= looks
                assert at <= looks
                assert ids[looks + 1] == ids[at]
                copied += 1
    assert copied > 100 or kind == "member"


def test_a_token_is_a_copy_or_free_never_both(encoding: tiktoken.Encoding) -> None:
    known = said = 0
    for conversation in conversations(80, seed=3):
        declared = Declared(encoding, conversation)
        example = encode(conversation, declared)
        copied = [looks for looks, _ in example.guides.get("copy", ())]
        free = [looks for looks, at in example.guides["free"] if at == NOTHING]
        assert len(free) == len(example.guides["free"])
        assert len({*copied, *free}) == len(copied) + len(free)
        learnt = {len(declared.ids) + i - 1 for i, wanted in enumerate(example.learn) if wanted}
        assert {*copied, *free} <= learnt
        known, said = known + len(copied) + len(free), said + len(learnt)
    assert known > 0.97 * said


def test_names_are_found_in_their_declarations(encoding: tiktoken.Encoding) -> None:
    for conversation in conversations(40, seed=4):
        declared = Declared(encoding, conversation)
        order: list[tuple[int, int]] = []
        for tool in conversation.tools:
            function = tool["function"]
            places: dict[str | None, int] = {None: declared.names[function["name"]]}
            places.update(declared.parameters[function["name"]].items())
            assert list(places)[1:] == sorted(properties(function))
            for parameter, start in places.items():
                end = declared.ends[function["name"], parameter]
                assert encoding.decode(declared.ids[start : end + 1]) == (parameter or function["name"])
                opening = encoding.decode(declared.ids[start - 5 : start])
                assert opening.endswith('"' if parameter else '"name":"')
                order.append((start, end))
        chain = [
            (start, before)
            for (start, _), before in zip(order, [NOTHING, *(end for _, end in order[:-1])], strict=True)
        ]
        assert declared.guides["previous"] == chain


def test_the_next_name_is_said_with_the_last_one_in_view(encoding: tiktoken.Encoding) -> None:
    """Who says a name looks, one layer earlier, at the end of the name before it in the declaration."""
    seen = 0
    for conversation in conversations(60, seed=5):
        declared = Declared(encoding, conversation)
        before = dict(declared.guides["previous"])
        copies = dict(encode(conversation, declared).guides["copy"])
        for looks, at in encode(conversation, declared).guides["current"]:
            if copies.get(looks) in before and at != NOTHING:
                tool_starts = set(declared.names.values())
                if copies[looks] not in tool_starts:
                    assert before[copies[looks]] == at
                    seen += 1
    assert seen > 50


def test_a_verdict_looks_at_the_word_that_decides_it(encoding: tiktoken.Encoding) -> None:
    lessons = Lessons(encoding, WORDS, seed=6)
    for branch in (b for _ in range(30) for b in lessons.lesson("member").branches):
        for looks, at in branch.guides.get("evidence", ()):
            assert (
                encoding.decode([branch.ids[looks + 1]])
                == "yes"[: len(encoding.decode([branch.ids[looks + 1]]))]
            )
            assert at < looks


def test_the_loss_is_minus_the_logarithm_of_the_share(encoding: tiktoken.Encoding) -> None:
    """Against a softmax in float64 over all keys that a position may see."""
    torch.manual_seed(0)
    config = MiniConfig(vocab_size=encoding.n_vocab, compute=torch.float32)
    model = MiniModel(config).eval()
    lessons = Lessons(encoding, WORDS, seed=8)
    lesson = lessons.lesson("first_tool")
    batch = pack([lesson], encoding.n_vocab - 1)
    projected = {}

    def remember(layer: int) -> None:
        attention = model.blocks[layer].self_attn
        project = attention.project

        def spy(*args: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            projected[layer] = project(*args)
            return projected[layer]

        attention.project = spy  # type: ignore[method-assign, assignment]

    for layer in {layer for layer, _, _ in HEADS.values()}:
        remember(layer)
    guidance = Guidance()
    with torch.no_grad():
        model(batch, guidance)
    prefix = len(lesson.prefix)
    for kind, (layer, first, end) in HEADS.items():
        q, k, _ = (t.double() for t in projected[layer])
        losses: list[float] = []
        start = 0
        for segment in batch.segments:
            shift = 0 if segment.after is None else prefix
            keys = k[:, start : start + segment.length]
            if shift:
                keys = torch.cat((k[:, :prefix], keys), 1)
            for looks, at in segment.guides.get(kind, ()):
                scores = keys[first:end, : looks + 1] @ q[first:end, start + looks - shift, :, None]
                shares = (scores.squeeze(2) * model.blocks[layer].self_attn.scale).softmax(1)[:, at]
                losses.append(-float(shares.mean().log()))
            start += segment.length
        assert guidance.counts[kind] == len(losses) > 0
        assert guidance.means()[kind] == pytest.approx(sum(losses) / len(losses), rel=1e-4)


def test_a_crew_trains_on_the_mean_and_does_what_the_leader_says() -> None:
    program = (
        "import torch\n"
        "from tools.mini.crew import Crew\n"
        "crew = Crew.start(2)\n"
        "one, two = torch.full((2, 3), float(crew.rank)), torch.tensor([10.0 * crew.rank])\n"
        "crew.mean([one, two])\n"
        "said = crew.told(7 + crew.rank)\n"
        "print(crew.leads, one.tolist(), two.tolist(), said)\n"
        "assert one.eq(0.5).all() and two.eq(5).all() and said == 7\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.splitlines() == ["True [[0.5, 0.5, 0.5], [0.5, 0.5, 0.5]] [5.0] 7"]


def test_cues_are_words_of_the_request_that_few_domains_share() -> None:
    distance = {"name": "get_distance", "description": "Distance between two places."}
    assert cue(distance, "How far is it from Oslo to Rome?") == "far"
    multiply = {"name": "multiply", "description": "Multiplies a and b."}
    assert cue(multiply, "22 * 921.4") == "*"
    assert cue({"name": "get_river_color"}, "How far is it from Oslo to Rome?") is None
