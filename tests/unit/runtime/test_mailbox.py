"""Events from the engine's thread to consumers of one event loop."""

from __future__ import annotations

import asyncio
from unittest import mock

import pytest

from k2hybrid.runtime.mailbox import Mailbox
from k2hybrid.types import TokenEvent


def test_those_who_wait_in_one_loop_are_woken_by_one_call() -> None:
    async def main() -> list[int]:
        loop = asyncio.get_running_loop()
        boxes = [Mailbox() for _ in range(8)]
        waiting = [asyncio.ensure_future(box.get_async()) for box in boxes]
        for _ in range(3):
            await asyncio.sleep(0)
        calls = []
        for _ in range(2):
            with mock.patch.object(loop, "call_soon_threadsafe", wraps=loop.call_soon_threadsafe) as woken:
                for number, box in enumerate(boxes):
                    box.put(TokenEvent(number, None))
                events = await asyncio.gather(*waiting)
                assert [event.token for event in events if isinstance(event, TokenEvent)] == list(range(8))
                calls.append(woken.call_count)
            waiting = [asyncio.ensure_future(box.get_async()) for box in boxes]
            for _ in range(3):
                await asyncio.sleep(0)
        for task in waiting:
            task.cancel()
        return calls

    assert asyncio.run(main()) == [1, 1]


def test_a_consumer_that_is_gone_keeps_nobody_else_asleep() -> None:
    async def main() -> None:
        first, second = Mailbox(), Mailbox()
        gone, stays = (asyncio.ensure_future(box.get_async()) for box in (first, second))
        for _ in range(3):
            await asyncio.sleep(0)
        gone.cancel()
        first.put(TokenEvent(1, None))
        second.put(TokenEvent(2, None))
        event = await asyncio.wait_for(stays, 10)
        assert isinstance(event, TokenEvent)
        assert event.token == 2
        assert isinstance(await first.get_async(), TokenEvent)  # and what came is not lost

    asyncio.run(main())


def test_a_closed_loop_is_an_error_for_whoever_delivers() -> None:
    box = Mailbox()

    left = []

    async def main() -> None:
        left.append(asyncio.ensure_future(box.get_async()))
        for _ in range(3):
            await asyncio.sleep(0)

    loop = asyncio.new_event_loop()
    loop.run_until_complete(main())
    loop.close()
    with pytest.raises(RuntimeError):
        box.put(TokenEvent(1, None))
