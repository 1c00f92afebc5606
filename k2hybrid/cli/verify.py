"""`k2hybrid verify MODEL`: is a checkpoint whole? Everything that is wrong is listed, not only the first."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from tqdm import tqdm

from k2hybrid.chat.template import ChatTemplate
from k2hybrid.chat.tokenizer import Tokenizer
from k2hybrid.checkpoint.hub import locate
from k2hybrid.checkpoint.origin import how_to_resume
from k2hybrid.checkpoint.spec import ModelSpec
from k2hybrid.checkpoint.survey import Survey, survey
from k2hybrid.checkpoint.verify import Contents, DeepCheck
from k2hybrid.errors import K2Error, TemplateError, TokenizerError
from k2hybrid.types import Message, ToolCall

_SHOWN = 200  # a checkpoint of K2 has 208,215 tensors, and all of them can be wrong

# Exercises every kind of message, so that a template that fails on one is found here and not in a request.
_CONVERSATION = (
    Message("system", "Be brief."),
    Message("user", "What is the weather in Beijing?"),
    Message(
        "assistant", None, reasoning="Ask.", tool_calls=(ToolCall("functions.weather:0", "weather", "{}"),)
    ),
    Message("tool", "Sunny.", tool_call_id="functions.weather:0"),
)
_TOOLS = ({"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}},)


def verify(args: argparse.Namespace) -> int:
    """Check as `args` say; 0 if the checkpoint is whole, else 1. CheckpointError if there is none."""
    if args.model is None:
        args.parser.error(
            "name a MODEL to check its files, or give --tools FILE to check the tool calls of an endpoint"
        )
    folder = locate(args.model)
    found = survey(folder)
    problems = [*found.problems, *chat_problems(folder, found.spec)]
    contents = _read_all(found) if args.deep else None
    problems += contents.problems if contents is not None else ()
    _print(found, problems, contents)
    if args.json is not None:
        args.json.write_text(json.dumps(_as_json(found, problems, contents), indent=1) + "\n", "utf-8")
    return 1 if problems else 0


def chat_problems(folder: Path, spec: ModelSpec | None) -> list[str]:
    """What is wrong with vocabulary and template. The template is tried on a conversation."""
    try:
        tokenizer = Tokenizer.load(folder)
    except TokenizerError as error:
        return [str(error)]  # a template cannot be tried without
    problems = []
    if spec is not None and tokenizer.vocab_size > spec.vocab_size:
        problems.append(
            f"the tokenizer has {tokenizer.vocab_size} ids, but config.json says vocab_size {spec.vocab_size}"
        )
    try:
        template = ChatTemplate.load(folder, tokenizer)
    except TemplateError as error:
        return [*problems, str(error)]
    try:
        template.render(_CONVERSATION, _TOOLS)
    except K2Error as error:
        problems.append(f"the chat template cannot render a conversation with tools: {error}")
    finally:
        template.close()
    return problems


def _read_all(found: Survey) -> Contents:
    deep = DeepCheck(found)
    with tqdm(
        total=deep.total_bytes, unit="B", unit_scale=True, desc="reading", disable=not sys.stderr.isatty()
    ) as bar:
        return deep.run(bar.update)


def _print(found: Survey, problems: list[str], contents: Contents | None) -> None:
    for line in problems[:_SHOWN]:
        print(line)
    if len(problems) > _SHOWN:
        print(f"… and {len(problems) - _SHOWN} more; --json FILE has them all")
    if found.missing_shards:
        print(f"{len(found.missing_shards)} of {len(found.shards)} shards are missing")
        if command := how_to_resume(found.folder):
            print(f"finish the download{command}")
    print(f"{len(found.tensors):,} tensors in {len(found.shards)} shards, {_tensor_bytes(found):,} bytes")
    if contents is not None:
        print(
            f"{contents.nbytes:,} bytes read; checksums of {len(contents.checked)} files compared"
            + (f", none is known of {len(contents.unknown)}" if contents.unknown else "")
        )
        if contents.shapes_ignored:
            print(
                f"{contents.shapes_ignored} weight_shape tensors disagree with their matrices; not relied on"
            )
    kind = "whole" if contents is not None else "whole, by its headers; --deep reads all bytes"
    print(f"{found.folder}: {kind if not problems else f'{len(problems)} problems'}")


def _tensor_bytes(found: Survey) -> int:
    return sum(ref.nbytes for ref in found.tensors.values())


def _as_json(found: Survey, problems: list[str], contents: Contents | None) -> dict[str, object]:
    deep = None
    if contents is not None:
        deep = {
            "bytes_read": contents.nbytes,
            "checksums_compared": contents.checked,
            "checksums_unknown": contents.unknown,
            "weight_shapes_ignored": contents.shapes_ignored,
        }
    return {
        "model": str(found.folder),
        "whole": not problems,
        "problems": problems,
        "missing_shards": found.missing_shards,
        "shards": len(found.shards),
        "tensors": len(found.tensors),
        "tensor_bytes": _tensor_bytes(found),
        "deep": deep,
    }
