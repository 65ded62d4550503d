"""ScriptedHost: the real segment, kernel and queues, with a script in place of the worker threads.

Attention and copies happen when, and in the order in which, the caller serves them: late, never, or after a
cancel. The engine cannot tell the difference.
"""

from __future__ import annotations

import os

import omniserve._native as _native
from omniserve.host.segment import LaneSegment
from omniserve.host.supervisor import HostEvent


class ScriptedHost:
    """A host in the engine's own process. `lose()` stands for its death."""

    def __init__(self, geometry: _native.LaneGeometry) -> None:
        self._geometry = geometry
        self._news: list[HostEvent] = []
        self._start()

    def _start(self) -> None:
        self.segment = LaneSegment(self._geometry)
        self.workers = _native.HostWorkers(self.segment.address, self.segment.event_fd, [], 0)
        self._news.append("started")

    @property
    def warnings(self) -> list[str]:
        return self.workers.warnings

    @property
    def pid(self) -> int:
        return os.getpid()

    def poll(self) -> HostEvent | None:
        return self._news.pop(0) if self._news else None

    def wait_fds(self) -> list[int]:
        return [self.segment.event_fd]

    def lose(self) -> None:
        """All KV and every task in flight are gone; a fresh host takes the place.

        Its start is news only after its loss: one lost before it was heard of is never attached.
        """
        self.segment.close()
        self._news = ["lost"]
        self._start()

    def pending(self) -> list[tuple[int, int]]:
        """(layer, slot) of every task nobody has served yet."""
        return self.workers.pending()

    def serve(self, slot: int) -> None:
        self.workers.serve(slot)

    def serve_copies(self) -> None:
        for copy_id in self.workers.pending_copies():
            self.workers.serve_copy(copy_id)

    def serve_all(self) -> None:
        """What an infinitely fast host would do."""
        self.serve_copies()
        for _, slot in self.pending():
            self.serve(slot)

    def close(self) -> None:
        self.segment.close()
