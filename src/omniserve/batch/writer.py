"""The one thread on which the store is used, so that the event loop never waits for a disk."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


class Writer:
    """Runs calls one after the other, in the order in which they were asked for."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="batch-writer")

    async def run(self, call: Callable[..., T], *arguments: object) -> T:
        """What the call returns or raises. A caller that is cancelled does not stop a call under way."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, call, *arguments)

    def close(self) -> None:
        """Waits for the calls that were asked for."""
        self._pool.shutdown(wait=True)
