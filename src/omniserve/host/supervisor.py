"""HostSupervisor: keeps one host process alive and gives each its own segment."""

from __future__ import annotations

import select
import socket
import subprocess
import sys
from collections.abc import Sequence
from typing import Literal, Protocol

import omniserve._native as _native
from omniserve.host.segment import LaneSegment

HostEvent = Literal["started", "lost", "failed"]
# A host that dies this often before it was ever ready will not come up.
MAX_FAILED_STARTS = 3


class Host(Protocol):
    """What the engine needs of a host: the segment in use, and news about it."""

    segment: LaneSegment

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

    def __init__(self, geometry: _native.LaneGeometry, cpus: Sequence[int], threads: int) -> None:
        self._geometry = geometry
        self._cpus = list(cpus)
        self._threads = threads
        self._failed_starts = 0
        self._is_ready = False
        self._start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def _start(self) -> None:
        self.segment = LaneSegment(self._geometry)
        self._control, theirs = socket.socketpair()
        fds = (self.segment.memory_fd, self.segment.event_fd, theirs.fileno())
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "omniserve.host.process",
                *(str(fd) for fd in fds),
                str(self._threads),
                ",".join(str(c) for c in self._cpus),
            ],
            pass_fds=fds,
            stdin=subprocess.DEVNULL,
        )
        theirs.close()
        self._is_ready = False

    def poll(self) -> HostEvent | None:
        readable, _, _ = select.select([self._control], [], [], 0)
        if not readable:
            return None
        try:
            message = self._control.recv(16)
        except ConnectionError:
            message = b""
        if message:
            self._is_ready, self._failed_starts = True, 0
            return "started"
        return self._replace()

    def _replace(self) -> HostEvent:
        """The host is gone: reap it and start another one, unless it never comes up."""
        self._failed_starts += not self._is_ready
        self._reap()
        if self._failed_starts >= MAX_FAILED_STARTS:
            self._control, _ = socket.socketpair()
            return "failed"
        self.segment.close()
        self._start()
        return "lost"

    def wait_fds(self) -> list[int]:
        return [self._control.fileno(), self.segment.event_fd]

    def _reap(self) -> None:
        self._control.close()
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """Stop the host and wait for its end; a stopped or hanging one is killed."""
        self._control.close()
        try:
            self._process.wait(timeout=0.5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self.segment.close()
