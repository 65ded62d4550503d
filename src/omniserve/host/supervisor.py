"""HostSupervisor: keeps one host process alive and gives each its own segment."""

from __future__ import annotations

import json
import select
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Literal, Protocol

import omniserve._native as _native
from omniserve.host.segment import LaneSegment

HostEvent = Literal["started", "lost", "failed"]
# A host that dies this often in a row within seconds of its start is given up: BE decodes on the device then.
MAX_EARLY_DEATHS = 3
SHORT_LIFE_S = 5.0
# A host that says nothing for this long after its start counts as dead.
START_TIMEOUT_S = 60.0
MAX_MESSAGE_BYTES = 1 << 16


class Host(Protocol):
    """What the engine needs of a host: the segment in use, and news about it."""

    segment: LaneSegment

    @property
    def warnings(self) -> list[str]:
        """What the machine refused the present host's memory; it works without."""
        ...

    @property
    def pid(self) -> int:
        """Process id of the present host."""
        ...

    def poll(self) -> HostEvent | None:
        """News since the last call: it is ready, it is gone (another one is starting), or gone for good."""
        ...

    def wait_fds(self) -> list[int]:
        """Descriptors that become readable when there is news or a completion to collect."""
        ...

    def close(self) -> None: ...


class HostSupervisor:
    """A real host process. Its death is noticed by the end of its control socket."""

    def __init__(
        self, geometry: _native.LaneGeometry, cpus: Sequence[int], threads: int, lock_memory: bool = False
    ) -> None:
        """cpus: worker i is pinned to the i-th; none: not pinned. lock_memory: KV is never swapped out."""
        self._geometry = geometry
        self._lock_memory = lock_memory
        self._cpus = list(cpus)
        self._threads = threads
        self._early_deaths = 0
        self._has_failed = False
        self._start()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def warnings(self) -> list[str]:
        return self._warnings

    def _start(self) -> None:
        self._warnings: list[str] = []
        self.segment = LaneSegment(self._geometry)
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        fds = (self.segment.memory_fd, self.segment.event_fd, theirs.fileno())
        self._process = subprocess.Popen(self._command(*fds), pass_fds=fds, stdin=subprocess.DEVNULL)
        theirs.close()
        self._is_ready = False
        self._started_s = time.monotonic()

    def _command(self, *fds: int) -> list[str]:
        """How the host process is started: segment, event and control descriptor, and how it shall work."""
        cpus = ",".join(str(c) for c in self._cpus)
        numbers = [*(str(fd) for fd in fds), str(self._threads)]
        return [sys.executable, "-m", "omniserve.host.process", *numbers, cpus, str(int(self._lock_memory))]

    def poll(self) -> HostEvent | None:
        if self._has_failed:
            return None
        readable, _, _ = select.select([self._control], [], [], 0)
        if not readable:
            hangs = not self._is_ready and time.monotonic() - self._started_s > START_TIMEOUT_S
            return self._replace() if hangs else None
        try:
            message = self._control.recv(MAX_MESSAGE_BYTES)
        except ConnectionError:
            message = b""
        if message:
            self._is_ready = True
            self._warnings = json.loads(message)
            return "started"
        return self._replace()

    def _replace(self) -> HostEvent:
        """The host is gone: reap it and start another one, unless it never lives for long."""
        lived_s = time.monotonic() - self._started_s
        self._early_deaths = self._early_deaths + 1 if not self._is_ready or lived_s < SHORT_LIFE_S else 0
        self._reap()
        if self._early_deaths >= MAX_EARLY_DEATHS:
            self._has_failed = True
            return "failed"
        self.segment.close()
        self._start()
        return "lost"

    def wait_fds(self) -> list[int]:
        return [] if self._has_failed else [self._control.fileno(), self.segment.event_fd]

    def _reap(self) -> None:
        self._control.close()
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """Stop the host and wait for its end; a stopped or hanging one is killed."""
        if self._has_failed:
            self.segment.close()
            return
        self._control.close()
        try:
            self._process.wait(timeout=0.5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self.segment.close()
