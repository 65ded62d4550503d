"""What every benchmark shares: medians with their range, a stopwatch, the machine it ran on."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from omniserve.machine import available_cpus


class Spread:
    """Median and range of repeated measurements."""

    def __init__(self, values: Sequence[float]) -> None:
        self.median = statistics.median(values)
        self.low, self.high = min(values), max(values)

    def __str__(self) -> str:
        return f"{self.median:.4g} ({self.low:.4g} to {self.high:.4g})"

    def as_dict(self) -> dict[str, float]:
        return {"median": self.median, "low": self.low, "high": self.high}


class Rounds:
    """Samples of several readers taken in turns, one of each per round; one may drop out after some rounds.

    Two readers are compared round by round: what the machine does from second to second then hits both.
    """

    def __init__(self) -> None:
        self.samples: dict[str, list[float]] = {}

    def add(self, reader: str, value: float) -> None:
        self.samples.setdefault(reader, []).append(value)

    def spreads(self) -> dict[str, Spread]:
        return {reader: Spread(values) for reader, values in self.samples.items()}

    def as_dicts(self) -> dict[str, dict[str, float]]:
        return {reader: spread.as_dict() for reader, spread in self.spreads().items()}

    def ratio(self, over: str, under: str) -> Spread:
        """Spread of the ratios of the rounds that have both."""
        return Spread([a / b for a, b in zip(self.samples[over], self.samples[under], strict=False)])


def write_json(path: Path, report: object) -> None:
    """With the folders that are missing on the way."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2) + "\n")


def percentile(values: Sequence[float], share: float) -> float:
    """The value that `share` (0 to 1) of the values do not exceed."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def ms(seconds: float | None) -> str:
    """As a table shows it."""
    return "-" if seconds is None else f"{1e3 * seconds:.4g}"


def percent(share: float | None) -> str:
    """As a table shows it."""
    return "-" if share is None else f"{100 * share:.1f} %"


def seconds_of(work: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    """By `clock`; time.process_time and time.thread_time leave out what others did meanwhile."""
    began = clock()
    work()
    return clock() - began


def cpus_to_pin() -> list[int]:
    """The CPUs to pin threads to, as the engine does: the affinity mask, or none under a quota."""
    budget = available_cpus()
    return list(budget.cpus) if budget.count == len(budget.cpus) else []


@contextmanager
def pinned(cpus: Sequence[int]) -> Iterator[None]:
    """The calling thread stays on the first of the CPUs meanwhile; with none it stays free."""
    before = os.sched_getaffinity(0)
    if cpus:
        os.sched_setaffinity(0, cpus[:1])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _parent_and_ticks(process: int) -> tuple[int, int]:
    """Of a process: who started it, and its CPU time so far. OSError once it has ended."""
    # The command's name stands in brackets and may hold anything.
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return int(fields[1]), int(fields[11]) + int(fields[12])


def process_busy_s(process: int) -> float:
    """CPU seconds so far of one process, all its threads; OSError once it has ended."""
    return _parent_and_ticks(process)[1] / os.sysconf("SC_CLK_TCK")


def tree_busy_s(root: int) -> float:
    """CPU seconds so far of process `root` and its living descendants."""
    parents, ticks = {}, {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with suppress(OSError):  # ended meanwhile
                process = int(folder.name)
                parents[process], ticks[process] = _parent_and_ticks(process)

    def is_descendant(process: int) -> bool:
        while process in parents and process != root:
            process = parents[process]
        return process == root

    return sum(n for process, n in ticks.items() if is_descendant(process)) / os.sysconf("SC_CLK_TCK")


def machine() -> dict[str, Any]:
    names = {
        line.split(":")[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if "model name" in line
    }
    return {
        "cpu": ", ".join(sorted(names)),
        "cpus": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "torch": version("torch"),
    }
