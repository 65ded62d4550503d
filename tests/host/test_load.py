"""The load on the host's CPUs ends with whoever measures beside it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

# Starts a load, which rests, and tells its process id.
MEASURING = """
import time
import omniserve._native as _native
from omniserve.host.load import host_load

geometry = _native.LaneGeometry(
    num_layers=1, num_heads=2, num_kv_heads=1, head_dim=64, hidden_size=128, act_dtype="float32",
    kv_dtype="float32", host_kv_dtype="auto", max_lanes=1, host_page_size=16, max_pages_per_lane=64,
    num_host_pages=64, device_page_size=16, num_frames=1, num_partitions=1, window=0, window_layers=[],
)
with host_load(geometry, 1 << 20, 1, ()) as load:
    print(load._process.pid, flush=True)
    time.sleep(60)
"""
PATIENCE_S = 10.0


def state_of(pid: int) -> str:
    """Of a process, as in `ps`; empty when there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return ""


def await_state(pid: int, holds: Callable[[str], bool]) -> str:
    until = time.monotonic() + PATIENCE_S
    while not holds(state_of(pid)) and time.monotonic() < until:
        time.sleep(0.01)
    return state_of(pid)


def test_a_load_at_rest_ends_with_a_killed_engine() -> None:
    """Stopped, it cannot see that its pipe is closed."""
    engine = subprocess.Popen([sys.executable, "-c", MEASURING], stdout=subprocess.PIPE)
    assert engine.stdout is not None
    pid = int(engine.stdout.readline())
    assert await_state(pid, lambda state: state == "T") == "T"
    engine.send_signal(signal.SIGKILL)
    engine.wait()
    engine.stdout.close()
    try:
        assert await_state(pid, lambda state: state in ("", "Z")) in ("", "Z")
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
