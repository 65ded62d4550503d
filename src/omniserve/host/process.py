"""The host process: maps the segment, runs the native workers, ends when the engine does.

Started by the supervisor as
`python -m omniserve.host.process MEMORY_FD EVENT_FD CONTROL_FD THREADS CPUS LOCK_MEMORY`. It imports neither
torch nor numpy. CONTROL_FD is one end of a socket pair that keeps messages apart: one goes out when all is
ready, a JSON list of warnings about the host's memory (logged as well, hence on stderr); the closing of the
other end (or the engine's death) is the order to stop.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import mmap
import os
import signal
import socket
import sys

import setproctitle

import omniserve._native as _native
from omniserve.host.topology import place

logger = logging.getLogger("omniserve.host")

PR_SET_PDEATHSIG = 1
# Below the device threads: host attention is best-effort work.
NICENESS = 5
# How often the engine is told how much memory is resident.
MEMORY_REPORT_S = 10.0


def main(arguments: list[str]) -> int:
    memory_fd, event_fd, control_fd, threads = (int(a) for a in arguments[:4])
    cpus = [int(c) for c in arguments[4].split(",") if c]
    lock = bool(int(arguments[5]))
    setproctitle.setproctitle("omniserve: host")
    live_with_the_engine()
    if cpus:
        os.sched_setaffinity(0, cpus)
    memory = mmap.mmap(memory_fd, os.fstat(memory_fd).st_size)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    workers = _make_workers(address, event_fd, cpus, lock)
    workers.start(threads)
    # An engine that is gone by now needs no answer.
    with socket.socket(fileno=control_fd) as control, contextlib.suppress(ConnectionError):
        control.sendall(json.dumps(workers.warnings).encode())
        _wait_for_the_end(control, workers)
    workers.stop()
    return 0


def live_with_the_engine() -> None:
    """For a child on the host's CPUs: it ends when the engine does, not by a signal to all processes alike.

    A stopped process cannot see that its pipe or socket is closed; the kernel kills it with the engine even
    then.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _make_workers(address: int, event_fd: int, cpus: list[int], lock: bool) -> _native.HostWorkers:
    placement = place(cpus, _native.segment_geometry(address).num_partitions)
    workers = _native.HostWorkers(
        address,
        event_fd,
        cpus,
        NICENESS,
        partitions=list(placement.partitions),
        nodes=list(placement.nodes),
        lock=lock,
    )
    for warning in workers.warnings:
        logger.warning(warning)
    return workers


def _wait_for_the_end(control: socket.socket, workers: _native.HostWorkers) -> None:
    control.settimeout(MEMORY_REPORT_S)
    while True:
        try:
            if not control.recv(16):
                return
        except TimeoutError:
            workers.publish_memory()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
