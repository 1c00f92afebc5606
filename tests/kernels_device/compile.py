"""Compiles device kernels for cards that are not there, and prints what they take of one, as JSON.

A process of its own, without TRITON_INTERPRET: python -m tests.kernels_device.compile
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from k2hybrid.kernels import experts, flash, linear8, mla
from k2hybrid.kernels import rows as row_kernels
from k2hybrid.kernels import split as expert_split
from k2hybrid.kernels.card import Card
from k2hybrid.kernels.jit import experts as experts_jit
from k2hybrid.kernels.jit import flash as flash_jit
from k2hybrid.kernels.jit import linear8 as linear8_jit
from k2hybrid.kernels.jit import mla as mla_jit
from k2hybrid.kernels.jit import rows as rows_jit
from k2hybrid.kernels.jit import split as split_jit

# Shared memory that a block may have, by compute capability: CUDA programming guide, table of specifications.
# 8.9 has 8.6's, and the same code.
CARDS = {
    80: Card(108, 8, 166_912),
    86: Card(82, 8, 101_376),
    90: Card(132, 9, 232_448),
    100: Card(148, 10, 232_448),
    120: Card(170, 12, 101_376),
}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Build(NamedTuple):
    """One kernel with its compile-time sizes; `types` are those of its other arguments, in order.

    `:16` says of an integer that it is a multiple of 16, as the launcher sees by itself.
    """

    kernel: Any
    types: str
    sizes: dict[str, Any]
    warps: int
    stages: int


def builds(card: Card) -> Iterator[tuple[str, Build]]:
    """All that Kimi-K2 launches on such a card."""
    for row_format in ("bf16", "fp8"):
        tile = mla.choose_tile(card, row_format, 64)
        fp8 = row_format == "fp8"
        words, floats = ("*i32", "*fp32") if fp8 else ("*bf16", "*bf16")
        yield (
            f"attend {row_format}",
            Build(
                mla_jit.attend,
                f"*bf16 *bf16 {words} *bf16 {floats} *i32 *i32 *fp32 *fp32 fp32 "
                "i32 i32 i32 i32 i32:16 i32:16",
                {
                    "LATENT": 512,
                    "ROPE": 64,
                    "ROW_BYTES": mla.row_bytes(row_format, 512, 64),
                    "FP8": fp8,
                    "GROUP": 128,
                    "GROUPS": 4,
                    "ROPE_TILE": 64,
                    "HEADS": tile.heads,
                    "TOKENS": tile.tokens,
                    "PAGE": mla.PAGE_TOKENS,
                    "BATCH": 8,
                    "MIN_PART": mla.MIN_PART,
                },
                tile.warps,
                tile.stages,
            ),
        )
    sizes = {"LATENT": 512, "COLUMNS": mla.MERGE_COLUMNS, "PARTS": mla.MERGE_PARTS, "BATCH": 8}
    sizes["MIN_PART"] = mla.MIN_PART
    yield "merge", Build(mla_jit.merge, "*fp32 *fp32 *i32 *fp32 i32 i32 i32", sizes, 4, 2)
    for name, form in (("few", linear8.FEW), ("many", linear8.MANY)):
        for kind in ("int8", "fp8"):
            yield (
                f"linear {kind} {name}",
                Build(
                    linear8_jit.linear,
                    "*bf16 *i32 *fp32 *fp32 i32 i32:16 i32:16 i32:16 i32:16",
                    {"FP8": kind == "fp8", "ROWS": form.rows, "COLUMNS": form.columns, "INNER": form.inner},
                    form.warps,
                    form.stages,
                ),
            )

    for name, shape in (("few", experts.FEW), ("many", experts.MANY)):
        sizes = {"ROWS": shape.rows, "COLUMNS": shape.columns, "GROUPS": shape.groups}
        tables = "*bf16 *i32 *bf16 *i32 *i32 *i32"
        last = "i32:16 i32:16 i32:16"
        yield (
            f"gate_up {name}",
            Build(
                experts_jit.gate_up,
                f"{tables} *i32 *bf16 i32:16 i32 {last}",
                sizes,
                shape.warps,
                shape.stages,
            ),
        )
        yield (
            f"down {name}",
            Build(experts_jit.down, f"{tables} *fp32 i32:16 {last}", sizes, shape.warps, shape.stages),
        )
    sizes = {"ROWS": experts.FEW.rows, "CHOICES": experts.DEAL_CHOICES, "TILES": 32}
    yield "deal", Build(experts_jit.deal, "*i32 *i32 *i32 *i32 *i32 *i32 i32 i32 i32", sizes, 8, 3)
    yield (
        "combine",
        Build(
            experts_jit.combine,
            "*fp32 *i32 *i32 *fp32 *fp32 i32 i32:16 i32:16",
            {"COLUMNS": experts.COMBINE_COLUMNS},
            4,
            3,
        ),
    )
    yield flash_build(card)
    yield from row_builds()


def flash_build(card: Card) -> tuple[str, Build]:
    """Attention of a prefill."""
    tile = flash.choose_tile(card, 128, 64, 128)
    sizes = {"NOPE": 128, "ROPE": 64, "VALUE": 128, "QUERIES": tile.queries, "ROWS": tile.rows}
    sizes |= {"NOPE_TILE": 128, "ROPE_TILE": 64, "VALUE_TILE": 128}
    types = f"{'*bf16 ' * 4}*fp32 *fp32 fp32 i32 i32:16 i32 i32 i32 i32:16 i32:16 i32:16"
    return "flash", Build(flash_jit.attend, types, sizes, tile.warps, tile.stages)


def row_builds() -> Iterator[tuple[str, Build]]:
    """What is launched between products: norms of hidden states, of queries, and the rest."""
    warps = row_kernels.warps_for
    for width in (8192, 2048):
        yield (
            f"rms_norm {width}",
            Build(rows_jit.rms_norm, "*fp32 *fp32 *bf16 i32:16 i32:16 fp32", {"N": width}, warps(width), 3),
        )
    columns = row_kernels.SWIGLU_COLUMNS
    yield "swiglu", Build(rows_jit.swiglu, "*fp32 *fp32 *bf16 i32:16", {"N": columns}, 4, 3)
    sizes: dict[str, Any] = {"NORMALIZE": True, "EXPERTS": 512, "CHOSEN": 8}
    types = "*fp32 *fp32 *i32 *fp32 i32:16 i32 fp32"
    yield "choose", Build(rows_jit.choose, types, sizes, warps(512), 3)
    sizes = {"HEADS": 8, "NOPE": 128, "PAIRS": 32, "LATENT": 512}
    types = f"{'*fp32 ' * 5}*bf16 *bf16 *bf16 i32:16 i32:16 i32:16 i32:16 fp32"
    yield "prepare_attention", Build(rows_jit.prepare_attention, types, sizes, 4, 3)
    sizes = {"GROUP": 128, "GROUPS": 4, "ROPE": 64, "LEAST": -117, "MOST": 7}
    yield "store_fp8", Build(rows_jit.store_fp8, "*bf16 *i64 *u8 i32:16 i32:16 i32:16", sizes, warps(512), 3)
    types = "*i32 *i32 *i32 *fp32 *i32 *i32 i32:16 i32:16 fp32"
    for choices in (64, expert_split.MOST_CHOICES):
        sizes = {"CHOICES": choices, "PART": expert_split.PART}
        yield f"split {choices}", Build(split_jit.split, types, sizes, 8, 3)


def compile_for(capability: int, build: Build) -> dict[str, int]:
    """Shared memory, registers of a thread and bytes of its stack, that is what did not fit registers."""
    names = build.kernel.arg_names
    types = dict(zip([name for name in names if name not in build.sizes], build.types.split(), strict=True))
    source = ASTSource(
        build.kernel,
        {name: types.get(name, "constexpr").removesuffix(":16") for name in names},
        {(names.index(name),): size for name, size in build.sizes.items()},
        # Torch's memory is aligned.
        {(names.index(n),): [["tt.divisibility", 16]] for n, t in types.items() if t[0] == "*" or ":" in t},
    )
    options = {"num_warps": build.warps, "num_stages": build.stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(TOOLS / "cuobjdump"), "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    return {"shared": compiled.metadata.shared, "registers": int(found[1]), "stack": int(found[2])}


def main() -> None:
    rows = [
        {"capability": capability, "kernel": name, **compile_for(capability, build)}
        for capability, card in CARDS.items()
        for name, build in builds(card)
    ]
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
