"""The processes of a running server, as the kernel tells of them."""

from __future__ import annotations

import time
from pathlib import Path

PATIENCE_S = 120.0
SERVER, ENGINE, HOST, OTHER = "server", "engine", "host", "other"
# By what is in the command line before and after a process has given itself a name.
_SIGNS = {
    ENGINE: (b"omniserve.engine.process", b"omniserve: engine"),
    HOST: (b"omniserve.host.process", b"omniserve: host"),
}


def tree(root: int) -> dict[int, str]:
    """What each process is, by its id: `root`, the server, and all below it that live."""
    parents = {pid: parent for pid in _all_pids() if (parent := _parent(pid)) is not None}
    found = {root: SERVER} if root in parents else {}
    waiting = list(found)
    while waiting:
        above = waiting.pop()
        below = [pid for pid, parent in parents.items() if parent == above]
        found |= {pid: _kind(pid) for pid in below}
        waiting += below
    return found


def wait_gone(pids: set[int]) -> None:
    """Until all have ended; only a process that stays can fail this."""
    deadline = time.monotonic() + PATIENCE_S
    while left := [pid for pid in pids if _parent(pid) is not None]:
        assert time.monotonic() < deadline, f"these live on: {left}"
        time.sleep(0.02)


def _all_pids() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]


def _parent(pid: int) -> int | None:
    """None: it has ended, though somebody may still have to ask for its status."""
    try:
        state, parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if state in ("Z", "X") else int(parent)


def _kind(pid: int) -> str:
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return OTHER
    return next((kind for kind, signs in _SIGNS.items() if any(s in command for s in signs)), OTHER)
