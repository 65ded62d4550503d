"""The host process: maps the segment, runs the native workers, ends when the engine does.

Started by the supervisor as `python -m omniserve.host.process MEMORY_FD EVENT_FD CONTROL_FD THREADS CPUS`.
It imports neither torch nor numpy. CONTROL_FD is one end of a socket pair: "ready" goes out once, and its
closing at the other end (or the engine's death) is the order to stop.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import signal
import socket
import sys

import setproctitle

import omniserve._native as _native

PR_SET_PDEATHSIG = 1
# Below the device threads: host attention is best-effort work.
NICENESS = 5


def main(arguments: list[str]) -> int:
    memory_fd, event_fd, control_fd, threads = (int(a) for a in arguments[:4])
    cpus = [int(c) for c in arguments[4].split(",") if c]
    setproctitle.setproctitle("omniserve: host")
    # A stopped host cannot read its control socket; the kernel kills it with the engine even then.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if cpus:
        os.sched_setaffinity(0, cpus)
    memory = mmap.mmap(memory_fd, os.fstat(memory_fd).st_size)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    workers = _native.HostWorkers(address, event_fd, cpus, NICENESS)
    workers.start(threads)
    # An engine that is gone by now needs no answer.
    with socket.socket(fileno=control_fd) as control, contextlib.suppress(ConnectionError):
        control.sendall(b"ready")
        while control.recv(16):
            pass
    workers.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
