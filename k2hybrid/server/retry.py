"""Which request is a retry of which: the same JSON under the same API key."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import orjson


def retry_key(scope: str, body: Mapping[str, Any]) -> str:
    """A digest of `scope` and `body`, whatever the order of its fields and its white space.

    SDKs repeat the whole body, so nothing is left out. Takes as long as the body is: call it in a thread.
    """
    digest = hashlib.sha256(scope.encode() + b"\0")
    digest.update(orjson.dumps(body, option=orjson.OPT_SORT_KEYS))
    return digest.hexdigest()


def choice_key(key: str, choice: int) -> str:
    """The key of one of several answers to a request; "" stays ""."""
    return f"{key}.{choice}" if key else ""
