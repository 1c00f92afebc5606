"""Items of an input that only name others, which are kept here. Limited, since a name is short. Pure."""

from __future__ import annotations

from collections.abc import Callable

import orjson

from k2hybrid.errors import RequestError
from k2hybrid.server.body import MAX_BODY_BYTES
from k2hybrid.server.fields import Fields, wrong_value
from k2hybrid.server.responses_items import Item

MAX_REFERENCES = 4096
MAX_REFERENCED_BYTES = MAX_BODY_BYTES  # what could be sent as well; an item counts each time it is named


class References:
    """Those of one request; `find` knows items by their ids."""

    def __init__(self, find: Callable[[str], Item | None]) -> None:
        self._find = find
        self._count = 0
        self._bytes = 0

    def looked_up(self, item: Fields) -> Fields:
        """The item that `item` names, or itself if it names none."""
        # A reference may come without its type, and is then told by holding nothing else.
        if item.text("type", "item_reference" if item.value.keys() == {"id"} else None) != "item_reference":
            return item
        identity = item.required_text("id")
        self._count += 1
        if self._count > MAX_REFERENCES:
            raise wrong_value(
                "input", f"has more than {MAX_REFERENCES} references; send the items themselves"
            )
        found = self._find(identity)
        if found is None:
            raise RequestError(
                f"Item with id {identity[:100]!r} not found: send the item itself",
                param=item.name("id"),
                code="item_not_found",
            )
        self._bytes += len(orjson.dumps(found))
        if self._bytes > MAX_REFERENCED_BYTES:
            limit = f"{MAX_REFERENCED_BYTES >> 20} MiB"
            raise wrong_value("input", f"refers to more than {limit} of items")
        return Fields(found, item.path)
