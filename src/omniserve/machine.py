"""What this process may use of its machine: the affinity mask and the cgroup's limits, not all that is there.

Limits stand in cgroup v2 files (`cpu.max`, `memory.max`) or, on older systems, in those of v1. The one that
counts is the lowest of the process's own cgroup and all around it.
"""

from __future__ import annotations

import os
import resource
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUP = Path("/proc/self/cgroup")


@dataclass(frozen=True, slots=True)
class CpuBudget:
    """CPUs this process may use: how many at once, and which. `count` is below len(cpus) under a quota."""

    count: int
    cpus: tuple[int, ...]


def available_cpus() -> CpuBudget:
    """The affinity mask, siblings of one physical core side by side, and the cgroup's quota rounded down."""
    cpus = tuple(sorted(os.sched_getaffinity(0), key=_core_of))
    quota = _cpu_quota()
    return CpuBudget(len(cpus) if quota is None else min(len(cpus), max(1, int(quota))), cpus)


def raise_file_limit() -> None:
    """Let this process, and those it starts, have as many files open as it may; a connection is one too."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):  # some systems name a limit that they do not grant
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def memory_limit_bytes() -> int:
    """The smaller of physical memory and every cgroup limit that applies, in bytes."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for folder in _cgroup_folders("memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            text = _read(folder / name)
            if text and text != "max":
                limits.append(int(text))
    return min(limits)


def _cpu_quota() -> float | None:
    """CPUs' worth of time; None: no limit."""
    quotas = []
    for folder in _cgroup_folders("cpu"):
        quota, _, period = (_read(folder / "cpu.max") or "").partition(" ")
        if not quota:  # v1
            quota, period = (_read(folder / f"cpu.cfs_{name}_us") or "" for name in ("quota", "period"))
        if period and quota not in ("", "max", "-1"):
            quotas.append(int(quota) / int(period))
    return min(quotas, default=None)


def _cgroup_folders(controller: str) -> list[Path]:
    """Where limits of `controller` may stand: its mount point, this process's cgroup and those around it."""
    folders = [CGROUPS]
    for line in (_read(OWN_CGROUP) or "").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        mount = CGROUPS / controller if controllers else CGROUPS  # v1 has a tree for each controller
        own = mount / path.lstrip("/")
        folders += [mount, *(p for p in (own, *own.parents) if p.is_relative_to(mount) and p != mount)]
    return folders


def _core_of(cpu: int) -> tuple[int, int, int]:
    """Sort key: package, physical core, CPU."""
    folder = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology")
    package, core = (_read(folder / name) or "0" for name in ("physical_package_id", "core_id"))
    return (int(package), int(core), cpu)


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None
