"""Agent programs: how each is told of a server, and how it is given one task."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.clients.packages import NODE, program
from tests.clients.reader import TASK


@dataclass(frozen=True)
class Task:
    """A command line to run in `home`, which is also the program's home, with `env` beside the usual."""

    argv: list[str]
    env: dict[str, str] = field(default_factory=dict)


def claude_code(url: str, home: Path) -> Task:
    claude = program("@anthropic-ai/claude-code", "claude")
    options = ["--allowedTools", "Bash", "--output-format", "json"]
    env = {
        "IS_SANDBOX": "1",
        "ANTHROPIC_BASE_URL": url,
        "ANTHROPIC_AUTH_TOKEN": "x",
        "ANTHROPIC_MODEL": "k2",
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
    }
    return Task([str(claude), "-p", TASK, *options], env)


def codex(url: str, home: Path) -> Task:
    settings = home / ".codex"
    settings.mkdir()
    (settings / "config.toml").write_text(
        'model = "k2"\nmodel_provider = "local"\n'
        'approval_policy = "never"\nsandbox_mode = "danger-full-access"\n'
        "[model_providers.local]\n"
        f'name = "local"\nbase_url = "{url}/v1"\nwire_api = "responses"\nenv_key = "LOCAL_KEY"\n'
    )
    argv = [str(program("@openai/codex", "codex")), "exec", "--skip-git-repo-check", "--json", TASK]
    return Task(argv, {"LOCAL_KEY": "x", "CODEX_HOME": str(settings)})


def opencode(url: str, home: Path) -> Task:
    provider = {
        "npm": "@ai-sdk/openai-compatible",
        "options": {"baseURL": f"{url}/v1", "apiKey": "x"},
        "models": {"k2": {"interleaved": {"field": "reasoning_content"}, "reasoning": True}},
    }
    settings = {
        "provider": {"local": provider},
        "model": "local/k2",
        "autoupdate": False,
        "share": "disabled",
    }
    (home / "opencode.json").write_text(json.dumps(settings))
    argv = [str(program("opencode-ai", "opencode")), "run", "--format", "json", TASK]
    return Task(argv, {"OPENCODE_DISABLE_MODELS_FETCH": "1"})


def kimi_code(url: str, home: Path) -> Task:
    argv = [str(program("@moonshot-ai/kimi-code", "kimi")), "-p", TASK, "--output-format", "stream-json"]
    env = {
        "KIMI_MODEL_NAME": "k2",
        "KIMI_MODEL_API_KEY": "x",
        "KIMI_MODEL_BASE_URL": f"{url}/v1",
        "KIMI_MODEL_CAPABILITIES": "thinking",
        "KIMI_DISABLE_TELEMETRY": "1",
    }
    return Task(argv, env)


AGENTS: dict[str, Callable[[str, Path], Task]] = {
    "kimi-code": kimi_code,
    "opencode": opencode,
    "codex": codex,
    "claude-code": claude_code,
}


def environment(home: Path, more: dict[str, str]) -> dict[str, str]:
    """A clean one: its own home, a new Node first, and no way out but to this machine."""
    node = program(NODE, "node").parent
    nowhere = "http://127.0.0.1:9"
    return {
        "PATH": f"{node}:{os.environ.get('PATH', '/usr/bin:/bin')}",
        "HOME": str(home),
        "LANG": "C.UTF-8",
        "TERM": "dumb",
        "CI": "1",
        "HTTP_PROXY": nowhere,
        "HTTPS_PROXY": nowhere,
        "NO_PROXY": "127.0.0.1,localhost",
        "no_proxy": "127.0.0.1,localhost",
        **more,
    }
