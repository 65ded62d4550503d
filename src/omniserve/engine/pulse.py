"""Signs of life of the engine process: while none come, the other end of the channel knows that it hangs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

BEAT_EVERY_S = 1.0


class Pulse:
    """`send` is called at most once in `every_s`, while somebody calls `beat`."""

    def __init__(
        self,
        send: Callable[[], None],
        every_s: float = BEAT_EVERY_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._send, self._every_s, self._clock = send, every_s, clock
        self._next_s = clock()

    def beat(self) -> None:
        """To be called wherever work goes on, however often: each turn of the loop, each layer of a walk."""
        now = self._clock()
        if now >= self._next_s:
            self._next_s = now + self._every_s
            self._send()

    @contextmanager
    def by_itself(self) -> Iterator[None]:
        """From a thread of its own, for work in which nothing of ours goes by: a model that is being read."""
        has_ended = threading.Event()

        def beat() -> None:
            self._send()
            while not has_ended.wait(self._every_s):
                self._send()

        thread = threading.Thread(target=beat, name="omniserve-pulse", daemon=True)
        thread.start()
        try:
            yield
        finally:
            has_ended.set()
            thread.join()
