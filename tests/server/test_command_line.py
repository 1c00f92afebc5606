"""The command line: quick help, clear refusals, and what doctor, inspect and synth print."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from k2hybrid.cli import build_parser, main
from k2hybrid.config import MINI_MODEL
from k2hybrid.errors import ConfigError
from k2hybrid.hardware.doctor import machine_rows
from k2hybrid.server.options import model_path, read_api_keys, runtime_options

SIZES = (
    "--layers 2 --experts 4 --top-k 2 --hidden 64 --heads 2 --intermediate 64 --moe-intermediate 32 "
    "--vocab-size 600 --q-lora 32 --kv-lora 32 --nope 32 --rope 16 --v-head 32"
).split()


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[object, str]:
    with pytest.raises(SystemExit) as caught:
        main(argv)
    return caught.value.code, capsys.readouterr().err


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; from k2hybrid.cli import build_parser; build_parser().format_help();"
        "heavy = ('torch', 'numpy', 'starlette', 'uvicorn', 'tiktoken', 'jinja2');"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("argv", [["--help"], ["serve", "--help"], ["synth", "--help"]])
def test_help_exits_with_0(capsys: pytest.CaptureFixture[str], argv: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 0
    assert "usage:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["serve", "--prot", "3"], "unknown option --prot; did you mean --port?"),
        (["serve", "--port=x"], "'x' is not a port"),
        (["serve", "--port", "65536"], "not a port"),
        (["serve", "--port", "\u00b2"], "not a port"),  # a digit, but no number
        (["serve", "--api-key", "x"], "did you mean --api-key-file?"),
        (["serve", "--drain", "-1"], "--drain"),
        (["serve", "--drain=nan"], "'nan' is not a number of seconds"),
        (["serve", "--drain=1m"], "not a number of seconds"),
        (["serve", "--drain=86401"], "not a number of seconds"),
        (["serve", "--ctx", "many"], "invalid int value"),
        (["synth", "out", "--layer", "3"], "did you mean --layers?"),
        (["serve", "model", "extra"], "unknown argument extra"),
        (["serve", "model", "--model", "other"], "not allowed with"),
        (["verify"], "name a MODEL to check its files, or give --tools FILE"),
        (["pull"], "REPO"),
        (["pull", "a/b", "--revison", "x"], "did you mean --revision?"),
        (["srve"], "unknown command srve; did you mean serve?"),
        (["quux"], "unknown command quux; known: serve"),
        ([], "COMMAND"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], argv: list[str], said: str
) -> None:
    code, error = refused(capsys, *argv)
    assert code == 2
    assert said in error
    assert error.count("\n") == 1


def test_options_become_a_configuration(tmp_path: Path) -> None:
    args = build_parser().parse_args(
        ["serve", "--model", str(tmp_path), "--ctx", "4096", "--latent-gb", "0.5", "--threads", "1"]
    )
    assert model_path(args) == tmp_path
    assert model_path(build_parser().parse_args(["chat", str(tmp_path), "-p", "x"])) == tmp_path
    assert model_path(build_parser().parse_args(["serve"])) == MINI_MODEL
    assert runtime_options(args) == {"context_tokens": 4096, "latent_bytes": 1 << 29, "threads": 1}
    assert runtime_options(build_parser().parse_args(["serve"])) == {}
    for wrong in ("0", "-1", "nan", "inf", "1e300"):
        with pytest.raises(ConfigError, match="--latent-gb"):
            runtime_options(build_parser().parse_args(["serve", f"--latent-gb={wrong}"]))


@pytest.mark.parametrize(
    ("given", "seconds"), [([], 30), (["--drain", "5"], 5), (["--drain=0.5s"], 0.5), (["--drain=0"], 0)]
)
def test_the_drain_time_is_in_seconds(given: list[str], seconds: float) -> None:
    assert build_parser().parse_args(["serve", *given]).drain == seconds


def test_key_files(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("# mine\n\n one \ntwo\n")
    assert read_api_keys(path) == ("one", "two")
    assert read_api_keys(None) == ()
    path.write_text("# none\n")
    with pytest.raises(ConfigError, match="holds no key"):
        read_api_keys(path)
    path.write_text("schlüssel\n")
    with pytest.raises(ConfigError, match="ASCII"):
        read_api_keys(path)
    with pytest.raises(ConfigError, match="cannot read"):
        read_api_keys(tmp_path / "missing")


def test_synth_then_inspect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "model"
    assert main(["synth", str(out), *SIZES, "--seed", "3"]) == 0
    assert main(["inspect", str(out)]) == 0
    printed = capsys.readouterr().out
    rows = {line.split()[0]: line.split()[1:] for line in printed.splitlines() if line}
    assert rows["num_experts"] == ["4"]
    # 4 experts of 32 × 64 nibbles
    assert rows["expert_gate_proj.packed"][:2] == ["4", f"{4 * 32 * 64 // 2:,}"]
    assert rows["all"][2] == "100.00%"
    sizes = [int(line.split()[-2].replace(",", "")) for line in printed.splitlines() if line.endswith("%")]
    assert sum(sizes[:-1]) == sizes[-1]


def test_failures_are_one_line_and_exit_code_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("k2hybrid inspect: ")
    assert "config.json" in error
    assert error.count("\n") == 1


def test_doctor_prints_what_it_finds(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    for name in (
        "CPU",
        "instruction sets",
        "cores",
        "RAM",
        "NUMA nodes",
        "page sizes",
        "GPU driver",
        "kernels",
        "torch",
    ):
        assert any(line.startswith(name) for line in printed.splitlines()), name


def test_doctor_reads_two_sockets(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text(
        "".join(
            f"processor\t: {cpu}\nmodel name\t: Big\nphysical id\t: {cpu % 4 // 2}\ncore id\t: {cpu % 2}\n"
            "flags\t\t: fpu avx2 avx512_bf16\n\n"
            for cpu in range(8)
        )
    )
    (tmp_path / "proc/meminfo").write_text(f"MemTotal: {512 << 20} kB\nMemAvailable: {500 << 20} kB\n")
    for node in (0, 1):
        folder = tmp_path / f"sys/devices/system/node/node{node}"
        folder.mkdir(parents=True)
        (folder / "meminfo").write_text(f"Node {node} MemTotal: {256 << 20} kB\n")
        (folder / "cpulist").write_text(f"{node * 4}-{node * 4 + 3}\n")
    pool = tmp_path / "sys/kernel/mm/hugepages/hugepages-2048kB"
    pool.mkdir(parents=True)
    (pool / "nr_hugepages").write_text("7\n")
    driver = tmp_path / "proc/driver/nvidia"
    driver.mkdir(parents=True)
    (driver / "version").write_text("NVRM version: NVIDIA UNIX Open Kernel Module 580.1\nGCC: x\n")
    rows = dict(machine_rows(tmp_path))
    assert rows["CPU"] == "Big"
    assert rows["instruction sets"] == "avx2 avx512_bf16"
    assert rows["cores"].startswith("4 physical")
    assert rows["RAM"] == "512.0 GiB"
    assert rows["swap"] == "unknown"
    assert rows["NUMA nodes"] == "2"
    assert rows["  node1"] == "256.0 GiB, CPUs 4-7"
    assert "2 MiB: 7 reserved" in rows["page sizes"]
    assert rows["GPU driver"] == "NVIDIA UNIX Open Kernel Module 580.1"


def test_doctor_on_a_machine_that_tells_nothing(tmp_path: Path) -> None:
    rows = dict(machine_rows(tmp_path))
    assert rows["CPU"] == rows["RAM"] == "unknown"
    assert rows["GPU driver"].startswith("none")
