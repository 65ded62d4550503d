"""What other processes do to the CPUs while something is measured."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path


class Others:
    """Watches what everybody else does to the CPUs, from its creation on.

    own_s: CPU seconds so far of what is not somebody else; those of this process and its ended children
    without it.
    """

    def __init__(self, own_s: Callable[[], float] | None = None) -> None:
        self._own_s = own_s or _process_busy_s
        self._began_s, self._before_s = time.perf_counter(), self._busy_s()

    def cores(self) -> float:
        """How many cores others kept busy on average, time stolen by a hypervisor included."""
        busy_s = self._busy_s() - self._before_s
        return max(0.0, busy_s / max(1e-9, time.perf_counter() - self._began_s))

    def _busy_s(self) -> float:
        ticks = busy_ticks(Path("/proc/stat").read_text())
        return ticks / os.sysconf("SC_CLK_TCK") - self._own_s()


def _process_busy_s() -> float:
    ours = os.times()
    return ours.user + ours.system + ours.children_user + ours.children_system


def busy_ticks(stat: str) -> int:
    """Of all CPUs together, from the text of /proc/stat: neither idle nor waiting for a disk."""
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, stat.split()[1:9])
    return user + nice + system + irq + softirq + steal
