"""From the reader thread to an event loop: what comes together is handed over together."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")

# So many items are handed over in one turn of the loop. What they set off takes milliseconds for all streams
# of a walk; between turns the loop looks at its sockets, where new requests arrive.
TURN = 4


class Mailbox:
    """Of one event loop. A walk brings a token for each open stream: they wake the loop once, not each."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._waiting: deque[tuple[Callable[[Any], None], Any]] = deque()
        self._is_called = False

    def put(self, receive: Callable[[T], None], item: T) -> None:
        """Have `receive(item)` called on the loop, in the order of the calls. From any thread.

        RuntimeError when the loop is closed.
        """
        if self._loop.is_closed():
            raise RuntimeError("the event loop is closed")
        self._waiting.append((receive, item))
        if not self._is_called:
            self._is_called = True
            self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        for _ in range(min(TURN, len(self._waiting))):
            receive, item = self._waiting.popleft()
            receive(item)
        if not self._waiting:
            self._is_called = False
        # Also what was put just before that line by somebody who still saw a call under way.
        if self._waiting:
            self._is_called = True
            self._loop.call_soon(self._deliver)
