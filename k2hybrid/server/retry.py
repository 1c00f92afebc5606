"""Which request is a retry of which: the same JSON to the same endpoint under the same API key."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import orjson


def retry_key(scope: str, path: str, body: Mapping[str, Any]) -> str:
    """A digest of all three, whatever the order of the body's fields and its white space.

    SDKs repeat the whole body, so nothing is left out. Takes as long as the body is: call it in a thread.
    """
    digest = hashlib.sha256(b"%s\0%s\0" % (scope.encode(), path.encode()))
    digest.update(orjson.dumps(body, option=orjson.OPT_SORT_KEYS))
    return digest.hexdigest()


def choice_key(key: str, choice: int) -> str:
    """The key of one of several answers to a request; "" stays ""."""
    return f"{key}.{choice}" if key else ""
