"""NUMA: which node every CPU belongs to, hence how many partitions host memory has and who works for which.

Partition p stands for the p-th of the nodes that the host's CPUs span. Engine and host process both read it
here, so that they agree. Standard library only: the host process imports this.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SYSFS = Path("/sys")
# Of the native part.
MAX_PARTITIONS = 32


@dataclass(frozen=True, slots=True)
class Placement:
    """nodes: NUMA node of each partition; partitions: that of each CPU in turn. Empty: nothing to go by."""

    nodes: tuple[int, ...] = ()
    partitions: tuple[int, ...] = ()


def num_partitions(cpus: Sequence[int], sysfs: Path = SYSFS) -> int:
    """NUMA nodes that the host's CPUs span, 1 when unknown. No CPUs given: those this process may use."""
    return min(MAX_PARTITIONS, len(_spanned(cpus, sysfs)))


def place(cpus: Sequence[int], count: int, sysfs: Path = SYSFS) -> Placement:
    """Where `count` partitions lie, and to which of them a worker pinned to each of `cpus` belongs.

    Workers without a CPU of their own belong to partitions in turn, whatever the nodes. When `count` is not
    the number of nodes, nothing is placed.
    """
    nodes = _spanned(cpus, sysfs)
    if count == 1 or len(nodes) != count:
        return Placement()
    return Placement(nodes, tuple(nodes.index(node) for node in nodes_of(cpus, sysfs)))


def nodes_of(cpus: Sequence[int], sysfs: Path = SYSFS) -> list[int]:
    """NUMA node of each CPU; 0 for one that no node names, as on a kernel without NUMA."""
    node_of = {}
    for folder in (sysfs / "devices/system/node").glob("node[0-9]*"):
        for cpu in _cpu_list(folder / "cpulist"):
            node_of[cpu] = int(folder.name.removeprefix("node"))
    return [node_of.get(cpu, 0) for cpu in cpus]


def _spanned(cpus: Sequence[int], sysfs: Path) -> tuple[int, ...]:
    return tuple(sorted(set(nodes_of(cpus or sorted(os.sched_getaffinity(0)), sysfs))))


def _cpu_list(path: Path) -> list[int]:
    """CPUs of a list such as "0-3,8,10-11"; none when the file cannot be read."""
    try:
        text = path.read_text().strip()
    except OSError:
        return []
    cpus: list[int] = []
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        cpus += range(int(first), int(last or first) + 1)
    return cpus
